# SPDX-License-Identifier: Apache-2.0
"""Products of half precision on CPU: what XLA is given to compile, and what comes out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_in_float64 import qkv
from helpers import mostly_slow

from vivit_jax import VideoMAEConfig, VivitConfig
from vivit_jax.benchmark.work import Work, program
from vivit_jax.layers import chunked, linear
from vivit_jax.layers.linear import product
from vivit_jax.layers.matrices import matrix_product
from vivit_jax.train.planning.hlo import parse

SIZES = dict(
    image_size=32,
    num_frames=4,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    num_labels=5,
    dtype="bfloat16",
    attention="chunked",
)
DECODER = dict(
    decoder_hidden_size=64,
    decoder_intermediate_size=128,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
)
MODELS = {
    "ViViT": (VivitConfig(**SIZES, tubelet_size=(2, 4, 4)), "finetune"),
    "VideoMAE": (VideoMAEConfig(**SIZES, patch_size=4), "finetune"),
    "pre-training": (VideoMAEConfig(**SIZES, **DECODER, patch_size=4), "pretrain"),
}


def products_in(compiled) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Types of the operands and shape of the result of all products of two matrices."""
    found = []
    for instructions in parse(compiled.as_text()).computations.values():
        for each in instructions.values():
            operands = [instructions[name].arrays[0] for name in each.operands]
            if each.opcode == "dot" and not any(1 in x.shape for x in operands):
                found.append((tuple(x.dtype for x in operands), each.arrays[0].shape))
    return found


def multiplies_half_precision() -> bool:
    """Whether XLA has a kernel for this machine that takes bfloat16."""
    square = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
    multiply = jax.jit(lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.float32))
    return products_in(multiply.lower(square, square).compile())[0][0] == ("bf16", "bf16")


@pytest.fixture
def as_users_compile():
    if jax.default_backend() != "cpu":
        pytest.skip("about the CPU; the default device is another")
    with jax.default_matmul_precision(None):
        if not multiplies_half_precision():
            pytest.skip("XLA multiplies bfloat16 as float32 on this CPU in any form")
        yield


def compiled_step(model):
    config, kind = MODELS[model]
    made = program(Work(model, config, kind))
    return made.step.lower(made.state, made.inputs).compile()


@pytest.mark.parametrize("model", mostly_slow(MODELS, "ViViT"))
def test_no_product_of_a_step_is_widened(model, as_users_compile):
    found = products_in(compiled_step(model))
    assert len(found) > 20
    assert not [each for each in found if each[0] != ("bf16", "bf16")]


def test_a_plain_product_is_seen_to_be_widened(monkeypatch, as_users_compile):
    plain = lambda x, y, dtype: jnp.matmul(x, y, preferred_element_type=dtype)  # noqa: E731
    monkeypatch.setattr(linear, "matrix_product", plain)
    kinds = {kind for kind, _ in products_in(compiled_step("ViViT"))}
    assert kinds == {("bf16", "bf16"), ("f32", "f32")}


def operands(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def in_float64(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


def assert_rounded_once(found, exact, dtype):
    """Half a unit in the last place, and what sums in float32 lose."""
    assert found.dtype == dtype
    half_unit = float(jnp.finfo(dtype).eps) / 2
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert (error <= half_unit * np.abs(exact) + 3e-6 * np.abs(exact).max()).all()


SHAPES = ((50, 96, 40), (3, 35, 7), (1, 1, 1))
HALVES = ("bfloat16", "float16")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    mostly_slow(itertools.product(SHAPES, HALVES), *zip(SHAPES, itertools.cycle(HALVES))),
)
def test_products_and_their_gradients_are_rounded_once(shape, dtype):
    m, k, n = shape
    x, y, g = operands(dtype, (m, k), (k, n), (m, n))
    out, pullback = jax.vjp(jax.jit(matrix_product), x, y)
    exact_x, exact_y, exact_g = in_float64(x, y, g)
    assert_rounded_once(out, exact_x @ exact_y, dtype)
    to_x, to_y = pullback(g)
    assert_rounded_once(to_x, exact_g @ exact_y.T, dtype)
    assert_rounded_once(to_y, exact_x.T @ exact_g, dtype)
    # And those of the gradients, which are such products of other axes; one is a sum of two.
    to_gradients = operands(dtype, (m, k), (k, n))
    _, back = jax.vjp(jax.jit(pullback_of), x, y, g)
    u, v = in_float64(*to_gradients)
    exact = (exact_g @ v.T, u.T @ exact_g, u @ exact_y + exact_x @ v)
    size = np.abs(u) @ np.abs(exact_y) + np.abs(exact_x) @ np.abs(v)
    *single, double = back(tuple(to_gradients))
    for found, expected in zip(single, exact[:2], strict=True):
        assert_rounded_once(found, expected, dtype)
    error = np.abs(np.asarray(double, np.float64) - exact[2])
    assert (error <= 2 * float(jnp.finfo(dtype).eps) * size).all()


def pullback_of(x, y, g):
    return jax.vjp(matrix_product, x, y)[1](g)


def test_products_and_gradients_without_jit():
    x, y = operands("bfloat16", (5, 32), (32, 7))
    of_both = jax.value_and_grad(lambda x, y: matrix_product(x, y).sum(), (0, 1))
    expected = of_both(x, y)
    with jax.disable_jit():
        found = of_both(x, y)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))


def test_vmap_over_nothing():
    for x in operands("bfloat16", (0, 4, 32), (3, 0, 32)):
        found = jax.vmap(matrix_product, (0, None))(x, jnp.ones((32, 5), x.dtype))
        assert found.shape == (*x.shape[:2], 5)


def test_forward_mode_and_vmap():
    x, y, dx, dy = operands("bfloat16", (4, 9, 32), (4, 32, 5), (4, 9, 32), (4, 32, 5))
    exact_x, exact_y, exact_dx, exact_dy = in_float64(x, y, dx, dy)
    _, change = jax.jvp(matrix_product, (x[0], y[0]), (dx[0], dy[0]))
    exact = exact_dx[0] @ exact_y[0] + exact_x[0] @ exact_dy[0]
    np.testing.assert_allclose(np.asarray(change, np.float64), exact, atol=0.15)  # measured 0.06
    for axes, left, right in (
        ((0, 0), exact_x, exact_y),
        ((0, None), exact_x, exact_y[:1]),
        ((None, 0), exact_x[:1], exact_y),
    ):
        args = [z if axis == 0 else z[0] for z, axis in zip((x, y), axes, strict=True)]
        mapped = jax.vmap(matrix_product, axes)
        assert_rounded_once(mapped(*args), left @ right, "bfloat16")
        gradients = jax.grad(lambda *args: mapped(*args).astype(jnp.float32).sum(), (0, 1))(*args)  # noqa: B023
        assert [z.shape for z in gradients] == [z.shape for z in args]


def test_only_the_cpu_gets_another_product(as_users_compile):
    """An export for several platforms, whose other parts a partitioner may split."""
    gradient = jax.jit(jax.grad(lambda x, y: product(x, y).sum(), (0, 1)))
    traced = gradient.trace(*operands("bfloat16", (32, 64), (64, 48)))
    kept = {}
    for place in ("cpu", "tpu", "cuda"):
        text = traced.lower(lowering_platforms=(place,)).as_text()
        kept[place] = text.count("stablehlo.transpose"), text.count("-> tensor<64x48xbf16>")
    assert kept["tpu"] == kept["cuda"] != kept["cpu"]


def test_split_products_are_plain(as_users_compile):
    """A partitioner finds its way through a transposition, and not through one of strips."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, g, y = operands("bfloat16", (64, 64), (64, 48), (64, 48))
    gradient = jax.jit(lambda x, g: jax.vjp(matrix_product, x, y)[1](g)[1])
    text = gradient.lower(*jax.device_put((x, g), place)).as_text()
    assert "dims = [1, 2, 0]" not in text
    assert "dims = [1, 2, 0]" in gradient.lower(x, g).as_text()
    exact = in_float64(x)[0].T @ in_float64(g)[0]
    assert_rounded_once(gradient(x, g), exact, "bfloat16")


@pytest.mark.parametrize("length", [17, 401, 640])
def test_keys_in_rows_are_the_same_gradients(length):
    """By the error to float64 of the tiles with queries in rows, which have the same products."""
    q, k, v = (jnp.asarray(x[0, :, 0], jnp.bfloat16) for x in qkv(length))
    (d_out,) = operands("bfloat16", v.shape)
    out, log_sum = chunked.forward_tile(q, k, v)
    mean = chunked.mean_gradient(out, d_out, log_sum.dtype)
    given = q, k, v, log_sum, d_out, mean
    exact = chunked.backward_tile(*(x.astype(jnp.float32) for x in given))
    errors = {}
    for run in (chunked.backward_tile, lambda *args: chunked.keys_in_rows(k.T, *args)):
        found = jax.jit(run)(*given)
        assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
        errors[run] = [
            np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
            for a, b in zip(found, exact, strict=True)
        ]
    for other, ours in zip(*errors.values(), strict=True):
        assert 0 < ours <= 1.05 * other
