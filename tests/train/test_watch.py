# SPDX-License-Identifier: Apache-2.0
"""What a run notices: a loss that stays at chance, learning by heart, a class never predicted."""

import math
import types

import numpy as np
import pytest
from tiny_recipes import FINETUNE, changed

from vivit_jax.cli.suggest import _named
from vivit_jax.data.datasets.dataset import Dataset, Example
from vivit_jax.train.evaluation import Answer, Evaluation
from vivit_jax.train.watch import ABOUT, Watch, held_out_loss

NAMES = ("ant", "bee", "cow", "dog")
PER_EPOCH, EPOCHS = 4, 20
RECIPE = changed(FINETUNE, train__epochs=EPOCHS)  # one epoch of warm-up
CHANCE, AHEAD, NEVER = ABOUT


def watch(counts=(8, 8, 8, 8), lines=()):
    return Watch(RECIPE, PER_EPOCH, counts, NAMES, lines)


def steps(watched, loss, accuracy=0.25, first=1, last=PER_EPOCH * EPOCHS):
    """(step, notice) of training steps with this loss."""
    numbers = dict(loss=loss, accuracy=accuracy, lr=1.6e-5)
    return [(s, n) for s in range(first, last + 1) for n in watched.after_step(s, numbers)]


def validation(labels, predicted):
    examples = tuple(Example(f"{i}.mp4", label) for i, label in enumerate(labels))
    answers = tuple(Answer(np.eye(4)[p], np.zeros((1, 1), int)) for p in predicted)
    right = sum(a == b for a, b in zip(labels, predicted, strict=True))
    found = Evaluation({"accuracy": right / len(labels)}, answers)
    return Dataset(examples, NAMES, "test"), found


def test_a_loss_that_stays_at_chance_is_noticed_once():
    ((step, notice),) = steps(watch(), loss=1.38)
    # After 10 epochs, since 40 steps are the least.
    assert step == 40 and notice.about == CHANCE
    assert notice.text.startswith(
        "after 10 epochs the loss is 1.380 and has not left ln(4) = 1.386"
    )
    assert "raise optim.lr (1.6e-05 at most so far)" in notice.text
    assert notice.values == {"notice": notice.text, "about": CHANCE}


def test_a_loss_that_falls_is_not_noticed():
    assert steps(watch(), loss=0.97 * math.log(4)) == []
    assert steps(watch(), loss=math.nan) == []  # the loop reports it


def test_guessing_by_the_shares_of_unequal_classes_is_chance_too():
    shares = np.array([24, 4, 2, 2]) / 32
    entropy = -(shares * np.log(shares)).sum()
    ((_, notice),) = steps(watch((24, 4, 2, 2)), loss=entropy)
    assert f"the entropy of the classes' shares = {entropy:.3f}" in notice.text
    assert steps(watch((24, 4, 2, 2)), loss=0.9 * entropy) == []


def test_what_was_said_before_a_resume_is_not_said_again():
    said = {"kind": "event", "step": 20, "notice": "...", "about": CHANCE}
    assert steps(watch(lines=[said]), loss=1.38, first=21) == []
    before = [{"kind": "train", "step": s, "loss": 0.1, "accuracy": 1.0} for s in range(1, 24)]
    resumed = watch(lines=before)
    # The mean of the last steps counts those before: it does not begin anew.
    assert steps(resumed, loss=1.6, first=24, last=24) == []


def test_learning_by_heart_is_noticed():
    watched = watch()
    steps(watched, loss=0.01, accuracy=1.0, last=24)
    labels = [0, 1, 2, 3] * 4
    found = validation(labels, [*labels[:8], *labels[1:9]])  # half of them right
    (notice,) = watched.after_validation(24, *found)
    assert notice.about == AHEAD
    assert "accuracy is 100% in training and 50% on the 16 held-out clips" in notice.text
    assert watched.after_validation(28, *found) == []


@pytest.mark.parametrize(("right", "clips"), [(15, 16), (3, 4), (1, 2)])
def test_few_held_out_clips_prove_nothing(right, clips):
    """The difference may be chance: 2 standard errors, and 20 points, are the least."""
    watched, labels = watch(), [0, 1, 2, 3] * 4
    steps(watched, loss=0.01, accuracy=1.0, last=24)
    wrong = [(label + 1) % 4 for label in labels]
    found = validation(labels[:clips], [*labels[:right], *wrong[right:clips]])
    assert [n for n in watched.after_validation(24, *found) if n.about == AHEAD] == []


def test_mixed_clips_have_no_accuracy_to_compare():
    watched = watch()
    for step in range(1, 25):
        watched.after_step(step, {"loss": 0.1})
    assert watched.after_validation(24, *validation([0, 1, 2, 3] * 4, [0] * 16)) == []


def test_a_class_that_is_never_predicted_is_noticed():
    watched, labels = watch(), [0, 1, 2, 3]
    validations = [(8, [0, 1, 2, 0]), (16, [0, 1, 0, 0]), (24, [0, 1, 0, 0]), (32, [0, 0, 0, 0])]
    found = [watched.after_validation(s, *validation(labels, p)) for s, p in validations]
    # Not before a third of the epochs; class 2 was predicted once.
    assert [len(each) for each in found] == [0, 0, 0, 1]
    (notice,) = found[-1]
    assert notice.about == NEVER
    assert notice.text.startswith("never predicted on the held-out clips so far: dog; look")


def test_names_of_classes_are_one_line():
    watched = watch()
    watched._names = ["a", "b", "c", "d\ne\x1b"]
    answers = validation([0, 1, 2, 3], [0, 1, 2, 0])
    found = [each for s in (8, 16, 24, 32) for each in watched.after_validation(s, *answers)]
    assert r"on the held-out clips so far: d\u000ae\u001b; look" in found[0].text
    assert _named(["x\ny"]) == r"x\u000ay"


def test_classes_without_held_out_clips_are_not_missed():
    watched = watch()
    for step in (8, 16, 24, 32):
        assert watched.after_validation(step, *validation([0, 1], [0, 1])) == []


@pytest.mark.parametrize("logits", [True, False])
def test_the_held_out_loss_is_pytorchs(logits):
    import torch

    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(6, 4)), [0, 1, 2, 3, 0, 1]
    expected = torch.nn.functional.cross_entropy(torch.tensor(scores), torch.tensor(labels)).item()
    if not logits:  # averages of softmax are logarithms of probabilities
        scores = torch.log_softmax(torch.tensor(scores), 1).numpy()
    answers = [Answer(row, np.zeros((1, 1), int)) for row in scores]
    examples = tuple(Example(f"{i}.mp4", label) for i, label in enumerate(labels))
    # One that cannot be read does not count.
    dataset = Dataset((*examples, Example("bad.mp4", 0)), NAMES, "test")
    found = Evaluation({}, (*answers, Answer(None, None, "bad.mp4: damaged")))
    one, two = (types.SimpleNamespace(class_splits=splits) for splits in (None, (2, 2)))
    assert held_out_loss(one, dataset, found)["loss"] == pytest.approx(expected, abs=1e-12)
    assert held_out_loss(two, dataset, found) == {}
