# SPDX-License-Identifier: Apache-2.0
"""A comparison from weights to table, and the tables of transformers' documentation."""

import dataclasses
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from vivit_jax.benchmark.agreement import Agreement, Computed, agreement, is_rounded
from vivit_jax.benchmark.measure import Timing, alternate
from vivit_jax.benchmark.memory import Peak, peak_memory
from vivit_jax.benchmark.products import ProductsAlone, large_product, products_of
from vivit_jax.benchmark.sides import (
    OURS,
    Compilation,
    JaxSide,
    Side,
    TorchSide,
    check_work,
    write_weights,
)
from vivit_jax.benchmark.work import Work, program, work_of
from vivit_jax.errors import UserError, first_line
from vivit_jax.layers.linear import platform
from vivit_jax.table import columns

SEED_BATCHES = (1, 2, 4, 8)
MEBI = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """One side's figures; None where they do not apply or were not asked for."""

    name: str
    timing: Timing
    compilation: Compilation | None
    agreement: Agreement | None  # with the first row, None for that row itself
    peak: Peak | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows of one work; the first is this library's."""

    work: Work
    rows: tuple[Row, ...]
    rate: float  # operations per second of a large matrix product, in the same rounds
    products: Timing | None  # of all matrix products of the work, one after the other
    failures: tuple[str, ...] = ()  # rows that could not run, and why
    peak_rate: float | None = None  # operations per second that the device is sold for

    @property
    def agrees(self) -> bool:
        """Whether what was compared computes what the first does, and not all of it failed."""
        compared = [row for row in self.rows if row.agreement is not None]
        if self.failures and not compared:
            return False
        return all(row.agreement is None or row.agreement.holds for row in self.rows)

    def ratio(self, row: Row) -> float | None:
        """Time of the first row by that of another; None for itself and where outputs differ."""
        if row.agreement is None or not row.agreement.holds:
            return None
        return self.rows[0].timing.over(row.timing)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, seconds and bytes."""
        work, config = self.work, self.work.config
        return {
            "model": work.name,
            "work": work.kind,
            "batch": work.batch,
            "frames": config.num_frames,
            "dtype": config.dtype,
            "attention": config.attention,
            "remat": config.remat,
            "peak_flops_per_second": self.peak_rate,
            "flops": work.flops(),
            "product_flops_per_second": self.rate,
            "products_seconds": self.products and self.products.median,
            "products_ratio": self.over_products,
            "failures": list(self.failures),
            "rows": [
                dataclasses.asdict(row)
                | {
                    "median_seconds": row.timing.median,
                    "clips_per_second": work.batch / row.timing.median,
                    "share_of_product_rate": self._share(row, self.rate),
                    "mfu": self._share(row, self.peak_rate),
                    "ratio": self.ratio(row),
                    "agrees": None if row.agreement is None else row.agreement.holds,
                }
                for row in self.rows
            ],
        }

    @property
    def over_products(self) -> float | None:
        """Time of the first row by that of its matrix products alone, in the same rounds.

        None where they were not timed, or take no longer than calling them.
        """
        if self.products is None or not all(self.products.seconds):
            return None
        return self.rows[0].timing.over(self.products)

    def _share(self, row: Row, rate: float | None) -> float | None:
        return rate and self.work.flops() / row.timing.median / rate

    def __str__(self) -> str:
        work, config = self.work, self.work.config
        what = "forward pass" if work.kind == "forward" else f"{work.kind} step"
        head = (
            f"{work.name}, {what}, batch {work.batch}, {config.num_frames} frames, {config.dtype}: "
            f"{work.flops() / 1e9:,.0f} GFLOP"
        )
        mfu = () if self.peak_rate is None else ("MFU",)
        table = [
            ("", "seconds", "+-", "clips/s", "TFLOP/s", "of products", *mfu, "compile s")
            + ("peak MiB", "ours/this", "difference")
        ]
        for row in self.rows:
            ratio = self.ratio(row)
            table.append(
                (
                    row.name,
                    f"{row.timing.median:.4g}",
                    f"{row.timing.spread:.0%}",
                    f"{work.batch / row.timing.median:.3g}",
                    f"{work.flops() / row.timing.median / 1e12:.3g}",
                    f"{self._share(row, self.rate):.0%}",
                    *(f"{self._share(row, self.peak_rate):.1%}" for _ in mfu),
                    _compilation(row.compilation),
                    "-" if row.peak is None else f"{row.peak.step / MEBI:,.0f}",
                    "" if row.agreement is None else f"{ratio:.2f}" if ratio else "DIFFERS",
                    "" if row.agreement is None else str(row.agreement),
                )
            )
        lines = [head, *columns(table)]
        bound = f"one large product: {self.rate / 1e12:.3g} TFLOP/s"
        if self.over_products is not None:
            bound += (
                f"; this work's products alone: {self.products.median:.4g} s, "
                f"+-{self.products.spread:.0%}, {self.rows[0].name} takes "
                f"{self.over_products:.2f} times that"
            )
        return "\n".join([*lines, bound, *self.failures])


def compare(
    work: Work,
    attention: Sequence[str] = ("auto",),
    variants: Sequence[str] = (),
    repeats: int = 5,
    *,
    memory: bool = True,
    products: bool = True,
    peak_rate: float | None = None,
) -> Comparison:
    """Time a work with each of our attentions and each variant of PyTorch, on the same weights.

    A variant that cannot run is left out and told in `failures`; one that computes something else
    gets no ratio. `products` are timed on a CPU, where they are what bounds the work. Raises
    UserError where this library cannot run.
    """
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "weights"
        write_weights(work, directory)
        sides = []
        for name in attention:
            config = dataclasses.replace(work.config, attention=name)
            label = OURS if len(attention) == 1 else f"{OURS} {name}"
            sides.append(JaxSide(dataclasses.replace(work, config=config), directory, label))
        sides += [TorchSide(work, directory, variant) for variant in variants]
        # Memory before any side is warm: the processes that measure it need room.
        peaks, agreements, failures, first = {}, {}, [], None
        for side in sides if memory else ():
            try:
                peaks[side.name] = peak_memory(side.work, side.name, directory)
            except (UserError, OSError) as error:
                failures.append(f"{first_line(error)}; --no-peak-memory leaves it out")
        exact = _in_float32(work, directory) if len(sides) > 1 and is_rounded(work) else None
        for side in list(sides):
            try:
                computed = _first_step(side)
            except Exception as error:  # torch.compile wants a C++ compiler
                if isinstance(side, JaxSide):
                    raise
                name = type(error).__name__
                failures.append(f"{side.name} did not run: {name}: {first_line(error)}")
                sides.remove(side)
                continue
            if first is None:
                first = computed
            else:
                agreements[side.name] = agreement(work, first, computed, exact)
        del first, computed, exact
        large = large_product(work.config.dtype)
        alone = _products_alone(sides[0].work) if products and platform() == "cpu" else None
        timings = alternate([*sides, large, *([alone] if alone else [])], repeats)
        rows = tuple(
            Row(
                side.name,
                timings[side.name],
                side.compilation(timings[side.name].median),
                agreements.get(side.name),
                peaks.get(side.name),
            )
            for side in sides
        )
        bound = alone and alone.without_calls(timings[alone.name])
        rate, ours = large.rate(timings[large.name]), sides[0].work
        sides.clear()
        gc.collect()
    return Comparison(ours, rows, rate, bound, tuple(failures), peak_rate)


def _first_step(side: Side) -> Computed:
    output = side.warm_up()
    return output, side.moments()


def _in_float32(work: Work, directory: Path) -> Computed:
    """What this library computes with all bits of float32."""
    config = dataclasses.replace(work.config, dtype="float32", param_dtype="float32")
    config = dataclasses.replace(config, attention="auto")
    with jax.default_matmul_precision("highest"):
        return _first_step(JaxSide(dataclasses.replace(work, config=config), directory))


def _products_alone(work: Work) -> ProductsAlone:
    made = program(work)
    return ProductsAlone(products_of(made.step, made.state, made.inputs))


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
                    *(ms(e), ms(s), ratio(e.over(s))),
                    *(ms(o), ratio(e.over(o)), ratio(s.over(o))),
                    *("-" if peak is None else f"{peak:,.0f}" for peak in peaks),
                    "-" if saved is None else ratio(saved),
                )
            )
        failures = [text for comparison in self.comparisons for text in comparison.failures]
        return "\n".join([self.title, *columns(table), *failures])


def seed_tables(
    batches: Sequence[int] = SEED_BATCHES, dtype: str = "float32", repeats: int = 5
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
            rows.append(compare(work, ("auto",), ("eager", "sdpa"), repeats, products=False))
        yield SeedTable(f"{title}, {dtype}", tuple(rows))


def _compilation(compilation: Compilation | None) -> str:
    if compilation is None:
        return "-"
    return f"{compilation.seconds:.1f}" + " (cache)" * compilation.cached
