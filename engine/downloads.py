"""A file from the web: continued where the connection was cut, whole or not there."""

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request

from engine.console import locked, progress_bar

TRIES = 5  # in a row that bring no byte more
PAUSE = 1.0  # seconds more before each of them
BLOCK = 2**20


def fetch(url, path, check, env):
    """Fetches a URL to a path. What came before a cut stays in part-of-NAME beside it, and is gone
    on from, also by a later call, while the server has the same version of the file.

    check: called with the path of the whole before it gets its name; raises ValueError for what is
    not meant, which is removed. Raises OSError or ValueError naming the URL or the folder.
    """
    part = path.with_name(f"part-of-{path.name}")
    note = path.with_name(f"part-of-{path.name}.json")  # the version that it is of, and its length
    bar = progress_bar(env, None, 0, path.name, "B")
    bar.unit_scale = True
    with locked(path.parent), open(part, "ab") as file, bar:
        try:
            _until_whole(url, file, note, bar)
            check(part)
            os.replace(part, path)
            note.unlink()
        except ValueError as error:
            part.unlink()
            note.unlink(missing_ok=True)
            raise ValueError(f"{url}: not the file that is meant ({error})") from error
        finally:
            if part.exists() and not part.stat().st_size:
                part.unlink()


def _until_whole(url, file, note, bar):
    """Reads on until all is there; gives up after TRIES that brought nothing."""
    most, tries, reason = 0, 0, "too few bytes"
    while True:
        try:
            if _read_on(url, file, note, bar):
                file.flush()
                os.fsync(file.fileno())
                return
        except urllib.error.URLError as error:
            raise OSError(f"{url}: cannot be fetched ({error})") from error
        except ValueError as error:  # of what came before nothing is lost
            raise OSError(f"{url}: not the file that is meant ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        tries = 0 if file.tell() > most else tries + 1
        most = max(most, file.tell())
        if tries == TRIES:
            cut = f"cut off after {file.tell():,} bytes ({reason})"
            again = "goes on from there" if _noted(note).get("version") else "begins anew"
            raise OSError(f"{url}: {cut}; the same command {again}")
        time.sleep(PAUSE * tries)


def _read_on(url, file, note, bar):
    """One answer of the server, appended to the file; whether it is whole then."""
    known, headers, have = _noted(note), {}, file.seek(0, os.SEEK_END)
    if have and known.get("version"):
        headers = {"Range": f"bytes={have}-", "If-Range": known["version"]}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        _empty(file)
        return False
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise ValueError("a web page came")
        tag = answer.headers.get("ETag", "W/")  # a weak one does not tell bytes apart
        version = answer.headers.get("Last-Modified") if tag.startswith("W/") else tag
        span, _, length = answer.headers.get("Content-Range", "").partition("/")
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            _empty(file)
            length = answer.headers.get("Content-Length")
        found = {"version": version, "length": length}
        if span and (known != found or not span.startswith(f"bytes {have}-")):
            _empty(file)  # what comes is the end of another file
            return False
        note.write_text(json.dumps(found))
        bar.total, bar.n = int(length) if length else None, file.tell()
        while block := answer.read(BLOCK):
            file.write(block)
            bar.update(len(block))
    return length is None or file.tell() == int(length)


def _noted(note):
    with contextlib.suppress(OSError, ValueError):
        return json.loads(note.read_text())
    return {}


def _empty(file):
    file.seek(0)
    file.truncate()
