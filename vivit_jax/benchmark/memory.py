# SPDX-License-Identifier: Apache-2.0
"""The memory that a side takes, measured in a process of its own."""

import ctypes
import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from vivit_jax.benchmark.sides import JaxSide, TorchSide
from vivit_jax.benchmark.work import Work, work_of
from vivit_jax.config import architecture
from vivit_jax.errors import UserError, first_line
from vivit_jax.layers.platform import platform

_CLEAR = Path("/proc/self/clear_refs")  # writing 5 resets VmHWM


@dataclasses.dataclass(frozen=True)
class Peak:
    """Peak memory of a side alone, in bytes."""

    step: int  # during a warm step, with weights and optimizer
    whole: int  # since the start, with compilation and first step


def peak_memory(work: Work, side: str, directory: Path) -> Peak:
    """Run a side in a process of its own and measure how much memory it takes.

    On a CPU it is the resident memory of the process, less what it had after a first small
    computation, so that loaded libraries do not count. On a GPU it is the allocator's count; JAX
    cannot reset a peak, so `step` is `whole` there. `side` is the name of a side. Raises UserError
    if the process fails.
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
    command = [sys.executable, "-m", "vivit_jax.benchmark.memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return Peak(**json.loads(lines[-1]))
    if done.returncode == 1 and lines:
        reason = lines[-1]
    elif done.returncode < 0:
        killed = signal.Signals(-done.returncode)
        reason = f"ended by {killed.name}"
        reason += ", as a system out of memory does" if killed is signal.SIGKILL else ""
    else:
        reason = f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"
    raise UserError(f"measuring the memory of {side} failed: {reason}")


def _alone(task: dict) -> Peak:
    """The child process of `peak_memory`."""
    name, kind, batch = task["work"]
    work = work_of(name, kind, batch, **task["options"])
    directory = Path(task["directory"])
    on_gpu, torch = platform() == "gpu", None
    if not on_gpu and not _CLEAR.exists():
        raise UserError("the peak memory of a process is read from /proc, which only Linux has")
    if task["side"].startswith("torch "):
        import torch
        import transformers

        # transformers imports a model when it is first asked for, torch its compiler with the
        # first step of an optimizer.
        getattr(transformers, architecture(work.config.model_type, work.head))
        weights = torch.ones(8, 8, requires_grad=True)
        (weights @ weights).sum().backward()
        torch.optim.AdamW([weights], fused=True).step()
        side = TorchSide(work, directory, task["side"].removeprefix("torch "))
    else:
        jax.block_until_ready(jnp.ones((8, 8)) @ jnp.ones((8, 8)))
        side = JaxSide(work, directory)
    baseline = _resident("VmRSS")
    side.warm_up()
    gc.collect()
    if on_gpu and torch is not None:
        whole = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.run()
        step = torch.cuda.max_memory_allocated()
        return Peak(step, max(step, whole))
    if on_gpu:
        peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
        return Peak(peak, peak)
    whole = _resident("VmHWM")  # ru_maxrss would begin with the parent's
    # What tracing and compiling left behind does not belong to the step.
    if torch is None:
        jax.clear_caches()
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    side.run()
    step = _resident("VmHWM")
    return Peak(step - baseline, max(step, whole) - baseline)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None, f"{field} in /proc/self/status"
    return int(found[1]) * 1024


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        print(json.dumps(dataclasses.asdict(_alone(json.loads(sys.argv[1])))))
    except Exception as error:  # for the parent to report, in one line
        print(first_line(error))
        sys.exit(1)
