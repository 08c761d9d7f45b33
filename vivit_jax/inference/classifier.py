# SPDX-License-Identifier: Apache-2.0
"""From video files to labels and scores in one call."""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from checkpoints_convert.source import Source, open_source
from vivit_jax.data.one_clip import one_clip
from vivit_jax.data.read_clip import (
    Clip,
    check_reading,
    crop_rounding,
    read_clips,
)
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError, VideoError, counted
from vivit_jax.inference.videos import Video, is_one, read_ahead, readable, several
from vivit_jax.layers.embed import check_clip
from vivit_jax.models.losses import split_logits
from vivit_jax.models.registry import is_known
from vivit_jax.outputs import RESULTS_ONLY
from vivit_jax.train.metrics import action_scores
from vivit_jax.typed import reusable

logger = logging.getLogger(__name__)

FUNCTIONS = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "none": lambda logits: logits}
AVERAGES = ("softmax", "logits")
# By problem_type, as transformers' pipeline chooses; softmax where it says nothing.
_FUNCTION_OF = {"multi_label_classification": "sigmoid", "regression": "none"}


@dataclasses.dataclass(frozen=True)
class Classified:
    """The predictions for one video, best first, or why there are none."""

    clip: str  # the path or link; "array 0", "bytes 1", "frames 2" and so on for what has none
    frames: np.ndarray | None = None  # int64 [clips, t], the frames that were read
    predictions: list[dict[str, Any]] | None = None  # {"label", "index", "score"}
    # For a model of several heads: the predictions of each by its name.
    heads: dict[str, list[dict[str, Any]]] | None = None
    error: VideoError | None = None
    # Of every class in the order of config.labels; of several heads each one's own.
    scores: Float32[np.ndarray, " classes"] | None = None


class VideoClassifier:
    """A classifier with its preprocessing: `VideoClassifier.from_pretrained(dir)("clip.mp4")`.

    The counterpart of transformers' `pipeline("video-classification")`, argument for argument:

    | transformers | here |
    |---|---|
    | `pipeline(model=...)` | `VideoClassifier.from_pretrained(source)`: directory, file, hub id |
    | `revision` | `revision` |
    | `image_processor`, `video_processor` | `processor`; by default the one beside the weights |
    | `dtype` (`torch_dtype`) | `dtype`: "float32", "bfloat16", "float16" |
    | `device` | JAX's default device; `with jax.default_device(...)` chooses another |
    | `inputs`: a path, an http link, a list | these, bytes, an open file, frames, a generator |
    | `top_k=5` | `top_k=5` |
    | `num_frames` | the model's own; another length needs another model |
    | `frame_sampling_rate=1` | `stride`; by default the model's, less in a short video |
    | the clip is the video's beginning | `start="center"`; `"begin"` is theirs |
    | `function_to_apply` | `function_to_apply`: "softmax", "sigmoid", "none"; same defaults |
    | `batch_size=1` | `batch_size=1`: clips that go through the model together |
    | `num_workers` | `threads=2`, which read and prepare videos ahead of the model |
    | - | `num_clips`, `num_crops`, `average`: several views of each video, averaged |
    | - | `pad`: what to do with a video that is too short, by default "error" |

    With `stride=1, start="begin"` both read the same frames if theirs has an image processor. Their
    clips of a higher rate r are spaced slightly wider than r, by `num_frames * r - 1` over
    `num_frames - 1`. With a video processor (if torchvision is installed) transformers 5 spreads
    the frames over the whole video, whatever the rate.

    >>> classifier = VideoClassifier.from_pretrained("vivit-demo/model")
    >>> best, *others = classifier("vivit-demo/data/test/grow/0000.mp4", top_k=3)
    >>> sorted(best), len(others)
    (['index', 'label', 'score'], 2)
    """

    def __init__(self, model, params: Any, processor: VideoProcessor):
        """`model` is a `VivitForVideoClassification` or `VideoMAEForVideoClassification`.

        Or one of your own, as `vivit_jax.train.own_model` describes it.
        """
        pair = hasattr(model, "config") and isinstance(params, Mapping)
        if not pair or (is_known(model) and "head" not in params):
            raise UserError(
                f"VideoClassifier takes a classifier and its params, got {type(model).__name__} "
                "without a head"
            )
        self.model, self.params, self.processor = model, params, processor
        self.config = model.config

        def logits(params, pixels):
            out: Any = model.apply({"params": params}, pixels, **RESULTS_ONLY)
            return out.logits.astype(jnp.float32)

        self._logits = jax.jit(logits)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Source,
        *,
        config: Mapping[str, Any] | Iterable[str] | None = None,
        revision: str | None = None,
        processor: VideoProcessor | None = None,
        dtype: str = "float32",
        param_dtype: str | None = "float32",
        attention: str = "auto",
    ) -> "VideoClassifier":
        """Load a directory, a weight file, a file of VideoMAE's authors or of scenic, or a hub id.

        `config` is that of `vivit_jax.from_pretrained`, for a file without config.json. Raises
        UserError for a checkpoint without a classifier and if nothing says how frames are prepared,
        and what `vivit_jax.from_pretrained` raises.
        """
        # Cheap checks come before the weights.
        held = open_source(source, revision=revision, settings=reusable(config))
        if held.head != "classification":
            raise UserError(
                f"{source} holds {held.architecture}, which has no classifier; use a model "
                "fine-tuned for classification"
            )
        processor = processor_of(held) if processor is None else processor
        # The files that are open: a push to the hub in between must not mix commits.
        model, params = from_pretrained(
            held, dtype=dtype, param_dtype=param_dtype, attention=attention
        )
        return cls(model, params, processor)

    def __call__(self, inputs: Video | Iterable[Video], **options: Any):
        """Labels and scores of one video, best first: [{"label", "index", "score"}, ...].

        A video is a path or a link (http, https, or a protocol of fsspec), the content of a file as
        bytes, an open binary file, an array of frames [t, h, w, c], or a list of pictures (of
        Pillow, or arrays [h, w, c]). A list of videos gives a list of answers, any other iterable a
        lazy iterator. In both a video that cannot be read gives its VideoError, with a warning, and
        the others are still classified.

        `options` are those of `classify`. A model of several heads gives the best combinations of
        labels; `classify` also gives those of each head.

        Raises VideoError for a single video that cannot be read or is too short, UserError for
        wrong options.
        """
        if is_one(inputs):
            one: Any = inputs
            (result,) = self.classify([one], **options)
            if result.error is not None:
                raise result.error
            return result.predictions
        found = _answers(self.classify(several(inputs), **options))
        return list(found) if isinstance(inputs, list | tuple) else found

    def predict_proba(
        self, inputs: Video | Iterable[Video], **options: Any
    ) -> Float32[np.ndarray, "n classes"]:
        """The probability of every class, in the order of `config.labels`, for each video.

        `inputs` and `options` are those of a call. One video gives one row. Of several, a video
        that cannot be read gives a row of NaN, with a warning. A model of several heads gives the
        probabilities of each head's classes, one head after another.

        Raises UserError for a regression, and what a call raises.
        """
        given = options.pop("function_to_apply", None)
        function = _checked_function(given, self.config)
        if function == "none":
            own = f"this model's problem_type is {self.config.problem_type!r}"
            raise UserError(
                "predict_proba needs probabilities, and "
                f"{own if given is None else 'function_to_apply is none'}: call the classifier, or "
                "pass function_to_apply='softmax' or 'sigmoid'"
            )
        one = is_one(inputs)
        videos: Any = [inputs] if one else several(inputs)
        rows = []
        for result in self.classify(videos, function_to_apply=function, **options):
            if result.error is not None:
                if one:
                    raise result.error
                logger.warning("a row of NaN: %s", result.error)
            none = np.full(self.config.num_labels, np.nan)
            rows.append(none if result.scores is None else result.scores)
        return np.array(rows, np.float32).reshape(-1, self.config.num_labels)

    def __repr__(self) -> str:
        config, most = self.config, 4
        height, width = config.frame_size
        spread = config.view_sampler == "segments"
        apart = "one of each segment" if spread else f"stride {config.frame_stride}"
        names = ", ".join(config.labels[:most]) + (", ..." if len(config.labels) > most else "")
        return (
            f"VideoClassifier({type(self.model).__name__}: {counted(config.num_labels, 'class')} "
            f"({names}); clips of {counted(config.num_frames, 'frame')} of {height} x {width} "
            f"pixels, {apart}; {config.dtype})"
        )

    def classify(
        self,
        videos: Iterable[Video],
        *,
        top_k: int = 5,
        stride: int | None = None,
        start: str | int = "center",
        pad: str = "error",
        num_clips: int = 1,
        num_crops: int = 1,
        average: str | None = None,
        function_to_apply: str | None = None,
        batch_size: int = 1,
        threads: int = 2,
        square_pixels: bool = False,
    ) -> Iterator[Classified]:
        """Yields the predictions for each video, in order, or why it cannot be read.

        Args:
            videos: of the kinds that a call takes, read at most `threads` videos ahead of those
                whose views fill a batch. An exception of their iterator is raised after the results
                of the videos before it.
            top_k: the number of classes.
            stride, start, pad: which frames, see `vivit_jax.data.read_clip.read_clips`.
            num_clips: clips along time, spread as the papers test.
            num_crops: crops along the longer side, instead of the processor's centre crop.
            average: what is averaged over these views, "softmax" (as by VideoMAE's authors; it
                stands for `function_to_apply`) or "logits" (as by scenic). Default: the family's.
            function_to_apply: from logits to scores, "softmax", "sigmoid" or "none"; the default
                follows the config's problem_type.
            batch_size: views that go through the model together; it changes scores by rounding.
            threads: the number of threads that read videos ahead of the model.
            square_pixels: whether to make pixels square if a file's are not.

        Raises UserError for wrong options at once, before anything is read.
        """
        config = self.config
        _check_counts(
            top_k=top_k,
            num_clips=num_clips,
            num_crops=num_crops,
            batch_size=batch_size,
            threads=threads,
        )
        if stride is not None and not _counts(stride):
            raise UserError(f"stride is {stride!r}, expected an int of at least 1, or None")
        check_reading(start, pad, num_clips)
        average = config.average if average is None else average
        if average not in AVERAGES:
            raise UserError(f"average is {average!r}, expected one of {', '.join(AVERAGES)}")
        function = _checked_function(function_to_apply, config)

        def pixels(name: str, clips: list[Clip]) -> np.ndarray:
            try:
                return self._pixels(clips, num_crops)
            except VideoError as error:  # names frames, not their file
                raise VideoError(f"{name}: {error}") from None

        def read(name: str, video: Any) -> tuple[np.ndarray, np.ndarray] | VideoError:
            try:
                with one_clip(name), readable(name, video) as source:
                    clips = read_clips(
                        source,
                        config,
                        stride=stride,
                        start=start,
                        pad=pad,
                        clips=num_clips,
                        square_pixels=square_pixels,
                    )
                    return pixels(name, clips), np.stack([clip.indices for clip in clips])
            except VideoError as error:
                return error

        def finish(name: str, frames: np.ndarray, logits: list[np.ndarray]) -> Classified:
            scores, heads = self._scores(np.stack(logits), average, function)
            best = best_labels(scores, top_k, config.labels, config.class_splits)
            each = np.concatenate(heads) if len(heads) else scores
            return Classified(name, frames, best, self._best_of_heads(heads, top_k), scores=each)

        def results() -> Iterator[Classified]:
            for (name, found), logits in self._with_logits(videos, read, batch_size, threads):
                if isinstance(found, VideoError):
                    yield Classified(name, error=found)
                else:
                    yield finish(name, found, logits)

        return results()

    def _pixels(self, clips: list[Clip], crops: int) -> Float32[np.ndarray, "views t h w c"]:
        """The views of a video as the model takes them, clips * crops of them.

        Raises VideoError if this video's size does not fit, UserError if no size does.
        """
        processor, expected = self.processor, self.config.frame_size
        rounding = crop_rounding(self.config.view_sampler)
        pixels = np.concatenate([c.pixel_values(processor, crops, rounding) for c in clips])
        size = pixels.shape[2:4]
        stretched = processor.do_resize and "height" in processor.size
        if size != expected and not (crops > 1 or processor.do_center_crop or stretched):
            raise VideoError(
                f"frames of {size[0]} x {size[1]} pixels (h x w"
                f"{', as resized' if processor.do_resize else ''}), the model takes {expected[0]} "
                f"x {expected[1]}: set the processor's do_center_crop, or its do_resize with a "
                "height and width, or resize the video"
            )
        check_clip(self.config, pixels.shape, any_size=False)
        return pixels

    def _with_logits(self, videos, read, rows: int, threads: int) -> Iterator:
        """((name, frames or error), logits of every view) of each video, in order.

        Views of neighbouring videos share batches of `rows`; the last batch is padded with zeros,
        so that one shape is compiled.
        """
        waiting: collections.deque = collections.deque()  # [(name, frames or error), views, logits]
        views: collections.deque = collections.deque()  # (pixels, logits to append to)
        raised = None
        for name, found in read_ahead(videos, read, threads):
            if name is None:
                raised = found
                break
            if isinstance(found, VideoError):
                waiting.append(((name, found), 0, []))
            else:
                pixels, frames = found
                logits: list[np.ndarray] = []
                waiting.append(((name, frames), len(pixels), logits))
                views.extend((view, logits) for view in pixels)
            while len(views) >= rows:
                self._run([views.popleft() for _ in range(rows)], rows)
            while waiting and waiting[0][1] == len(waiting[0][2]):
                about, _, logits = waiting.popleft()
                yield about, logits
        if views:
            self._run(list(views), rows)
        for about, _, logits in waiting:
            yield about, logits
        if raised is not None:
            raise raised

    def _run(self, views: list, rows: int) -> None:
        batch = np.stack([pixels for pixels, _ in views])
        if len(batch) < rows:
            batch = np.concatenate([batch, np.zeros((rows - len(batch), *batch.shape[1:]), "f4")])
        logits = np.asarray(self._logits(self.params, batch))
        for (_, found), values in zip(views, logits, strict=False):
            found.append(values)

    def scores(self, logits: Float32[np.ndarray, " classes"]) -> Float32[np.ndarray, " scores"]:
        """The scores of a view's logits: probabilities, unless the config's problem_type says else.

        For a model of several heads those of combinations of the heads' classes.
        """
        scores, _ = self._scores(logits[None], "logits", _checked_function(None, self.config))
        return scores

    def _scores(self, logits: np.ndarray, average: str, function: str):
        """Scores of classes, or of combinations of the heads' classes, and those of each head."""
        splits = self.config.class_splits
        logits = logits.mean(0, keepdims=True) if average == "logits" else logits
        if splits is None:
            return np.asarray(FUNCTIONS[function](logits)).mean(0), ()
        heads = [np.asarray(jax.nn.softmax(x)).mean(0) for x in split_logits(logits, splits)]
        return np.asarray(action_scores(logits, splits)).mean(0), heads

    def _best_of_heads(self, heads, top_k: int) -> dict[str, list[dict[str, Any]]] | None:
        if not len(heads):
            return None
        config, labels = self.config, iter(self.config.labels)
        named = zip(config.split_names, config.class_splits, heads, strict=True)
        return {
            name: best_labels(values, top_k, tuple(itertools.islice(labels, classes)))
            for name, classes, values in named
        }


def _counts(value) -> bool:
    """Whether it is a Python or numpy integer of at least 1."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not _counts(value):
            raise UserError(f"{name} is {value!r}, expected an int of at least 1")


def _checked_function(function: str | None, config) -> str:
    """`function_to_apply`, by default that of the config's problem_type."""
    if function is None:
        return _FUNCTION_OF.get(config.problem_type, "softmax")
    if function not in (*FUNCTIONS,):
        raise UserError(
            f"function_to_apply is {function!r}, expected one of {', '.join(FUNCTIONS)}"
        )
    if config.class_splits is not None and function != "softmax":
        raise UserError(
            f"function_to_apply is {function!r}; a model of several heads has scores "
            "of combinations, which are products of softmax"
        )
    return function


def _answers(results: Iterator[Classified]) -> Iterator[list[dict[str, Any]] | VideoError]:
    for result in results:
        if result.error is not None:
            logger.warning("left out: %s", result.error)
            yield result.error
        else:
            assert result.predictions is not None
            yield result.predictions


def best_labels(values: np.ndarray, top_k: int, labels, splits=None) -> list[dict[str, Any]]:
    """The largest scores with labels; a combination has an index and a label for each head."""
    predictions = []
    for place in np.argsort(-values, kind="stable")[:top_k]:
        index = int(place)
        if splits is None:
            label = labels[index]
        else:
            index = [int(i) for i in np.unravel_index(place, splits)]
            starts = np.cumsum((0, *splits[:-1]))
            label = ", ".join(labels[s + i] for s, i in zip(starts, index, strict=True))
        predictions.append({"label": label, "index": index, "score": float(values[place])})
    return predictions
