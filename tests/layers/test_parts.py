# SPDX-License-Identifier: Apache-2.0
"""Kernels in parts on several devices: gathered for a product, their gradients scattered."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from vivit_jax.layers.linear import product
from vivit_jax.layers.parts import with_whole_kernels
from vivit_jax.train.sharding import BATCH, RULES, make_mesh, parse_mesh

# Logical axes and shape of a kernel, how many of its axes are summed over.
KERNELS = {
    "query": (("embed", "heads", "kv"), (32, 2, 4), 1),
    "out": (("heads", "kv", "embed"), (2, 16, 24), 2),
    "mlp_in": (("embed", "mlp"), (32, 48), 1),
}
CLIPS = 8


def case(name, sizes):
    """A mesh, the operands on it, and the gradient of a loss of the product to both."""
    axes, shape, num_in = KERNELS[name]
    rng = np.random.default_rng(0)
    mesh = make_mesh(parse_mesh(sizes, 8))
    spec = nn.logical_to_mesh_axes(axes, RULES)
    x = rng.standard_normal((CLIPS, 3, *shape[:num_in])).astype(np.float32)
    kernel = rng.standard_normal(shape).astype(np.float32)
    goal = rng.standard_normal((CLIPS, 3, *shape[num_in:])).astype(np.float32)
    summed = (None if axis == "fsdp" else axis for axis in spec[:num_in])
    places = [NamedSharding(mesh, each) for each in (PartitionSpec(BATCH, None, *summed), spec)]
    of_two = partial(product, num_in=num_in)

    def loss(x, kernel, way):
        return jnp.sum((way(of_two, x, [kernel], axes, num_in)[0] - goal) ** 2)

    gradient = jax.value_and_grad(loss, argnums=(0, 1))
    return mesh, gradient, places, (x, kernel)


def plain(function, x, kernels, axes, num_in):
    return [function(x, kernel) for kernel in kernels]


@pytest.mark.parametrize("sizes", ["fsdp=8", "data=2,fsdp=2,tensor=2", "data=8", "data=4,tensor=2"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_product_is_that_of_one_device(name, sizes):
    mesh, gradient, places, operands = case(name, sizes)
    expected = jax.jit(lambda *args: gradient(*args, plain))(*operands)
    step = jax.jit(
        lambda *args: gradient(*args, with_whole_kernels),
        in_shardings=places,
        out_shardings=(None, tuple(places)),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        placed = [jax.device_put(x, place) for x, place in zip(operands, places, strict=True)]
        found = step(*placed)
        jaxpr = str(jax.make_jaxpr(lambda *args: gradient(*args, with_whole_kernels))(*placed))
        text = step.lower(*placed).compile().as_text()
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        # Measured 0.02, of gradients up to 39,000.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    split = "fsdp" in sizes
    assert jaxpr.count(" all_gather[") == jaxpr.count(" reduce_scatter[") == split
    if split:  # one way each, and nothing but a part goes over "data"
        shape = KERNELS[name][1]
        moved = re.findall(r" = f32\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-reduce)\(", text)
        sizes_of = lambda kind: [  # noqa: E731
            np.prod([int(n) for n in dims.split(",") if n]) for dims, each in moved if each == kind
        ]
        tensor = mesh.shape["tensor"]
        assert sizes_of("all-gather") == [np.prod(shape) / tensor]
        assert sizes_of("reduce-scatter") == [np.prod(shape) / tensor / mesh.shape["fsdp"]]
        assert max(sizes_of("all-reduce")) <= np.prod(shape) / tensor / mesh.shape["fsdp"]


@pytest.mark.parametrize("clips", [1, 6])
def test_clips_that_do_not_divide_are_the_partitioners(clips):
    mesh, gradient, places, (x, kernel) = case("mlp_in", "fsdp=8")
    axes, *_ = KERNELS["mlp_in"]
    x = np.resize(x, (clips, *x.shape[1:]))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        placed = jax.device_put(kernel, places[1])
        found = jax.jit(lambda x, k: with_whole_kernels(product, x, [k], axes)[0])(x, placed)
    np.testing.assert_allclose(found, x @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "own_rules"),
    [
        ((36, 48), RULES),  # the parts do not divide
        ((32, 45), RULES),  # what stays split does not
        ((32, 48), (("batch", BATCH), ("embed", ("fsdp", "tensor")))),  # clips are in fewer parts
        ((32, 48), (("batch", BATCH), ("embed", ("tensor", "fsdp")))),
    ],
)
def test_kernels_that_rules_do_not_split_so_are_the_partitioners(shape, own_rules):
    """As another's rules, that have no `param_shardings` to refuse a model, may say."""
    rng = np.random.default_rng(0)
    mesh = make_mesh(parse_mesh("fsdp=4,tensor=2" if shape != (36, 48) else "fsdp=8", 8))
    x, kernel = (
        rng.standard_normal(each).astype(np.float32) for each in ((CLIPS, shape[0]), shape)
    )
    axes, *_ = KERNELS["mlp_in"]
    loss = lambda way: lambda x, k: jnp.sum(way(product, x, [k], axes, 1)[0] ** 2)  # noqa: E731
    expected = jax.grad(loss(plain), argnums=(0, 1))(x, kernel)
    with jax.set_mesh(mesh), nn.logical_axis_rules(own_rules):
        found = jax.jit(jax.grad(loss(with_whole_kernels), argnums=(0, 1)))(x, kernel)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-3)


def test_without_rules_or_a_mesh_it_is_the_product():
    _, _, _, (x, kernel) = case("mlp_in", "fsdp=8")
    axes, *_ = KERNELS["mlp_in"]
    jaxpr = jax.make_jaxpr(lambda x, k: with_whole_kernels(product, x, [k], axes)[0])(x, kernel)
    assert "shard_map" not in str(jaxpr)
    mesh = make_mesh(parse_mesh("fsdp=8", 8))
    with jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(lambda x, k: with_whole_kernels(product, x, [k], axes)[0])(x, kernel)
    assert "shard_map" not in str(jaxpr)


def test_gradients_to_x_are_added_up_before_they_are_sent():
    """Of three products over the heads of several devices; else each sends its own."""
    mesh, _, places, (x, kernel) = case("query", "fsdp=4,tensor=2")
    axes, *_ = KERNELS["query"]
    kernels = [kernel, 2 * kernel, 3 * kernel]

    def loss(x, kernels):
        return sum(jnp.sum(y**2) for y in with_whole_kernels(product, x, kernels, axes))

    gradient = jax.grad(loss)
    expected = gradient(x, kernels)
    step = jax.jit(gradient, in_shardings=(places[0], places[1]), out_shardings=places[0])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        np.testing.assert_allclose(step(x, kernels), expected, rtol=1e-4)
        text = step.lower(x, kernels).compile().as_text()
    assert len(re.findall(r" all-reduce\(", text)) == 1
    assert len(re.findall(r" all-gather\(", text)) == 3
