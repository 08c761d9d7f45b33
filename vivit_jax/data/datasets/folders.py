# SPDX-License-Identifier: Apache-2.0
"""Finds the clips in a directory, and whether its folders are classes or clips."""

import itertools
import logging
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from vivit_jax.data.datasets.columns import Entry
from vivit_jax.data.datasets.list_files import SOURCES
from vivit_jax.data.datasets.list_rows import SPLITS, NoSuchSplit, split_named
from vivit_jax.data.video.images import is_webp
from vivit_jax.errors import UserError, quoted
from vivit_jax.files.addresses import is_address
from vivit_jax.files.reading import is_directory, listed, walked

logger = logging.getLogger(__name__)

ARRAYS = (".npy", ".npz")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov")
VIDEOS += (".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv")
_SPLITS = {*itertools.chain.from_iterable(SPLITS)}
_DEEPEST = 16


def read_directory(
    path: str, split: str | None = None
) -> tuple[list[Entry], tuple[str, ...] | None]:
    """The clips in a directory, and the names of the classes if its folders are classes.

    A clip's class is the name of the folder above it, which may lie in other folders. Of a
    directory with the splits of a data set, that of `split` is read.

    Raises UserError for a directory without clips, with both folders and clips, with clips at
    different depths, or with several splits where `split` is None; NoSuchSplit for one that is not
    there.
    """
    folders, clips = _entries(path)
    if folders and clips:
        raise UserError(
            f"{path}: holds folders such as {folders[0]} and clips such as {clips[0]}; expected a "
            "folder for each class, or clips only"
        )
    if not folders:
        if not clips:
            raise UserError(f"{path}: no clips ({', '.join(VIDEOS + ARRAYS)}); {SOURCES}")
        return [Entry(os.path.join(path, name)) for name in clips], None
    paths = [os.path.join(path, name) for name in folders]
    of_images = [holds_images(folder) for folder in paths]
    if True in of_images:
        if False in of_images:
            raise UserError(
                f"{path}: {folders[of_images.index(True)]} holds images, "
                f"{folders[of_images.index(False)]} clips; expected a folder for each class, or "
                "folders of images only"
            )
        return [Entry(folder) for folder in paths], None
    splits = _splits(path, folders)
    if splits:
        return read_directory(os.path.join(path, _wanted_split(path, splits, split)))
    leaves = [leaf for name in folders for leaf in _leaves(path, (name,))]
    filled = [leaf for leaf in leaves if leaf.clips]
    if not filled:
        raise UserError(f"{path}: its folders hold no clips; {SOURCES}")
    depth = len(filled[0].folders)
    other = next((leaf for leaf in filled if len(leaf.folders) != depth), None)
    if other is not None:
        shown = [os.path.join(*leaf.folders, leaf.clips[0]) for leaf in (filled[0], other)]
        raise UserError(
            f"{path}: clips lie at different depths, such as {shown[0]} and {shown[1]}; the folder "
            "above a clip is its class: put all as deep, or write a list file"
        )
    return _labelled(path, [leaf for leaf in leaves if len(leaf.folders) == depth])


def _labelled(path: str, leaves: list["_Leaf"]) -> tuple[list[Entry], tuple[str, ...]]:
    """The clips of folders, each of which is named after its class, and the classes."""
    classes = tuple(sorted({leaf.folders[-1] for leaf in leaves}))
    labels = {name: label for label, name in enumerate(classes)}
    if len(classes) < len(leaves):
        paths: dict[str, tuple[str, ...]] = {}
        twice = next(
            (first, leaf.folders)
            for leaf in leaves
            if (first := paths.setdefault(leaf.folders[-1], leaf.folders)) != leaf.folders
        )
        logger.warning(
            "%s: %d folders of %d classes: folders of one name, such as %s and %s, are one class",
            path,
            len(leaves),
            len(classes),
            *(os.path.join(*folder) for folder in twice),
        )
    entries = [
        Entry(os.path.join(path, *leaf.folders, name), labels[leaf.folders[-1]])
        for leaf in leaves
        for name in leaf.clips
    ]
    return entries, classes


class _Leaf(NamedTuple):
    """A folder without folders other than clips: the names on the way to it, and its clips."""

    folders: tuple[str, ...]
    clips: list[str]


def _leaves(root: str, folders: tuple[str, ...]) -> Iterator[_Leaf]:
    """The folders of clips at or below a folder."""
    path = os.path.join(root, *folders)
    if len(folders) > _DEEPEST:
        raise UserError(
            f"{path}: more than {_DEEPEST} folders deep; is one of them a link to a folder above?"
        )
    inner, clips = _entries(path)
    # One is inspected for all: inspecting each takes minutes for a large data set.
    of_images = (holds_images(os.path.join(path, name)) for name in inner)
    kind = next((found for found in of_images if found is not None), None)
    if kind or not inner:
        yield _Leaf(folders, sorted(inner + clips))
        return
    if clips:
        yield _Leaf(folders, clips)
    for name in inner:
        yield from _leaves(root, (*folders, name))


def has_splits(path: str) -> bool:
    """Whether a directory holds splits of a data set, such as train and val."""
    return bool(_splits(path, _entries(path, warn=False)[0]))


def _splits(path: str, folders: list[str]) -> list[str]:
    """The folders of a directory that are splits of a data set, each with folders of classes."""
    splits = [name for name in folders if name.lower() in _SPLITS]
    if len(splits) < 2:
        return []
    inner = [
        os.path.join(path, s, name)
        for s in splits
        for name in _entries(f"{path}/{s}", warn=False)[0]
    ]
    return splits if inner and not holds_images(inner[0]) else []


def _wanted_split(path: str, splits: list[str], wanted: str | None) -> str:
    """The folder of the wanted split. Raises UserError."""
    if wanted is not None:
        found = split_named(wanted, splits, path)
        if found is None:
            raise NoSuchSplit(
                f"{path}: has no split {quoted(wanted)}, only {' and '.join(splits)}; say which: "
                "--split, or in training data.train_split and data.validation_split"
            )
        return found
    first = next((name for name in splits if name.lower().startswith("train")), splits[0])
    others = " and ".join(os.path.join(path, name) for name in splits if name != first)
    raise UserError(
        f"{path}: its folders {' and '.join(splits)} are splits of a data set, not classes; say "
        f"which (--split), or pass {os.path.join(path, first)} and {others}, each by itself"
    )


def clips_below(path: str, *, images: bool = False) -> list[str]:
    """The paths of all clips in a directory and in the folders below it, in order.

    With `images` also of folders of two images or more and nothing else. Hidden files and folders
    are skipped, and so are other files, with a warning. Raises UserError if there are no clips, and
    for a directory that cannot be listed.
    """
    found, others = [], []

    def refuse(error: OSError):
        raise UserError(f"{error.filename}: {error.strerror}")

    for folder, names, files in walked(path, refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if images and len([*filter(is_image, files)]) > 1 and holds_images(folder):
            found.append(folder)
            continue
        for name in sorted(files):
            if not name.startswith("."):
                file = os.path.join(folder, name)
                (found if is_clip(file) else others).append(file)
    if not found:
        raise UserError(f"{path}: no clips ({', '.join(VIDEOS + ARRAYS)}) in it or below")
    _warn_of_others(path, others)
    return found


def _warn_of_others(path: str, others: list[str]) -> None:
    if others:
        verb = "file is not a clip" if len(others) == 1 else "files are not clips"
        logger.warning("%s: %d %s, such as %s", path, len(others), verb, min(others))


def ending(path: str) -> str:
    """The lower-case ending of a file name, with its dot."""
    if "://" in path:  # a link's query follows it
        path = path.partition("?")[0]
    return os.path.splitext(path)[1].lower()


def is_clip(path: str) -> bool:
    """Whether a file is a clip: by its name, or a .webp that is animated."""
    kind = ending(path)
    return kind in VIDEOS + ARRAYS or kind == ".webp" and is_webp(path, animated=True)


def is_folder(path: str) -> bool:
    """Whether a clip is a folder of images; for a video of storage this takes no request."""
    return not (is_address(path) and ending(path) in VIDEOS + ARRAYS) and is_directory(path)


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    return not name.startswith(".") and ending(name) in IMAGES


def by_number(name: str) -> list:
    """A sort key that compares numbers by value, so that img_2 comes before img_10."""
    # Every second part consists of these digits; other scripts' digits stay text.
    parts = re.split("([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _entries(path: str, warn: bool = True) -> tuple[list[str], list[str]]:
    """Names of the folders and of the clips in a directory, sorted."""
    folders, clips, others = [], [], []
    try:
        for name, is_folder in listed(path):
            if name.startswith("."):
                continue
            if is_folder:
                folders.append(name)
            elif is_clip(os.path.join(path, name)):
                clips.append(name)
            else:
                others.append(name)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {SOURCES}") from None
    if others and all(is_image(name) for name in others) and not folders + clips:
        raise UserError(f"{path}: a folder of images, which is one clip; {SOURCES}")
    if warn:
        _warn_of_others(path, others)
    return sorted(folders), sorted(clips)


def holds_images(path: str) -> bool | None:
    """Whether a directory holds images, but no clips or folders; None if none of them."""
    images = []
    try:
        for name, is_folder in listed(path):
            if name.startswith("."):
                continue
            if ending(name) in VIDEOS + ARRAYS or is_folder:
                return False
            if is_image(name):
                images.append(name)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {SOURCES}") from None
    # The first is inspected for all: inspecting each takes minutes for a large data set.
    return not is_clip(os.path.join(path, min(images))) if images else None
