"""Packing that is killed, interrupted, out of disk; packs that are damaged."""

import contextlib
import errno
import json
import os
import shutil
import signal
import time
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
from conftest import refuses
from packing import NIH, Large, Xrays, contents, error_line, pack, says, start, until, wait, written
from PIL import Image

import data
from data import load_dataset
from readers import packs


@pytest.fixture
def xrays(tmp_path):
    return Xrays(tmp_path)


# ------------------------------------------------------------------------------------------------
# Interruptions
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return Large(tmp_path_factory.mktemp("large"))


def test_killed_at_ten_moments(large, tmp_path):
    """Moments spread over the bytes written; the whole group or the main process alone."""
    rng, kills, out = np.random.default_rng(5), 0, tmp_path / "out"
    for k in range(10):
        moment = large.bytes * (k + rng.random()) / 10
        pid = start(large.args(out), tmp_path / "log")
        until(lambda: written(out) >= moment, pid)  # noqa: B023
        time.sleep(0.01 * rng.random())
        (os.killpg if k % 2 else os.kill)(pid, signal.SIGKILL)
        kills += wait(pid) == -signal.SIGKILL
        if not (out / "large@640").exists():
            load = partial(load_dataset, f"folder:{out}/large@640")
            refuses(FileNotFoundError, load, f"{out}/large@640", "python data.py pack")
    assert kills >= 9  # the last may have come too late
    large.finish(out)


@pytest.mark.parametrize("command", ["pack", "check"])
def test_interrupted_by_hand(large, tmp_path, command):
    """One line, status 75 as for every stopped run, and what is written is kept."""
    args, out = large.args(tmp_path / "out"), tmp_path / "out"
    pid = start(args if command == "pack" else ("check", args[1]), tmp_path / "log")
    children = f"/proc/{pid}/task/{pid}/children"
    if command == "pack":
        until(lambda: written(out) >= 0.7 * large.bytes, pid)
    else:
        until(lambda: open(children).read(), pid)  # its worker has begun
        time.sleep(0.05)  # Python passes over an exception in what it calls after a fork
    os.kill(pid, signal.SIGINT)
    status, output = wait(pid), (tmp_path / "log").read_text()
    assert "Traceback" not in output and status == 75 and says(output.splitlines()[-1], "SIGINT")
    if command == "pack":
        large.finish(out)


def test_images_that_are_there_are_not_read_again(large, tmp_path):
    """The first of them change after a stop: the pack has them as they were."""
    images, out = shutil.copytree(large.images, tmp_path / "large"), tmp_path / "out"
    args = "pack", f"folder:{images}", "--size", 640, "--out", out
    late = images / "train" / "b" / "85.png"  # not among those that tell the size needed
    whole = late.read_bytes()
    late.write_bytes(whole[:100])
    assert wait(start(args, tmp_path / "log")) == 2
    assert says(error_line((tmp_path / "log").read_text()), late, "unreadable")
    assert written(out) > 10**8
    late.write_bytes(whole)
    for i in (2, 4):
        Image.new("RGB", (640, 640), "white").save(images / "train" / "a" / f"{i:02d}.png")
    assert wait(start(args, tmp_path / "log")) == 0
    large.finish(out)


def test_two_packings_at_once(large, tmp_path):
    out = tmp_path / "out"
    pid = start(large.args(out), tmp_path / "first")
    until(lambda: written(out) >= 10**6, pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert wait(start(large.args(out), tmp_path / "second")) == 2
        assert says(error_line((tmp_path / "second").read_text()), "large@640", "another process")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait(pid) == 0
    large.finish(out)


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.rmdir")


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


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(data directory with nih@8 in undisturbed/, number of file operations that it took)."""
    root = tmp_path_factory.mktemp("small")
    out, note = Xrays(root).root / "undisturbed", os.open(root / "note", os.O_RDWR | os.O_CREAT)
    hook = at_operation(None, out, lambda number: os.write(note, b"."))
    assert wait(start(small_args(root, out), root / "log", hook)) == 0
    return root, (root / "note").stat().st_size


def small_args(root, out, *more):
    return "pack", "nih", "--size", 8, "--data-dir", root, "--out", out, *more


def test_killed_before_file_operations(small, tmp_path):
    """Files half there, pack.json written but the directory not renamed.

    At whatever moment it stopped, other settings are refused or make what they say.
    """
    root, operations = small
    expected = contents(root / "undisturbed" / "nih@8")
    # The last ten one by one, before them every ninth.
    for number in [*range(1, operations - 9, 9), *range(operations - 9, operations + 1)]:
        out, other = tmp_path / str(number), tmp_path / f"{number}-jpeg"
        pid = start(small_args(root, out), tmp_path / "log", at_operation(number, out, die))
        assert wait(pid) == -signal.SIGKILL
        load = partial(load_dataset, "nih@8", out)
        refuses(FileNotFoundError, load, out / "nih@8", "python data.py pack nih --size 8")
        assert data.main(["list", "--data-dir", str(out)]) == 0
        if out.exists():
            shutil.copytree(out, other)
        args = small_args(root, other, "--codec", "jpeg", "--workers", 1)
        if data.main([*map(str, args)]) == 0:
            assert json.loads((other / "nih@8" / "pack.json").read_text())["codec"] == "jpeg"
        pack("nih", 8, "--out", out, root=root)
        assert contents(out / "nih@8") == expected, number
        assert [path.name for path in out.iterdir()] == ["nih@8"], number


# ------------------------------------------------------------------------------------------------
# Full disks
# ------------------------------------------------------------------------------------------------


def test_file_that_cannot_grow(large, tmp_path):
    """As on a full disk, in the middle of the images."""
    out = tmp_path / "out"
    assert wait(start(large.args(out), tmp_path / "log", limit=large.bytes // 2)) == 2
    line = error_line((tmp_path / "log").read_text())
    assert says(line, os.strerror(errno.EFBIG), out / "large@640", "run the same command again")
    large.finish(out)


def test_disk_too_small(xrays, monkeypatch):
    """Refused before any image is written, with what it takes; a larger disk will do."""
    pack("nih", 16, "--out", xrays.root / "other", root=xrays.root)
    images = sum(path.stat().st_size for path in xrays.root.glob("other/nih@16/*.images"))
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda path: usage(images))
    line = pack("nih", 16, root=xrays.root, status=2)
    assert says(line, xrays.root / "nih@16.part", "--out", "--size", "--codec jpeg", "GB free")
    assert images < 1e9 * float(line.partition("needs about ")[2].split()[0]) < images + 6 * 200
    assert written(xrays.root) < 2000
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda path: usage(images + 6 * 200))
    pack("nih", 16, root=xrays.root)


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flipped(path, place):
    """One bit of a file changed in place, for a while."""
    whole = path.read_bytes()
    for byte in (whole[place] ^ 1, whole[place]):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
        if byte != whole[place]:
            yield


@pytest.fixture
def packed(xrays):
    pack("nih", 16, root=xrays.root)
    return xrays.root / "nih@16"


@pytest.fixture
def damaged(packed):
    """The pack is refused, by the name of a file and with the mend."""
    return partial(refuses, ValueError, partial(load_dataset, packed.name, packed.parent))


def test_flipped_byte_of_an_image(packed, capsys):
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
        assert data.main(["check", "nih@16", "--data-dir", str(packed.parent)]) == 1
        line = f"broken: train: nih@16 train image 2 ({names[2]}): damaged"
        assert line in capsys.readouterr().out


def test_flipped_byte_of_the_index_and_the_description(packed, damaged):
    """A class, a codec, an option that went wrong must not pass."""
    indices = [path for path in packed.iterdir() if path.suffix == ".npy"]
    assert len(indices) == 12
    for path in indices:
        for place in {0, 100, path.stat().st_size // 2, path.stat().st_size - 1}:
            with flipped(path, place):
                damaged(path, "pack it again")
    for place in range((packed / "pack.json").stat().st_size):
        with flipped(packed / "pack.json", place):
            damaged(packed)
    assert len(load_dataset("nih@16", packed.parent)) == 4


def test_description_that_is_none(packed, damaged):
    path = packed / "pack.json"
    text = path.read_text()
    whole = json.loads(text)
    bad = ["", "[]", "{}", '{"schema": 1}', text[:-40], "\xff"]
    bad += [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    bad += [json.dumps(whole | {key: None}) for key in ("files", "classes", "dropped", "options")]
    for content in bad:
        path.write_text(content, encoding="latin-1")
        damaged(path, "pack it again")
    path.write_text(json.dumps(whole | {"schema": 99}))
    damaged(path, "99", "1", "pack it again")
    path.write_text(text)
    for name in ("nih@32", "chexpert@16"):
        packed.rename(packed.parent / name)
        load = partial(load_dataset, name, packed.parent)
        refuses(ValueError, load, packed.parent / name, "nih@16", "rename")
        (packed.parent / name).rename(packed)


def test_lost_and_cut_files(packed, damaged):
    for path in sorted(packed.iterdir()):
        whole = path.read_bytes()
        for content in (whole[:-3], whole + b"\0"):
            path.write_bytes(content)
            damaged(path, "pack it again")
        path.unlink()
        if path.name != "pack.json":
            damaged(path, "pack it again")
        else:
            # The message says to pack: that says what to remove, and then works.
            words = packed, "python data.py pack nih --size 16"
            refuses(FileNotFoundError, partial(load_dataset, "nih@16", packed.parent), *words)
            assert says(pack("nih", 16, root=packed.parent, status=2), packed, "remove")
        path.write_bytes(whole)
    shutil.rmtree(packed)
    pack("nih", 16, root=packed.parent)
    assert len(load_dataset("nih@16", packed.parent)) == 4
