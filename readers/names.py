"""What a dataset's name says: folder:PATH, table:FILE.csv, NAME@SIZE (a pack), NAME~GAP, A+B."""

import os
import re
from pathlib import Path

PATH = re.compile("(folder:|table:)(.*)", re.DOTALL)


def parts_of(name):
    """The names that a union joins; a path may hold a "+" too, that of a table as far as .csv."""
    if name.startswith("folder:"):
        return [name]
    parts = []
    for part in name.split("+"):
        if parts and re.match(r"table:(?!.*\.csv(\.gz)?(@\d+)?$)", parts[-1]):
            parts[-1] += f"+{part}"
        else:
            parts.append(part)
    return parts


def _with_paths(name, change):
    """The name, in a union each part of it, with its path changed."""
    found = [(part, PATH.fullmatch(part)) for part in parts_of(name)]
    return "+".join(path[1] + change(path[2]) if path else part for part, path in found)


def canonical(name):
    """The one name of a dataset however its path is given: absolute, without ~ or / at its end."""
    return _with_paths(
        name, lambda path: os.path.abspath(os.path.expanduser(re.sub(r"/+@(\d+)$", r"@\1", path)))
    )


def without_place(name):
    """The name of a dataset wherever it lies: folder:b of folder:/a/b, in a union of each part."""
    return _with_paths(name, lambda path: Path(path).resolve().name)


def base_name(name):
    """The name of the dataset itself, in a union of each part: nih of nih@256 or of nih~0.4."""
    return "+".join(
        pack_of(part)[0] if PATH.match(part) else re.split("[@~]", part)[0]
        for part in parts_of(name)
    )


def pack_of(name):
    """(name of the original, size) that NAME@SIZE means; (name, None) of what is no pack."""
    match = re.fullmatch(r"(.*[^/])/*@([1-9]\d*)", name)
    # A directory of one's own images may have such a name too.
    own = name.startswith("folder:") and Path(name.removeprefix("folder:"), "train").is_dir()
    return (match[1], int(match[2])) if match and not own else (name, None)


def pack_folder(original, size, root, out=None):
    """The directory of a pack: in `out`, or else beside the folder or table, or in the root."""
    path = PATH.match(original)
    folder = Path(f"{path[2].rstrip('/')}@{size}") if path else Path(root, f"{original}@{size}")
    return Path(out, folder.name) if out else folder


def gap_of(name):
    """The gap that NAME~GAP states, a float from 0 to 1; None of a name without.

    Raises ValueError unless it has its one spelling, so that no dataset has two names.
    """
    world, tilde, gap = name.partition("~")
    if not tilde:
        return None
    if not re.fullmatch(r"0|1|0\.\d*[1-9]", gap):
        mend = "write a decimal from 0 to 1 without needless digits"
        raise ValueError(f"{name}: {gap!r} is no gap; {mend}, like {world}~0.4")
    return float(gap)
