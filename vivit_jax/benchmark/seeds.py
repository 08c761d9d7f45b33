# SPDX-License-Identifier: Apache-2.0
"""The tables of transformers' documentation, with this library's column."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vivit_jax.benchmark.compare import compare
from vivit_jax.benchmark.measure import QUICK_LOOK, Rounds
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
        """Whether all sides computed the same in every row."""
        return all(comparison.agrees for comparison in self.comparisons)

    def to_dict(self) -> dict[str, Any]:
        """The title and its comparisons as plain values."""
        return {
            "title": self.title,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }

    def __str__(self) -> str:
        table = [
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
            ms = lambda timing: f"{1e3 * timing.median:,.0f}"  # noqa: E731
            peaks = [row.peak and row.peak.step / MEBI for row in (eager, sdpa, ours)]
            saved = peaks[1] / peaks[2] if all(peaks) else None
            # No ratio of what is not the same function.
            ratio = lambda a: f"{a:.2f}" if comparison.agrees else "DIFFERS"  # noqa: E731, B023
            table.append(
                (
                    str(comparison.work.batch),
                    *(ms(e), ms(s), ratio(e.over(s).median)),
                    *(ms(o), ratio(e.over(o).median), ratio(s.over(o).median)),
                    *("-" if peak is None else f"{peak:,.0f}" for peak in peaks),
                    "-" if saved is None else ratio(saved),
                )
            )
        notes = [
            f"batch {comparison.work.batch}: {text}"
            for comparison in self.comparisons
            for text in comparison.notes
        ]
        return "\n".join([self.title, *format_table(table), *notes])


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
