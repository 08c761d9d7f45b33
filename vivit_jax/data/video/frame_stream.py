# SPDX-License-Identifier: Apache-2.0
"""A video's frames in order, one at a time, of which few are held.

Frame k is that of `vivit_jax.data.video.decode`, bit for bit: what decoding the file from its start
yields, turned as its display matrix says.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from vivit_jax.data.video.decode import probe_video
from vivit_jax.data.video.images import AnimationStream, is_webp
from vivit_jax.data.video.opened import checked_path, packet_table
from vivit_jax.data.video.packets import warn_of_damage
from vivit_jax.data.video.pictures import displayed, refuse_sizes
from vivit_jax.data.video.sequence import FromStart, refuse_damaged, shortage


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
            refuse_damaged(name, [self.index], [self.index], self._stream.table.lossy)
        image = displayed(name, self._frame)
        shapes = self._stream.shapes
        shapes.setdefault(image.shape[:2], self.index)
        refuse_sizes(name, shapes)
        return image


class FrameStream:
    """The frames of a video file in order: iterate to decode them, from the start each time.

    Seconds are those of `vivit_jax.data.video.clock`, so they follow a variable frame rate. Frames
    without a time, in a file that states no rate, are at nan.

    Damaged files are treated as `vivit_jax.data.video.decode` says: one warning for what is lost,
    another for damaged frames that were skipped.

    Attributes:
        name: path of the file.
        announced: frames that its packets should give, for a progress bar; fewer may be decodable.

    Raises VideoError where the path is not a readable video file, UserError where it is no path.
    """

    def __init__(self, path):
        self.name = checked_path(path)
        self.table = packet_table(self.name)
        self.announced = self.table.packets - self.table.discarded
        self.shapes: dict[tuple[int, ...], int] = {}  # of the frames seen: (h, w) -> the first
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
            if index < done:  # given before damage made the decoder begin again
                continue
            done = index + 1
            if frame.is_corrupt:
                damaged.append(index)
            yield StreamedFrame(self, frame, index, seconds)
        self._cut = decoding.cut
        warn_of_damage(self.name, damaged, shown=self.table.lossy)

    def shortage(self, total: int) -> str:
        """Ends the message that its `total` frames are too few, if that is because of damage."""
        return shortage(self.table, total, self._cut)


def open_stream(path) -> FrameStream | AnimationStream:
    """The frames of a video file, or of an animated WebP. Raises as `FrameStream`."""
    name = checked_path(path)
    return AnimationStream(name) if is_webp(name) else FrameStream(name)


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
