# SPDX-License-Identifier: Apache-2.0
"""The videos that a classifier takes: which they are, their names, and reading them ahead."""

import collections
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import jax
import numpy as np

from vivit_jax.data.video.sources import are_frames, is_content, stacked_frames
from vivit_jax.errors import UserError, VideoError, quoted
from vivit_jax.files.local import local_file, shown

# The path or link of a video, .npy or .npz file, its content, an open file, or frames as an array
# or as a list of pictures.
Video = str | os.PathLike | bytes | BinaryIO | np.ndarray | jax.Array | Sequence[Any]
_EXPECTED = (
    "a path, a link, bytes, an open file, frames as an array [t, h, w, c] or as a list of pictures"
)


def is_one(inputs: Any) -> bool:
    """Whether it is one video."""
    known = isinstance(inputs, str | os.PathLike) or _is_array(inputs)
    return known or is_content(inputs) or are_frames(inputs)


def _is_array(video: Any) -> bool:
    """Whether it is an array, also of another library, such as a tensor of PyTorch.

    Not a column of paths, as pandas has it.
    """
    known = isinstance(video, np.ndarray | jax.Array)
    return known or (hasattr(video, "__array__") and getattr(video, "ndim", 0) > 1)


def several(inputs: Any) -> Iterable[Any]:
    """Videos; UserError for what cannot be several of them."""
    if not isinstance(inputs, Iterable) or isinstance(inputs, Mapping):
        raise UserError(
            f"inputs is {type(inputs).__name__}, expected {_EXPECTED}, or a list or generator of "
            "these"
        )
    return inputs


def _named(number: int, video: Any) -> tuple[str, Any]:
    """A video with what messages call it."""
    if _is_array(video):
        return f"array {number}", np.asarray(video)
    if are_frames(video):
        return f"frames {number}", video
    if isinstance(video, bytes | bytearray | memoryview):
        return f"bytes {number}", video
    if not is_one(video):
        raise UserError(f"video {number} is {type(video).__name__}, expected {_EXPECTED}")
    return shown(video), video


@contextlib.contextmanager
def readable(name: str, video: Any) -> Iterator[str | os.PathLike | np.ndarray]:
    """A video as `read_clips` takes it."""
    if are_frames(video):
        yield stacked_frames(video, name)
    elif is_content(video):
        _check_content(name, video)
        with local_file(video, VideoError, name) as path:
            yield path
    else:
        yield video


def _check_content(name: str, video: Any) -> None:
    """VideoError for bytes that are a path; every video has a zero, most as their first byte."""
    if isinstance(video, bytes | bytearray | memoryview) and 0 not in video:
        text = quoted(bytes(video[:1000]).decode(errors="backslashreplace"))
        raise VideoError(
            f"{name}: {text!r} is no video: bytes are the content of a file here; give the path as "
            "text: os.fsdecode(path)"
        )


def read_ahead(
    videos: Iterable[Video], read: Callable[[str, Any], Any], threads: int
) -> Iterator[tuple[str | None, Any]]:
    """(name, what `read` returns) of each video, in order, read in threads, a few ahead.

    Ends with (None, error) if the videos' own iterator raises one.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="read clips") as pool:
        ahead: collections.deque = collections.deque()
        raised, numbered = None, enumerate(videos)
        try:
            while True:
                try:
                    name, video = _named(*next(numbered))
                except StopIteration:
                    break
                except Exception as error:
                    raised = error
                    break
                ahead.append((name, pool.submit(read, name, video)))
                if len(ahead) > threads:
                    name, future = ahead.popleft()
                    yield name, future.result()
            while ahead:
                name, future = ahead.popleft()
                yield name, future.result()
            if raised is not None:
                yield None, raised
        finally:
            # Stopping early waits for videos that are being read, not for those not begun.
            for _, future in ahead:
                future.cancel()
