# SPDX-License-Identifier: Apache-2.0
"""Intervals, confusions, calibration and views against counts by hand, scipy and torch."""

import csv
import io
import math

import numpy as np
import pytest
import scipy.stats
import torch

from vivit_jax.data.datasets.dataset import Dataset, Example
from vivit_jax.train.evaluation import Answer, Evaluation
from vivit_jax.train.metrics import topk_accuracy
from vivit_jax.train.outcomes import Bin, Confusion, calibration, outcomes, wilson_interval
from vivit_jax.train.pages.outcome_page import confusion_csv
from vivit_jax.train.pages.validation import shown_clips

NAMES = ("walk", "run", "jump")
# Six clips: label, answer, its probability.
ROWS = [(0, 0, 0.9), (0, 1, 0.6), (0, 1, 0.8), (1, 1, 0.5), (2, 0, 0.7), (2, 2, 0.95)]


def made(rows=ROWS, names=NAMES, **more):
    """Outcomes of clips with these answers and confidences."""
    scores = np.empty((len(rows), len(names)))
    for row, (_, answer, sure) in zip(scores, rows, strict=True):
        row[:] = math.log((1 - sure) / (len(names) - 1))
        row[answer] = math.log(sure)
    labels = [label for label, _, _ in rows]
    return outcomes(
        scores, labels, classes=names, clips=[f"{i}.mp4" for i in range(len(rows))], **more
    )


@pytest.mark.parametrize(
    ("right", "clips"), [(0, 1), (1, 1), (3, 4), (0, 40), (399, 400), (81, 263)]
)
def test_the_interval_is_scipys(right, clips):
    found = scipy.stats.binomtest(right, clips).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(right, clips), found, atol=1e-12)


def test_without_clips_everything_is_possible():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_counts_are_those_made_by_hand():
    found = made()
    assert found.confusion_matrix().tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]
    assert [(each.clips, each.right) for each in found.per_class()] == [(3, 1), (1, 1), (2, 1)]
    assert found.accuracy == 0.5 and found.standard_error == pytest.approx(0.5 / math.sqrt(6 + 4))
    assert found.interval == wilson_interval(3, 6)
    assert found.confusions() == [Confusion(0, 1, 2, 3), Confusion(2, 0, 1, 2)]
    assert found.confusions(1) == [Confusion(0, 1, 2, 3)]
    assert found.mistaken(Confusion(0, 1, 2, 3)) == [2, 1]  # the more confident first
    assert found.never_answered() == []
    # Of as many clips, the larger share of the class first.
    tied = made([(0, 0, 0.9), (0, 1, 0.9), (0, 0, 0.9), (1, 1, 0.9), (1, 2, 0.9)])
    assert tied.confusions() == [Confusion(1, 2, 1, 2), Confusion(0, 1, 1, 3)]
    np.testing.assert_allclose(found.confidences, [sure for _, _, sure in ROWS])
    rows = list(csv.reader(io.StringIO(confusion_csv(found))))
    assert rows == [["true class", *NAMES], ["walk", "1", "2", "0"], ["run", "0", "1", "0"],
                    ["jump", "1", "0", "1"]]  # fmt: skip


def test_a_class_that_is_never_answered_is_named():
    found = made([(0, 1, 0.9), (1, 1, 0.9)])
    assert found.never_answered() == [0]
    assert math.isnan(found.per_class()[2].accuracy) and found.per_class()[2].clips == 0


def test_the_calibration_error_is_that_of_its_definition():
    """Counts by hand: two of the bins of tenths have two clips."""
    sure = np.array([0.15, 0.62, 0.68, 0.9, 0.95, 1.0])
    right = np.array([False, True, False, True, True, True])
    error, bins = calibration(sure, right, 10)
    assert [each.clips for each in bins] == [0, 1, 0, 0, 0, 0, 2, 0, 1, 2]  # 0.9 is in (0.8, 0.9]
    assert bins[6] == pytest.approx(Bin(0.6, 0.7, 2, 0.65, 0.5))
    by_hand = (1 * 0.15 + 2 * abs(0.5 - 0.65) + 1 * 0.1 + 2 * (1 - 0.975)) / 6
    assert error == pytest.approx(by_hand, abs=1e-12)
    assert math.isnan(calibration(np.zeros(0), np.zeros(0, bool))[0])


def test_the_calibration_error_is_that_of_a_loop_over_torch_buckets():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(0, 2, (500, 7)))
    labels = torch.tensor(rng.integers(0, 7, 500))
    sure, answers = logits.softmax(-1).max(-1)
    place = torch.bucketize(sure, torch.linspace(0, 1, 16, dtype=sure.dtype)[1:-1])
    error = 0.0
    for b in range(15):
        inside = place == b
        if inside.any():
            right = (answers == labels)[inside].double().mean()
            error += float(inside.double().mean() * (right - sure[inside].mean()).abs())
    found = outcomes(logits.numpy(), labels.numpy(), classes="abcdefg", clips=[""] * 500)
    assert found.calibration()[0] == pytest.approx(error, abs=1e-12)
    np.testing.assert_allclose(found.confidences, sure.numpy(), atol=1e-12)
    for k in (1, 5):
        expected = float(topk_accuracy(logits.numpy(), labels.numpy(), k))
        assert found.top(k) == pytest.approx(expected, abs=1e-6)
    assert found.top(1) == found.accuracy


def test_equal_scores_are_ranked_by_their_class():
    found = outcomes(np.zeros((3, 3)), [0, 1, 2], classes=NAMES, clips="abc")
    assert found.ranks.tolist() == [0, 1, 2] and found.accuracy == pytest.approx(1 / 3)


@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_is_wrong_and_has_no_confidence():
    scores = np.array([[1.0, np.nan, 0.0], [-np.inf, 0.0, -np.inf], [np.inf, 0.0, 1.0]])
    found = outcomes(scores, [1, 1, 0], classes=NAMES, clips="abc")
    assert found.answers.tolist() == [-1, 1, -1] and found.accuracy == pytest.approx(1 / 3)
    assert found.confusion_matrix().sum() == 1 and found.ranks.tolist() == [3, 0, 3]
    assert np.isnan(found.confidences).tolist() == [True, False, True]
    assert found.calibration()[0] == 0 and found.top(3) == pytest.approx(1 / 3)
    nothing = outcomes(np.full((1, 3), np.nan), [0], classes=NAMES, clips="a")
    assert nothing.summary(5)["calibration_error"] is None


def test_views_that_disagree():
    views = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 2], [0, 0, 0], [2, 2, 2]])
    assert made(views=views).disagreeing.tolist() == [1, 3]
    assert len(made().disagreeing) == 0


def test_the_summary_is_small_and_plain():
    values = made().summary(5)
    assert values.keys() == {
        *("videos", "accuracy", "standard_error", "interval_95"),
        *("calibration_error", "calibration_bins", "views_disagree"),
    }
    assert values["videos"] == 6 and values["accuracy"] == 0.5
    many = made([(0, 0, 0.9)], tuple("abcdef")).summary(5)
    assert many["accuracy_top_5"] == 1.0


def test_strips_show_frames_of_all_views():
    """Those of the first clip along time would show the beginning of a video only."""
    indices = np.array([[0, 1, 2], [2, 3, 4], [8, 9, 9]])
    answers = (Answer(None, None, "broken"), Answer(np.zeros(2), indices))
    dataset = Dataset((Example("a.mp4", 0), Example("b.mp4", 1)), None, "list.csv")
    (shown,) = shown_clips(dataset, Evaluation({}, answers))
    assert shown.example.path == "b.mp4" and shown.frames.tolist() == [0, 1, 2, 3, 4, 8, 9]
