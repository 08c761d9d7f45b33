# SPDX-License-Identifier: Apache-2.0
"""Products by Eigen: the same numbers, in every transformation, and no convolution that is left."""

import jax
import jaxlib
import numpy as np
import pytest
from helpers import bool_mask, clip, mostly_slow
from jax.sharding import AxisType
from tiny import config_of

from vivit_jax.benchmark.products import products_of
from vivit_jax.layers import chunked, matrices
from vivit_jax.layers.matrices import eigen_is_faster, matrix_product
from vivit_jax.masking import Mask
from vivit_jax.models.videomae import VideoMAEForPreTraining, VideoMAEForVideoClassification
from vivit_jax.models.vivit import VivitForVideoClassification

REWRITTEN = tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11)
PROCESSORS = {  # flags as Linux lists them -> whether Eigen is the faster library there
    "flags\t\t: fpu avx2 avx512f amx_tile amx_bf16": True,
    "flags\t\t: fpu avx2 avx512f avx512_bf16": False,
    "Features\t: fp asimd": False,
}


@pytest.fixture
def by_eigen(monkeypatch):
    """As on a processor where Eigen is faster, with columns as few as tests have."""
    monkeypatch.setattr(matrices, "FEW_COLUMNS", 16)
    for module in (matrices, chunked):
        monkeypatch.setattr(module, "eigen_is_faster", lambda: True)
    jax.clear_caches()
    yield
    jax.clear_caches()


def matrix(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(("line", "faster"), PROCESSORS.items())
def test_eigen_is_for_processors_with_amx_and_jaxlibs_that_rewrite(
    line, faster, monkeypatch, tmp_path
):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\nbugs\t\t:\n\nprocessor\t: 1\n")
    monkeypatch.setattr(matrices, "CPUINFO", tmp_path / "cpuinfo")
    eigen_is_faster.cache_clear()
    try:
        assert eigen_is_faster() == (faster and REWRITTEN)
        monkeypatch.setattr(matrices, "CPUINFO", tmp_path / "not Linux")
        eigen_is_faster.cache_clear()
        assert not eigen_is_faster()
    finally:
        eigen_is_faster.cache_clear()


def run(case):
    """A function of params that returns a model's loss, and params for it."""
    config = config_of(case)
    x = clip(config)
    if case == "mae pretraining":
        model = VideoMAEForPreTraining(config)
        inputs = {"mask": Mask.from_bool(bool_mask(config))}
    else:
        vivit = case.startswith("vivit")
        model = (VivitForVideoClassification if vivit else VideoMAEForVideoClassification)(config)
        inputs = {"labels": np.arange(len(x))}
    params = jax.jit(model.init)(jax.random.key(0), x, **inputs)
    return (lambda params: model.apply(params, x, **inputs).loss), params


CASES = ["vivit cls", "mae cls", "mae pretraining"]


@pytest.mark.parametrize("case", mostly_slow(CASES, "mae cls"))
def test_a_step_has_the_same_products_and_gradients_and_no_convolution(case, request):
    loss, params = run(case)
    step = jax.jit(jax.value_and_grad(loss))
    plain = step.lower(params).compile()
    expected, counted = plain(params), products_of(step, params)
    request.getfixturevalue("by_eigen")
    step = jax.jit(jax.value_and_grad(loss))
    compiled = step.lower(params).compile()
    assert products_of(step, params).total() == counted.total()  # none is computed twice
    if REWRITTEN:
        text = compiled.as_text()
        assert " convolution(" not in text
        assert text.count("__ynn_fusion") < plain.as_text().count("__ynn_fusion")
    for ours, theirs in zip(
        *(jax.tree.leaves(each) for each in (compiled(params), expected)), strict=True
    ):
        largest = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * max(largest, 1e-3))  # measured: equal


def test_every_transformation_of_a_product(by_eigen):
    x, y = matrix(12, 40), matrix(40, 24, seed=1)
    d_x, d_y = matrix(12, 40, seed=2), matrix(40, 24, seed=3)
    # Measured 1.5e-5, of values up to 80.
    close = lambda ours, exact: np.testing.assert_allclose(ours, exact, atol=2e-5)  # noqa: E731
    close(matrix_product(x, y), x @ y)  # eagerly
    out, change = jax.jit(jax.jvp, static_argnums=0)(matrix_product, (x, y), (d_x, d_y))
    close(out, x @ y)
    close(change, d_x @ y + x @ d_y)
    close(jax.jvp(lambda x: matrix_product(x, y), (x,), (d_x,))[1], d_x @ y)
    for found, exact in zip(
        jax.grad(lambda x, y: matrix_product(x, y).sum(), (0, 1))(x, y),
        (np.ones((12, 24)) @ y.T, x.T @ np.ones((12, 24))),
        strict=True,
    ):
        close(found, exact)
    square = lambda x: (matrix_product(x, y) ** 2).sum()  # noqa: E731
    close(jax.hessian(square)(x[:1])[0, :, 0], 2 * y @ y.T)
    many_x, many_y = matrix(3, 12, 40), matrix(3, 40, 24)
    close(jax.vmap(matrix_product, (0, None))(many_x, y), many_x @ y)
    close(jax.vmap(matrix_product, (2, None))(np.moveaxis(many_x, 0, 2), y), many_x @ y)
    close(jax.vmap(matrix_product, (None, 0))(x, many_y), x @ many_y)
    close(jax.vmap(matrix_product)(many_x, many_y), many_x @ many_y)
    each = jax.vmap(jax.vmap(matrix_product, (0, None)), (0, 0))
    twice = np.stack([many_x, many_x])
    close(each(twice, many_y[:2]), twice @ many_y[:2, None])


def test_other_types_and_few_columns_are_dots(by_eigen):
    def convolves(x, y, **kwargs):
        return "convolution" in jax.jit(lambda: matrix_product(x, y, **kwargs)).lower().as_text()

    x, y = matrix(12, 40), matrix(40, 24)
    assert convolves(x, y)
    assert convolves(x, y, dtype="float32")
    assert not convolves(x, y[:, :15])
    for dtype in ("bfloat16", "float16"):
        half = x.astype(dtype), y.astype(dtype)
        assert not convolves(*half)
        assert not convolves(*half, dtype="float32")


def test_elsewhere_it_is_a_dot(by_eigen):
    """In a file for any platform, for a TPU, and in a program of several devices."""
    x, y = matrix(16, 40), matrix(40, 24)
    rows = jax.export.symbolic_shape("rows, 40")
    of_any = jax.ShapeDtypeStruct(rows, "float32")
    product = jax.jit(matrix_product)
    exported = jax.export.export(product, platforms=("cpu", "cuda", "tpu"))(of_any, y)
    assert "convolution" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, y), x @ y, atol=2e-5)  # measured 3.8e-6
    assert "convolution" in product.lower(x, y).as_text()
    lowered = product.trace(x, y).lower(lowering_platforms=("tpu",))
    assert "convolution" not in lowered.as_text()

    mesh = jax.make_mesh((8,), ("clips",), axis_types=(AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("clips"))
    compiled = product.lower(jax.device_put(x, split), y).compile()
    assert "convolution" not in compiled.as_text()
    assert compiled.output_shardings.is_equivalent_to(split, 2)
    np.testing.assert_allclose(compiled(jax.device_put(x, split), y), x @ y, atol=2e-5)  # the same

    one = jax.make_mesh((1,), ("clips",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with jax.set_mesh(one):  # the trainer's own, on a machine with one device
        assert "convolution" in product.lower(x, y).as_text()
