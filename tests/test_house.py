"""The house: what lies where, and which file may import which."""

import ast
import graphlib
import subprocess

import pytest
from conftest import ROOT

ROOMS = ("engine", "readers", "charts", "benchmarks")
# The most lines of each script.
SCRIPTS = dict(pretrain=380, transfer=400, fewshot=200, models=300, data=450, plot=200)
# Of ours, what a file of the room, or a script, may import beside its own room.
STAIR = {
    "engine": (),
    "readers": ("engine.console",),
    "charts": ("engine.console",),
    "data": ("engine", "readers"),
    "models": ("engine",),
    "plot": ("engine.console", "charts"),
    "pretrain": ("engine", "readers", "data", "models"),
    "transfer": ("engine", "readers", "data", "models"),
    "fewshot": ("engine", "readers", "data", "models", "transfer"),
    "benchmarks": ("engine", "readers", "data", "models", "pretrain", "transfer", "fewshot"),
}


def files():
    """Every Python file of the project but tests, {name like "engine.log": path}."""
    paths = [ROOT / f"{name}.py" for name in SCRIPTS]
    paths += [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(path):
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & files().keys() or {node.module}
    return found


def test_the_root_holds_what_it_should():
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    tops = {name.split("/")[0] for name in listed if name and (ROOT / name).exists()}
    files = "README.md Makefile requirements.txt pyproject.toml LICENSE published.json .gitignore"
    scripts = {f"{name}.py" for name in SCRIPTS}
    assert tops == scripts | {*ROOMS, "tests", "docs", ".ci", *files.split()}
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("name", files())
def test_imports_go_down_the_stair(name):
    room = name.split(".")[0]
    ours = {found for found in imports(files()[name]) if found.split(".")[0] in STAIR}
    for found in ours:
        allowed = found.split(".")[0] == room and room in ROOMS
        allowed |= any(found == step or found.startswith(f"{step}.") for step in STAIR[room])
        assert allowed, f"{name} imports {found}"
    if name.endswith("__init__"):
        assert not ours


def test_no_circle_of_imports():
    graph = {name: imports(path) & files().keys() for name, path in files().items()}
    assert not graph["engine.console"]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names it


def test_figures_need_no_torch():
    """With the stair, as charts import of engine the console alone, and that imports nothing."""
    for name, path in files().items():
        if name.split(".")[0] in ("plot", "charts") or name == "engine.console":
            roots = {found.split(".")[0] for found in imports(path)}
            assert not roots & {"torch", "torchvision"}, name


@pytest.mark.parametrize("name", files())
def test_a_file_is_read_in_one_sitting(name):
    text = files()[name].read_text()
    assert len(text.splitlines()) <= (1 if name.endswith("__init__") else SCRIPTS.get(name, 450))
    assert "fmt: " + "skip" not in text and "fmt: " + "off" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 115, f"{name}: {node.name}"
