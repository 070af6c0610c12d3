"""Downloads from a server on this machine that cuts off, lies, and answers with something else."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import refuses
from grids import QUICK, call, results
from test_models import write_npz

import fewshot
import models
from engine import weights
from engine.processes import setup

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """It sends `content` as a version `tag`; what else it does, tests set."""

    content, tag, type, status, lie = CONTENT, '"one"', "application/zip", 200, 0
    ranges = if_range = True
    cuts = ()  # places in the content where answers end, one after the other; then none

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.sent = [], 0
        self.url = f"http://127.0.0.1:{self.server_port}/network.npz"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=")[:-1]) if asked and server.ranges else 0
        if server.if_range and self.headers.get("If-Range") != server.tag:
            start = 0
        if start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else server.status)
        total = len(server.content) + server.lie
        self.send_header("Content-Length", total - start)
        self.send_header("Content-Type", server.type)
        if server.tag:
            self.send_header("ETag", server.tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        end = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(server.content[start:end])
        server.sent += len(server.content[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(weights, "PAUSE", 0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def get(server, tmp_path, monkeypatch):
    """Fetches the file -> its content; its folder holds nothing else then."""

    def check(path):
        if path.read_bytes() != server.content:
            raise ValueError("no such weights")

    monkeypatch.setattr(weights, "read_weights", check)

    def get():
        path = tmp_path / "networks" / "network.npz"
        path.unlink(missing_ok=True)
        weights.fetch(server.url, path, setup("fp32"))
        assert [path] == list(path.parent.iterdir())
        return path.read_bytes()

    return get


def test_cut_at_ten_random_bytes(server, get):
    cuts = sorted(np.random.default_rng(1).choice(len(CONTENT), 10, replace=False).tolist())
    server.cuts = cuts.copy()
    assert hashlib.sha256(get()).digest() == hashlib.sha256(CONTENT).digest()
    assert server.asked == [None, *(f"bytes={cut}-" for cut in cuts)]
    assert server.sent == len(CONTENT)  # no byte twice


@pytest.mark.parametrize("changes", [{}, {"if_range": False}])
def test_a_later_call_goes_on_unless_the_file_has_changed(changes, server, get, tmp_path):
    server.cuts = [1000] + [0] * 9
    refuses(OSError, get, "cut off after 1,000 bytes", "goes on")
    assert [path.name for path in sorted(tmp_path.rglob("*.npz"))] == ["part-of-network.npz"]
    server.cuts, server.asked, server.sent = [], [], 0
    assert get() == CONTENT and server.asked == ["bytes=1000-"]
    server.cuts = [1000] + [0] * 9
    refuses(OSError, get, "cut off")
    vars(server).update(cuts=[], tag='"two"', content=CONTENT[::-1], **changes)
    assert get() == CONTENT[::-1]


@pytest.mark.parametrize("changes", [{"ranges": False}, {"tag": None}, {"tag": 'W/"weak"'}])
def test_without_ranges_or_versions_it_begins_anew(changes, server, get):
    vars(server).update(cuts=[50, 7, 100_000], **changes)
    assert get() == CONTENT and server.sent == len(CONTENT) + 100_057


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"lie": 10}, OSError, "cut off after"),
        ({"lie": -10}, ValueError, "not the file that is meant (no such weights)"),
        ({"type": "text/html; charset=utf-8"}, OSError, "a web page came"),
        ({"status": 404}, OSError, "cannot be fetched (HTTP Error 404"),
    ],
)
def test_lies_and_other_answers_leave_nothing_to_be_loaded(changes, error, said, server, get):
    vars(server).update(changes)
    refuses(error, get, server.url, said)


def test_a_web_page_in_between_costs_nothing(server, get):
    vars(server).update(cuts=[100_000, 0, 0, 0, 0, 0])
    refuses(OSError, get, "cut off after 100,000 bytes", "the same command goes on from there")
    server.type = "text/html"
    refuses(OSError, get, "a web page came")
    server.type = "application/zip"
    assert get() == CONTENT and server.sent <= len(CONTENT) + 50_000 + len(CONTENT) - 100_000


def test_a_network_is_fetched_once_and_found_offline(server, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = models.create_model("R14x0.5", 5).state_dict()
    write_npz("written.npz", state)
    server.content = Path("written.npz").read_bytes()
    known = "imagenet21k", "R14x0.5", server.url
    monkeypatch.setitem(weights.PUBLISHED, "bit:toy", weights.Published(*known))
    words = ("--checkpoint", "bit:toy", "--target", f"folder:{folder}", "--shots", 1, "--seeds", 1)
    words += ("--method", "nearest-mean", "--cache-dir", "cache", *QUICK)
    refuses(FileNotFoundError, lambda: call(fewshot, *words), "add --download", server.url)
    good, server.content = server.content, server.content[:-9]
    refuses(ValueError, lambda: call(fewshot, *words, "--download"), "not the file", "damaged")
    assert not list(Path("cache").rglob("*.*")) and not Path("results").exists()
    server.content, server.asked = good, []
    for more in (["--download"], []):
        assert call(fewshot, *words, *more, "--out", f"results{len(more)}") == 0
        (record,) = results(Path(f"results{len(more)}")).values()
        digest = hashlib.sha256(good).hexdigest()
        assert record["config"]["weights"] == digest[:16] and record["source"] == "imagenet21k"
        assert record["layout"]["checkpoint"] == "cache/networks/bit-toy.npz"
    assert server.asked == [None]
    assert capsys.readouterr().out.count(f"cache/networks/bit-toy.npz, SHA-256 {digest}\n") == 1
    call(models, "list", "--cache-dir", "cache")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "bit:toy" in line)
    found = [cell.strip() for cell in row.split("|")[2:5]]
    assert found == ["imagenet21k", "98", "cache/networks/bit-toy.npz"]
    unknown = ("--checkpoint", "bit:BiT-M-R50x2")
    refuses(ValueError, lambda: call(fewshot, *unknown), "did you mean 'bit:BiT-M-R50x")
