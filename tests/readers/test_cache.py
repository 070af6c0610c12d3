"""Images decoded once: the same pixels, each file read once, nothing left behind."""

import os
from collections import namedtuple
from functools import partial

import pytest
import torch
from conftest import refuses
from trees import load_folder, random_image

from data import Batches
from readers import cache, images, transforms
from readers.cache import decode_once, preload
from readers.images import ImageDataset
from readers.transforms import Pipeline, keep

Environment = namedtuple("Environment", "ranks", defaults=(1,))
ALONE = Environment()
SHORTER = transforms.cropped_pipeline(40, 32, train=True)
AS_IS = Pipeline(keep, keep)


def held(pixels, count):
    """(dataset of these pixels, list of the images that are read)."""
    reads = []

    def read(i, size=None):
        reads.append(int(i))
        return pixels[i]

    labels = torch.zeros(count, dtype=torch.int64).numpy()
    return ImageDataset("held", read, labels, ("a",), "multiclass", "natural"), reads


def test_preload_changes_no_batch(chests, pets_at_home):
    pets = load_folder(pets_at_home)
    for dataset, pipeline in (
        (chests.load(), transforms.xray_pipeline(6, train=True)),
        (pets, transforms.cropped_pipeline(9, 7, train=True)),  # images differ in shape
        (pets, transforms.cropped_pipeline(9, 7, train=False)),
    ):
        kept, rest = preload(dataset, pipeline)
        assert rest.prepare is keep and rest.augment is pipeline.augment
        assert kept.labels is dataset.labels and kept.name == dataset.name
        for step in range(4):
            one = Batches(dataset, pipeline, 2, seed=6)[step]
            other = Batches(kept, rest, 2, seed=6)[step]
            assert torch.equal(one[0], other[0])
            assert str(one[1]) == str(other[1])  # a NaN is a NaN


def test_preload_over_the_limit(rng):
    pixels = random_image(rng, 23, 3, 20, 26)
    dataset, reads = held(pixels, 23)
    exact = pixels.numel()
    assert preload(dataset, AS_IS, exact)[0] is not dataset
    reads.clear()
    assert preload(dataset, AS_IS, exact - 1) == (dataset, AS_IS)
    assert reads == [0]  # which told the size of all
    # A first image that is smaller than the others must not hide their size.
    uneven, _ = held([pixels[0, :, :1, :1], *pixels[1:]] + [pixels[0]], 24)
    assert preload(uneven, AS_IS, exact)[0] is uneven


def test_a_broken_image_is_named(pets_at_home, tmp_path):
    """One that is not there any more is no fault of the folder for the files."""
    path = pets_at_home / "train" / "cat" / "1.png"
    dataset = load_folder(pets_at_home)
    for spoil in (lambda: os.truncate(path, 50), path.unlink):
        spoil()
        refuses(ValueError, partial(preload, dataset, AS_IS), path)
        refuses(ValueError, partial(decode_once, dataset, AS_IS, ALONE, tmp_path), path)


def test_images_on_disk_are_those_in_memory(folder, tmp_path, monkeypatch):
    dataset = load_folder(folder)
    in_memory, rest = decode_once(dataset, SHORTER, ALONE)
    assert isinstance(in_memory.reader, images.Decoded) and rest.prepare is keep
    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    mapped, rest = decode_once(dataset, SHORTER, ALONE, tmp_path)
    assert rest.prepare is keep and not list(tmp_path.iterdir())
    assert isinstance(mapped.reader, images.Joined)
    for i in (0, 19, 59):
        assert torch.equal(mapped.read(i), SHORTER.read(dataset, i))
        assert torch.equal(in_memory.read(i), mapped.read(i))
        assert mapped.where(i) == in_memory.where(i) == dataset.where(i)
    assert (mapped.labels == dataset.labels).all()
    usage = namedtuple("Usage", "free")(2 * 60 * 3 * 40 * 40)  # half of it would be taken
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage)
    assert decode_once(dataset, SHORTER, ALONE, tmp_path) == (dataset, SHORTER)


@pytest.mark.parametrize("in_files", [False, True])
def test_decode_once_reads_each_image_once(rng, tmp_path, monkeypatch, in_files):
    if in_files:
        monkeypatch.setattr(cache, "IN_MEMORY", 0)
    pixels = random_image(rng, 300, 3, 4, 5)  # more than wait at a time
    dataset, reads = held(pixels, 300)
    decoded, _ = decode_once(dataset, AS_IS, ALONE, tmp_path)
    assert isinstance(decoded.reader, images.Joined if in_files else images.Decoded)
    assert all(torch.equal(decoded.read(i), pixels[i]) for i in (*range(300), -1))
    assert sorted(reads) == list(range(300))


def test_files_have_no_name(folder, tmp_path, monkeypatch):
    """So that nothing is left, however the process ends. The folder is made."""
    listings = []

    def spy(image):
        listings.append(list((tmp_path / "new").glob("*")))
        return SHORTER.prepare(image)

    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    decode_once(load_folder(folder), SHORTER._replace(prepare=spy), ALONE, tmp_path / "new")
    assert len(listings) == 60 and not any(listings) and (tmp_path / "new").is_dir()


def test_a_full_disk_names_the_folder_and_the_mend(folder, tmp_path, monkeypatch):
    def full(array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "IN_MEMORY", 0)
    monkeypatch.setattr(cache, "memoryview", full, raising=False)
    with pytest.raises(OSError, match=f"^{tmp_path}: .*No space left.*--cache-dir"):
        decode_once(load_folder(folder), SHORTER, ALONE, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def second(monkeypatch):
    """The second of two processes -> function of (what the first says, machine of this one)."""

    def make(of_the_first, machine, local, local_ranks):
        here = {"LOCAL_WORLD_SIZE": local_ranks, "LOCAL_RANK": local, "GROUP_RANK": machine}
        for name, value in here.items():
            monkeypatch.setenv(name, str(value))

        def gather(parts, mine):
            parts[:] = (0, of_the_first(mine[1])), mine

        monkeypatch.setattr(cache.dist, "all_gather_object", gather)
        monkeypatch.setattr(cache.dist, "barrier", lambda: None)
        return Environment(2)

    return make


def test_a_broken_image_of_another_process_is_named_by_all(folder, tmp_path, second):
    env = second(lambda mine: ValueError("7.png is broken"), 0, 1, 2)
    with pytest.raises(ValueError, match="7.png is broken"):
        decode_once(load_folder(folder), SHORTER, env, tmp_path)


def test_each_machine_maps_its_own_files(folder, tmp_path, second):
    """The second of two machines with a process each."""
    dataset, env = load_folder(folder), second(lambda mine: ("/of/another", mine[1]), 1, 0, 1)
    mapped, _ = decode_once(dataset, SHORTER, env, tmp_path)
    assert all(torch.equal(mapped.read(i), SHORTER.read(dataset, i)) for i in range(60))


def test_processes_of_a_machine_share_the_images_out(folder, tmp_path, second):
    """The second writes the second half; here it stands for the first one's file too."""
    dataset, env = load_folder(folder), second(lambda mine: mine, 0, 1, 2)
    mapped, _ = decode_once(dataset, SHORTER, env, tmp_path)
    for i in range(30):
        assert torch.equal(mapped.read(30 + i), SHORTER.read(dataset, 30 + i))
        assert torch.equal(mapped.read(i), mapped.read(30 + i))


def test_where_one_process_has_no_room_all_do_without(folder, tmp_path, second):
    dataset, env = load_folder(folder), second(lambda mine: None, 0, 1, 2)
    assert decode_once(dataset, SHORTER, env, tmp_path) == (dataset, SHORTER)
