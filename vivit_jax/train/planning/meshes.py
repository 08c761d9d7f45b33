# SPDX-License-Identifier: Apache-2.0
"""Which meshes are worth compiling for a recipe: those that divide and fit, the cheapest first."""

import math
from collections.abc import Iterator, Mapping

import jax

from vivit_jax.errors import UserError
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.planning.hardware import Topology
from vivit_jax.train.planning.least_memory import check_least_memory
from vivit_jax.train.planning.plan import link_bandwidth, planned_setup
from vivit_jax.train.setup import TrainSetup
from vivit_jax.train.sharding import AXES, batch_shards, bytes_on_a_device, mesh_text

_MOST_TENSOR = 8  # heads over more devices would send more than they compute
# As in compiled steps of VideoMAE small to giant for v5e: of what fsdp sends, the scattered
# gradients and a third of the gathered parameters have no product beside them; over all chips of a
# v5p slice libtpu makes all-reduces of both; the optimiser takes twice the time of its traffic.
_WAITED, _ALL_REDUCED, _UPDATE = 0.55, 2.0, 2.0


def all_meshes(devices: int) -> Iterator[dict[str, int]]:
    """Every way to lay devices out along the axes, with tensor up to 8."""
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
    """Meshes that divide the recipe and may fit, the cheapest by `cost` first; others with why.

    By rules alone, nothing is compiled. Only powers of two along fsdp and tensor, as chips lie.
    Raises UserError where there is none, with the reason against the first.
    """
    found, refused, first = [], {}, None
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
    if not found:
        raise first
    return [sizes for _, sizes in sorted(found, key=lambda each: each[0])], refused


def cost(setup: TrainSetup, topology: Topology) -> float:
    """Seconds of a step, roughly, in which meshes differ: what is sent, and the update.

    The optimiser reads and writes all that a device holds of the state, and reads its gradients:
    with fsdp that is a share, which on TPUs saves more than what fsdp sends costs.
    """
    chip, devices, sends = topology.chip, setup.mesh.devices, sent(setup)
    on_tpu = chip.platform == "tpu"
    a_slice = setup.mesh.shape["fsdp"] == topology.count // topology.slices
    sends["fsdp"] *= _ALL_REDUCED if a_slice and chip.dimensions == 3 else _WAITED
    along = {"data": devices[:, 0, 0], "fsdp": devices[0, :, 0], "tensor": devices[0, 0, :]}
    slowest = chip.links / max(chip.dimensions, 1)  # also where a network's rate is not known
    seconds = [
        size / (link_bandwidth(along[axis], topology) or slowest) for axis, size in sends.items()
    ]
    updated = 2 * bytes_on_a_device(setup.shapes) + bytes_on_a_device(setup.shapes.params)
    return sum(seconds) + updated / chip.bandwidth * (_UPDATE if on_tpu else 1)


def sent(setup: TrainSetup) -> dict[str, float]:
    """Bytes that a device sends in a step along each axis, roughly.

    Gradients are reduced over data in the compute type; over fsdp parameters are gathered twice in
    it and gradients scattered; over tensor each block sums its two results, forward in float32, and
    their gradients, of the tokens that it sees of a device's clips.
    """
    mesh: Mapping[str, int] = setup.mesh.shape
    config = setup.model.config
    share = lambda axis: (mesh[axis] - 1) / mesh[axis]  # noqa: E731
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.shapes.params))
    held = count / mesh["tensor"] * itemsize
    rows = setup.rows / batch_shards(mesh)
    seen, predicted = setup.token_counts
    tokens = config.num_tokens if seen is None else seen
    sums = rows * tokens * config.hidden_size * config.num_hidden_layers
    if setup.recipe.task == "pretrain":
        width, layers = config.decoder_hidden_size, config.decoder_num_hidden_layers
        sums += rows * (seen + predicted) * width * layers
    return {
        "data": 2 * share("data") * held / mesh["fsdp"],
        "fsdp": 3 * share("fsdp") * held,
        "tensor": 2 * share("tensor") * sums * 2 * (4 + itemsize),
    }
