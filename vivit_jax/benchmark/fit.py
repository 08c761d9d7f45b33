# SPDX-License-Identifier: Apache-2.0
"""Whether a work fits in memory, from XLA's analysis of the compiled step; nothing is run.

The analysis is of the program compiled here, for jax's default platform and one device. That of a
CPU is an estimate for a GPU or TPU. Params, optimizer and inputs are the same there; temporaries
are not: a CPU has no fused attention kernel and other tiles, and it widens bfloat16 to float32 for
its matrix products, so that temporaries in bfloat16 are hardly smaller or even larger. No analysis
sees what the process holds besides: XLA's own code and context, the scratch of its matrix products,
the next batch on its way, holes between the buffers. On a CPU a step took 3 to 8 % more than
predicted, see tests/benchmark/test_memory_fit.py; `alternatives` leaves RESERVE for it.
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
# LLVM's effort on a CPU is most of the compilation and comes after the buffers are laid out.
_COMPILER_OPTIONS = {"cpu": {"xla_backend_optimization_level": 0}}
RESERVE = 0.12  # share of the memory at hand that no analysis sees the use of
_GROWTH = 16  # how far beyond a batch that fits the search steps at most


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one step needs on the device; `total` is its peak, all buffers together.

    `peak` is what a TPU's compiler says and checks: its buffers take the place of one another, and
    their sum is far more. It is 0 elsewhere, where that figure leaves temporaries out.

    `params`, `optimizer` (its state; 0 in a forward pass) and `inputs` are counted from shapes. The
    others are XLA's: `arguments`, those three with the device's padding; `outputs`, of which
    `aliased` take the place of arguments, as a training step's new params and optimizer state do;
    `temporaries`, the gradients, activations and everything else between. XLA does not tell
    gradients from activations. `code`, the program itself, is 0 where XLA does not say.
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
    """What a step of the work needs on jax's default platform; it is compiled, not run.

    No parameter, clip or activation is allocated. Compiling takes seconds and some hundred MiB of
    this process, 500 for a large VideoMAE's pre-training; the same work is compiled once.
    """
    return _memory_of(work, jax.default_backend())


@functools.lru_cache(maxsize=256)
def _memory_of(work: Work, platform: str) -> Memory:
    source = program(work)
    lowered = source.step.lower(source.state, source.inputs)
    analysis = lowered.compile(compiler_options=_COMPILER_OPTIONS.get(platform)).memory_analysis()
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
    """Whether a step of the work takes no more than `memory` bytes."""
    return memory_of(work).total <= memory


def largest_batch(work: Work, memory: int) -> int:
    """The most clips per step that take no more than `memory` bytes, 0 if one does not fit.

    The work's own batch only helps to begin. Memory grows almost in proportion to the batch, so a
    line through two analyses leads near the answer; what is returned was compiled and fits, and
    one clip more was compiled and does not. Four compilations as a rule.
    """
    totals = {}

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
        # `high` does not fit; before there is one, the line is through the two largest that fit.
        other = high or sorted(totals)[-2]
        slope = (totals[other] - totals[low]) / (other - low)
        more = int((memory - totals[low]) / max(slope, one.inputs))
        if high is None:
            guess = min(max(low + more, low + 1), _GROWTH * low)
        elif len(totals) < 6 or len(totals) % 2:
            guess = min(max(low + more, low + 1), high - 1)
        else:  # where memory is far from a line
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
        """What the backward pass finds kept: "none", "dots" or "block"."""
        return self.work.config.remat


def alternatives(
    work: Work, memory: int, policies: Sequence[str] = REMAT_POLICIES
) -> list[Alternative]:
    """The work under some remat policies against `memory` bytes, less the RESERVE of them.

    A forward pass keeps nothing for a backward pass, so it has only the policy of its config.
    About five compilations per policy.
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
    """`alternatives` as lines of text, the first of which says what was analysed for what."""
    work = rows[0].work
    head = ("remat", "params+optimizer", "temporaries", "total", "fits", "one clip", "most clips")
    cells = [head]
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
    number, unit = match.groups() if match else ("", None)
    scale = _UNITS.get(unit.upper()) if match else None
    if scale is None or (scale == 1 and "." in number) or not decimal.Decimal(number) * scale >= 1:
        raise UserError(
            f"memory must be a size like '16GiB', '80GB' or '500MB' or a positive whole number of "
            f"bytes, got {memory!r}; units are KiB, MiB, GiB, TiB (of 1024) and KB, MB, GB, TB "
            "(of 1000)"
        )
    return int(decimal.Decimal(number) * scale)


def device_memory() -> int | None:
    """Bytes that jax may use on its default device, None where nobody says.

    On a GPU or TPU that is the limit of jax's allocator, by default three quarters of a GPU. On a
    CPU it is all memory of the machine, whatever else is using it and whatever a container allows.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return limit
