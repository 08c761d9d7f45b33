# SPDX-License-Identifier: Apache-2.0
"""Videos that are no files yet: bytes, open files, links, and frames one by one."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from vivit_jax.data.video import decode
from vivit_jax.errors import VideoError
from vivit_jax.files.local import is_link, is_open_file, local_file


def read_video(source: Any, **options: Any) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads a clip (`num_frames`), given frames (`indices`), or, with neither, every frame.

    `source` is the path of a video file, its content as bytes, an open binary file, or a link
    (https://..., gs://..., or another protocol of fsspec), of which only the parts that are needed
    are read. As a path may be bytes too, bytes without a NUL byte,
    which every video has, are one. `options` and errors are those of
    `vivit_jax.data.video.decode.read_video`; VideoError also for a source that cannot be fetched or
    has more bytes than `vivit_jax.files.limits` allows.
    """
    with local_file(_path_or_content(source), VideoError) as path:
        return decode.read_video(path, **options)


def probe_video(source: Any) -> decode.VideoInfo:
    """Describes a video of any source that `read_video` takes.

    See `vivit_jax.data.video.decode.probe_video`.
    """
    with local_file(_path_or_content(source), VideoError) as path:
        return decode.probe_video(path)


def _path_or_content(source: Any) -> Any:
    path = isinstance(source, bytes) and b"\0" not in source
    return os.fsdecode(source) if path else source


def are_frames(source: Any) -> bool:
    """Whether it is a list of one video's frames: pictures of Pillow, or arrays [h, w, c]."""
    return isinstance(source, list | tuple) and bool(source) and all(map(_is_frame, source))


def _is_frame(frame: Any) -> bool:
    return _is_picture(frame) or getattr(frame, "ndim", None) == 3


def _is_picture(frame: Any) -> bool:
    return callable(getattr(frame, "convert", None)) and hasattr(frame, "mode")


def stacked_frames(frames: Sequence[Any], name: str) -> Shaped[np.ndarray, "t h w c"]:
    """The frames of `are_frames` as one array; pictures become RGB. VideoError for unequal ones."""
    arrays = [np.asarray(f.convert("RGB") if _is_picture(f) else f) for f in frames]
    kinds = {(array.shape, array.dtype.name) for array in arrays}
    if len(kinds) > 1:
        named = ", ".join(f"{dtype} {shape}" for shape, dtype in sorted(kinds)[:3])
        raise VideoError(f"{name}: frames of different kinds: {named}; expected one size and type")
    return np.stack(arrays)


def is_content(source: Any) -> bool:
    """Whether it is a video that has to become a file first."""
    content = isinstance(source, bytes | bytearray | memoryview)
    return content or is_open_file(source) or is_link(source)
