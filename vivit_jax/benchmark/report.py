# SPDX-License-Identifier: Apache-2.0
"""The figures of a comparison, as text and as JSON values."""

import dataclasses
from typing import Any

from vivit_jax.benchmark.agreement import Agreement
from vivit_jax.benchmark.busy import Busy
from vivit_jax.benchmark.intervals import Interval, Ratio
from vivit_jax.benchmark.measure import Rounds, Timing
from vivit_jax.benchmark.memory import Peak
from vivit_jax.benchmark.sides import Compilation
from vivit_jax.benchmark.work import Work
from vivit_jax.progress import format_table

MEBI = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """One side's figures; None if they do not apply or were not requested."""

    name: str
    timing: Timing
    compilation: Compilation | None
    agreement: Agreement | None  # with the first row; None for that row itself
    peak: Peak | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows of one work; the first is this library."""

    work: Work
    rows: tuple[Row, ...]
    rate: float  # operations per second of a large matrix product, in the same rounds
    products: Timing | None  # of the work's matrix products alone
    failures: tuple[str, ...] = ()  # reasons of rows that could not run
    peak_rate: float | None = None  # nominal operations per second of the device
    rounds: Rounds = Rounds()  # as requested
    reach: float | None = None  # the farthest of the intervals that `rounds.until` is about
    busy: Busy | None = None  # load of other work

    @property
    def agrees(self) -> bool:
        """Whether all rows compute the same function, and some row besides the first could run."""
        compared = [row for row in self.rows if row.agreement is not None]
        if self.failures and not compared:
            return False
        return all(row.agreement is None or row.agreement.holds for row in self.rows)

    def ratio(self, row: Row) -> Ratio | None:
        """Time of the first row over another's; None for itself and if the outputs differ."""
        if row.agreement is None or not row.agreement.holds:
            return None
        return self.rows[0].timing.over(row.timing)

    def memory_ratio(self, row: Row) -> float | None:
        """A step's memory in the first row over another's; None as for `ratio`, or if unknown."""
        mine, its = self.rows[0].peak, row.peak
        if row.agreement is None or not row.agreement.holds or mine is None or its is None:
            return None
        return mine.step / its.step if its.step > 0 else None

    @property
    def over_products(self) -> float | None:
        """Time of the first row over its matrix products alone, in the same rounds.

        None if they were not timed, or take no longer than calling them.
        """
        if self.products is None or not all(self.products.seconds):
            return None
        return self.rows[0].timing.over(self.products).median

    @property
    def narrow(self) -> bool | None:
        """Whether the intervals are as narrow as requested; None if nothing was requested."""
        if self.rounds.until is None:
            return None
        return self.reach is not None and self.reach <= self.rounds.until

    @property
    def notes(self) -> tuple[str, ...]:
        """The number of rounds and its reason, the load of other work, and failures."""
        done = len(self.rows[0].timing.seconds)
        rounds = f"{done} rounds, each in an order of its own (seed {self.rounds.seed})"
        if self.rounds.until is not None:
            width = "unknown" if self.reach is None else f"+-{self.reach:.2%}"
            rounds += f", to +-{100 * self.rounds.until:g}% of the median at 95 %: {width}"
        if self.narrow is False:
            rounds += f"; ended by --most-rounds {self.rounds.most}"
        busy = (str(self.busy),) if self.busy is not None and self.busy.notable else ()
        return (rounds, *busy, *self.failures)

    def to_dict(self) -> dict[str, Any]:
        """The values of --json for a table, in seconds and bytes; null is unknown or not requested.

        For the table, besides the request itself:
            flops, product_flops_per_second, products_seconds, products_ratio: operations of the
                work, the rate of one large product, the time of the work's products alone, and the
                first row's time over it.
            rounds: {done, seed, least, until, most, reach, narrow}; reach is the distance from the
                median to the farthest bound of an interval, as a share of the median, narrow
                whether that is at most `until`.
            busy: {source, threshold, cores, others, steal, rounds, timed, told}: shares of the
                cores' time (steal is part of others), the rounds (from 1) above the threshold, and
                whether there was a warning.
            failures: reasons of rows that could not run.
        For each row; ratios are the first row's figure over this one's, null if outputs differ:
            timing: {seconds: one for each round, in the same order in all rows}.
            median_seconds, median_interval: with bounds at 95 %; least_seconds.
            ratio, ratio_interval, ratio_least: the median of the rounds' ratios, its bounds at
                95 %, and the ratio of the least times.
            peak: {step, whole}; memory_ratio: of step.
            compilation: {seconds, cached, trace_seconds, lower_seconds, xla_seconds}; PyTorch does
                not separate the last three, which are null.
            clips_per_second, share_of_product_rate, mfu, agreement, agrees.
        """
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
            "rounds": {
                "done": len(self.rows[0].timing.seconds),
                **dataclasses.asdict(self.rounds),
                "reach": self.reach,
                "narrow": self.narrow,
            },
            "busy": self.busy and dataclasses.asdict(self.busy) | {"told": self.busy.notable},
            "failures": list(self.failures),
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        median, ratio = row.timing.median, self.ratio(row)
        return dataclasses.asdict(row) | {
            "median_seconds": median,
            "median_interval": _bounds(row.timing.interval),
            "least_seconds": row.timing.least,
            "clips_per_second": self.work.batch / median,
            "share_of_product_rate": self._share(row, self.rate),
            "mfu": self._share(row, self.peak_rate),
            "ratio": ratio and ratio.median,
            "ratio_interval": ratio and _bounds(ratio.rounds),
            "ratio_least": ratio and ratio.least,
            "memory_ratio": self.memory_ratio(row),
            "agrees": None if row.agreement is None else row.agreement.holds,
        }

    def _share(self, row: Row, rate: float | None) -> float | None:
        return rate and self.work.flops() / row.timing.median / rate

    def __str__(self) -> str:
        work, config = self.work, self.work.config
        what = "forward pass" if work.kind == "forward" else f"{work.kind} step"
        head = (
            f"{work.name}, {what}, batch {work.batch}, {config.num_frames} frames, {config.dtype}: "
            f"{work.flops() / 1e9:,.0f} GFLOP"
        )
        return "\n".join([head, *self._times(), *self._ratios(), *self._bound(), *self.notes])

    def _times(self) -> list[str]:
        mfu = () if self.peak_rate is None else ("MFU",)
        table: list[tuple[str, ...]] = [
            ("", "seconds", "+-", "least", "clips/s", "TFLOP/s", "of products", *mfu)
            + ("trace s", "compile s", "peak MiB")
        ]
        for row in self.rows:
            median = row.timing.median
            table.append(
                (
                    row.name,
                    f"{median:.4g}",
                    f"{row.timing.spread:.0%}",
                    f"{row.timing.least:.4g}",
                    f"{self.work.batch / median:.3g}",
                    f"{self.work.flops() / median / 1e12:.3g}",
                    f"{self._share(row, self.rate):.0%}",
                    *(f"{self._share(row, self.peak_rate):.1%}" for _ in mfu),
                    *_compilation(row.compilation),
                    "-" if row.peak is None else f"{row.peak.step / MEBI:,.0f}",
                )
            )
        return format_table(table)

    def _ratios(self) -> list[str]:
        first, *others = self.rows
        if not others:
            return []
        head = (f"{first.name} over", "ratio", "at 95 %", "least/least", "memory", "difference")
        table: list[tuple[str, ...]] = [head]
        for row in others:
            ratio, memory = self.ratio(row), self.memory_ratio(row)
            figures = ("DIFFERS", "-", "-")
            if ratio is not None:
                figures = (f"{ratio.median:.3f}", str(ratio.rounds), f"{ratio.least:.3f}")
            memory = "-" if memory is None else f"{memory:.3f}"
            table.append((row.name, *figures, memory, str(row.agreement)))
        return format_table(table)

    def _bound(self) -> list[str]:
        bound = f"one large product: {self.rate / 1e12:.3g} TFLOP/s"
        if self.products is not None and self.over_products is not None:
            bound += (
                f"; this work's products alone: {self.products.median:.4g} s, "
                f"+-{self.products.spread:.0%}, {self.rows[0].name} takes "
                f"{self.over_products:.2f} times that"
            )
        return [bound]


def _bounds(interval: Interval) -> tuple[float, float] | None:
    if interval.low is None or interval.high is None:
        return None
    return interval.low, interval.high


def _compilation(compilation: Compilation | None) -> tuple[str, str]:
    """Seconds of tracing with lowering, and of the compiler; PyTorch's are one figure."""
    if compilation is None:
        return "-", "-"
    cached = " (cache)" * compilation.cached
    if compilation.xla_seconds is None:
        return "-", f"{compilation.seconds:.1f}{cached}"
    before = (compilation.trace_seconds or 0) + (compilation.lower_seconds or 0)
    return f"{before:.1f}", f"{compilation.xla_seconds:.1f}{cached}"
