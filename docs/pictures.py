# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of README.md from what `vivit-jax demo` wrote: `python docs/pictures.py`."""

import pathlib
import shutil
import sys

from vivit_jax.cli.__main__ import main

DEMO = pathlib.Path("vivit-demo")
CLIPS = DEMO / "data/test"
PICTURES = pathlib.Path(__file__).parent / "pictures"
# Name: command, clip, model, flags.
DRAWN = {
    "reconstruction.png": (
        *("reconstruct", "grow/0000.mp4", "pretrained"),
        *("--mask", "random", "--mask-ratio", "0.5"),
    ),
    "attention.png": ("attention", "circle-clockwise/0003.mp4", "model", "--kind", "rollout"),
}

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, (command, clip, model, *flags) in DRAWN.items():
        out = ("--out", str(PICTURES / name), "--overwrite")
        if status := main([command, str(CLIPS / clip), "--model", str(DEMO / model), *flags, *out]):
            sys.exit(status)
    shutil.copyfile(DEMO / "few-labels.png", PICTURES / "labels.png")
