# SPDX-License-Identifier: Apache-2.0
"""Times a work on several sides, from weights to figures."""

import dataclasses
import gc
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from vivit_jax.benchmark.agreement import Agreement, Computed, agreement, is_rounded
from vivit_jax.benchmark.measure import QUICK_LOOK, Rounds, Timings, alternate
from vivit_jax.benchmark.memory import Peak, peak_memory
from vivit_jax.benchmark.products import ProductsAlone, large_product, products_of
from vivit_jax.benchmark.report import Comparison, Row
from vivit_jax.benchmark.sides import OURS, JaxSide, Side, TorchSide, write_weights
from vivit_jax.benchmark.work import Work, program
from vivit_jax.errors import UserError, first_line
from vivit_jax.layers.platform import platform

_REPORT = 10  # rounds between the progress lines of --rounds-until


def compare(
    work: Work,
    attention: Sequence[str] = ("auto",),
    variants: Sequence[str] = (),
    rounds: Rounds = QUICK_LOOK,
    *,
    memory: bool = True,
    products: bool = True,
    peak_rate: float | None = None,
) -> Comparison:
    """Time a work with each of our attentions and each variant of PyTorch, on the same weights.

    A variant that cannot run is left out and named in `failures`; one that computes another
    function gets no ratio. `rounds` with `until` watch the ratios, or the first row's time if there
    are none. `products` are timed on a CPU only, where they bound the work. Raises UserError if
    this library cannot run the work.
    """
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "weights"
        write_weights(work, directory)
        sides, failures = _sides(work, directory, attention, variants), []
        # Memory comes before any side is warm, since the processes that measure it need room.
        peaks = _peaks(sides, directory, failures) if memory else {}
        agreements = _warm_up(work, sides, directory, failures)
        large = large_product(work.config.dtype)
        alone = _products_alone(sides[0].work) if products and platform() == "cpu" else None
        measured = alternate(
            [*sides, large, *([alone] if alone else [])],
            rounds,
            _reach([side.name for side in sides], agreements, rounds),
        )
        timings = measured.timings
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
    return Comparison(
        *(ours, rows, rate, bound, tuple(failures), peak_rate),
        *(rounds, measured.reach, measured.busy),
    )


def _sides(
    work: Work, directory: Path, attention: Sequence[str], variants: Sequence[str]
) -> list[Side]:
    sides: list[Side] = []
    for name in attention:
        config = dataclasses.replace(work.config, attention=name)
        label = OURS if len(attention) == 1 else f"{OURS} {name}"
        sides.append(JaxSide(dataclasses.replace(work, config=config), directory, label))
    return sides + [TorchSide(work, directory, variant) for variant in variants]


def _peaks(sides: Sequence[Side], directory: Path, failures: list[str]) -> dict[str, Peak]:
    """Memory by side; reasons of those that failed are added to `failures`."""
    peaks = {}
    for side in sides:
        try:
            peaks[side.name] = peak_memory(side.work, side.name, directory)
        except (UserError, OSError) as error:
            failures.append(f"{first_line(error)}; --no-peak-memory leaves it out")
    return peaks


def _warm_up(
    work: Work, sides: list[Side], directory: Path, failures: list[str]
) -> dict[str, Agreement]:
    """Compile every side and compare its first step with the first side's.

    A side that cannot run is removed from `sides`, and its reason added to `failures`.
    """
    exact = _in_float32(work, directory) if len(sides) > 1 and is_rounded(work) else None
    agreements, first = {}, None
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
    return agreements


def _reach(
    names: Sequence[str], agreements: dict[str, Agreement], rounds: Rounds
) -> Callable[[Timings], float | None]:
    """The widest reach of the ratios' intervals; without ratios, that of the first side's time."""
    first, *others = names
    compared = [name for name in others if agreements[name].holds]

    def reach(timings: Timings) -> float | None:
        mine = timings[first]
        intervals = [mine.over(timings[name]).rounds for name in compared] or [mine.interval]
        known = [found for interval in intervals if (found := interval.reach) is not None]
        farthest = max(known) if len(known) == len(intervals) else None
        done = len(mine.seconds)
        if rounds.until is not None and farthest is not None and done % _REPORT == 0:
            text = f"{done} rounds, +-{farthest:.2%}, until +-{100 * rounds.until:g}%"
            print(text, file=sys.stderr, flush=True)
        return farthest

    return reach


def _first_step(side: Side) -> Computed:
    output = side.warm_up()
    return output, side.moments()


def _in_float32(work: Work, directory: Path) -> Computed:
    """What this library computes in full float32."""
    config = dataclasses.replace(work.config, dtype="float32", param_dtype="float32")
    config = dataclasses.replace(config, attention="auto")
    with jax.default_matmul_precision("highest"):
        return _first_step(JaxSide(dataclasses.replace(work, config=config), directory))


def _products_alone(work: Work) -> ProductsAlone:
    made = program(work)
    return ProductsAlone(products_of(made.step, made.state, made.inputs))
