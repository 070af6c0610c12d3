"""What every script needs to talk to its user: options, one-line errors, tables, whole files."""

import argparse
import contextlib
import difflib
import errno
import functools
import glob
import json
import os
import re
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

# domain of the target -> the metric that the study reports
MAIN_METRIC = {"natural": "accuracy", "medical": "mean_auc"}
EXIT_BAD_INPUT, EXIT_STOPPED = 2, 75  # 75 is EX_TEMPFAIL: run the same command again


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds "(default: …)" to every option whose help does not say it already."""

    def _get_help_string(self, action):
        default = action.default
        silent = default is None or default is argparse.SUPPRESS or isinstance(default, bool)
        if "default:" in action.help or silent:
            return action.help
        words = default if isinstance(default, list) else [default]
        return f"{action.help} (default: {' '.join(map(str, words))})"


class Parser(argparse.ArgumentParser):
    """argparse that states every default in --help; a mistake is a ValueError, as elsewhere."""

    def __init__(self, description=None, **settings):
        settings |= {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(description=description, **settings)

    def parse_known_args(self, args=None, namespace=None):
        given = [word.split("=")[0] for word in (sys.argv[1:] if args is None else args)]
        for action in self._actions:
            flag = action.option_strings[-1:]
            if action.nargs == "+" and flag and given.count(*flag) > 1:
                self.error(f"{flag[0]} is there twice; name all of its values after one")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        if message.startswith("unrecognized arguments"):
            word = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message = f"unknown option {word}" + (f"; did you mean {near[0]}?" if near else "")
        raise ValueError(message)


def one_of(*choices):
    """An argparse type: one of these words; the near match is named otherwise."""

    def check(text):
        if text in choices:
            return text
        near = difflib.get_close_matches(text, choices, n=1, cutoff=0)[0]
        known = ", ".join(choices)
        raise argparse.ArgumentTypeError(f"unknown {text!r}, did you mean {near}? ({known})")

    return check


def number(kind, low, high=10**9, word=None):
    """An argparse type: an int or a float from low to high, or this word."""

    def check(text):
        if text == word:
            return word
        value = kind(text)
        if not low <= value <= high:  # nor NaN
            raise argparse.ArgumentTypeError(f"{text:.40} is not from {low} to {high}")
        return value

    check.__name__ = kind.__name__
    return check


def not_empty(text):
    """An argparse type: a text, which an unset variable of the shell is not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def say(env, text):
    """Prints a line above any progress bar, on the main rank only."""
    if env.main:
        tqdm.write(text)


say_once = functools.lru_cache(say)


def progress_bar(env, total, start=0, title="", unit="step"):
    """A tqdm bar; disabled off a terminal, on the other ranks, and with TQDM_DISABLE set."""
    off = not env.main or bool(os.environ.get("TQDM_DISABLE")) or None
    return tqdm(desc=title, total=total, initial=start, unit=unit, dynamic_ncols=True, disable=off)


class Stopped(Exception):
    """The run was asked to stop; its state is saved. status: of the process."""

    def __init__(self, message, status=EXIT_STOPPED):
        super().__init__(message, status)
        self.status = status

    def __str__(self):
        return self.args[0]


def exit_status(main):
    """That of main(): 0 for None. Any error becomes one line and status 2 (TRACEBACK=1 shows
    where); a signal, until something else listens to it, one line and 75.
    """

    def stop(received, frame):
        raise KeyboardInterrupt(signal.Signals(received).name)

    for received in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(received, stop)
    if hasattr(sys.stdout, "reconfigure"):  # not of a notebook
        # A log file shows each line when it is said; what a terminal cannot show becomes "?".
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    rank = os.environ.get("RANK", "0")
    try:
        return main() or 0
    except Stopped as asked:
        text, status = f"{asked}; the same command continues", asked.status
    except KeyboardInterrupt as asked:
        text, status = f"stopped by {asked or 'SIGINT'}; run the same command again", EXIT_STOPPED
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            try:
                print(flush=True)  # what could not be written may be lost already
            except BrokenPipeError:  # what read this output has ended, as head does: drop the rest
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 128 + signal.SIGPIPE
        if os.environ.get("TRACEBACK"):
            raise
        text, status = one_line(error), EXIT_BAD_INPUT
        if not isinstance(error, (ValueError, OSError)):  # those are raised where the mend is known
            text = f"{type(error).__name__}: {text}; TRACEBACK=1 shows where"
            if re.search("memory|allocate|DataLoader worker", text, re.IGNORECASE):
                text += "; less is needed with --accumulate, --checkpoint-activations, fewer"
                text += " --workers, a smaller --batch-size or --image-size"
        text = "error" + (f" (rank {rank})" if rank != "0" else "") + f": {text}"
    if rank == "0" or status == EXIT_BAD_INPUT:
        print(text, file=sys.stderr)
    return status


def one_line(error):
    """The message of an error, in one line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    # An error of a worker process comes with its whole traceback; its last line says it.
    return lines[-1].partition(": ")[2] if "Caught " in lines[0] else " ".join(lines)


def table(rows, header):
    """A Markdown table with aligned columns, as text."""
    rows = [[str(word).replace("|", r"\|") for word in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def print_table(rows, header):
    print(table(rows, header))


# Settings of a config that those of older files do not name, and which were then as they are now.
UNNAMED = ("nesterov", "normalization", "square", "zero_head")


def other_setting(theirs, ours):
    """The first setting of a config that was another in an earlier one, or None. What that does not
    name was off, None or False, but for UNNAMED.
    """
    for key in sorted(ours):
        unnamed = key not in theirs and (key in UNNAMED or not ours[key])
        if not unnamed and theirs.get(key) != ours[key]:
            return key
    return None


def counted(number, word):
    """1 cell, 2 cells."""
    return f"{number:,} {word}" + ("s" if number != 1 else "")


@contextlib.contextmanager
def writing(path):
    """Errors of writing become an OSError that names the file and the mend."""
    try:
        yield
    # torch.save says so with a RuntimeError when the disk is full.
    except (OSError, RuntimeError) as error:
        reasons = (error, error.__context__)
        full = any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in reasons)
        reason = "the disk is full" if full else " ".join(str(error).split())
        mend = "free some space or give another --out, and run the same command again"
        raise OSError(f"{path}: cannot be written ({reason}); {mend}") from error


def refuse_unwritable(option, *paths):
    """Raises OSError, before the work whose outcome shall go to these files, for one that cannot be
    written, also where its folder is still to be made. option: that names another place.
    """
    for path in map(Path, filter(None, paths)):
        there = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        try:
            if path.is_dir():
                raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
            with tempfile.TemporaryFile(dir=there):
                longest = os.pathconf(there, "PC_NAME_MAX")
            if max(len(os.fsencode(part)) for part in path.parts) > longest:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        except OSError as error:
            raise OSError(f"{option}: {path} cannot be written ({error.strerror})") from error


def write_atomically(path, write, replace=True):
    """Calls write(a binary file), which then gets its name: whole or not at all. No two writers
    share a temporary file. Raises OSError naming the file; what was there before stays.

    replace=False: a file that is there stays, also one that another process put there meanwhile,
    and the answer is False; else True.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by killed writers
            with contextlib.suppress(OSError):  # another process removes it too
                if time.time() - left.lstat().st_mtime > 3600:
                    left.unlink()
        file = open(temporary, "xb")  # through no symbolic link
        try:
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if not replace:
                try:
                    os.link(temporary, path)
                    return True
                except FileExistsError:
                    return False
                except OSError:  # a file system without hard links
                    if path.exists():
                        return False
            os.replace(temporary, path)
            return True
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path, record, replace=True):
    """One JSON file: strict (no NaN), whole or not at all; replace: as of write_atomically."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    return write_atomically(path, lambda file: file.write(text.encode()), replace)


@contextlib.contextmanager
def locked(folder, main=True):
    """A block in which no other process writes to this folder; main: whether this one does. Raises
    ValueError naming the folder while another process is in such a block. The lock ends with its
    process, and holds across NFS. A file system that has no locks is told of and trusted.
    """
    if not main:
        yield
        return
    import fcntl  # not for plot.py, which needs no lock

    folder = Path(folder)
    path, made = folder / "lock", [p for p in (folder, *folder.parents) if not p.exists()]
    # torchrun may start again before an NFS server frees the lock of a lost node, after 90 s.
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    deadline = time.monotonic() + 120 * restarts
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(file)
                if time.monotonic() >= deadline:
                    mend = "wait for its end, or give another --out"
                    said = f"{folder}: another process is writing there; {mend}"
                    raise ValueError(said) from None
                time.sleep(1)
            except OSError as error:
                reason = f"cannot be locked ({error.strerror}); start no second process"
                print(f"{folder}: {reason}", file=sys.stderr)
                break
            else:
                if os.fstat(file).st_nlink:  # else its holder has just removed it
                    break
                os.close(file)
    try:
        for left in folder.glob(".*.tmp"):
            left.unlink()
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
        for place in made:
            with contextlib.suppress(OSError):  # it holds something
                place.rmdir()
