"""The grid, of toy cells: whose turn it is, what failed, what is there already, how long."""

import contextlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import refuses
from interruption import CPU as ALONE
from interruption import hears

from engine import grid as module
from engine.console import write_json
from engine.grid import Cell, Grid, Network, operations, unfinished
from engine.metrics import Diverged
from engine.processes import Stopped

FIRST, SECOND = (ALONE._replace(rank=rank, ranks=2) for rank in (0, 1))
FLOPS = 10  # of an image


class Images(list):
    """As much of a dataset as a grid looks at."""

    domain, options = "natural", {}


ABOUT = {"data": {"train names": "0123456789abcdef"}, "distances": {}}
TARGET = SimpleNamespace(
    name="pets", train_set=Images(range(60)), test_set=Images(range(21)), **ABOUT
)


def make_cell(seed=0, steps=2, shots=1, images=3, out="results", name="nih-R14x0.5"):
    """Of a fine-tuning; steps None: of frozen features."""
    settings, method = {"crop": 32, "precision": "fp32"}, "linear"
    if steps:
        settings |= {"steps": steps, "batch_size": 8}
        method = "finetune"
    about = shots, seed, method, np.arange(images), settings, FLOPS, out, "pets"
    return Cell(Network(name, "nih", "R14x0.5"), TARGET, *about)


def seeds(cells):
    return [cell.seed for cell in cells]


@pytest.fixture
def store(monkeypatch):
    """What the processes count in, here all in this one."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)


def test_jobs_come_longest_first_and_stay_whole(capsys):
    # 3 x 8 images a step, and 21 test images; frozen ones are all seen once.
    assert operations([make_cell(steps=5)]) == (3 * 5 * 8 + 21) * FLOPS
    frozen = [make_cell(2, None), make_cell(3, None, images=6)]
    assert operations(frozen) == (6 + 21) * FLOPS
    jobs = [frozen, [make_cell(0, 2)], [make_cell(1, 5)]]
    assert seeds(Grid(jobs, {}, ALONE)) == [1, 0, 2, 3]
    together = Grid(jobs, {}, FIRST, together=True)
    assert seeds(together) == [2, 3, 0, 1]
    assert together.title(frozen[1]) == "[2/4] pets from nih-R14x0.5, 1 shot, seed 3"
    assert str(make_cell(shots=None)) == "pets from nih-R14x0.5, all images, seed 0"


def test_a_job_goes_to_whichever_process_comes_free(store):
    jobs = [[make_cell(seed)] for seed in range(9)]
    first, second = (iter(Grid(jobs, {}, env)) for env in (FIRST, SECOND))
    assert seeds(next(turn) for turn in (first, second, first)) == [0, 1, 2]
    assert seeds(second) == [3, 4, 5, 6, 7, 8] and list(first) == []


def test_when_one_process_stops_all_do(store):
    jobs = [[make_cell(2 * n, None), make_cell(2 * n + 1, None)] for n in range(4)]
    one, other = Grid(jobs, {}, FIRST), Grid(jobs, {}, SECOND)
    first, second = iter(one), iter(other)
    assert next(second).seed == 0
    with one.tolerating(next(first)):
        raise Stopped("stopped by SIGTERM")
    assert seeds(second) == [1] and list(first) == []  # that is, the job in hand is done


@pytest.mark.parametrize(
    "env, together, error, tolerated",
    [
        (FIRST, False, RuntimeError, True),
        (ALONE, True, RuntimeError, True),
        (FIRST, True, Diverged, True),  # all see it alike
        (FIRST, True, RuntimeError, False),  # the others would wait for this one
        (ALONE, False, Stopped, False),
    ],
)
def test_a_failure_is_noted_with_its_reason(env, together, error, tolerated, store, monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)
    grid, cell = Grid([], {}, env, together), make_cell(4)
    with contextlib.nullcontext() if tolerated else pytest.raises(error):
        with grid.tolerating(cell):
            raise error("no memory\nis left")
    path = "results/pets/nih-R14x0.5/1shot-seed4.json"
    assert grid.failures == ({path: "no memory is left"} if tolerated else {})
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(error), grid.tolerating(cell):
        raise error("again")


def test_what_happened_to_another_process_is_told(store, monkeypatch, capsys):
    cells = [make_cell(seed) for seed in range(3)]
    paths = [str(cell.path) for cell in cells]
    grid = Grid([[cell] for cell in cells], {}, FIRST)
    grid.done(next(iter(grid)), {"accuracy": 0.25})
    line = "[1/3] pets from nih-R14x0.5, 1 shot, seed 0: accuracy 0.250, "
    assert line in capsys.readouterr().out
    hears(monkeypatch, ({paths[1]: 0.5}, {paths[2]: "no memory"}, None))
    assert grid.finish(cells) == 1
    output = capsys.readouterr().out
    assert "0.375 ± 0.177 (2) |" in output
    assert f"1 cell failed; the same command tries again:\n{paths[2]}: no memory" in output
    hears(monkeypatch, ({}, {}, ("stopped by SIGTERM", 75)))
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped:
        grid.finish(cells)
    assert stopped.value.status == 75


def test_undefined_metrics_are_said_so_and_counted_as_none(capsys):
    cells = [make_cell(seed, shots=shots) for shots in (1, 5, None) for seed in (0, 1)]
    grid = Grid([cells], {}, ALONE)
    for cell, value in zip(grid, (0.5, None, None, None, 0.25, 0.75)):
        grid.done(cell, {"accuracy": value})
    assert capsys.readouterr().out.count("accuracy undefined, ") == 3
    assert grid.finish(cells) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    columns = [column.strip() for column in header.split("|")[4:7]]
    assert columns == ["1 shot", "5 shots", "full"]
    assert [text.strip() for text in row.split("|")[4:7]] == ["0.500 (1)", "", "0.500 ± 0.354 (2)"]


def test_finished_cells_are_left_out_and_others_refused_by_name(tmp_path, monkeypatch):
    cells = [make_cell(seed, out=tmp_path) for seed in range(3)]
    record = {"schema": 1, "kind": "fewshot", "metrics": {"accuracy": 0.5}}
    older = {"out": "elsewhere", "log_every": 50}  # was written once, and decides nothing
    write_json(cells[1].path, record | {"config": cells[1].config | older})
    todo, results = unfinished(cells, tmp_path, ALONE)
    assert seeds(todo) == [0, 2] and results == {str(cells[1].path): 0.5}
    hears(monkeypatch, [str(cells[0].path)])
    more_steps = make_cell(1, steps=3, out=tmp_path)
    (tmp_path / "file").touch()
    nowhere = make_cell(out=tmp_path / "file" / "x")
    for error, refused, env, *said in (
        (ValueError, cells, FIRST, f"--out {tmp_path}: the processes find ", "share"),
        (ValueError, [more_steps], ALONE, "1shot-seed1.json was made with steps = 2, not 3"),
        (ValueError, [cells[1], more_steps], ALONE, "would write ", "seed1.json; run them apart"),
        (OSError, [nowhere], ALONE, "--out: ", "seed0.json cannot be written (Not a directory"),
    ):
        refuses(error, partial(unfinished, refused, tmp_path, env), *said)


def test_no_result_is_replaced_by_one_of_another_config(tmp_path):
    """Of two grids at once, whichever is first: the other's cell fails, or is the very same."""
    one, other = (make_cell(out=tmp_path, steps=steps) for steps in (2, 3))
    module.write_result(one, {"accuracy": 0.5}, {}, 0, ALONE)
    content = one.path.read_bytes()
    again = partial(module.write_result, other, {"accuracy": 0.25}, {}, 0, ALONE)
    refuses(ValueError, again, "made with steps = 2, not 3")
    module.write_result(one, {"accuracy": 0.5}, {}, 0, ALONE)
    assert one.path == other.path and one.path.read_bytes() == content
    assert [path.name for path in one.path.parent.iterdir()] == [one.path.name]


def test_the_estimate_fills_the_processes_longest_first(store, capsys, monkeypatch):
    """Jobs of 5, 4 and 2 steps on two processes: the third joins the first that is free."""
    monkeypatch.setattr(module, "flops_per_second", lambda *args: 1.0)
    times = []
    monkeypatch.setattr(module.tqdm, "format_interval", times.append)
    cells = [make_cell(seed, steps) for seed, steps in enumerate((2, 5, 4))]
    done = make_cell(3, out="done")
    for env, together in ((ALONE, False), (FIRST, False), (FIRST, True)):
        grid = Grid([[cell] for cell in cells], {}, env, together)
        grid.dry_run([*cells, done], lambda name: torch.nn.Linear(1, 1))
    short, long, middle = (operations([cell]) for cell in cells)
    total = short + long + middle
    assert times == pytest.approx([total, middle + short, total / 2])
    output = capsys.readouterr().out
    row = f"| pets | nih-R14x0.5 | 1 | 4 | 1 | {total} |"
    assert [line for line in output.splitlines() if line[:6] == "| pets"][0].split() == row.split()
    assert "on one process\n" in output and "on 2 processes\n" in output
