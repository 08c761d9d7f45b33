# SPDX-License-Identifier: Apache-2.0
"""Products with kernels of which every device holds a part: gathered for one product at a time.

The partitioner of XLA would find a program too. It chooses by the program around: it gathers
through all-reduces, twice the wire, or passes parts around in rings, and adds up whole gradients on
every device before each keeps its part. Said by hand it is one all-gather of a kernel, in the type
that it is multiplied in, and one reduce-scatter of its gradient.

Over all chips of a v5p slice of 4x4x4 libtpu 0.0.42.1 makes all-reduces of these as well, whatever
is gathered. It does not where "fsdp" is some of a slice's chips, as in data=4,fsdp=16.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from vivit_jax.layers.axes import names_in

SUMMED = "summed"  # the name of what a remat policy keeps, so as not to send it again


def with_whole_kernels(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernels: Sequence[jax.Array],
    axes: tuple[str | None, ...],
    num_in: int = 1,
) -> list[jax.Array]:
    """[product(x, kernel) for kernel in kernels], over the last `num_in` axes of x [b, ...].

    The first `num_in` of the kernels are summed over; `axes` are the logical ones of each. Where
    the rules in force split one of them over mesh axes that split clips too, each device multiplies
    its own clips with the kernels that it has put together from all parts. What the rules split
    over other axes, heads and MLP width, stays split: products over such axes are added up over
    their devices. Where no part is held, or the rules split something that does not divide, or
    parts over axes that do not split clips, or within a `shard_map`, the products are the
    partitioner's business. The kernels have one shape.
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
            # Parts lie along a new first axis, whatever a device's tiles are, and are put back.
            part = jnp.moveaxis(part, dim, 0)
            if others:  # before the gathering, so that gradients of parts are what is added up
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
    """The mesh axes that split clips, those of each axis of a kernel, and which are parts."""
    mesh = jax.sharding.get_abstract_mesh()
    rules = nn.get_logical_axis_rules()
    if mesh.empty or not rules or set(mesh.axis_types) != {AxisType.Auto}:
        return None
    large = {name for name in mesh.axis_names if mesh.shape[name] > 1}
    clips, *places = (
        tuple(name for name in names_in(entry) if name in large)
        for names in (("batch",), axes)
        for entry in nn.logical_to_mesh_axes(names, rules)
    )
    parts = [dim for dim, names in enumerate(places) if set(names) & set(clips)]
    if len(parts) != 1 or not set(places[parts[0]]) <= set(clips):
        return None
    split = zip((x.shape[0], *shape), (clips, *places), strict=True)
    if any(size % math.prod(mesh.shape[name] for name in names) for size, names in split):
        return None
    return clips, places, parts[0]
