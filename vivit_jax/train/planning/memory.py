# SPDX-License-Identifier: Apache-2.0
"""The memory of a compiled step, by XLA's analysis, and the largest batch that fits; runs nothing.

The program is compiled for jax's default platform. The analysis on a CPU is only an estimate for a
GPU or TPU: params, optimizer and inputs are the same there, temporaries are not. A CPU has no fused
attention kernel, other tiles, and widens bfloat16 to float32 for matrix products, so that bfloat16
hardly saves temporaries. No analysis includes XLA's own code and context, the scratch of matrix
products, the next batch, and fragmentation: on a CPU a step took 3 to 8 % more than predicted
(tests/benchmark/test_memory_fit.py), for which whoever compares with a device's memory leaves
RESERVE.
"""

import dataclasses
import decimal
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vivit_jax.errors import UserError

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB".upper(): 1024**i for i, prefix in enumerate("KMGT", 1)}
# Most of a CPU's compilation is LLVM's, which starts after the buffers are laid out.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_backend_optimization_level": 0}}
RESERVE = 0.12  # share of the memory left for what no analysis includes
_GROWTH = 16  # the search tries at most this many times a batch that fits
_AVAILABLE = re.compile(r"^MemAvailable:\s+(\d+) kB", re.MULTILINE)
# The limit of a container, by version of Linux's control groups; "max" or a huge number for none.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one step needs on a device; `total` is its peak.

    `params`, `optimizer` (its state; 0 in a forward pass) and `inputs` are counted from shapes. The
    rest is XLA's: `arguments` are those three with the device's padding; `outputs`, of which
    `aliased` reuse arguments, as a training step's new params and optimizer state do;
    `temporaries`, the gradients and activations, which XLA does not separate; `code`, the program
    itself, 0 if unknown. `peak` is the figure of a TPU's compiler, whose buffers overlap so that
    their sum is far more; it is 0 elsewhere, where that figure excludes temporaries.
    """

    params: int
    optimizer: int
    inputs: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int = 0

    @property
    def total(self) -> int:
        """`peak`, or arguments + outputs - aliased + temporaries: the donated state once."""
        if self.peak:
            return self.peak
        return self.arguments + self.outputs - self.aliased + self.temporaries


def analysed(lowered: Any, *, params: int, optimizer: int, inputs: int) -> Memory:
    """The memory of a lowered step, which is compiled for the default platform and not run.

    The caller counts the bytes of params, optimizer and inputs.
    """
    platform = jax.default_backend()
    analysis: Any = lowered.compile(_COMPILER_OPTIONS.get(platform)).memory_analysis()
    return Memory(
        params=params,
        optimizer=optimizer,
        inputs=inputs,
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=analysis.peak_memory_in_bytes if platform == "tpu" else 0,
    )


def largest(total_of: Callable[[int], int], memory: int, guess: int, each: int = 1) -> int:
    """The largest number of clips whose total is at most `memory` bytes; 0 if even one is more.

    `total_of` is costly and grows almost in proportion to the number, by `each` bytes at least, so
    that a line through two analyses leads near the answer. The search begins at `guess`. The result
    was analysed and fits; one clip more was analysed and does not. Usually four analyses.
    """
    totals: dict[int, int] = {}

    def fit(batch: int) -> bool:
        totals[batch] = total_of(batch)
        return totals[batch] <= memory

    if not fit(1):
        return 0
    low, high, guess = 1, None, max(guess, 2)
    while True:
        if fit(guess):
            low = guess
        else:
            high = guess
        if high == low + 1:
            return low
        # `high` does not fit; until it is known, the line goes through the two largest that do.
        other = high or sorted(totals)[-2]
        slope = (totals[other] - totals[low]) / (other - low)
        more = int((memory - totals[low]) / max(slope, each))
        if high is None:
            guess = min(max(low + more, low + 1), _GROWTH * low)
        elif len(totals) < 6 or len(totals) % 2:
            guess = min(max(low + more, low + 1), high - 1)
        else:  # memory is far from a line
            guess = min(max(math.isqrt(low * high), low + 1), high - 1)


def parse_bytes(memory: str | int) -> int:
    """Bytes from "16GiB", "2.5 GiB", "80GB", "500MB" or a whole number of bytes.

    KiB, MiB, GiB and TiB are powers of 1024, KB, MB, GB and TB of 1000, in any case of letters.
    Raises UserError for anything else and for less than one byte.
    """
    text = "" if isinstance(memory, bool) else str(memory).strip()
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text)
    number, unit = match.groups() if match else ("", "?")
    scale = _UNITS.get(unit.upper())
    if scale is None or (scale == 1 and "." in number) or not decimal.Decimal(number) * scale >= 1:
        raise UserError(
            f"memory must be a size like '16GiB', '80GB' or '500MB' or a positive whole number of "
            f"bytes, got {memory!r}; units are KiB, MiB, GiB, TiB (of 1024) and KB, MB, GB, TB "
            "(of 1000)"
        )
    return int(decimal.Decimal(number) * scale)


def device_memory() -> int | None:
    """Bytes that jax may use on its default device; None if unknown.

    On a GPU or TPU it is the limit of jax's allocator, by default three quarters of a GPU. On a CPU
    it is all of the machine's memory, regardless of other programs and of a container's limit.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit


def free_memory() -> int | None:
    """Bytes of the host that are free now, within a container's limit; None if unknown."""
    sizes = []
    try:
        sizes += [1024 * int(n) for n in _AVAILABLE.findall(Path("/proc/meminfo").read_text())]
    except OSError:  # not Linux
        if hasattr(os, "sysconf"):
            sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in _LIMITS:
        try:
            sizes.append(int(Path(place).read_text()))
        except (OSError, ValueError):
            continue
    return min(sizes, default=None)
