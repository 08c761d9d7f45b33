# SPDX-License-Identifier: Apache-2.0
"""How a data set on disk becomes a list of examples, and how the frames of one are read.

Nothing is opened while examples are listed: of half a million, a missing or damaged one is found
when it is read, as a `VideoError` that names its path.
"""

import dataclasses
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vivit_jax.data.datasets.folders import (
    ARRAYS,
    IMAGES,
    VIDEOS,
    by_number,
    ending,
    is_image,
    read_directory,
)
from vivit_jax.data.datasets.list_files import SOURCES, Label, count_labels, read_list
from vivit_jax.data.sampling import pad_indices, training_indices, view_indices
from vivit_jax.data.video.decode import probe_video, read_video
from vivit_jax.data.video.images import read_picture
from vivit_jax.errors import UserError, VideoError, first_line
from vivit_jax.files.inputs import check_file
from vivit_jax.files.limits import check_unpacked

# numpy reads a header by `ast`, which in CPython counts its depth for all threads together: where a
# garbage collection lets another thread in, whole files fail with SystemError.
_one_header = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A clip of a data set.

    Attributes:
        path: a video file, a folder of frames, or an .npy or .npz file.
        label: of its class; several, one for each head, as a tuple; None where it is unlabelled.
        start: the first frame that belongs to the clip. Counted from 0, but where `frame_name` is
            set it is the number in that frame's name.
        total: frames of the clip; None: all there are from `start` on.
        frame_name: for a folder of known `total`, what its images are called, as `str.format` takes
            their number. None: its images are those it holds, in order of their names.
    """

    path: str
    label: Label
    start: int = 0
    total: int | None = None
    frame_name: str | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Clips in the order of their list, or of their names.

    Attributes:
        examples: all labelled, with equally many labels, or all unlabelled; at least one.
        classes: names by label, where folders name them.
        source: the list file or directory that was read.
        root: the directory that relative paths are of.
    """

    examples: tuple[Example, ...]
    classes: tuple[str, ...] | None
    source: str
    root: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all examples in their order, for a run that goes on to know them again.

        Wherever the data lie: paths count from `root`, but for those outside of it.
        """
        digest, root = hashlib.sha256(), os.path.join(self.root, "")
        for example in self.examples:
            path, *others = dataclasses.astuple(example)
            values = (path.removeprefix(root) if self.root else path, *others)
            digest.update(repr(values).encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def labels_per_example(self) -> int:
        """0 where the clips are unlabelled."""
        return count_labels(self.examples[0].label)


def read_dataset(
    source: str | Path,
    root: str | Path | None = None,
    *,
    labels: int | None = None,
    frame_name: str = "img_{:05}.jpg",
    first_frame: int = 1,
) -> Dataset:
    """Lists the examples of a data set, of one of these kinds.

    - A text file with a clip in each line, `path label`, and the other forms of
      `vivit_jax.data.datasets.list_files.parse_line`. Empty lines and lines that begin with "#"
      are skipped.
    - A directory with a folder for each class, which holds its clips. Classes are numbered in order
      of their names, those of empty folders too.
    - A directory of clips, which are unlabelled.

    In directories a clip is a file with one of the endings `VIDEOS` or `ARRAYS`, an animated .webp,
    or a folder of images; hidden files are skipped, others too, with a warning.

    Args:
        source: path of the file or directory.
        root: of relative paths in a list; None is the directory that the list is in.
        labels: of each line of a list (see `parse_line`); 0 leaves any clips unlabelled.
        frame_name: of the images in folders whose list says how many there are; `str.format` puts
            in the number.
        first_frame: number of a folder's first image, where the list does not say it.

    Raises:
        UserError: no such source, a line that cannot be read, no clip at all, some labelled and
            others not, one clip with two labels.
    """
    path = os.fspath(source)
    if labels is not None and (not isinstance(labels, int) or labels < 0):
        raise UserError(f"labels is {labels!r}; expected how many a line has, or None")
    try:
        if frame_name.format(1) == frame_name.format(2):
            raise ValueError("it is the same for every number")
    except (ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"frame_name is {frame_name!r}: {error}; expected a pattern such as 'img_{{:05}}.jpg'"
        ) from None
    if os.path.isdir(path):
        if labels is not None and labels > 1:
            raise UserError(f"{path}: folders name one label; for labels={labels} write a list")
        entries, classes = read_directory(path)
        if labels == 0:
            entries = [entry._replace(label=None) for entry in entries]
        examples = tuple(Example(e.path, e.label) for e in entries)
        return Dataset(examples, classes, path, path)
    if ending(path) in VIDEOS + ARRAYS + IMAGES:
        raise UserError(f"{path} is one clip; {SOURCES}")
    root = os.path.dirname(path) if root is None else os.fspath(root)
    examples = []
    for clip, label, start, total in read_list(path, labels):
        numbered = total is not None and ending(clip) not in (*VIDEOS, *ARRAYS, ".webp")
        if start is None:
            start = first_frame if numbered else 0
        name = frame_name if numbered else None
        examples.append(Example(os.path.join(root, clip), label, start, total, name))
    return Dataset(tuple(examples), None, path, root)


def count_frames(example: Example) -> int:
    """How many frames a clip has, at least 1; decodes only what `probe_video` decodes.

    Raises VideoError as `read_frames` does.
    """
    return _count(example, _stored(example))


def read_frames(example: Example, indices: Sequence[int]) -> np.ndarray:
    """Reads frames of a clip by their indices, from 0, in any order, repeats allowed.

    Returns:
        uint8 [t, h, w, c]; c is 3 but for arrays, which keep their channels.

    Raises:
        VideoError: the path leads to nothing that can be read, to damaged or too few frames, mostly
            to ones that cannot be decoded, to frames of several sizes, or to an array other than
            uint8 [t, h, w, c].
        UserError: `indices` is empty or has other than ints from 0.
    """
    return _read(example, _stored(example), indices)


def read_whole(example: Example) -> np.ndarray:
    """Reads all frames of a clip: uint8 [t, h, w, c].

    Raises VideoError as `read_frames` does, and for a video with frames that cannot be decoded.
    """
    stored = _stored(example)
    if stored is None and example.start == 0 and example.total is None:
        # It counts the frames as it decodes them.
        return read_video(example.path, lost="error")
    total = _count(example, stored)
    if example.total is not None:
        _read(example, stored, [total - 1])  # before room is made for all that the list says
    return _read(example, stored, range(total), lost="error")


def read_training_clip(
    example: Example, rng: np.random.Generator, *, num_frames: int, stride: int, sampler: str
) -> np.ndarray:
    """Reads one clip as `training_indices` draws it: uint8 [num_frames, h, w, c].

    Raises VideoError as `read_frames` does, UserError as `training_indices` does.
    """
    stored = _stored(example)
    total = _count(example, stored)
    return _read(example, stored, training_indices(sampler, total, num_frames, stride, rng))


def read_views(
    example: Example, *, num_frames: int, stride: int, sampler: str, clips: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the clips of `view_indices`, each frame once.

    Returns:
        uint8 [clips, num_frames, h, w, c] and their indices, int64 [clips, num_frames].

    Raises VideoError as `read_frames` does, UserError as `view_indices` does.
    """
    stored = _stored(example)
    indices = view_indices(sampler, _count(example, stored), num_frames, stride, clips)
    frames = _read(example, stored, indices.reshape(-1))
    return frames.reshape(*indices.shape, *frames.shape[1:]), indices


def open_array(path: str | os.PathLike) -> np.ndarray:
    """The frames of an .npy file (mapped, so that only what is used is read) or .npz file.

    An .npz file holds one array, or one called "frames".

    Returns:
        [t, h, w, c] of any type, none of them 0.

    Raises:
        VideoError: there is no such file, it is damaged or of another format (Python objects are
            refused: unpickling runs code), holds other arrays, or an .npz would unpack to more than
            `vivit_jax.files.limits` allows.
    """
    path = os.fspath(path)
    check_file(path, VideoError)
    if not os.path.isfile(path):
        raise VideoError(f"{path}: no such file")
    try:
        with _one_header, np.errstate(over="ignore"):  # of a shape that no array has
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(frames, np.lib.npyio.NpzFile):
                with frames as archive:
                    names = archive.files
                    name = names[0] if len(names) == 1 else "frames"
                    frames = _unpacked(path, archive, name) if name in names else None
    except (SystemError, UserError):  # which says nothing of the file, and says enough
        raise
    except Exception as error:  # of many kinds: zip files and headers may be damaged anywhere
        why = first_line(error)
        if "pickle" in why:  # numpy's words advise to allow it
            why = "damaged, of another format, or with Python objects, which are not read"
        raise VideoError(f"{path}: not an array in numpy's {ending(path)} format: {why}") from None
    if frames is None:
        names = names if len(names) <= 8 else [*names[:8], "..."]
        raise VideoError(f"{path}: holds the arrays {names}; expected one, or one called 'frames'")
    if frames.ndim != 4 or not frames.size:
        raise VideoError(
            f"{path}: an array of shape {frames.shape}; expected frames [t, h, w, c], none of "
            "them 0"
        )
    return frames


def _unpacked(path: str, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """An array of an .npz file, if it is one and not too large."""
    members = archive.zip.namelist()
    member = archive.zip.getinfo(f"{name}.npy" if f"{name}.npy" in members else name)
    # zipfile gives no more than this says.
    held = os.path.getsize(path)
    check_unpacked(f"{path}: {name} in it", member.file_size, held, VideoError)
    frames = archive[name]
    if not isinstance(frames, np.ndarray):  # but bytes
        raise VideoError(f"{path}: {name} in it is no array of numpy's")
    return frames


@dataclasses.dataclass(frozen=True)
class _NumberedImages:
    """The paths of a folder's images by what a list says, made as they are asked for.

    A list may say that there are two thousand million.
    """

    folder: str
    frame_name: str
    start: int
    total: int

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.folder, self.frame_name.format(self.start + int(index)))


def _stored(example: Example) -> np.ndarray | list[str] | _NumberedImages | None:
    """The clip's frames as an array, the paths of its images, or None, for a video file."""
    path, start, total = example.path, example.start, example.total
    if ending(path) in ARRAYS:
        frames = open_array(path)
        if frames.dtype != np.uint8:
            raise VideoError(f"{path}: an array of {frames.dtype}; expected uint8")
    elif not os.path.isdir(path):
        if example.frame_name is not None:
            raise VideoError(f"{path}: no such folder of images, of which the list says {total}")
        return None
    elif example.frame_name is not None and total is not None:
        return _NumberedImages(path, example.frame_name, start, total)
    else:
        try:
            names = [name for name in os.listdir(path) if is_image(name)]
        except OSError as error:
            raise VideoError(f"{path}: {error.strerror}") from None
        if not names:
            raise VideoError(f"{path}: a folder without images ({', '.join(IMAGES)})")
        frames = [os.path.join(path, name) for name in sorted(names, key=by_number)]
    end = len(frames) if total is None else start + total
    if not 0 <= start < end <= len(frames):
        raise VideoError(
            f"{path}: there are {len(frames)} frames; the list says "
            f"{'those' if total is None else total} from frame {start} on"
        )
    return frames[start:end]


def _count(example: Example, stored) -> int:
    total = example.total if stored is None else len(stored)
    if total is None:
        total = probe_video(example.path).num_frames - example.start
    if total < 1:
        raise VideoError(f"{example.path}: there are no frames from frame {example.start} on")
    return total


def _read(example: Example, stored, indices: Sequence[int], lost: str = "few") -> np.ndarray:
    path = example.path
    total = example.total if stored is None else len(stored)
    try:
        # How long a video is, if the list does not say, is seen when it is read.
        indices = pad_indices(indices, sys.maxsize if total is None else total)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    if stored is None:
        return read_video(path, indices=indices + example.start, lost=lost)
    if isinstance(stored, np.ndarray):
        return np.array(stored[indices])
    # A held frame is decoded once.
    distinct, places = np.unique(indices, return_inverse=True)
    images = [read_picture(stored[k]) for k in distinct]
    sizes = {}
    for k, image in zip(distinct, images, strict=True):
        sizes.setdefault(image.shape, k)
    if len(sizes) > 1:
        named = ", ".join(f"{w}x{h} (frame {k})" for (h, w, _), k in sizes.items())
        raise VideoError(f"{path}: frames of different sizes: {named}; expected one size")
    return np.stack(images)[places]
