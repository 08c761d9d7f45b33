# SPDX-License-Identifier: Apache-2.0
"""When two sides are said to compute the same, see also tests/cli/test_benchmark.py."""

import jax
import numpy as np
import pytest
from tiny import VIDEOMAE

from vivit_jax import UserError, VideoMAEConfig
from vivit_jax.benchmark import agreement as agreement_module
from vivit_jax.benchmark.agreement import agreement, distance, is_rounded, sensitive_params
from vivit_jax.benchmark.work import Work
from vivit_jax.models.build import abstract_params, build_model

RNG = np.random.default_rng(0)
OUTPUT = RNG.standard_normal((2, 5)).astype(np.float32)
GRADIENTS = {"large": RNG.standard_normal(1000), "small": 0.1 * RNG.standard_normal(3)}


def work(dtype="float32") -> Work:
    return Work("model", VideoMAEConfig(**VIDEOMAE, dtype=dtype))


def off_by(share, x):
    """x changed by this share of its norm."""
    error = RNG.standard_normal(x.shape)
    return x + error * share * np.linalg.norm(x) / np.linalg.norm(error)


def test_distance_is_that_of_the_worst_tensor():
    gradients = {name: off_by(1e-3, x) for name, x in GRADIENTS.items()}
    gradients["small"] = off_by(0.5, GRADIENTS["small"])
    found = distance(work(), (off_by(0.1, OUTPUT), gradients), (OUTPUT, GRADIENTS))
    assert (found.output, found.gradient) == (pytest.approx(0.1, 1e-5), pytest.approx(0.5))
    assert found.tensor == "small"


def test_what_is_nothing_but_rounding_has_no_say():
    """As for the key bias, whose gradient is 0 on paper."""
    noise = {name: GRADIENTS | {"zero": x} for name, x in (("a", 1e-9), ("b", -1e-9))}
    noise = {side: values | {"zero": np.full(2, values["zero"])} for side, values in noise.items()}
    assert agreement(work(), (OUTPUT, noise["a"]), (OUTPUT, noise["b"]), None).holds
    nothing = {"a": np.zeros(3)}
    assert agreement(work(), (0 * OUTPUT, nothing), (0 * OUTPUT, nothing), None).holds
    assert not agreement(work(), (0 * OUTPUT, nothing), (OUTPUT, nothing), None).holds


def test_the_bias_of_keys_counts_as_no_smaller_than_that_of_queries():
    """Its gradient is 0 on paper: any of it is rounding, however small."""
    own = GRADIENTS | {"0.query.bias": np.full(2, 1e-2), "0.key.bias": np.full(2, 1e-7)}
    other = own | {"0.key.bias": np.full(2, -1e-7)}
    assert distance(work(), (OUTPUT, other), (OUTPUT, own)).gradient == pytest.approx(2e-5)
    wrong = own | {"0.query.bias": np.full(2, 1.1e-2)}
    assert distance(work(), (OUTPUT, wrong), (OUTPUT, own)).tensor == "0.query.bias"
    alone = {name: value for name, value in other.items() if "query" not in name}
    truth = {name: value for name, value in own.items() if "query" not in name}
    assert distance(work(), (OUTPUT, alone), (OUTPUT, truth)).gradient > 5e-4


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_nan_is_no_agreement(where):
    nan = np.full_like(OUTPUT, np.nan)
    wrong = (nan, GRADIENTS)
    if where == "gradient":
        wrong = OUTPUT, GRADIENTS | {"small": np.full(3, np.nan)}
    for dtype, exact in (("float32", None), ("bfloat16", (OUTPUT, GRADIENTS))):
        for ours, theirs in ((wrong, (OUTPUT, GRADIENTS)), ((OUTPUT, GRADIENTS), wrong)):
            assert not agreement(work(dtype), ours, theirs, exact).holds


def test_other_names_are_an_error():
    with pytest.raises(UserError, match="gradients of model differ in their names.*'a', 'b'"):
        agreement(work(), (OUTPUT, {"a": OUTPUT}), (OUTPUT, {"b": OUTPUT}), None)


@pytest.mark.parametrize(
    ("ours", "theirs", "holds"),
    [
        ((1e-2, 2e-2), (1.5e-2, 2e-2), True),  # both round alike
        ((5e-4, 2e-2), (6e-3, 4e-2), True),  # as far as the dtype's own rounding
        ((1e-2, 2e-2), (2.5e-2, 2e-2), False),
        ((2.5e-2, 2e-2), (1e-2, 2e-2), False),
        ((1e-2, 2e-2), (1e-2, 2e-1), False),  # one gradient
        ((0.9, 2e-2), (0.9, 2e-2), False),  # both are anything but the model
    ],
)
def test_half_precision_is_judged_by_float32(ours, theirs, holds):
    sides = [
        (off_by(output, OUTPUT), {name: off_by(gradient, x) for name, x in GRADIENTS.items()})
        for output, gradient in (ours, theirs)
    ]
    assert is_rounded(work("bfloat16")) and not is_rounded(work())
    found = agreement(work("bfloat16"), *sides, (OUTPUT, GRADIENTS))
    assert found.holds == holds
    assert found.own.output == pytest.approx(ours[0], 1e-3)
    assert found.distance.gradient == pytest.approx(theirs[1], 1e-3)
    assert "(ours" in str(found)


@pytest.mark.parametrize(("place", "rounded"), [("gpu", True), ("tpu", True), ("cpu", False)])
def test_accelerators_round_float32(place, rounded, monkeypatch):
    monkeypatch.setattr(agreement_module, "platform", lambda: place)
    assert is_rounded(work()) == rounded


def test_every_part_of_the_weights_shows():
    config = work().config
    model = build_model(config, "classification")
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract_params(model))
    found = sensitive_params(ones, config)
    block = found["backbone"]["layers"]
    narrow = (768 / config.hidden_size) ** 0.5
    for name, size in (("query", 3), ("key", 3), ("value", 1), ("out", 1)):
        np.testing.assert_allclose(block["attention"][name]["kernel"], size * narrow, rtol=1e-6)
    assert 0.05 < block["mlp_in"]["bias"].std() < 0.2 and abs(block["mlp_in"]["bias"].mean()) < 0.1
    assert 0.05 < block["ln_mlp"]["scale"].std() < 0.2
    zeros = jax.tree.map(np.zeros_like, ones)
    changed = sensitive_params(zeros, config)
    silent = [path for path, x in jax.tree.leaves_with_path(changed) if not x.any()]
    assert all(path[-1].key in ("kernel", "scale") for path in silent)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, ones)
