# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import assert_close, bool_mask, clip, mostly_slow, random_params
from tiny import config_of

from vivit_jax import Mask, VideoMAEForPreTraining, VivitForVideoClassification, param_tree
from vivit_jax.layers import linear
from vivit_jax.layers.linear import (
    Projection,
    exact_gelu,
    project,
    project_together,
    projections_in,
)


@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "num_in"),
    [((2, 5, 700), (700, 9), 1), ((2, 5, 31, 20), (31, 20, 9), 2), ((4, 768), (768, 3, 4), 1)],
)
def test_project_contracts_every_term(precision, x_shape, kernel_shape, num_in):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(x_shape), rng.standard_normal(kernel_shape)
    with jax.default_matmul_precision(precision):
        y = jax.jit(project, static_argnums=2)(
            jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), num_in
        )
    np.testing.assert_allclose(y, np.tensordot(x, kernel, num_in), atol=2e-4)


def test_gradients_copy_nothing():
    """A product over more than two axes has gradients for which XLA on CPU copies its operands."""

    def copies(product):
        loss = lambda x, kernel, y: (product(x, kernel) * y).sum()  # noqa: E731
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        shapes = [(2, 40, 48), (48, 4, 12), (2, 40, 4, 12)]
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return gradient.lower(*operands).compile().as_text().count(" copy(")

    assert copies(project) == 0 < copies(lambda x, kernel: jnp.tensordot(x, kernel, 1))


def test_highest_precision_on_cpu_is_more_precise():
    if jax.default_backend() != "cpu":
        pytest.skip("about the CPU; the default device is another")
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(s).astype(np.float32) for s in ((64, 3072), (3072, 64)))
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    spread = {}
    for precision in (None, "highest"):
        with jax.default_matmul_precision(precision):
            spread[precision] = np.std(np.asarray(jax.jit(project)(x, kernel)) - exact)
    # Measured 0.4 with AVX2 and 0.72 with AVX-512, whose registers add up in more parts anyway.
    assert spread["highest"] < 0.85 * spread[None]


class Three(nn.Module):
    """Query, key and value as attention makes them, together or one by one."""

    config: object
    together: bool
    read: int | None = None

    @nn.compact
    def __call__(self, x):
        config = self.config
        query, key, value = (
            Projection(config, (48, 4, 12), (None,) * 3, use_bias=bias, name=name)
            for name, bias in (("query", True), ("key", config.key_bias), ("value", True))
        )
        if not self.together:
            return [query(x[:, : self.read]), key(x), value(x)]
        if self.read is None:
            return project_together(x, (query, key, value))
        return [query(x[:, : self.read]), *project_together(x, (key, value))]


@pytest.mark.parametrize("read", [None, 1])
@pytest.mark.parametrize(("case", "key_bias"), [("vivit cls", True), ("mae cls", False)])
def test_projections_together_are_the_projections(case, key_bias, read, monkeypatch):
    monkeypatch.setattr(linear, "platform", lambda: "gpu")
    config = config_of(case)
    assert config.key_bias == key_bias
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 48)).astype(np.float32)
    model = Three(config, together=False, read=read)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), x))
    assert ("bias" in params["params"]["key"]) == key_bias
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, params)
    cotangents = [draw(y) for y in jax.eval_shape(model.apply, params, x)]

    def run(together):
        apply = Three(config, together, read).apply
        outputs, pullback = jax.vjp(apply, params, x)
        return outputs, pullback(list(cotangents))

    ours, separate = run(True), run(False)
    assert jax.tree.structure(ours) == jax.tree.structure(separate)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(separate), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)  # measured 1.6e-5, of the gradient to x


def products_in(jaxpr) -> int:
    found = 0
    for eqn in jaxpr.eqns:
        found += eqn.primitive.name == "dot_general"
        found += sum(map(products_in, jax.extend.core.jaxprs_in_params(eqn.params)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "saved"),
    # In each scanned block two products of three; of ViViT's class token, asked alone, one of two.
    mostly_slow([("vivit cls", 2 + 1), ("mae pretraining", 2 + 2)], ("vivit cls", 2 + 1)),
)
def test_a_model_with_projections_together_is_the_same_model(case, saved, monkeypatch):
    config = config_of(case, attention="xla")
    family = VivitForVideoClassification if case == "vivit cls" else VideoMAEForPreTraining
    model, x = family(config), clip(config)
    inputs = {"labels": np.array([1, 3])}
    if case == "mae pretraining":
        inputs = {"mask": Mask.from_bool(bool_mask(config))}
    params = random_params(model)

    def run(place):
        monkeypatch.setattr(linear, "platform", lambda: place)

        def loss(params):
            out = model.apply({"params": params}, x, **inputs)
            return out.loss, out.logits

        with jax.default_matmul_precision(None):  # on CPU "highest" cuts products into blocks
            forward = jax.make_jaxpr(loss)(params).jaxpr
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, logits), gradients = step(params)
        return products_in(forward), value, logits, gradients

    together, separate = run("gpu"), run("cpu")
    assert separate[0] - together[0] == saved
    assert abs(together[1] - separate[1]) < 1e-5 * abs(separate[1])
    assert_close(together[2], separate[2], "logits")
    for a, b in zip(*map(jax.tree.leaves, (together[3], separate[3])), strict=True):
        assert_close(a, b, "gradient")


def gelu_and_slope(x):
    """In float64; erfc, since 1 + erf would lose the lower tail."""
    cumulative = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return x * cumulative, cumulative + x * density


POINTS = np.concatenate([np.linspace(-12, 12, 4801), [-1e4, -300, -40, -0.0, 1e-30, 40, 1e4]])


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_exact_gelu(framework):
    """Errors per size of x, the same for PyTorch: 0.5 + 0.5 erf is rounded at the size of 1."""
    x = POINTS.astype(np.float32)
    if framework == "jax":
        value = jax.jit(exact_gelu)(x)
        slope = jax.jit(jax.vmap(jax.grad(exact_gelu)))(x)
    else:
        import torch

        leaf = torch.tensor(x, requires_grad=True)
        value = torch.nn.functional.gelu(leaf)
        value.sum().backward()
        value, slope = value.detach().numpy(), leaf.grad.numpy()
    exact, exact_slope = gelu_and_slope(x.astype(np.float64))
    size = np.maximum(1, np.abs(x))
    assert (np.abs(value - exact) / size).max() < 3e-7  # measured 1.8e-7, PyTorch 1.1e-7
    assert np.abs(slope - exact_slope).max() < 4e-7  # measured 1.2e-7, PyTorch 2.2e-7
    np.testing.assert_array_equal(np.asarray(value)[x <= -40], 0)
    np.testing.assert_array_equal(np.asarray(value)[x >= 40], x[x >= 40])


def activation_errors(name, dtype, function):
    """Root mean squares of our error and of PyTorch's over half precision's numbers in [-8, 8]."""
    import torch
    from transformers.activations import ACT2FN

    half = getattr(torch, dtype)
    x = torch.linspace(-8, 8, 20001).to(half)
    reference = getattr(torch.nn.functional, name, None) if name == "selu" else ACT2FN[name]
    exact, theirs = (reference(x.to(kind)).double().numpy() for kind in (torch.float64, half))
    ours = np.asarray(jax.jit(function)(jnp.asarray(x.float().numpy(), dtype)), np.float64)
    below = x.double().numpy() < -1.5
    rms = lambda y, where: np.sqrt(np.mean((y - exact)[where] ** 2))  # noqa: E731
    return [(rms(ours, where), rms(theirs, where)) for where in (below, ~below)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", linear.ACTIVATIONS)
def test_activations_in_half_precision_are_rounded_once(name, dtype):
    function = lambda y: linear.rounded_once(y, None, y.dtype, linear.ACTIVATIONS[name])  # noqa: E731
    for ours, theirs in activation_errors(name, dtype, function):
        assert ours <= 1.1 * theirs + 1e-12


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_rounding_each_operation_of_an_activation_is_seen(name):
    errors = activation_errors(name, "bfloat16", linear.ACTIVATIONS[name])
    assert any(ours > 1.1 * theirs for ours, theirs in errors)


@pytest.mark.parametrize("place", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_backward_pass_keeps_half_precision(place, dtype, monkeypatch):
    """Nothing of the MLP's width in float32, and no product of float32."""
    monkeypatch.setattr(linear, "platform", lambda: place)
    config = config_of("mae cls", dtype=dtype, remat="none", scan_layers=False)
    layer = Projection(config, (48, 80), ("embed", "mlp"))
    x = jnp.zeros((2, 5, 48), dtype)
    params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    run = lambda params, x: layer.apply(params, x, "gelu")  # noqa: E731
    _, pullback = jax.vjp(run, params, x)
    kept = {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(pullback)}
    assert ((2, 5, 80), dtype) in kept
    assert not [shape for shape, kind in kept if kind == "float32" and 80 in shape[1:]]
    step = jax.make_jaxpr(lambda *args: jax.vjp(run, *args)[1](jnp.ones((2, 5, 80), dtype)))
    found = operand_types(step(params, x).jaxpr)
    assert len(found) >= 3 and set(found) == {(dtype, dtype)}


def operand_types(jaxpr) -> list[tuple[str, str]]:
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(tuple(x.aval.dtype.name for x in eqn.invars))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += operand_types(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.slow
def test_only_projections_are_rounded_beforehand():
    """So that a step with rounded params is the step, in half precision and to the bit."""
    config = config_of("mae pretraining", dtype="bfloat16", layer_scale_init=0.5)
    model, x = VideoMAEForPreTraining(config), clip(config)
    mask, params = Mask.from_bool(bool_mask(config)), random_params(model)
    rounded = projections_in(params, config.dtype)
    kinds = {path: leaf.dtype.name for path, leaf in param_tree.flatten(rounded).items()}
    half = {path for path, dtype in kinds.items() if dtype == "bfloat16"}
    assert half == {
        path
        for path in kinds
        if path.endswith("/kernel") or (path.endswith("/bias") and "/ln_" not in path)
    }
    assert {kinds[path] for path in kinds.keys() - half} == {"float32"}

    @jax.jit
    def step(params):
        loss = lambda params: model.apply({"params": params}, x, mask).loss  # noqa: E731
        return jax.value_and_grad(loss)(params)

    (one, gradients), (other, rounded_gradients) = step(params), step(rounded)
    assert one == other
    for a, b in zip(*map(jax.tree.leaves, (gradients, rounded_gradients)), strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))
    jax.tree.map(np.testing.assert_array_equal, projections_in(params, "float32"), params)


@pytest.mark.parametrize("place", ["tpu", "gpu", "cpu"])
def test_an_activation_is_not_computed_within_the_next_product(place, monkeypatch):
    """Of blocks that keep nothing, on TPU: behind a barrier forward, of which no gradient knows."""
    monkeypatch.setattr(linear, "platform", lambda: place)

    def barriers(remat):
        config = config_of("vivit cls", remat=remat)
        mlp = Projection(config, (48, 80), (None, None), name="mlp_in")
        x = np.random.default_rng(0).standard_normal((2, 7, 48)).astype(np.float32)
        params = mlp.init(jax.random.key(0), x)
        apply = lambda params: mlp.apply(params, x, "gelu").sum()  # noqa: E731
        np.testing.assert_array_equal(
            mlp.apply(params, x, "gelu"), linear.exact_gelu(mlp.apply(params, x))
        )
        return str(jax.make_jaxpr(jax.grad(apply))(params)).count("optimization_barrier")

    assert barriers("block") == (place == "tpu")
    assert barriers("dots") == 0
