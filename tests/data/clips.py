# SPDX-License-Identifier: Apache-2.0
"""Writes small test clips whose pixels state their frame number, and reads the number back."""

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# SVT-AV1 reports its settings on stderr otherwise.
os.environ.setdefault("SVT_LOG", "1")

BITS = 8
QUIET = {
    "libx264": {"preset": "ultrafast", "sc_threshold": "0"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:scenecut=0"},
    "libsvtav1": {"preset": "8", "svtav1-params": "enable-tf=0"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "b": "2M"},
    "libvpx": {"deadline": "good", "cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"},
    "mpeg4": {"sc_threshold": "1000000000"},
    "ffv1": {"level": "3", "slicecrc": "1", "slices": "4"},
}
MATRICES = {  # (rotation clockwise, mirrored left to right after it): a, b, c, d of the matrix
    (0, False): (1, 0, 0, 1),
    (90, False): (0, 1, -1, 0),
    (180, False): (-1, 0, 0, -1),
    (270, False): (0, -1, 1, 0),
    (0, True): (-1, 0, 0, 1),
    (90, True): (0, 1, 1, 0),
    (180, True): (1, 0, 0, -1),
    (270, True): (0, -1, -1, 0),
}


def painted(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [h, w, 3]: the bits of `number` as black and white columns, inverted in the lower half.

    Red has a ramp across and blue one down, so that swapped channels or a wrong turn show.
    """
    bits = np.array([number >> bit & 1 for bit in reversed(range(BITS))])
    columns = np.repeat(bits, width // BITS)
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2] = columns[:, None] * 200
    image[height // 2 :] = (1 - columns)[:, None] * 200
    image[..., 0] += np.linspace(0, 50, width).astype(np.uint8)
    image[..., 2] += np.linspace(50, 0, height).astype(np.uint8)[:, None]
    return image


def number_in(image: np.ndarray) -> int:
    """The number painted in a decoded image [h, w, 3]; ValueError if its two halves disagree."""
    height, width = image.shape[:2]
    cells = image.mean(axis=2).reshape(2, height // 2, BITS, width // BITS).mean(axis=(1, 3))
    upper, lower = cells > 128
    if not np.array_equal(upper, ~lower):
        raise ValueError(f"no number can be read: block brightness {cells.round()}")
    return int("".join(str(int(bit)) for bit in upper), 2)


def write_clip(
    path: Path,
    frames: int = 30,
    codec: str = "libx264",
    gop: int = 10,
    b_frames: int = 2,
    pix_fmt: str = "yuv420p",
    fps: int = 25,
    times: list[float] | None = None,
    clock: int = 90000,
    size: tuple[int, int] = (64, 48),
    display: tuple[int, bool] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encodes frames painted 0, 1, 2... and returns `path`, whose suffix names the container.

    times: seconds at which each frame is shown (variable frame rate), instead of `fps`.
    clock: ticks a second that `times` are rounded to.
    aspect: width of a pixel over its height.
    size: width, height as encoded, multiples of 16.
    display: (degrees clockwise, mirrored after) to write into an mp4 or mov; the pictures are
        stored turned the other way, so that a player shows the numbers upright.
    options: of the encoder; container_options: of the muxer.
    """
    time_base = Fraction(1, fps) if times is None else Fraction(1, clock)
    ticks = range(frames) if times is None else [round(t * clock) for t in times]
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(
            codec, rate=fps, options=QUIET.get(codec, {}) | (options or {})
        )
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = time_base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, tick in zip(range(frames), ticks, strict=True):
            image = stored(number, size, display)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if display:
        write_matrix(path, [entry << 16 for entry in MATRICES[display]])
    return path


def stored(number: int, size: tuple[int, int], display: tuple[int, bool] | None) -> np.ndarray:
    """The picture that becomes `painted(number)` when turned and mirrored as `display` says."""
    degrees, mirrored = display or (0, False)
    turned = degrees in (90, 270)
    image = painted(number, *(size[::-1] if turned else size))
    return np.rot90(image[:, ::-1] if mirrored else image, degrees // 90)


def write_matrix(path: Path, matrix: list[int]) -> None:
    """Puts a, b, c, d (16.16 fixed point) into the track header of an mp4 or mov file."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    start = header + 40  # version 0: flags, dates, track id, duration, layer, group, volume
    a, b, c, d = matrix
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def every_frame(path: Path) -> np.ndarray:
    """uint8 [t, h, w, 3]: the frames of a plain decode from start to end, as stored."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def packet_spans(path: Path) -> list[tuple[int, int]]:
    """Offset and size in bytes of each packet of a file, in stored order."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]
