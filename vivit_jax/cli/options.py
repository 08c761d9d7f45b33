# SPDX-License-Identifier: Apache-2.0
"""Groups of flags that several commands share."""

import dataclasses
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which frames of a video make up its clip.

    Attributes:
        stride: Frames between sampled frames. Default: the recipe's (ViViT 2, VideoMAE 4), less for
            a video that is too short for it.
        start: Where the clip starts: begin, center, end, or the index of its first frame.
        pad: How to fill up a video with fewer frames than the model takes.
    """

    stride: int | None = None
    start: str = "center"
    pad: Literal["error", "repeat_last", "loop"] = "error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """The picture that a command writes.

    Attributes:
        out: File to write: .png has a column for each frame, at most eight evenly spaced ones; .mp4
            and .gif move and show every frame.
        overwrite: Replace files that exist.
        json: Print a JSON object instead of text.
    """

    out: Path
    overwrite: bool = False
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """The processes that work on one command together.

    Attributes:
        coordinator: Address of process 0, host:port, if there are several.
        processes: How many processes there are.
        process: Number of this process, from 0.
    """

    coordinator: str | None = None
    processes: int = 1
    process: int = 0


READ, ONE_PROCESS = ReadOptions(), ProcessOptions()  # defaults
