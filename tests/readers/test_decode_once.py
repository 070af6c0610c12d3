"""Images decoded once for all processes of a machine (readers/cache.py)."""

import functools
from types import SimpleNamespace

import pytest
import torch
from trees import load_folder

from engine.processes import Env
from readers import cache, images
from readers.transforms import Pipeline, keep, random_crop_flip, resize_shorter

ALONE = Env(0, 1, torch.device("cpu"), "fp32")
PIPELINE = Pipeline(
    functools.partial(resize_shorter, size=40), functools.partial(random_crop_flip, size=32), 40
)


@pytest.fixture
def on_disk(monkeypatch):
    """As if nothing fitted into memory."""
    monkeypatch.setattr(cache, "preload", lambda *args: args)


@pytest.fixture
def two_processes(monkeypatch):
    """Call it with which machine this is, of how many processes, and what the other would send."""

    def pretend(machine, processes, others):
        here = {"LOCAL_WORLD_SIZE": processes, "LOCAL_RANK": 0, "GROUP_RANK": machine}
        for name, value in here.items():
            monkeypatch.setenv(name, str(value))

        def gather(parts, mine):
            parts[:] = others(mine), mine

        monkeypatch.setattr(cache.dist, "all_gather_object", gather)
        monkeypatch.setattr(cache.dist, "barrier", lambda: None)

    return pretend


def test_images_on_disk_are_those_in_memory(folder, tmp_path, monkeypatch):
    dataset = load_folder(folder)
    in_memory, prepared = cache.decode_once(dataset, PIPELINE, ALONE)
    assert isinstance(in_memory.reader, images.Decoded) and prepared.prepare is keep
    monkeypatch.setattr(cache, "preload", lambda *args: args)
    mapped, prepared = cache.decode_once(dataset, PIPELINE, ALONE, tmp_path)
    assert isinstance(mapped.reader, images.Joined) and prepared.prepare is keep
    for i in (0, 19, 59):
        expected = PIPELINE.read(dataset, i)
        assert torch.equal(mapped.read(i), expected) and torch.equal(in_memory.read(i), expected)
        assert mapped.where(i) == dataset.where(i)
    assert (mapped.labels == dataset.labels).all()
    usage = SimpleNamespace(free=2 * 60 * 3 * 40 * 40)  # half of it would be taken
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    assert cache.decode_once(dataset, PIPELINE, ALONE, tmp_path) == (dataset, PIPELINE)


def test_a_full_disk_names_the_folder_and_the_mend(folder, tmp_path, monkeypatch, on_disk):
    def full(array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "memoryview", full, raising=False)
    with pytest.raises(OSError, match=f"^{tmp_path}: .*No space left.*--cache-dir"):
        cache.decode_once(load_folder(folder), PIPELINE, ALONE, tmp_path)
    assert not list(tmp_path.iterdir())


def test_decoded_images_lie_in_a_file_without_a_name(folder, tmp_path, on_disk):
    """So that nothing is left, however the process ends. The folder is made."""
    listings = []

    def spy(image):
        listings.append(list((tmp_path / "new").glob("*")))
        return PIPELINE.prepare(image)

    spied = PIPELINE._replace(prepare=spy)
    cache.decode_once(load_folder(folder), spied, ALONE, tmp_path / "new")
    assert len(listings) == 60 and not any(listings) and (tmp_path / "new").is_dir()


def test_a_broken_image_of_another_process_is_named_by_all(folder, tmp_path, two_processes):
    two_processes(0, 2, lambda mine: (0, ValueError("7.png is broken")))
    with pytest.raises(ValueError, match="7.png is broken"):
        cache.decode_once(load_folder(folder), PIPELINE, ALONE._replace(ranks=2), tmp_path)


def test_each_machine_maps_its_own_files(folder, tmp_path, two_processes):
    """The second of two machines with a process each."""
    dataset = load_folder(folder)
    two_processes(1, 1, lambda mine: (0, ("/of/another/machine", mine[1][1])))
    mapped, _ = cache.decode_once(dataset, PIPELINE, ALONE._replace(rank=1, ranks=2), tmp_path)
    assert all(torch.equal(mapped.read(i), PIPELINE.read(dataset, i)) for i in range(60))
