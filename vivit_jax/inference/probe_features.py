# SPDX-License-Identifier: Apache-2.0
"""Features of labelled clips from a frozen model, kept on disk, so that an interrupted run goes on.

Each clip has a feature file (`vivit_jax.inference.feature_file`) whose name is a hash of the clip's
content and the frames that a list says of it. The files lie in a folder whose name is a hash of
everything else that the numbers depend on: weights, config, preprocessing and views. So a feature
is found again only where it would come out the same, and files that moved keep theirs.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int64
from safetensors import safe_open

from vivit_jax.config_base import READING
from vivit_jax.data.datasets.check import content_digest, in_threads
from vivit_jax.data.datasets.dataset import Dataset, Example, ObjectExample
from vivit_jax.data.one_clip import one_clip
from vivit_jax.errors import UserError, VideoError, WriteError, counted
from vivit_jax.files.atomic import whole_file
from vivit_jax.inference.feature_file import RowWriter, changed
from vivit_jax.inference.features import feature_function
from vivit_jax.param_tree import params_hash
from vivit_jax.progress import live_line, readable
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train.eval_views import Views
from vivit_jax.version import __version__

logger = logging.getLogger(__name__)

_AT_ONCE = 8  # views that go through the model together, except on a CPU
# What a probe replaces: parameters, and fields of the config. The views say how clips are read.
_REPLACED = ("head", "attentive")
_LEFT_OUT = (
    "id2label", "label2id", "num_labels", "class_splits", "split_names", "problem_type",
    "attentive_heads", *READING,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model that only computes features: the input of its classifier, or all of its tokens.

    Attributes:
        model: with any head.
        params: its parameters.
        processor: prepares frames for it.
        views: which frames of a video, and which parts of them.
        tokens: whether a view gives all tokens [l, d] or one vector [d].
    """

    model: Any
    params: Mapping[str, Any]
    processor: Any
    views: EvalSettings
    tokens: bool = False

    @property
    def each(self) -> int:
        """Views of a video."""
        return self.views.clips * self.views.crops

    def function(self) -> Callable[[Any], jax.Array]:
        """uint8 [b, t, h, w, c] -> features [b, ...]."""
        pool = "tokens" if self.tokens else "head"
        return feature_function(self.model, self.params, self.processor, pool=pool)

    def settings(self) -> dict[str, Any]:
        """Everything that the features depend on except the clips, as JSON values."""
        config = self.model.config
        params = {k: v for k, v in self.params.items() if k not in _REPLACED}
        views = {k: v for k, v in dataclasses.asdict(self.views).items() if k != "average"}
        return {
            "features": "tokens" if self.tokens else "head",
            "params_sha256": params_hash(params),
            "config": {k: v for k, v in config.to_dict().items() if k not in _LEFT_OUT},
            "dtype": config.dtype,
            "processor": self.processor.to_dict(),
            "views": views,
            "vivit_jax": __version__,
        }


@dataclasses.dataclass(frozen=True)
class ClipFeatures:
    """Features of the readable clips of a data set, in its order.

    Attributes:
        pooled: one vector for each view; of tokens, their mean.
        files: the feature file of each clip.
        clips: the place of each in the data set.
        groups: a hash of each clip's file, so that clips of one file and copies have the same.
        unreadable: path -> why, of the other clips.
        repeated: paths of clips with fewer frames than a view takes, so that some are repeated.
    """

    pooled: Float32[np.ndarray, "clips views d"]
    files: tuple[Path, ...]
    clips: tuple[int, ...]
    groups: tuple[str, ...]
    unreadable: Mapping[str, str]
    repeated: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.clips)

    def taken(self, rows: Sequence[int]) -> "ClipFeatures":
        """Those of some clips."""
        return dataclasses.replace(
            self,
            pooled=self.pooled[list(rows)],
            files=tuple(self.files[i] for i in rows),
            clips=tuple(self.clips[i] for i in rows),
            groups=tuple(self.groups[i] for i in rows),
        )


def clip_features(
    frozen: Frozen, dataset: Dataset, folder: Path, *, threads: int = 2, name: str = "features"
) -> ClipFeatures:
    """The features of all readable clips: those in `folder`, and the others computed and put there.

    `folder` is made when the first clip is written. On a CPU views go through the model one by one,
    so that no bit depends on how often the work was interrupted.

    Raises UserError if no clip can be read, WriteError if the disk has no room.
    """
    settings, examples = frozen.settings(), dataset.examples
    digests, unreadable = _digests(examples, threads)
    files = {i: folder / _file_name(settings, digest, examples[i]) for i, digest in digests.items()}
    usable = {path for path in set(files.values()) if _usable(path)}
    # Equal clips have one file.
    missing = {path: i for i, path in reversed(files.items()) if path not in usable}
    if missing:
        order = sorted(missing.values())
        part = dataclasses.replace(dataset, examples=tuple(examples[i] for i in order))
        errors = _compute(frozen, part, [files[i] for i in order], settings, threads, name)
        failed = {files[order[place]]: error for place, error in errors.items()}
        unreadable |= {i: failed[path] for i, path in files.items() if path in failed}
    clips = [i for i in files if i not in unreadable]
    if not clips:
        raise UserError(
            f"none of the {counted(len(dataset), 'clip')} of {dataset.source} could be read: "
            f"{next(iter(unreadable.values()))}"
        )
    read = [_pooled(files[i]) for i in clips]
    repeats = [any(len(set(row)) < len(row) for row in frames.tolist()) for _, frames in read]
    return ClipFeatures(
        pooled=np.stack([pooled for pooled, _ in read]),
        files=tuple(files[i] for i in clips),
        clips=tuple(clips),
        groups=tuple(digests[i] for i in clips),
        unreadable={examples[i].path: error for i, error in sorted(unreadable.items())},
        repeated=tuple(examples[i].path for i, short in zip(clips, repeats, strict=True) if short),
    )


def read_tokens(file: Path) -> Float32[np.ndarray, "views l d"]:
    """The tokens of a clip, from its file."""
    return _arrays(file)[0]


def read_view(file: Path, view: int) -> Float32[np.ndarray, "l d"]:
    """The tokens of one view of a clip; the others are not read."""
    with safe_open(file, "np") as opened:
        return opened.get_slice("features")[view]


def count_views(file: Path) -> int:
    """The number of views in a clip's file."""
    with safe_open(file, "np") as opened:
        return opened.get_slice("features").get_shape()[0]


def _digests(examples: Sequence[Example], threads: int) -> tuple[dict[int, str], dict[int, str]]:
    """A hash of each clip's content, by place, and why some cannot be read."""

    def digest(example: Example) -> str | VideoError:
        try:
            with one_clip(example.path):
                return _digest(example)
        except VideoError as error:
            return error

    first: dict[Any, Example] = {}  # a file may be listed with several ranges of frames
    for example in examples:
        first.setdefault(_source(example), example)
    found = dict(zip(first, in_threads(digest, [*first.values()], threads), strict=True))
    each = {i: found[_source(example)] for i, example in enumerate(examples)}
    return (
        {i: text for i, text in each.items() if isinstance(text, str)},
        {i: str(error) for i, error in each.items() if isinstance(error, VideoError)},
    )


def _source(example: Example) -> Any:
    return example.index if isinstance(example, ObjectExample) else example.path


def _digest(example: Example) -> str:
    try:
        return content_digest(example)
    except OSError as error:
        raise VideoError(f"{example.path}: {error.strerror}") from None


def _file_name(settings: Mapping[str, Any], digest: str, example: Example) -> str:
    span = (example.start, example.total, example.frame_name)
    return f"{_hash(settings)[:16]}/{_hash([digest, *span])[:32]}.safetensors"


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _usable(path: Path) -> bool:
    """Whether a feature file is there and undamaged."""
    if not path.exists():
        return False
    try:
        if changed(path) == []:
            return True
    except UserError:
        pass
    logger.warning("%s is damaged and is computed again", path)
    return False


def _compute(
    frozen: Frozen,
    part: Dataset,
    paths: Sequence[Path],
    settings: Mapping[str, Any],
    threads: int,
    name: str,
) -> dict[int, str]:
    """Compute and write the features of clips; why some cannot be read, by their place."""
    on_cpu = jax.default_backend() == "cpu"
    function, each = frozen.function(), frozen.views.clips * frozen.views.crops
    views = Views(
        part, frozen.model.config, frozen.views, 1 if on_cpu else _AT_ONCE, threads=threads
    )
    rows, done, errors = collections.deque[np.ndarray](), 0, dict[int, str]()
    with live_line(name) as progress:
        for batch in views:
            rows.extend(np.asarray(function(batch), np.float32))
            while done < len(part) and len(rows) >= each:
                features = np.stack([rows.popleft() for _ in range(each)])
                indices, error = views.found[done]
                if indices is None:
                    errors[done] = str(error)
                else:
                    if done == len(errors):  # the first that is written
                        _check_room(paths[done], features.nbytes * len(part))
                    indices = np.repeat(indices, frozen.views.crops, axis=0)
                    _write(paths[done], features, indices, part.examples[done], settings)
                done += 1
                progress(done, len(part))
    return errors


def _write(
    path: Path,
    features: Float32[np.ndarray, "views ..."],
    indices: Int64[np.ndarray, "views t"],
    example: Example,
    settings: Mapping[str, Any],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, RowWriter(partial) as file:
        for row, frames in zip(features, indices, strict=True):
            file.add(features=row, frame_indices=frames)
        file.finish({"settings": settings, "video": {"path": example.path}})


def _check_room(path: Path, size: int) -> None:
    there = next(parent for parent in path.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        raise WriteError(
            f"{path.parent}: the features take {readable(size)} and {readable(free)} are free; "
            "take fewer views (--clips, --crops), --head linear, or --out on another disk"
        )


def _pooled(path: Path) -> tuple[Float32[np.ndarray, "views d"], Int64[np.ndarray, "views t"]]:
    """One vector for each view, and its frames; of tokens, their mean."""
    features, frames = _arrays(path)
    return features.reshape(len(features), -1, features.shape[-1]).mean(1), frames


def _arrays(path: Path) -> tuple[Float32[np.ndarray, "views ..."], Int64[np.ndarray, "views t"]]:
    with safe_open(path, "np") as file:
        return file.get_tensor("features"), file.get_tensor("frame_indices")
