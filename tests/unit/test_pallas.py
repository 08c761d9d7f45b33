# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels in Pallas' interpreter of a TPU, where memory beyond an array's end is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_attention import cotangent, plain, qkv, reference

from vivit_jax import ConfigError
from vivit_jax.layers import pallas


@pytest.fixture(autouse=True)
def interpreted():
    with pltpu.force_tpu_interpret_mode():
        yield


@jax.custom_vjp
def attend(q, k, v):
    return pallas.forward(q, k, v)[0]


def _attend_forward(q, k, v):
    out, log_sum = pallas.forward(q, k, v)
    return out, (q, k, v, out, log_sum)


attend.defvjp(_attend_forward, lambda residuals, d_out: pallas.backward(*residuals, d_out))


def found_by(function, q, k, v, d_out):
    """Output and gradients to q, k and v, in the operands' type."""

    @jax.jit
    def run(q, k, v, d_out):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(d_out)

    found = run(q, k, v, d_out)
    assert [x.dtype for x in found] == [q.dtype] * 4
    return [np.asarray(x, np.float64) for x in found]


def check(dtype, times, **kwargs):
    """Each of the four errs at most `times` as much as plain attention does in the same type."""
    q, k, v = (jnp.asarray(x, dtype) for x in qkv(**kwargs))
    d_out = jnp.asarray(cotangent(q), dtype)
    exact = reference(q, k, v, d_out)
    ours, theirs = (found_by(function, q, k, v, d_out) for function in (attend, plain))
    assert all(np.isfinite(x).all() for x in ours)
    names = ("out", "d_q", "d_k", "d_v")
    for name, mine, other, right in zip(names, ours, theirs, exact, strict=True):
        error, allowed = np.abs(mine - right).max(), times * np.abs(other - right).max()
        assert error <= allowed + 1e-7, (name, error, allowed)


# Queries, keys, heads, head width, clips, and the scale of q, k and v.
CASES = {
    "one query and key": (1, 1, 1, 5, 1, 1),
    "several heads in a program, the last not full": (160, 160, 3, 64, 3, 1),
    "odd length": (197, 197, 3, 64, 1, 1),
    "more keys than a chunk": (40, 700, 2, 80, 1, 1),
    "more queries than keys": (700, 40, 2, 88, 1, 1),
    "width of all lanes": (130, 260, 2, 128, 1, 1),
    "whole registers": (128, 256, 2, 64, 2, 1),
    "scores of deviation 30": (196, 300, 2, 64, 1, 30**0.5),
    "equal scores": (300, 300, 1, 64, 1, 0),
    "fewer features than a register has rows": (100, 100, 2, 4, 2, 1),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "times"),
    [
        (jnp.bfloat16, 1.5),  # measured 1.0, where both round once only
        (jnp.float32, 5),  # measured 3.0
    ],
)
def test_as_exact_as_plain_attention(case, dtype, times):
    length, keys, heads, width, batch, scale = CASES[case]
    check(
        dtype, times, length=length, keys=keys, heads=heads, width=width, batch=batch, scale=scale
    )


def test_blocks_of_queries_and_parts_of_keys(monkeypatch):
    """What very many tokens are cut into, of fewer: the last block and part are not full."""
    monkeypatch.setattr(pallas, "VMEM", 1.25 * 2**20)
    monkeypatch.setattr(pallas, "CHUNK", 128)
    q, k = (jax.ShapeDtypeStruct((2, 64, length), jnp.float32) for length in (500, 900))

    def cut(arrays, sums):
        return [(plan.queries, plan.num_keys) for plan, _ in pallas._plans(q, k, arrays, sums)]

    assert cut(arrays=2, sums=0) == [(256, 512), (256, 388)]
    assert cut(arrays=4, sums=2) == [(128, 256), (128, 256), (128, 256), (128, 132)]
    for dtype, times in ((jnp.bfloat16, 1.5), (jnp.float32, 5)):
        check(dtype, times, length=500, keys=900, heads=2, width=64, batch=1)


# Queries and keys, head width, type; queries and heads of a program forward and backward.
PLANS = [
    (160, 64, "bfloat16", (256, 8), (256, 8)),
    (197, 88, "bfloat16", (256, 8), (256, 8)),
    (784, 64, "bfloat16", (896, 1), (896, 1)),
    (1568, 64, "bfloat16", (1664, 1), (1664, 1)),
    (1568, 128, "float32", (1664, 1), (896, 1)),
    (3137, 64, "bfloat16", (640, 1), (640, 1)),
    (7000, 64, "bfloat16", (384, 1), (384, 1)),
]


@pytest.mark.parametrize(("length", "width", "dtype", "forward", "backward"), PLANS)
def test_plans_of_the_published_lengths(length, width, dtype, forward, backward):
    x = jax.ShapeDtypeStruct((96, width, length), jnp.dtype(dtype))
    found = []
    for arrays, sums in ((2, 0), (4, 2)):
        ((plan, part),) = pallas._plans(x, x, arrays, sums)
        assert part == slice(0, length) and plan.bytes(arrays, sums) <= pallas.VMEM
        found.append((plan.queries, plan.heads))
    assert found == [forward, backward]


def test_float16_is_computed_in_float32():
    q, k, v = (jnp.asarray(x, jnp.float16) for x in qkv(100, heads=1, width=64, batch=1))
    d_out = jnp.asarray(cotangent(q), jnp.float16)
    found = found_by(attend, q, k, v, d_out)
    for mine, right in zip(found, reference(q, k, v, d_out), strict=True):
        # One rounding of the result, of half a unit in 2^-10, and one of `out` for the gradients.
        np.testing.assert_allclose(mine, right, rtol=2**-11, atol=2e-4)


@pytest.mark.parametrize("types", [("float64",) * 3, ("float32", "bfloat16", "float32")])
def test_types_that_are_refused(types):
    with jax.enable_x64(True):
        q, k, v = (jnp.ones((1, 8, 1, 8), dtype) for dtype in types)
        with pytest.raises(ConfigError, match="float32, bfloat16 or float16, got .*'chunked'"):
            pallas.forward(q, k, v)


def test_a_head_too_wide_for_the_chip_is_refused():
    x = jax.ShapeDtypeStruct((1, 128, 1, 4096), jnp.float32)
    with pytest.raises(ConfigError, match="head width 4096.*'chunked'"):
        jax.eval_shape(pallas.forward, x, x, x)


@pytest.mark.parametrize(
    ("length", "expected"), [(16, False), (63, False), (64, True), (3137, True)]
)
def test_short_sequences_are_left_to_xla(length, expected):
    assert pallas.worth_it(length, 1568) == pallas.worth_it(1568, length) == expected


def test_a_batch_of_any_size_can_be_exported():
    """Only traced: interpreted, a grid has one size."""
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 196, 12, 64), jnp.bfloat16)
    out, log_sum = jax.eval_shape(pallas.forward, x, x, x)
    assert out.shape == x.shape and log_sum.shape == (b, 12, 1, 196)
    found = jax.eval_shape(pallas.backward, x, x, x, out, log_sum, out)
    assert [y.shape for y in found] == [x.shape] * 3
