# SPDX-License-Identifier: Apache-2.0
"""Products with kernels split over devices: each kernel is gathered for one product at a time.

XLA's partitioner would find a program too, but a worse one, which depends on the surrounding
program: it gathers by all-reduces, twice the traffic, or passes parts around in rings, and sums
whole gradients on every device before each keeps its part. Written by hand it is one all-gather of
a kernel, in the type that it is multiplied in, and one reduce-scatter of its gradient.

Over all chips of a v5p slice of 4x4x4 libtpu 0.0.42.1 makes all-reduces of these as well. It does
not if "fsdp" takes only some of a slice's chips, as in data=4,fsdp=16.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.spmd import logical_to_mesh_axes
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Float

from vivit_jax.layers.axes import names_in
from vivit_jax.masking import AnyArray

SUMMED = "summed"  # checkpoint name: a remat policy keeps these sums, so as not to send them again


def with_whole_kernels(
    product: Callable[[AnyArray, AnyArray], jax.Array],
    x: Float[AnyArray, "b ..."],
    kernels: Sequence[Float[AnyArray, "*kernel"]],
    axes: tuple[str | None, ...],
    num_in: int = 1,
) -> list[Float[jax.Array, "b ..."]]:
    """[product(x, kernel) for kernel in kernels], over the last `num_in` axes of x.

    The kernels have one shape, with the logical `axes`; their first `num_in` axes are summed over.
    If the rules in force split one of the axes over mesh axes that also split clips, each device
    gathers the whole kernels and multiplies its own clips with them. Axes that the rules split
    over other mesh axes, heads and MLP width, stay split: sums over such an axis are added up over
    its devices.

    The products are left to the partitioner if kernels are not split, if something is split that
    does not divide, if a kernel is split over axes that do not all split clips, and inside a
    `shard_map`.
    """
    found = _split(x, kernels[0].shape, axes)
    if found is None:
        return [product(x, kernel) for kernel in kernels]
    clips, places, dim = found
    parts = places[dim]
    stay = [() if at == dim else tuple(names) for at, names in enumerate(places)]
    others = tuple(name for name in clips if name not in parts)
    summed = tuple(name for names in stay[:num_in] for name in names)
    spread = tuple(name for names in stay[num_in:] for name in names)

    def on_device(x, kernels):
        if spread:  # once, so that the gradients to x are added up before they are sent
            x = jax.lax.pcast(x, spread, to="varying")
        found = []
        for part in kernels:
            # Gathered along a new first axis, whatever the device's tiles, then moved back.
            part = jnp.moveaxis(part, dim, 0)
            if others:  # before gathering, so that gradients of parts are summed, not of wholes
                part = jax.lax.pcast(part, others, to="varying")
            whole = jax.lax.all_gather(part, parts, axis=0)
            whole = jnp.moveaxis(whole.reshape(-1, *whole.shape[2:]), 0, dim)
            y = product(x, whole)
            found.append(checkpoint_name(jax.lax.psum(y, summed), SUMMED) if summed else y)
        return found

    def spec(of_axes):
        between = (None,) * (x.ndim - 1 - num_in)
        return PartitionSpec(clips, *between, *(names or None for names in of_axes))

    return jax.shard_map(
        on_device,
        in_specs=(spec(stay[:num_in]), PartitionSpec(*(tuple(names) or None for names in places))),
        out_specs=spec(stay[num_in:]),
        axis_names={*clips, *(name for names in places for name in names)},
    )(x, list(kernels))


def _split(x, shape, axes) -> tuple[tuple[str, ...], list[tuple[str, ...]], int] | None:
    """(Mesh axes that split clips, mesh axes of each kernel axis, the kernel axis to gather)."""
    mesh = jax.sharding.get_abstract_mesh()
    rules = nn.get_logical_axis_rules()
    if mesh.empty or not rules or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    large = {name for name in mesh.axis_names if mesh.shape[name] > 1}
    clips, *places = (
        tuple(name for name in names_in(entry) if name in large)
        for names in (("batch",), axes)
        for entry in logical_to_mesh_axes(names, rules) or ()
    )
    parts = [dim for dim, names in enumerate(places) if set(names) & set(clips)]
    if len(parts) != 1 or not set(places[parts[0]]) <= set(clips):
        return None
    split = zip((x.shape[0], *shape), (clips, *places), strict=True)
    if any(size % math.prod(mesh.shape[name] for name in names) for size, names in split):
        return None
    return clips, places, parts[0]
