# SPDX-License-Identifier: Apache-2.0
"""Which frames to read: pure functions from a frame count to frame indices."""

import math
import numbers

import numpy as np

from vivit_jax.errors import UserError, VideoError

STARTS = ("begin", "center", "end", "random")
PADS = ("error", "repeat_last", "loop")


def clip_indices(
    total: int,
    num_frames: int,
    stride: int = 1,
    start: str | int = "center",
    pad: str = "error",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Indices of `num_frames` frames, `stride` apart, in a video of `total` frames.

    The clip spans `(num_frames - 1) * stride + 1` frames. Where it fits, `start` places its first
    frame: "begin" at 0, "end" so that its last frame is the video's last, "center" midway
    between the two (rounded down), "random" uniformly over all places where it fits (drawn from
    `rng`), an int at that frame index.

    Where it does not fit, `pad` decides: "error" raises; the others start the clip at frame 0 (at
    `start` if that is an int) and map the indices past the end as `pad_indices` does.

    Args:
        total: frames in the video.
        num_frames: frames in the clip, at least 1.
        stride: distance between neighbouring frames, in frames of the video, at least 1.
        start: "begin", "center", "end", "random" or a frame index.
        pad: "error", "repeat_last" or "loop".
        rng: source of the draw for `start="random"`; unused by the others.

    Returns:
        int64 [num_frames], each in [0, total).

    Raises:
        VideoError: the video is too short and `pad` is "error", or `start` is past its end.
        UserError: an argument is outside what is listed above.
    """
    for name, value in (("num_frames", num_frames), ("stride", stride)):
        if not _is_int(value) or value < 1:
            raise UserError(f"{name} is {value!r}; expected an int of at least 1")
    _check_pad(pad)
    offsets = np.arange(num_frames, dtype=np.int64) * stride
    room = total - (int(offsets[-1]) + 1)
    if _is_int(start):
        if start < 0:
            raise UserError(f"start is {start}; expected a frame index of at least 0")
        if start >= total:
            raise VideoError(
                f"start is frame {start} but there are {total} frames: "
                "pass a smaller start, or start='center' (--start center)"
            )
        first = int(start)
    elif start not in STARTS:
        raise UserError(f"start is {start!r}; expected one of {STARTS} or a frame index")
    elif start == "random":
        if rng is None:
            raise UserError("start='random' draws the first frame and got no seed: pass seed=<int>")
        first = int(rng.integers(room + 1)) if room > 0 else 0
    else:
        first = {"begin": 0, "center": room // 2, "end": room}[start] if room > 0 else 0
    if pad == "error" and total <= first + offsets[-1]:
        raise VideoError(
            f"{num_frames} frames at stride {stride} from frame {first} end at frame "
            f"{first + offsets[-1]} but there are {total} frames: ask for fewer frames or a "
            "smaller stride, or pass pad='repeat_last' or pad='loop' (--pad repeat_last)"
        )
    return pad_indices(first + offsets, total, pad)


def pad_indices(indices: np.ndarray, total: int, pad: str = "error") -> np.ndarray:
    """Maps indices past the end of a video of `total` frames back into it.

    Args:
        indices: int [n], in any order, repeats allowed.
        total: frames in the video.
        pad: "error" raises; "repeat_last" takes the video's last frame (`total - 1`) for each index
            past the end; "loop" starts again at frame 0 (`index % total`).

    Returns:
        int64 [n], each in [0, total).

    Raises:
        VideoError: an index is past the end and `pad` is "error", or the video has no frame.
        UserError: no indices, one that is not an int or is negative, or an unknown `pad`.
    """
    _check_pad(pad)
    indices = _as_indices(indices)
    beyond = indices[indices >= total]
    if not len(beyond):
        return indices
    if pad == "error" or total < 1:
        raise VideoError(
            f"no such frames: {_listed(beyond)}; there are {total} frames: ask for indices below "
            f"{total}" + (", or pass pad='repeat_last' or pad='loop'" if total else "")
        )
    return np.minimum(indices, total - 1) if pad == "repeat_last" else indices % total


def sample_frame_indices(
    clip_len: int,
    frame_sample_rate: float,
    seg_len: int,
    rng: np.random.Generator | np.random.RandomState | None = None,
) -> np.ndarray:
    """Draws a clip as the Hugging Face video documentation does, index for index.

    The clip covers `int(clip_len * frame_sample_rate)` consecutive frames. The frame after its last
    is drawn uniformly, below `seg_len`, from those with room before them: the video's last frame is
    never taken. The indices are evenly spaced over the clip, not exactly `frame_sample_rate` apart.
    `clip_indices(..., start="random")` has neither quirk.

    Args:
        clip_len: number of indices.
        frame_sample_rate: frames of the video per index.
        seg_len: frames in the video.
        rng: source of the draw; None is NumPy's global state, so that `np.random.seed(0)` gives the
            documentation's clip.

    Returns:
        int64 [clip_len], increasing.

    Raises:
        VideoError: `seg_len` is not greater than the frames covered.
        UserError: an argument is no number, or `clip_len` or `frame_sample_rate` leaves nothing to
            cover.
    """
    for name, value in (("clip_len", clip_len), ("seg_len", seg_len)):
        if not _is_int(value):
            raise UserError(f"{name} is {value!r}; expected an int")
    if not isinstance(frame_sample_rate, numbers.Real) or not math.isfinite(frame_sample_rate):
        raise UserError(f"frame_sample_rate is {frame_sample_rate!r}; expected a finite number")
    covered = int(clip_len * frame_sample_rate)
    if clip_len < 1 or covered < 1:
        raise UserError(
            f"clip_len {clip_len} x frame_sample_rate {frame_sample_rate} covers {covered} frames; "
            "expected at least 1 of each"
        )
    if seg_len <= covered:
        raise VideoError(
            f"clip_len {clip_len} x frame_sample_rate {frame_sample_rate} covers {covered} frames "
            f"and needs a video of at least {covered + 1}; seg_len is {seg_len}: lower "
            "frame_sample_rate, or use read_video(path, num_frames=..., pad='repeat_last')"
        )
    draw = rng.integers if isinstance(rng, np.random.Generator) else (rng or np.random).randint
    end = int(draw(covered, seg_len))
    spaced = np.linspace(end - covered, end, num=clip_len)
    return np.minimum(spaced, end - 1).astype(np.int64)


def _is_int(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_pad(pad) -> None:
    if pad not in PADS:
        raise UserError(f"pad is {pad!r}; expected one of {PADS}")


def _as_indices(indices) -> np.ndarray:
    array = np.asarray(indices)
    if array.ndim != 1 or not array.size:
        raise UserError(f"indices have shape {array.shape}; expected a list of at least one int")
    if not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"indices are of type {array.dtype}; expected ints")
    if array.min() < 0:
        raise UserError(
            f"negative frame indices: {_listed(array[array < 0])}; "
            "expected indices counted from the first frame, 0"
        )
    return array.astype(np.int64)


def _listed(values, most: int = 8) -> str:
    names = ", ".join(str(int(value)) for value in values[:most])
    return names if len(values) <= most else f"{names} and {len(values) - most} more"
