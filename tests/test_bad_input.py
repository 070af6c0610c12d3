"""Each mistake is answered by one line that names it, exit 2, before training, and no file."""

import itertools
import json
import math
import os
import shutil
import signal
import time
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refuses, run
from grids import call
from interruption import CPU
from trees import write_photos

import data
import fewshot
import models
import plot
import pretrain
import transfer
from engine import checkpoint, console
from engine.optimizer import SGD_AGC
from engine.processes import run_script
from readers.images import Array, ImageDataset

SCRIPTS = {"pretrain": pretrain, "transfer": transfer, "fewshot": fewshot}
SCRIPTS |= {"data": data, "plot": plot}


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd):
    """Calls a script in an empty directory; returns its one line, having checked the rest."""
    monkeypatch.chdir(tmp_path)

    def refused(script, *words):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as left:
            run_script(lambda: call(SCRIPTS[script], *words))
        captured = capfd.readouterr()
        assert left.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert "step" not in captured.out
        assert sorted(tmp_path.rglob("*")) == before
        return captured.err

    return refused


SCRATCH = "fewshot --checkpoint scratch"


@pytest.mark.parametrize(
    "line, words",
    [
        ("pretrain --source cifar10", "--data-dir, or --download"),
        ("pretrain --epochs 2 --warmup 3", "--warmup 3 is not within --epochs 2"),
        ("pretrain --batch-size 3 --accumulate 4", "--batch-size 3 is less than 1 processes x"),
        ("pretrain --batch-size auto --accumulate 2", "--accumulate: --batch-size auto chooses"),
        ("pretrain --views PA", "--views means nothing for synthetic-natural"),
        ("pretrain --source nih --split-by image", "--split-by means nothing for nih"),
        ("pretrain --source nih --blank negative", "--blank means nothing for nih; leave it out"),
        ("transfer --checkpoint scratch --domain medical", "--domain means nothing for synthetic"),
        ("pretrain --fraction 1.5", "--fraction 1.5: must be above 0 and at most 1"),
        ("pretrain --source synthetic-xray --balanced", "--balanced: synthetic-xray is multi"),
        ("pretrain --recipe optimised --source synthetic-xray", "is for small networks on"),
        ("transfer --checkpoint scratch --recipe papre", "did you mean paper?"),
        ("transfer --checkpoint scratch --model R50x2", "did you mean R50x"),
        ("fewshot", "run pretrain.py first"),
        ("fewshot --checkpoint scratch runs/none", "--checkpoint runs/none: no such run folder or"),
        (f"{SCRATCH} --checkpoint runs/x", "--checkpoint is there twice; name all of its values"),
        (f"{SCRATCH} --shots 1 --shots=5", "--shots is there twice; name all of its values"),
        ("transfer --target a --target b", "--target is there twice; name all of its values"),
        ("data info nih --views PA --views AP", "--views is there twice; name all of its values"),
        ("fewshot --eval-only --method linear", "--eval-only: trains nothing; leave out it, or"),
        ("pretrain --augment crop", "--augment means nothing for synthetic-natural: no photogra"),
        ("pretrain --augment randaug", "did you mean randaugment?"),
        (f"{SCRATCH} --shots 7 9999", "--shots 9999: class"),
        (f"{SCRATCH} --batch-size 1", "--batch-size 1"),
        (f"{SCRATCH} --method lineal", "did you mean linear?"),
        (f"{SCRATCH} --method linear", "--method linear: scratch has no features; leave it out"),
        (f"{SCRATCH} --target synthetic-natural-target --single-label", "--single-label means not"),
        ("transfer --checkpoint statistics", "nothing to fine-tune; add --method linear"),
        ("fewshot --seeds 1 1", "--seeds 1 1: a seed is named twice"),
        ("fewshot --seeds 0", "--seeds 0: one number is how many (1 to 10000), from --seed on"),
        ("transfer --seeds 10001", "--seeds 10001: one number is how many (1 to 10000)"),
        ("transfer --seed 3 --seeds 0 1", "--seed means nothing beside --seeds 0 1; leave it out"),
        ("fewshot --method linear --save model", "--save model means nothing for --method linear"),
        ("fewshot --eval-only --shots 1", "--shots means nothing for --method eval"),
        ("fewshot --method features --seeds 2", "--seeds means nothing for --method features"),
        ("pretrain --bach-size=4", "unknown option --bach-size; did you mean --batch-size?"),
        ("pretrain --batch 4", "unknown option --batch; did you mean --batch-size?"),
        ("pretrain --batch-size x", "argument --batch-size: invalid int value: 'x'"),
        (
            "pretrain --precision fp16",
            "unknown 'fp16', did you mean bf16? (auto, fp32, tf32, bf16)",
        ),
        ("data", "COMMAND"),
        ("data chek nih", "invalid choice: 'chek' (choose from"),
        ("data info", "name"),
        ("data info folder:", "folder:"),
        ("data info hin@64", "did you mean 'nih'?"),
        ("data download nih+chexpert", "nih+chexpert: torchvision cannot fetch it"),
        ("data info synthetic-xray --sheet r.jpg", "--sheet r.jpg"),
        ("data pack nih", "--size"),
        ("data pack nih --size 0", "argument --size: 0 is not from"),
        ("data pack nih --size 16 --codec jpeg --quality 101", "argument --quality: 101 is not"),
        ("data pack nih@16 --size 8", "nih@16: nothing to pack"),
        ("data pack nih+chexpert --size 8", "nih+chexpert: pack the datasets of a union one by"),
        ("data pack synthetic-xray~0.4 --size 8", "synthetic-xray~0.4: nothing to pack"),
        ("data download nih@16", "nih@16: torchvision cannot fetch it"),
        ("fewshot --checkpoint runs/none --scratch-steps 3", "--scratch-steps: name scratch"),
        *(
            (f"fewshot --method linear {option}", f"{option.split()[0]} means nothing for --method")
            for option in ("--steps 3", "--batch-size 3", "--balanced", "--recipe bit", "--lr 1")
        ),
        *((f"pretrain --{it}=", f"argument --{it}: ") for it in ("out", "source", "data-dir")),
        ("pretrain --recipe=", "argument --recipe: "),
    ],
)
def test_options(refuse, line, words):
    assert words in refuse(*line.split())


BOUNDS = {  # scripts, the least, the most, values that are out of them
    "--image-size": ("pretrain", 8, 4096, "1 7 0 -1 4097 100000"),
    "--batch-size": ("pretrain", 1, 2**20, "0 1048577 10000000"),
    "--workers": ("pretrain", 0, 256, "-1 257 1000"),
    "--seed": ("pretrain", 0, 2**63 - 1, "-1 9223372036854775808 18446744073709551616"),
    "--accumulate": ("pretrain", 1, 65536, "0 1000000000"),
    "--lr": ("pretrain", "1e-12", 10**9, "0 nan inf 1e300"),
    "--log-every": ("pretrain", 1, 10**9, "0 100000000000"),
    "--save-minutes": ("pretrain", "1e-12", 10**9, "0 1e300"),
    "--epochs": ("pretrain", "1e-12", 10**9, "1e30 1e-30 nan"),
    "--warmup": ("pretrain", 0, 10**9, "-1 nan"),
    "--clipping": ("pretrain", 0, 10**9, "1e300"),
    "--weight-decay": ("pretrain", 0, 10**9, "1e300"),
    "--seeds": ("transfer fewshot", 0, 2**63 - 1, "-1 9223372036854775808"),
    "--steps": ("transfer fewshot", 1, 10**9, "0 1000000000000"),
    "--scratch-steps": ("transfer fewshot", 1, 10**9, "1000000000000"),
    "--shots": ("fewshot", 1, 10**9, "0 99999999999"),
}


@pytest.mark.parametrize("flag", BOUNDS)
def test_bounds(refuse, flag):
    scripts, low, high, values = BOUNDS[flag]
    for script, value in itertools.product(scripts.split(), values.split()):
        line = refuse(script, f"{flag}={value}")
        assert line == f"error: argument {flag}: {value} is not from {low} to {high}\n"


@pytest.fixture
def tiny(tmp_path, rng):
    """folder: dataset of few images, to be spoilt."""
    return write_photos(tmp_path / "set", rng)


def test_no_known_label(refuse, tiny):
    rows = "".join(f"train/dog/{i}.png,train,{'1' if i < 1 else ''}\n" for i in range(3))
    table = tiny / "t.csv"
    for mark, words, split in (
        ("-1", f"{SCRATCH} --shots 1 --target", "test"),
        ("", "transfer --checkpoint scratch --blank ignore --target", "test"),
        ("-1", "pretrain --image-size 32 --source", "test"),
        ("1", "pretrain --image-size 32 --fraction 0.4 --seed 1 --source", "train"),
    ):
        table.write_text(f"path,split,Mass\n{rows}test/dog/0.png,test,{mark}\n")
        said = f"t.csv: no image of the {split} split has a known label; add some\n"
        assert refuse(*words.split(), f"table:{table}").endswith(said)


@pytest.mark.parametrize("split, workers", [("train", 0), ("test", 2)])
def test_truncated_image(refuse, tiny, split, workers):
    broken = tiny / split / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for words in ("pretrain --image-size 32 --source", f"{SCRATCH} --shots 3 --target"):
        assert str(broken) in refuse(*words.split(), f"folder:{tiny}", "--workers", workers)


def test_two_targets_of_one_name(refuse, tiny):
    targets = f"folder:{tiny}", f"folder:{shutil.copytree(tiny, tiny.parent / 'other/set')}"
    said = refuse(*SCRATCH.split(), "--shots", 1, "--target", *targets)
    assert "would write results/folder-set" in said


def weights(**change):
    """What pretrain.py leaves in model.pt, and of it what is changed; None leaves it out."""
    facts = {"name": "R14x0.5", "source": "nih", "domain": "medical", "images": 9}
    facts |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "sample": torch.ones(8, 128)}
    facts |= {"model": models.create_model("R14x0.5", 2).state_dict()} | change
    return {key: value for key, value in facts.items() if value is not None}


def spoilt(make):
    """The same with root.conv.weight as make() leaves it."""
    content = weights()
    content["model"]["root.conv.weight"] = make(content["model"]["root.conv.weight"])
    return content


def opened(content, path):
    """The Network of a file of this content."""
    torch.save(content, path)
    return transfer.open_network(path, SimpleNamespace(model=None, source=None))


IMPOSSIBLE = {
    "name": (5, ["R14x0.5"]),
    "source": (5, "", "a\nb"),
    "run": ("../x", "/x", "a/../../x", "..", ".x", "a\tb", "a\0b"),
    "classes": ("ab", 5, ("a", "a"), ("a", 5)),
    "task": ("both", 5),
    "image_size": ("x", 2.5, 0, 10**9),
    "domain": ("satellite",),
    "images": (-3, "many"),
    "mean": ("abc", (0.5, 0.5), (math.nan,) * 3),
    "std": ((0.5, 0.5, 0.0), 7),
    "sample": ("text", torch.ones(5, 7), torch.ones(3), torch.full((8, 128), math.inf)),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_facts_of_a_network_that_cannot_be(tmp_path, key):
    path = tmp_path / "model.pt"
    for value in IMPOSSIBLE[key]:
        said = "tensor([" if torch.is_tensor(value) else f"{value!r}; pre-train anew"
        call = partial(opened, weights(**{key: value}), path)
        refuses(ValueError, call, f"{path}: its {key} is {said}")


FOREIGN = "not written by pretrain.py; say --model and --source of it"
NO_STATE, DIVERGED = "holds no state dict under 'model'", "the training that wrote it diverged"


@pytest.mark.parametrize(
    "make, words",
    [
        *((partial(weights, **{key: None}), FOREIGN) for key in "mean std domain images".split()),
        (partial(weights, source=None), FOREIGN),
        (lambda: {"name": "mae", "model": weights()["model"]}, FOREIGN),
        *((lambda it=it: it, FOREIGN) for it in ({}, [1], 3.5, torch.ones(2), {"epoch": 1})),
        *((partial(weights, model=model), NO_STATE) for model in (None, "text", 3)),
        (lambda: spoilt(lambda weight: "text"), NO_STATE),
        (lambda: spoilt(torch.Tensor.long), "root.conv.weight is of torch.int64"),
        (lambda: spoilt(torch.Tensor.char), "root.conv.weight is of torch.int8"),
        (lambda: spoilt(torch.Tensor.bool), "root.conv.weight is of torch.bool"),
        (lambda: spoilt(torch.Tensor.cfloat), "root.conv.weight is of torch.complex64"),
        (lambda: spoilt(torch.Tensor.to_sparse), "or sparse, so it is no weight"),
        (lambda: spoilt(lambda weight: weight * math.nan), f"is not finite: {DIVERGED}"),
        (lambda: spoilt(lambda weight: weight / 0), f"is not finite: {DIVERGED}"),
        # Else --eval-only would measure a head that was never trained.
        (partial(weights, classes=("a",)), "names 1 classes, its head has 2; pre-train anew"),
        (
            partial(weights, classes=("a", "b", "c")),
            "names 3 classes, its head has 2; pre-train anew",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_weights_of_others_and_spoilt_ones(tmp_path, make, words):
    path = tmp_path / "model.pt"
    refuses(ValueError, partial(opened, make(), path), path, words)


KERNEL = "resnet/root_block/standardized_conv2d/kernel"
KINDS = "text empty cut object bomb header strings scalar text.pt list.pt"


@pytest.mark.parametrize("kind", KINDS.split())
def test_files_that_hold_no_weights(tmp_path, kind):
    """Nothing is unpacked that is out of proportion: a bomb of 300 kB would take 300 MB."""
    path = tmp_path / (kind if kind.endswith(".pt") else "w.npz")
    arrays = {"object": np.array([{}]), "strings": np.array(["a"]), "scalar": np.ones(3)}
    said = {"text.pt": "refused", "list.pt": NO_STATE}.get(kind, "damaged")
    if kind in arrays or kind == "cut":
        np.savez(path, **{KERNEL: arrays.get(kind, np.ones(99))})
        os.truncate(path, path.stat().st_size // (1 + (kind == "cut")))
    elif kind == "list.pt":
        torch.save([torch.zeros(3)], path)
    elif "text" in kind or kind == "empty":
        path.write_text("no archive" * (kind != "empty"))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open(f"{KERNEL}.npy", "w") as file:
                shape = (10**13,) if kind == "header" else (3 * 10**8,)
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(300 if kind == "bomb" else 0):
                    file.write(bytes(10**6))
    unpacked = "it would unpack to 300,000,1" if kind == "bomb" else ""
    call = partial(models.load_weights, models.create_model("R14x0.5", 3), path)
    refuses(ValueError, call, f"{path}: {said}", unpacked)


WHOLE = {"schema": 1, "kind": "pretrain", "config": {}, "metrics": {"accuracy": 0.5, "loss": 1.0}}
RESULTS = [
    *('{"schema": 1', "null", "[]", "{}", "3", '"text"', "[" * 100_000, "", "\ud800"),
    *(json.dumps(WHOLE | {"config": config}) for config in (None, [1], "text")),
    *(json.dumps(WHOLE | {"metrics": metrics}) for metrics in (None, [1], "text", 3)),
    *(
        json.dumps(WHOLE | {"metrics": {name: value}})
        for name in ("accuracy", "top5", "mean_auc", "mean_ap")
        for value in (7.5, -1, math.nan, math.inf, "0.5", [0.5])
    ),
    *(json.dumps(WHOLE | {"metrics": {"loss": value}}) for value in (math.nan, math.inf, -1)),
]


@pytest.mark.parametrize("text", RESULTS, ids=lambda text: text[-40:])
def test_results_that_are_none(tmp_path, text):
    path = tmp_path / "result.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    call = partial(checkpoint.read_result, path, "pretrain", {})
    refuses(ValueError, call, path, "not a result file", "remove it, or give another --out")
    path.write_text('{"schema": 2, "kind": "fewshot"}')
    refuses(ValueError, call, path, "('fewshot', 2)")


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        *({key: None} for key in ("model", "optimizer", "step", "seconds")),
        *({"step": step} for step in (11, -1, 1.5, True, "x")),
        *({"seconds": seconds} for seconds in (math.nan, math.inf, -1.0, "x")),
        *({"model": {}}, {"model": {"weight": torch.ones(1, 3)}}),
        {"model": {"weight": torch.ones(2, 3).long()}},
        {"model": {"weight": torch.full((2, 3), math.nan)}},
        *({"optimizer": {}}, {"optimizer": {"state": {0: 3}}}, {"optimizer": {"param_groups": []}}),
        {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(1)}}}},
    ],
    ids=str,
)
def test_checkpoints_that_cannot_be_continued(tmp_path, change):
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer, path = SGD_AGC(model.parameters(), 0.1), tmp_path / "checkpoint.pt"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"step": 10, "seconds": 1.0, "config": {"lr": 0.1}}
    torch.save(state, path)
    run = partial(checkpoint.Run, path, model, optimizer, {"lr": 0.1}, CPU, last=10)
    assert run().step == 10
    if change.get("optimizer"):
        change = {"optimizer": state["optimizer"] | change["optimizer"]}
    torch.save(state | change, path)
    refuses(ValueError, run, path)


@pytest.mark.parametrize("labels", ([0, 2], [-1, 0], [[0, 2]], [[-1, 0]], [[math.nan, 1.5]]))
def test_labels_that_no_class_has(labels):
    labels = np.array(labels, np.int64 if np.ndim(labels) == 1 else np.float32)
    task = "multiclass" if labels.ndim == 1 else "multilabel"
    about = Array("x", np.zeros((len(labels), 4, 4, 3), np.uint8)), labels, "ab", task, "natural"
    refuses(ValueError, lambda: ImageDataset("x", *about), "x: a label is ")


LONG = "n" * 300


@pytest.mark.parametrize("out", ("/proc/x", "/dev/null", "file", "file/x", LONG, f"new/{LONG}"))
def test_places_that_cannot_be_written(refuse, tiny, tmp_path, out):
    (tmp_path / "file").touch()
    images, small = f"folder:{tiny}", ("--image-size", 32, "--out", out)
    for script, *words in (
        ("pretrain", "--source", images, *small),
        ("transfer", "--checkpoint", "scratch", "--target", images, *small),
        ("fewshot", "--checkpoint", "scratch", "--target", images, "--shots", 1, *small),
        ("plot", "--out", out),
        ("data", "pack", images, "--size", 8, "--out", out),
        ("data", "info", images, "--sheet", f"{out}/r.png"),
        ("data", "check", images, "--report", f"{out}/r.json"),
    ):
        line = refuse(script, *words)
        assert line.startswith(f"error: {words[-2]}: {out}/")


@pytest.mark.parametrize("name", ("model.pt", "checkpoint.pt", "log.jsonl", "result.json"))
def test_a_directory_where_a_file_belongs(refuse, tiny, tmp_path, name):
    (tmp_path / "runs/folder-set-R14x0.5" / name).mkdir(parents=True)
    said = refuse("pretrain", "--source", f"folder:{tiny}", "--image-size", 32)
    assert f"folder-set-R14x0.5/{name}" in said


MEMORY = "; less is needed with --accumulate, --checkpoint-activations, fewer --workers, a smaller"
MEMORY += " --batch-size or --image-size"
KINDS_OF_ERRORS = (AttributeError, TypeError, IndexError, RecursionError, ZeroDivisionError)


@pytest.mark.parametrize(
    "error, said",
    [
        *((kind("so"), f"{kind.__name__}: so") for kind in KINDS_OF_ERRORS),
        (KeyError("mean"), "KeyError: 'mean'"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
        (MemoryError(), "MemoryError: MemoryError()"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (RuntimeError("DataLoader worker exited"), "RuntimeError: DataLoader worker exited"),
        (ValueError("no such\ncolumn"), "no such column"),
        (OSError(28, "No space left"), "[Errno 28] No space left"),
    ],
    ids=repr,
)
def test_any_error_is_one_line(monkeypatch, capsys, error, said):
    def main():
        raise error

    monkeypatch.delenv("TRACEBACK", raising=False)
    assert console.exit_status(main) == 2
    if not isinstance(error, (ValueError, OSError)):
        said += "; TRACEBACK=1 shows where"
        said += MEMORY if "emory" in said or "worker" in said else ""
    assert capsys.readouterr() == ("", f"error: {said}\n")
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(type(error)):
        console.exit_status(main)


@pytest.mark.parametrize("name", ("SIGTERM", "SIGINT", "SIGUSR1"))
def test_a_signal_before_the_first_step(monkeypatch, tmp_path, capfd, name):
    def ask(*_, **__):
        os.kill(os.getpid(), signal.Signals[name])
        time.sleep(9)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "open_splits", ask)
    with pytest.raises(SystemExit) as left:
        run_script(lambda: call(pretrain))
    said = f"stopped by {name}; run the same command again\n"
    assert (left.value.code, capfd.readouterr().err) == (75, said)


def test_a_reader_that_leaves(monkeypatch, capsys):
    """As head does: quietly, with the status of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        assert console.exit_status(lambda: print("much")) == 128 + 13
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "line, said",
    [
        ("pretrain.py --source cifar11", "did you mean 'cifar10'?"),
        ("data.py info hin", "unknown dataset 'hin'; did you mean 'nih'?"),
    ],
)
def test_one_line_also_from_the_shell(tmp_path, line, said):
    out, err = run(*line.split(), cwd=tmp_path, status=2)
    assert not out and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, words",
    [
        *((f"{name} --help", f"{name}.py --out default:") for name in SCRIPTS if name != "data"),
        ("data --help", "list info check pack download"),
        ("data info --help", "--sheet --single-label --fraction 1.0 --views PA intersection"),
        ("data pack --help", "--size --codec raw jpeg --quality 90 --out --workers datasets"),
    ],
)
def test_help_states_defaults(line, words, capsys):
    script, *rest = line.split()
    with pytest.raises(SystemExit) as left:
        call(SCRIPTS[script], *rest)
    out = capsys.readouterr().out
    assert left.value.code == 0 and all(word in out for word in words.split())
