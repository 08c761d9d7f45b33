# SPDX-License-Identifier: Apache-2.0
"""Finds the clips in a directory, and whether its folders are classes or clips."""

import logging
import os
import re

from vivit_jax.data.datasets.list_files import SOURCES, Entry
from vivit_jax.data.video.images import is_webp
from vivit_jax.errors import UserError

logger = logging.getLogger(__name__)

ARRAYS = (".npy", ".npz")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEOS = (".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv")
VIDEOS += (".ts", ".webm", ".wmv")


def read_directory(path: str) -> tuple[list[Entry], tuple[str, ...] | None]:
    """The clips in a directory, and the names of the classes if its folders are classes.

    Raises UserError for a directory without clips, or with both folders and clips.
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
    of_images = [_holds_images(folder) for folder in paths]
    if True in of_images:
        if False in of_images:
            raise UserError(
                f"{path}: {folders[of_images.index(True)]} holds images, "
                f"{folders[of_images.index(False)]} clips; expected a folder for each class, or "
                "folders of images only"
            )
        return [Entry(folder) for folder in paths], None
    examples = []
    for label, folder in enumerate(paths):
        inner, clips = _entries(folder)
        # One is inspected for all: inspecting each takes minutes for a large data set.
        if inner and not _holds_images(os.path.join(folder, inner[0])):
            raise UserError(
                f"{folder}: its folder {inner[0]} holds no images; expected clips in the folder of "
                "their class, or write a list file"
            )
        for name in sorted(inner + clips):
            examples.append(Entry(os.path.join(folder, name), label))
    if not examples:
        raise UserError(f"{path}: its folders hold no clips; {SOURCES}")
    return examples, tuple(folders)


def ending(path: str) -> str:
    """The lower-case ending of a file name, with its dot."""
    return os.path.splitext(path)[1].lower()


def is_clip(path: str) -> bool:
    """Whether a file is a clip: by its name, or a .webp that is animated."""
    kind = ending(path)
    return kind in VIDEOS + ARRAYS or kind == ".webp" and is_webp(path, animated=True)


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    return not name.startswith(".") and ending(name) in IMAGES


def by_number(name: str) -> list:
    """A sort key that compares numbers by value, so that img_2 comes before img_10."""
    # Every second part consists of these digits; other scripts' digits stay text.
    parts = re.split("([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _entries(path: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the clips in a directory, sorted."""
    folders, clips, others = [], [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif is_clip(entry.path):
                    clips.append(entry.name)
                else:
                    others.append(entry.name)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {SOURCES}") from None
    if others and all(is_image(name) for name in others) and not folders + clips:
        raise UserError(f"{path}: a folder of images, which is one clip; {SOURCES}")
    if others:
        verb = "file is not a clip" if len(others) == 1 else "files are not clips"
        logger.warning("%s: %d %s, such as %s", path, len(others), verb, min(others))
    return sorted(folders), sorted(clips)


def _holds_images(path: str) -> bool | None:
    """Whether a directory holds images, but no clips or folders; None if none of them."""
    images = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if ending(entry.name) in VIDEOS + ARRAYS or entry.is_dir():
                    return False
                if is_image(entry.name):
                    images.append(entry.name)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {SOURCES}") from None
    # The first is inspected for all: inspecting each takes minutes for a large data set.
    return not is_clip(os.path.join(path, min(images))) if images else None
