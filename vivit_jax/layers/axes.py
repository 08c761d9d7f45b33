# SPDX-License-Identifier: Apache-2.0
"""Which mesh axes split clips and heads: our table, and what can be known of other meshes.

Our meshes have three axes. Clips are split over "data" and "fsdp"; kernels, and the optimiser's
state of them, over "fsdp" along the model's width; parameters over "tensor" along heads and MLP
width.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
# The first rule whose mesh axes are still free in an array applies, so that activations, which have
# both a batch and a width, are split by clips.
RULES = (
    ("batch", BATCH),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    *((axis, None) for axis in ("frames", "length", "kv", "layers", "channels", "classes")),
    *((axis, None) for axis in ("pixels", "pooled", "embed")),
)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How queries [..., l, n, e] are split on the mesh they are traced on, as far as is known.

    `axes` are the mesh axes along which each device's share is known, none where nothing is known.
    `spec` says which axes they split; never tokens or the inside of a head. `typed` is the sharding
    that the arrays' types must have, None without explicit axes.
    """

    mesh: AbstractMesh
    axes: frozenset[str] = frozenset()
    spec: PartitionSpec = PartitionSpec()
    typed: NamedSharding | None = None

    @property
    def free(self) -> set[str]:
        """The axes of the mesh that no enclosing `shard_map` has taken."""
        return {name for name, _ in _free(self.mesh)}

    @property
    def inside_others(self) -> bool:
        """Whether an enclosing `shard_map` has taken some axes, but not all."""
        return 0 < len(self.free) < len(self.mesh.axis_names)

    @property
    def heads(self) -> tuple[str, ...]:
        """The axes that split heads."""
        return tuple(names_in(self.spec[-1])) if self.spec else ()

    def parts(self, names: Iterable[str]) -> int:
        """The number of parts that these axes split an array into."""
        return math.prod(self.mesh.shape[name] for name in names)

    def typed_alike(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """The arrays, with the sharding `typed` in their types."""
        if self.typed is None:
            return arrays
        return tuple(jax.reshard(x, self.typed) for x in arrays)

    def on_each(self, function: Callable, *, mentioned: bool = False, checked: bool = False):
        """The function, of arrays [..., l, n] or [..., l, n, e], applied to each device's share.

        If JAX differentiates it, give `mentioned`: a `shard_map` over the axes that split something
        and no others, over which JAX would sum gradients that are equal already. Or give `checked`,
        so that JAX knows by types what is equal; kernels do not state that.
        """
        names = frozenset(each for entry in self.spec for each in names_in(entry))
        names = names if mentioned else self.axes
        if not names:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=self.spec,
            out_specs=self.spec,
            # To take all axes, name none: axes that `jax.vmap` maps over are then left out.
            axis_names=frozenset() if names == self.free else names,
            check_vma=checked,
        )


def placement_of(q, leading: Sequence[str | None] | None) -> Placement:
    """The placement of q [..., l, n, e], whose leading axes have these logical names.

    Explicit mesh axes are read from q's type. Automatic ones are known if flax has rules for
    logical axes, or if the mesh has our axis names: "heads" and the leading axes are then split by
    the rules. A mesh axis that does not divide its array axis counts as unknown: the compiler may
    have split another axis along it, which `jax.vmap` hides. With `leading` None no automatic axis
    is known.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        mesh = jax.typeof(q).sharding.mesh
    explicit = {name for name, kind in _free(mesh) if kind == AxisType.Explicit}
    automatic = {name for name, kind in _free(mesh) if kind == AxisType.Auto}
    places = [*range(q.ndim - 3), q.ndim - 2]
    split: list[list[str]] = [[] for _ in range(q.ndim - 1)]
    typed, spec = None, PartitionSpec()
    if explicit:
        for at, entry in enumerate(jax.typeof(q).sharding.spec[: q.ndim - 1]):
            split[at] = names_in(entry) if at in places else []
        spec = PartitionSpec(*map(_entry, split))
        typed = NamedSharding(mesh, spec)
    wanted = None if leading is None else _wanted(mesh, [*leading, None, "heads"])
    if wanted is None:
        return Placement(mesh, frozenset(explicit), spec, typed)
    unknown = set()
    for at in places:
        for name in wanted[at]:
            if name not in automatic:
                continue  # split already, by the enclosing shard_map
            parts = math.prod(mesh.shape[each] for each in (name, *split[at]))
            if q.shape[at] % parts == 0:
                split[at].append(name)
            else:
                unknown.add(name)
    known = frozenset((explicit | automatic) - unknown)
    return Placement(mesh, known, PartitionSpec(*map(_entry, split)), typed)


def partitions(context: mlir.AxisContext) -> int:
    """The number of devices over which a partitioner splits the program lowered here."""
    if isinstance(context, mlir.SPMDAxisContext):
        sizes = dict(context.mesh.shape)
        count = 1
        for name in set(sizes) - set(context.manual_axes):
            count *= sizes[name]
        return count
    return context.num_devices


def _free(mesh: AbstractMesh) -> list[tuple[str, AxisType]]:
    """The axes that no enclosing `shard_map` has taken, with their types."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [(name, kind) for name, kind in types if kind != AxisType.Manual]


def _wanted(mesh: AbstractMesh, logical: Sequence[str | None]) -> list[list[str]] | None:
    """The mesh axes of each logical axis by the rules in force; None where there are none."""
    rules = rules_in_force(mesh)
    if not rules:
        return None
    return [names_in(entry) for entry in logical_to_mesh_axes(logical, rules) or ()]


def rules_in_force(mesh: AbstractMesh) -> Sequence[tuple[str, Any]]:
    """flax's rules for logical axes; without any, ours for clips and heads on meshes like ours."""
    rules = nn.get_logical_axis_rules()
    if not rules and set(mesh.axis_names) <= set(AXES):
        rules = [(name, _present(axes, mesh)) for name, axes in RULES if name in ("batch", "heads")]
    return rules


def _present(axes, mesh: AbstractMesh):
    """The axes that a rule names and a mesh has; None if there are none."""
    return tuple(name for name in names_in(axes) if name in mesh.axis_names) or None


def names_in(entry) -> list[str]:
    """The mesh axes in an entry of a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return []
    return [entry] if isinstance(entry, str) else list(entry)


def _entry(names: list[str]):
    return None if not names else names[0] if len(names) == 1 else tuple(names)
