# SPDX-License-Identifier: Apache-2.0
"""Keeps whole decoded videos in memory while there is room."""

import contextlib
import threading
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from vivit_jax.data.datasets.dataset import Example, read_whole
from vivit_jax.data.one_clip import one_clip
from vivit_jax.errors import VideoError


class VideoCache:
    """Whole decoded videos, kept while there is room for `room` bytes; each process has its own.

    A video with undecodable frames is not kept: whether a clip of it is refused depends on which
    frames it has.
    """

    def __init__(self, room: float):
        self.room, self._whole_room = room, room
        self._videos: dict[Example, np.ndarray | None] = {}
        self._underway: set[Example] = set()
        self._changed = threading.Condition()
        self._filler: threading.Thread | None = None
        self._stopped = threading.Event()

    def __reduce__(self):
        return VideoCache, (self._whole_room,)

    def video(self, example: Example) -> UInt8[np.ndarray, "t h w c"] | None:
        """All frames of an example; None if there is no room, or if not all can be read."""
        with self._changed:
            self._changed.wait_for(lambda: example not in self._underway)
            if example in self._videos or self.room <= 0:
                return self._videos.get(example)
            self._underway.add(example)
        video = None
        try:
            # The clip that is wanted may lie before the damage.
            with contextlib.suppress(VideoError), one_clip(example.path):
                video = read_whole(example)
        finally:
            with self._changed:
                # A video's size is known once it is decoded, so the last one may exceed the room.
                self.room -= 0 if video is None else video.nbytes
                self._videos[example] = video
                self._underway.discard(example)
                self._changed.notify_all()
        return video

    def fill(self, examples: Iterable[Example]) -> None:
        """Decode videos in the background, until there is no room or `stop` is called.

        This gives the first pass over the clips a head start while the step compiles.
        """

        def run():
            for example in examples:
                if self._stopped.is_set() or self.room <= 0:
                    return
                if example not in self._underway:
                    self.video(example)

        self._stopped.clear()
        self._filler = threading.Thread(target=run, name="decode ahead", daemon=True)
        self._filler.start()

    def clear(self) -> None:
        """Drop all videos; no thread may be reading."""
        self.room = self._whole_room
        self._videos.clear()

    def stop(self) -> None:
        """End `fill` after the video that it is decoding."""
        if self._filler is not None:
            self._stopped.set()
            self._filler.join()
            self._filler = None
