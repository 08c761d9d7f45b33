# SPDX-License-Identifier: Apache-2.0
"""When the frames of a video are shown, in seconds from frame 0.

The times are the container's presentation times, so they follow a variable frame rate. They are

- for mp4/mov and Matroska/WebM files whose packets number the frames, the packets' sorted times;
- for avi with reordered pictures, the packets' decoding times: frame k is shown when packet k + d
  is decoded, d being how many frames the decoder holds back. avi counts ticks; one that repeats a
  picture has no packet;
- otherwise the times of the decoded frames. A frame without a time follows the one before it by
  that frame's duration, or by the container's frame rate. Where times go back, as where streams
  were joined, they continue from there; so do times of transport and program streams that leap by
  more than ten seconds (the threshold of FFmpeg's command line).
"""

from fractions import Fraction

import numpy as np

from vivit_jax.data.video.packets import Table, least_step

_LEAP = 10  # seconds


def stated_rate(stream) -> Fraction | None:
    """The stated frames per second, None if nothing states them.

    FFmpeg's guess comes first: in some containers the average counts fields, ticks or bytes (twice
    the rate for avi copied from other containers, 60000 for dv).
    """
    rate = stream.guessed_rate or stream.average_rate
    return Fraction(rate.numerator, rate.denominator) if rate else None


class Clock:
    """Times of the frames of a stream that is decoded from its start, to be asked for in order.

    If `known`, they can be asked for in any order, and without frames.

    Attributes:
        known: whether the packets state them.
        joins: numbers of the frames at which they go back or leap, and continue from there.
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
        self._carries = None  # the last time that a frame carried, and its distance from frame 0

    def seconds(self, index: int, frame=None, lost: int = 0) -> float:
        """When frame `index` is shown, nan if unknown; `lost` packets before it gave no frame."""
        if self._places is not None:
            place = min(index if self.known else index + lost, len(self._places) - 1)
            shown = Fraction(int(self._places[place] - self._places[0]))
        else:
            assert frame is not None, "times that the packets do not state are read from frames"
            shown = self._carried(index, frame.pts)
        self._index, self._shown = index, shown
        self._duration = frame.duration if frame else None
        return float("nan") if shown is None else float(shown * self._unit)

    def end(self) -> float:
        """When the frame asked for last, which is the video's last, ends; nan if unknown."""
        step = self._last_step or self._step()
        if step is None or self._shown is None:
            return float("nan")
        return float((self._shown + step) * self._unit)

    def _carried(self, index: int, pts: int | None) -> Fraction | None:
        """Ticks from frame 0 to frame `index`, which carries the time `pts`."""
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
        """Ticks for which the frame asked for last is shown, if the next one has no time."""
        if self._shown is None:
            return None
        mean = self._shown / self._index if self._index else None
        return self._duration or mean or self._stated
