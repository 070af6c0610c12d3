"""Images of one's own that a table names: table:FILE.csv."""

from pathlib import Path

import numpy as np

from readers import tables
from readers.images import Files, ImageDataset, own_domain
from readers.subsets import hold_out

HELD_OUT = 0.2  # of a table that has no column "split": the test set


def table(name, root, split, domain="natural", uncertain="ignore", blank="ignore"):
    """The images that the rows of a CSV file name.

    Columns: path, relative to the file; split (train or test) and patient, both optional; then
    either label, the class, or a column a finding: 1, 0, -1 (uncertain) or blank. Without split
    `subsets.hold_out` chooses a fifth as the test set. domain: "natural", or "medical" for X-rays,
    which are read as grey. uncertain, blank: of `tables.finding`. Raises ValueError naming the file
    and, of a row, its line.
    """
    path = Path(name.removeprefix("table:"))
    if not path.is_file() or not path.name.endswith((".csv", ".csv.gz")):
        raise FileNotFoundError(
            f"{name}: no file {path}; name a table that ends in .csv or .csv.gz"
        )
    mode, options = own_domain(domain)
    patient, label = tables.Names(), tables.Names()
    known = {"path": tables.BELOW, "split": tables.one_of({"train": False, "test": True}, bool)}
    known |= {"patient": patient, "label": label}
    mark, choices = tables.finding(uncertain, blank)
    _, (header,) = next(tables.rows(path), (0, [[]]))
    for place, column in enumerate(header, 1):
        if not column.strip():
            mend = "name it, or remove it"
            raise ValueError(f"{path}: column {place} of its header has no name; {mend}")
        if column not in known and (meant := column.strip().lower()) in known:
            raise ValueError(f"{path}: column {column!r} of its header; write {meant!r}")
    findings = [column for column in header if column not in known]
    if {"path", "label"} <= {*header} and (
        others := [*findings, *(f"--{choice}" for choice in choices)]
    ):
        also = ", ".join(others)
        raise ValueError(f"{path}: a label and {also}; keep label, or a column a finding")
    if "label" not in header and "path" in header and not findings:
        raise ValueError(f"{path}: neither a column label nor one a finding; add one")
    names, test, patients, numbers, *marks = tables.read_table(
        path, known | dict.fromkeys(findings, mark), optional=("split", "patient", "label")
    )
    tables.refuse_repeats(names, path, rows=True)
    if numbers is None:
        task, classes, labels = "multilabel", findings, np.stack(marks, axis=1)
        training = labels if test is None or test.all() else labels[~test]
        for column in np.flatnonzero(np.isnan(training).all(0)):
            mend = "to train on; fill it or drop it"
            raise ValueError(f"{path}: finding {classes[column]} has no mark {mend}")
    else:
        task, classes = "multiclass", sorted(label.numbers)
        labels = np.argsort(np.argsort([*label.numbers]))[numbers]
        if len(classes) < 2:
            raise ValueError(f"{path}: all images are of one class, {classes[0]}; a task needs two")
    if test is None:
        test = hold_out(labels, patients, HELD_OUT)
        of = "images" if patients is None else "patients"
        options["split"] = f"a fifth of the {of}, by class, drawn"
    elif patients is not None:
        firsts = np.unique(patients, return_index=True)[1]
        for row in np.flatnonzero(test != test[firsts][patients]):
            line, both = tables.line_of(path, row), [*patient.numbers][patients[row]]
            mend = "choose one, or leave out the column split"
            raise ValueError(f"{path}, line {line}: patient {both} is in train and in test; {mend}")
    for cls in [] if numbers is None or test.all() else np.setdiff1d(labels, labels[~test]):
        line, unseen = tables.line_of(path, np.argmax(labels == cls)), classes[cls]
        raise ValueError(f"{path}, line {line}: class {unseen} has no training image; add some")
    mine = np.flatnonzero(test if split == "test" else ~test)
    if not len(mine):
        mend = "add some" + ", or leave out split" * ("split" in header)
        raise ValueError(f"{path}: no row is of the {split} split; {mend}")
    reader, options = Files(str(path.parent), names[mine], mode), options | choices
    groups = None if patients is None else patients[mine]
    return ImageDataset(name, reader, labels[mine], classes, task, domain, groups, options=options)
