# SPDX-License-Identifier: Apache-2.0
"""Whether a work fits in memory, see `vivit_jax.train.planning.memory`, under each remat policy."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from vivit_jax.benchmark.work import Work, program
from vivit_jax.config_base import REMAT_POLICIES
from vivit_jax.progress import format_table, readable
from vivit_jax.train.planning.memory import RESERVE, Memory, analysed, largest


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
    params, optimizer = (source.state, ()) if work.kind == "forward" else source.state
    return analysed(
        lowered, params=_bytes(params), optimizer=_bytes(optimizer), inputs=_bytes(source.inputs)
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fits(work: Work, memory: int) -> bool:
    """Whether a step of the work takes at most `memory` bytes."""
    return memory_of(work).total <= memory


def largest_batch(work: Work, memory: int) -> int:
    """The most clips per step that fit in `memory` bytes; 0 if even one does not."""

    def total(batch: int) -> int:
        return memory_of(dataclasses.replace(work, batch=batch)).total

    each = memory_of(dataclasses.replace(work, batch=1)).inputs
    return largest(total, memory, guess=work.batch, each=each)


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
