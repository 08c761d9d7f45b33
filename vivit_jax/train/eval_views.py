# SPDX-License-Identifier: Apache-2.0
"""Views of test videos in batches, equally many for every process."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vivit_jax.data.datasets.dataset import Dataset, Example, read_views
from vivit_jax.data.one_clip import one_clip
from vivit_jax.data.read_clip import crop_rounding
from vivit_jax.data.transforms.augment import resize_shortest, three_crops
from vivit_jax.errors import VideoError, counted
from vivit_jax.recipes.recipe import EvalSettings


@dataclasses.dataclass
class Views:
    """The views of this process's share of a data set: every `count`-th video from `index` on.

    Iterating gives uint8 [batch_size, t, h, w, c] in the order of the videos, with a video's views
    together. `found` collects (frame indices [clips, t], None) or (None, why it cannot be read) of
    each video. Unreadable videos and the rest of the last batch are black, so that all processes
    take `steps` batches.
    """

    dataset: Dataset
    config: Any  # of the model
    settings: EvalSettings
    batch_size: int
    index: int = 0
    count: int = 1
    threads: int = 2

    def __post_init__(self):
        self.found: list[tuple[np.ndarray | None, str | None]] = []
        self.videos = -(-len(self.dataset) // self.count)  # of the process that has the most
        self.each = self.settings.clips * self.settings.crops
        self.steps = -(-self.videos * self.each // self.batch_size)

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "b t h w c"]]:
        config, videos = self.config, self._read()
        shape = (config.num_frames, *config.frame_size, config.num_channels)
        black = np.zeros(shape, np.uint8)
        waiting: list[np.ndarray] = []
        for _ in range(self.steps):
            while len(waiting) < self.batch_size:
                video = next(videos, None)
                if video is None:
                    waiting += [black] * (self.batch_size - len(waiting))
                    break
                clips, indices, error = video
                self.found.append((indices, error))
                waiting += [black] * self.each if clips is None else [*clips]
            yield np.stack(waiting[: self.batch_size])
            waiting = waiting[self.batch_size :]

    def _read(self) -> Iterator:
        """(uint8 [views, t, h, w, c] or None, indices or None, error or None) for each video."""
        import grain.python as grain

        config, settings = self.config, self.settings
        rounding = crop_rounding(settings.sampler)

        def views_of(example: Example) -> tuple[np.ndarray, np.ndarray]:
            frames, indices = read_views(
                example,
                num_frames=config.num_frames,
                stride=settings.stride,
                sampler=settings.sampler,
                clips=settings.clips,
            )
            if frames.shape[-1] != config.num_channels:
                raise VideoError(
                    f"{example.path} has {counted(frames.shape[-1], 'channel')}, the model takes "
                    f"{config.num_channels}"
                )
            crops = [
                three_crops(
                    resize_shortest(clip, settings.resize),
                    config.frame_size,
                    settings.crops,
                    rounding=rounding,
                )
                for clip in frames
            ]
            return np.concatenate(crops), indices

        def read(example: Example):
            try:
                with one_clip(example.path):
                    return *views_of(example), None
            except VideoError as error:
                return None, None, str(error)

        share = self.dataset.examples[self.index :: self.count]
        if not share:
            return iter(())
        ahead = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        return iter(grain.MapDataset.source(share).map(read).to_iter_dataset(ahead))
