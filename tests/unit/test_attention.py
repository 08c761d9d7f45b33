# SPDX-License-Identifier: Apache-2.0
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import clip, config_of, random_params

from vivit_jax import ConfigError, UserError, VivitModel
from vivit_jax.layers.attention import attention, choose_implementation

LENGTHS = [1, 17, 100, 200, 201, 399, 401, 640]


def qkv(length, heads=3, width=20, batch=2, dtype=np.float32):
    rng = np.random.default_rng(length)
    return [rng.standard_normal((batch, length, heads, width)).astype(dtype) for _ in range(3)]


def reference(q, k, v):
    """Softmax attention in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = np.einsum("bqne,bkne->bnqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnqk,bkne->bqne", weights, v)


@pytest.mark.parametrize("implementation", ["auto", "xla", "chunked"])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_backend_is_exact(implementation, length):
    q, k, v = qkv(length)
    out = attention(*map(jnp.asarray, (q, k, v)), implementation=implementation)
    np.testing.assert_allclose(out, reference(q, k, v), atol=5e-6)  # measured 6.0e-7


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_bfloat16_keeps_a_float32_softmax(implementation):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(401))
    out = attention(q, k, v, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)))
    # One rounding of the weights and one of the output: 2^-9 each; measured 3.2e-3.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=6e-3)


def test_chunked_gradients_are_the_plain_ones():
    q, k, v = map(jnp.asarray, qkv(301))

    def gradients(implementation):
        loss = lambda *x: jnp.sum(jnp.sin(attention(*x, implementation=implementation)))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for a, b in zip(gradients("chunked"), gradients("xla"), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("length", [1, 17, 201])
def test_float64_stays_float64(length):
    q, k, v = qkv(length, dtype=np.float64)
    with jax.enable_x64(True):
        out = jax.jit(attention)(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(out, reference(q, k, v), atol=1e-14)


def test_chunked_never_holds_the_scores_of_all_heads():
    q, k, v = map(jnp.asarray, qkv(1568, heads=12, width=64, batch=1))
    sizes = {}
    for implementation in ("chunked", "xla"):
        f = jax.jit(lambda q, k, v, i=implementation: attention(q, k, v, implementation=i))
        sizes[implementation] = f.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    scores = 12 * 1568 * 1568 * 4
    assert sizes["xla"] >= scores  # so that the bound below means something
    assert sizes["chunked"] < scores / 4


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "length", "expected"),
    [
        ("cpu", "float32", 64, 1568, "chunked"),
        ("cpu", "bfloat16", 64, 1568, "chunked"),
        ("cpu", "float32", 64, 50, "xla"),
        ("cpu", "float16", 64, 50, "chunked"),
        ("gpu", "bfloat16", 64, 3137, "cudnn"),
        ("gpu", "float16", 88, 1568, "cudnn"),
        ("gpu", "float32", 64, 1568, "xla"),
        ("gpu", "bfloat16", 20, 1568, "xla"),
        ("gpu", "bfloat16", 256, 1568, "xla"),
        ("tpu", "bfloat16", 64, 1568, "xla"),
        ("cpu", "float64", 64, 1, "chunked"),
    ],
)
def test_what_auto_stands_for(platform, dtype, head_dim, length, expected, caplog):
    choose_implementation.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert choose_implementation(platform, dtype, head_dim, length) == expected
    assert len(caplog.records) == 1 and expected in caplog.text


def test_cudnn_where_it_cannot_run_is_an_error_not_a_fallback():
    if jax.default_backend() == "gpu":
        q, k, v = map(jnp.asarray, qkv(64))  # float32
    else:
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(64, width=64))
    with pytest.raises(ConfigError, match="attention='cudnn' cannot run here.*auto"):
        attention(q, k, v, implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [160, 1568, 3137])
@pytest.mark.parametrize("width", [64, 80, 88])
def test_cudnn_agrees_with_float64(length, width):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(length, width=width))
    exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)))
    out = attention(q, k, v, implementation="cudnn")
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=6e-3)


def test_float16_runs_on_cpu_except_where_xla_cannot():
    q, k, v = (jnp.asarray(x, jnp.float16) for x in qkv(17))
    exact = reference(*(np.asarray(x, np.float32) for x in (q, k, v)))
    for implementation in ("auto", "chunked"):
        out = attention(q, k, v, implementation=implementation)
        assert out.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=2e-3)
    if jax.default_backend() == "cpu":
        with pytest.raises(ConfigError, match="cannot run float16 on CPU"):
            attention(q, k, v, implementation="xla")


def test_unknown_implementation():
    with pytest.raises(ConfigError, match="got 'flash'"):
        attention(*map(jnp.asarray, qkv(4)), implementation="flash")


def test_head_mask_silences_heads_layer_by_layer():
    """Zero for a head equals zeroing the rows of the output projection that read it."""
    config = dataclasses.replace(config_of("vivit base"), scan_layers=False)
    model, x = VivitModel(config), clip(config)
    params = {"params": random_params(model)}
    apply = jax.jit(model.apply, static_argnames="output_attentions")
    head_mask = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]], np.float32)
    ours = apply(params, x, head_mask=head_mask, output_attentions=True)
    cut = jax.tree.map(lambda p: p, params)
    for layer, row in enumerate(head_mask):
        out = cut["params"][f"layers_{layer}"]["attention"]["out"]
        out["kernel"] = out["kernel"] * row[:, None, None]
    expected = apply(cut, x).last_hidden_state
    np.testing.assert_allclose(ours.last_hidden_state, expected, atol=1e-5)
    silent = np.asarray(ours.attentions).sum(axis=(-2, -1)) == 0
    assert (silent == (head_mask == 0)[:, None]).all()
    untouched = apply(params, x).last_hidden_state
    assert np.abs(np.asarray(untouched) - np.asarray(expected)).max() > 1e-2
    ones = apply(params, x, head_mask=np.ones(4)).last_hidden_state
    np.testing.assert_allclose(ones, untouched, atol=1e-5)
    with pytest.raises(UserError, match=r"\(4,\) or \(3, 4\), got \(3,\)"):
        model.apply(params, x, head_mask=np.ones(3))
