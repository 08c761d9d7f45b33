# SPDX-License-Identifier: Apache-2.0
"""Small videos of one moving shape whose class only its motion tells.

Eight classes: a shape moves in one of four directions, circles one way or the other, grows or
shrinks. No still image tells them apart, because every single frame has the same distribution in
every class:

* The frame is a torus, and the shape's centre in the middle of the clip is uniform on it. A frame
  at any other time shifts that centre by an amount that does not depend on it, and a shifted
  uniform position is uniform.
* The size in the middle of the clip is uniform in one range. Growing adds to it modulo the range
  (the largest size is followed by the smallest), which again leaves it uniform; in the other
  classes it stays as it was drawn.
* Shape, orientation, colours, background and noise are drawn without looking at the class, and
  independently of position and size.

So one frame says nothing, neither do its statistics, and a classifier that is right has seen
motion. This holds for the frames as drawn; H.264 then codes most of them as differences to their
neighbours. Played backwards, a clip is one of the class in `REVERSED`, of the same scene.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np

from vivit_jax.errors import UserError
from vivit_jax.files.atomic import writing

_MILLISECOND = Fraction(1, 1000)

# Alphabetical, because readers of one folder per class number the classes in that order.
CLASSES = (
    "circle-clockwise",
    "circle-counterclockwise",
    "grow",
    "move-down",
    "move-left",
    "move-right",
    "move-up",
    "shrink",
)
REVERSED = {
    "circle-clockwise": "circle-counterclockwise",
    "grow": "shrink",
    "move-down": "move-up",
    "move-left": "move-right",
}
REVERSED |= {b: a for a, b in REVERSED.items()}
MIRRORED = REVERSED | {
    "grow": "grow",
    "shrink": "shrink",
    "move-down": "move-down",
    "move-up": "move-up",
}
SHAPES = ("disc", "square", "triangle", "cross")

# Lengths are fractions of the frame's side, speeds are per clip: of the side for moves, of a turn
# for circles, of the range of sizes for growth.
SIZES = (0.10, 0.24)  # radius of the shape
MOVE_SPEEDS = (0.6, 1.1)
CIRCLE_SPEEDS = (0.8, 1.1)
CIRCLE_RADII = (0.14, 0.22)
GROWTH_SPEEDS = (0.7, 1.2)
NOISE = 5.0  # standard deviation, in grey levels
_DIRECTIONS = {
    "move-left": (-1.0, 0.0),
    "move-right": (1.0, 0.0),
    "move-up": (0.0, -1.0),
    "move-down": (0.0, 1.0),
}
_TURNS = {"circle-clockwise": 1.0, "circle-counterclockwise": -1.0}
_GROWTH = {"grow": 1.0, "shrink": -1.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """All of a clip but its class and its noise; `x`, `y`, `size` are those of mid-clip."""

    shape: str
    tilt: float  # radians
    colour: np.ndarray  # [3], grey levels
    background: np.ndarray  # [h, w, 3], grey levels
    x: float  # in [0, 1)
    y: float
    size: float  # place in SIZES, in [0, 1)
    angle: float  # place on the circle, radians; 0 is to the right, pi / 2 below
    radius: float  # place in CIRCLE_RADII, in [0, 1)
    speed: float  # place in the class's range of speeds, in [0, 1)


def draw_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """Draw what does not depend on the class, for square frames of `image_size` pixels."""
    return Scene(
        shape=SHAPES[rng.integers(len(SHAPES))],
        tilt=rng.uniform(0, 2 * np.pi),
        colour=rng.uniform(150, 245, 3),
        background=rng.uniform(30, 90, 3) + _texture(rng, image_size),
        x=rng.random(),
        y=rng.random(),
        size=rng.random(),
        angle=rng.uniform(0, 2 * np.pi),
        radius=rng.random(),
        speed=rng.random(),
    )


def trajectory(scene: Scene, kind: str, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The shape's centre [t, 2] (x, y) and radius [t], in fractions of the frame's side.

    Time runs from -1/2 to 1/2 around the middle of the clip and every motion is odd in it, which
    is why a reversed clip is the same scene in the class `REVERSED[kind]`.
    """
    time = (np.arange(num_frames) - (num_frames - 1) / 2) / num_frames
    centre = np.tile([scene.x, scene.y], (num_frames, 1))
    size = np.full(num_frames, scene.size)
    if kind in _DIRECTIONS:
        centre += _place(MOVE_SPEEDS, scene.speed) * time[:, None] * _DIRECTIONS[kind]
    elif kind in _TURNS:
        # y points down, so a growing angle is a clockwise turn.
        angle = scene.angle + 2 * np.pi * _place(CIRCLE_SPEEDS, scene.speed) * _TURNS[kind] * time
        radius = _place(CIRCLE_RADII, scene.radius)
        centre += radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    else:
        size = (size + _place(GROWTH_SPEEDS, scene.speed) * _GROWTH[kind] * time) % 1
    return centre % 1, _place(SIZES, size)


def render(scene: Scene, kind: str, num_frames: int) -> np.ndarray:
    """The clip without noise: float32 [t, h, w, 3] in grey levels."""
    side = scene.background.shape[0]
    centre, radius = trajectory(scene, kind, num_frames)
    pixel = np.arange(side) + 0.5
    # Distance on the torus: the shape that leaves on the right comes in on the left.
    dx, dy = ((pixel - side * centre[:, i, None] + side / 2) % side - side / 2 for i in (0, 1))
    dx, dy = dx[:, None, :], dy[:, :, None]
    cos, sin = np.cos(scene.tilt), np.sin(scene.tilt)
    depth = _depth(
        scene.shape, cos * dx + sin * dy, cos * dy - sin * dx, side * radius[:, None, None]
    )
    cover = np.clip(depth + 0.5, 0, 1)[..., None].astype(np.float32)
    ground = scene.background.astype(np.float32)
    return ground + cover * (scene.colour.astype(np.float32) - ground)


def make_clip(
    kind: str, rng: np.random.Generator, num_frames: int = 8, image_size: int = 48
) -> np.ndarray:
    """One clip of the class `kind`, uint8 [t, h, w, 3]; a pure function of the state of `rng`."""
    frames = render(draw_scene(rng, image_size), kind, num_frames)
    frames += NOISE * rng.standard_normal(frames.shape, np.float32)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def write_mp4(
    path: Path,
    frames: np.ndarray,
    fps: int | Fraction = 10,
    holds: Sequence[float] | None = None,
) -> None:
    """Encode frames, uint8 [t, h, w, 3] with even h and w, as H.264 in mp4.

    With `holds` frame i is shown for holds[i] seconds, at least one millisecond and to a
    millisecond, whatever `fps` is.
    """
    import av
    from av.codec.codec import UnknownCodecError

    # With macroblock trees x264 gives the same small frames now these bytes, now others: of 300
    # encodings of a clip of 48x48 beside other threads 64 differed, without them none.
    options = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream("libx264", rate=fps, options=options)
        except UnknownCodecError:
            raise UserError(
                "this build of PyAV has no H.264 encoder (libx264); the wheels on PyPI have it: "
                "pip install --force-reinstall av"
            ) from None
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        starts = None
        if holds is not None:
            starts = [0]
            for end in np.rint(1000 * np.cumsum(holds)).astype(int).tolist():
                starts.append(max(end, starts[-1] + 1))
            stream.codec_context.time_base = _MILLISECOND
        packets = []
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if starts is not None:
                frame.pts, frame.time_base = starts[i], _MILLISECOND
            packets += stream.encode(frame)
        packets += stream.encode()
        if starts is not None:  # the encoder does not know how long the last frame stays
            last = max(packets, key=lambda packet: packet.pts)
            last.duration = starts[-1] - starts[-2]
        container.mux(packets)


def write_dataset(
    directory: Path,
    clips_per_class: Mapping[str, int],
    *,
    seed: int = 0,
    num_frames: int = 8,
    image_size: int = 48,
    fps: int = 10,
) -> dict[str, list[tuple[Path, int]]]:
    """Write `directory`/<split>/<class>/<number>.mp4 and return (path, class index) per split.

    `clips_per_class` counts per split. A clip is a function of (seed, split, class, number, sizes)
    alone, so fewer clips are a subset of more.
    """
    jobs, splits = [], {}
    for split, count in clips_per_class.items():
        for label, kind in enumerate(CLASSES):
            folder = directory / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                path = folder / f"{number:04}.mp4"
                splits.setdefault(split, []).append((path, label))
                jobs.append((path, kind, (seed, *split.encode(), label, number)))

    def write(job):
        path, kind, entropy = job
        clip = make_clip(kind, np.random.default_rng(entropy), num_frames, image_size)
        try:
            with writing(path):
                write_mp4(path, clip, fps)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    # Threads, because the encoder works outside the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, jobs))
    return splits


def augment(
    rng: np.random.Generator, clips: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shift, mirror and reverse clips at random, labels following; uint8 [b, t, h, w, 3], [b].

    These are symmetries of the data: a shift on the torus keeps the class, a mirror image is of the
    class `MIRRORED`, a reversed clip of the class `REVERSED`.
    """
    out, new_labels = np.empty_like(clips), []
    for i, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        kind = CLASSES[label]
        if rng.random() < 0.5:
            clip, kind = clip[::-1], REVERSED[kind]
        if rng.random() < 0.5:
            clip, kind = clip[:, :, ::-1], MIRRORED[kind]
        out[i] = np.roll(clip, rng.integers(0, clip.shape[1], 2), axis=(1, 2))
        new_labels.append(CLASSES.index(kind))
    return out, np.array(new_labels)


def _place(bounds: tuple[float, float], place):
    low, high = bounds
    return low + (high - low) * place


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Three random waves that close on the torus, [side, side, 3] in grey levels."""
    at = 2 * np.pi * np.arange(side) / side
    waves = np.zeros((side, side, 3))
    for _ in range(3):
        across, down = rng.integers(-3, 4, 2)
        wave = np.sin(across * at[None, :] + down * at[:, None] + rng.uniform(0, 2 * np.pi))
        waves += wave[..., None] * rng.uniform(-9, 9, 3)
    return waves


def _depth(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How far inside the shape the points (x, y) lie, in pixels; negative outside."""
    if shape == "disc":
        return radius - np.hypot(x, y)
    if shape == "square":
        return 0.85 * radius - np.maximum(abs(x), abs(y))
    if shape == "triangle":
        return 0.6 * radius - np.maximum(y, 3**0.5 / 2 * abs(x) - y / 2)
    long, thick = 1.1 * radius, 0.4 * radius
    return np.maximum(
        np.minimum(long - abs(x), thick - abs(y)), np.minimum(long - abs(y), thick - abs(x))
    )
