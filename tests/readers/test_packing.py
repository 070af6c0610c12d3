"""Packing that is killed, interrupted, out of disk; packs that are damaged."""

import contextlib
import errno
import json
import os
import shutil
import signal
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import refuses
from interruption import wait
from packing import NIH, Xrays, contents, error_line, pack, run_data, says, start

import data
from data import load_dataset
from readers import inspect, packs

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.rmdir", "os.fsync")


def at_operation(number, folder, act):
    """An audit hook: act(number) before the file operation of that number, of each for None."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event in FILE_EVENTS and str(args[0]).startswith(str(folder)):
            seen += 1
            if number in (None, seen):
                act(seen)

    return hook


def kill(number):
    """The whole group, or the main process alone."""
    (os.killpg if number % 2 else os.kill)(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def frequent():
    """Every fifth image of 48 pixels is the last of those that are written to the disk at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "FLUSH", 10_000)
        yield


class Whole(NamedTuple):
    """A pack of 40 + 12 images that was made undisturbed."""

    root: Path
    contents: dict
    operations: int  # on files, that it took

    def args(self, out, *more, root=None):
        return "pack", "nih", "--size", 48, "--data-dir", root or self.root, "--out", out, *more

    def finish(self, out):
        """Packing goes on to the same bytes."""
        run_data(*self.args(out, "--workers", 1))
        assert contents(out / "nih@48") == self.contents
        assert [path.name for path in out.iterdir()] == ["nih@48"]


@pytest.fixture(scope="module")
def whole(nih_root, tmp_path_factory, frequent):
    out = tmp_path_factory.mktemp("whole")
    note = os.open(out / "note", os.O_RDWR | os.O_CREAT)
    hook = at_operation(None, out / "packs", lambda number: os.write(note, b"."))
    assert wait(start(Whole(nih_root, {}, 0).args(out / "packs"), out / "log", hook)) == 0
    return Whole(nih_root, contents(out / "packs" / "nih@48"), (out / "note").stat().st_size)


def test_killed_before_file_operations(whole, tmp_path):
    """Images that the journal lacks, files half there, pack.json but the directory not renamed.

    At whatever moment it stopped, other settings are refused or make what they say.
    """
    # The last ten one by one, before them every fourth.
    last = whole.operations - 9
    for number in [*range(1, last, 4), *range(last, whole.operations + 1)]:
        out, other = tmp_path / str(number), tmp_path / f"{number}-jpeg"
        hook = at_operation(number, out, kill)
        assert wait(start(whole.args(out), tmp_path / "log", hook)) == -signal.SIGKILL
        load = partial(load_dataset, "nih@48", out)
        refuses(FileNotFoundError, load, out / "nih@48", "python data.py pack nih --size 48")
        assert data.main(["list", "--data-dir", str(out)]) == 0
        if out.exists():
            shutil.copytree(out, other)
        if data.main([*map(str, whole.args(other, "--codec", "jpeg", "--workers", 1))]) == 0:
            assert json.loads((other / "nih@48" / "pack.json").read_text())["codec"] == "jpeg"
        whole.finish(out)


def test_interrupted_by_hand(whole, tmp_path):
    """One line, status 75 as for every stopped run."""
    hook = at_operation(
        whole.operations // 2, tmp_path / "out", lambda _: signal.raise_signal(signal.SIGINT)
    )
    status = wait(start(whole.args(tmp_path / "out"), tmp_path / "log", hook))
    output = (tmp_path / "log").read_text()
    assert "Traceback" not in output and status == 75 and says(output.splitlines()[-1], "SIGINT")
    whole.finish(tmp_path / "out")


def test_images_that_are_there_are_not_read_again(whole, tmp_path, monkeypatch):
    """The first of them change after a stop, outside the sample that the digest looks at: the pack
    has them as they were.
    """
    monkeypatch.setattr(inspect, "SAMPLE", 2)
    root, out = shutil.copytree(whole.root, tmp_path / "root"), tmp_path / "out"
    images = root / "NIH-ChestXRay-14" / "images"
    late = images / "00000034_000.png"  # not among those that tell the size needed
    content = late.read_bytes()
    late.write_bytes(content[:100])
    args = whole.args(out, "--workers", 1, root=root)
    assert says(run_data(*args, status=2), late, "unreadable")
    late.write_bytes(content)
    for i in (2, 4):
        shutil.copy(late, images / f"{i:08d}_000.png")
    run_data(*args)
    made = contents(out / "nih@48")
    made["pack.json"] = whole.contents["pack.json"]  # which holds that digest
    assert made == whole.contents


def test_two_packings_at_once(whole, tmp_path):
    out = tmp_path / "out"
    hook = at_operation(whole.operations // 2, out, lambda _: signal.raise_signal(signal.SIGSTOP))
    pid = start(whole.args(out), tmp_path / "log", hook)
    os.waitpid(pid, os.WUNTRACED)  # it has stopped
    try:
        assert says(run_data(*whole.args(out), status=2), "nih@48", "another process")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    whole.finish(out)


def test_file_that_cannot_grow(whole, tmp_path):
    """As on a full disk, in the middle of the images."""
    out = tmp_path / "out"
    assert wait(start(whole.args(out), tmp_path / "log", limit=50_000)) == 2
    line = error_line((tmp_path / "log").read_text())
    assert says(line, os.strerror(errno.EFBIG), out / "nih@48", "run the same command again")
    whole.finish(out)


def test_disk_too_small(tmp_path, monkeypatch):
    """Refused before any image is written, with what it takes; a larger disk will do."""
    root = Xrays(tmp_path).root
    pack("nih", 16, "--out", root / "other", root=root)
    images = sum(path.stat().st_size for path in root.glob("other/nih@16/*.images"))
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda path: usage(images))
    line = pack("nih", 16, root=root, status=2)
    assert says(line, root / "nih@16.part", "--out", "--size", "--codec jpeg", "GB are free")
    assert images < 1e9 * float(line.partition("needs about ")[2].split()[0]) < images + 6 * 200
    assert not list(root.glob("nih@16.part/*.images"))
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda path: usage(images + 6 * 200))
    pack("nih", 16, root=root)


@contextlib.contextmanager
def flipped(path, place):
    """One bit of a file changed, for a while."""
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    yield
    path.write_bytes(whole)


@pytest.fixture
def packed(tmp_path):
    pack("nih", 16, root=Xrays(tmp_path).root)
    return tmp_path / "nih@16"


@pytest.fixture
def damaged(packed):
    """The pack is refused, by the name of a file and with the mend."""
    return partial(refuses, ValueError, partial(load_dataset, packed.name, packed.parent))


def test_flipped_byte_of_an_image(packed):
    """Each byte of the images file is under the checksum of its image, which is named."""
    names, train = [row[0] for row in NIH["train"]], load_dataset("nih@16", packed.parent)
    places = np.cumsum([0, *(train.read(i).numel() for i in range(4))])
    assert places[-1] == (packed / "train.images").stat().st_size
    for i, name in enumerate(names):
        for place in (places[i], places[i + 1] - 1):
            with flipped(packed / "train.images", place):
                dataset = load_dataset("nih@16", packed.parent)
                refuses(ValueError, partial(dataset.read, i), name, packed, "pack it again")
                dataset.read((i + 1) % 4)
    with flipped(packed / "train.images", places[2]):
        out = run_data("check", "nih@16", "--data-dir", packed.parent, status=1)
        assert f"broken: train: nih@16 train image 2 ({names[2]}): damaged" in out


def test_files_that_are_lost_cut_or_changed(packed, damaged):
    """A class, a codec, an option that went wrong must not pass."""
    files = [path for path in packed.iterdir() if path.name != "pack.json"]
    assert len(files) == 14
    for path in files:
        whole = path.read_bytes()
        for content in (whole[:-3], whole + b"\0"):
            path.write_bytes(content)
            damaged(path, "pack it again")
        path.unlink()
        damaged(path, "pack it again")
        path.write_bytes(whole)
        for place in {0, 100, len(whole) // 2, len(whole) - 1} if path.suffix == ".npy" else ():
            with flipped(path, place):
                damaged(path, "pack it again")
    for place in range((packed / "pack.json").stat().st_size):
        with flipped(packed / "pack.json", place):
            damaged(packed)
    assert len(load_dataset("nih@16", packed.parent)) == 4


def test_description_that_is_none_or_lost(packed, damaged):
    path = packed / "pack.json"
    text = path.read_text()
    whole = json.loads(text)
    bad = ["", "[]", '{"schema": 1}', text[:-40], "\xff", json.dumps(whole | {"files": None})]
    bad += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    for content in bad:
        path.write_text(content, encoding="latin-1")
        damaged(path, "pack it again")
    path.write_text(json.dumps(whole | {"schema": 99}))
    damaged(path, "99", "1", "pack it again")
    path.write_text(text)
    other = packed.rename(packed.parent / "nih@32")
    load = partial(load_dataset, "nih@32", packed.parent)
    refuses(ValueError, load, other, "nih@16", "rename")
    other.rename(packed)
    path.unlink()
    # The message says to pack: that says what to remove, and then works.
    words = packed, "python data.py pack nih --size 16"
    refuses(FileNotFoundError, partial(load_dataset, "nih@16", packed.parent), *words)
    assert says(pack("nih", 16, root=packed.parent, status=2), packed, "remove")
    shutil.rmtree(packed)
    pack("nih", 16, root=packed.parent)
    assert len(load_dataset("nih@16", packed.parent)) == 4
