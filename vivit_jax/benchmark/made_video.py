# SPDX-License-Identifier: Apache-2.0
"""A video file to measure with, where none is given."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from vivit_jax.errors import UserError

_DISC = 32  # pixels across; frames are no smaller


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """A video to make: a noisy texture that drifts behind two discs.

    Attributes:
        minutes: Length of the made video.
        fps: Frames per second of the made video.
        gop: Most frames from one keyframe to the next in the made video; 250 is x264's default.
        width: Width of the made video, in pixels.
        height: Height of the made video, in pixels.
        scene_seconds: Cut the made video to a new scene, which starts with a keyframe, this often.
            Default: never, so that up to --gop frames lie before a wanted one.
    """

    minutes: float = 1.0
    fps: int = 25
    gop: int = 250
    width: int = 320
    height: int = 180
    scene_seconds: float = 0.0

    @property
    def num_frames(self) -> int:
        """Frames in the file."""
        return int(max(self.minutes, 0) * 60 * self.fps)

    def check(self) -> None:
        """Raise UserError for a video that cannot be encoded."""
        for name in ("fps", "gop", "width", "height"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % 2 or self.height % 2 or min(self.width, self.height) < _DISC:
            raise UserError(
                f"width and height must be even and at least {_DISC}, "
                f"got {self.width}x{self.height}"
            )
        if not math.isfinite(self.minutes) or not self.num_frames:
            raise UserError(f"minutes must hold at least one frame, got {self.minutes}")
        if not self.scene_seconds >= 0:
            raise UserError(f"scene_seconds must be at least 0, got {self.scene_seconds}")


def write_video(path: Path, video: Video, seed: int = 0) -> None:
    """Encode `video` as H.264 with x264's preset veryfast; the file depends on the arguments only.

    Raises UserError for a video that cannot be encoded, and where PyAV has no x264.
    """
    import av
    from av.codec.codec import UnknownCodecError
    from av.video.frame import PictureType

    video.check()
    rng = np.random.default_rng(seed)
    height, width = video.height, video.width
    noise = rng.normal(0, 1.5, (16, height, width)).round().astype(np.int16)
    half = _DISC // 2
    y, x = np.mgrid[-half:half, -half:half]
    disc = np.hypot(x, y) < half
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
        texture, speed = _scene(rng, height, width)
        for number in range(video.num_frames):
            if number and cut and number % cut == 0:
                texture, speed = _scene(rng, height, width)
            top, left = (
                _back_and_forth(step * number, room)
                for step, room in zip(speed, (height, width), strict=True)
            )
            luma[:] = np.clip(
                texture[top : top + height, left : left + width] + noise[rng.integers(16)], 0, 255
            )
            for i in (1, 2):
                top = int((height - _DISC) * (0.5 + 0.5 * np.sin(number / (17 * i))))
                left = int((width - _DISC) * (0.5 + 0.5 * np.cos(number / (29 * i))))
                luma[top : top + _DISC, left : left + _DISC][disc] = 70 * i
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            if cut and number % cut == 0:
                frame.pict_type = PictureType.I
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _scene(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A texture int16 [2 height, 2 width], coarse and fine, and its speed in pixels a frame."""
    from PIL import Image

    waves = np.full((2 * height, 2 * width), 128.0)
    for cells, contrast in ((5, 50), (20, 25), (80, 12)):
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        fine = coarse.resize((2 * width, 2 * height), Image.Resampling.BILINEAR)
        waves += contrast * np.asarray(fine)
    return waves.astype(np.int16), rng.uniform(0.5, 2, 2)


def _back_and_forth(place: float, room: int) -> int:
    return int(room - abs(place % (2 * room) - room))
