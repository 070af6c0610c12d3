"""What a run leaves to be continued or read: checkpoints and result files, whole or not there."""

import hashlib
import json
import math
import os
import pickle
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine.console import one_line, other_setting, write_atomically
from engine.memory import peak_flops
from engine.processes import Stopped, gathered


def save_tensors(path, state):
    """torch.save, atomically. Equal states give equal files: none names its temporary path."""
    write_atomically(path, lambda file: torch.save(state, file))


# A NumPy number in a file is a call of this function, which either major version names otherwise,
# with one of these types; none holds an object, nor runs anything.
_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_NUMBERS = [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
NUMPY_NUMBERS += [np.dtype, *(type(np.dtype(letter)) for letter in "?bBhHiIlLqQefd")]


def load_plain(path):
    """torch.load on the CPU, of tensors, numbers (also NumPy's) and strings alone."""
    with torch.serialization.safe_globals(NUMPY_NUMBERS):
        return torch.load(path, map_location="cpu", weights_only=True)


def read_tensors(path, load=load_plain):
    """What a file of weights holds, as `load` reads it: nothing in the file is run.

    Raises FileNotFoundError, or ValueError for a file that holds code, would unpack to far more
    than weights do, or is damaged, also by its checksums, at which neither torch.load nor NumPy
    looks.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                records = archive.infolist()
                unpacked = sum(record.file_size for record in records)
                if unpacked > 20 * Path(path).stat().st_size + 2**20:  # weights hardly shrink
                    raise ValueError(f"it would unpack to {unpacked:,} bytes")
                # torch.load reads whatever its memory holds for a record marked as a directory.
                marked = (r.filename for r in records if r.external_attr & 0x10 and r.file_size)
                damaged = next(marked, None)
                # torch.serialization.set_crc32_options(False) makes files without checksums.
                if not damaged and any(record.CRC for record in records):
                    damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of its record {damaged} is wrong")
        return load(path)
    except pickle.UnpicklingError as error:
        reason = "it holds code or is no checkpoint (torch.load(weights_only=True) reads neither)"
        if "omegaconf" in str(error):  # as the study's code for fine-tuning saves them
            weights = f"torch.load({str(path)!r}, weights_only=False)['model']"
            reason = "it holds OmegaConf objects beside the weights; if you trust it, save those "
            reason += f"where omegaconf is: torch.save({{'model': {weights}}}, 'weights.pth')"
        raise ValueError(f"{path}: refused, {reason}") from error
    except Exception as error:  # of damaged files they raise many kinds
        raise ValueError(f"{path}: damaged or not a weight file ({str(error)[:100]})") from error


def refuse_nonsense(path, state):
    """Raises ValueError naming the first tensor of a state dict that is none of finite numbers."""
    for key, tensor in state.items():
        if not (tensor.is_floating_point() and tensor.layout is torch.strided):
            raise ValueError(f"{path}: {key} is of {tensor.dtype} or sparse, so it is no weight")
        if not (tensor.is_meta or tensor.isfinite().all()):
            raise ValueError(f"{path}: {key} is not finite: the training that wrote it diverged")


def file_digest(path):
    """The SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_result(path, kind, config):
    """A finished result of this kind and config, or None if there is none yet. Raises ValueError
    for a file that is broken, of another kind or made otherwise.
    """
    if not os.path.exists(path):  # nor where no such name can be
        return None
    try:
        record = json.loads(Path(path).read_text())
        found = record["kind"], record["schema"]
        if found == (kind, 1):
            if not isinstance(record["config"], dict):
                raise ValueError("config is none")
            for name in ("accuracy", "top5", "mean_auc", "mean_ap", "loss"):
                value = record["metrics"].get(name)
                if value is not None and not 0 <= value <= (1 if name != "loss" else 1e300):
                    raise ValueError(f"{name} is {value}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        mend = "remove it, or give another --out"
        raise ValueError(f"{path}: not a result file ({error!r:.60}); {mend}") from error
    if found != (kind, 1):
        raise ValueError(f"{path}: a result of kind and schema {found}, not {(kind, 1)}")
    check_same_config(path, record["config"], config)
    return record


def finished_run(folder, config, kind):
    """The result of a finished pre-training in this folder, or None. Raises ValueError as
    read_result, or when its model.pt, or model-best.pt, is gone or damaged.
    """
    path = Path(folder, "result.json")
    record = read_result(path, kind, config)
    mends = {"model.pt": f"remove {path}, and the same command goes on from checkpoint.pt"}
    if config.get("keep_best"):
        mends["model-best.pt"] = f"remove {folder}"
    for name, mend in mends.items() if record else ():
        try:
            read_tensors(Path(folder, name))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{error}, though {path} says that it is finished; {mend}") from error
    return record


def load_checkpoint(path, config):
    """The state of an interrupted run, or None. Raises ValueError for one of another config."""
    if path is None or not os.path.exists(path):
        return None
    state = read_tensors(path)
    if not (isinstance(state, dict) and isinstance(state.get("config"), dict)):
        raise ValueError(f"{path}: not a checkpoint; remove it")
    check_same_config(path, state["config"], config)
    return state


def check_same_config(path, theirs, ours):
    """Raises ValueError naming the first setting of `ours` that was another there. Of the data of
    an older file nothing is known.
    """
    theirs, ours = json.loads(json.dumps([theirs, ours]))  # tuples become lists, as in the file
    then, now = theirs.pop("data", None) or {}, ours.pop("data", None) or {}
    mend = "give another --out, or remove it"
    if key := other_setting(theirs, ours):
        was = f"{path} was made with {key} = {theirs.get(key)}, not {ours[key]}"
        raise ValueError(f"{was}; use the same options, {mend}")
    if changed := [part for part in now if then.get(part, now[part]) != now[part]]:
        was = f"{path} was made of other data: {', '.join(changed)} changed since"
        raise ValueError(f"{was}; use the same data, {mend}")


class Run:
    """A training under way: restored from its checkpoint if there is one, and saved to it.

    path: of the checkpoint, None to keep none. config: what must be the same to continue. last:
    steps in all. step: steps done. seconds: spent in training. Raises ValueError when the
    checkpoint was made with another config, is damaged or beyond the last step, or when the ranks
    would continue after different steps.
    """

    def __init__(self, path, model, optimizer, config, env, save_minutes=10.0, last=math.inf):
        self.path, self.model, self.optimizer, self.config = path, model, optimizer, config
        self.env, self.save_minutes = env, save_minutes
        self.step, self.seconds, self.saved = 0, 0.0, time.monotonic()
        self._writer, self._writing = ThreadPoolExecutor(1, "checkpoint"), None
        if state := load_checkpoint(path, config):
            try:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                self.step, self.seconds = state["step"], state["seconds"]
                good = type(self.step) is int and 0 <= self.step <= last
                if not (good and 0 <= self.seconds < math.inf):
                    raise ValueError(f"{self.seconds} s, step {self.step} of {last}")
            except Exception as error:
                reason = one_line(error)[:100]
                raise ValueError(f"{path}: of another training ({reason}); remove it") from error
            refuse_nonsense(path, state["model"])
        if len(set(steps := gathered(self.step, env))) > 1:
            raise ValueError(f"the ranks would continue after steps {steps}: share --out")

    def save(self, wait=True):
        """Writes the checkpoint, on the main rank; the one before is kept until it is whole.

        wait=False: the device waits only while the state is copied to the host's memory, and a
        thread writes. Weights that are not finite are not saved: the next loss will say so. Raises
        OSError, also for the write before, when the disk is full.
        """
        self.saved = time.monotonic()
        if not (self.path and self.env.main):
            return
        self.finish_saving()
        if not all(p.isfinite().all() for p in self.model.parameters()):
            return
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "seconds": self.seconds, "config": self.config}
        self._writing = self._writer.submit(save_tensors, self.path, _on_host(state))
        if wait:
            self.finish_saving()

    def finish_saving(self):
        """Waits for the checkpoint that is being written; raises what went wrong with it."""
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def summary(self, images, batch_size, flops):
        """What a result file says of a training on so many images.

        flops: of an image's forward pass. flops_per_second: of the model (3 times the forward pass:
        forward, and backward for inputs and weights), 2 a multiply-add, recomputation not counted.
        peak_share: of what the devices can do.
        """
        speed = self.step * batch_size / self.seconds
        work = 3 * flops * speed
        return {
            "optimizer": type(self.optimizer).__name__,
            "images": images,
            "steps": self.step,
            "seconds": self.seconds,
            "images_per_second": speed,
            "flops_per_second": work,
            "peak_share": work / (self.env.ranks * peak_flops(self.env.device, self.env.precision)),
        }

    def save_or_stop(self, signals, log):
        """After a step: saves every save_minutes in the background; once any process was asked to
        stop, saves and raises Stopped on all. What is saved is finite: log raises Diverged else.
        """
        if self._writing and self._writing.done():
            self.finish_saving()
        if stop := signals.agreed():
            log.refuse_nonfinite()
            self.save()
            if self.env.ranks > 1:
                dist.barrier()  # torchrun kills the others soon after the first one leaves
            reason, status = stop
            raise Stopped(f"stopped by {reason} after step {self.step}", status)
        if time.monotonic() - self.saved > 60 * self.save_minutes and log.finite():
            self.save(wait=False)


def _on_host(state):
    """A copy of nested dicts and lists with every tensor in the host's memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_host(value) for key, value in state.items()}
    return [_on_host(value) for value in state] if isinstance(state, list) else state
