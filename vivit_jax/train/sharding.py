# SPDX-License-Identifier: Apache-2.0
"""How a training state and a batch are sharded over a mesh, by one table of logical axes.

A mesh has three axes. Clips are split over "data" and "fsdp"; parameters and their optimiser state
over "fsdp" along the model's width and over "tensor" along heads and MLP width. The same step runs
on one device and on any mesh. Explicit axes of a mesh are treated as automatic.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.linen import spmd
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vivit_jax.errors import UserError, counted, first_line, quoted
from vivit_jax.layers.axes import AXES, BATCH, RULES
from vivit_jax.models.build import boxed_params


def parse_mesh(text: str | None, devices: int) -> dict[str, int]:
    """Parse "data=4,fsdp=2" to the sizes of all axes; None: all devices along data.

    Raises UserError for other axes, and if the product is not the number of devices.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    if text is None:
        return sizes | {"data": devices}
    given = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        number = re.fullmatch("0*[1-9][0-9]{0,8}", size)
        if name not in AXES or name in given or number is None:
            raise UserError(
                f"--mesh {quoted(text)!r}: got {quoted(part.strip())!r}, expected each of "
                f"{', '.join(AXES)} at most once with a positive size, such as data=4,fsdp=2"
            )
        given[name] = int(size)
    sizes |= given
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"--mesh {quoted(text)!r} is for {counted(math.prod(sizes.values()), 'device')}, there "
            f"are {devices}; their product must be the number of devices"
        )
    return sizes


def whole_mesh(sizes: Mapping[str, int] | None, devices: int) -> dict[str, int]:
    """The sizes of all axes, of which `sizes` may leave out some; None: all devices along data.

    Some devices may be left over. Raises UserError as `parse_mesh` does.
    """
    if sizes is not None and not isinstance(sizes, Mapping):
        raise UserError(
            f"mesh_sizes is {sizes!r}; expected the size of each axis, such as "
            '{"data": 4, "fsdp": 2}'
        )
    if not sizes:
        return parse_mesh(None, devices)
    wanted = math.prod(size for size in sizes.values() if isinstance(size, int))
    text = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    return parse_mesh(text, min(wanted, devices))


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The sizes of a mesh as `parse_mesh` reads them, without axes of size 1."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


def check_mesh(sizes: Mapping[str, int], processes: int, slices: int) -> None:
    """Raises UserError if the processes cannot share a batch or slices do not divide data."""
    shards = batch_shards(sizes)
    if shards % processes:
        raise UserError(
            f"the mesh {mesh_text(sizes)} splits a batch into {shards} parts, which {processes} "
            "processes cannot share; make data x fsdp a multiple of them (--mesh)"
        )
    if sizes["data"] % slices:
        raise UserError(
            f"the mesh {mesh_text(sizes)} does not divide {slices} slices, between which only "
            "clips are split; make data a multiple of them (--mesh)"
        )


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh of `devices`, by default all devices of all processes; `sizes` are of `parse_mesh`.

    TPU slices, which are joined by a slower network, lie along "data". Raises UserError as
    `check_mesh` does, and for a mesh that does not fit a TPU's torus.
    """
    count = jax.process_count() if devices is None else len({d.process_index for d in devices})
    found = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in found})
    check_mesh(sizes, count, slices)
    shape, auto = tuple(sizes[axis] for axis in AXES), (AxisType.Auto,) * len(AXES)
    try:
        if slices > 1:
            within, between = (sizes["data"] // slices, *shape[1:]), (slices, 1, 1)
            placed = create_hybrid_device_mesh(within, between, found)
            return Mesh(placed, AXES, axis_types=auto)
        # With explicit axes, the default, each operation would need the sharding of its result.
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError as error:
        raise UserError(
            f"the mesh {mesh_text(sizes)} does not fit these chips: each axis has to be a "
            f"product of whole sides of their torus (--mesh); jax says: {first_line(error)[:160]}"
        ) from error


def automatic(mesh: Mesh) -> Mesh:
    """The mesh with automatic axes, as the step and the table need them."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is clips."""
    return NamedSharding(automatic(mesh), PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(automatic(mesh), PartitionSpec())


def batch_shards(sizes: Mapping[str, int]) -> int:
    """The number of parts that a mesh of these sizes splits a batch into."""
    return math.prod(sizes[axis] for axis in BATCH)


def param_shardings(model: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """The sharding of each parameter. UserError if the mesh does not divide a size."""
    boxed, mesh = boxed_params(model), automatic(mesh)
    shardings = spmd.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    shardings = jax.tree.map_with_path(
        lambda path, leaf: leaf if path[-1].key == "kernel" else _whole(leaf), shardings
    )
    wrong = []

    def check(path, leaf, sharding):
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            name = "/".join(key.key for key in path)
            wrong.append(f"{name} {leaf.shape} along {sharding.spec}")

    shapes = nn.unbox(boxed)
    jax.tree.map_with_path(check, shapes, shardings)
    if wrong:
        raise UserError(
            f"the mesh {mesh_text(mesh.shape)} does not divide {len(wrong)} parameters, such as "
            f"{wrong[0]}; fsdp must divide the model's widths, tensor its heads and MLP widths"
        )
    return shardings


def _whole(sharding: NamedSharding) -> NamedSharding:
    """Without "fsdp": parameters that are not kernels are too small to be worth gathering."""
    return NamedSharding(
        sharding.mesh, PartitionSpec(*(None if axis == "fsdp" else axis for axis in sharding.spec))
    )


def like_params(tree: Any, params: Any, shardings: Any, other: NamedSharding) -> Any:
    """The sharding of each leaf of a tree such as an optimiser's state: its parameter's or `other`.

    A leaf belongs to the parameter that has its shape and whose path ends its own path.
    """
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def find(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape is not None and shape == leaf.shape:
                return sharding
        return other

    return jax.tree.map_with_path(find, tree)


def bytes_on_a_device(tree: Any) -> int:
    """The bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def whole(array: jax.Array) -> np.ndarray | None:
    """An array of all processes' devices in the memory of the first one, None in the others.

    Every process calls it. Without another copy where the first process has it already.
    """
    if not (array.is_fully_addressable or array.is_fully_replicated):
        sharding = array.sharding
        assert isinstance(sharding, NamedSharding)
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
        # Waited for: where one process gives its devices the next before others have this one,
        # those of CPUs wait for each other for ever.
        array = jax.block_until_ready(jax.jit(_same, out_shardings=everywhere)(array))
    if jax.process_index():
        return None
    return np.asarray(array if array.is_fully_addressable else array.addressable_data(0))


def _same(array: jax.Array) -> jax.Array:
    return array


def gathered(value: Any) -> list[Any]:
    """The JSON values of all processes in their order, in all of them."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(process_allgather(np.array([len(text)], np.int32)).max())
    rows = process_allgather(np.pad(text, (0, longest - len(text)), constant_values=ord(" ")))
    return [json.loads(row.tobytes()) for row in rows]


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
