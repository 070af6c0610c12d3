"""Figures and tables from result files: what scale of pre-training gives, where, how certain; and
how training went, from its logs.

    python plot.py                                          # results/ to figures/
    python plot.py published.json                           # the study's own numbers, drawn alike
    python plot.py results published.json                   # both, side by side
    python plot.py results other/results --target nih pets  # two folders, two targets
    python plot.py published.json --style paper             # a figure a target, as the study
    python plot.py --curves runs/*                          # logs of training to figures/curves.*

It reads every JSON file under the folders (schema 1, as transfer.py and fewshot.py write them) and
published numbers, and writes each figure as PNG and SVG with its numbers as Markdown and CSV:

    fewshot    a panel for each target, a line for each source and model, over the shots
    gain       larger network and larger source, minus the smaller: paired differences
    law        what a decade of scale buys, against the distance of source and target, and its test

Intervals are Student's t over seeds at 95 %. --style paper draws study-TARGET instead, own beside
published: bars of all pre-trainings, lines over shots and networks, ± a standard deviation. With
--curves it draws log.jsonl in the folders of pretrain.py, also of runs under way, over the step.
"""

import argparse
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be there, and nothing is shown

import matplotlib

from charts import curves, gain_figures, gains, law, markdown, panels, results, style
from engine import console

NAMED = 5  # files named in a notice; of the others the number is said


class Figure(NamedTuple):
    draw: Callable  # (what is shown, styles of lines, title, notes) -> matplotlib's Figure
    markdown: Callable  # what is shown -> text
    csv: Callable  # what is shown -> text
    content: Callable = results.summarise  # (results, metric) -> what is shown


FIGURES = {
    "fewshot": Figure(panels.draw_few_shot, markdown.scores, markdown.cell_csv),
    "gain": Figure(gain_figures.draw_gains, markdown.scores, markdown.cell_csv),
    "law": Figure(gain_figures.draw_law, markdown.laws, markdown.law_csv, law.laws),
}
STUDY = Figure(panels.draw_study, markdown.scores, markdown.cell_csv)


def parse(argv):
    """Command line -> Namespace; paths unites the positional ones and --results."""
    parser = console.Parser(description=__doc__)
    add = parser.add_argument
    text = "folders of result files, published.json, or both (default: results)"
    add("paths", nargs="*", type=Path, help=text)
    add("--results", nargs="+", type=Path, help="the same, as an option")
    text = f"figures to draw (default: all that can be): {', '.join(FIGURES)}"
    add("--figure", nargs="+", type=console.one_of(*FIGURES), help=text)
    text = "default, or paper: a figure a target, as the study has them"
    add("--style", type=console.one_of("default", "paper"), default="default", help=text)
    text = "folders of log.jsonl: draw how their training went, and nothing else"
    add("--curves", nargs="+", type=Path, metavar="RUN", help=text)
    add("--out", type=Path, default="figures", help="folder for the figures and tables")
    text = "accuracy (percent), mean_auc, mean_ap (fractions) or auto: "
    text += "accuracy for natural targets, mean_auc for medical ones"
    add("--metric", type=console.one_of("auto", *results.METRICS), default="auto", help=text)
    add("--target", nargs="+", help="targets to show (default: all that are there)")
    add("--title", default="", help="title over the figure (default: none)")
    args = parser.parse_args(argv)
    args.paths += args.results or []
    if args.figure and args.style == "paper":
        raise ValueError("--figure means nothing for --style paper; leave out one of them")
    if args.curves and (args.paths or args.target or args.figure or args.metric != "auto"):
        raise ValueError("--curves draws run folders alone: no results, --metric or --target")
    args.paths = args.paths or [Path("results")]
    return args


def tell(notices, closing):
    """Print the first notices to stderr, then what they are and how many; nothing without any."""
    if notices:
        print(*notices[:NAMED], f"{closing}: {len(notices)}", sep="\n", file=sys.stderr)


def save(folder, stem, figure, **texts):
    """Write folder/stem.{png,svg} and {ending: text}, all made before the first is written, each
    whole or not at all. Returns the paths."""
    contents = {}
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # its last digits vary: same input, same file
    for ax in figure.axes:
        ax.set_position([round(float(side), 5) for side in ax.get_position().bounds])
    for ending, metadata in (("png", None), ("svg", {"Date": None})):
        file = io.BytesIO()
        figure.savefig(file, format=ending, bbox_inches="tight", dpi=200, metadata=metadata)
        contents[folder / f"{stem}.{ending}"] = file.getvalue()
    contents |= {folder / f"{stem}.{ending}": text.encode() for ending, text in texts.items()}
    for path, content in contents.items():
        console.write_atomically(path, lambda file, content=content: file.write(content))
    return list(contents)


def read(args):
    """Command line -> (results of the wanted targets, notes for the footnotes of the figures);
    says on stderr what it left out. Raises ValueError where nothing is left."""
    runs, skipped, doubled = results.load(args.paths)
    tell(skipped, "files skipped")
    tell(doubled, "runs of which two files differ, the newest counts")
    if not runs:
        where, out = ", ".join(map(str, args.paths)), shlex.quote(str(args.paths[0]))
        raise ValueError(f"no result file in {where}: `python fewshot.py --out {out}` writes some")
    targets = sorted({run.target.name for run in runs})
    try:
        for name in args.target or []:
            console.one_of(*targets)(name)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"argument --target: {error}") from None
    notes = [f"Left out, unreadable or of another schema: {len(skipped)}."] if skipped else []
    if doubled:
        notes.append(f"Runs with two results, of which the newer counts: {len(doubled)}.")
    runs = [run for run in runs if run.target.name in (args.target or targets)]
    if early := sum(run.early for run in runs):
        notes.append(f"Published runs that ended before their last step: {early}.")
    return runs, notes


def run(args):
    """Read, average, draw, write; raises OSError or ValueError."""
    names = ["curves"] if args.curves else args.figure or FIGURES
    console.refuse_unwritable("--out", *(args.out / f"{name}.png" for name in names))
    if args.curves:
        figure = curves.draw_logs(curves.load_logs(args.curves), args.title)
        print(*(f"wrote {path}" for path in save(args.out, "curves", figure)), sep="\n")
        return
    runs, notes = read(args)
    cells = results.summarise(runs, args.metric)
    if args.style == "paper":
        found = panels.study_cells(runs, args.metric)
        shown = {re.sub(r"[^\w.@~+-]+", "-", f"study-{name}"): found[name] for name in found}
    else:
        pairs, lacking = gains.paired_gains(runs, args.metric)
        found = {"fewshot": cells, "gain": pairs}
        more = [name for name in names if name not in found]
        found |= {name: FIGURES[name].content(runs, args.metric) for name in more}
        shown = {name: found[name] for name in names if any(cell.n for cell in cells)}
    if not shown:
        raise ValueError("no figure: none of the results has a metric that is defined")
    empty = [name for name in shown if not shown[name]]
    missing = [f"no figure {name}: no network or source to pair" for name in empty]
    if args.figure and missing:
        raise ValueError("; ".join(missing))
    if "gain" in shown:
        tell(lacking, "seeds left out of paired differences, in so many places")
        where = [(gain, results.shots_words(gain.shots)) for gain in pairs if gain.n == 1]
        single = [f"{g.target.name}, {shots}, {g.large} minus {g.small}" for g, shots in where]
        single = [f"one seed, no interval: {text}" for text in single]
        tell(single, "gains without interval")
    if "law" in shown:
        lost = dict.fromkeys(name for one in shown["law"] for name in one.left_out)
        lost |= dict.fromkeys(sorted({run.line.model for run in runs} - law.PARAMETERS.keys()))
        unknown = [f"not in the law, distance or parameters unknown: {name}" for name in lost]
        tell(unknown, "left out of the law")
    styles, written, tables = style.line_styles(cells), [], []
    for name in [name for name in shown if shown[name]]:
        figure, content = FIGURES.get(name, STUDY), shown[name]
        drawing, text = figure.draw(content, styles, args.title, notes), figure.markdown(content)
        written += save(args.out, name, drawing, md=text, csv=figure.csv(content))
        if args.figure or name == "fewshot":
            tables.append(text)
        elif name == "gain":
            tables += [markdown.count_table(content), ""]
    print(*tables, *missing, *(f"wrote {path}" for path in written), sep="\n")


def main(argv=None):
    """Run the command line; returns the exit status, 2 after a line that says what is wrong."""
    with matplotlib.rc_context(style.SETTINGS):
        return console.exit_status(lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
