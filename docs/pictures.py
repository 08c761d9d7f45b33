# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of README.md from what `vivit-jax demo` wrote: `python docs/pictures.py`."""

import pathlib
import sys

from vivit_jax.cli.__main__ import main

DEMO = pathlib.Path("vivit-demo")
CLIP = str(DEMO / "data/test/grow/0000.mp4")
PICTURES = pathlib.Path(__file__).parent / "pictures"
DRAWN = {
    "reconstruction.png": ("reconstruct", "pretrained", "--mask", "random", "--mask-ratio", "0.5"),
    "attention.png": ("attention", "model", "--kind", "rollout"),
}

if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, (command, model, *flags) in DRAWN.items():
        out = ("--out", str(PICTURES / name), "--overwrite")
        if status := main([command, CLIP, "--model", str(DEMO / model), *flags, *out]):
            sys.exit(status)
