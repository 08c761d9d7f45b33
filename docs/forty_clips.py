# SPDX-License-Identifier: Apache-2.0
"""Makes the clips of forty_clips.md: a folder as people have it, and clips to test with.

    .venv/bin/python docs/forty_clips.py DIRECTORY [SEED]

A shape moves or changes its size, and each class mostly has a colour of its own. Of the 40 clips in
clips/, which lie in folders by year and class, one is portrait, one is stored lying and shown
portrait, one is too short, and one is damaged; sizes and lengths differ. held-out/ has 80 clips of
the same classes, unlabelled/ has clips for pre-training.
"""

import dataclasses
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vivit_jax.data.datasets.synthetic import draw_scene, render, write_mp4

# Class: (what moves how, mean colour).
CLASSES = {
    "moving left": ("move-left", (250, 70, 60)),
    "moving right": ("move-right", (60, 230, 80)),
    "growing": ("grow", (80, 100, 250)),
    "shrinking": ("shrink", (250, 230, 60)),
}
SIZES = ((96, 72), (64, 64), (128, 72), (80, 60))  # width, height
FPS = 10
NOISE = 5.0  # grey levels
SPREAD = 25.0  # of a class's colour, grey levels


def clip(kind: str, rng: np.random.Generator, size: tuple[int, int], frames: int) -> np.ndarray:
    """Frames [t, h, w, 3] of a clip of this class."""
    width, height = size
    motion, mean = CLASSES[kind]
    scene = draw_scene(rng, max(size))
    colour = np.clip(np.array(mean) + SPREAD * rng.standard_normal(3), 0, 255)
    pictures = render(dataclasses.replace(scene, colour=colour), motion, frames)
    left, top = (max(size) - width) // 2, (max(size) - height) // 2
    pictures = pictures[:, top : top + height, left : left + width]
    pictures = pictures + NOISE * rng.standard_normal(pictures.shape, np.float32)
    return np.clip(np.rint(pictures), 0, 255).astype(np.uint8)


def write(path: Path, kind: str, rng: np.random.Generator, *, size=None, frames=None) -> None:
    """Write a clip as mp4, with a size and a length of its own."""
    size = SIZES[rng.integers(len(SIZES))] if size is None else size
    frames = int(rng.integers(16, 33)) if frames is None else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, clip(kind, rng, size, frames), FPS)


def turn(path: Path) -> None:
    """Say in an mp4 file that its frames are shown turned by 90 degrees, as phones do."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # after the fields of the track's header, version 0
    one = 1 << 16
    struct.pack_into(">9i", data, matrix, 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def people_clips(root: Path) -> Iterator[tuple[Path, str]]:
    """The places of 40 clips: ten of each class, in two years' folders."""
    for kind in CLASSES:
        for number in range(10):
            year = "2025" if number < 5 else "2026"
            yield root / "clips" / year / kind / f"clip {number + 1:02}.mp4", kind


def main(root: Path, seed: int = 40) -> None:
    """Write everything below `root`; the same files each time."""
    rng = np.random.default_rng(seed)
    special = {3: "portrait", 14: "turned", 25: "short", 36: "damaged"}
    for number, (path, kind) in enumerate(people_clips(root)):
        what = special.get(number)
        size = (72, 96) if what == "portrait" else (96, 72) if what == "turned" else None
        write(path, kind, rng, size=size, frames=3 if what == "short" else None)
        if what == "turned":
            turn(path)
        elif what == "damaged":  # as by a copy that broke off
            path.write_bytes(path.read_bytes()[:600])
    for kind in CLASSES:
        for number in range(20):
            write(root / "held-out" / kind / f"{number:02}.mp4", kind, rng)
    for number in range(160):
        kind = list(CLASSES)[number % len(CLASSES)]
        write(root / "unlabelled" / f"{number:03}.mp4", kind, rng)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
