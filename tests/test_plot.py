"""plot.py: which files it writes of which input, and what it does with bad input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from result_files import read_csv, texts, write, write_seeds, write_worlds

import plot
from charts import markdown

FILES = ["fewshot.csv", "fewshot.md", "fewshot.png", "fewshot.svg"]


def test_figure_has_one_line_a_source_and_model_and_names_in_text(tmp_path):
    """As a user runs it: a process of its own, no argument, results in the working folder."""
    write_worlds(tmp_path / "results")
    command = [sys.executable, ROOT / "plot.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(FILES) < {path.name for path in (tmp_path / "figures").iterdir()}
    assert all(f"wrote figures/{name}" in done.stdout for name in FILES)
    svg = tmp_path / "figures/fewshot.svg"
    lines = re.findall(r'id="line (\S+) (\S+) ', svg.read_text())
    assert len(lines) == 2 * 5 * 2 and len(set(lines)) == 2 * 5
    words = texts(svg)
    for source in ("scratch", "nat", "xray-0.1"):
        assert [words.count(f"{source}, {model}") for model in ("R14x0.5", "R26x1")] == [1, 1]
    for text in ("t-xray", "medical target", "accuracy (%)", "mean AUC", "full"):
        assert text in words
    assert "(1/4)" in words and "(0.5)" in words  # chance


def test_same_input_gives_the_same_bytes_and_the_title_is_shown(call, tmp_path):
    write_worlds(tmp_path / "results")
    figures = []
    for title in ("A $title$", "", ""):
        assert call("--figure", "fewshot", "gain", "--title", title)[0] == 0
        names = sorted(path.name for path in Path("figures").iterdir())
        figures.append([Path("figures", name).read_bytes() for name in names])
        assert ("A $title$" in texts("figures/gain.svg")) == bool(title)
    assert figures[1] == figures[2]
    endings = ("csv", "md", "png", "svg")
    assert names == [f"{name}.{end}" for name in ("fewshot", "gain") for end in endings]


def test_what_cannot_be_drawn_is_said_in_one_line(call, tmp_path):
    write_worlds(tmp_path / "results")
    status, out, err = call("--target", "t-natural")
    assert (status, err) == (0, "") and {row["target"] for row in read_csv()} == {"t-natural"}
    assert (tmp_path / "figures/gain.png").exists() and "| larger network |" in out
    write_seeds(tmp_path / "one", [0.5, 0.6])
    status, out, err = call("one", "--out", "y")
    assert (status, err) == (0, "") and "no figure gain: no network or source to pair" in out
    error = "error: no figure gain: no network or source to pair\n"
    assert call("one", "--figure", "gain", "--out", "x")[0::2] == (2, error)
    assert not (tmp_path / "x").exists()


def test_unusable_files_are_skipped_named_and_counted(call, tmp_path):
    folder = tmp_path / "results"
    write(folder, "good.json")
    (folder / "broken.json").write_text('{"schema": 1')
    (folder / "foreign.json").write_text("[1, 2]")
    write(folder, "later.json", schema=2)
    write(folder, "lacking.json", model=...)
    write(folder, "text.json", {"accuracy": "0.5"})
    status, out, err = call()
    assert status == 0 and "50.0 (1)" in out
    *named, closing = err.splitlines()
    stems = [Path(line.split(": ")[0].split()[1]).stem for line in named]
    assert stems == ["broken", "foreign", "lacking", "later", "text"]
    assert "no model" in named[2] and "schema" in named[3] and "accuracy is '0.5'" in named[4]
    assert closing == "files skipped: 5"
    for place in range(8):
        (folder / f"bad{place}.json").write_text("{}")
    assert len(call()[2].splitlines()) == 6  # after five names the number alone is said


def test_newest_of_two_files_of_one_run_is_kept_and_said(call, tmp_path):
    older = write(tmp_path / "results", "b.json", {"accuracy": 0.9})
    newer = write(tmp_path / "results", "c.json", {"accuracy": 0.2})
    oldest = write(tmp_path / "results", "d.json", {"accuracy": 0.9})
    for place, path in enumerate((oldest, older, newer)):
        os.utime(path, (1_000_000 + place, 1_000_000 + place))
    status, out, err = call()
    assert status == 0 and "20.0 (1)" in out
    first, closing = err.splitlines()  # the two old ones agree: nothing to say of them
    assert "kept results/c.json" in first and "results/b.json" in first
    assert closing.endswith("the newest counts: 1")
    write(tmp_path / "results", "later.json", schema=2)
    call()  # and both rules stand under the figure
    words = " ".join(texts("figures/fewshot.svg"))
    assert "Left out, unreadable or of another schema: 1." in words
    assert "Runs with two results, of which the newer counts: 1." in words


def test_hidden_copies_are_passed_over_and_a_folder_named_twice_is_read_once(call, tmp_path):
    write(tmp_path / "results" / ".ipynb_checkpoints", "a-checkpoint.json", {"accuracy": 0.9})
    write(tmp_path / "results", ".hidden.json", {"accuracy": 0.9})
    write_seeds(tmp_path / "results", [0.2, 0.4])
    folders = "results", "--results", "results", tmp_path / "results"
    status, out, err = call(*folders, "--figure", "fewshot")
    assert (status, err) == (0, "") and "30.0 ± 14.1 (2)" in out


def test_a_notebook_and_a_terminal_of_another_encoding(tmp_path):
    write_seeds(tmp_path / "results", [0.25, 0.75])
    odd = {"MPLBACKEND": "module://not_there.backend_inline", "PYTHONIOENCODING": "ascii"}
    settings = dict(cwd=tmp_path, capture_output=True, text=True, env=os.environ | odd)
    done = subprocess.run([sys.executable, ROOT / "plot.py", "--figure", "fewshot"], **settings)
    assert (done.returncode, done.stderr) == (0, "") and "50.0 ? 35.4 (2)" in done.stdout
    assert "±" in (tmp_path / "figures" / "fewshot.md").read_text()


@pytest.mark.parametrize("present", [False, True])
def test_no_results_is_an_error_that_writes_nothing(call, tmp_path, present):
    if present:
        (tmp_path / "runs").mkdir()
    status, out, err = call("runs")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and "runs" in err and "python fewshot.py --out" in err
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("option", "word", "near"),
    [
        ("--target", "cifa10", "cifar10"),
        ("--metric", "acuracy", "accuracy"),
        ("--figure", "gains", "gain"),
    ],
)
def test_an_unknown_word_names_its_option_and_the_nearest(call, tmp_path, option, word, near):
    write(tmp_path / "results", target="cifar10")
    status, out, err = call(option, word)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: argument {option}: unknown '{word}', did you mean {near}?")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("more", [["--target", "pets"], ["--results", "r"], ["--figure", "gain"]])
def test_curves_refuses_the_options_of_results(call, more):
    error = "error: --curves draws run folders alone: no results, --metric or --target\n"
    assert call("--curves", "a", *more) == (2, "", error)


def test_a_figure_is_one_row(call, tmp_path, monkeypatch):
    few_shot = plot.FIGURES["fewshot"]
    monkeypatch.setitem(plot.FIGURES, "mine", few_shot)
    write_worlds(tmp_path / "results")
    assert call()[0] == 0
    drawn = [Path("figures", f"{name}.csv").read_text() for name in ("mine", "fewshot")]
    assert drawn[0] == drawn[1] != ""
    assert call("--figure", "mine", "--out", "x")[0] == 0 and Path("x/mine.png").exists()


def test_a_failure_leaves_the_old_files_and_no_others(call, tmp_path, monkeypatch):
    write(tmp_path / "results")
    call()
    before = {path.name: path.read_bytes() for path in Path("figures").iterdir()}
    assert sorted(before) == FILES
    write(tmp_path / "results", metrics={"accuracy": 0.9})

    def fail(*_):
        raise ValueError("no CSV")

    monkeypatch.setattr(markdown, "csv_text", fail)
    assert call()[0::2] == (2, "error: no CSV\n")
    assert {path.name: path.read_bytes() for path in Path("figures").iterdir()} == before


def test_files_that_cannot_be_written_are_named(call, tmp_path):
    write(tmp_path / "results")
    (tmp_path / "figures").write_text("a file")
    status, out, err = call()
    assert status == 2 and err.startswith("error: ") and "figures/" in err
