# SPDX-License-Identifier: Apache-2.0
"""The attention layer of every variant on a mesh: what moves are sums of its projections only."""

import jax
import numpy as np
import pytest
from compiled_programs import collectives
from flax import linen as nn
from flax.core import meta
from helpers import mostly_slow
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import VIDEOMAE, VIVIT

from vivit_jax import VideoMAEConfig, VivitConfig
from vivit_jax.layers.attention import SPACE, SPLIT_HEADS, TIME, SelfAttention
from vivit_jax.layers.axes import AXES, RULES

HEADS = 12
SIZES = dict(hidden_size=96, num_attention_heads=HEADS)
# Along which axis, its input's tokens, what its configuration adds, whether a head mask is given.
LAYERS = {
    "all tokens": (SPACE, (14,), {}, False),
    "space": (SPACE, (3, 7), {}, False),
    "time": (TIME, (3, 7), {}, False),
    "halves": (SPLIT_HEADS, (3, 7), {}, False),
    "halves by XLA": (SPLIT_HEADS, (3, 7), dict(attention="xla"), False),
    "by XLA": (TIME, (3, 7), dict(attention="xla"), False),
    "cosine": (SPACE, (14,), dict(cosine_attention=True), False),
    "weights": (SPACE, (14,), {}, True),
    "weights over time": (TIME, (3, 7), {}, True),
}
MESHES = {
    "data": (8, 1, 1),
    "fsdp": (2, 4, 1),
    "tensor in 2": (4, 1, 2),
    "tensor in 3": (2, 1, 3),  # the device in the middle has heads of both halves
    "tensor in 4": (1, 2, 4),
    "tensor in 6": (1, 1, 6),
}
QUICK = [("halves", "tensor in 2"), ("time", "tensor in 2")]
CASES = [(layer, mesh) for layer in LAYERS for mesh in MESHES]


def layer_of(name):
    along, tokens, changes, masked = LAYERS[name]
    cosine = "cosine_attention" in changes
    family, values = (VideoMAEConfig, VIDEOMAE) if cosine else (VivitConfig, VIVIT)
    module = SelfAttention(family(**values | SIZES | changes), along)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, *tokens, SIZES["hidden_size"])).astype("float32")
    mask = np.linspace(0, 2, HEADS, dtype="float32") if masked else None

    def out(params, x):
        return module.apply({"params": params}, x, mask, False)[0]

    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), x, mask, False))["params"]
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype("float32") / 8  # noqa: E731
    return out, boxed, jax.tree.map(draw, meta.unbox(boxed)), x


@pytest.mark.parametrize(("layer", "mesh"), mostly_slow(CASES, *QUICK))
def test_only_sums_of_projections_move(layer, mesh):
    out, boxed, params, x = layer_of(layer)
    sizes = MESHES[mesh]
    devices = jax.devices()[: int(np.prod(sizes))]
    axes = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), axes, RULES)
    place = NamedSharding(axes, PartitionSpec(("data", "fsdp")))
    both = lambda params, x: (out(params, x), jax.vjp(lambda x: out(params, x), x)[1](x)[0])  # noqa: E731
    exact = jax.jit(both)(params, x)
    with jax.set_mesh(axes), nn.logical_axis_rules(RULES):
        placed = jax.device_put(params, shardings), jax.device_put(x, place)
        forward = jax.jit(lambda *a: out(*a)).lower(*placed).compile()
        program = jax.jit(lambda *a: both(*a)).lower(*placed).compile()
        found = program(*placed)
    # That of the heads' outputs; backward also of the gradients through q, k and v.
    sums = ["all-reduce"] * (sizes[2] > 1)
    gathers = ["all-gather"] * 5 * (sizes[1] > 1)  # four kernels and a bias lie along "fsdp"
    assert collectives(forward, axes) == gathers + sums
    kinds = set(collectives(program, axes))
    assert kinds <= {*sums, *gathers}, kinds
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # measured 5.3e-6


@pytest.mark.parametrize("layer", mostly_slow(["halves", "halves by XLA"], "halves"))
@pytest.mark.parametrize("sizes", [(4, 2), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_halves_on_axes_of_which_nothing_is_known(layer, sizes):
    """Clips lie over one axis of another's mesh, heads over the other, and no rule says so."""
    out, boxed, params, x = layer_of(layer)
    axes = jax.make_mesh(sizes, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rules = [("heads", "b"), ("embed", None), ("kv", None)]
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), axes, rules)
    both = lambda params, x: (out(params, x), jax.vjp(lambda x: out(params, x), x)[1](x)[0])  # noqa: E731
    exact = jax.jit(both)(params, x)
    with jax.set_mesh(axes):
        place = NamedSharding(axes, PartitionSpec("a"))
        placed = jax.device_put(params, shardings), jax.device_put(x, place)
        program = jax.jit(lambda *a: both(*a)).lower(*placed).compile()
        found = program(*placed)
    assert set(collectives(program, axes)) == {"all-reduce"}
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # measured 5.3e-6


@pytest.mark.parametrize("checked", mostly_slow([True, False], True))
def test_gradient_of_halves_in_a_shard_map_over_clips(checked):
    """Heads of both halves lie over the axis that the shard_map around leaves."""
    out, _, params, x = layer_of("halves")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    clips = PartitionSpec("data")
    gradient = jax.grad(lambda x: (out(params, x) ** 2).sum())
    placed = jax.shard_map(
        gradient, mesh=mesh, in_specs=clips, out_specs=clips, axis_names={"data"}, check_vma=checked
    )
    # Measured 2.2e-5, of gradients up to 41.
    np.testing.assert_allclose(jax.jit(placed)(x), jax.jit(gradient)(x), atol=1e-4)
