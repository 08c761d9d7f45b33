# SPDX-License-Identifier: Apache-2.0
"""A video's frames in order, one at a time, of which few are held.

Frame k is that of `vivit_jax.data.decode`, bit for bit: what decoding the file from its start
yields, turned as its display matrix says, up to the first packet that cannot be decoded.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from vivit_jax.data.decode import (
    FromStart,
    checked_path,
    displayed,
    duration_of,
    open_video,
    packet_table,
    refuse_damaged,
    refuse_sizes,
    shortage,
)
from vivit_jax.data.packets import TIMED_CONTAINERS, warn_of_damage


class StreamedFrame:
    """A frame of a `FrameStream`, decoded; its pixels are converted where they are asked for.

    Attributes:
        index: number of the frame, from 0.
        seconds: when it is shown, counted from frame 0.
    """

    def __init__(self, stream: "FrameStream", frame, index: int, seconds: float):
        self.index, self.seconds = index, seconds
        self._stream, self._frame = stream, frame

    def image(self) -> np.ndarray:
        """uint8 [h, w, 3], RGB, as `read_video` gives it.

        Raises VideoError for a frame that is damaged, or of another size than those before it.
        """
        name = self._stream.name
        if self._frame.is_corrupt:
            refuse_damaged(name, [self.index], [self.index])
        image = displayed(name, self._frame)
        shapes = self._stream.shapes
        shapes.setdefault(image.shape[:2], self.index)
        refuse_sizes(name, shapes)
        return image


class FrameStream:
    """The frames of a video file in order: iterate to decode them, from the start each time.

    Seconds are the container's presentation times, counted from frame 0, so they follow a variable
    frame rate. A container that has none that are known to be right (all but mp4/mov and
    Matroska/WebM) is taken to have the constant rate it states. A frame without a time is at nan.

    A damaged file is read up to the first packet that is cut off or cannot be decoded, and a
    warning says how many frames that leaves; another warns of damaged frames that were passed over.
    Which of a damaged h264 file's frames FFmpeg marks as damaged depends on its threads' timing.

    Attributes:
        name: path of the file.
        announced: frames that its packets should give, for a progress bar; fewer may be decodable.
        fps: average frames per second, nan where the container does not say.

    Raises VideoError where the path is not a readable video file, UserError where it is no path.
    """

    def __init__(self, path):
        self.name = checked_path(path)
        self._table = packet_table(self.name)
        with open_video(self.name) as (container, stream):
            self._time_base = stream.time_base
            self._timed = container.format.name in TIMED_CONTAINERS
            rate = stream.average_rate or stream.guessed_rate
        self.announced = self._table.packets - self._table.discarded
        self.fps = float(rate) if rate else float("nan")
        times = self._table.pts
        if self._timed and self._table.distrust is None and len(times) > 1:
            self.fps = len(times) / duration_of(times, self._table, self._time_base)
        self.shapes: dict[tuple[int, ...], int] = {}  # of the frames seen: (h, w) -> the first
        self._cut = False

    def __iter__(self) -> Iterator[StreamedFrame]:
        self.shapes.clear()
        first, done, damaged = None, 0, []
        decoding = FromStart(self.name, self._table)
        for index, frame in decoding:
            if index < done:  # given before an error made the decoder begin again
                continue
            done = index + 1
            first = frame.pts if index == 0 else first
            if frame.is_corrupt:
                damaged.append(index)
            yield StreamedFrame(self, frame, index, self._seconds(frame, index, first))
        self._cut = decoding.cut
        warn_of_damage(self.name, damaged)

    def shortage(self, total: int) -> str:
        """Ends the message that its `total` frames are too few, if that is because of damage."""
        return shortage(self._table, total, self._cut)

    def _seconds(self, frame, index: int, first: int | None) -> float:
        if not self._timed:
            return index / self.fps
        if frame.pts is None or first is None:
            return float("nan")
        return float((frame.pts - first) * self._time_base)


def read_ahead(items: Generator, ahead: int) -> Iterator[Any]:
    """What a generator yields, made in a thread of its own, `ahead` of where it is taken at most.

    What making them raises is raised here, after the items before it. The thread ends with the
    iterator, also where that is closed early.
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
        except BaseException as error:  # whatever it is, it belongs to who takes the items
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
