# SPDX-License-Identifier: Apache-2.0
"""The TPU kernels in Pallas' interpreter of a TPU, where memory beyond an array's end is NaN.

Where libtpu is installed they are also compiled, for chips that are not there.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_libtpu
from helpers import mostly_slow
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from test_attention import cotangent, plain, qkv, reference
from tpu_compiler import FOUR_CHIPS

from vivit_jax import ConfigError
from vivit_jax.layers import pallas
from vivit_jax.layers.attention import attention


# By itself: the interpreter of a TPU works by side effects, which the primitive of
# `vivit_jax.layers.placed` does not have.
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

    with pltpu.force_tpu_interpret_mode():
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


TIMES = {
    "bfloat16": 1.5,  # measured 1.0, where both round once only
    "float32": 5,  # measured 3.0
}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    ("case", "dtype"),
    # Each case and each type, one in two of the pairs.
    mostly_slow(itertools.product(CASES, TIMES), *zip(CASES, itertools.cycle(TIMES), strict=False)),
)
def test_as_exact_as_plain_attention(case, dtype):
    length, keys, heads, width, batch, scale = CASES[case]
    check(
        dtype,
        TIMES[dtype],
        length=length,
        keys=keys,
        heads=heads,
        width=width,
        batch=batch,
        scale=scale,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", mostly_slow(TIMES, "bfloat16"))
def test_blocks_of_queries_and_parts_of_keys(dtype, monkeypatch):
    """What very many tokens are cut into, of fewer: the last block and part are not full."""
    monkeypatch.setattr(pallas, "VMEM", (2.5 if dtype == "float32" else 0.9) * 2**20)
    monkeypatch.setattr(pallas, "CHUNK", 128)
    q, k = (jax.ShapeDtypeStruct((2, 64, length), dtype) for length in (500, 900))
    for arrays, sums in ((2, 0), (4, 2)):
        plans = pallas._plans(q, k, arrays, sums)
        assert len(plans) > 1 and all(500 % plan.queries for plan, _ in plans)
        assert plans[-1][0].num_keys < plans[0][0].num_keys < 900
    check(dtype, TIMES[dtype], length=500, keys=900, heads=2, width=64, batch=1)


# Queries and keys, head width, type; queries and heads of a program forward and backward.
PLANS = [
    (160, 64, "bfloat16", (256, 8), (256, 8)),
    (197, 88, "bfloat16", (256, 8), (256, 8)),
    (784, 64, "bfloat16", (896, 1), (896, 1)),
    (1568, 64, "bfloat16", (1664, 1), (1664, 1)),
    (1568, 128, "float32", (896, 1), (640, 1)),
    (3137, 64, "bfloat16", (640, 1), (640, 1)),
    (7000, 64, "bfloat16", (384, 1), (384, 1)),
]


@pytest.mark.parametrize(("length", "width", "dtype", "forward", "backward"), PLANS)
@jax.default_matmul_precision("default")
def test_plans_of_the_published_lengths(length, width, dtype, forward, backward):
    x = jax.ShapeDtypeStruct((96, width, length), jnp.dtype(dtype))
    found = []
    for arrays, sums in ((2, 0), (4, 2)):
        ((plan, part),) = pallas._plans(x, x, arrays, sums)
        assert part == slice(0, length) and plan.bytes(arrays, sums) <= pallas.VMEM
        found.append((plan.queries, plan.heads))
    assert found == [forward, backward]


def test_precise_products_have_smaller_blocks():
    """On v4 they take up to twice the memory; this is what the tests of numbers compile, too."""
    x = jax.ShapeDtypeStruct((96, 64, 1568), jnp.float32)
    for precision, queries in (("default", 1664), ("high", 896), ("highest", 896)):
        with jax.default_matmul_precision(precision):
            ((plan, _),) = pallas._plans(x, x, arrays=2, sums=0)
        assert plan.queries == queries


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
    ("length", "width", "expected"),
    [(16, 64, False), (63, 64, False), (64, 64, True), (3137, 8, True), (3137, 4, False)],
)
def test_short_sequences_and_narrow_heads_are_left_to_xla(length, width, expected):
    assert pallas.worth_it(length, width) == expected


# Heads of one program, queries, keys, head width; scheduled instructions forward and backward, as
# libtpu 0.0.42.1 dumps them for v5e (schedule-analysis_final_bundles).
SCHEDULES = [
    (16, 128, 128, 64, 1982, 3218),
    (8, 197, 197, 64, 2898, 4206),
    (1, 784, 784, 64, 2968, 5389),
    (1, 1568, 1568, 64, 9015, 18382),
    (1, 640, 3137, 64, 8033, 14889),
    (1, 1568, 1568, 88, 10501, 21541),
    (1, 1568, 1568, 128, 11881, 24891),
]


@pytest.mark.parametrize(("heads", "queries", "keys", "width", "forward", "backward"), SCHEDULES)
def test_estimated_cycles_are_those_of_the_schedules(
    heads, queries, keys, width, forward, backward
):
    for way, scheduled in enumerate((forward, backward)):
        found = pallas.cycles(heads, queries, keys, width, backward=bool(way))
        assert found == pytest.approx(scheduled, rel=0.3)  # measured 0.25 forward, 0.11 backward


def test_a_batch_of_any_size_can_be_exported():
    """Only traced: interpreted and compiled, a grid has one size."""
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, 196, 12, 64), jnp.bfloat16)
    out, log_sum = jax.eval_shape(pallas.forward, x, x, x)
    assert out.shape == x.shape and log_sum.shape == (b, 196, 12)
    found = jax.eval_shape(pallas.backward, x, x, x, out, log_sum, out)
    assert [y.shape for y in found] == [x.shape] * 3


SPEC = PartitionSpec("data", None, "tensor")  # of q, k, v and the result


def shared_over(mesh):
    """Attention and its gradients, clips over the mesh's "data" and heads over its "tensor"."""

    def step(q, k, v, d_out):
        out, log_sum = pallas.forward(q, k, v)
        return out, *pallas.backward(q, k, v, out, log_sum, d_out)

    return jax.shard_map(
        step, mesh=mesh, in_specs=(SPEC,) * 4, out_specs=(SPEC,) * 4, check_vma=False
    )


def test_each_device_of_a_mesh_attends_on_its_own():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    q, k, v = (jnp.asarray(x) for x in qkv(100, heads=4, width=64, batch=2))
    d_out = jnp.asarray(cotangent(q))
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(shared_over(mesh))(q, k, v, d_out)
    for mine, right in zip(found, reference(q, k, v, d_out), strict=True):
        np.testing.assert_allclose(mine, right, atol=5e-6)  # measured 1.3e-6


# Queries, keys, head width, type: whole heads, several in a program, blocks of queries, parts.
COMPILED = [
    (197, 197, 88, "bfloat16"),
    (640, 200, 64, "float32"),
    (1, 300, 8, "bfloat16"),
    (400, 7000, 128, "bfloat16"),
]


@pytest.mark.quick_cases(1)
@needs_libtpu
@pytest.mark.parametrize(
    ("kind", "what"),
    mostly_slow(itertools.product(FOUR_CHIPS, COMPILED), *(("v5e", COMPILED[n]) for n in (0, -1))),
)
def test_compiles_for_each_generation(kind, what, compiler):
    """And within the chip's memory, which libtpu checks; each device attends on its own."""
    length, keys, width, dtype = what
    q = (4, length, 2, width)
    found = compiler("kernels", topology=FOUR_CHIPS[kind], q=q, keys=keys, dtype=dtype)
    assert not found["collectives"] and not found["logged"]
    assert found["kernels"] == (3 if keys == 7000 else 2)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("kind", FOUR_CHIPS)
def test_published_lengths_compile_for_each_generation(kind, compiler):
    for length in (160, 196, 784, 1568, 3137):
        for width in (64, 80, 88, 128) if length == 1568 else (64, 88):
            what = dict(q=(4, length, 2, width), keys=length, dtype="bfloat16")
            assert compiler("kernels", topology=FOUR_CHIPS[kind], **what)["kernels"] == 2


@needs_libtpu
def test_nothing_is_copied_around_the_kernels(compiler):
    what = dict(q=(4, 784, 4, 64), keys=784, dtype="bfloat16")
    found = compiler("kernels", topology="v5e:2x2", **what)
    assert found["kernels"] == 2
    # XLA may fetch what they read ahead of them (copy-start), into memory that is nearer.
    assert not {"copy", "transpose", "pad", "fusion"} & set(found["others"])
    # The share of one device: 4 inputs and outputs of 2 clips x 784 tokens x 2 heads x 64.
    assert found["temporaries"] < 2 * 2 * 64 * 896 * 2


@needs_libtpu
def test_on_a_mesh_of_unknown_axes_xla_splits_another_form_and_a_warning_says_so(compiler):
    """Kernels are not split by a compiler; with rules for the axes they are by us."""
    what = dict(q=(4, 196, 4, 64), keys=196, dtype="bfloat16", names=("clips", "parts"))
    found = compiler("kernels", topology="v5e:2x2", **what)
    assert not found["kernels"] and not found["collectives"]
    assert found["logged"] == [
        "attention: chunked instead of pallas on 4 devices, as nothing says which axes of the mesh "
        "split clips and heads: jax.set_mesh and flax.linen.logical_axis_rules for 'batch' and "
        "'heads' do"
    ]
    rules = (("batch", "clips"), ("heads", "parts"))
    found = compiler("kernels", topology="v5e:2x2", **what, rules=rules)
    assert found["kernels"] == 2 and not found["collectives"] and not found["logged"]


@pytest.mark.slow
def test_any_leading_axes():
    """As factorised attention has them; each is the same as one after the other."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in qkv(70, heads=2, width=16, batch=6))
    q, k, v = (x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v))
    several = found_by(attend, q, k, v, v)
    for i in range(2):
        for one, other in zip(several, found_by(attend, q[i], k[i], v[i], v[i]), strict=True):
            np.testing.assert_array_equal(one[i], other)


def test_kernels_are_for_tpu():
    x = jnp.ones((1, 70, 2, 8))
    with pytest.raises(ConfigError, match="attention='pallas' needs a TPU, got cpu"):
        attention(x, x, x, implementation="pallas")


def test_a_shard_map_that_checks_types_takes_the_kernels():
    """As `jax.shard_map` does by default; what a kernel returns varies as its operands do."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    spec, x = PartitionSpec("x", None, "y"), jax.ShapeDtypeStruct((4, 65, 4, 64), jnp.bfloat16)
    step = lambda q, k, v: jax.vjp(attend, q, k, v)[1](q)  # noqa: E731
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3)
    assert [y.shape for y in jax.eval_shape(mapped, x, x, x)] == [x.shape] * 3
