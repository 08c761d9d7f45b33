# SPDX-License-Identifier: Apache-2.0
"""The heads of probes against PyTorch and formulas written out: fits, folds, neighbours, errors."""

import math

import numpy as np
import pytest
from tiny import SMALL_VIDEOMAE

import vivit_jax
from vivit_jax import param_tree
from vivit_jax.inference import probe, probe_attentive
from vivit_jax.inference.probe_features import ClipFeatures
from vivit_jax.inference.probe_linear import (
    Regression,
    accuracy_and_loss,
    averaged,
    neighbour_scores,
    stratified_folds,
)
from vivit_jax.inference.probe_record import ProbeSettings, Trial
from vivit_jax.recipes import recipe_named


def clusters(n, d, classes=3, seed=0):
    """Features of classes that overlap, far from 0 and of very different spreads."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    x = rng.standard_normal((n, d)) + 0.7 * rng.standard_normal((classes, d))[labels]
    return (5 + x * 10.0 ** rng.uniform(-2, 2, d)).astype(np.float32), labels


def torch_fit(x, labels, decay):
    """Scores of the same objective on standardised features, minimised by PyTorch in float64."""
    import torch

    x = x.astype(np.float64)
    z, truth = torch.tensor((x - x.mean(0)) / x.std(0)), torch.tensor(labels)
    kernel = torch.zeros(x.shape[1], 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    how = dict(max_iter=3000, tolerance_grad=1e-9, tolerance_change=0)
    search = torch.optim.LBFGS([kernel, bias], **how, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        value = torch.nn.functional.cross_entropy(z @ kernel + bias, truth)
        value = value + decay / 2 * (kernel**2).sum()
        value.backward()
        return value

    search.step(loss)
    return (z @ kernel + bias).detach().numpy()


@pytest.mark.parametrize("n, d", [(60, 7), (20, 50)], ids=["more clips", "more features"])
def test_the_fit_is_that_of_pytorch(n, d):
    x, labels = clusters(n, d)
    strong, weak = (
        layer(x.astype(np.float64)) for layer in Regression(x, labels, 3).fit((0.3, 1e-3))
    )
    np.testing.assert_allclose(strong, torch_fit(x, labels, 0.3), atol=1e-5, rtol=1e-5)  # 1.0e-6
    np.testing.assert_allclose(weak, torch_fit(x, labels, 1e-3), atol=1e-4, rtol=1e-4)  # 1.6e-4
    assert np.abs(strong - weak).max() > 0.1


def test_scaling_is_folded_in_and_constant_features_do_no_harm():
    x, labels = clusters(30, 5)
    plain = Regression(x, labels, 3).fit([0.01])[0]
    constant = np.concatenate([x, np.full((30, 1), 7.0, np.float32)], axis=1)
    (layer,) = Regression(constant, labels, 3).fit([0.01])
    np.testing.assert_allclose(
        layer(constant.astype("f8")), plain(x.astype("f8")), atol=1e-9
    )  # 7e-15
    assert np.isfinite(layer.kernel).all() and np.abs(layer.kernel[5]).max() < 1e-6


def test_a_class_without_clips_is_never_predicted():
    x, labels = clusters(30, 5)
    (layer,) = Regression(x, labels * 2, 6).fit([0.01])
    assert set(layer(x).argmax(1)) <= {0, 2, 4}
    plain = Regression(x, labels, 3).fit([0.01])[0]
    np.testing.assert_allclose(
        layer(x.astype("f8"))[:, ::2], plain(x.astype("f8")), atol=1e-9
    )  # 2e-15


def test_folds_are_stratified_and_keep_groups_together():
    labels = np.repeat([0, 1, 2], [10, 7, 5])
    groups = [f"{i // 2}" if i < 10 else str(i) for i in range(22)]  # class 0 in pairs
    folds, count = stratified_folds(labels, groups, 5, seed=0)
    assert count == 5
    for pair in range(5):
        assert folds[2 * pair] == folds[2 * pair + 1]
    for label, each in ((0, (2,)), (1, (1, 2)), (2, (1,))):
        sizes = np.bincount(folds[labels == label], minlength=5)
        assert set(sizes) <= set(each), (label, sizes)
    other, _ = stratified_folds(labels, groups, 5, seed=1)
    assert (folds != other).any()


def test_a_rare_class_does_not_decide_on_the_folds_of_the_others():
    groups = [str(i) for i in range(9)]
    labels = np.array([0] * 5 + [1] * 3 + [2])
    folds, count = stratified_folds(labels, groups, 5, seed=0)
    assert count == 5 and folds[8] == -1
    assert sorted(folds[:5]) == [*range(5)] and len({*folds[5:8]}) == 3 and folds[5:8].min() >= 0
    folds, count = stratified_folds(labels, groups, 8, seed=0)
    assert count == 5  # as many as the largest class has clips
    folds, count = stratified_folds(np.arange(3), groups[:3], 5, seed=0)
    assert count == 0 and (folds == -1).all()


def test_neighbours_vote_as_in_dino():
    import torch

    x, labels = clusters(40, 6)
    known, asked = x[:30] - 5, x[30:] - 5
    votes = neighbour_scores(known, labels[:30], asked, 3, k=8)
    a, b = (torch.nn.functional.normalize(torch.tensor(v)) for v in (known, asked))
    cosines, places = (b @ a.T).topk(8)
    weights = torch.exp(cosines / 0.07)
    expected = torch.zeros(10, 3).scatter_add_(1, torch.tensor(labels)[places], weights)
    ratios = expected.numpy() / expected.numpy().sum(1, keepdims=True)
    np.testing.assert_allclose(
        votes / votes.sum(1, keepdims=True), ratios, rtol=1e-5
    )  # measured: 3.4e-7
    # A clip that is asked is not its own neighbour.
    own = np.eye(30, dtype=bool)
    alone = neighbour_scores(known, labels[:30], known, 3, 1, own)
    cosines = (a @ a.T).numpy() - 2 * own
    np.testing.assert_array_equal(alone.argmax(1), labels[:30][cosines.argmax(1)])


def test_scores_of_views_are_averaged_as_in_evaluations():
    logits = np.random.default_rng(0).standard_normal((4, 3, 5))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(averaged(logits, "softmax"), np.log(shares.mean(1)))
    np.testing.assert_allclose(averaged(logits, "logits"), logits.mean(1))
    labels = np.array([0, 1, 2, 3])
    accuracy, loss = accuracy_and_loss(averaged(logits, "softmax"), labels)
    assert loss == pytest.approx(-np.log(shares.mean(1)[np.arange(4), labels]).mean())
    assert accuracy == (shares.mean(1).argmax(1) == labels).mean()


@pytest.mark.slow
def test_attentive_heads_learn_what_a_mean_cannot_tell(tmp_path, monkeypatch):
    """One token of eight, anywhere, tells the class; the others are noise far from 0.

    The head that is returned computes from tokens as they are; decay weakens it, and clips that are
    not taken teach nothing.
    """
    from safetensors.numpy import save_file

    config = vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, num_labels=2, attentive_heads=2)
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 2
    tokens = 3 + 0.3 * rng.standard_normal((48, 1, 8, 16)).astype(np.float32)
    for clip, label in zip(tokens, labels, strict=True):
        clip[0, rng.integers(8), :2] += (4, 4 if label else -4)
    files = []
    for i, clip in enumerate(tokens):
        files.append(tmp_path / f"{i}.safetensors")
        save_file({"features": clip, "frame_indices": np.zeros((1, 4), np.int64)}, files[-1])
    monkeypatch.setattr(probe_attentive, "STEPS", 200)
    monkeypatch.setattr(probe_attentive, "LEARNING_RATE", 0.01)
    clips = probe_attentive.TokenFiles(tuple(files[:32]), labels[:32])
    wrong = 1 - labels[:32]
    everything, some = np.ones((2, 32), bool), np.arange(32)[None] < 16
    lying = probe_attentive.TokenFiles(
        tuple(files[:32]), np.where(np.arange(32) < 16, labels[:32], wrong)
    )
    strong, weak = probe_attentive.train_heads(config, clips, everything, [1e-3, 10.0])
    (half,) = probe_attentive.train_heads(config, lying, some, [1e-3])
    logits = probe_attentive.head_scores(config, [strong, weak, half], files[32:])[:, :, 0]
    right = (logits.argmax(-1) == labels[32:]).mean(1)
    assert right[0] == 1 and right[2] >= 0.75, right
    assert np.abs(logits[1]).mean() < 0.5 * np.abs(logits[0]).mean()
    # The same numbers from the head's parameters, without the module.
    flat, x = strong, tokens[32:, 0].astype(np.float64)
    names = ("query", "key/kernel", "value/kernel")
    query, key, value = (flat[f"attentive/{name}"].astype(np.float64) for name in names)
    scores = np.einsum("bld,dne,ne->bnl", x, key, query) / math.sqrt(8)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    read = np.einsum("bnl,bld,dne->bne", shares, x, value).reshape(16, 16)
    expected = read @ flat["head/kernel"] + flat["head/bias"]
    np.testing.assert_allclose(logits[0], expected, atol=5e-5)  # measured: 6.9e-6
    assert set(strong) == {
        *(f"attentive/{name}" for name in ("query", "key/kernel", "value/kernel")),
        *("head/kernel", "head/bias"),
    }
    assert param_tree.unflatten(strong)["attentive"]["query"].shape == (2, 8)


def test_of_equal_accuracies_the_lower_loss_decides():
    trials = (Trial(0.1, 0.9, 0.5), Trial(1.0, 0.9, 0.4), Trial(10.0, 0.8, 0.3))
    assert probe._chosen(trials, (0.1, 1.0, 10.0)) == (1.0, [])


def test_copies_are_in_one_fold_of_the_cross_validation():
    """Labels that features say nothing about: a copy in training would answer for the other."""
    rng = np.random.default_rng(0)
    features = np.repeat(rng.standard_normal((12, 1, 48)), 2, axis=0).astype(np.float32)
    labels = np.repeat([0, 1], 12)
    groups = tuple(str(i // 2) for i in range(24))
    clips = ClipFeatures(features, (), tuple(range(24)), groups, {}, ())
    found = probe._Found(clips, labels, None, np.zeros(0, np.int64), ("a", "b"), {}, 1)
    config = vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, num_labels=2)
    views = recipe_named("demo-finetune").evaluation
    result, _ = probe._probed(found, config, views, ProbeSettings(weight_decays=(0.01,)))
    assert result.trials[0].accuracy < 0.8 and result.train.accuracy == 1
