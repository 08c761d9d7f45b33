# SPDX-License-Identifier: Apache-2.0
"""Models as nnx modules: the same numbers as linen to the bit, trained and saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import random_params
from tiny import SMALL_VIDEOMAE, SMALL_VIVIT

import vivit_jax
from vivit_jax import UserError, param_tree

CONFIGS = {
    "vivit": vivit_jax.VivitConfig(**SMALL_VIVIT, num_labels=3, hidden_dropout_prob=0.2),
    "videomae": vivit_jax.VideoMAEConfig(
        **SMALL_VIDEOMAE, num_labels=3, drop_path_rate=0.3, hidden_dropout_prob=0.1
    ),
}
LABELS = jnp.array([0, 2])


@pytest.fixture(scope="module", params=["videomae", pytest.param("vivit", marks=pytest.mark.slow)])
def pair(request):
    """(model, params, clips, nnx module)"""
    config = CONFIGS[request.param]
    name = "Vivit" if request.param == "vivit" else "VideoMAE"
    model = getattr(vivit_jax, f"{name}ForVideoClassification")(config)
    params = random_params(model)
    clips = np.random.default_rng(0).normal(size=(2, 4, 16, 16, 3)).astype("f4")
    return model, params, clips, vivit_jax.to_nnx(model, params, rngs=nnx.Rngs(dropout=7))


def assert_equal(ours, theirs):
    ours, theirs = param_tree.flatten(ours), param_tree.flatten(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


def test_logits_and_gradients_are_linens_to_the_bit(pair):
    model, params, clips, module = pair
    assert isinstance(module, nnx.Module) and module(clips).logits.shape == (2, 3)
    linen = jax.jit(lambda params: model.apply({"params": params}, clips).logits)
    np.testing.assert_array_equal(nnx.jit(lambda m: m(clips).logits)(module), linen(params))

    def loss(params):
        return model.apply({"params": params}, clips, labels=LABELS).loss

    value, expected = jax.jit(jax.value_and_grad(loss))(params)

    @nnx.jit
    def graded(module):
        return nnx.value_and_grad(lambda m: m(clips, labels=LABELS).loss)(module)

    found, gradients = graded(module)
    assert float(found) == float(value)
    assert_equal(nnx.to_pure_dict(gradients), expected)


def test_dropout_draws_linens_numbers(pair):
    model, params, clips, module = pair

    @nnx.jit
    def random(module, rngs):
        return module(clips, deterministic=False, rngs=rngs).logits

    @jax.jit
    def linen(params, key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, clips, deterministic=False, rngs=rngs).logits

    rngs, same = nnx.Rngs(dropout=3), nnx.Rngs(dropout=3)
    first, second = random(module, rngs), random(module, rngs)
    np.testing.assert_array_equal(first, linen(params, same.dropout()))
    np.testing.assert_array_equal(second, linen(params, same.dropout()))
    assert not np.array_equal(first, second)
    # Its own stream, which moves on inside of jit too.
    own = nnx.jit(lambda m: m(clips, deterministic=False).logits)
    seeds = (7, 7, 8)
    modules = [vivit_jax.to_nnx(model, params, rngs=nnx.Rngs(dropout=n)) for n in seeds]
    first, same, other = map(own, modules)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, own(modules[0]))


def test_an_optimizer_of_nnx_takes_linens_steps_and_the_model_is_saved(pair, tmp_path):
    model, params, clips, _ = pair
    module = vivit_jax.to_nnx(model, params)
    tx = optax.adamw(1e-3)
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        loss, gradients = nnx.value_and_grad(lambda m: m(clips, labels=LABELS).loss)(module)
        optimizer.update(module, gradients)
        return loss

    @jax.jit
    def linen_step(params, state):
        def loss(params):
            return model.apply({"params": params}, clips, labels=LABELS).loss

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, trained = tx.init(params), params
    for _ in range(3):
        trained, state, expected = linen_step(trained, state)
        assert float(step(module, optimizer)) == float(expected)
    back, found = vivit_jax.from_nnx(module)
    assert back == model
    assert_equal(found, trained)
    assert_equal(params, random_params(model))  # those it was made of have not changed
    vivit_jax.save_pretrained(tmp_path / "model", back, found)
    assert_equal(vivit_jax.from_pretrained(tmp_path / "model")[1], trained)


def test_what_is_not_a_model_and_its_params(pair):
    model, params, _, _ = pair
    with pytest.raises(UserError, match="takes a flax.linen module and its params, got dict and "):
        vivit_jax.to_nnx(params, model)
    less = {name: value for name, value in params.items() if name != "head"}
    with pytest.raises(UserError, match="head/bias has shape none, expected \\(3,\\) .1 more"):
        vivit_jax.to_nnx(model, less)
    with pytest.raises(UserError, match="takes a module of vivit_jax.to_nnx, got Linear"):
        vivit_jax.from_nnx(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
