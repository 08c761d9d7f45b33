# SPDX-License-Identifier: Apache-2.0
"""The clips in a directory: which of its files and folders are clips, which folders are classes."""

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
    """The clips in a directory, and where its folders are classes, their names.

    Raises UserError for one that holds no clips, or that is neither of one folder for each class
    nor of clips only.
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
        # One stands for all: to look into each takes minutes for a large data set.
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
    """Whether a file is one clip: by its name, and of .webp files those that are animated."""
    kind = ending(path)
    return kind in VIDEOS + ARRAYS or kind == ".webp" and is_webp(path, animated=True)


def is_image(name: str) -> bool:
    """Whether a file is called like a visible image."""
    return not name.startswith(".") and ending(name) in IMAGES


def by_number(name: str) -> list:
    """A key that sorts names as people do, img_2 before img_10."""
    # Every second part is of these digits, whatever else counts as one in other scripts.
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
        logger.warning("%s: %d files are no clips, such as %s", path, len(others), min(others))
    return sorted(folders), sorted(clips)


def _holds_images(path: str) -> bool | None:
    """Whether a directory holds images and neither clips nor folders; None: none of the three."""
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
    # The first stands for all: to look into each takes minutes for a large data set.
    return not is_clip(os.path.join(path, min(images))) if images else None
