# SPDX-License-Identifier: Apache-2.0
"""The time to read one clip of a video file, beside the loop of transformers' documentation.

Both readers take the same frames from the middle of the file. Dense clips have frames a few apart,
as Kinetics is sampled; sparse clips have one frame in each of as many equal parts of the video, as
Something-Something is.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from vivit_jax.benchmark.measure import Rounds, Timing, alternate
from vivit_jax.data.sampling import clip_indices
from vivit_jax.data.video import opened
from vivit_jax.data.video.decode import VideoInfo, probe_video, read_video
from vivit_jax.errors import VideoError, first_line
from vivit_jax.progress import format_table

SAMPLINGS = ("dense", "sparse")
OURS, LOOP = "vivit_jax", "read loop"


def sample(kind: str, total: int, num_frames: int, stride: int) -> Int64[np.ndarray, " t"]:
    """Indices of the clip in the middle of `total` frames, or in the middle of each part.

    Raises VideoError if `total` frames are too few.
    """
    needed = (num_frames - 1) * stride + 1 if kind == "dense" else num_frames
    if total < needed:
        apart = f" at stride {stride}" if kind == "dense" else ""
        raise VideoError(
            f"{total} frames; a {kind} clip of {num_frames} frames{apart} needs {needed}: "
            "pass a longer video, or smaller --frames or --stride"
        )
    if kind == "dense":
        return clip_indices(total, num_frames, stride, "center")
    edges = np.arange(num_frames + 1) * total // num_frames
    return (edges[:-1] + edges[1:]) // 2


def read_loop(path: Path, indices: Int64[np.ndarray, " t"]) -> UInt8[np.ndarray, "t h w 3"]:
    """Ascending frames, by decoding everything up to the last of them."""
    import av
    from av.error import FFmpegError

    wanted, last, kept = set(map(int, indices)), int(max(indices)), []
    try:
        with av.open(f"file:{path}") as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    kept.append(frame)
                if number == last:
                    break
            return np.stack([frame.to_ndarray(format="rgb24") for frame in kept])
    except FFmpegError as error:
        raise VideoError(
            f"{path}: the read loop fails: {first_line(error)}; pass an undamaged video"
        ) from error


def read_ours(path: Path, indices: Int64[np.ndarray, " t"]) -> UInt8[np.ndarray, "t h w 3"]:
    """The same frames by `vivit_jax.read_video`, as the first clip of the file.

    The list of packets that it keeps for later clips is dropped, since the loop has none.
    """
    opened.scanned.cache_clear()
    return read_video(path, indices=[int(i) for i in indices])


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Pin what this thread starts to one core; yields False where the system cannot.

    FFmpeg starts as many threads as there are usable cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield False
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, cores)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A side of the comparison."""

    name: str
    read: Callable[[Path, Int64[np.ndarray, " t"]], UInt8[np.ndarray, "t h w 3"]]
    path: Path
    indices: Int64[np.ndarray, " t"]

    def run(self) -> None:
        """Read the clip once."""
        self.read(self.path, self.indices)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both readers' times for one clip."""

    video: str
    info: VideoInfo
    sampling: str
    num_frames: int
    ours: Timing
    loop: Timing
    agrees: bool  # whether the frames are the same, bit for bit

    @property
    def ratio(self) -> float | None:
        """Time of `read_video` by that of the loop, the median of the rounds' ratios."""
        return self.ours.over(self.loop).median if self.agrees else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; seconds a clip."""
        values = dataclasses.asdict(self)
        for name in ("fps", "duration"):  # NaN is not JSON
            known = math.isfinite(values["info"][name])
            values["info"][name] = values["info"][name] if known else None
        for name in ("ours", "loop"):
            timing = getattr(self, name)
            values[name] |= {"median": timing.median, "spread": timing.spread}
        return values | {"ratio": self.ratio}

    def __str__(self) -> str:
        info = self.info
        rows = [("reader", "ms/clip", "+-", "clips/s")]
        for name, timing in ((OURS, self.ours), (LOOP, self.loop)):
            median = timing.median
            rows.append((name, f"{1e3 * median:.1f}", f"{timing.spread:.0%}", f"{1 / median:.2f}"))
        verdict = f"frames of {OURS} and of the {LOOP} differ: no ratio"
        if self.ratio is not None:
            verdict = f"time of {OURS} / {LOOP}: {self.ratio:.3f}, frames bit-equal"
        return "\n  ".join(
            [
                f"{self.video}, {info.num_frames} frames {info.width}x{info.height} {info.codec}: "
                f"{self.sampling} clips of {self.num_frames} frames",
                *format_table(rows),
                verdict,
            ]
        )


def find_clip(
    path: Path, sampling: str, num_frames: int, stride: int
) -> tuple[VideoInfo, Int64[np.ndarray, " t"]]:
    """What the file holds, and the indices of its clip.

    Raises VideoError for a video that is too short, unreadable, or displayed turned.
    """
    info = probe_video(path)
    if info.rotation or info.mirrored:
        raise VideoError(
            f"{path} is to be displayed turned or mirrored, which the read loop does not do: pass "
            "a video without a display matrix"
        )
    try:
        return info, sample(sampling, info.num_frames, num_frames, stride)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None


def compare_readers(
    path: Path, sampling: str, num_frames: int = 16, stride: int = 4, repeats: int = 5
) -> Comparison:
    """Compare the frames of both readers, then time them in turn. Raises as `find_clip` does."""
    info, indices = find_clip(path, sampling, num_frames, stride)
    sides = [Reader(OURS, read_ours, path, indices), Reader(LOOP, read_loop, path, indices)]
    agrees = np.array_equal(read_ours(path, indices), read_loop(path, indices))
    timings = alternate(sides, Rounds(repeats)).timings
    return Comparison(path.name, info, sampling, num_frames, timings[OURS], timings[LOOP], agrees)
