# SPDX-License-Identifier: Apache-2.0
"""Scores of classes over the time of a video: a classifier on windows that slide over it."""

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Float64

from vivit_jax.data.one_clip import one_clip
from vivit_jax.data.read_clip import usual_stride
from vivit_jax.data.sliding_window import Stream, plan_windows
from vivit_jax.data.video.frame_stream import StreamedFrame, open_stream
from vivit_jax.data.video.images import AnimatedFrame
from vivit_jax.errors import UserError
from vivit_jax.inference.classifier import VideoClassifier, best_labels
from vivit_jax.inference.features import check_features, window_logits

_OVERLAP = 4  # windows over each frame, by default


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The scores of some classes over time.

    Attributes:
        seconds: when each frame of the video is shown, from its first; NaN where it does not say.
        middles: the place of the middle of each window, in frames.
        labels: names of the classes, or of combinations of several heads' classes, those with the
            highest score at any time first.
        scores: of each window.
    """

    seconds: Float64[np.ndarray, " frames"]
    middles: Float64[np.ndarray, " windows"]
    labels: tuple[str, ...]
    scores: Float[np.ndarray, "windows labels"]

    def over_frames(self) -> Float[np.ndarray, "frames labels"]:
        """Scores at each frame, on a line between the windows before and after it."""
        frames = np.arange(len(self.seconds))
        columns = [np.interp(frames, self.middles, column) for column in self.scores.T]
        return np.stack(columns, axis=1)


def score_over_time(
    classifier: VideoClassifier,
    video: str | os.PathLike,
    *,
    top_k: int = 5,
    stride: int | None = None,
    window_stride: str | int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Timeline:
    """Classify windows of a video file, one after the other.

    A window has `stride` frames between its frames (default: the model's, less for a video that is
    too short for it), and windows begin every `window_stride` frames, or every "0.5s" (default:
    a quarter of a window). One that repeats the last frame is added where frames are left over.
    `progress` is called with the frames done and those that the file announces.

    Raises VideoError for a video that cannot be read, UserError for a wrong argument.
    """
    check_drawable(classifier, stride, window_stride)
    config = classifier.config
    with one_clip(video):
        stream = _Timed(open_stream(video))
    if stride is None:
        stride = usual_stride(config, stream.announced)
    if window_stride is None:
        window_stride = max(1, config.num_frames * stride // _OVERLAP)
    windows = plan_windows(config, stride, window_stride, "repeat_last")
    rows = window_logits(
        *(classifier.model, classifier.params, classifier.processor),
        stream,
        windows,
        batch_size=batch_size,
        progress=progress,
    )
    middles, scores = [], []
    for row in rows:
        middles.append(float(row.frame_indices.mean()))
        scores.append(classifier.scores(row.features))
    table = np.stack(scores)
    best = best_labels(table.max(0), top_k, config.labels, config.class_splits)
    places = np.argsort(-table.max(0), kind="stable")[:top_k]
    labels = tuple(each["label"] for each in best)
    return Timeline(np.array(stream.seconds), np.array(middles), labels, table[:, places])


def check_drawable(
    classifier: VideoClassifier, stride: int | None, window_stride: str | int | None
) -> None:
    """UserError for a model or an argument with which no video has scores over time."""
    config = classifier.config
    if config.problem_type == "regression":
        raise UserError("the model's problem_type is regression: it has no probabilities to draw")
    check_features(config, classifier.processor, "last", "head", has_head=True)
    plan_windows(config, stride, window_stride, "repeat_last")


class _Timed:
    """A stream that notes the time of each frame it has given."""

    def __init__(self, stream: Stream):
        self._stream = stream
        self.name, self.announced = stream.name, stream.announced
        self.seconds: list[float] = []

    def __iter__(self) -> Iterator[StreamedFrame | AnimatedFrame]:
        self.seconds.clear()
        for frame in self._stream:
            self.seconds.append(frame.seconds)
            yield frame

    def shortage(self, total: int) -> str:
        return self._stream.shortage(total)
