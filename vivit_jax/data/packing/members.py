# SPDX-License-Identifier: Apache-2.0
"""The clips of a data set as members of shards: each a file, read once to see that it can be."""

import collections
import dataclasses
import functools
import io
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from vivit_jax.data.datasets.dataset import (
    Dataset,
    Example,
    ObjectExample,
    count_frames,
    stored_clip,
)
from vivit_jax.data.datasets.folders import ending
from vivit_jax.data.datasets.tar_members import CLIPS, PICTURES
from vivit_jax.data.datasets.zipped import ZippedPictures, zipped
from vivit_jax.data.one_clip import one_clip
from vivit_jax.data.video.images import is_webp
from vivit_jax.data.video.transcode import transcoded
from vivit_jax.errors import VideoError
from vivit_jax.files.reading import content, opened, size_of


@dataclasses.dataclass(frozen=True)
class Member:
    """A clip's file.

    Attributes:
        index: the clip's place in the data set.
        ending: of its name, with the dot.
        source: the path of the file, or its content.
        size: its bytes.
        extent: first frame and number of frames if the clip is a part of the file.
    """

    index: int
    ending: str
    source: str | bytes
    size: int
    extent: tuple[int, int] | None

    def opened(self) -> BinaryIO:
        """The content, from its first byte."""
        return opened(self.source) if isinstance(self.source, str) else io.BytesIO(self.source)


def members(
    dataset: Dataset, first: int, resize: int | None, threads: int
) -> Generator[tuple[int, Member | VideoError], None, None]:
    """The members of the clips from `first` on in their order, made by `threads` at once.

    A clip that cannot be read gives its error. With `resize` videos whose short side is longer are
    encoded again; arrays and folders of pictures stay as they are.
    """
    make = functools.partial(_member, dataset, resize)
    with ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[tuple[int, Future]] = collections.deque()
        try:
            for index in range(first, len(dataset)):
                waiting.append((index, pool.submit(make, index)))
                if len(waiting) > 2 * threads:
                    number, made = waiting.popleft()
                    yield number, made.result()
            while waiting:
                number, made = waiting.popleft()
                yield number, made.result()
        finally:
            for _, each in waiting:
                each.cancel()


def _member(dataset: Dataset, resize: int | None, index: int) -> Member | VideoError:
    example = dataset.examples[index]
    try:
        with one_clip(example.path):
            count_frames(example)
            return _made(example, resize, index)
    except VideoError as error:
        return error


def _made(example: Example, resize: int | None, index: int) -> Member:
    example, stored = stored_clip(example)
    path = example.path
    if stored is not None and not isinstance(stored, np.ndarray | ZippedPictures):
        data = zipped([_content(stored[k]) for k in range(len(stored))])
        return Member(index, PICTURES, data, len(data), None)
    if isinstance(example, ObjectExample):
        raise VideoError(f"{path}: frames in memory; pack the files that they come from")
    kind = ending(path)
    if kind not in CLIPS:
        if not is_webp(path):
            raise VideoError(f"{path}: ends in {kind!r}; expected one of {', '.join(CLIPS)}")
        kind = ".webp"
    extent = None
    if example.start or example.total is not None:
        extent = example.start, -1 if example.total is None else example.total
    smaller = transcoded(path, resize) if resize is not None and stored is None else None
    if smaller is not None:
        return Member(index, ".mp4", smaller, len(smaller), extent)
    return Member(index, kind, path, size_of(path), extent)


def _content(picture: str | bytes) -> bytes:
    try:
        return content(picture) if isinstance(picture, str) else picture
    except OSError as error:
        raise VideoError(f"{picture}: {error.strerror}") from None
