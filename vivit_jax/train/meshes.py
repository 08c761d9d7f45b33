# SPDX-License-Identifier: Apache-2.0
"""Which meshes are worth compiling for a recipe: those that divide and fit, the cheapest first."""

import math
from collections.abc import Iterator, Mapping

import jax

from vivit_jax.errors import UserError
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.hardware import Topology
from vivit_jax.train.least_memory import check_least_memory
from vivit_jax.train.plan import planned_setting
from vivit_jax.train.setting import Setting
from vivit_jax.train.sharding import AXES, batch_shards, mesh_text

_MOST_TENSOR = 8  # heads over more devices would send more than they compute


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
    """Meshes that divide the recipe and may fit, those that send least first; others with why.

    By rules alone, nothing is compiled. Only powers of two along fsdp and tensor, as chips lie.
    Raises UserError where there is none, with the reason against the first.
    """
    found, refused, first = [], {}, None
    for sizes in all_meshes(topology.count):
        if any(sizes[axis] & (sizes[axis] - 1) for axis in ("fsdp", "tensor")):
            continue
        try:
            setting = planned_setting(recipe, topology, sizes, videos)
            check_least_memory(setting, topology)
        except UserError as error:
            first = first or error
            refused[mesh_text(sizes)] = str(error)
            continue
        found.append((sent(setting), sizes))
    if not found:
        raise first
    return [sizes for _, sizes in sorted(found, key=lambda each: each[0])], refused


def sent(setting: Setting) -> float:
    """Bytes that a device sends in a step, roughly: gradients, gathered parameters, heads' sums.

    Gradients are reduced over data in float32; over fsdp parameters are gathered twice in the
    compute type and gradients scattered; over tensor each block sums its two results, and their
    gradients, of the tokens that it sees of a device's clips.
    """
    mesh: Mapping[str, int] = setting.mesh.shape
    config = setting.model.config
    share = lambda axis: (mesh[axis] - 1) / mesh[axis]  # noqa: E731
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setting.shapes.params))
    held = count / mesh["tensor"]
    rows = setting.rows / batch_shards(mesh)
    seen, predicted = setting.token_counts
    tokens = config.num_tokens if seen is None else seen
    sums = 4 * rows * tokens * config.hidden_size * itemsize * config.num_hidden_layers
    if setting.recipe.task == "pretrain":
        tokens = seen + predicted
        width, layers = config.decoder_hidden_size, config.decoder_num_hidden_layers
        sums += 4 * rows * tokens * width * itemsize * layers
    return (
        2 * share("data") * 4 * held / mesh["fsdp"]
        + share("fsdp") * (2 * itemsize + 4) * held
        + 2 * share("tensor") * sums
    )
