"""How a training goes: readings of the device, log.jsonl, and lines or a bar for the eye."""

import contextlib
import json
import math
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine import memory
from engine.console import print_table, progress_bar, say, write_atomically, writing
from engine.metrics import Diverged


class Log(contextlib.AbstractContextManager):
    """Readings of a training, kept on the device and read every `every` steps, so that the device
    never waits; then a line of log.jsonl (given a path) and of the terminal (given a title).

    start, last: steps done, and steps in all; lines after `start` are dropped, as a continued run
    writes them again. batch_size: of all processes. A context manager: the bar is closed at its
    end. Raises ValueError naming a damaged line.
    """

    def __init__(self, env, start, last, batch_size, every=50, path=None, title=None):
        self.env, self.path, self.title, self.batch_size = env, path, title, batch_size
        self.start, self.last, self.every, self.began = start, last, every, time.monotonic()
        self.bar = progress_bar(env if title else env._replace(rank=1), last, start, title)
        if path and env.main and path.exists():
            kept = []
            *lines, _ = path.read_bytes().split(b"\n")  # a last line that a kill cut is dropped
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    if record["step"] < start + ("loss" in record):  # the evaluation is made again
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: damaged; remove that line") from error
            write_atomically(path, lambda file: file.writelines(kept))
        self.bad = torch.full((), math.inf, dtype=torch.float64, device=env.device)
        self._begin()

    def __exit__(self, *error):
        self.bar.close()

    def _begin(self):
        self.loss, self.norm, self.clipped = 0.0, 0.0, 0.0
        self.count, self.waited, self.rates = 0, 0.0, {}
        self.since = time.monotonic()

    def next(self, stream):
        """next(stream); the time that it takes is "data_wait"."""
        asked = time.monotonic()
        batch = next(stream)
        self.waited += time.monotonic() - asked
        return batch

    def add(self, step, lr, loss, count, optimizer, read=False):
        """After a step: `step` are done; its learning rate, this rank's sum of losses (a tensor on
        the device), the valid labels of the global batch, the optimiser after its update.

        Every `every` steps, or to read, waits for the device and says the means since the last
        time. grad_norm: before clipping. clipped: share of the units that AGC scales, None without.
        images_per_second: of all ranks. data_wait: share of the time that the host waited for a
        batch. memory: bytes, the peak of this process. Raises Diverged then, on all ranks, when a
        loss or gradient was not finite.
        """
        norm = getattr(optimizer, "grad_norm", None)
        if norm is None:  # of another optimiser than ours
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.get_total_norm([grad for grad in grads if grad is not None])
        finite = loss.isfinite() & norm.isfinite()
        self.bad = torch.where(finite, self.bad, self.bad.clamp(max=step))
        self.loss, self.norm = self.loss + loss, self.norm + norm
        self.clipped = self.clipped + getattr(optimizer, "clipped", math.nan)
        self.count, self.rates[step] = self.count + count, lr
        self.bar.update()
        if not read and step % self.every:
            return
        self.refuse_nonfinite()
        if self.env.ranks > 1:
            dist.all_reduce(self.loss)
        steps, clipped = len(self.rates), float(self.clipped)
        mean, seconds = float(self.loss) / max(self.count, 1), time.monotonic() - self.since
        speed = steps * self.batch_size / seconds
        readings = {
            "loss": mean,
            "grad_norm": float(self.norm) / steps,
            "clipped": None if math.isnan(clipped) else clipped / steps,
            "images_per_second": speed,
            "data_wait": self.waited / seconds,
            "memory": memory.peak_memory(self.env.device),
        }
        self._append({"step": step, "lr": lr, **readings})
        self.bar.set_postfix_str(f"loss {mean:.4f}, lr {lr:.4g}, {speed:.0f} images/s")
        if self.title and self.bar.disable:
            pace = (time.monotonic() - self.began) / max(step - self.start, 1)
            left = tqdm.format_interval(pace * (self.last - step))
            text = f"loss {mean:.4f}  lr {lr:.4g}  {speed:.0f} images/s  {left} left"
            say(self.env, f"{self.title}  step {step}/{self.last}  {text}")
        self._begin()

    def finite(self):
        """Whether every loss and gradient so far was finite."""
        return math.isinf(self.bad)

    def refuse_nonfinite(self):
        """Raises Diverged on all ranks when the loss or gradient of any step was not finite."""
        if self.env.ranks > 1:
            dist.all_reduce(self.bad, dist.ReduceOp.MIN)
        step = float(self.bad)
        if math.isfinite(step):
            fp32 = ", or give --precision fp32," if self.env.precision == "bf16" else ""
            where = f"at step {step - 1:.0f}, learning rate {self.rates[int(step)]:g}"
            mend = f"lower --lr{fp32} and give another --out (the last checkpoint is from before)"
            raise Diverged(f"loss or gradient is not finite {where}; {mend}")

    def evaluation(self, step, metrics):
        """A line of test metrics; the clock of the readings starts anew."""
        shown = {k: v for k, v in metrics.items() if isinstance(v, float)}
        self._append({"step": step, "test": shown})
        if self.title:
            values = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
            say(self.env, f"{self.title}  step {step}  test  {values}")
        self.since = time.monotonic()

    def _append(self, record):
        if self.env.main and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")


def print_result(record):
    """The closing table of a pre-training."""
    metrics, train = record["metrics"], record["train"]
    rows = [[key, f"{value:.4f}"] for key, value in metrics.items() if isinstance(value, float)]
    rows.append(["seconds", f"{train['seconds']:.0f}"])
    rows.append(["images/s", f"{train['images_per_second']:.0f}"])
    rows.append(["GFLOP/s", f"{train['flops_per_second'] / 1e9:.1f}"])
    rows.append(["share of the device's peak", f"{train['peak_share']:.3f}"])
    part = "validation" if record["kind"].endswith("-validation") else "test"
    print_table(rows, [f"{record['source']} {record['model']} ({part})", "value"])
