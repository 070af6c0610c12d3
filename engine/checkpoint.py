"""What a training leaves: checkpoints, log.jsonl and result files, each whole or not there."""

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import models
from engine.console import say, write_atomically, writing


def save_tensors(path, state):
    """torch.save, atomically. Equal states give equal files: none names its temporary path."""

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)

    write_atomically(path, write)


def load_checkpoint(path, config):
    """The state of an interrupted run, or None if there is none.

    Raises ValueError when it was made with another config.
    """
    if path is None or not Path(path).exists():
        return None
    state = models.read_weights(path)
    check_same_config(path, state["config"], config)
    return state


def same_step(step, env):
    """Raises ValueError on all ranks unless they all continue after the same step."""
    if env.ranks > 1:
        steps = [None] * env.ranks
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise ValueError(f"the ranks would continue after steps {steps}: share --out")


# What may differ between a run and its continuation, because it changes no result.
LAYOUT_OPTIONS = {
    "accumulate",
    "cache_dir",
    "checkpoint",
    "checkpoint_activations",
    "data_dir",
    "download",
    "log_every",
    "out",
    "save_minutes",
    "time_limit",
    "workers",
}


def check_same_config(path, theirs, ours):
    """Raises ValueError naming the first option that differs between two runs."""
    theirs, ours = json.loads(json.dumps([theirs, ours]))  # tuples become lists, as in the file
    for key in sorted((theirs.keys() | ours.keys()) - LAYOUT_OPTIONS):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"{path} was made with {key} = {theirs.get(key)}, not {ours.get(key)}; "
                "use the same options, give another --out, or remove it"
            )


class Log:
    """log.jsonl (if path is given), and for the eye: the bar on a terminal, else plain lines."""

    def __init__(self, env, path, start, last, bar, title):
        self.env, self.path, self.bar, self.title = env, path, bar, title
        self.start, self.last, self.began = start, last, time.monotonic()

    def __call__(self, step, lr, readings):
        """What `train` calls, with the readings of its Meter."""
        self._append({"step": step, "lr": lr, **readings})
        loss, speed = readings["loss"], readings["images_per_second"]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.4g}, {speed:.0f} images/s")
            return
        pace = (time.monotonic() - self.began) / max(step - self.start, 1)
        left = tqdm.format_interval(pace * (self.last - step))
        text = f"loss {loss:.4f}  lr {lr:.4g}  {speed:.0f} images/s  {left} left"
        say(self.env, f"{self.title}  step {step}/{self.last}  {text}")

    def evaluation(self, step, metrics):
        """A line of test metrics."""
        shown = {k: v for k, v in metrics.items() if k != "per_class" and v is not None}
        self._append({"step": step, "test": shown})
        say(
            self.env,
            f"{self.title}  step {step}  test  "
            + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()),
        )

    def _append(self, record):
        if self.env.main and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")


def trim_log(env, path, step):
    """Drops the lines after `step`, which a continued run will write again."""
    if env.main and path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                continue  # cut by a kill
            try:
                record = json.loads(line)
                if record["step"] < step + ("loss" in record):  # the evaluation is made again
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: damaged; remove that line") from error
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


def read_result(path, kind, config=None):
    """A finished result of this kind, or None if there is none yet.

    Raises ValueError for a file that is broken or of another kind or, with config, made otherwise.
    """
    if not Path(path).exists():
        return None
    try:
        record = json.loads(Path(path).read_text())
        found = record["kind"], record["schema"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a result file; remove it, or give another --out") from error
    if found != (kind, 1):
        raise ValueError(f"{path}: a result of kind and schema {found}, not {(kind, 1)}")
    if config is not None:
        check_same_config(path, record["config"], config)
    return record
