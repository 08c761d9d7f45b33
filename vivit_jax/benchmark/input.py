# SPDX-License-Identifier: Apache-2.0
"""From a file to pixels on the device: decoding beside other readers, bytes beside floats.

Three readers take the same frames of the same file: `read_video`, the loop of transformers' video
documentation, which decodes from frame 0 to the last frame asked, and torchcodec where it is
installed. Dense clips have their frames a few apart, as Kinetics is sampled; sparse clips have one
in each of as many equal parts of the video, as Something-Something is.
"""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from vivit_jax.benchmark.measure import Timing
from vivit_jax.data.sampling import clip_indices
from vivit_jax.data.transforms.frame_ops import center_crop, resize
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.video import decoder, opened, packets
from vivit_jax.data.video.decode import VideoInfo, probe_video, read_video
from vivit_jax.errors import UserError, VideoError, first_line
from vivit_jax.train.normalise import normaliser

SAMPLINGS = ("dense", "sparse")
OURS, LOOP, TORCHCODEC = "vivit_jax", "read loop", "torchcodec"
PROCESSOR = "videomae-imagenet"


@dataclasses.dataclass(frozen=True)
class Video:
    """A video to make: one texture that drifts behind two discs, with a little noise."""

    minutes: float = 1.0
    fps: int = 25
    gop: int = 250  # the most frames from one keyframe to the next, x264's default
    width: int = 320
    height: int = 180
    scene_seconds: float = 0.0  # of one texture, from a keyframe on; 0 never cuts

    def __post_init__(self):
        for name in ("fps", "gop", "width", "height"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < 32:
            raise UserError(
                f"width and height must be even and at least 32, got {self.width}x{self.height}"
            )
        if not math.isfinite(self.minutes) or not self.num_frames:
            raise UserError(f"minutes must hold at least one frame, got {self.minutes}")
        if not self.scene_seconds >= 0:
            raise UserError(f"scene_seconds must be at least 0, got {self.scene_seconds}")

    @property
    def num_frames(self) -> int:
        """Frames in the file."""
        return int(max(self.minutes, 0) * 60 * self.fps)


def write_video(path: Path, video: Video, seed: int = 0) -> None:
    """Encode `video` as H.264 with x264's defaults of preset veryfast; a function of its arguments.

    Raises UserError where PyAV has no x264.
    """
    import av
    from av.codec.codec import UnknownCodecError
    from av.video.frame import PictureType

    rng = np.random.default_rng(seed)
    height, width = video.height, video.width
    noise = rng.normal(0, 1.5, (16, height, width)).round().astype(np.int16)
    y, x = np.mgrid[-16:16, -16:16]
    disc = np.hypot(x, y) < 16
    planes = np.full((height * 3 // 2, width), 128, np.uint8)
    luma = planes[:height]
    cut = round(video.scene_seconds * video.fps)
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream("libx264", rate=video.fps, options={"preset": "veryfast"})
        except UnknownCodecError:
            raise UserError(
                "this build of PyAV has no H.264 encoder (libx264): pass a video file, or "
                "pip install --force-reinstall av"
            ) from None
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.gop_size, stream.thread_count = video.gop, 1
        for number in range(video.num_frames):
            if number == 0 or (cut and number % cut == 0):
                texture, speed = _texture(rng, 2 * height, 2 * width), rng.uniform(0.5, 2, 2)
            top, left = (
                _back_and_forth(step * number, room)
                for step, room in zip(speed, (height, width), strict=True)
            )
            luma[:] = np.clip(
                texture[top : top + height, left : left + width] + noise[rng.integers(16)], 0, 255
            )
            for i in (1, 2):
                top = int((height - 32) * (0.5 + 0.5 * np.sin(number / (17 * i))))
                left = int((width - 32) * (0.5 + 0.5 * np.cos(number / (29 * i))))
                luma[top : top + 32, left : left + 32][disc] = 70 * i
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            if cut and number % cut == 0:
                frame.pict_type = PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """int16 [height, width]: random grey, coarse and fine."""
    from PIL import Image

    waves = np.full((height, width), 128.0)
    for cells, contrast in ((5, 50), (20, 25), (80, 12)):
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        waves += contrast * np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return waves.astype(np.int16)


def _back_and_forth(place: float, room: int) -> int:
    return int(room - abs(place % (2 * room) - room))


def sample(
    kind: str, total: int, num_frames: int, stride: int, rng: np.random.Generator | None
) -> np.ndarray:
    """Indices of one clip, int64 [num_frames]; at random places, or in the middle without `rng`.

    Raises VideoError where `total` frames are too few.
    """
    needed = (num_frames - 1) * stride + 1 if kind == "dense" else num_frames
    if total < needed:
        apart = f" at stride {stride}" if kind == "dense" else ""
        raise VideoError(
            f"{total} frames; a {kind} clip of {num_frames} frames{apart} needs {needed}: "
            "pass a longer video, or smaller --frames or --stride"
        )
    if kind == "dense":
        return clip_indices(
            total, num_frames, stride, "center" if rng is None else "random", rng=rng
        )
    edges = np.arange(num_frames + 1) * total // num_frames
    if rng is None:
        return (edges[:-1] + edges[1:]) // 2
    return rng.integers(edges[:-1], edges[1:])


def read_loop(path: Path, indices: Sequence[int]) -> np.ndarray:
    """Ascending frames, uint8 [t, h, w, 3], by decoding everything up to the last of them."""
    import av

    wanted, last, kept = set(map(int, indices)), int(max(indices)), []
    with av.open(f"file:{path}") as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                kept.append(frame)
            if number == last:
                break
        return np.stack([frame.to_ndarray(format="rgb24") for frame in kept])


def read_ours(path: Path, indices: Sequence[int]) -> np.ndarray:
    """The same frames by `vivit_jax.read_video`, as the first clip of the file.

    The other readers open the file anew each time; ours would know its packets by now.
    """
    opened.scanned.cache_clear()
    return read_video(path, indices=indices)


def torchcodec_reader(threads: int) -> tuple[Callable | None, str]:
    """A reader of the same frames by torchcodec, or None and why there is none."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError:
        return None, "not installed"
    except (OSError, RuntimeError) as error:  # it looks for FFmpeg's libraries when imported
        return None, f"cannot be loaded: {first_line(error)}"

    def read(path: Path, indices: Sequence[int]) -> np.ndarray:
        decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=threads)
        return decoder.get_frames_at([int(i) for i in indices]).data.numpy()

    return read, ""


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Run what this thread starts on one core; yields False where the system cannot do that.

    FFmpeg starts as many threads as there are cores to run on, so that it then decodes in one.
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


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """The number of frames that `read_video` gets from the decoder inside the block, in a list."""
    original, count = decoder.decode_packet, [0]

    def counting(context, packet):
        frames = original(context, packet)
        count[0] += len(frames)
        return frames

    decoder.decode_packet = counting
    try:
        yield count
    finally:
        decoder.decode_packet = original


@dataclasses.dataclass(frozen=True)
class Rate:
    """One reader's seconds for one clip, over the rounds."""

    side: str
    wall: Timing
    cpu: Timing  # of all threads of this process
    decoded: float | None  # frames that the decoder gave per clip, None if unknown
    apart: int  # the largest difference of a pixel from the read loop's, in grey levels

    @property
    def clips_per_second(self) -> float:
        """From the median of the wall clock."""
        return 1 / self.wall.median


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The readers on one video with one kind of clip."""

    video: str
    info: VideoInfo
    sampling: str
    num_frames: int
    rates: tuple[Rate, ...]

    @property
    def agrees(self) -> bool:
        """Whether `read_video` and the read loop give the same bits."""
        return self._rate(OURS).apart == 0

    @property
    def ratio(self) -> float | None:
        """Time of `read_video` over that of the read loop, the median of the rounds' ratios."""
        return self._ratio("wall")

    @property
    def cpu_ratio(self) -> float | None:
        """The same in CPU time, which other programs on the machine disturb less."""
        return self._ratio("cpu")

    def _rate(self, side: str) -> Rate:
        return next(rate for rate in self.rates if rate.side == side)

    def _ratio(self, clock: str) -> float | None:
        if not self.agrees:
            return None
        ours, loop = (getattr(self._rate(side), clock).seconds for side in (OURS, LOOP))
        return statistics.median(a / b for a, b in zip(ours, loop, strict=True))

    def to_dict(self) -> dict:
        """Plain values."""
        values = dataclasses.asdict(self)
        for name in ("fps", "duration"):  # nan is no JSON
            known = math.isfinite(values["info"][name])
            values["info"][name] = values["info"][name] if known else None
        for row, rate in zip(values["rates"], self.rates, strict=True):
            for clock in ("wall", "cpu"):
                timing = getattr(rate, clock)
                row[clock] |= {"median": timing.median, "spread": timing.spread}
            row["clips_per_second"] = rate.clips_per_second
        return values | {"agrees": self.agrees, "ratio": self.ratio, "cpu_ratio": self.cpu_ratio}


def draw(
    path: Path,
    sampling: str,
    num_frames: int = 16,
    stride: int = 4,
    start: str = "center",
    count: int = 1,
    seed: int = 0,
) -> tuple[VideoInfo, list[np.ndarray]]:
    """What the file holds, and the indices of `count` clips of it, all different if "random".

    Raises VideoError for a video that is too short, cannot be read or is displayed turned.
    """
    info = probe_video(path)
    if info.rotation or info.mirrored:
        raise VideoError(
            f"{path} is to be displayed turned or mirrored, which the read loop leaves out: pass a "
            "video without a display matrix"
        )
    rng = np.random.default_rng(seed) if start == "random" else None
    try:
        draws = [sample(sampling, info.num_frames, num_frames, stride, rng) for _ in range(count)]
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    return info, draws


def compare_readers(
    path: Path,
    sampling: str,
    readers: dict[str, Callable[[Path, Sequence[int]], np.ndarray]],
    *,
    num_frames: int = 16,
    stride: int = 4,
    start: str = "center",
    repeats: int = 5,
    seed: int = 0,
) -> Comparison:
    """Read the same clips with all readers, compare the frames, then time them in turn.

    `readers` holds OURS and LOOP at least. Every round has a clip of its own where `start` is
    "random". Raises VideoError where `draw` does, or a reader fails.
    """
    info, clips = draw(path, sampling, num_frames, stride, start, repeats, seed)
    apart = dict.fromkeys(readers, 0)
    decoded = {LOOP: statistics.mean(int(clip[-1]) + 1 for clip in clips)}
    with _counted() as count:
        different = clips if start == "random" else clips[:1]
        for clip in different:
            frames = {side: _read(read, side, path, clip) for side, read in readers.items()}
            for side in readers:
                apart[side] = max(apart[side], _apart(frames[side], frames[LOOP]))
    decoded[OURS] = count[0] / len(different)
    walls, cpus = ({side: [] for side in readers} for _ in range(2))
    for round_, clip in enumerate(clips):
        for side in list(readers)[:: 1 if round_ % 2 == 0 else -1]:
            cpu, wall = time.process_time(), time.perf_counter()
            readers[side](path, clip)
            walls[side].append(time.perf_counter() - wall)
            cpus[side].append(time.process_time() - cpu)
    rates = tuple(
        Rate(side, Timing(tuple(walls[side])), Timing(tuple(cpus[side])), decoded.get(side), gap)
        for side, gap in apart.items()
    )
    return Comparison(path.name, info, sampling, num_frames, rates)


def _read(read: Callable, side: str, path: Path, indices: Sequence[int]) -> np.ndarray:
    import av

    try:
        return read(path, indices)
    except av.FFmpegError as error:
        raise VideoError(
            f"{path}: the {side} fails: {packets.reason_of(error)}; pass a video that is whole"
        ) from error


def _apart(frames: np.ndarray, expected: np.ndarray) -> int:
    """The largest difference in grey levels; 255 where not even the shapes are the same."""
    if frames.shape != expected.shape or frames.dtype != expected.dtype:
        return 255
    return int(np.abs(frames.astype(np.int16) - expected).max())


@dataclasses.dataclass(frozen=True)
class Pixels:
    """One clip from decoded frames to normalised pixels on the device, in two ways.

    "floats": `VideoProcessor` does all of it, float32 are sent. "bytes": frames are resized and
    cropped, uint8 are sent, and the device normalises them in a jitted function.
    """

    device: str
    shape: tuple[int, ...]
    floats: dict[str, Timing]  # prepare, send
    bytes: dict[str, Timing]  # prepare, send, normalise
    float_bytes: int  # sent per clip
    byte_bytes: int
    apart: float  # the largest difference between the two ways' pixels

    def to_dict(self) -> dict:
        """Plain values, milliseconds."""
        values = dataclasses.asdict(self)
        for way in ("floats", "bytes"):
            values[way] = {
                step: {"ms": 1e3 * timing.median, "spread": timing.spread}
                for step, timing in getattr(self, way).items()
            }
        return values


def compare_pixels(frames: np.ndarray, repeats: int = 5) -> Pixels:
    """Prepare, send and normalise uint8 [t, h, w, 3] both ways, in turn."""
    processor = VideoProcessor.named(PROCESSOR)
    height, width = processor.crop_size["height"], processor.crop_size["width"]

    def cropped() -> np.ndarray:
        resized = (resize(frame, processor.size, processor.resample) for frame in frames)
        return np.stack([center_crop(frame, height, width) for frame in resized])[None]

    send = lambda array: jax.block_until_ready(jax.device_put(array))  # noqa: E731
    normalise = jax.jit(normaliser(processor))
    seconds = {way: {} for way in ("floats", "bytes")}

    def timed(way: str, step: str, function: Callable):
        start = time.perf_counter()
        result = function()
        seconds[way].setdefault(step, []).append(time.perf_counter() - start)
        return result

    def by_floats():
        values = timed("floats", "prepare", lambda: processor(frames))
        return values.nbytes, timed("floats", "send", lambda: send(values))

    def by_bytes():
        values = timed("bytes", "prepare", cropped)
        sent = timed("bytes", "send", lambda: send(values))
        run = lambda: jax.block_until_ready(normalise(sent))  # noqa: E731
        return values.nbytes, timed("bytes", "normalise", run)

    for round_ in range(repeats + 1):  # the first compiles and warms up
        for way in (by_floats, by_bytes)[:: 1 if round_ % 2 == 0 else -1]:
            count, pixels = way()
            if way is by_floats:
                float_bytes, floats = count, np.asarray(pixels)
            else:
                byte_bytes, from_bytes = count, np.asarray(pixels)
    timings = {
        way: {step: Timing(tuple(times[1:])) for step, times in steps.items()}
        for way, steps in seconds.items()
    }
    return Pixels(
        device=jax.devices()[0].device_kind,
        shape=floats.shape,
        **timings,
        float_bytes=float_bytes,
        byte_bytes=byte_bytes,
        apart=float(np.abs(floats - from_bytes).max()),
    )
