# SPDX-License-Identifier: Apache-2.0
"""The tables of transformers' documentation, with this library's column."""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vivit_jax.benchmark.compare import compare
from vivit_jax.benchmark.measure import QUICK_LOOK, Rounds, Timing
from vivit_jax.benchmark.report import MEBI, Comparison
from vivit_jax.benchmark.sides import check_work
from vivit_jax.benchmark.work import work_of
from vivit_jax.progress import format_table

SEED_BATCHES = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class SeedTable:
    """A table as transformers' documentation prints it, with this library's column."""

    title: str
    comparisons: tuple[Comparison, ...]

    @property
    def agrees(self) -> bool:
        """Whether all sides compute the same function in every row."""
        return all(comparison.agrees for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """The title and its comparisons as plain values."""
        return {
            "title": self.title,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [
            (
                "batch",
                "eager ms",
                "sdpa ms",
                "eager/sdpa",
                "vivit_jax ms",
                "eager/ours",
                "sdpa/ours",
            )
            + ("eager MiB", "sdpa MiB", "vivit_jax MiB", "sdpa/ours MiB")
        ]
        for comparison in self.comparisons:
            if len(comparison.rows) < 3:
                unknown = ("-",) * (len(table[0]) - 1)
                table.append((str(comparison.work.batch), *unknown))
                continue
            ours, eager, sdpa = comparison.rows
            e, s, o = (row.timing for row in (eager, sdpa, ours))
            peaks = [None if row.peak is None else row.peak.step for row in (eager, sdpa, ours)]
            saved = peaks[1] / peaks[2] if peaks[1] and peaks[2] else None
            ratio = functools.partial(_ratio, agrees=comparison.agrees)
            table.append(
                (
                    str(comparison.work.batch),
                    *(_ms(e), _ms(s), ratio(e.over(s).median)),
                    *(_ms(o), ratio(e.over(o).median), ratio(s.over(o).median)),
                    *("-" if peak is None else f"{peak / MEBI:,.0f}" for peak in peaks),
                    "-" if saved is None else ratio(saved),
                )
            )
        notes = [
            f"batch {comparison.work.batch}: {text}"
            for comparison in self.comparisons
            for text in comparison.notes
        ]
        return "\n".join([self.title, *format_table(table), *notes])


def _ms(timing: Timing) -> str:
    return f"{1e3 * timing.median:,.0f}"


def _ratio(ratio: float, agrees: bool) -> str:
    return f"{ratio:.2f}" if agrees else "DIFFERS"


def seed_tables(
    batches: Sequence[int] = SEED_BATCHES,
    dtype: str = "float32",
    rounds: Rounds = QUICK_LOOK,
) -> Iterator[SeedTable]:
    """ViViT-B training and inference, VideoMAE-B inference: time and memory, eager against sdpa."""
    tables = (
        ("vivit-b-16x2-kinetics400", "finetune", batches[:1], "ViViT-B, one training step"),
        ("vivit-b-16x2-kinetics400", "forward", batches, "ViViT-B, inference"),
        ("videomae-base-kinetics400", "forward", batches, "VideoMAE-B, inference"),
    )
    for name, kind, sizes, title in tables:
        rows = []
        for size in sizes:
            work = work_of(name, kind, size, dtype=dtype)
            check_work(work)
            print(f"{title}, batch {size} ...", file=sys.stderr, flush=True)
            rows.append(compare(work, ("auto",), ("eager", "sdpa"), rounds, products=False))
        yield SeedTable(f"{title}, {dtype}", tuple(rows))
