# SPDX-License-Identifier: Apache-2.0
"""Clips and labels of data set objects, as Hugging Face `datasets` and torchvision have them."""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vivit_jax.data.datasets.class_names import describe_unknown
from vivit_jax.data.datasets.list_files import LARGEST
from vivit_jax.errors import UserError, VideoError, counted, first_line, quoted

_CLIPS = ("video", "clip", "frames", "path", "pixel_values")
_LABELS = ("label", "labels", "target", "class")
_CHANNELS = (1, 3, 4)
_EXPECTED = (
    f"expected a mapping with a clip ({', '.join(_CLIPS)}) and 'label', a tuple (clip, label), or "
    "a clip: a path or uint8 frames"
)


@dataclasses.dataclass(frozen=True)
class ObjectClips:
    """An object that has a length and gives an item for each place below it.

    Attributes:
        source: the object.
        name: what messages call it.
    """

    source: Any
    name: str

    def __post_init__(self):
        if isinstance(self.source, str | bytes):
            raise UserError(
                f"{self.name} {self.source!r}: a path; read_dataset reads what is there"
            )
        if not hasattr(self.source, "__len__") or not hasattr(self.source, "__getitem__"):
            raise UserError(
                f"{self.name}: no data set object; expected one with a length and items by index"
            )
        if not len(self.source):
            raise UserError(f"{self.name}: a data set object without clips")
        columns = self._columns()
        if columns is not None:
            self._check_columns(columns)

    def _columns(self) -> list[str] | None:
        """The names of the object's columns, if it has such."""
        columns = getattr(self.source, "column_names", None)
        return list(columns) if isinstance(columns, list | tuple) else None

    def _check_columns(self, columns: list[str]) -> None:
        """UserError for columns without a clip, and for one that nothing here can decode."""
        column = next((name for name in _CLIPS if name in columns), None)
        if column is None:
            raise UserError(
                f"{self.name}: columns {', '.join(columns)}; expected one with the clips: "
                f"{', '.join(_CLIPS)}; rename yours: dataset.rename_column(..., 'video')"
            )
        features = getattr(self.source, "features", None)
        kind = features.get(column) if isinstance(features, Mapping) else None
        # `datasets` decodes it by a package of its own; without that, it has the path.
        decoded = type(kind).__name__ == "Video" and getattr(kind, "decode", False)
        if decoded and importlib.util.find_spec("torchcodec") is None:
            raise UserError(
                f"{self.name}: column {column!r} is decoded by torchcodec, which is not installed; "
                f"use dataset.cast_column({column!r}, datasets.Video(decode=False)), whose files "
                "are read here"
            )

    def unlabelled(self) -> str:
        """Why there are no labels, for the end of a message."""
        found = self._columns()
        item = None if found else self.source[0]
        if isinstance(item, Mapping):
            found = list(map(str, item))
        keys = f"keys {', '.join(found)}" if found else "a clip alone"
        return (
            f"; its items have {keys}; expected one of {', '.join(_LABELS)} besides, or a tuple "
            "(clip, label), or from_objects(..., labels=[...])"
        )

    def clip(self, index: int) -> UInt8[np.ndarray, "t h w c"] | str:
        """The frames of a clip, or its path.

        Raises VideoError for an item that holds neither.
        """
        name = f"{self.name}[{index}]"
        try:
            item = self.source[index]
        except ImportError as error:  # of what should decode it
            raise VideoError(f"{name}: {first_line(error)}") from error
        clip = _clip_of(item, name)
        if isinstance(clip, str | os.PathLike):
            return os.fsdecode(clip)
        return _frames(clip, name)

    def labels(
        self, given: Sequence[int | str | None] | None, classes: Sequence[str] | None
    ) -> tuple[Sequence[int | None], tuple[str, ...] | None]:
        """The label of each clip, and the names of the classes, if they have names."""
        found: list[Any] | None = self._column() if given is None else list(given)
        if found is None:
            found = [self._label(k) for k in range(len(self.source))]
        if len(found) != len(self.source):
            raise UserError(
                f"{self.name}: {counted(len(found), 'label')} for "
                f"{counted(len(self.source), 'clip')}"
            )
        kind = self._kind(found)
        names = self._class_names() if classes is None else tuple(map(str, classes))
        if kind == "none":
            return found, None
        if kind == "name":
            found = [str(name) for name in found]  # numpy has a type of its own
            names = names or tuple(sorted(set(found)))
            numbers = {name: k for k, name in enumerate(names)}
            unknown = sorted({name for name in found if name not in numbers})
            if unknown:
                raise UserError(
                    f"{self.name}: {counted(len(unknown), 'label')} not among its classes: "
                    f"{describe_unknown(unknown, names)}"
                )
            return [numbers[name] for name in found], names
        values = [int(label) for label in found]
        most = LARGEST if names is None else len(names) - 1
        wrong = next((k for k, label in enumerate(values) if not 0 <= label <= most), None)
        if wrong is not None:
            raise UserError(
                f"{self.name}: label {values[wrong]} of clip {wrong}; expected 0 to {most}"
            )
        return values, names

    def _kind(self, labels: list[Any]) -> str:
        """The kind of all labels: "number", "name" or "none"."""
        kinds = [_kind(label) for label in labels]
        others = {*kinds} - {kinds[0]}
        wrong = next((k for k, kind in enumerate(kinds) if kind in (None, *others)), None)
        if wrong is not None:
            first = f", and {quoted(repr(labels[0]))} of clip 0" if wrong else ""
            raise UserError(
                f"{self.name}: label {quoted(repr(labels[wrong]))} of clip {wrong}{first}; "
                "expected an integer for each clip, a name for each, or None for all"
            )
        return kinds[0] or "none"

    def _column(self) -> list[Any] | None:
        """The labels, if the object has them without its clips."""
        columns = self._columns()
        if columns is not None:
            column = next((name for name in _LABELS if name in columns), None)
            return [None] * len(self.source) if column is None else list(self.source[column])
        targets = getattr(self.source, "targets", None)
        if targets is not None and len(targets) == len(self.source):
            return list(targets)
        # torchvision's folders have (path, label); where clips are parts of videos, there are more.
        samples = getattr(self.source, "samples", None)
        if not isinstance(samples, list) or len(samples) != len(self.source):
            return None
        pairs = all(isinstance(sample, tuple) and len(sample) == 2 for sample in samples)
        return [label for _, label in samples] if pairs else None

    def _label(self, index: int) -> Any:
        try:
            item = self.source[index]
        except Exception as error:
            raise UserError(
                f"{self.name}[{index}] gives no label: {type(error).__name__}: "
                f"{first_line(error)}; expected an item for each index from 0 on (of several "
                "splits, choose one), or from_objects(..., labels=...)"
            ) from error
        if isinstance(item, Mapping):
            return next((item[name] for name in _LABELS if name in item), None)
        return item[-1] if isinstance(item, tuple) and len(item) > 1 else None

    def _class_names(self) -> tuple[str, ...] | None:
        features = getattr(self.source, "features", None)
        if isinstance(features, Mapping):
            for name in _LABELS:
                names = getattr(features.get(name), "names", None)
                if names:
                    return tuple(map(str, names))
        names = getattr(self.source, "classes", None)
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            return None
        return tuple(names) or None


def _kind(label: Any) -> str | None:
    """The kind of a label; None for one that is of no use."""
    if label is None:
        return "none"
    if isinstance(label, str):
        return "name"
    try:
        whole = not isinstance(label, bool | float | Sequence) and int(label) == label
    except (TypeError, ValueError):
        whole = False
    return "number" if whole else None


def _clip_of(item: Any, name: str) -> Any:
    """The clip in an item."""
    if isinstance(item, Mapping):
        key = next((key for key in _CLIPS if key in item), None)
        if key is None:
            raise VideoError(f"{name}: a mapping of {', '.join(map(str, item))}; {_EXPECTED}")
        found = item[key]
        if isinstance(found, Mapping):  # a column of videos that `datasets` does not decode
            if not found.get("path"):
                held = ", ".join(key for key, value in found.items() if value) or "nothing"
                raise VideoError(
                    f"{name}: {key!r} holds {held} and no path; save its bytes as a file, and "
                    "give the path"
                )
            found = found["path"]
        return found
    return item[0] if isinstance(item, tuple) and item else item


def _frames(clip: Any, name: str) -> UInt8[np.ndarray, "t h w c"]:
    if not hasattr(clip, "__array__"):
        if not hasattr(clip, "__len__") or not hasattr(clip, "__getitem__"):
            raise VideoError(f"{name}: a clip of type {type(clip).__name__}; {_EXPECTED}")
        # Also decoders that give a frame for each index, and pictures of Pillow.
        pictures = [np.asarray(clip[k]) for k in range(len(clip))]
        shapes = {picture.shape for picture in pictures}
        if len(shapes) != 1:
            raise VideoError(f"{name}: frames of shapes {sorted(shapes)}; expected one shape")
        clip = np.stack(pictures)
    frames = np.asarray(clip)
    # `datasets` widens integers to 64 bits, also in columns of uint8.
    if frames.dtype.kind in "iu" and frames.size and 0 <= frames.min() <= frames.max() <= 255:
        frames = frames.astype(np.uint8, copy=False)
    if frames.dtype != np.uint8 or frames.ndim != 4 or not frames.size:
        raise VideoError(
            f"{name}: frames of {frames.dtype} with shape {frames.shape}; expected 0 to "
            "255 as integers [t, h, w, c] or [t, c, h, w], not empty"
        )
    if frames.shape[-1] not in _CHANNELS and frames.shape[1] in _CHANNELS:
        frames = np.moveaxis(frames, 1, -1)
    if frames.shape[-1] not in _CHANNELS:
        raise VideoError(f"{name}: frames of shape {frames.shape}; expected 1, 3 or 4 channels")
    return frames
