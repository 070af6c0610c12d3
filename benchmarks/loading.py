"""From files to batches: decoding, packs and folders, beside the study's way and torchvision."""

import importlib.util
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms as T

import data
import pretrain
from benchmarks.measure import best_speeds, fastest, speed_report
from engine.evaluate import to_input
from readers import packs, synthetic
from readers.transforms import NORMALIZATION

BATCH, SIZE = 32, 224
REQUIRED = (
    ("ours, decoding", "study", 1.2),
    ("ours, pack, training", "study", 8),
    ("ours, pack, test", "study", 30),
    ("ours, 32 px JPEG", "torchvision, 32 px JPEG", 1.2),
    ("ours, 256 px JPEG", "torchvision, 256 px JPEG", 1.2),
)


def load(args, env):
    """Images a second of one core (of its own time, whatever else runs on the machine): from files
    in the page cache to a batch of images of 224 pixels.

    "study": 1024 px X-rays to floats, cropped and resized as the study's code does it, with OpenCV
    (if installed) and with Pillow. "ours": the same to uint8 batches; from a pack with the X-ray
    training augmentation, and from a pack at test. "torchvision": ImageFolder with
    RandomResizedCrop, flip, ToTensor and Normalize on folders of JPEGs; ours with the same
    transform, normalised too.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arms = xray_arms(args.data_dir or make_xrays(Path(folder)), Path(folder))
        for side, size in ((32, 32), (256, SIZE)):
            arms |= photo_arms(make_photos(Path(folder), side), f"{side} px JPEG", size, env)
        for arm in arms.values():
            next(arm)
        speeds = best_speeds(arms, args.rounds, 4, BATCH, env, time.process_time)
    return speed_report(speeds, fastest(speeds, "study"), REQUIRED)


def xray_arms(root, folder):
    """{arm: iterator of batches} of nih below `root`, whose pack is made in `folder`."""
    sets = dict(zip(data.SPLITS, data.load_splits("nih", root)))
    packs.pack("nih", sets, SIZE, folder / f"nih@{SIZE}")
    dataset, packed = sets["train"], data.load_dataset(f"nih@{SIZE}", folder)
    training, testing = (pretrain.choose_pipeline(dataset, SIZE, train) for train in (True, False))
    paths = [dataset.where(i) for i in range(min(len(dataset), BATCH))]
    arms = {"study, Pillow": one_by_one(study_pillow, paths)}
    if importlib.util.find_spec("cv2"):
        arms["study, OpenCV"] = one_by_one(study_opencv, paths)
        arms["OpenCV, grey, 32-bit"] = one_by_one(partial(study_opencv, lean=True), paths)
    arms["ours, decoding"] = batches(dataset, testing)
    arms["ours, pack, training"] = batches(packed, training)
    arms["ours, pack, test"] = batches(packed, testing)
    return arms


def photo_arms(folder, title, size, env):
    """{arm: iterator of batches} of a folder of JPEGs, in size x size pixels."""
    normalization, dataset = NORMALIZATION["natural"], data.load_dataset(f"folder:{folder}")
    stream = batches(dataset, pretrain.choose_pipeline(dataset, size, train=True))
    augment = T.RandomResizedCrop(size), T.RandomHorizontalFlip()
    transform = T.Compose([*augment, T.ToTensor(), T.Normalize(*normalization)])
    peer = torchvision.datasets.ImageFolder(folder / "train", transform)
    return {
        f"torchvision, {title}": one_by_one(lambda i: peer[i][0], range(len(peer))),
        f"ours, {title}": (to_input(batch, normalization, env.device) for batch in stream),
    }


def batches(dataset, pipeline):
    """Yields batch after batch of shuffled images, as a loader worker makes them."""
    source = data.Batches(dataset, pipeline, BATCH)
    return (source[step][0] for step in itertools.count())


def one_by_one(read, items):
    """Yields batch after batch of the same images, read(item) each."""
    while True:
        yield torch.stack([read(item) for item in itertools.islice(itertools.cycle(items), BATCH)])


def study_pillow(path):
    """The study's X-ray, (SIZE, SIZE) floats, by Pillow: colour decoded, floats in [0,1], one
    channel, the central square, area resize.
    """
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")) / 255.0
    square = Image.fromarray(central_square(pixels[..., 0]).astype(np.float32))
    return torch.from_numpy(np.array(square.resize((SIZE, SIZE), Image.Resampling.BOX)))


def study_opencv(path, lean=False):
    """The same by its library, 64-bit floats. lean: without detours, grey decoded, 32 bits."""
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    if lean:
        pixels = cv2.imread(path, cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255
    else:
        pixels = (cv2.imread(path) / 255.0)[..., 0]
    square = central_square(pixels)
    return torch.from_numpy(cv2.resize(square, (SIZE, SIZE), interpolation=cv2.INTER_AREA))


def central_square(pixels):
    height, width = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def make_xrays(root):
    """A data directory with nih: made X-rays in the official layout."""
    folder = root / data.DATASETS["nih"].folder
    (folder / "images").mkdir(parents=True)
    names = [f"{i:08d}_000.png" for i in range(BATCH + 1)]
    rows = ["Image Index,Finding Labels,Patient ID"]
    for i, name in enumerate(names):
        pixels = synthetic.render("synthetic-xray", "train", i, 1024)[0]
        Image.fromarray(pixels).save(folder / "images" / name)
        rows.append(f"{name},No Finding,{i}")
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    (folder / "train_val_list.txt").write_text("\n".join(names[:BATCH]))
    (folder / "test_list.txt").write_text(names[BATCH])
    return root


def make_photos(root, side, classes=4, count=16):
    """A folder of made JPEGs: train/CLASS/* and test/CLASS/*."""
    folder = root / f"photos-{side}"
    for split, cls in itertools.product(data.SPLITS, range(classes)):
        (folder / split / str(cls)).mkdir(parents=True)
        for i in range(count if split == "train" else 1):
            pixels = synthetic.render("synthetic-natural", split, cls * count + i, side)
            photo = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            photo.save(folder / split / str(cls) / f"{i}.jpg", quality=90)
    return folder
