# SPDX-License-Identifier: Apache-2.0
"""Attention on meshes of every kind: the compiled program gathers nothing and does nothing twice.

Each device has one clip and two heads, so that four devices and eight must run the same loops over
the same tiles.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_in_float64 import cotangent, largest_errors, plain, qkv, reference
from compiled_programs import collectives, largest, rounds
from flax import linen as nn
from helpers import mostly_slow
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vivit_jax.layers.attention import attention
from vivit_jax.layers.axes import RULES
from vivit_jax.layers.chunked import TILES, Tile
from vivit_jax.layers.placed import placed_attention

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
LENGTH = 101  # two blocks of a head's queries with the tile below
OWN_RULES = (("batch", "x"), ("heads", "y"))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(TILES, "cpu", Tile(64, 128, 2**14))


@dataclasses.dataclass(frozen=True)
class Context:
    """A mesh by its axes, the first as long as it takes, and how a program gets it."""

    clips: tuple[str, ...]
    heads: str | None = None
    types: tuple = (AUTO,)  # of the axes in order, the last of all that follow
    mesh_is_set: bool = True
    rules: tuple | None = None
    manual: tuple[str, ...] = ()  # the axes of a shard_map around
    known: bool = True  # whether the program can know the axes while it is traced

    def mesh(self, devices: int):
        names = (*self.clips, *((self.heads,) if self.heads else ()))
        sizes = (devices // 2 ** (len(names) - 1), *(2,) * (len(names) - 1))
        types = (*self.types, *self.types[-1:] * len(names))[: len(names)]
        return jax.make_mesh(sizes, names, axis_types=types, devices=jax.devices()[:devices])

    def spec(self, axes=None):
        here = lambda name: name if axes is None or name in axes else None  # noqa: E731
        clips = tuple(name for name in self.clips if here(name))
        return PartitionSpec(clips or None, None, here(self.heads))

    def shape(self, mesh) -> dict[str, int]:
        clips = math.prod(mesh.shape[name] for name in self.clips)
        return dict(batch=clips, heads=2 * (mesh.shape[self.heads] if self.heads else 1))

    @contextlib.contextmanager
    def told(self, mesh):
        with contextlib.ExitStack() as stack:
            if self.mesh_is_set:
                stack.enter_context(jax.set_mesh(mesh))
            if self.rules:
                stack.enter_context(nn.logical_axis_rules(self.rules))
            yield

    def around(self, function: Callable, mesh) -> Callable:
        """The function, in a shard_map over the manual axes if there are some."""
        if not self.manual:
            return lambda *operands: function(*operands)  # so that nothing is traced before
        spec, names = self.spec(self.manual), frozenset(self.manual)
        return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names)


OURS = dict(clips=("data",), heads="tensor")
THEIRS = dict(clips=("x",), heads="y")
CONTEXTS = {
    "data": Context(("data",)),
    "fsdp": Context(("fsdp",)),
    "data and fsdp, our rules": Context(("data", "fsdp"), rules=RULES),
    "tensor": Context((), "tensor"),
    "data and tensor": Context(**OURS),
    "data and tensor, our rules": Context(**OURS, rules=RULES),
    "data and tensor, explicit": Context(**OURS, types=(EXPLICIT,)),
    "other names": Context(**THEIRS, known=False),
    "other names, clips only": Context(("x",), known=False),
    "other names, with rules": Context(**THEIRS, rules=OWN_RULES),
    "other names, no mesh set": Context(**THEIRS, mesh_is_set=False, known=False),
    "other names, explicit": Context(**THEIRS, types=(EXPLICIT,)),
    "other names, explicit, no mesh set": Context(**THEIRS, types=(EXPLICIT,), mesh_is_set=False),
    "one axis explicit": Context(**THEIRS, types=(EXPLICIT, AUTO), known=False),
    "one axis explicit, with rules": Context(**THEIRS, types=(EXPLICIT, AUTO), rules=OWN_RULES),
    "all axes manual": Context(**THEIRS, manual=("x", "y")),
    "all axes manual, our names": Context(**OURS, manual=("data", "tensor")),
    "one axis manual": Context(**THEIRS, manual=("x",), known=False),
    "one axis manual, with rules": Context(**THEIRS, manual=("x",), rules=OWN_RULES),
    "one axis manual, our names": Context(**OURS, manual=("data",)),
}
QUICK = ("data and tensor, our rules", "other names, explicit")


def both_passes(q, k, v, d_out, implementation="chunked", attend=attention):
    """Output and the three gradients."""
    out, pullback = jax.vjp(functools.partial(attend, implementation=implementation), q, k, v)
    return out, *pullback(d_out)


def operands(context, mesh, length=LENGTH, dtype=np.float32):
    """q, k, v and a cotangent, in numpy."""
    q, k, v = qkv(length, width=16, dtype=dtype, **context.shape(mesh))
    return q, k, v, cotangent(q)


def on(context, mesh, values):
    return jax.device_put(values, NamedSharding(mesh, context.spec()))


def compiled(context, devices, implementation="chunked", function=both_passes):
    """A context's mesh of so many devices, the program, its operands in numpy, its results."""
    mesh = context.mesh(devices)
    values = operands(context, mesh)
    function = functools.partial(function, implementation=implementation)
    with context.told(mesh):
        placed = on(context, mesh, values)
        program = jax.jit(context.around(function, mesh)).lower(*placed).compile()
        return mesh, program, values, program(*placed)


@pytest.mark.parametrize("name", mostly_slow(CONTEXTS, *QUICK))
def test_tiles_on_a_mesh_gather_nothing_and_do_not_grow(name):
    context = CONTEXTS[name]
    mesh, program, values, found = compiled(context, 8)
    assert collectives(program, mesh) == []
    output, gradient = largest_errors(found, reference(*values))
    assert output < 1e-6 and gradient < 2e-6  # measured 5.6e-7 and 7.5e-7
    small_mesh, small, *_ = compiled(context, 4)
    assert rounds(program, mesh) == rounds(small, small_mesh) != []
    assert largest(program, mesh) == largest(small, small_mesh)
    if context.known:  # the program of one device with that share
        share = [x[:1, :, :2] for x in values]
        one = jax.jit(functools.partial(both_passes)).lower(*share).compile()
        alone = jax.make_mesh((1,), ("one",), devices=jax.devices()[:1])
        assert rounds(program, mesh) == rounds(one, alone)


@pytest.mark.parametrize("name", mostly_slow(CONTEXTS, "data and tensor", "other names, explicit"))
def test_the_library_on_a_mesh_gathers_nothing(name):
    mesh, program, values, found = compiled(CONTEXTS[name], 8, "xla")
    assert collectives(program, mesh) == []
    output, gradient = largest_errors(found, reference(*values))
    assert output < 2e-6 and gradient < 2e-6  # measured 7.1e-7 and 6.3e-7
    small_mesh, small, *_ = compiled(CONTEXTS[name], 4, "xla")
    assert largest(program, mesh) == largest(small, small_mesh)


def test_a_loop_over_heads_would_be_seen():
    """What tiles were on a mesh: a loop over what is split, which gathers it in every round."""
    context = CONTEXTS["data and tensor"]

    def by_head(q, k, v, d_out, implementation):
        heads = [jnp.moveaxis(x, 2, 1).reshape(-1, 1, LENGTH, 1, 16) for x in (q, k, v)]
        return jax.lax.map(lambda head: plain(*head), heads)

    mesh, program, *_ = compiled(context, 8, function=by_head)
    small_mesh, small, *_ = compiled(context, 4, function=by_head)
    assert "all-gather" in collectives(program, mesh)
    assert rounds(program, mesh) != rounds(small, small_mesh)


TYPES = {  # the largest errors that output and gradients may have
    "float16": (1.2e-3, 2e-3),  # measured 4.1e-4 and 6.2e-4
    "bfloat16": (8e-3, 1.2e-2),  # measured 3.3e-3 and 4.8e-3
    "float64": (5e-15, 4e-15),  # measured 1.6e-15 and 1.1e-15
}


@pytest.mark.parametrize(
    ("dtype", "name"),
    mostly_slow(
        itertools.product(TYPES, ("data and tensor, our rules", "other names")),
        ("float16", "other names"),
        ("bfloat16", "data and tensor, our rules"),
        ("float64", "other names"),
    ),
)
def test_other_types_on_a_mesh(dtype, name):
    context, (allowed, allowed_gradient) = CONTEXTS[name], TYPES[dtype]
    mesh = context.mesh(8)
    with jax.enable_x64(dtype == "float64"), context.told(mesh):
        values = [x.astype(dtype) for x in operands(context, mesh, dtype=np.float64)]
        found = jax.jit(lambda *x: both_passes(*x))(*on(context, mesh, values))
        assert {x.dtype for x in found} == {jnp.dtype(dtype)}
        output, gradient = largest_errors(found, reference(*values))
    assert output < allowed and gradient < allowed_gradient


@pytest.mark.parametrize(
    "name",
    mostly_slow(["data and tensor", "other names", "other names, explicit"], "data and tensor"),
)
def test_without_jit(name):
    context = CONTEXTS[name]
    mesh = context.mesh(8)
    values = operands(context, mesh)
    with context.told(mesh):
        found = both_passes(*on(context, mesh, values))
    assert all(len(x.sharding.device_set) == 8 for x in found)
    output, gradient = largest_errors(found, reference(*values))
    assert output < 1e-6 and gradient < 2e-6


@pytest.mark.parametrize("implementation", ["chunked", "xla"])
def test_operands_whose_types_differ(implementation):
    """Clips and heads are split as queries are, tokens and what is in a head by nothing."""
    mesh = CONTEXTS["other names, explicit"].mesh(8)
    values = qkv(36, batch=4, heads=4, width=16, dtype=np.float32)
    values = *values, cotangent(values[0])
    specs = ("x", "y"), ("y", None, None, "x"), (None, "x"), (None, None, "y")
    places = tuple(NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs)

    def attend(*inputs, implementation):
        out = attention(*inputs, implementation=implementation)
        assert jax.typeof(out).sharding.spec == PartitionSpec("x", None, None, None)
        return jax.reshard(out, places[-1])

    with jax.set_mesh(mesh):
        placed = jax.device_put(values, places)
        found = jax.jit(lambda *x: both_passes(*x, implementation, attend))(*placed)
    output, gradient = largest_errors(found, reference(*values))
    assert output < 2e-6 and gradient < 2e-6  # measured 6.0e-7 and 5.3e-7
    assert [jax.typeof(x) for x in found[1:]] == [jax.typeof(x) for x in placed[:3]]


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["data", "data and fsdp, our rules", "other names, clips only"], "other names, clips only"
    ),
)
def test_mapped_over_clips_on_a_mesh(name):
    """No device sees that a function of one clip has been mapped over those that the mesh split."""
    context = CONTEXTS[name]

    def by_clip(*operands, implementation):
        alone = functools.partial(both_passes, implementation=implementation)
        found = jax.vmap(alone)(*(x[:, None] for x in operands))
        return jax.tree.map(lambda x: x[:, 0], found)

    mesh, program, values, found = compiled(context, 8, function=by_clip)
    assert collectives(program, mesh) == []
    output, gradient = largest_errors(found, reference(*values))
    assert output < 1e-6 and gradient < 2e-6


@pytest.mark.parametrize("axes", [(0, 0, 0), (1, 1, 1), (0, None, None)])
def test_mapped_on_one_device(axes):
    q, k, v = qkv(33, batch=2)
    several = [
        np.stack([x, 2 * x, -x], a) if a is not None else x
        for x, a in zip((q, k, v), axes, strict=True)
    ]
    found = jax.vmap(placed_attention, axes)(*several)
    for i, factor in enumerate((1, 2, -1)):
        one = [x if a is None else factor * x for x, a in zip((q, k, v), axes, strict=True)]
        np.testing.assert_allclose(found[i], reference(*one), atol=1e-5)  # measured 3.3e-6


@pytest.mark.parametrize("name", mostly_slow(["data and tensor", "other names"], "other names"))
def test_made_again_for_the_gradient(name):
    context = CONTEXTS[name]

    def again(*operands, implementation):
        attend = jax.checkpoint(
            functools.partial(attention, implementation=implementation),
            policy=jax.checkpoint_policies.nothing_saveable,
        )
        return both_passes(*operands, attend=lambda *x, implementation: attend(*x))

    mesh, program, values, found = compiled(context, 8, function=again)
    assert collectives(program, mesh) == []
    output, gradient = largest_errors(found, reference(*values))
    assert output < 1e-6 and gradient < 2e-6


@pytest.mark.parametrize("name", mostly_slow(["data and tensor", "other names"], "other names"))
def test_an_exported_program_is_split_as_well(name):
    context = CONTEXTS[name]
    mesh = context.mesh(8)
    values = operands(context, mesh)
    placed = on(context, mesh, values)
    with context.told(mesh):
        exported = jax.export.export(jax.jit(lambda *x: both_passes(*x)))(*placed)
        run = jax.jit(jax.export.deserialize(exported.serialize()).call)
        program = run.lower(*placed).compile()
        found = program(*placed)
    assert exported.nr_devices == 8
    assert collectives(program, mesh) == []
    output, gradient = largest_errors(found, reference(*values))
    assert output < 1e-6 and gradient < 2e-6


def test_second_derivative_on_a_mesh():
    context = CONTEXTS["other names, with rules"]
    mesh = context.mesh(8)
    inputs = operands(context, mesh, 33, np.float64)[:3]

    def second(attend):
        first = jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))
        bent = lambda *x: sum(jnp.sum(jnp.sin(3 * g)) for g in first(*x))  # noqa: E731
        return jax.jit(jax.grad(bent, argnums=(0, 1, 2)))

    with context.told(mesh):
        ours = second(placed_attention)(*on(context, mesh, [x.astype("float32") for x in inputs]))
    with jax.enable_x64(True):
        exact = second(plain)(*map(jnp.asarray, inputs))
    for a, b in zip(ours, exact, strict=True):
        assert np.abs(b).max() > 1
        np.testing.assert_allclose(a, b, atol=4e-5)  # measured 1.3e-5


def test_keys_that_vary_less_than_queries_in_a_shard_map():
    """Their gradients are the sums over the devices that share them."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AUTO,))
    q, k, v = qkv(33, batch=8)
    k, v, d_out = k[:1], v[:1], cotangent(q)
    spec = PartitionSpec("x")

    def loss(q, k, v, d_out):
        same = functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(spec, PartitionSpec(), PartitionSpec())
        )
        out = same(placed_attention, out_specs=spec)(q, k, v)
        return jnp.sum(out * d_out)

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v, d_out)
    every = [np.repeat(x, 8, 0) for x in (k, v)]
    _, d_q, d_k, d_v = reference(q, *every, d_out)
    exact = d_q, d_k.sum(0, keepdims=True), d_v.sum(0, keepdims=True)
    for a, b in zip(found, exact, strict=True):
        np.testing.assert_allclose(a, b, atol=4e-6)  # measured 8.4e-7
