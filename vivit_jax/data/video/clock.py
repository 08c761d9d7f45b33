# SPDX-License-Identifier: Apache-2.0
"""When the frames of a video are shown, in seconds from frame 0.

The times are the container's presentation times, so they follow a variable frame rate:

- of mp4/mov and Matroska/WebM files whose packets number the frames, the packets' sorted times;
- of avi with pictures that are stored in another order than shown, the packets' places, which are
  decoding times: frame k is shown when packet k + d is decoded, d being how many frames the decoder
  holds back. avi counts ticks, of which one that repeats a picture has no packet;
- else the times that the decoded frames carry. A frame without one follows the frame before it by
  the frame's duration, or the rate that the container states. Times that go back, where streams
  were joined, go on from there; so do those of transport and program streams that leap by more than
  ten seconds (the threshold of FFmpeg's command line).
"""

from fractions import Fraction

import numpy as np

from vivit_jax.data.video.packets import Table, least_step

_LEAP = 10  # seconds


def stated_rate(stream) -> Fraction | None:
    """Frames per second where no frame has a time; None where nothing states it.

    FFmpeg's guess comes first: the average counts fields, ticks or bytes in some containers (twice
    the rate for avi copied from other containers, 60000 for dv).
    """
    rate = stream.guessed_rate or stream.average_rate
    return Fraction(rate.numerator, rate.denominator) if rate else None


class Clock:
    """Times of the frames of a stream that is decoded from its start, asked for in their order.

    Where `known` is set they are asked for in any order, with no frames.

    Attributes:
        known: whether the packets say them.
        joins: numbers of frames at which they go back or leap, and go on from there.
    """

    def __init__(self, table: Table, stream):
        rate = stated_rate(stream)
        self._unit = Fraction(stream.time_base.numerator, stream.time_base.denominator)
        self._stated = 1 / (rate * self._unit) if rate else None
        self._leap = _LEAP / self._unit if table.lossy else None
        self._places = self._last_step = None
        if table.distrust is None:
            self._places, self._last_step = np.sort(table.pts), table.last_duration
        elif len(table.stored):
            self._last_step = least_step(table.stored)
            context = stream.codec_context
            if context.has_b_frames:
                delay = int(getattr(context, "reorder_depth", 1))
                ending = table.stored[-1] + self._last_step * np.arange(1, delay + 1)
                self._places = np.concatenate([table.stored, ending])[delay:]
        self.known, self.joins = table.distrust is None, []
        self._index = self._shown = self._duration = None  # of the frame asked for last
        self._carries = None  # the last time that a frame carried, and where it lies from frame 0

    def seconds(self, index: int, frame=None, lost: int = 0) -> float:
        """When frame `index` is shown; nan if unknown. `lost` packets before it gave no frame."""
        if self._places is not None:
            place = min(index if self.known else index + lost, len(self._places) - 1)
            shown = Fraction(int(self._places[place] - self._places[0]))
        else:
            shown = self._carried(index, frame.pts)
        self._index, self._shown = index, shown
        self._duration = frame.duration if frame else None
        return float("nan") if shown is None else float(shown * self._unit)

    def end(self) -> float:
        """When the frame asked for last, the video's last, is over; nan if unknown."""
        step = self._last_step or self._step()
        if step is None or self._shown is None:
            return float("nan")
        return float((self._shown + step) * self._unit)

    def _carried(self, index: int, pts: int | None) -> Fraction | None:
        """Ticks from frame 0 to the next frame, which carries this time."""
        step = 0 if self._index is None else self._step()
        next_ = None if step is None else (self._shown or 0) + Fraction(step)
        if pts is None:
            return next_
        shown = next_
        if self._carries is not None:
            ahead = pts - self._carries[0]
            if ahead >= 0 and not (self._leap and ahead > self._leap):
                shown = self._carries[1] + ahead
            else:
                self.joins.append(index)
        if shown is not None:
            self._carries = pts, shown
        return shown

    def _step(self) -> Fraction | int | None:
        """Ticks that the frame asked for last stays, if the one after it does not say."""
        if self._shown is None:
            return None
        mean = self._shown / self._index if self._index else None
        return self._duration or mean or self._stated
