# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vivit_jax import UserError
from vivit_jax.train.metrics import (
    action_scores,
    classification_metrics,
    metric_text,
    split_logits,
    topk_accuracy,
)

# Each as one program: their operations one by one take several times as long to compile.
action_scores = jax.jit(action_scores, static_argnames="class_splits")
topk_accuracy = jax.jit(topk_accuracy, static_argnames="k")
classification_metrics = jax.jit(
    classification_metrics, static_argnames=("class_splits", "split_names")
)
NAMES = ("noun", "verb")


def one_hot(labels, classes):
    """Rows of zeros for -100."""
    return (np.arange(classes) == np.asarray(labels)[:, None]).astype(np.float32)


def numpy_topk(scores, labels, k):
    """Row by row: sort by falling score, then rising class, and look among the first k."""
    hits = []
    for row, label in zip(scores, labels, strict=True):
        if label != -100:
            ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
            hits.append(label in ranked[:k])
    return np.mean(hits)


def numpy_actions(logits, nouns, verbs):
    """noun * verbs + verb, element by element in float64."""

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    out = np.empty((len(logits), nouns * verbs))
    for i, row in enumerate(logits.astype(np.float64)):
        p, q = softmax(row[:nouns]), softmax(row[nouns:])
        for noun in range(nouns):
            for verb in range(verbs):
                out[i, noun * verbs + verb] = p[noun] * q[verb]
    return out


def test_split_logits():
    noun, verb = split_logits(np.arange(10.0).reshape(2, 5), (2, 3))
    np.testing.assert_array_equal(noun, [[0, 1], [5, 6]])
    np.testing.assert_array_equal(verb, [[2, 3, 4], [7, 8, 9]])


def test_action_scores_by_hand():
    # Nouns 1/4, 3/4; verbs 1/2, 1/3, 1/6: logits are logarithms of anything proportional to them.
    logits = np.log(np.array([[1, 3, 3, 2, 1]], np.float32))
    expected = [[1 / 8, 1 / 12, 1 / 24, 3 / 8, 1 / 4, 1 / 8]]
    np.testing.assert_allclose(action_scores(logits, (2, 3)), expected, rtol=1e-6)


def test_three_heads_have_the_last_fastest():
    logits = np.log(np.array([[1, 3, 1, 1, 1, 4]], np.float32))
    a, b, c = np.array([1, 3]) / 4, np.array([1, 1]) / 2, np.array([1, 4]) / 5
    expected = [a[i] * b[j] * c[k] for i in range(2) for j in range(2) for k in range(2)]
    np.testing.assert_allclose(action_scores(logits, (2, 2, 2)), [expected], rtol=1e-6)


def test_topk_accuracy_is_a_sort():
    rng = np.random.default_rng(0)
    scores = rng.integers(6, size=(40, 9)).astype(np.float32)  # many ties
    labels = np.where(rng.random(40) < 0.2, -100, rng.integers(9, size=40))
    for k in (1, 2, 5, 9):
        expected = numpy_topk(scores, labels, k)
        np.testing.assert_allclose(topk_accuracy(scores, labels, k), expected, rtol=1e-6)
        found = jax.lax.top_k(scores, k)[1]
        hits = (np.asarray(found) == labels[:, None]).any(axis=1)[labels != -100]
        np.testing.assert_allclose(topk_accuracy(scores, labels, k), hits.mean(), rtol=1e-6)


def test_equal_scores_rank_the_lower_class_first():
    scores = np.zeros((4, 4), np.float32)
    assert topk_accuracy(scores, np.arange(4), 1) == 0.25
    assert topk_accuracy(scores, np.arange(4), 3) == 0.75


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64"])
def test_labels_of_any_integer_type(dtype):
    label = 156 if dtype == "uint8" else 100
    scores = one_hot([label, 0], 300)
    assert topk_accuracy(scores, np.array([label, 1]).astype(dtype), 1) == 0.5
    logits = np.concatenate([scores, scores], axis=1)
    metrics = classification_metrics(
        logits, np.array([[label, label], [0, 1]]).astype(dtype), (300, 300), NAMES
    )
    assert metrics["noun-verb_accuracy"] == 0.5


def test_what_has_no_accuracy_is_nan():
    scores = np.eye(6, dtype=np.float32)
    assert np.isnan(topk_accuracy(scores, np.full(6, -100), 1))
    for label in (6, -1, 1000):
        assert np.isnan(topk_accuracy(scores, np.array([0, 1, 2, 3, 4, label]), 1))
    scores[5] = np.nan
    assert np.isnan(topk_accuracy(scores, np.arange(6), 6))
    assert topk_accuracy(scores, np.array([0, 1, 2, 3, 4, -100]), 1) == 1


@pytest.mark.parametrize(("label", "wrong"), [([0, 7], "verb"), ([6, 0], "noun")])
def test_class_outside_its_head_is_no_other_action(label, wrong):
    metrics = classification_metrics(np.zeros((1, 13)), np.array([label]), (6, 7), NAMES)
    nan = {name for name, value in metrics.items() if np.isnan(value)}
    assert nan == {k for k in metrics if k.startswith((f"{wrong}_", "noun-verb_"))}


@pytest.mark.parametrize("form", ["integers", "one-hot"])
def test_metrics_of_one_head(form):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((30, 8)).astype(np.float32)
    labels = np.where(rng.random(30) < 0.2, -100, rng.integers(8, size=30))
    given = labels if form == "integers" else one_hot(labels, 8)
    metrics = jax.jit(classification_metrics)(logits, given)
    assert set(metrics) == {"accuracy", "accuracy_top_5"}
    np.testing.assert_allclose(metrics["accuracy"], numpy_topk(logits, labels, 1), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy_top_5"], numpy_topk(logits, labels, 5), rtol=1e-6)


def test_no_top_5_of_five_classes():
    assert set(classification_metrics(np.eye(5), np.arange(5))) == {"accuracy"}
    labels = np.zeros((1, 2), int)
    assert set(classification_metrics(np.zeros((1, 7)), labels, (5, 2), NAMES)) == {
        "noun_accuracy",
        "verb_accuracy",
        "noun-verb_accuracy",
        "noun-verb_accuracy_top_5",
    }


@pytest.mark.parametrize("form", ["integers", "one-hot"])
@pytest.mark.parametrize("sizes", [(6, 7), (300, 97)])
def test_metrics_of_nouns_and_verbs(form, sizes):
    rng = np.random.default_rng(2)
    rows, (nouns, verbs) = 12, sizes
    labels = np.stack([rng.integers(n, size=rows) for n in sizes], axis=1)
    logits = rng.standard_normal((rows, sum(sizes))).astype(np.float32)
    # The labels score high in most rows, so that no accuracy is 0 or 1 throughout.
    boost = np.concatenate([one_hot(labels[:, 0], nouns), one_hot(labels[:, 1], verbs)], axis=1)
    logits += boost * rng.uniform(0, 4, (rows, 1)).astype(np.float32)
    labels[3, 0] = labels[4, 1] = -100
    given = labels
    if form == "one-hot":
        given = np.concatenate([one_hot(labels[:, i], n) for i, n in enumerate(sizes)], axis=1)
    metrics = jax.jit(classification_metrics, static_argnums=(2, 3))(logits, given, sizes, NAMES)

    actions = numpy_actions(logits, nouns, verbs)
    np.testing.assert_allclose(action_scores(logits, sizes), actions, rtol=2e-6)
    joint = np.where((labels == -100).any(axis=1), -100, labels[:, 0] * verbs + labels[:, 1])
    parts = {
        "noun": (logits[:, :nouns], labels[:, 0]),
        "verb": (logits[:, nouns:], labels[:, 1]),
        "noun-verb": (actions, joint),
    }
    expected = {
        f"{name}_accuracy{suffix}": numpy_topk(*part, k)
        for name, part in parts.items()
        for suffix, k in (("", 1), ("_top_5", 5))
    }
    assert metrics.keys() == expected.keys()
    assert len(set(expected.values())) > 2
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, err_msg=name)


def test_default_names_and_one_head():
    labels = np.zeros((1, 1), int)
    assert set(classification_metrics(np.zeros((1, 4)), labels, (4,))) == {"1_accuracy"}
    labels = np.zeros((1, 3), int)
    assert set(classification_metrics(np.zeros((1, 3)), labels, (1, 1, 1), "abc")) == {
        "a_accuracy",
        "b_accuracy",
        "c_accuracy",
        "a-b-c_accuracy",
    }


def test_half_precision_is_widened():
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((4, 13)), jnp.bfloat16)
    assert action_scores(logits, (6, 7)).dtype == jnp.float32
    wide = numpy_actions(np.asarray(logits, np.float32), 6, 7)
    np.testing.assert_allclose(action_scores(logits, (6, 7)), wide, rtol=1e-6)
    metrics = classification_metrics(logits, np.zeros((4, 2), int), (6, 7), NAMES)
    assert {str(v.dtype) for v in metrics.values()} == {"float32"}


ROWS = np.zeros((4, 7), np.float32)
LABELS = np.zeros((4, 2), int)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: action_scores(ROWS, (7,)), r"two or more heads to combine, got \(7,\)"),
        (lambda: action_scores(ROWS, (3, 5)), r"logits of shape \(4, 7\) do not fit .*\(3, 5\)"),
        (lambda: action_scores(ROWS, 7), "class_splits must be a tuple .* got 7"),
        (lambda: split_logits(ROWS, (3, -4, 8)), r"positive class count per head, got \(3, -4, 8"),
        (lambda: topk_accuracy(ROWS, LABELS, 1), r"labels of shape \(4, 2\) .* scores of shape"),
        (lambda: topk_accuracy(ROWS, np.zeros(4), 1), "and dtype float32 do not fit scores"),
        (lambda: topk_accuracy(ROWS, LABELS[:, 0], 8), "k must be from 1 to .* 7, got 8"),
        (lambda: topk_accuracy(ROWS, LABELS[:, 0], 0), "got 0"),
        (lambda: classification_metrics(ROWS, LABELS), "for several heads give class_splits"),
        (lambda: classification_metrics(ROWS, ROWS[:, :6]), r"labels of shape \(4, 6\)"),
        (
            lambda: classification_metrics(ROWS, LABELS[:, 0], split_names=NAMES),
            r"split_names \('noun', 'verb'\) needs class_splits",
        ),
        (
            lambda: classification_metrics(ROWS, LABELS, (3, 4), ("noun",)),
            r"split_names must be 2 different names.*got \('noun',\)",
        ),
        (lambda: classification_metrics(ROWS, LABELS, (3, 4), ("a", "a")), "2 different names"),
        (
            lambda: classification_metrics(ROWS, LABELS[:, :1], (3, 4)),
            r"expected integers of shape \(4, 2\)",
        ),
        (lambda: classification_metrics(ROWS, LABELS, (3, 5)), r"expected \[batch, 8\]"),
    ],
)
def test_inputs_that_do_not_fit(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_accuracies_are_said_in_per_cent():
    values = {"accuracy": 0.375, "noun-verb_accuracy_top_5": 1.0, "loss": 1.23456, "videos": 8}
    said = [metric_text(*each) for each in values.items()]
    assert said == ["accuracy 37.5%", "noun-verb_accuracy_top_5 100.0%", "loss 1.235", "videos 8"]
