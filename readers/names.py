"""What the name of a dataset says: folder:PATH, table:FILE.csv, NAME@SIZE (a pack), NAME~GAP,
NAME+NAME.
"""

import os
import re
from pathlib import Path


def is_path(name):
    """Whether what follows the colon in the name of a dataset is a path."""
    return name.startswith(("folder:", "table:"))


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


def canonical(name):
    """The one name of a dataset however its path is given: absolute, without ~ or / at its end."""
    parts = []
    for part in parts_of(name):
        kind, _, path = part.partition(":")
        if is_path(part) and path:
            path = os.path.abspath(os.path.expanduser(re.sub(r"/+@(\d+)$", r"@\1", path)))
            part = f"{kind}:{path}"
        parts.append(part)
    return "+".join(parts)


def base_name(name):
    """The name of the dataset itself: nih of nih@256, synthetic-xray of synthetic-xray~0.4, of a
    union those of its members.
    """
    originals = [
        pack_of(part)[0] if is_path(part) else part.partition("@")[0].partition("~")[0]
        for part in parts_of(name)
    ]
    return "+".join(originals)


def without_place(name):
    """The name of a dataset wherever it lies: folder:b of folder:/a/b, in a union of each part."""
    parts = []
    for part in parts_of(name):
        kind, _, path = part.partition(":")
        parts.append(f"{kind}:{Path(path).resolve().name}" if is_path(part) else part)
    return "+".join(parts)


def pack_of(name):
    """(name of the original, size) that NAME@SIZE means; (name, None) of what is no pack."""
    match = re.fullmatch(r"(.*[^/])/*@([1-9]\d*)", name)
    # A directory of one's own images may have such a name too.
    own = name.startswith("folder:") and Path(name.removeprefix("folder:"), "train").is_dir()
    return (match[1], int(match[2])) if match and not own else (name, None)


def pack_folder(original, size, root, out=None):
    """The directory of a pack: below `out` where given, else beside the folder or table, or below
    the root.
    """
    folder = Path(root, f"{original}@{size}")
    if is_path(original):
        folder = Path(original.partition(":")[2].rstrip("/") + f"@{size}")
    return Path(out, folder.name) if out else folder


def gap_of(name):
    """The gap that NAME~GAP states, a float from 0 to 1; None of a name without.

    Raises ValueError unless it has its one spelling, so that no dataset has two names.
    """
    world, tilde, gap = name.partition("~")
    if not tilde:
        return None
    if not re.fullmatch(r"0|1|0\.\d*[1-9]", gap):
        raise ValueError(
            f"{name}: {gap!r} is no gap; write a decimal from 0 to 1 without needless digits, "
            f"like {world}~0, {world}~0.4 or {world}~1"
        )
    return float(gap)
