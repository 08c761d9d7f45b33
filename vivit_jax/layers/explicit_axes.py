# SPDX-License-Identifier: Apache-2.0
"""Whole models on meshes with explicit axes, the default of `jax.make_mesh`.

There every array's type says over which axes it is split, and each operation must know its result's
type: an einops pattern that splits one axis and joins others does not, and flax's logical
constraints raise. So a model's `__call__` runs as if the axes were automatic. The splits of clips,
heads and MLP width become rules for flax's logical axes, by which attention and products are placed
as on any mesh; results get types again.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import lift
from flax.linen.transforms import lift_direct_transform
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vivit_jax.errors import UserError
from vivit_jax.layers.axes import names_in, rules_in_force

# The kernels whose types tell how a logical axis is split, and their axes from the right.
_KERNELS = {"query": ("embed", "heads", "kv"), "mlp_in": ("embed", "mlp")}


def as_automatic(call: Callable) -> Callable:
    """Let a model's `__call__` run on explicit mesh axes as on automatic ones.

    Clips are split as in the type of `pixel_values`, heads and MLP width as in those of kernels,
    which every attention layer then follows. In the results clips are split as in pixel_values and
    attention weights as heads are; sown values and fresh parameters are whole. UserError if clips
    are split along any axis but the first.
    """

    @functools.wraps(call)
    def on_any_mesh(self: nn.Module, pixel_values, *args, **kwargs):
        mesh = None if self.scope is None else _explicit_mesh(self.scope, pixel_values)
        if mesh is None:
            return call(self, pixel_values, *args, **kwargs)
        return_dict = kwargs.pop("return_dict", True)
        run = functools.partial(_on_automatic, mesh)
        out = lift_direct_transform(run, (call,), self, pixel_values, *args, **kwargs)
        return out if return_dict else out.to_tuple()

    return on_any_mesh


def _explicit_mesh(scope, pixel_values) -> AbstractMesh | None:
    """The mesh that is set, or that of the arrays, if it has explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        arrays = _arrays((pixel_values, scope.root.variables()))
        meshes = (jax.typeof(x).sharding.mesh for x in arrays)
        mesh = next((mesh for mesh in meshes if explicit_axes(mesh)), mesh)
    return mesh if explicit_axes(mesh) else None


def explicit_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """The names of a mesh's explicit axes."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)


def _on_automatic(mesh: AbstractMesh, call: Callable, scopes, *args, **kwargs):
    """`call` with flax's scopes and the arguments, all without types; results have types."""
    automatic = mesh.update_axis_types(dict.fromkeys(explicit_axes(mesh), AxisType.Auto))

    def inner(scope_fn, repack_fn, variables, rngs, pixel_values, *args, **kwargs):
        split = _split(pixel_values, variables)
        operands = (variables, rngs, pixel_values, args, kwargs)
        with jax.sharding.use_abstract_mesh(automatic), nn.logical_axis_rules(_rules(mesh, split)):
            operands = without_types(operands)
            variables, rngs, pixel_values, args, kwargs = operands
            scopes = scope_fn(variables, rngs)
            out = call(scopes, pixel_values, *args, **kwargs)
            variables = repack_fn(scopes)

        def whole(x):
            return _typed(x, mesh, ()) if isinstance(x, jax.Array) else x

        return _results(out, mesh, split), jax.tree.map(whole, variables)

    run = lift.pack(inner, (True,), (True,), (True,), name="as_automatic", enable_kwargs=True)
    return run(scopes, *args, **kwargs)


def _arrays(tree) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]


def without_types(tree: Any) -> Any:
    """The tree with its arrays typed for automatic axes instead of explicit ones.

    The mesh with automatic axes must be set. No array moves, and gradients get the old types.
    """

    def cast(x):
        typed = isinstance(x, jax.Array) and explicit_axes(jax.typeof(x).sharding.mesh)
        return jax.reshard(x, PartitionSpec()) if typed else x

    return jax.tree.map(cast, tree)


def _typed(x: jax.Array, mesh: AbstractMesh, axes) -> jax.Array:
    """x with its axes split over the given mesh axes where these divide them."""
    spec = [
        names if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None
        for names, size in zip(axes, x.shape, strict=False)
    ]
    return jax.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _results(out: Any, mesh: AbstractMesh, split: Mapping[str, tuple]) -> Any:
    """A model's output, its parts typed by their names."""
    clips, heads = split["batch"], split.get("heads", ())

    def typed(name, x):
        axes = (clips,)
        if name == "loss":
            axes = ()
        elif name.endswith("attentions"):
            axes = ((), clips, *((),) * (x.ndim - 5), heads)
        elif name.endswith("hidden_states") and isinstance(x, jax.Array):
            axes = ((), clips)  # all layers are one array; chosen layers are a tuple
        return jax.tree.map(lambda x: _typed(x, mesh, axes), x)

    return out.replace(**{name: typed(name, x) for name, x in vars(out).items() if x is not None})


def _split(pixel_values, variables) -> dict[str, tuple[str, ...]]:
    """The explicit mesh axes that split each logical axis, read from types."""
    found = {"batch": _clip_axes(pixel_values)}
    for path, x in jax.tree.leaves_with_path(variables):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-1:] != ["kernel"] or names[-2] not in _KERNELS:
            continue
        logical = _KERNELS[names[-2]]
        spec = jax.typeof(x).sharding.spec[-len(logical) :]
        for name, entry in zip(logical, spec, strict=True):
            # If width is split over axes that do not split clips, it is split in kernels only.
            if name != "embed" or set(names_in(entry)) <= set(found["batch"]):
                found[name] = found.get(name) or tuple(names_in(entry))
    return found


def _rules(mesh: AbstractMesh, split: Mapping[str, tuple]) -> list[tuple[str, Any]]:
    """The rules in force for automatic axes, and those read from types for explicit axes."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    rules = [
        (name, [axis for axis in names_in(axes) if types.get(axis) == AxisType.Auto])
        for name, axes in rules_in_force(mesh)
    ]
    rules += [(name, []) for name in split if name not in dict(rules)]
    return [(name, (*split.get(name, ()), *axes) or None) for name, axes in rules]


def _clip_axes(pixel_values) -> tuple[str, ...]:
    """The explicit axes that split clips; UserError if some split the inside of a clip."""
    for x in _arrays(pixel_values):
        spec = jax.typeof(x).sharding.spec
        first = [name for entry in spec[:1] for name in names_in(entry)]
        wrong = [name for entry in spec[1:] for name in names_in(entry)]
        if wrong:
            raise UserError(
                f"pixel_values of type {jax.typeof(x)} is split within clips, along axis "
                f"{wrong[0]!r} of the mesh, and a model takes whole clips: "
                f"jax.reshard(pixel_values, PartitionSpec({tuple(first) or None}))"
            )
        return tuple(first)
    return ()
