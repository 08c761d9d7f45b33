# SPDX-License-Identifier: Apache-2.0
"""A video's frames in order, one at a time, with few of them in memory.

Frame k is that of `vivit_jax.data.video.decode`, bit for bit.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from vivit_jax.data.video.decode import probe_video
from vivit_jax.data.video.images import AnimationStream, is_webp
from vivit_jax.data.video.log import warn_of_damage
from vivit_jax.data.video.opened import checked_path, packet_table
from vivit_jax.data.video.pictures import displayed, orientation, refuse_sizes
from vivit_jax.data.video.sequence import FromStart, refuse_damaged, shortage


class StreamedFrame:
    """A decoded frame of a `FrameStream`; its pixels are converted on demand.

    Attributes:
        index: number of the frame, from 0.
        seconds: when it is shown, counted from frame 0.
    """

    def __init__(self, stream: "FrameStream", frame, index: int, seconds: float):
        self.index, self.seconds = index, seconds
        self._stream, self._frame = stream, frame

    def image(self) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, RGB, as `read_video` returns them.

        Raises VideoError for a damaged frame, or one of another size than those before it.
        """
        name = self._stream.name
        self._refuse_damage()
        image = displayed(name, self._frame)
        shapes = self._stream.shapes
        shapes.setdefault(image.shape[:2], self.index)
        refuse_sizes(name, shapes)
        return image

    def stored(self) -> tuple[Any, Int[np.ndarray, "2 2"]]:
        """The decoded frame and its `pictures.orientation`. VideoError for a damaged one."""
        self._refuse_damage()
        return self._frame, orientation(self._stream.name, self._frame)

    def _refuse_damage(self) -> None:
        if self._frame.is_corrupt:
            name, lossy = self._stream.name, self._stream.table.lossy
            refuse_damaged(name, [self.index], [self.index], lossy)


class FrameStream:
    """The frames of a video file in order: iterate to decode them, from the start each time.

    Seconds are those of `vivit_jax.data.video.clock`, so they follow a variable frame rate. They
    are nan if the file states neither times nor a rate.

    Damaged files are treated as `vivit_jax.data.video.decode` says, with one warning for what is
    lost and another for damaged frames that were skipped.

    Attributes:
        name: path of the file.
        announced: frames that its packets should give, for a progress bar; fewer may be decodable.

    Raises VideoError if the path is not a readable video file, UserError if it is not a path.
    """

    def __init__(self, path):
        self.name = checked_path(path)
        self.table = packet_table(self.name)
        self.announced = self.table.packets - self.table.discarded
        self.shapes: dict[tuple[int, ...], int] = {}  # (h, w) -> the first frame of that size
        self._cut = False

    @property
    def fps(self) -> float:
        """Average frames per second, nan where unknown; decodes what `probe_video` decodes."""
        return probe_video(self.name).fps

    def __iter__(self) -> Iterator[StreamedFrame]:
        self.shapes.clear()
        done, damaged = 0, []
        decoding = FromStart(self.name, self.table)
        for index, frame, seconds in decoding:
            if index < done:  # already given, before damage made the decoder start again
                continue
            done = index + 1
            if frame.is_corrupt:
                damaged.append(index)
            yield StreamedFrame(self, frame, index, seconds)
        self._cut = decoding.cut
        warn_of_damage(self.name, damaged, returned=self.table.lossy)

    def shortage(self, total: int) -> str:
        """The end of the message about too few frames, if damage is the cause; else empty."""
        return shortage(self.table, total, self._cut)


def open_stream(path) -> FrameStream | AnimationStream:
    """The frames of a video file, or of an animated WebP. Raises as `FrameStream`."""
    name = checked_path(path)
    return AnimationStream(name) if is_webp(name) else FrameStream(name)


def read_ahead(items: Generator, ahead: int) -> Generator[Any, None, None]:
    """The items of a generator, which runs in a thread of its own, at most `ahead` items ahead.

    An exception of the generator is raised here, after the items before it. The thread ends with
    the iterator, even if that is closed early.
    """
    waiting: queue.Queue = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item, error, more) -> bool:
        while not stopped.is_set():
            try:
                waiting.put((item, error, more), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run():
        try:
            for item in items:
                if not put(item, None, True):
                    return
            put(None, None, False)
        except BaseException as error:  # any exception belongs to the consumer
            put(None, error, False)
        finally:
            items.close()

    thread = threading.Thread(target=run, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error, more = waiting.get()
            if error is not None:
                raise error
            if not more:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
