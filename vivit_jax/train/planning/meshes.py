# SPDX-License-Identifier: Apache-2.0
"""The meshes that are worth compiling for a recipe: those that divide and fit, cheapest first."""

import math
from collections.abc import Iterator, Mapping

import jax

from vivit_jax.errors import UserError
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.planning.hardware import Topology
from vivit_jax.train.planning.least_memory import check_least_memory
from vivit_jax.train.planning.plan import planned_setup
from vivit_jax.train.planning.step_costs import link_bandwidth
from vivit_jax.train.setup import TrainSetup
from vivit_jax.train.sharding import AXES, batch_shards, bytes_on_a_device, mesh_text

_MOST_TENSOR = 8  # heads split further cost more communication than they save
# Read from compiled steps of VideoMAE small to giant for v5e: no product overlaps the scattered
# gradients of fsdp and a third of its gathered parameters; over all chips of a v5p slice libtpu
# turns both into all-reduces; the optimiser takes twice the time of its traffic.
_WAITED, _ALL_REDUCED, _UPDATE = 0.55, 2.0, 2.0


def all_meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices, with tensor up to 8."""
    for tensor in range(1, min(devices, _MOST_TENSOR) + 1):
        if devices % tensor:
            continue
        rest = devices // tensor
        for fsdp in range(1, rest + 1):
            if rest % fsdp == 0:
                yield dict(zip(AXES, (rest // fsdp, fsdp, tensor), strict=True))


def sensible_meshes(
    recipe: Recipe, topology: Topology, videos: int | None = None
) -> tuple[list[dict[str, int]], dict[str, str]]:
    """Meshes that divide the recipe and may fit, cheapest by `cost` first, and why others are out.

    Decided by rules; nothing is compiled. fsdp and tensor are powers of two, as TPU slices are.
    Raises UserError, with the reason against the first mesh, if none is left.
    """
    found: list[tuple[float, dict[str, int]]] = []
    refused: dict[str, str] = {}
    first: UserError | None = None
    for sizes in all_meshes(topology.count):
        if any(sizes[axis] & (sizes[axis] - 1) for axis in ("fsdp", "tensor")):
            continue
        try:
            setup = planned_setup(recipe, topology, sizes, videos)
            check_least_memory(setup, topology)
        except UserError as error:
            first = first or error
            refused[mesh_text(sizes)] = str(error)
            continue
        found.append((cost(setup, topology), sizes))
    if first is not None and not found:
        raise first
    return [sizes for _, sizes in sorted(found, key=lambda each: each[0])], refused


def cost(setup: TrainSetup, topology: Topology) -> float:
    """Rough seconds of what differs between meshes: communication and the optimiser's update.

    The optimiser reads and writes the state that a device holds, and reads its gradients. fsdp
    divides that, which on TPUs saves more than its communication costs.
    """
    chip, devices, sends = topology.chip, setup.mesh.devices, sent(setup)
    on_tpu = chip.platform == "tpu"
    a_slice = setup.mesh.shape["fsdp"] == topology.count // topology.slices
    sends["fsdp"] *= _ALL_REDUCED if a_slice and chip.dimensions == 3 else _WAITED
    along = {"data": devices[:, 0, 0], "fsdp": devices[0, :, 0], "tensor": devices[0, 0, :]}
    slowest = chip.links / max(chip.dimensions, 1)  # stands in for an unknown network
    seconds = [
        size / (link_bandwidth([*along[axis]], topology) or slowest) for axis, size in sends.items()
    ]
    updated = 2 * bytes_on_a_device(setup.shapes) + bytes_on_a_device(setup.shapes.params)
    return sum(seconds) + updated / chip.bandwidth * (_UPDATE if on_tpu else 1)


def sent(setup: TrainSetup) -> dict[str, float]:
    """Rough bytes that a device sends in a step along each axis.

    In the compute dtype data reduces gradients, and fsdp gathers parameters twice and scatters
    gradients. tensor sums the two results of each block, forward in float32, and their gradients,
    over the tokens of a device's clips.
    """
    mesh: Mapping[str, int] = setup.mesh.shape
    config = setup.model.config
    share = {axis: (size - 1) / size for axis, size in mesh.items()}
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.shapes.params))
    held = count / mesh["tensor"] * itemsize
    clips = setup.clips / batch_shards(mesh)
    seen, predicted = setup.token_counts
    tokens = config.num_tokens if seen is None else seen
    decoded = tokens + (predicted or 0)
    sums = clips * tokens * config.hidden_size * config.num_hidden_layers
    if setup.recipe.task == "pretrain":
        width, layers = config.decoder_hidden_size, config.decoder_num_hidden_layers
        sums += clips * decoded * width * layers
    return {
        "data": 2 * share["data"] * held / mesh["fsdp"],
        "fsdp": 3 * share["fsdp"] * held,
        "tensor": 2 * share["tensor"] * sums * 2 * (4 + itemsize),
    }
