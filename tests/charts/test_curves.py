"""charts.curves: panels hold the logged values; bad lines and folders are refused by name."""

import json
import math

import pytest
from result_files import texts, write

from charts import curves

OLD = {"loss": 2.5, "lr": 0.1, "images_per_second": 800.0}
NEW = {**OLD, "grad_norm": 1.5, "clipped": 0.25, "data_wait": 0.02, "memory": 1234567890}
TEST = {"accuracy": 0.4, "top5": 0.8, "mean_auc": 0.9, "mean_ap": 0.3, "loss": 1.9}
MULTILABEL = {key: value for key, value in TEST.items() if key != "top5"}


def write_log(folder, *lines, domain=None, images=1000):
    """Write log.jsonl of these objects (or raw lines), and result.json if a domain is given."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    (folder / "log.jsonl").write_text("".join(text))
    if domain:
        result = {"schema": 1, "kind": "pretrain", "source_images": images}
        (folder / "result.json").write_text(json.dumps({**result, "source_domain": domain}))
    return folder


def drawn(*folders):
    """{title of a panel: [(steps, values) of each line]} of the figure of these runs."""
    return {
        ax.get_title(loc="left"): [tuple(map(list, line.get_data())) for line in ax.lines]
        for ax in curves.draw_logs(curves.load_logs(folders)).axes
    }


def test_curves_hold_the_logged_values(tmp_path):
    first, second = {"step": 50, **NEW}, {"step": 100, **NEW, "loss": 1.25, "lr": 0.01}
    second |= {"grad_norm": 0.5, "clipped": 0.0, "images_per_second": 900, "data_wait": 0.5}
    tests = {"step": 75, "test": TEST}, {"step": 100, "test": {**TEST, "accuracy": 0.55}}
    panels = drawn(write_log(tmp_path / "a-R50x1", first, tests[0], second, tests[1]))
    steps = [50, 100]  # and no panel of mean AUC, which is another task's
    assert list(panels.items()) == [
        ("training loss", [(steps, [2.5, 1.25])]),
        ("test accuracy (%)", [([75, 100], pytest.approx([40, 55]))]),
        ("learning rate", [(steps, [0.1, 0.01])]),
        ("gradient norm", [(steps, [1.5, 0.5])]),
        ("units with clipped gradients (%)", [(steps, [25, 0])]),
        ("images per second", [(steps, [800, 900])]),
        ("share of time waiting for data (%)", [(steps, [2, 50])]),
    ]


@pytest.mark.parametrize(
    ("domain", "test", "title", "value"),
    [
        (None, TEST, "test accuracy (%)", 40),
        (None, MULTILABEL, "test mean AUC", 0.9),  # multi-label runs log an accuracy too
        ("natural", MULTILABEL, "test accuracy (%)", 40),  # up to five classes: no top5
        ("medical", {"accuracy": 0.4}, "test accuracy (%)", 40),  # no AUC was defined
    ],
)
def test_one_test_metric_a_run_that_of_its_task(tmp_path, domain, test, title, value):
    run = write_log(tmp_path / "run", {"step": 7, "test": test}, domain=domain)
    assert drawn(run) == {title: [([7], [pytest.approx(value)])]}


def test_equal_names_are_told_apart_by_their_parents(tmp_path):
    for path in ("x/runs/a", "y/runs/a", "y/old/a", "b"):
        write_log(tmp_path / path, {"step": 1, **OLD})

    def names(*paths):
        return {log.name for log in curves.load_logs([tmp_path / path for path in paths])}

    assert names("x/runs/a", "b") == {"a", "b"}
    assert names("y/runs/a", "y/old/a", "b") == {"runs/a", "old/a", "b"}
    assert names("x/runs/a", "y/runs/a", "y/old/a") == {"x/runs/a", "y/runs/a", "old/a"}
    assert len(curves.load_logs([tmp_path / "b", tmp_path / "x/../b"])) == 1  # named twice


def test_curves_writes_two_files_and_nothing_of_results(call, tmp_path):
    write_log(tmp_path / "runs/a-$R50x1$", {"step": 1, **OLD})
    write(tmp_path / "results")
    argv = "--curves", "runs/a-$R50x1$"
    assert call(*argv) == (0, "wrote figures/curves.png\nwrote figures/curves.svg\n", "")
    figures = tmp_path / "figures"
    assert sorted(path.name for path in figures.iterdir()) == ["curves.png", "curves.svg"]
    first = (figures / "curves.svg").read_bytes()
    assert {"a-$R50x1$", "training loss"} <= set(texts("figures/curves.svg"))
    assert call(*argv, "--title", "A title")[0] == 0
    assert "A title" in texts("figures/curves.svg")
    call(*argv)
    assert (figures / "curves.svg").read_bytes() == first  # same input, same file


def test_a_last_line_cut_short_is_passed_over(tmp_path):
    run = write_log(tmp_path / "a", {"step": 1, **OLD}, {"step": 2, **OLD}, '{"step": 3, "lo')
    assert drawn(run)["training loss"] == [([1, 2], [2.5, 2.5])]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"step": 3, "lo\n', "no JSON of "),  # cut short, but another line follows
        ("[" * 100_000 + "\n", "no JSON of "),
        ("[1]\n", 'no JSON of {"step", "loss", ...} or {"step", "test"}'),
        ({"step": 1, "test": 0.5}, "no JSON of "),
        ({"loss": 1.0}, "step is None"),
        ({**OLD, "step": -1}, "step is -1"),
        ({"step": 1, "loss": "2.5"}, "loss is '2.5'"),
        ({"step": 1, "loss": math.nan}, "loss is nan"),
        ({**NEW, "step": 1, "clipped": True}, "clipped is True"),
        ({"step": 1, "test": {"accuracy": [1]}}, "accuracy is [1]"),
    ],
)
def test_a_bad_line_is_refused_by_file_and_line(call, tmp_path, line, fault):
    write_log(tmp_path / "runs/a", {"step": 1, **OLD}, {"step": 1, "test": TEST}, line)
    status, out, err = call("--curves", "runs/a")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: runs/a/log.jsonl line 3: {fault}")
    assert err.endswith("; remove that line, or train anew in another folder\n")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (None, "no log.jsonl in runs/b: --curves takes folders that pretrain.py filled"),
        ("", "runs/b/log.jsonl is empty: wait for its run to log, or leave the folder out"),
        ('{"step": 1, "l', "runs/b/log.jsonl is empty: "),  # nothing but a line cut short
    ],
)
def test_a_folder_without_a_log_is_refused_by_name(call, tmp_path, text, fault):
    write_log(tmp_path / "runs/a", {"step": 1, **OLD})
    if text is not None:
        write_log(tmp_path / "runs/b", text)
    status, out, err = call("--curves", "runs/a", "runs/b")
    assert (status, out) == (2, "") and err.startswith(f"error: {fault}")
