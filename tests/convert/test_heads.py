# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning between models of one and of several heads, and what a command says of them."""

import jax
import numpy as np
import pytest
from helpers import mostly_slow, random_params
from variants import variant_config

import vivit_jax
from checkpoints_convert.pretrained import load_report
from vivit_jax.typed import override, parse_settings

ONE = dict(num_labels=5)
TWO = dict(num_labels=5, class_splits=(3, 2), split_names=("noun", "verb"))


@pytest.fixture
def saved(tmp_path):
    def save(**values):
        config = variant_config("encoder", **values)
        model = vivit_jax.VivitForVideoClassification(config)
        vivit_jax.save_pretrained(tmp_path / "model", model, random_params(model))
        return tmp_path / "model"

    return save


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("held", "asked", "splits", "fresh"),
    [
        (ONE, dict(class_splits=(4, 3), split_names=("noun", "verb")), (4, 3), True),
        (ONE, dict(class_splits=[3, 2]), (3, 2), True),
        (TWO, dict(num_labels=7), None, True),
        (TWO, dict(class_splits=(2, 3)), (2, 3), True),
        (TWO, dict(num_labels=5), (3, 2), False),
        (TWO, {}, (3, 2), False),
    ],
)
def test_heads_change_with_the_labels(saved, held, asked, splits, fresh):
    directory = saved(**held)
    report = load_report(directory, **asked)
    assert bool(report.fresh) is fresh
    assert not fresh or set(report.fresh) == {"head/kernel", "head/bias"}
    model, params = vivit_jax.from_pretrained(directory, **asked)
    assert model.config.class_splits == splits
    wanted = sum(splits) if splits else asked["num_labels"]
    assert params["head"]["bias"].shape == (wanted,) and model.config.num_labels == wanted
    if fresh:
        assert f"class_splits is {splits}" in str(report)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(num_labels=6, class_splits=(3, 2)), "sum to 5 but num_labels is 6"),
        (dict(split_names=("a", "b")), "needs class_splits, got None"),
        (dict(class_splits=(3, 2), head="none"), "need head='classification'"),
    ],
)
def test_heads_that_do_not_fit(saved, asked, message):
    with pytest.raises(vivit_jax.ConfigError, match=message):
        vivit_jax.from_pretrained(saved(**ONE), **asked)


def test_settings_of_heads():
    settings = ["class_splits=3,2", "split_names=noun,verb"]
    found = parse_settings(vivit_jax.VivitConfig, settings)
    assert found == dict(class_splits=(3, 2), split_names=("noun", "verb"), num_labels=5)
    assert override(variant_config("joint"), settings).split_names == ("noun", "verb")
    plain = override(variant_config("joint", **TWO), ["num_labels=7"])
    assert (plain.num_labels, plain.class_splits, plain.split_names) == (7, None, None)


@pytest.mark.parametrize(
    ("case", "layers", "scan_layers"),
    mostly_slow(
        [("joint", 1, True), ("encoder", 3, True), ("joint", 2, False)], ("joint", 1, True)
    ),
)
def test_the_last_block_alone_is_the_same_function(case, layers, scan_layers):
    """With hidden states every token is computed, without them the class token alone."""
    config = variant_config(
        case,
        num_hidden_layers=layers,
        num_temporal_layers=1,
        remat="block",
        scan_layers=scan_layers,
    )
    model = vivit_jax.VivitForVideoClassification(config)
    params = random_params(model)
    clip = np.random.default_rng(0).standard_normal((2, 6, 24, 16, 3)).astype(np.float32)
    mask = np.linspace(0.5, 1.5, 4, dtype=np.float32)

    def gradients(everything):
        def loss(params):
            options = dict(head_mask=mask, output_hidden_states=everything)
            return model.apply({"params": params}, clip, labels=np.array([0, 3]), **options).loss

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for one, other in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
