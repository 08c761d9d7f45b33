# SPDX-License-Identifier: Apache-2.0
"""Lists the examples of a data set on disk or in an object, and reads the frames of one.

Listing opens no clip: among half a million, a missing or damaged one is found when it is read, as a
`VideoError` that names its path.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from vivit_jax.data.datasets.arrays import open_array
from vivit_jax.data.datasets.class_names import read_class_names
from vivit_jax.data.datasets.columns import Label
from vivit_jax.data.datasets.examples import Example, ListedExamples, described
from vivit_jax.data.datasets.folders import (
    ARRAYS,
    IMAGES,
    VIDEOS,
    by_number,
    ending,
    has_splits,
    is_folder,
    is_image,
    read_directory,
)
from vivit_jax.data.datasets.list_files import SOURCES, count_labels
from vivit_jax.data.datasets.list_formats import read_listed
from vivit_jax.data.datasets.list_rows import ListSource, NoSuchSplit
from vivit_jax.data.datasets.objects import ObjectClips
from vivit_jax.data.datasets.packs import is_pack, read_pack
from vivit_jax.data.datasets.records import is_records, read_records
from vivit_jax.data.datasets.tar_members import PICTURES
from vivit_jax.data.datasets.zipped import ZippedPictures
from vivit_jax.data.sampling import pad_indices, training_indices, view_indices
from vivit_jax.data.video.decode import count_video, read_video
from vivit_jax.data.video.images import read_picture
from vivit_jax.errors import UserError, VideoError, counted, there_are
from vivit_jax.files.addresses import Place, address_text, is_address
from vivit_jax.files.reading import is_directory, names_in


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectExample(Example):
    """A clip of a data set object; its `path` only names it.

    Attributes:
        clips: the object.
        index: the clip's place in it.
    """

    clips: ObjectClips | None = dataclasses.field(default=None, compare=False, repr=False)
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Clips in the order of their list, or of their names.

    Attributes:
        examples: at least one; all labelled, with the same number of labels, or all unlabelled.
        classes: names by label, if folders or a list name them.
        source: the list file or directory that was read.
        root: the directory that relative paths start from.
    """

    examples: Sequence[Example]
    classes: tuple[str, ...] | None
    source: str
    root: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all examples in order, by which a resumed run recognises them.

        Paths under `root` are taken relative to it, so the data may move.
        """
        digest, rows = hashlib.sha256(), described(self.examples, self.root)
        while text := "".join(map(repr, itertools.islice(rows, 4096))):
            digest.update(text.encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def labels_per_example(self) -> int:
        """Number of labels of each clip, 0 if they are unlabelled."""
        return count_labels(self.examples[0].label)

    @functools.cached_property
    def labels(self) -> Int32[np.ndarray, "clips heads"]:
        """The labels of all clips; without columns if they are unlabelled."""
        if isinstance(self.examples, ListedExamples):
            return self.examples.columns.labels
        heads = self.labels_per_example
        found = [example.label for example in self.examples] if heads else []
        return np.array(found, np.int32).reshape(len(self), heads)

    def labelled(self, labels: Int32[np.ndarray, "clips heads"], **changes: Any) -> "Dataset":
        """The same clips with other labels, and other fields with `changes`."""
        if isinstance(self.examples, ListedExamples):
            examples: Sequence[Example] = self.examples.labelled(labels)
        else:
            single = labels.shape[1] == 1
            rows = labels[:, 0].tolist() if single else map(tuple, labels.tolist())
            pairs = zip(self.examples, rows, strict=True)
            examples = tuple(dataclasses.replace(each, label=label) for each, label in pairs)
        return dataclasses.replace(self, examples=examples, **changes)


def read_dataset(
    source: str | Place,
    root: str | Path | None = None,
    *,
    labels: int | None = None,
    frame_name: str = "img_{:05}.jpg",
    first_frame: int = 1,
    split: str | None = None,
    class_names: str | Path | None = None,
) -> Dataset:
    """Lists the examples of a data set, which is one of these:

    - A text file with one clip per line, `path label`, or another form of
      `vivit_jax.data.datasets.list_files.parse_line`. Empty lines and lines that begin with "#"
      are skipped.
    - A list file of another of the `vivit_jax.data.datasets.list_formats.FORMATS`: columns by name,
      `path,class`, or the files of Kinetics, Something-Something v2, UCF101 and HMDB51. Classes
      with names are numbered in order of their names, or of the file of class names.
    - A directory with a folder of clips for each class, which may lie in other folders. Classes are
      numbered in order of their names, including empty folders. Such directories may be the splits
      in another one, as train and val.
    - A directory of clips, which are unlabelled.
    - TFRecord files of SequenceExamples, see `vivit_jax.data.datasets.records`: one, `NAME@COUNT`
      for the shards NAME-00000-of-COUNT and so on, or a directory of them.
    - A pack, or tar shards as WebDataset has them, see `vivit_jax.data.datasets.packs`: the
      directory, its manifest.json, one shard, or `NAME-{000..511}.tar` for several.

    In directories a clip is a file with one of the endings `VIDEOS` or `ARRAYS`, an animated .webp,
    or a folder of images; hidden files are skipped, and so are others, with a warning.

    Args:
        source: path of the file or directory.
        root: base of relative paths in a list; None: the list's own directory.
        labels: number of labels per line of a list (see `parse_line`); 0 drops all labels.
        frame_name: pattern of image names in folders whose list gives a count, for `str.format`.
        first_frame: number of a folder's first image, if the list does not give it.
        split: what to read of a list, or directory, with several splits, such as "train",
            "validation" (or "test", where there is none) or "test". It has no effect on other
            sources.
        class_names: a file of `read_class_names`, for lists.

    Raises:
        UserError: the source does not exist, a line cannot be read, there are no clips, only some
            are labelled, or one clip has two labels.
    """
    path = os.fspath(source)
    if not path:
        raise UserError(f"the path of a data set is empty; {SOURCES}")
    if labels is not None and (not isinstance(labels, int) or labels < 0):
        raise UserError(f"labels is {labels!r}; expected the number of labels per line, or None")
    try:
        if frame_name.format(1) == frame_name.format(2):
            raise ValueError("it is the same for every number")
    except (ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"frame_name is {frame_name!r}: {error}; expected a pattern such as 'img_{{:05}}.jpg'"
        ) from None
    if is_address(path):
        path = address_text(path)
    names = names_in(path) if is_directory(path) else None
    if is_records(path, names):
        return _recorded(path, labels, class_names)
    if is_pack(path, names):
        return _packed(path, labels, class_names)
    if names is not None:
        if labels is not None and labels > 1:
            raise UserError(f"{path}: folders give one label; for labels={labels} write a list")
        if class_names is not None:
            raise UserError(
                f"{path}: folders name their classes; leave out the file of class names "
                f"{os.fspath(class_names)}, or write a list"
            )
        entries, classes = read_directory(path, split)
        if labels == 0:
            entries = [entry._replace(label=None) for entry in entries]
        examples = tuple(Example(e.path, e.label) for e in entries)
        return Dataset(examples, classes, path, path)
    if ending(path) in VIDEOS + ARRAYS + IMAGES:
        raise UserError(f"{path} is one clip; {SOURCES}")
    root = os.path.dirname(path) if root is None else os.fspath(root)
    known = None if class_names is None else read_class_names(class_names)
    entries, classes = read_listed(ListSource(path, root, labels, split, known))
    return Dataset(ListedExamples(entries, root, frame_name, first_frame), classes, path, root)


def names_shards(source: str) -> bool:
    """Whether a text names shards, which may be several files, such as train.tfrecord@8."""
    return is_records(source, None) or is_pack(source, None)


def own_validation(
    source: str | Place, train: Dataset, *, split: str = "validation", **reading: Any
) -> Dataset | None:
    """The held-out clips that a list or directory of training clips has itself; None without any.

    `train` are its training clips; `reading` are the other arguments of `read_dataset`, which says
    what is raised.
    """
    if is_directory(source) and not has_splits(os.fspath(source)):
        return None
    try:
        held_out = read_dataset(source, split=split, **reading)
    except NoSuchSplit:
        return None
    return None if held_out.fingerprint == train.fingerprint else held_out


def _recorded(path: str, labels: int | None, class_names: str | Path | None) -> Dataset:
    """The data set of TFRecord files."""
    clips, found, classes = read_records(path, labels)
    if class_names is not None and found[0] is not None:
        most = max(label if isinstance(label, int) else max(label or (0,)) for label in found)
        classes = _named(path, most, class_names)
    return Dataset(_items(clips, found), classes, path)


def _packed(path: str, labels: int | None, class_names: str | Path | None) -> Dataset:
    """The data set of shards."""
    columns, root, classes, _ = read_pack(path)
    heads = columns.labels.shape[1]
    if labels == 0 or not heads:
        columns, classes = columns.unlabelled(), None
    elif labels not in (None, heads):
        raise UserError(f"{path}: {heads} labels for each clip; expected {labels}")
    elif class_names is not None:
        classes = _named(path, int(columns.labels.max()), class_names)
    # The pattern and number of images in folders, of which a pack has none.
    return Dataset(ListedExamples(columns, root, "", 0), classes, path, root)


def _named(path: str, most: int, class_names: str | Path) -> tuple[str, ...]:
    """The classes of a file that has to name those up to `most`."""
    classes = read_class_names(class_names)
    if most >= len(classes):
        raise UserError(
            f"{path}: has label {most}, and {os.fspath(class_names)} names classes 0 to "
            f"{len(classes) - 1}; use the file that belongs to these clips"
        )
    return classes


def from_objects(
    source: Any,
    *,
    labels: Sequence[int | str | None] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Dataset:
    """The data set of an object with `len(source)` and `source[i]`, for training and evaluation.

    Such are the data sets of Hugging Face `datasets` and torchvision. An item is a mapping with the
    key "video", "clip", "frames", "path" or "pixel_values" and, for a labelled clip, "label"; a
    tuple that begins with the clip and ends with the label; or a clip alone. A clip is the path of
    a file, or frames: integers from 0 to 255 [t, h, w, c] or [t, c, h, w], or a sequence of
    pictures.

    Clips are read when they are needed, by several threads at once. Labels come from `labels`, from
    a column or an attribute of `source` (`label`, `targets`, `samples`), else from all items, which
    reads each once.

    Args:
        source: the object; it is pickled for `data.workers`.
        labels: the label of each item; None in it means unlabelled.
        classes: names of classes 0, 1, ...; None: those that `source` gives, or in order of their
            names if labels are names.
        name: what messages call it; None: the name of its type.

    Raises:
        UserError: `source` is no such object or empty, labels differ in kind or number from what is
            expected, or only some clips are labelled.
    """
    clips = ObjectClips(source, name or type(source).__name__)
    found, known = clips.labels(labels, classes)
    return Dataset(_items(clips, found), known, clips.name)


def labels_wanted(dataset: Dataset) -> str:
    """Where the labels would be that an unlabelled data set of an object lacks; else ""."""
    first = dataset.examples[0]
    if isinstance(first, ObjectExample) and isinstance(first.clips, ObjectClips):
        return first.clips.unlabelled()
    return ""


def _items(clips: ObjectClips, labels: Sequence[Label]) -> tuple[ObjectExample, ...]:
    """An example for each item, by its place."""
    return tuple(
        ObjectExample(f"{clips.name}[{k}]", label, clips=clips, index=k)
        for k, label in enumerate(labels)
    )


def count_frames(example: Example) -> int:
    """The number of frames of a clip, at least 1; decodes only where packets do not number them.

    Raises VideoError as `read_frames` does.
    """
    example, stored = stored_clip(example)
    return _count(example, stored)


def read_frames(
    example: Example, indices: Sequence[int] | np.ndarray
) -> UInt8[np.ndarray, "t h w c"]:
    """Reads frames of a clip by index, from 0, in any order, repeats allowed.

    Arrays keep their channels; otherwise there are 3.

    Raises:
        VideoError: the path cannot be read, or gives damaged, too few or mostly undecodable frames,
            frames of several sizes, or an array other than uint8 [t, h, w, c].
        UserError: `indices` is empty or holds anything but ints from 0.
    """
    example, stored = stored_clip(example)
    return _read(example, stored, indices)


def read_whole(example: Example) -> UInt8[np.ndarray, "t h w c"]:
    """Reads all frames of a clip.

    Raises VideoError as `read_frames` does, and for a video with undecodable frames.
    """
    example, stored = stored_clip(example)
    if stored is None and example.start == 0 and example.total is None:
        # This counts the frames as it decodes them.
        return read_video(example.path, lost="error")
    total = _count(example, stored)
    if example.total is not None:
        _read(example, stored, [total - 1])  # fails early if the list overstates the frames
    return _read(example, stored, range(total), lost="error")


def read_training_clip(
    example: Example, rng: np.random.Generator, *, num_frames: int, stride: int, sampler: str
) -> UInt8[np.ndarray, "num_frames h w c"]:
    """Reads one clip as `training_indices` draws it.

    Raises VideoError as `read_frames` does, UserError as `training_indices` does.
    """
    example, stored = stored_clip(example)
    total = _count(example, stored)
    return _read(example, stored, training_indices(sampler, total, num_frames, stride, rng))


def read_views(
    example: Example, *, num_frames: int, stride: int, sampler: str, clips: int
) -> tuple[UInt8[np.ndarray, "clips num_frames h w c"], Int64[np.ndarray, "clips num_frames"]]:
    """Reads the clips of `view_indices`, each frame once. Returns them and their indices.

    Raises VideoError as `read_frames` does, UserError as `view_indices` does.
    """
    example, stored = stored_clip(example)
    indices = view_indices(sampler, _count(example, stored), num_frames, stride, clips)
    frames = _read(example, stored, indices.reshape(-1))
    return frames.reshape(*indices.shape, *frames.shape[1:]), indices


@dataclasses.dataclass(frozen=True)
class _NumberedImages:
    """The paths of a folder's images, by what a list says; each is made on demand.

    A list may claim two billion of them.
    """

    folder: str
    frame_name: str
    start: int
    total: int

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.folder, self.frame_name.format(self.start + int(index)))


Stored = (
    UInt8[np.ndarray, "total h w c"]
    | list[str]
    | list[bytes]
    | _NumberedImages
    | ZippedPictures
    | None
)


def stored_clip(example: Example) -> tuple[Example, Stored]:
    """The example with the path of its clip, and what is stored there; None for a video."""
    if isinstance(example, ObjectExample):
        assert example.clips is not None, "from_objects gives it"
        clip = example.clips.clip(example.index)
        if not isinstance(clip, str):
            return example, clip
        example = Example(clip, example.label)
    return example, _stored(example)


def _stored(example: Example) -> Stored:
    """The clip's frames as an array, the paths of its images, or None for a video file."""
    path, start, total = example.path, example.start, example.total
    if ending(path) in ARRAYS:
        frames = open_array(path)
        if frames.dtype != np.uint8:
            raise VideoError(f"{path}: an array of {frames.dtype}; expected uint8")
    elif ending(path) == PICTURES:
        return ZippedPictures(path)
    elif not is_folder(path):
        if example.frame_name is not None:
            raise VideoError(f"{path}: no such folder of images; the list gives it {total}")
        return None
    elif example.frame_name is not None and total is not None:
        return _NumberedImages(path, example.frame_name, start, total)
    else:
        try:
            names = [name for name in names_in(path) if is_image(name)]
        except OSError as error:
            raise VideoError(f"{path}: {error.strerror}") from None
        if not names:
            raise VideoError(f"{path}: a folder without images ({', '.join(IMAGES)})")
        frames = [os.path.join(path, name) for name in sorted(names, key=by_number)]
    end = len(frames) if total is None else start + total
    if not 0 <= start < end <= len(frames):
        claim = "a clip" if total is None else counted(total, "frame")
        raise VideoError(
            f"{path}: {there_are(len(frames), 'frame')}; the list asks for {claim} from frame "
            f"{start}"
        )
    return frames[start:end]


def _count(example: Example, stored: Stored) -> int:
    total = example.total if stored is None else len(stored)
    if total is None:
        total = count_video(example.path) - example.start
    if total < 1:
        raise VideoError(f"{example.path}: there are no frames from frame {example.start} on")
    return total


def _read(
    example: Example,
    stored: Stored,
    indices: Sequence[int] | np.ndarray,
    lost: str = "few",
) -> UInt8[np.ndarray, "t h w c"]:
    path = example.path
    total = example.total if stored is None else len(stored)
    try:
        # If the list does not give a video's length, reading it checks the indices.
        places = pad_indices(indices, sys.maxsize if total is None else total)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from None
    if stored is None:
        return read_video(path, indices=places + example.start, lost=lost)
    if isinstance(stored, np.ndarray):
        return np.array(stored[places])
    # A repeated frame is decoded once.
    distinct, order = np.unique(places, return_inverse=True)
    images = [_picture(stored[k], f"{path}, frame {k}") for k in distinct]
    sizes = {}
    for k, image in zip(distinct, images, strict=True):
        sizes.setdefault(image.shape, k)
    if len(sizes) > 1:
        named = ", ".join(f"{w}x{h} (frame {k})" for (h, w, _), k in sizes.items())
        raise VideoError(f"{path}: frames of different sizes: {named}; expected one size")
    return np.stack(images)[order]


def _picture(stored: str | bytes, name: str) -> UInt8[np.ndarray, "h w 3"]:
    return read_picture(stored) if isinstance(stored, str) else read_picture(name, stored)
