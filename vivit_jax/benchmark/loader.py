# SPDX-License-Identifier: Apache-2.0
"""How many training clips a second the loader gives where nothing else waits for them."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from vivit_jax.benchmark.measure import Timing
from vivit_jax.data.datasets.dataset import Dataset, Example
from vivit_jax.data.pipeline import Batches, ClipShape
from vivit_jax.errors import UserError
from vivit_jax.recipes import model_config
from vivit_jax.recipes.recipe import Recipe

# More names than files whose packets `read_video` remembers, so that most are read as new ones.
NAMES = 512
# Batches before the clock runs: the first ones are read while threads and processes start.
_WARM = 3


@dataclasses.dataclass(frozen=True)
class LoaderRate:
    """Batches of a recipe's clips: read, decoded and augmented, and then thrown away."""

    recipe: str
    clip: tuple[int, ...]  # t, h, w, c
    batch: int  # videos
    repeats: int  # clips of each
    threads: int
    workers: int
    start_seconds: float  # until the first batch was there
    rounds: Timing  # of a batch each
    cpu_seconds: float | None  # of this process, over the rounds; None where others read

    @property
    def videos_per_second(self) -> float:
        """Over all rounds: batches come in bursts, of which no single one is the rate."""
        return self.batch * len(self.rounds.seconds) / sum(self.rounds.seconds)

    @property
    def clips_per_second(self) -> float:
        """The same in clips, repeats counted."""
        return self.repeats * self.videos_per_second

    @property
    def cpu_per_clip(self) -> float | None:
        """Seconds, which other programs on the machine disturb less."""
        clips = self.batch * self.repeats * len(self.rounds.seconds)
        return None if self.cpu_seconds is None else self.cpu_seconds / clips

    def to_dict(self) -> dict:
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
    videos: Sequence[Path],
    recipe: Recipe,
    *,
    batch: int,
    threads: int,
    workers: int,
    rounds: int,
    seed: int = 0,
) -> LoaderRate:
    """Time `rounds` batches of a recipe's clips; videos fewer than a batch are taken repeatedly.

    Raises UserError where a video cannot be read: it would be left out, and what is left out takes
    other time.
    """
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
    seconds, start = [], time.perf_counter()
    with source:
        for i in range(_WARM + rounds):
            if i == _WARM:
                cpu = time.process_time()
            before = time.perf_counter()
            clips = next(source)["clips"]
            seconds.append(time.perf_counter() - before)
            if not i:
                first = time.perf_counter() - start
            if source.bad:
                raise UserError("; ".join(source.bad.values()))
        cpu = time.process_time() - cpu
    return LoaderRate(
        recipe.name,
        clips.shape[1:],
        batch,
        data.repeats,
        threads,
        workers,
        first,
        Timing(tuple(seconds[_WARM:])),
        None if workers else cpu,
    )
