# SPDX-License-Identifier: Apache-2.0
"""The loader's rates by threads and processes, and the cores that the hosts of a plan need."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vivit_jax.benchmark.loader import LoaderRate, measure_loader, measure_reading
from vivit_jax.benchmark.lock import Held
from vivit_jax.errors import UserError, counted
from vivit_jax.files.json_files import read_json
from vivit_jax.progress import format_table
from vivit_jax.recipes.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Hosts:
    """What a plan asks of each host."""

    topology: str
    count: int
    videos_per_second: float  # of one

    def needed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Prints and returns the cores that each host needs, by the figures of `time_loader`."""
        seconds = values["reading"]["cpu_seconds"]
        cores = seconds * self.videos_per_second
        print(
            f"{self.topology}: each of {counted(self.count, 'host')} reads "
            f"{self.videos_per_second:.1f} videos/s: {cores:.1f} cores like this one at "
            f"{1e3 * seconds:.0f} ms of CPU a video"
        )
        return dataclasses.asdict(self) | {"cores": cores}


def read_hosts(path: Path, recipe: str) -> Hosts:
    """The hosts of a file of `vivit-jax plan --json`.

    Raises UserError for another file, and for a plan of another recipe.
    """
    hint = "pass a file of vivit-jax plan --json"
    try:
        plan = read_json(str(path), hint=hint)
    except OSError as error:
        raise UserError(f"--plan {path}: {error.strerror}; {hint}") from None
    try:
        hosts = Hosts(plan["topology"], int(plan["hosts"]), float(plan["host_videos_per_second"]))
        planned = plan["recipe"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"--plan {path} is no plan: expected a file of vivit-jax plan --json, with topology, "
            "hosts, host_videos_per_second and recipe"
        ) from None
    if planned != recipe:
        raise UserError(f"--plan {path} is of recipe {planned}, not {recipe}; pass it as --recipe")
    return hosts


def time_loader(
    videos: Sequence[str | Path],
    recipe: Recipe,
    sides: Sequence[tuple[int, int]],
    *,
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """Prints the rates of (threads, workers) and what holds the lock; returns them as values.

    Raises UserError if a video cannot be read.
    """
    rates = []
    for threads, workers in sides:
        rates.append(
            measure_loader(
                videos, recipe, batch=batch, threads=threads, workers=workers, rounds=rounds
            )
        )
        if len(sides) == 1:
            print(f"  {rates[0]}", flush=True)
    if len(sides) > 1:
        print("\n".join(f"  {line}" for line in _rows(rates)), flush=True)
    held = measure_reading(videos, recipe)
    print(f"  {_lock_text(held)}")
    return {
        "loader": rates[0].to_dict(),
        "loaders": [rate.to_dict() for rate in rates],
        "reading": dataclasses.asdict(held),
    }


def _rows(rates: Sequence[LoaderRate]) -> list[str]:
    rows = [("--threads", "--workers", "clips/s", "+-", "ms of CPU/clip", "first batch, s")]
    for rate in rates:
        cpu = "" if rate.cpu_per_clip is None else f"{1e3 * rate.cpu_per_clip:.0f}"
        rows.append(
            (
                str(rate.threads),
                str(rate.workers),
                f"{rate.clips_per_second:.2f}",
                f"{rate.rounds.spread:.0%}",
                cpu,
                f"{rate.start_seconds:.1f}",
            )
        )
    return format_table(rows)


def _lock_text(held: Held) -> str:
    text = f"a video: {1e3 * held.cpu_seconds:.0f} ms of CPU"
    if held.busy is None or held.share is None:
        return f"{text}; what of it holds Python's lock needs a second core to be seen"
    most = f", so at most {1 / held.share:.1f} cores in a process" if held.share > 0.01 else ""
    return (
        f"{text}; {held.threads} threads keep {held.busy:.2f} cores busy, "
        f"as if {held.share:.0%} of the time held Python's lock{most}"
    )
