"""Figures and tables from result files: what scale of pre-training gives, where, how certain; and
how training went, from its logs.

    python plot.py                                          # results/ to figures/
    python plot.py published.json                           # the study's own numbers, drawn alike
    python plot.py results published.json                   # both, side by side
    python plot.py results other/results --target nih pets  # two folders, two targets
    python plot.py --figure gain --metric mean_ap           # one figure, another metric
    python plot.py --curves runs/*                          # logs of training to figures/curves.*

It reads every JSON file under the folders (schema 1, as transfer.py and fewshot.py write them) and
published numbers, trains nothing, and writes each figure as PNG and SVG with its numbers as a
Markdown table and CSV:

    fewshot    a panel for each target, a line for each source and model, over the shots
    fullshot   the same on all training images: bars for each model, lines over the source's size
    gain       larger network and larger source, minus the smaller: paired differences
    distance   these gains against the distance of source and target, where results have one
    published  own results against the published ones, where they share cells

Intervals are Student's t over seeds at 95 %. With --curves it reads log.jsonl in the folders of
pretrain.py instead, of finished runs and of runs under way, and draws panels over the step for what
is logged there: loss, test metric, learning rate, gradient norm, share of clipped units, images a
second, share of time spent waiting for data.
"""

import argparse
import difflib
import os
import sys
from pathlib import Path

import matplotlib

from charts import curves
from charts import gain_figures as gains
from charts import gains as paired
from charts import panels as figures
from charts import results as tables
from charts.results import METRICS, write_csv

NAMED = 5  # files named in a notice; of the others the number is said
# Stem of the files -> numbers from (records, metric); figure, Markdown and rows of the CSV from
# these numbers; what is missing where there are none.
FIGURES = {
    "fewshot": (
        tables.summarise,
        figures.draw_curves,
        tables.markdown,
        tables.panel_rows,
        "no result",
    ),
    "fullshot": (
        tables.full_shot,
        figures.draw_full_shot,
        tables.full_markdown,
        tables.panel_rows,
        "no full-shot result",
    ),
    "gain": (
        paired.gain_cells,
        gains.draw_gains,
        paired.gain_markdown,
        paired.gain_rows,
        "no two networks with a common source, and no two sources with a common network",
    ),
    "distance": (
        paired.distance_points,
        gains.draw_distance,
        paired.distance_markdown,
        paired.point_rows,
        "no paired result has a distance",
    ),
    "published": (
        paired.shared_cells,
        figures.draw_shared,
        paired.shared_markdown,
        paired.shared_rows,
        "it takes results and published.json together, with cells in common",
    ),
}


def tell(notices, closing):
    """Print the first notices and the closing line to stderr; nothing if there is none."""
    for line in [*notices[:NAMED], closing] if notices else []:
        print(line, file=sys.stderr)


def save(folder, stem, fig, text=None, rows=()):
    """Write folder/stem.{png,svg} and, of a text, .{md,csv}: beside first, then renamed. Returns
    the paths."""
    look = {"bbox_inches": "tight", "dpi": 200}
    writers = {
        "png": lambda path: fig.savefig(path, format="png", **look),
        "svg": lambda path: fig.savefig(path, format="svg", metadata={"Date": None}, **look),
    }
    tables = {
        "md": lambda path: path.write_text(text, encoding="utf-8"),
        "csv": lambda path: write_csv(path, rows),
    }
    writers |= tables if text is not None else {}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {folder / f"{stem}.{end}": folder / f".{stem}.{end}.{os.getpid()}" for end in writers}
    try:
        for write, beside in zip(writers.values(), paths.values()):
            write(beside)
        for path, beside in paths.items():
            beside.replace(path)
    finally:
        for beside in paths.values():
            beside.unlink(missing_ok=True)
    return list(paths)


def known(name, choices, option):
    """Return name if it is among choices, else raise ValueError with the nearest of them."""
    if name in choices:
        return name
    near = difflib.get_close_matches(name, choices, n=1)
    mend = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
    raise ValueError(f"{option} {name} is unknown: {mend}")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ordinary errors, for `main` to say in one line."""

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """Command line -> Namespace; paths unites the positional ones and --results."""
    help_format = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=help_format, allow_abbrev=False)
    add = parser.add_argument
    text = "folders of result files, published.json, or both (default: results)"
    add("paths", nargs="*", type=Path, help=text)
    add("--results", nargs="+", type=Path, default=[], help="the same, as an option")
    text = f"figures to draw (default: all that can be): {', '.join(FIGURES)}"
    add("--figure", nargs="+", default=[], help=text)
    text = "run folders, which hold log.jsonl: draw how their training went, and nothing else"
    add("--curves", nargs="+", type=Path, default=[], metavar="RUN", help=text)
    text = "folder for the figures and tables (default: figures)"
    add("--out", type=Path, default="figures", help=text)
    text = "accuracy (shown in percent), mean_auc, mean_ap (fractions from 0 to 1) or auto: "
    text += "accuracy for natural targets, mean_auc for medical ones (default: auto)"
    add("--metric", default="auto", help=text)
    add("--target", nargs="+", default=[], help="targets to show (default: all that are there)")
    add("--title", default="", help="title over the figure (default: none)")
    args = parser.parse_args(argv)
    args.paths += args.results
    if args.curves and (args.paths or args.target or args.figure or args.metric != "auto"):
        raise ValueError("--curves draws run folders alone: no results, --metric or --target")
    args.paths = args.paths or [Path("results")]
    for name in args.figure:
        known(name, list(FIGURES), "--figure")
    known(args.metric, ["auto", *METRICS], "--metric")
    return args


def draw_logs(args):
    """Draw the logs of --curves and write them."""
    runs = curves.load_runs(args.curves)
    with matplotlib.rc_context(figures.STYLE):
        written = save(args.out, "curves", curves.draw_logs(runs, args.title))
    print(*(f"wrote {path}" for path in written), sep="\n")


def read(args):
    """Command line -> (records of the wanted targets, notes for the footnotes of the figures);
    says on stderr what it left out. Raises ValueError where nothing is left."""
    records, skipped, doubled = tables.load(args.paths)
    tell(skipped, f"files skipped: {len(skipped)}")
    tell(doubled, f"runs of which two files differ, the newest counts: {len(doubled)}")
    if not records:
        fill = f"no usable result file in {', '.join(map(str, args.paths))}: "
        raise ValueError(f"{fill}`python fewshot.py --out {args.paths[0]}` writes some")
    targets = sorted({record["target"] for record in records})
    wanted = [known(target, targets, "--target") for target in args.target] or targets
    notes = [f"Left out, unreadable or of another schema: {len(skipped)}."] if skipped else []
    notes += (
        [f"Runs with two results, of which the newer counts: {len(doubled)}."] if doubled else []
    )
    return [record for record in records if record["target"] in wanted], notes


def tell_gains(records, metric):
    """Say on stderr which seeds are left out of gains, and which gains have no interval."""
    cells, lacking = paired.gains(records, metric)
    tell(lacking, f"seeds left out of paired differences, in so many places: {len(lacking)}")
    single = [
        f"one seed, no interval: {cell['target']}, {tables.words(cell['shots'])}, "
        f"{cell['large']} minus {cell['small']}"
        for cell in cells
        if cell["n"] == 1
    ]
    tell(single, f"gains without interval: {len(single)}")


def run(args):
    """Read, average, draw, write; raises OSError or ValueError with one line for the user."""
    if args.curves:
        draw_logs(args)
        return
    records, notes = read(args)
    numbers = {name: FIGURES[name][0](records, args.metric) for name in args.figure or FIGURES}
    missing = {name: f"no figure {name}: {FIGURES[name][-1]}" for name in numbers}
    missing = {name: line for name, line in missing.items() if not numbers[name]}
    if args.figure and missing:
        raise ValueError("; ".join(missing.values()))
    if "gain" in numbers:
        tell_gains(records, args.metric)
    written = []
    with matplotlib.rc_context(figures.STYLE):
        styles = figures.line_styles(tables.all_cells(records, args.metric))
        for name in [name for name in numbers if name not in missing]:
            _, draw, text, rows, _ = FIGURES[name]
            content = numbers[name]
            fig = draw(content, args.title, styles, notes)
            written += save(args.out, name, fig, text(content), rows(content))
            if args.figure or name == "fewshot":
                print(text(content))
            elif name == "gain":
                print(*paired.count_table(content), "", sep="\n")
    print(*missing.values(), *(f"wrote {path}" for path in written), sep="\n")


def main(argv=None):
    """Run the command line; returns the exit status, 2 after a line that says what is wrong."""
    try:
        run(parse(argv))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
