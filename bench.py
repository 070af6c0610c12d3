"""Speed beside peers: the same work by this project and by the library that one would else take.

    python bench.py train       # one training step: ours and timm's, eager and compiled
    python bench.py load        # from files to batches: decoding, packs, folders
    python bench.py index       # the index of a dataset: mimic's tables, 14 million paths

All arms of a benchmark take turns in one process, so that noise of the machine meets all alike.
"""

import functools
import gzip
import hashlib
import importlib
import itertools
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import transforms as T
from tqdm import tqdm

import console
import data
import engine
import loading
import models
import natural
import packs
import synthetic
import transforms
import xrays
from images import Array, ImageDataset
from optimizer import make_optimizer

# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def best_speeds(arms, rounds, steps, images, env, clock=time.perf_counter):
    """{name: images a second} of each arm's fastest round.

    arms: {name: callable(steps)}. In each round every arm takes its turn of `steps` steps of
    `images` images. The best round counts: other work on a machine only ever slows one down.
    """
    seconds = dict.fromkeys(arms, math.inf)
    with engine.progress_bar(env, rounds * len(arms), title="turns", unit="turn") as bar:
        for _ in range(rounds):
            for name, run in arms.items():
                _synchronize(env.device)
                began = clock()
                run(steps)
                _synchronize(env.device)
                seconds[name] = min(seconds[name], clock() - began)
                if bar is not None:
                    bar.update()
    return {name: steps * images / best for name, best in seconds.items()}


def _synchronize(device):
    """Waits for the work that was only queued, so that the clock tells when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Report(NamedTuple):
    """A benchmark's outcome: values for the record, a table, and what was required of it.

    required: [(what, against what, ratio reached, least ratio)].
    """

    values: dict
    header: list
    rows: list
    required: list


def speed_report(speeds, peer, required):
    """Report of {arm: images a second}.

    required: (numerator, denominator, least ratio) each; the fastest arm whose name begins so.
    """
    rows = [[name, f"{speed:.1f}", f"{speed / speeds[peer]:.2f}"] for name, speed in speeds.items()]
    ratios = []
    for numerator, denominator, least in required:
        over, under = (_fastest(speeds, prefix) for prefix in (numerator, denominator))
        ratios.append((over, under, speeds[over] / speeds[under], least))
    values = {"images_per_second": speeds}
    return Report(values, ["arm", "images/s", f"ratio to {peer}"], rows, ratios)


def _fastest(speeds, prefix):
    return max((name for name in speeds if name.startswith(prefix)), key=speeds.get)


def import_peer(name):
    """The peer's module. Raises ValueError with the mend when it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} is not installed; pip install {name}") from error


# ------------------------------------------------------------------------------------------------
# train: a training step, ours and timm's
# ------------------------------------------------------------------------------------------------

NUM_CLASSES = 10
# ImageNet-1k's recipe of R50x1: SGD with Nesterov momentum, no AGC; 0.1 at a batch of 256.
LR, WEIGHT_DECAY, CLIPPING = 0.1 / 256, 1e-4, None
DEFAULTS, PEER = "ours, defaults", "timm, eager, fp32"
REQUIRED = ((DEFAULTS, PEER, 1.15), ("ours", "timm", 1.0))


def train_options(parser):
    add = parser.add_argument
    add("--model", default="R50x1", help=f"network: {', '.join(models.MODELS)}")
    add("--image-size", type=console.positive(int), default=64, help="side in pixels")
    add("--batch-size", type=console.positive(int), default=32, help="images a step")
    add("--rounds", type=console.positive(int), default=5, help="turns an arm; the best counts")
    add("--steps", type=console.positive(int), default=4, help="training steps a turn")
    add("--no-compile", action="store_true", help="leave out the compiled arms, minutes each")
    add("--threads", type=console.positive(int), default=torch.get_num_threads(),
        help="threads of the CPU (default here: PyTorch's)")  # fmt: skip


def train(args, env):
    """Images a second of a whole training step: forward, cross-entropy, backward, SGD.

    Ours "defaults" is engine.train with its loader and augmentation on images in memory. All other
    arms repeat one batch that lies on the device. All have the same optimiser and memory format,
    so that the ratios are of networks and settings.
    """
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    networks = {"ours": models.create_model(args.model, NUM_CLASSES), "timm": _timm_network(args)}
    shape = args.batch_size, 3, args.image_size, args.image_size
    images = torch.randn(shape, device=env.device)
    images = images.contiguous(memory_format=models.memory_format(env.device))
    labels = torch.randint(NUM_CLASSES, (args.batch_size,), device=env.device)
    arms = {}
    for package, network in networks.items():
        network = models.place(network, env.device).train()
        optimizer = engine.SGD_AGC(
            network.parameters(), LR * args.batch_size, weight_decay=WEIGHT_DECAY, clipping=CLIPPING
        )
        for mode in ("eager",) if args.no_compile else ("eager", "compiled"):
            for precision in ("fp32", "bf16"):
                arms[f"{package}, {mode}, {precision}"] = functools.partial(
                    _repeat_batch, engine.parallel(network, env, mode == "compiled"), optimizer,
                    images, labels, env._replace(precision=precision),
                )  # fmt: skip
    arms[DEFAULTS] = _our_loop(args, env)
    for name, run in arms.items():
        console.say(env, f"warming up: {name}")
        run(2)  # compiles, and lets cuDNN choose its kernels
    speeds = best_speeds(arms, args.rounds, args.steps, args.batch_size, env)
    return speed_report(speeds, PEER, REQUIRED)


def _timm_network(args):
    """timm's network of the same architecture, with random weights."""
    timm = import_peer("timm")
    name = f"resnetv2_{args.model.removeprefix('R')}_bit"
    if args.model not in models.MODELS or not timm.is_model(name):
        raise ValueError(f"--model {args.model}: timm has no {name}; BiT's sizes are in both")
    return timm.create_model(name, num_classes=NUM_CLASSES)


def _repeat_batch(forward, optimizer, images, labels, env, steps):
    for _ in range(steps):
        with env.autocast():
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _our_loop(args, env):
    """engine.train as the scripts call it with no option, on random images held in memory."""
    rng = np.random.default_rng(0)
    count = 16 * args.batch_size
    pixels = rng.integers(0, 256, (count, args.image_size, args.image_size, 3), np.uint8)
    labels = rng.integers(NUM_CLASSES, size=count)
    classes = [str(c) for c in range(NUM_CLASSES)]
    reader = Array("memory", pixels)
    dataset = ImageDataset("memory", reader, labels, classes, "multiclass", "natural")
    pipeline = transforms.pretraining_pipeline("natural", args.image_size, train=True)
    batches = loading.Batches(dataset, pipeline, args.batch_size)
    model = models.place(models.create_model(args.model, NUM_CLASSES), env.device)
    lr = LR * args.batch_size
    optimizer = make_optimizer(model, lr, WEIGHT_DECAY, CLIPPING)
    forward = engine.parallel(model, env)
    training = engine.Run(None, model, optimizer, {})

    def run(steps):
        stop = training.step + steps
        engine.train(
            training, forward, batches, loading.loader(batches, training.step, stop),
            lambda step: lr, stop, env, transforms.NORMALIZATION["natural"],
        )  # fmt: skip

    return run


# ------------------------------------------------------------------------------------------------
# load: from files to batches
# ------------------------------------------------------------------------------------------------

LOAD_BATCH, LOAD_SIZE = 32, 224
STUDY, OURS = "study", "ours"
LOAD_REQUIRED = (
    (f"{OURS}, decoding", STUDY, 1.2),
    (f"{OURS}, pack, training", STUDY, 8),
    (f"{OURS}, pack, test", STUDY, 30),
    (f"{OURS}, 32 px JPEG", "torchvision, 32 px JPEG", 1.2),
    (f"{OURS}, 256 px JPEG", "torchvision, 256 px JPEG", 1.2),
)


def load_options(parser):
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="directory that holds nih (default: 32 X-rays of "
        "1024 px are made)")  # fmt: skip
    add("--rounds", type=console.positive(int), default=5, help="turns an arm; the best counts")


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
        arms = _xray_arms(Path(args.data_dir or _make_xrays(Path(folder))), Path(folder))
        for side, crop in ((32, 32), (256, LOAD_SIZE)):
            arms |= _folder_arms(_make_photos(Path(folder), side), f"{side} px JPEG", crop, env)
        for run in arms.values():
            run(1)
        speeds = best_speeds(arms, args.rounds, 4, LOAD_BATCH, env, time.process_time)
    return speed_report(speeds, _fastest(speeds, STUDY), LOAD_REQUIRED)


def _xray_arms(root, folder):
    dataset = data.load_dataset("nih", root)
    packs.pack("nih", {s: data.load_dataset("nih", root, s) for s in data.SPLITS}, LOAD_SIZE,
        folder / f"nih@{LOAD_SIZE}")  # fmt: skip
    packed = data.load_dataset(f"nih@{LOAD_SIZE}", folder)
    pipelines = [transforms.pretraining_pipeline("medical", LOAD_SIZE, t) for t in (True, False)]
    readers = {f"{STUDY}, Pillow": _study_pillow}
    if importlib.util.find_spec("cv2"):
        readers |= {f"{STUDY}, OpenCV": _study_opencv, "OpenCV, grey, 32-bit": _lean_opencv}
    peers = {name: functools.partial(_read_as, read, dataset) for name, read in readers.items()}
    return peers | {
        f"{OURS}, decoding": _batches_of(dataset, pipelines[1]),
        f"{OURS}, pack, training": _batches_of(packed, pipelines[0]),
        f"{OURS}, pack, test": _batches_of(packed, pipelines[1]),
    }


def _folder_arms(folder, title, size, env):
    dataset = data.load_dataset(f"folder:{folder}")
    pipeline = transforms.pretraining_pipeline("natural", size, train=True)
    mean, std = transforms.NORMALIZATION["natural"]
    peer = torchvision.datasets.ImageFolder(
        folder / "train",
        T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor(),
            T.Normalize(mean, std)]),
    )  # fmt: skip
    normalised = _batches_of(
        dataset, pipeline, lambda batch: engine.to_input(batch, (mean, std), env.device)
    )
    return {
        f"torchvision, {title}": functools.partial(_read_as, lambda item: item[0], peer),
        f"{OURS}, {title}": normalised,
    }


def _batches_of(dataset, pipeline, then=lambda batch: batch):
    """steps -> that many global batches of shuffled images, as a loader worker makes them."""
    batches, step = loading.Batches(dataset, pipeline, LOAD_BATCH), itertools.count()
    return lambda steps: [then(batches[next(step)][0]) for _ in range(steps)]


def _read_as(read, dataset, steps):
    """Batches of the peer: read(item) of one image after the other, stacked."""
    files = isinstance(dataset, ImageDataset)
    for _ in range(steps):
        items = (i % len(dataset) for i in range(LOAD_BATCH))
        torch.stack([read(dataset.where(i) if files else dataset[i]) for i in items])


def _study_pillow(path):
    """The study's preparation, by Pillow: colour decoded, floats in [0,1], one channel, square."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")) / 255.0
    square = Image.fromarray(_central_square(pixels[..., 0]).astype(np.float32))
    return torch.from_numpy(np.array(square.resize((LOAD_SIZE, LOAD_SIZE), Image.Resampling.BOX)))


def _study_opencv(path):
    """The study's preparation with its library: OpenCV's INTER_AREA on 64-bit floats."""
    cv2 = importlib.import_module("cv2")
    pixels = cv2.imread(path) / 255.0
    return _opencv_area(cv2, pixels[..., 0])


def _lean_opencv(path):
    """The same without its detours: grey decoded, 32-bit floats."""
    cv2 = importlib.import_module("cv2")
    return _opencv_area(cv2, cv2.imread(path, cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255)


def _opencv_area(cv2, pixels):
    cv2.setNumThreads(1)
    square = _central_square(pixels)
    return torch.from_numpy(cv2.resize(square, (LOAD_SIZE,) * 2, interpolation=cv2.INTER_AREA))


def _central_square(pixels):
    height, width = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _make_xrays(root, count=LOAD_BATCH, side=1024):
    """A data directory with nih: made X-rays in the official layout."""
    folder = root / data.DATASETS["nih"].folder
    (folder / "images").mkdir(parents=True)
    names = [f"{i:08d}_000.png" for i in range(count + 1)]
    rows = ["Image Index,Finding Labels,Patient ID"]
    for i, name in enumerate(tqdm(names, "X-rays", leave=False)):
        pixels = synthetic.render("synthetic-xray", "train", i, side, 0)[0]
        Image.fromarray(pixels).save(folder / "images" / name)
        rows.append(f"{name},No Finding,{i}")
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows))
    (folder / "train_val_list.txt").write_text("\n".join(names[:count]))
    (folder / "test_list.txt").write_text(names[count])
    return root


def _make_photos(root, side, classes=4, count=16):
    """A folder of made JPEGs: train/CLASS/* and test/CLASS/*."""
    folder = root / f"photos-{side}"
    for split, cls in itertools.product(data.SPLITS, range(classes)):
        (folder / split / str(cls)).mkdir(parents=True)
        for i in range(count if split == "train" else 1):
            pixels = synthetic.render("synthetic-natural", split, cls * count + i, side, 0)
            photo = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            photo.save(folder / split / str(cls) / f"{i}.jpg", quality=90)
    return folder


# ------------------------------------------------------------------------------------------------
# index: mimic's tables, and the paths of ImageNet-21k
# ------------------------------------------------------------------------------------------------

MIMIC_SUBJECTS, MIMIC_ROWS, OPENERS = 65_379, 377_110, 4
WORKER_MEGABYTES, OPEN_SECONDS = 100, 2.0  # what a worker may add, and opening may take


def index_options(parser):
    add = parser.add_argument
    add(
        "--rows", type=console.positive(int), default=MIMIC_ROWS, help="images of made mimic tables"
    )
    add("--images", type=console.positive(int), default=14_000_000, help="paths in the class index")
    add("--listed", type=console.positive(int), default=100_000, help="of them files that are "
        "really made, to time the listing of directories")  # fmt: skip
    add("--rounds", type=console.positive(int), default=3, help="turns an arm; the best counts")


def index(args, env):
    """Seconds and memory to know a dataset's images: mimic's tables beside pandas; a class index.

    Each measurement has a process of its own; its memory is the growth of the peak (VmHWM).
    Of the class index all is real but the listing of its 21,841 directories, which is timed
    apart. A worker's own memory leaves out the mapped files, which all workers share.
    """
    import_peer("pandas")
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        tables, tree = Path(folder) / "mimic", Path(folder) / "imagenet-21K"
        _make_mimic(tables, args.rows)
        arms = {"ours, mimic": _our_mimic, "pandas, mimic": _pandas_mimic}
        for _ in range(args.rounds):
            for name, read in arms.items():
                found = _apart(read, tables)
                best = values.setdefault(name, found)
                best |= {key: min(best[key], found[key]) for key in ("seconds", "megabytes")}
        if values["ours, mimic"]["digest"] != values["pandas, mimic"]["digest"]:
            raise RuntimeError("ours and pandas read different labels")
        values["listing"] = _apart(_list_classes, Path(folder) / "listed", args.listed)
        values["building"] = _apart(_build_index, tree, args.images)
        with multiprocessing.get_context("spawn").Pool(OPENERS) as pool:
            workers = pool.starmap(_open_index, [(tree, args.images)] * OPENERS, chunksize=1)
        values["opening"] = {key: max(w[key] for w in workers) for key in workers[0]}
    return _index_report(values, args)


def _index_report(values, args):
    titles = {
        "ours, mimic": f"{args.rows:,} rows of mimic: ours",
        "pandas, mimic": f"{args.rows:,} rows of mimic: pandas",
        "listing": f"class index: listing {args.listed:,} files",
        "building": f"class index: building and writing {args.images:,} paths",
        "opening": f"class index: opening, slowest and largest of {OPENERS} workers",
    }
    header = ["what", "seconds", "MB"]
    rows = [[titles[k], f"{v['seconds']:.2f}", f"{v['megabytes']:.0f}"] for k, v in values.items()]
    ours, pandas, opening = (values[k] for k in ("ours, mimic", "pandas, mimic", "opening"))
    required = [
        (f"pandas' {unit}", "ours", pandas[unit] / ours[unit], 1.0)
        for unit in ("seconds", "megabytes")
    ]
    limits = {"megabytes": WORKER_MEGABYTES, "seconds": OPEN_SECONDS}
    required += [
        (f"{limit:g} {unit}", "opening", limit / opening[unit], 1.0)
        for unit, limit in limits.items()
    ]
    return Report({"measured": values}, header, rows, required)


def _apart(measure, *args):
    """measure(*args) in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, args)


def _memory(field):
    """A figure of this process's own, in MB: VmHWM is its peak, RssAnon what it alone holds."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def _timed(work, field="VmHWM"):
    """(what work() returns, {"seconds", "megabytes"} that it took)."""
    before, began = _memory(field), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    return result, {"seconds": seconds, "megabytes": max(_memory(field) - before, 0.1)}


def _our_mimic(folder):
    rows, taken = _timed(lambda: xrays.mimic_rows("mimic", folder, "train", ("PA", "AP")))
    return taken | {"digest": _digest(rows[0], rows[3])}


def _pandas_mimic(folder):
    pandas = import_peer("pandas")

    def read():
        parts = [folder / f"mimic-cxr-2.0.0-{p}.csv.gz" for p in ("metadata", "split", "chexpert")]
        metadata = pandas.read_csv(
            parts[0], usecols=["dicom_id", "subject_id", "study_id", "ViewPosition"]
        )
        split = pandas.read_csv(parts[1], usecols=["dicom_id", "split"])
        table = metadata.merge(split, on="dicom_id")
        table = table[(table["split"] == "train") & table["ViewPosition"].isin(["PA", "AP"])]
        table = table.merge(pandas.read_csv(parts[2]), on=["subject_id", "study_id"])
        labels = table[xrays.CHEXPERT_COLUMNS].replace(-1, np.nan).to_numpy(np.float32)
        labels[table["No Finding"].to_numpy() == 1] = 0
        return table["dicom_id"].to_numpy("S"), labels

    rows, taken = _timed(read)
    return taken | {"digest": _digest(*rows)}


def _digest(names, labels):
    order = np.argsort(names)
    content = np.ascontiguousarray(names[order]), np.nan_to_num(labels[order], nan=-1)
    return hashlib.sha256(b"".join(values.tobytes() for values in content)).hexdigest()


def _make_mimic(folder, rows):
    """MIMIC-CXR-JPG's three tables with made content, in the real columns."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    subjects = rng.integers(10_000_000, 20_000_000, max(1, rows * MIMIC_SUBJECTS // MIMIC_ROWS))
    subjects = np.unique(subjects)
    studies = np.unique(rng.integers(50_000_000, 60_000_000, max(1, rows * 3 // 5)))
    owners = subjects[rng.integers(len(subjects), size=len(studies))]
    marks = rng.choice(["", "0.0", "1.0", "-1.0"], (len(studies), 14), p=[0.8, 0.05, 0.12, 0.03])
    dicoms = ["-".join(f"{w:08x}" for w in row) for row in rng.integers(2**32, size=(rows, 5))]
    views = rng.choice(["AP", "PA", "LATERAL", "LL", ""], rows, p=[0.4, 0.25, 0.2, 0.1, 0.05])
    parts = rng.choice(["train", "validate", "test"], rows, p=[0.97, 0.02, 0.01])
    columns = sorted(xrays.FINDING_COLUMNS)
    with _packed_table(folder, "chexpert") as table:
        table.write(",".join(["subject_id", "study_id", *columns]) + "\n")
        for owner, study, row in zip(owners, studies, marks):
            table.write(f"{owner},{study},{','.join(row)}\n")
    of = rng.integers(len(studies), size=rows)
    with _packed_table(folder, "metadata") as table, _packed_table(folder, "split") as split:
        table.write(
            "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,"
            "Columns,StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning\n"
        )
        split.write("dicom_id,study_id,subject_id,split\n")
        for dicom, study, view, part in zip(dicoms, of, views, parts):
            ids = owners[study], studies[study]
            table.write(
                f'{dicom},{ids[0]},{ids[1]},"CHEST (PA AND LAT)",{view},3056,2544,21800506,'
                '213014.531,"CHEST (PA AND LAT)"\n'
            )
            split.write(f"{dicom},{ids[1]},{ids[0]},{part}\n")


def _packed_table(folder, part):
    return gzip.open(folder / f"mimic-cxr-2.0.0-{part}.csv.gz", "wt", compresslevel=1)


def _list_classes(folder, files):
    """Time and memory of class_index on files that are really there (links to one)."""
    for start in range(0, files, 1000):
        (folder / f"n{start:08d}").mkdir(parents=True)
        first = folder / f"n{start:08d}" / "first.JPEG"
        first.touch()
        for i in range(1, min(1000, files - start)):
            os.link(first, first.with_name(f"{i}.JPEG"))
    found, taken = _timed(lambda: natural.class_index(folder))
    if len(found["names"]) != files:
        raise RuntimeError(f"{len(found['names'])} of {files} files were found")
    return taken


def _made_images(images, entry):
    """In place of listing a directory of class entry: what it would find."""
    count = images // IMAGENET21K_CLASSES + (int(entry.name[1:]) < images % IMAGENET21K_CLASSES)
    names = np.array([f"{entry.name}/{entry.name}_{i}.JPEG".encode() for i in range(count)], "S")
    return names, np.full((count, 2), -1)


IMAGENET21K_CLASSES = 21_841


def _build_index(folder, images):
    for c in range(min(IMAGENET21K_CLASSES, images)):
        (folder / f"n{c:08d}").mkdir(parents=True)
    natural._class_images = functools.partial(_made_images, images)
    natural.CACHE_FROM = 0
    return _timed(lambda: natural.class_index(folder, held_out=natural.held_out))[1]


def _open_index(folder, images):
    """A worker: opens the index, then looks up the images of 100 batches."""
    before = _memory("RssAnon")
    found, taken = _timed(lambda: natural.class_index(folder, held_out=natural.held_out))
    for step in range(100):
        chosen = loading.batch_indices(step, images, 256, seed=0)[0]
        found["names"][chosen], found["labels"][chosen]
    return taken | {"megabytes": max(_memory("RssAnon") - before, 0.1)}


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

# name: (its options, what it measures: Report)
BENCHMARKS = {
    "train": (train_options, train),
    "load": (load_options, load),
    "index": (index_options, index),
}


def main():
    parser = console.Parser(f"{__doc__}\nbench.py BENCHMARK --help states the options of each.")
    parser.add_argument("benchmark", nargs="?", type=console.one_of(*BENCHMARKS), default="train",
        help=", ".join(BENCHMARKS))  # fmt: skip
    name = parser.parse_args(sys.argv[1:2]).benchmark
    add_options, measure = BENCHMARKS[name]
    parser = console.Parser(measure.__doc__)
    parser.prog += f" {name}"
    add_options(parser)
    parser.add_argument("--json", metavar="PATH", help="also write the result there (default: no)")
    args = parser.parse_args(sys.argv[2:])
    env = engine.setup()
    report = measure(args, env)
    console.print_table(report.rows, report.header)
    required = []
    for what, peer, ratio, least in report.required:
        reached = ratio >= least
        required.append({"of": what, "to": peer, "ratio": ratio, "least": least})
        verdict = "reached" if reached else "MISSED"
        print(f"{what} / {peer}: {ratio:.2f}, required {least:.2f}: {verdict}")
        required[-1]["reached"] = reached
    if args.json:
        record = {"schema": 1, "kind": f"bench-{name}", **report.values, "required": required}
        record |= {"config": vars(args), "environment": engine.environment(env)}
        console.write_json(args.json, record)
    return 0 if all(r["reached"] for r in required) else 1


if __name__ == "__main__":
    engine.run(main)
