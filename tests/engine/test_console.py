"""What a script says, reads and writes: options, one-line errors, whole files, locks."""

import errno
import fcntl
import json
import math
import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import refuses
from interruption import HANG

from engine import console


def test_a_crash_or_nan_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    console.write_json(path, {"value": 1})

    def crash(file):
        file.write(b'{"val')
        assert [p for p in tmp_path.iterdir() if p != path] == [Path(file.name)]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        console.write_atomically(path, crash)
    with pytest.raises(ValueError):
        console.write_json(path, {"value": math.nan})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(path.read_text()) == {"value": 1}


def test_two_writers_at_once_share_no_file(tmp_path):
    """The last one to finish is read, whole; replace=False leaves what the other has finished."""
    path = tmp_path / "result.json"
    for replace, found in ((True, "first"), (False, "second")):

        def first(file):
            file.write(b"fir")
            assert console.write_atomically(path, lambda other: other.write(b"second"))
            file.write(b"st")

        assert console.write_atomically(path, first, replace) is replace
        assert path.read_text() == found
        assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("error", (None, PermissionError, OSError))
def test_a_new_file_replaces_none(error, tmp_path, monkeypatch):
    """Also on a file system that has no hard links."""
    if error:
        monkeypatch.setattr(os, "link", Mock(side_effect=error))
    for text, written in (("1", True), ("2", False)):
        assert console.write_json(tmp_path / "result.json", text, replace=False) is written
        assert (tmp_path / "result.json").read_text() == '"1"\n'
        assert len(list(tmp_path.iterdir())) == 1


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path):
    names = ".a.json.1.tmp .a.json.2.tmp .b.json.1.tmp .a.json.tmp a.json.1.tmp".split()
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, time.time() - 3500 - 200 * (name != names[1])))
    console.write_json(tmp_path / "a.json", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.json", *names[1:]])


@pytest.mark.parametrize("planted", (".model.pt.abcd.tmp", "lock"))
def test_no_symbolic_link_is_followed(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(console.secrets, "token_hex", lambda count: "abcd")
    (tmp_path / "precious").write_text("all that I have")
    (tmp_path / planted).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="cannot be written"):
        if planted == "lock":
            console.locked(tmp_path).__enter__()
        console.write_json(tmp_path / "model.pt", 1)
    assert (tmp_path / "precious").read_text() == "all that I have"
    assert (tmp_path / planted).is_symlink()


def test_torchrun_waits_for_the_lock_of_a_lost_node(tmp_path, monkeypatch):
    """Without it, and before, it is refused; nothing stays of a killed process's lock."""
    run, (reading, writing) = tmp_path / "run", os.pipe()
    pid = os.fork()
    if not pid:
        with console.locked(run):
            (run / ".checkpoint.pt.1234.tmp").touch()
            os.write(writing, b".")
            time.sleep(HANG)
        os._exit(0)
    os.read(reading, 1)

    def lose_the_node(seconds):
        if len(waited.mock_calls) == 3:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    refuses(ValueError, console.locked(run).__enter__, f"{run}: another process is writing there")
    with console.locked(run, main=False):  # of torchrun's other processes
        pass
    waited = Mock(side_effect=lose_the_node)
    monkeypatch.setattr(time, "sleep", waited)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with console.locked(run):
        assert len(waited.mock_calls) == 3 and [p.name for p in run.iterdir()] == ["lock"]
    assert not list(run.iterdir())


def test_a_lock_that_its_holder_has_just_removed_is_none(tmp_path, monkeypatch):
    lock, calls = fcntl.lockf, []

    def slow(file, how):
        if not calls:
            (tmp_path / "lock").unlink()
        calls.append(file)
        lock(file, how)

    monkeypatch.setattr(fcntl, "lockf", slow)
    with console.locked(tmp_path):
        assert len(calls) == 2 and (tmp_path / "lock").exists()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    lock = Mock(side_effect=OSError(errno.ENOLCK, "No locks available"))
    monkeypatch.setattr(fcntl, "lockf", lock)
    with console.locked(tmp_path / "a" / "run"):
        pass
    said = f"{tmp_path}/a/run: cannot be locked (No locks available); start no second process\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())  # nothing was written
