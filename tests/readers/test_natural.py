"""What torchvision reads; images of one's own, folders and tables (imagenet: test_archives.py)."""

import os
import pickle
from functools import partial

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conftest import refuses
from packing import pack, rows_of, run_data, says
from trees import load_folder, marks, noise, pixels_of, places, save, write

import data
from data import load_dataset, load_splits


def test_folder(pets_at_home):
    train, test = load_folder(pets_at_home), load_folder(pets_at_home, "test")
    assert train.classes == test.classes == ("Dog", "cat")  # sorted as torchvision sorts
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and test.labels.tolist() == [0, 1]
    assert train.labels.dtype == np.int64
    assert (train.task, train.domain, train.groups) == ("multiclass", "natural", None)
    image, label = train[4]
    np.testing.assert_array_equal(image, pixels_of(pets_at_home / "train" / "cat" / "1.png"))
    assert label.dtype == torch.int64 and label.item() == 1


def test_folder_refusals(pets_at_home):
    train, test = pets_at_home / "train", pets_at_home / "test"
    (test / "cow").mkdir()
    refuses(ValueError, partial(load_folder, pets_at_home, "test"), test / "cow", "no class")
    (test / "cow").rename(train / "cow")
    refuses(ValueError, partial(load_folder, pets_at_home), train / "cow", "no image")
    train.rename(pets_at_home / "training")
    refuses(FileNotFoundError, partial(load_folder, pets_at_home), train, "PATH/train/CLASS")
    train.mkdir()
    refuses(ValueError, partial(load_folder, pets_at_home), train, "no class directory")


@pytest.mark.parametrize("split, count", [("train", 2000), ("test", 1000)])
def test_folder_real_equals_torchvision(real_data, split, count):
    dataset = load_folder(real_data / "cifar10-folder", split)
    reference = torchvision.datasets.ImageFolder(real_data / "cifar10-folder" / split)
    assert len(dataset) == len(reference) == count
    assert dataset.classes == tuple(reference.classes) and len(dataset.classes) == 10
    assert dataset.labels.tolist() == reference.targets
    for i in range(0, count, 7):
        np.testing.assert_array_equal(dataset.read(i), pixels_of(reference.samples[i][0]))


def whole(monkeypatch, module):
    """torchvision's checksums are of the real files: any file that exists will do here."""
    monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: os.path.isfile(path))


@pytest.mark.parametrize("name, key", [("CIFAR10", "labels"), ("CIFAR100", "fine_labels")])
def test_cifar(tmp_path, rng, monkeypatch, name, key):
    whole(monkeypatch, torchvision.datasets.cifar)
    build = getattr(torchvision.datasets, name)
    base, classes = tmp_path / build.base_folder, [f"class {i}" for i in range(int(name[5:]))]
    base.mkdir()
    (base / build.meta["filename"]).write_bytes(pickle.dumps({build.meta["key"]: classes}))
    count, files = 2 * len(build.train_list), [*build.train_list, *build.test_list]
    pixels = noise(rng, count + 2, 3, 32, 32)
    labels = rng.integers(len(classes), size=count + 2).tolist()
    for i, (file, _) in enumerate(files):
        part = slice(2 * i, 2 * i + 2)
        content = {"data": pixels[part].reshape(2, 3072), key: labels[part]}
        (base / file).write_bytes(pickle.dumps(content | {"coarse_labels": [1, 1]}))
    for split, part in (("train", slice(count)), ("test", slice(count, None))):
        dataset = load_dataset(name.lower(), tmp_path, split)
        assert dataset.classes == tuple(classes)
        assert dataset.labels.dtype == np.int64 and dataset.labels.tolist() == labels[part]
        for i, expected in enumerate(pixels[part]):
            np.testing.assert_array_equal(dataset.read(i), expected)


def test_flowers(tmp_path, rng, monkeypatch):
    whole(monkeypatch, torchvision.datasets.flowers102)
    base = tmp_path / "flowers-102"
    for image in range(1, 8):
        save(base / "jpg" / f"image_{image:05d}.jpg", noise(rng, 6, 4 + image, 3))
    labels = np.array([[77, 1, 102, 3, 3, 50, 2]])  # counted from 1
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels})
    sets = {"trnid": [[2, 1]], "valid": [[7, 5]], "tstid": [[6, 3, 4]]}
    scipy.io.savemat(base / "setid.mat", {name: np.array(ids) for name, ids in sets.items()})
    train, test = load_splits("flowers102", tmp_path)
    # The study's rule: the official test list is trained on, train + validation is tested on.
    assert train.labels.tolist() == [49, 101, 2] and test.labels.tolist() == [0, 76, 1, 2]
    assert train.labels.dtype == np.int64
    for dataset, images in ((train, (6, 3, 4)), (test, (2, 1, 7, 5))):
        assert len(dataset.classes) == 102 and dataset.classes[76] == "passion flower"
        for i, image in enumerate(images):
            path = base / "jpg" / f"image_{image:05d}.jpg"
            np.testing.assert_array_equal(dataset.read(i), pixels_of(path))


def test_pets(tmp_path, rng):
    base = tmp_path / "oxford-iiit-pet"
    lists = {"trainval": ["Abyssinian_2 1 1 1", "great_pyrenees_9 2 2 1", "Abyssinian_5 1 1 1"]}
    lists["test"] = ["great_pyrenees_1 2 2 1", "Abyssinian_7 1 1 1"]
    for file, lines in lists.items():
        write(base / "annotations" / f"{file}.txt", "\n".join(lines) + "\n")
        for line in lines:
            save(base / "images" / f"{line.split()[0]}.jpg", noise(rng, 7, 5, 3))
    train, test = load_splits("pets", tmp_path)
    assert train.classes == test.classes == ("Abyssinian", "Great Pyrenees")
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [1, 0]
    expected = pixels_of(base / "images" / "great_pyrenees_9.jpg")
    np.testing.assert_array_equal(train.read(1), expected)
    (base / "annotations" / "test.txt").write_text("half a line")
    refuses(FileNotFoundError, lambda: load_dataset("pets", tmp_path, "test"), tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets"])
def test_missing_data_names_directory_and_mend(tmp_path, name):
    call = partial(load_dataset, name, tmp_path / "nowhere")
    refuses(FileNotFoundError, call, name, tmp_path / "nowhere", "--data-dir", "--download")


def test_failed_download_says_so(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    call = partial(load_dataset, "cifar10", tmp_path, download=True)
    refuses(FileNotFoundError, call, "download", tmp_path, "no route to host")


# Tables: what is read, what is held out, what is refused and where

FILES = [f"img/{i}.png" for i in range(12)] + ["a, b.png", 'c "d".png', "Zoë 2.png"]
ONE = "path,split,patient,label\nimg/0.png,train,p1,cat\nimg/1.png,train,p1,dog\n"
ONE += "img/2.png,test,p2,dog\nimg/3.png,train,p3,cat\n"
MANY = "path,split,patient,Mass,Edema\nimg/0.png,train,7,1,0\nimg/1.png,train,7,-1,1\n"
MANY += "img/2.png,test,8,,1\nimg/3.png,train,9,0.0,-1.0\n"
PLAIN = "path,label\n" + "".join(f"img/{i}.png,{'ab'[i % 2]}\n" for i in range(10))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for name in FILES:
        save(root / name, noise(rng, 20, 24, 3))
    return root


def load(place, text, name="own.csv", **options):
    write(place / name, text)
    return load_splits(f"table:{place / name}", **options)


def test_a_label_and_findings(place):
    train, test = load(place, ONE)
    assert train.classes == ("cat", "dog") and train.task == "multiclass" and train.options == {}
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [1]
    assert train.groups.tolist() == [0, 0, 2] and train.labels.dtype == np.int64
    assert test.where(0) == str(place / "img/2.png") and train.read(0).shape == (3, 20, 24)
    train, test = load(place, MANY, domain="medical")
    assert train.classes == ("Mass", "Edema") and train.task == "multilabel"
    np.testing.assert_array_equal(train.labels, marks("10", ".1", "0."))
    np.testing.assert_array_equal(test.labels, marks(".1"))
    assert train.options == {"domain": "medical"} and train.labels.dtype == np.float32
    assert train.domain == "medical" and train.read(0).shape == (1, 20, 24)
    train, test = load(place, MANY, uncertain="positive", blank="negative")
    np.testing.assert_array_equal(train.labels, marks("10", "11", "01"))
    np.testing.assert_array_equal(test.labels, marks("01"))
    assert train.options == {"uncertain": "positive", "blank": "negative"}


@pytest.mark.parametrize("name", ["own.csv", "own.csv.gz"])
def test_legal_spellings(place, name):
    text = MANY.replace(",Mass", ',"Größe"').replace("img/0.png", '"a, b.png"')
    text = text.replace("img/1.png", '"c ""d"".png"').replace("img/2.png", "Zoë 2.png")
    train, test = load(place, "\ufeff" + text.replace("\n", "\r\n\r\n").rstrip(), name)
    np.testing.assert_array_equal(train.labels, marks("10", ".1", "0."))
    assert train.groups.tolist() == [0, 0, 2] and train.classes == ("Größe", "Edema")
    files = "a, b.png", 'c "d".png', "img/3.png", "Zoë 2.png"
    assert places(train) + places(test) == [str(place / file) for file in files]
    assert len(test) == 1


def changed(old, new, text=MANY):
    assert old in text
    return text.replace(old, new, 1)


BAD = {
    "empty": ("", "no column 'path'"),
    "header alone": ("path,split,Mass\n", "no row below its header"),
    "no path": (changed("path", "file"), "no column 'path', only: file, split, patient"),
    "Path": (changed("path", "Path"), "column 'Path' of its header; write 'path'"),
    "Split": (changed("split", "Split"), "column 'Split' of its header; write 'split'"),
    "Label": (changed("label", " Label", ONE), "column ' Label' of its header; write 'label'"),
    "no path but a label": (changed("path", "file", ONE), "no column 'path', only: file"),
    "semicolons": (MANY.replace(",", ";"), "is it separated by commas?"),
    "tabs": (MANY.replace(",", "\t"), "is it separated by commas?"),
    "path twice": (changed("patient", "path"), "has 2 columns 'path'"),
    "finding twice": (changed("Edema", "Mass"), "has 2 columns 'Mass'"),
    "label twice": ("path,label,label\na.png,1,2\n", "has 2 columns 'label'"),
    "empty finding": (changed("Mass", ""), "column 4 of its header has no name"),
    "blank finding": (changed("Mass", " "), "column 4 of its header has no name"),
    "comma at the header's end": (changed("Edema", "Edema,"), "column 6 of its header"),
    "no label": ("path,split\nimg/0.png,train\n", "neither a column label nor one a finding"),
    "path alone": ("path\nimg/0.png\n", "neither a column label nor one a finding"),
    "label and findings": (changed("Mass", "label"), "a label and Edema"),
    "label and more": (changed("patient", "age", ONE), "a label and age"),
    "too few fields": (changed("7,1,0", "7,1"), "line 2: 4 columns, the header has 5"),
    "too many fields": (changed("8,,1", "8,,1,"), "line 4: 6 columns, the header has 5"),
    "bare comma in a path": (changed("img/2.png", "a, b.png"), "line 4: 6 columns"),
    "label 2": (changed("7,1,0", "7,2,0"), "line 2: Mass '2' must be 1, 0, -1 or blank"),
    "label 0.5": (changed("7,-1,1", "7,0.5,1"), "line 3: Mass '0.5' must be 1, 0, -1"),
    "label yes": (changed(",,1", ",yes,1"), "line 4: Mass 'yes' must be"),
    "label inf": (changed(",,1", ",inf,1"), "line 4: Mass 'inf' must be"),
    "label with a blank": (changed(",,1", ", 1,1"), "line 4: Mass ' 1' must be"),
    "age as a finding": (changed("Mass", "age").replace("0.0", "53"), "line 5: age '53' must"),
    "unknown split": (changed("test", "valid"), "line 4: split 'valid' must be one of train, test"),
    "split in capitals": (changed("test", "Test"), "line 4: split 'Test' must be"),
    "no split": (changed(",test", ","), "line 4: split '' must be one of train, test"),
    "all train": (changed("test", "train"), "no row is of the test split"),
    "all test": (MANY.replace("train", "test"), "no row is of the train split; add some, or leave"),
    "patient with a blank": (changed(",8,", ",8 ,"), "line 4: patient '8 ' must not be blank, nor"),
    "label of a tab": (changed("p2,dog", "p2,\tdog", ONE), "nor begin or end with a blank"),
    "no mark to train on": (
        "path,split,Mass\nimg/0.png,train,\nimg/1.png,train,-1\nimg/2.png,test,1\n",
        "finding Mass has no mark to train on; fill it or drop it",
    ),
    "blank patient": (changed(",8,", ",,"), "line 4: patient '' must not be blank"),
    "patient of blanks": (changed(",8,", ",  ,"), "line 4: patient '  ' must not be blank"),
    "both sides": (changed(",8,", ",7,"), "line 4: patient 7 is in train and in test"),
    "both sides, later": (changed(",9,", ",8,"), "line 5: patient 8 is in train and in test"),
    "same path": (changed("img/3", "img/1"), "line 5: img/1.png occurs more than once"),
    "same path, both sides": (changed("img/2", "img/0"), "line 4: img/0.png occurs more"),
    "after blank lines": (changed("\n", "\n\n\n").replace("7,1,", "7,x,"), "line 4: Mass 'x'"),
    "after a quoted line end": (
        changed("img/0", '"img/\n0').replace("0.png", '0.png"').replace(",,1", ",x,1"),
        "line 5: Mass 'x'",
    ),
    "absolute": (changed("img/2.png", "/img/2.png"), "line 4: path '/img/2.png' must be a path"),
    "outside": (changed("img/2.png", "../2.png"), "line 4: path '../2.png' must be a path below"),
    "outside within": (changed("img/2", "img/../../2"), "line 4: path 'img/../../2.png' must be"),
    "dot": (changed("img/2", "./img/2"), "line 4: path './img/2.png' must be"),
    "two slashes": (changed("img/2", "img//2"), "line 4: path 'img//2.png' must be"),
    "backslash": (changed("img/2", "img\\2"), "line 4: path"),
    "blank path": (changed("img/2.png", ""), "line 4: path '' must be a path below"),
    "long path": (changed("img/2", "img/" + "x" * 255), "line 4: path"),
    "missing image": (changed("img/2.png", "img/77.png"), "img/77.png: listed for table:"),
    "a directory": (changed("img/2.png", "img2"), "img2: listed for table:"),
    "no such image's case": (changed("img/2.png", "img/2.PNG"), "img/2.PNG: listed for table:"),
    "one class": (ONE.replace("dog", "cat"), "all images are of one class, cat"),
    "blank label": (changed("p2,dog", "p2,", ONE), "line 4: label '' must not be blank"),
    "class in test alone": (changed("p2,dog", "p2,cow", ONE), "line 4: class cow has no training"),
    "finding without marks": (
        changed("7,1,", "7,,").replace("-1,1", ",1").replace("0.0", ""),
        "finding Mass has no mark",
    ),
    "not UTF-8": (MANY.encode().replace(b"img/2", b"img/\xff"), "line 4: path"),
    "open quote": (changed("img/2", '"img/2'), "own.csv"),
    "NUL": (changed("img/2", "img/\0"), "own.csv"),
}


@pytest.mark.parametrize("text, words", BAD.values(), ids=BAD)
def test_bad_tables(place, text, words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(place, text)
    message = str(caught.value)
    assert words in message and "\n" not in message and str(place) in message


def test_names_and_options_of_tables(place, tmp_path):
    load(place, MANY)
    name = f"table:{place}/own.csv"
    refuses(FileNotFoundError, lambda: load_dataset("table:none.csv"), "none.csv; name a table")
    refuses(FileNotFoundError, lambda: load_dataset(f"table:{place}"), "ends in .csv")
    refuses(ValueError, lambda: load_dataset(name, domain="xray"), "--domain xray: must be natural")
    refuses(ValueError, lambda: load_dataset(name, views=["PA"]), "takes no option views")
    refuses(ValueError, lambda: load_dataset(name, uncertain="no"), "--uncertain no: must be")
    refuses(ValueError, lambda: load_dataset(name, blank="positive"), "--blank positive: must be")
    refuses(ValueError, lambda: load(place, ONE, blank="negative"), "a label and --blank")
    assert data.dataset_slug(f"nih+{name}") == "nih+table-own.csv"
    assert data.parts_of(f"{name}@64+nih") == [f"{name}@64", "nih"]
    plus = "table:/a+b/x.csv.gz"
    assert data.parts_of(f"nih+{plus}+table:y.csv") == ["nih", plus, "table:y.csv"]
    assert data.base_name(f"{plus}@64+nih@8") == f"{plus}+nih"


def test_without_split_a_fifth_is_held_out(place):
    train, test = load(place, PLAIN)
    assert (len(train), len(test)) == (8, 2) and sorted(test.labels) == [0, 1]
    assert train.options == {"split": "a fifth of the images, by class, drawn"}
    paths = [*places(train), *places(test)]
    assert len({*paths}) == 10 and [d.where(0) for d in load(place, PLAIN)] == [paths[0], paths[8]]


def test_in_a_union_and_in_a_pack(place, nih_root, tmp_path):
    load(place, MANY.replace("Edema", "Effusion"))
    name = f"table:{place}/own.csv"
    refuses(ValueError, lambda: load_dataset(f"nih+{name}", nih_root), "medical and natural")
    union = load_dataset(f"nih+{name}", nih_root, domain="medical")
    assert union.classes == ("Effusion", "Mass") and len(union) == 40 + 3
    np.testing.assert_array_equal(union.labels[40:], marks("01", "1.", ".0"))
    assert union.read(42).shape == (1, 20, 24) and union.groups[-1].endswith(b"own.csv:2")
    pack(name, 8, "--domain", "medical", root=tmp_path)
    packed = load_dataset(f"{name}@8", tmp_path)
    assert packed.read(0).shape == (1, 8, 8) and packed.domain == "medical"
    assert load_dataset(f"{name}@8", domain="medical").classes == ("Mass", "Effusion")
    refuses(ValueError, lambda: load_dataset(f"{name}@8", domain="natural"), "domain = medical")


def test_commands(place):
    load(place, PLAIN)
    out = run_data("info", f"table:{place}/own.csv", "--domain", "medical")
    assert says(out, "medical, multiclass, 2 classes", "split: a fifth", "of 8: width x height")
    assert says(run_data("check", f"table:{place}/own.csv"), "8 + 2 images, 0 missing, 0 broken")
    rows = rows_of(run_data("list", "--data-dir", place))
    assert rows[f"table:{place}/own.csv"][:3] == ["own.csv", "yes", "8 + 2"]


def test_a_table_of_nih_is_nih(real_data, tmp_path):
    (tmp_path / "NIH-ChestXRay-14").symlink_to(real_data / "nih-256")
    (tmp_path / "images").symlink_to(real_data / "nih-256" / "images")
    nih, text = load_splits("nih", tmp_path), ["path,split,patient,"]
    text[0] += ",".join(nih[0].classes)
    for split, dataset in zip(data.SPLITS, nih):
        for i, row in enumerate(dataset.labels.astype(int)):
            about = os.path.basename(dataset.where(i)), split, dataset.groups[i], *row
            text.append("images/" + ",".join(map(str, about)))
    own = load(tmp_path, "\n".join(text), domain="medical")
    for one, other in zip(nih, own):
        np.testing.assert_array_equal(one.labels, other.labels)
        assert one.classes == other.classes and len(set(other.groups)) == len(set(one.groups))
        for i in range(0, len(one), 50):
            np.testing.assert_array_equal(one.read(i), other.read(i))
