# SPDX-License-Identifier: Apache-2.0
"""Small videos of one moving shape, whose class only the motion reveals.

Eight classes: a shape moves in one of four directions, circles one way or the other, grows or
shrinks. No still image distinguishes them, because a single frame has the same distribution in
every class:

* The frame is a torus, and the shape's centre at mid-clip is uniform on it. At any other time the
  centre is shifted by an amount that does not depend on it, so it is still uniform.
* The size at mid-clip is uniform in one range. Growing adds to it modulo the range (the largest
  size is followed by the smallest), so it is still uniform; in the other classes it is constant.
* Shape, orientation, colours, background and noise are drawn independently of the class, position
  and size.

So neither a frame nor its statistics say anything, and a classifier that is right has seen motion.
This holds for the frames as drawn; H.264 then codes most of them as differences to their
neighbours. Reversed in time, a clip shows the same scene in the class `REVERSED`.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

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

# Lengths are fractions of the frame's side. Speeds are per clip, in fractions of the side for
# moves, of a turn for circles, of the range of sizes for growth.
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
    """A clip except its class and its noise; `x`, `y` and `size` are those at mid-clip."""

    shape: str
    tilt: float  # radians
    colour: Float[np.ndarray, "3"]  # grey levels
    background: Float[np.ndarray, "side side 3"]  # grey levels
    x: float  # in [0, 1)
    y: float
    size: float  # place in SIZES, in [0, 1)
    angle: float  # place on the circle, radians; 0 is to the right, pi / 2 below
    radius: float  # place in CIRCLE_RADII, in [0, 1)
    speed: float  # place in the class's range of speeds, in [0, 1)


def draw_scene(rng: np.random.Generator, image_size: int) -> Scene:
    """Draw everything that does not depend on the class, for square frames of `image_size`."""
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


def trajectory(
    scene: Scene, kind: str, num_frames: int
) -> tuple[Float[np.ndarray, "t 2"], Float[np.ndarray, " t"]]:
    """The shape's centre (x, y) and radius in each frame, in fractions of the frame's side.

    Time runs from -1/2 to 1/2 and every motion is odd in it, so a reversed clip is the same scene
    in the class `REVERSED[kind]`.
    """
    time = (np.arange(num_frames) - (num_frames - 1) / 2) / num_frames
    centre = np.tile([scene.x, scene.y], (num_frames, 1))
    size = np.full(num_frames, scene.size)
    if kind in _DIRECTIONS:
        centre += _place(MOVE_SPEEDS, scene.speed) * time[:, None] * _DIRECTIONS[kind]
    elif kind in _TURNS:
        # y points down, so a growing angle turns clockwise.
        angle = scene.angle + 2 * np.pi * _place(CIRCLE_SPEEDS, scene.speed) * _TURNS[kind] * time
        radius = _place(CIRCLE_RADII, scene.radius)
        centre += radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    else:
        size = (size + _place(GROWTH_SPEEDS, scene.speed) * _GROWTH[kind] * time) % 1
    return centre % 1, _place(SIZES, size)


def render(scene: Scene, kind: str, num_frames: int) -> Float32[np.ndarray, "t side side 3"]:
    """The clip without noise, in grey levels."""
    side = scene.background.shape[0]
    centre, radius = trajectory(scene, kind, num_frames)
    pixel = np.arange(side) + 0.5
    # Distance on the torus: a shape that leaves on the right enters on the left.
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
) -> UInt8[np.ndarray, "t h w 3"]:
    """One clip of the class `kind`, a pure function of the state of `rng`."""
    frames = render(draw_scene(rng, image_size), kind, num_frames)
    frames += NOISE * rng.standard_normal(frames.shape, np.float32)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def write_mp4(
    path: Path,
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    fps: int | Fraction = 10,
    holds: Sequence[float] | None = None,
) -> None:
    """Encode frames with even height and width, [t, h, w, 3] or one at a time, as H.264 in mp4.

    With `holds` frame i is shown for holds[i] seconds whatever `fps` is, rounded to milliseconds
    and at least one.
    """
    import av
    from av.codec.codec import UnknownCodecError

    # With macroblock trees x264 is not deterministic for small frames: of 300 encodings of a 48x48
    # clip beside other threads 64 differed, without them none.
    options = {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream("libx264", rate=fps, options=options)
        except UnknownCodecError:
            raise UserError(
                "this build of PyAV has no H.264 encoder (libx264); the wheels on PyPI have it: "
                "pip install --force-reinstall av"
            ) from None
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
            if not i:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if starts is not None:
                frame.pts, frame.time_base = starts[i], _MILLISECOND
            packets += stream.encode(frame)
        packets += stream.encode()
        if starts is not None:  # the encoder does not know how long the last frame is shown
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

    `clips_per_class` is keyed by split. A clip is a function of (seed, split, class, number, sizes)
    alone, so a smaller data set is a subset of a larger one.
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

    # Threads suffice, because the encoder releases the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, jobs))
    return splits


def augment(
    rng: np.random.Generator,
    clips: UInt8[np.ndarray, "b t h w 3"],
    labels: Int[np.ndarray, " b"],
) -> tuple[UInt8[np.ndarray, "b t h w 3"], Int[np.ndarray, " b"]]:
    """Shift, mirror and reverse clips at random, and adapt their labels.

    These are symmetries of the data: a shift on the torus keeps the class, mirroring changes it to
    `MIRRORED`, reversing to `REVERSED`.
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


def _texture(rng: np.random.Generator, side: int) -> Float[np.ndarray, "side side 3"]:
    """Three random waves that are periodic on the torus, in grey levels."""
    at = 2 * np.pi * np.arange(side) / side
    waves = np.zeros((side, side, 3))
    for _ in range(3):
        across, down = rng.integers(-3, 4, 2)
        wave = np.sin(across * at[None, :] + down * at[:, None] + rng.uniform(0, 2 * np.pi))
        waves += wave[..., None] * rng.uniform(-9, 9, 3)
    return waves


def _depth(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The distance of the points (x, y) from the shape's edge, in pixels; negative outside."""
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
