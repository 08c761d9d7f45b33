# SPDX-License-Identifier: Apache-2.0
"""All that is traced under jax_numpy_dtype_promotion="strict", where a silent promotion raises."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bool_mask, clip, mostly_slow
from tiny import CASES, VIDEOMAE, config_of
from variants import VARIANTS, variant_config

import vivit_jax
from vivit_jax.layers.attention import attention
from vivit_jax.masking import MASKS
from vivit_jax.models.build import abstract_params
from vivit_jax.models.losses import classification_loss, multi_head_loss, reconstruction_loss

KINDS = {
    "float32": dict(attention="chunked"),
    "mixed": dict(dtype="bfloat16", attention="xla"),
    "bfloat16": dict(dtype="bfloat16", param_dtype="bfloat16", attention="chunked"),
    "float16": dict(dtype="float16", param_dtype="float16"),
}
DROPS = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.1)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_what_promotes_silently_raises():
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.bfloat16) + jnp.ones(2, jnp.float32)


def traced(model, inputs):
    """Outputs with attention weights, and gradients with and without dropout."""
    x = jnp.asarray(clip(model.config))

    def objective(params, deterministic):
        out = model.apply(
            {"params": params},
            x,
            deterministic=deterministic,
            rngs={"dropout": jax.random.key(0)},
            **inputs,
        )
        loss = getattr(out, "loss", None)
        return out.last_hidden_state.astype(jnp.float32).sum() if loss is None else loss

    params = abstract_params(model)
    for deterministic in (True, False):
        loss, gradients = jax.eval_shape(
            lambda params, flag=deterministic: jax.value_and_grad(objective)(params, flag), params
        )
        assert loss.dtype == jnp.float32
        assert jax.tree.map(lambda g: g.dtype, gradients) == jax.tree.map(lambda p: p.dtype, params)
    flags = dict(output_attentions=True, output_hidden_states=True)
    heads = jnp.ones(model.config.num_attention_heads)
    out = jax.eval_shape(
        lambda p: model.apply({"params": p}, x, head_mask=heads, **flags, **inputs), params
    )
    assert out.hidden_states.dtype == model.config.dtype


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("case", "kind"),
    mostly_slow(
        itertools.product(CASES, KINDS),
        *(("vivit cls", "mixed"), ("mae cls", "float32"), ("mae pretraining", "mixed")),
    ),
)
def test_models(case, kind):
    config = config_of(case, **KINDS[kind], **DROPS)
    inputs = {}
    if "cls" in case:
        inputs["labels"] = jnp.array([1, 3])
    elif "pretraining" in case:
        inputs["mask"] = vivit_jax.Mask.from_bool(bool_mask(config))
    traced(CASES[case][0](config), inputs)


@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize("case", mostly_slow(VARIANTS, "dot product"))
def test_variants(case, dtype):
    config = variant_config(case, dtype=dtype, **DROPS)
    traced(vivit_jax.VivitForVideoClassification(config), {"labels": jnp.array([1, 3])})


@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16"], "bfloat16"))
def test_cosine_attention_and_layer_scale(dtype):
    changes = dict(cosine_attention=True, layer_scale_init=0.1)
    config = vivit_jax.VideoMAEConfig(**VIDEOMAE, **changes, dtype=dtype, **DROPS)
    model = vivit_jax.VideoMAEForVideoClassification(config)
    traced(model, {"labels": jnp.array([1, 3])})


def test_cosine_attention_with_wider_parameters():
    changes = dict(cosine_attention=True, param_dtype="float64")
    with jax.enable_x64(True):
        model = vivit_jax.VideoMAEModel(vivit_jax.VideoMAEConfig(**VIDEOMAE, **changes))
        x = jax.ShapeDtypeStruct(clip(model.config).shape, "float32")
        out = jax.eval_shape(model.apply, {"params": abstract_params(model)}, x)
    assert out.last_hidden_state.dtype == "float32"


def test_gradient_of_the_library_s_attention_in_half_precision():
    """Lowered too: jax promotes there, of the gradients to its own products of bfloat16."""
    q, k, v, d_out = np.random.default_rng(0).standard_normal((4, 2, 7, 3, 8))

    def gradient(q, k, v):
        out = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), implementation="xla")
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32) * jnp.asarray(d_out, jnp.float32))

    operands = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    found = jax.jit(jax.grad(gradient, argnums=(0, 1, 2)))(*operands)
    with jax.numpy_dtype_promotion("standard"):
        exact = jax.jit(jax.grad(gradient, argnums=(0, 1, 2)))(*operands)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02)  # measured 7.8e-3, of gradients up to 2.3


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16", "float16"], "bfloat16"))
@pytest.mark.parametrize("kind", ["single", "int8", "multi", "regression", "heads", "soft"])
def test_losses(kind, dtype):
    """The same number as without "strict", and a gradient."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, 5)), dtype)
    hot = jax.nn.one_hot(jnp.array([0, 4, 2, 1]), 5)
    loss = {
        "single": lambda x: classification_loss(x, jnp.array([0, 4, -100, 1])),
        "int8": lambda x: classification_loss(x, jnp.array([0, 4, 2, 1], jnp.int8)),
        "multi": lambda x: classification_loss(x, hot),
        "regression": lambda x: classification_loss(x, jnp.ones((4, 5), int), "regression"),
        "heads": lambda x: multi_head_loss(x, jnp.array([[0, 1]] * 4), (3, 2), 0.1),
        "soft": lambda x: multi_head_loss(x, hot, (3, 2), 0.1),
    }[kind]
    found, gradient = jax.value_and_grad(loss)(logits)
    with jax.numpy_dtype_promotion("standard"):
        assert found == loss(logits)
    assert found.dtype == jnp.float32 and gradient.dtype == dtype and np.isfinite(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reconstruction_loss(dtype):
    logits, targets = jnp.ones((2, 3, 4), dtype), jnp.zeros((2, 3, 4), dtype)
    assert reconstruction_loss(logits, targets) == 1
    assert reconstruction_loss(logits, targets, jnp.ones((2, 3), bool)) == 1


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind):
    mask = MASKS[kind](jax.random.key(0), 2, (4, 4, 4), 0.75)
    assert mask.num_tokens == 64
