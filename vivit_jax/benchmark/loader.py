# SPDX-License-Identifier: Apache-2.0
"""Training clips per second from the loader alone."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vivit_jax.benchmark.lock import Held, measure_lock
from vivit_jax.benchmark.measure import Timing
from vivit_jax.data.datasets.dataset import Dataset, Example
from vivit_jax.data.pipeline import Batches, ClipShape
from vivit_jax.data.settings import DataSettings
from vivit_jax.errors import UserError
from vivit_jax.recipes import model_config
from vivit_jax.recipes.recipe import Recipe

# More names than files whose packets `read_video` remembers: most count as new files.
NAMES = 512
# Batches before the clock starts, while threads and processes start.
_WARM = 3


@dataclasses.dataclass(frozen=True)
class LoaderRate:
    """The rate at which batches of a recipe's clips are read, decoded and augmented."""

    recipe: str
    clip: tuple[int, ...]  # t, h, w, c
    batch: int  # videos
    repeats: int  # clips of each
    threads: int
    workers: int
    start_seconds: float  # until the first batch
    rounds: Timing  # of a batch each
    cpu_seconds: float | None  # of this process, over the rounds; None if others read

    @property
    def videos_per_second(self) -> float:
        """Over all rounds, because batches come in bursts."""
        return self.batch * len(self.rounds.seconds) / sum(self.rounds.seconds)

    @property
    def clips_per_second(self) -> float:
        """Videos per second times the repeats of each."""
        return self.repeats * self.videos_per_second

    @property
    def cpu_per_clip(self) -> float | None:
        """CPU seconds; less disturbed by other programs than the time."""
        clips = self.batch * self.repeats * len(self.rounds.seconds)
        return None if self.cpu_seconds is None else self.cpu_seconds / clips

    def __str__(self) -> str:
        repeats = f" x {self.repeats} repeats" if self.repeats > 1 else ""
        cpu = self.cpu_per_clip
        return (
            f"--threads {self.threads} --workers {self.workers} --batch {self.batch}{repeats}; "
            f"{len(self.rounds.seconds)} batches timed\n"
            f"  {self.clips_per_second:.2f} clips/s, {self.videos_per_second:.2f} videos/s "
            f"(batches +-{self.rounds.spread:.0%})"
            f"{'' if cpu is None else f', {1e3 * cpu:.0f} ms of CPU a clip'}; "
            f"first batch after {self.start_seconds:.1f} s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        values["rounds"] |= {"median": self.rounds.median, "spread": self.rounds.spread}
        return values | {
            "videos_per_second": self.videos_per_second,
            "clips_per_second": self.clips_per_second,
            "cpu_per_clip": self.cpu_per_clip,
        }


def many_names(path: Path) -> tuple[Path, ...]:
    """NAMES links to a file, beside it."""
    links = tuple(path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(NAMES))
    for link in links:
        os.link(path, link)
    return links


def measure_loader(
    videos: Sequence[str | Path],
    recipe: Recipe,
    *,
    batch: int,
    threads: int,
    workers: int,
    rounds: int,
    seed: int = 0,
) -> LoaderRate:
    """Time `rounds` batches of a recipe's clips; fewer videos than a batch are repeated.

    Raises UserError if a video cannot be read: skipping it would change the rate.
    """
    data, source = _batches(videos, recipe, batch, threads, workers, seed)
    seconds = []
    with source:

        def batch_shape() -> tuple[int, ...]:
            start = time.perf_counter()
            shape = next(source)["clips"].shape
            seconds.append(time.perf_counter() - start)
            if source.bad:
                raise UserError("; ".join(source.bad.values()))
            return shape

        start = time.perf_counter()
        shape = batch_shape()
        first = time.perf_counter() - start
        for _ in range(_WARM - 1):
            batch_shape()
        cpu = time.process_time()
        for _ in range(rounds):
            batch_shape()
        cpu = time.process_time() - cpu
    return LoaderRate(
        recipe.name,
        shape[1:],
        batch,
        data.repeats,
        threads,
        workers,
        first,
        Timing(tuple(seconds[_WARM:])),
        None if workers else cpu,
    )


def measure_reading(videos: Sequence[str | Path], recipe: Recipe, count: int = 6) -> Held:
    """The processor time of reading and augmenting one video, and what holds the GIL of it.

    Raises UserError if a video cannot be read.
    """
    _, source = _batches(videos, recipe, 1, 1, 0, seed=0)

    def read(number: int) -> None:
        for why in dict(source.read(number)["bad"]).values():
            raise UserError(why)

    with source:
        return measure_lock(read, count)


def _batches(
    videos: Sequence[str | Path], recipe: Recipe, batch: int, threads: int, workers: int, seed: int
) -> tuple[DataSettings, Batches]:
    config = model_config(recipe)
    times = -(-batch // len(videos))
    examples = tuple(Example(str(path), None) for path in videos) * times
    data = dataclasses.replace(recipe.data, threads=threads, workers=workers, cache_gib=0.0)
    source = Batches(
        Dataset(examples, None, "the videos"),
        data,
        recipe.augment,
        shape=ClipShape(config.num_frames, config.frame_size, config.num_channels),
        batch_size=batch,
        seed=seed,
        labelled=False,
    )
    return data, source
