"""What a script says, reads and writes: options, one-line errors, whole files, the same config."""

import json
import math
import sys

import pytest

from engine import checkpoint, console, options
from engine.processes import run_script


def test_a_crash_or_nan_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    console.write_json(path, {"value": 1})

    def crash(temporary):
        temporary.write_text('{"val')
        assert [p.name for p in tmp_path.iterdir() if p != path] == [temporary.name]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        console.write_atomically(path, crash)
    with pytest.raises(ValueError):
        console.write_json(path, {"value": math.nan})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert json.loads(path.read_text()) == {"value": 1}


CONFIG = {"lr": 0.1, "decays": (3, 6), "clipping": None}


@pytest.mark.parametrize(
    "ours, message",
    (
        (CONFIG, None),
        (CONFIG | {"lr": 0.2}, r"result.json was made with lr = 0\.1, not 0\.2; use the same"),
        (CONFIG | {"decays": (3, 7)}, r"with decays = \[3, 6\], not \[3, 7\]"),
        (CONFIG | {"clipping": 0.01}, "with clipping = None, not 0.01"),
        (CONFIG | {"mixup": 0.1}, "with mixup = None, not 0.1"),  # they did not have it yet
    ),
)
def test_a_result_of_another_config_is_refused_by_the_setting(tmp_path, ours, message):
    """What theirs holds beside ours, as older files do, decides nothing."""
    path, older = tmp_path / "result.json", CONFIG | {"out": "results", "workers": 8}
    record = {"schema": 1, "kind": "pretrain", "config": older, "metrics": {}}
    console.write_json(path, record)
    checkpoint.save_tensors(tmp_path / "checkpoint.pt", {"config": older})
    if message is None:
        assert checkpoint.read_result(path, "pretrain", ours)["config"]["workers"] == 8
        assert checkpoint.load_checkpoint(tmp_path / "checkpoint.pt", ours)["config"] == older
        return
    with pytest.raises(ValueError, match=message):
        checkpoint.read_result(path, "pretrain", ours)
    with pytest.raises(ValueError, match=message.replace("result.json", "checkpoint.pt")):
        checkpoint.load_checkpoint(tmp_path / "checkpoint.pt", ours)


@pytest.mark.parametrize(
    "arguments, message",
    (
        ("--bach-size=4", "unknown option --bach-size; did you mean --batch-size?"),
        ("--batch 4", "unknown option --batch; did you mean --batch-size?"),
        ("--batch-size 0", "argument --batch-size: 0 is not from 1 to 1048576"),
        ("--lr nan", "argument --lr: nan is not from 1e-12 to 1000000000"),
        ("--batch-size x", "argument --batch-size: invalid int value: 'x'"),
        (
            "--precision fp16",
            "argument --precision: unknown 'fp16', did you mean bf16? (auto, fp32, tf32, bf16)",
        ),
    ),
)
def test_a_wrong_option_is_one_line_and_status_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: options.parse("A script.", "--epochs"))
    assert (caught.value.code, *capsys.readouterr()) == (2, "", f"error: {message}\n")


def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch):
    def main():
        raise ValueError("no such\ncolumn")

    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as caught:
        run_script(main)
    assert (caught.value.code, capsys.readouterr().err) == (2, "error: no such column\n")
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError):
        run_script(main)
