# SPDX-License-Identifier: Apache-2.0
"""Which frames to read: pure functions from a frame count to frame indices."""

import math
import numbers
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from vivit_jax.config_base import SAMPLERS
from vivit_jax.errors import UserError, VideoError, there_are

STARTS = ("begin", "center", "end", "random")
PADS = ("error", "repeat_last", "loop")


def clip_indices(
    total: int,
    num_frames: int,
    stride: int = 1,
    start: str | int = "center",
    pad: str = "error",
    rng: np.random.Generator | None = None,
) -> Int64[np.ndarray, " num_frames"]:
    """Indices of `num_frames` frames, `stride` apart, in a video of `total` frames.

    The clip spans `(num_frames - 1) * stride + 1` frames. If it fits, `start` places its first
    frame: "begin" at 0, "end" so that its last frame is the video's last, "center" midway
    between the two (rounded down), "random" uniformly over all places where it fits (drawn from
    `rng`), an int at that frame index.

    If it does not fit, `pad` decides: "error" raises; the others start the clip at frame 0 (at
    `start` if that is an int) and map the indices past the end as `pad_indices` does.

    Args:
        total: frames in the video.
        num_frames: frames in the clip, at least 1.
        stride: distance between neighbouring frames, in frames of the video, at least 1.
        start: "begin", "center", "end", "random" or a frame index.
        pad: "error", "repeat_last" or "loop".
        rng: source of the draw for `start="random"`; otherwise unused.

    Returns:
        int64 [num_frames], each in [0, total).

    Raises:
        VideoError: the video is too short and `pad` is "error", or `start` is past its end.
        UserError: an argument is not one of those listed above.
    """
    _check_counts(num_frames=num_frames, stride=stride)
    _check_pad(pad)
    offsets = np.arange(num_frames, dtype=np.int64) * stride
    room = total - (int(offsets[-1]) + 1)
    if not isinstance(start, str) and _is_int(start):
        if start < 0:
            raise UserError(f"start is {start}; expected a frame index of at least 0")
        if start >= total:
            raise VideoError(
                f"start is frame {start} but {there_are(total, 'frame')}: pass a smaller start, "
                "or start='center' (--start center)"
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
            f"{first + offsets[-1]} but {there_are(total, 'frame')}: ask for fewer frames or a "
            "smaller stride, or pass pad='repeat_last' or pad='loop' (--pad repeat_last)"
        )
    return pad_indices(first + offsets, total, pad)


def pad_indices(
    indices: Sequence[int] | np.ndarray, total: int, pad: str = "error"
) -> Int64[np.ndarray, " n"]:
    """Maps indices past the end of a video of `total` frames back into it.

    Args:
        indices: int [n], in any order, repeats allowed.
        total: frames in the video.
        pad: "error" raises; "repeat_last" uses the video's last frame (`total - 1`) for each index
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
            f"no such frames: {_listed(beyond)}; {there_are(total, 'frame')}: ask for indices "
            f"below {total}" + (", or pass pad='repeat_last' or pad='loop'" if total else "")
        )
    return np.minimum(indices, total - 1) if pad == "repeat_last" else indices % total


def sample_frame_indices(
    clip_len: int,
    frame_sample_rate: float,
    seg_len: int,
    rng: np.random.Generator | np.random.RandomState | None = None,
) -> Int64[np.ndarray, " clip_len"]:
    """Draws a clip as the Hugging Face video documentation does, index for index.

    The clip covers `int(clip_len * frame_sample_rate)` consecutive frames. Its exclusive end is
    drawn uniformly below `seg_len`, so the video's last frame is never taken. The indices are
    evenly spaced over the clip, not exactly `frame_sample_rate` apart.
    `clip_indices(..., start="random")` has neither quirk.

    Args:
        clip_len: number of indices.
        frame_sample_rate: frames of the video per index.
        seg_len: frames in the video.
        rng: source of the draw; None uses NumPy's global state, so `np.random.seed(0)` gives the
            documentation's clip.

    Returns:
        int64 [clip_len], increasing.

    Raises:
        VideoError: `seg_len` does not exceed the number of frames covered.
        UserError: an argument is not a number, or the clip would cover no frame.
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


def training_indices(
    sampler: str, total: int, num_frames: int, stride: int, rng: np.random.Generator
) -> Int64[np.ndarray, " num_frames"]:
    """Draws the frames of a training clip as the papers' code does.

    - "hold" (VideoMAE pre-training): frames exactly `stride` apart, the first uniform over
      0..total - num_frames * stride. In a video shorter than `num_frames * stride` the clip starts
      at 0 and holds the last frame that steps of `stride` reach; as in the authors' code, which
      counts from 1, it never reaches the video's very last frame.
    - "linspace" (VideoMAE fine-tuning): `sample_frame_indices`, whose spacing is a little over
      `stride`; for 16 frames at stride 4 it is 4 or 5. A video of at most `num_frames * stride`
      frames gives `total // stride` frames spread evenly over all of it, then its last frame.
    - "loop" (ViViT): frames exactly `stride` apart, the first uniform over all places where the
      clip fits; a shorter video is read from frame 0 and starts again at its end.
    - "segments" (TSN; VideoMAE on Something-Something): one uniformly drawn frame from each of
      `num_frames` parts of `total // num_frames` frames; `stride` is ignored. A video of fewer than
      `num_frames` frames gives repeats of frame 0, then all of its frames, as in VideoMAE V2 (V1
      repeats frame 0 only).

    Args:
        sampler: one of `SAMPLERS`.
        total: frames in the video.
        num_frames: frames in the clip, at least 1.
        stride: distance between neighbouring frames, in frames of the video, at least 1.
        rng: source of the draw.

    Returns:
        int64 [num_frames], each in [0, total), never decreasing except where "loop" starts again.

    Raises:
        VideoError: the video has no frame.
        UserError: another argument is not one of those listed above.
    """
    _check_sampler(sampler, total, num_frames=num_frames, stride=stride)
    span, steps = num_frames * stride, np.arange(num_frames, dtype=np.int64)
    if sampler == "hold":
        first = int(rng.integers(max(total - span, 0) + 1))
        # The authors take a step only if at least one frame follows the frame it leads to.
        return first + np.minimum(steps, max((total - 2 - first) // stride, 0)) * stride
    if sampler == "loop":
        first = int(rng.integers(max(total - span + stride, 1)))
        return (first + steps * stride) % total
    if sampler == "linspace":
        if total > span:
            return sample_frame_indices(num_frames, stride, total, rng)
        spread = np.linspace(0, total, num=total // stride)
        held = np.full(num_frames - len(spread), total)
        return np.minimum(np.append(spread, held), total - 1).astype(np.int64)
    part = total // num_frames
    if part:
        return steps * part + rng.integers(part, size=num_frames)
    return np.maximum(steps - (num_frames - total), 0)


def view_indices(
    sampler: str, total: int, num_frames: int, stride: int, clips: int = 1
) -> Int64[np.ndarray, "clips num_frames"]:
    """The frames of a test video's `clips` clips along time: the test forms of `training_indices`.

    - "hold", "linspace" (VideoMAE): among frames 0, stride, 2 * stride... the first clip takes the
      first `num_frames`, the last clip the last, and the others begin at equal distances between
      them (rounded down). If there are too few, the last one is repeated.
    - "loop" (ViViT): frames exactly `stride` apart; the first clip begins at 0, the last at
      `total - num_frames * stride`, the others at equal distances between (rounded down). A shorter
      video starts again at its end.
    - "segments" (TSN; VideoMAE on Something-Something): the video is divided into `num_frames`
      parts and each part into `clips`; clip k takes the first frame of the k-th piece of each part.

    A single clip is central: it begins midway between first and last, or takes the middle frame of
    each part.

    Args:
        sampler, total, num_frames, stride: as in `training_indices`.
        clips: at least 1.

    Returns:
        int64 [clips, num_frames], each in [0, total).

    Raises:
        VideoError, UserError: as `training_indices`.
    """
    _check_sampler(sampler, total, num_frames=num_frames, stride=stride, clips=clips)
    steps, views = np.arange(num_frames, dtype=np.int64), np.arange(clips, dtype=np.int64)[:, None]
    if sampler == "segments":
        if clips == 1:
            return (2 * steps[None] + 1) * total // (2 * num_frames)
        # In integers: in floating point an exact boundary may round to the frame before.
        return (views + clips * steps) * total // (clips * num_frames)
    reach = total if sampler == "loop" else -(-total // stride)
    room = max(reach - (num_frames * stride if sampler == "loop" else num_frames), 0)
    firsts = views * room // (clips - 1) if clips > 1 else np.array([[room // 2]])
    if sampler == "loop":
        return (firsts + steps * stride) % total
    return np.minimum(firsts + steps, reach - 1) * stride


def _is_int(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_sampler(sampler, total, **counts) -> None:
    if sampler not in SAMPLERS:
        raise UserError(f"sampler is {sampler!r}; expected one of {SAMPLERS}")
    _check_counts(**counts)
    if total < 1:
        raise VideoError(f"a video of {total} frames has nothing to read: leave it out of the list")


def _check_counts(**counts) -> None:
    for name, value in counts.items():
        if not _is_int(value) or value < 1:
            raise UserError(f"{name} is {value!r}; expected an int of at least 1")


def _check_pad(pad) -> None:
    if pad not in PADS:
        raise UserError(f"pad is {pad!r}; expected one of {PADS}")


def _as_indices(indices: Sequence[int] | np.ndarray) -> Int64[np.ndarray, " n"]:
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
