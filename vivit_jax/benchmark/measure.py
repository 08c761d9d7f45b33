# SPDX-License-Identifier: Apache-2.0
"""Alternating rounds, agreement of the sides, and memory of each side by itself."""

import ctypes
import dataclasses
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vivit_jax.benchmark.sides import JaxSide, Runnable, TorchSide
from vivit_jax.benchmark.work import Work, work_of
from vivit_jax.errors import UserError

# Two implementations of one function: the largest ||a - b|| / ||b|| of outputs and of gradients
# that rounding explains. VideoMAE-B forward in float32 measured 6e-7; half precision not measured.
AGREEMENT = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one step of a side, over the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range between first and third quartile, as a share of the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / 2 / self.median


def alternate(sides: Sequence[Runnable], repeats: int) -> dict[str, Timing]:
    """Every side once in each round, in turn forwards and backwards; warm sides only.

    What slows the machine down for a while slows all sides down, so that ratios hold where times
    do not.
    """
    seconds = {side.name: [] for side in sides}
    for round_ in range(repeats):
        for side in sides[:: 1 if round_ % 2 == 0 else -1]:
            start = time.perf_counter()
            side.run()
            seconds[side.name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two sides are apart: ||a - b|| / ||b|| of outputs and of all gradients together."""

    output: float
    gradients: float | None  # None for a forward pass
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether both sides compute the same function to rounding; NaN does not."""
        found = (self.output, 0.0 if self.gradients is None else self.gradients)
        return all(error <= self.tolerance for error in found)


def agreement(work: Work, ours: tuple, theirs: tuple) -> Agreement:
    """Compare (output, moments) of two sides after their first step."""
    (output, moments), (other_output, other_moments) = ours, theirs
    gradients = None
    if moments is not None:
        if moments.keys() != other_moments.keys():
            raise UserError(
                f"gradients of {work.name} differ in their names: "
                f"{sorted(moments.keys() ^ other_moments.keys())[:6]}"
            )
        gradients = _apart(
            [moments[name] for name in sorted(moments)],
            [other_moments[name] for name in sorted(moments)],
        )
    return Agreement(_apart([output], [other_output]), gradients, AGREEMENT[work.config.dtype])


def _apart(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    pairs = list(zip(ours, theirs, strict=True))
    norm = sum(float(np.sum(np.square(b, dtype=np.float64))) for _, b in pairs)
    error = sum(float(np.sum(np.square(a - b, dtype=np.float64))) for a, b in pairs)
    return (error / norm) ** 0.5


@dataclasses.dataclass(frozen=True)
class Peak:
    """Memory of a side alone, in bytes."""

    step: int  # the largest while a warm step runs, with weights and optimizer
    whole: int  # the largest since the start, compilation and first step too


def peak_memory(work: Work, side: str, directory: Path) -> Peak:
    """Run a side by itself in a process of its own and see how much memory it takes.

    On CPU resident memory of the process, less what it had when its framework had multiplied one
    small matrix, so that libraries do not count; on a GPU the allocator's count. `side` is a name
    of `sides`. Raises UserError where the process fails.
    """
    task = {
        "work": [work.name, work.kind, work.batch],
        "options": {
            "frames": work.config.num_frames,
            "dtype": work.config.dtype,
            "attention": work.config.attention,
            "remat": work.config.remat,
        },
        "side": side,
        "directory": str(directory),
    }
    command = [sys.executable, "-m", "vivit_jax.benchmark.measure", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"measuring the memory of {side} failed: {lines[-1]}")
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def _alone(task: dict) -> Peak:
    """The other end of `peak_memory`."""
    name, kind, batch = task["work"]
    work = work_of(name, kind, batch, **task["options"])
    directory = Path(task["directory"])
    in_torch = task["side"].startswith("torch ")
    if in_torch:
        import torch
        import transformers

        device = torch.device("cuda") if torch.cuda.is_available() else None
        getattr(transformers, "VivitModel")  # noqa: B009  transformers imports lazily
        torch.ones(8, 8) @ torch.ones(8, 8)
        side = TorchSide(work, directory, task["side"].removeprefix("torch "))
    else:
        import jax
        import jax.numpy as jnp

        import vivit_jax.pretrained  # noqa: F401

        jax.block_until_ready(jnp.ones((8, 8)) @ jnp.ones((8, 8)))
        device = jax.devices()[0] if jax.default_backend() == "gpu" else None
        side = JaxSide(work, directory)
    baseline = _resident("VmRSS")
    side.warm_up()
    side.run()
    gc.collect()
    if device is not None and in_torch:
        whole = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.run()
        return Peak(torch.cuda.max_memory_allocated(), whole)
    if device is not None:  # JAX's allocator cannot forget a peak
        peak = device.memory_stats()["peak_bytes_in_use"]
        return Peak(peak, peak)
    ctypes.CDLL(None).malloc_trim(0)  # what compilation has freed is not the step's
    whole = _resident("VmHWM")  # ru_maxrss would begin with the parent's
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        side.run()
    return Peak(_resident("VmHWM") - baseline, whole - baseline)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(json.dumps(dataclasses.asdict(_alone(json.loads(sys.argv[1])))))
