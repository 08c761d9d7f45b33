# SPDX-License-Identifier: Apache-2.0
"""Whether a work fits in memory, by XLA's analysis of the compiled step; nothing is run.

The program is compiled for jax's default platform and one device. The analysis on a CPU is only an
estimate for a GPU or TPU: params, optimizer and inputs are the same there, temporaries are not. A
CPU has no fused attention kernel, other tiles, and widens bfloat16 to float32 for matrix products,
so that bfloat16 hardly saves temporaries. No analysis includes XLA's own code and context, the
scratch of matrix products, the next batch, and fragmentation: on a CPU a step took 3 to 8 % more
than predicted (tests/benchmark/test_memory_fit.py), for which `alternatives` leaves RESERVE.
"""

import dataclasses
import decimal
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from vivit_jax.benchmark.work import Work, program
from vivit_jax.config_base import REMAT_POLICIES
from vivit_jax.errors import UserError
from vivit_jax.progress import format_table, readable

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB".upper(): 1024**i for i, prefix in enumerate("KMGT", 1)}
# Most of a CPU's compilation is LLVM's, which starts after the buffers are laid out.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_backend_optimization_level": 0}}
RESERVE = 0.12  # share of the memory left for what no analysis includes
_GROWTH = 16  # the search tries at most this many times a batch that fits


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one step needs on the device; `total` is its peak.

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


def memory_of(work: Work) -> Memory:
    """The memory of a step on jax's default platform; the step is compiled, not run.

    No parameter, clip or activation is allocated. Compiling takes seconds and some hundred MiB of
    host memory, 500 for pre-training a large VideoMAE; results are cached.
    """
    return _memory_of(work, jax.default_backend())


@functools.lru_cache(maxsize=256)
def _memory_of(work: Work, platform: str) -> Memory:
    source = program(work)
    lowered = source.step.lower(source.state, source.inputs)
    analysis: Any = lowered.compile(_COMPILER_OPTIONS.get(platform)).memory_analysis()
    params, optimizer = (source.state, ()) if work.kind == "forward" else source.state
    return Memory(
        params=_bytes(params),
        optimizer=_bytes(optimizer),
        inputs=_bytes(source.inputs),
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        peak=analysis.peak_memory_in_bytes if platform == "tpu" else 0,
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fits(work: Work, memory: int) -> bool:
    """Whether a step of the work takes at most `memory` bytes."""
    return memory_of(work).total <= memory


def largest_batch(work: Work, memory: int) -> int:
    """The most clips per step that fit in `memory` bytes; 0 if even one does not.

    The search starts at the work's own batch. Memory grows almost in proportion to the batch, so a
    line through two analyses leads near the answer. The result was compiled and fits; one clip more
    was compiled and does not. Usually four compilations.
    """
    totals: dict[int, int] = {}

    def fit(batch: int) -> bool:
        totals[batch] = memory_of(dataclasses.replace(work, batch=batch)).total
        return totals[batch] <= memory

    if not fit(1):
        return 0
    one = memory_of(dataclasses.replace(work, batch=1))
    low, high, guess = 1, None, max(work.batch, 2)
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
        more = int((memory - totals[low]) / max(slope, one.inputs))
        if high is None:
            guess = min(max(low + more, low + 1), _GROWTH * low)
        elif len(totals) < 6 or len(totals) % 2:
            guess = min(max(low + more, low + 1), high - 1)
        else:  # memory is far from a line
            guess = min(max(math.isqrt(low * high), low + 1), high - 1)


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A work with one remat policy: its memory, that of one clip, and the largest batch."""

    work: Work
    memory: Memory
    one_clip: Memory
    fits: bool
    largest_batch: int

    @property
    def remat(self) -> str:
        """What is kept for the backward pass: "none", "dots" or "block"."""
        return self.work.config.remat


def alternatives(
    work: Work, memory: int, policies: Sequence[str] = REMAT_POLICIES
) -> list[Alternative]:
    """The work under several remat policies in `memory` bytes, less the RESERVE.

    A forward pass has no backward pass to keep anything for, so only its config's policy is tried.
    About five compilations for each policy.
    """
    config, memory = work.config, int(memory * (1 - RESERVE))
    found = []
    for remat in [config.remat] if work.kind == "forward" else policies:
        case = dataclasses.replace(work, config=dataclasses.replace(config, remat=remat))
        one_clip = memory_of(dataclasses.replace(case, batch=1))
        largest = largest_batch(case, memory)
        found.append(Alternative(case, memory_of(case), one_clip, fits(case, memory), largest))
    return found


def table(rows: Sequence[Alternative], memory: int) -> str:
    """`alternatives` as text; the first line names the work and the memory."""
    work = rows[0].work
    head = ("remat", "params+optimizer", "temporaries", "total", "fits", "one clip", "most clips")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        sizes = row.memory.params + row.memory.optimizer, row.memory.temporaries, row.memory.total
        cells.append(
            (
                row.remat,
                *map(readable, sizes),
                "yes" if row.fits else "no",
                readable(row.one_clip.total),
                str(row.largest_batch),
            )
        )
    lines = [
        f"{work.name} {work.kind}, batch {work.batch}, {work.config.num_frames} frames, "
        f"{work.config.dtype}, attention {work.config.attention}, in {readable(memory)} less "
        f"{RESERVE:.0%}, compiled for {jax.default_backend()}"
    ]
    return "\n".join([*lines, *format_table(cells)])


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
