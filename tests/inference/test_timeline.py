# SPDX-License-Identifier: Apache-2.0
"""Scores over time against the classifier on the frames of one window at a time."""

import dataclasses

import numpy as np
import pytest
from clips import write_clip
from helpers import random_params
from scipy.special import softmax
from tiny import VIVIT

import vivit_jax
from vivit_jax.errors import UserError, VideoError
from vivit_jax.inference import timeline
from vivit_jax.inference.features import FeatureRow
from vivit_jax.inference.timeline import Timeline, score_over_time

LABELS = ("walk", "run", "jump", "fly", "sleep")


@pytest.fixture(scope="module")
def classifier():
    config = vivit_jax.VivitConfig(**VIVIT, id2label=LABELS)
    module = vivit_jax.VivitForVideoClassification(config)
    processor = vivit_jax.VideoProcessor.vivit(size=28, crop_size=(24, 16))
    return vivit_jax.VideoClassifier(module, random_params(module, 0.5), processor)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "long.mp4", frames=40, size=(96, 64))


def test_scores_are_those_of_single_windows(classifier, clip):
    found = score_over_time(classifier, clip, stride=2, window_stride=7)
    starts = [0, 7, 14, 21, 28]  # of windows of 11 frames; frame 39 is left over
    last = np.minimum(35 + 2 * np.arange(6), 39)
    assert found.middles.tolist() == [*(start + 5.0 for start in starts), last.mean()]
    assert len(found.seconds) == 40 and found.seconds[0] == 0
    assert set(found.labels) == set(LABELS) and found.scores.shape == (6, 5)
    peaks = found.scores.max(0)
    assert (np.diff(peaks) <= 0).all()
    for start, row in zip(starts, found.scores, strict=False):
        for best in classifier(clip, stride=2, start=start):
            assert row[found.labels.index(best["label"])] == pytest.approx(best["score"], abs=1e-5)
    frames = vivit_jax.read_video(clip, indices=last)
    for best in classifier(frames, stride=1):
        at_end = found.scores[-1][found.labels.index(best["label"])]
        assert at_end == pytest.approx(best["score"], abs=1e-5)
    few = score_over_time(classifier, clip, stride=2, window_stride=7, top_k=2, batch_size=4)
    assert few.labels == found.labels[:2]
    np.testing.assert_allclose(few.scores, found.scores[:, :2], atol=1e-5)


def test_classes_are_in_the_order_of_their_highest_scores(classifier, clip, monkeypatch):
    """One is certain once, another likely all the time."""
    rows = np.tile([0.0, 2.0, 1.0, -1.0, -2.0], (4, 1)).astype(np.float32)
    rows[1] = [9.0, 2.0, 1.0, -1.0, -2.0]
    windows = [FeatureRow(row, np.arange(6), np.arange(6.0)) for row in rows]
    monkeypatch.setattr(timeline, "window_logits", lambda *args, **options: iter(windows))
    found = score_over_time(classifier, clip, top_k=3)
    assert found.labels == LABELS[:3]
    np.testing.assert_allclose(found.scores, softmax(rows, axis=1)[:, :3], atol=1e-6)


def test_by_default_four_windows_lie_over_each_frame(classifier, clip, tmp_path):
    found = score_over_time(classifier, clip)
    assert np.diff(found.middles[:-1]).tolist() == [3.0] * (len(found.middles) - 2)  # 6 * 2 // 4
    short = write_clip(tmp_path / "short.mp4", frames=7, size=(96, 64))
    assert score_over_time(classifier, short).middles[0] == 2.5  # at stride 1, which fits


def test_between_windows_scores_lie_on_a_line():
    timeline = Timeline(np.arange(6) / 10, np.array([1.0, 3.0]), ("a",), np.array([[0.2], [0.6]]))
    expected = [[0.2], [0.2], [0.4], [0.6], [0.6], [0.6]]
    np.testing.assert_allclose(timeline.over_frames(), expected)


def test_several_heads_are_scored_together(clip):
    heads = dict(num_labels=5, class_splits=(2, 3), split_names=("noun", "verb"))
    config = vivit_jax.VivitConfig(**VIVIT | heads)
    module = vivit_jax.VivitForVideoClassification(config)
    processor = vivit_jax.VideoProcessor.vivit(size=28, crop_size=(24, 16))
    both = vivit_jax.VideoClassifier(module, random_params(module, 0.5), processor)
    found = score_over_time(both, clip, stride=2, window_stride=100, top_k=6)
    best = both(clip, stride=2, start="begin", top_k=6)
    assert found.labels == tuple(each["label"] for each in best) and len(best) == 6
    np.testing.assert_allclose(found.scores[0], [each["score"] for each in best], atol=1e-5)


def test_what_has_no_scores_over_time(classifier, clip, tmp_path):
    config = dataclasses.replace(classifier.config, problem_type="regression")
    model = classifier.model.clone(config=config)
    other = vivit_jax.VideoClassifier(model, classifier.params, classifier.processor)
    with pytest.raises(UserError, match="has no probabilities"):
        score_over_time(other, clip)
    with pytest.raises(UserError, match="--window-stride"):
        score_over_time(classifier, clip, window_stride="0s")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        score_over_time(classifier, tmp_path / "broken.mp4")
