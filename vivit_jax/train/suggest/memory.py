# SPDX-License-Identifier: Apache-2.0
"""Sees to it that a training step fits the device's memory: parts of a batch, recomputation."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError
from vivit_jax.layers.attention import choose_implementation
from vivit_jax.models.build import build_model
from vivit_jax.progress import readable
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.recipes.refusals import with_values
from vivit_jax.train.planning.memory import RESERVE, analysed
from vivit_jax.train.setup import TrainSetup, make_setup
from vivit_jax.train.sharding import batch_shards, bytes_on_a_device
from vivit_jax.train.suggest.rules import Chosen

Result = TypeVar("Result")
# Numbers that a block keeps for the backward pass, of a token: this many widths of the model and of
# its MLP. More than XLA plans, see tests/train/test_suggest.py.
_WIDTHS, _MLPS = 16, 5
_SURE = 0.5  # share of the memory up to which the estimate will do


def fit_memory(chosen: Chosen, memory: int | None, mesh: Mesh) -> None:
    """Choose `train.accumulate`, and `model.config.remat` if need be, so that a step fits.

    `memory` is that of a device. Compiles where an estimate does not settle it. Raises UserError if
    nothing fits.
    """
    if memory is None:
        chosen.choose("train.accumulate", 1, "the device's memory is not known")
        return
    limit, device = int(memory * (1 - RESERVE)), readable(memory)
    setup = _setup(chosen.recipe, mesh)
    least = _estimate(setup)
    if least <= _SURE * limit:
        reason = f"a step takes less than {readable(least)} of {device}"
        chosen.choose("train.accumulate", 1, reason)
        return
    each = chosen.recipe.train.batch_size // batch_shards(mesh.shape)
    parts = [n for n in range(1, each + 1) if each % n == 0]
    for remat in dict.fromkeys((setup.model.config.remat, "block")):
        recipe = with_values(chosen.recipe, {"model.config.remat": remat})
        found = _fewest(recipe, parts, limit, mesh)
        if found is None:
            continue
        count, total = found
        if remat != setup.model.config.remat:
            chosen.choose("model.config.remat", remat, "blocks are computed twice to save memory")
        reason = f"parts of {each // count} clips on a device take {readable(total)} of {device}"
        chosen.choose("train.accumulate", count, reason)
        return
    raise UserError(
        f"{chosen.recipe.model.start}: a step of one clip does not fit the {device} of a device, "
        "less what no analysis includes; take a smaller model, or train fewer blocks (--set "
        "optim.freeze=...)"
    )


def _setup(recipe: Recipe, mesh: Mesh) -> TrainSetup:
    model = build_model(model_config(recipe), HEADS[recipe.task])
    return make_setup(recipe, mesh, model, VideoProcessor.named(recipe.processor), per_epoch=1000)


def _fewest(recipe: Recipe, parts: list[int], limit: int, mesh: Mesh) -> tuple[int, int] | None:
    """The fewest parts with which a step fits, and its memory; None if one clip does not fit."""
    low, high, fits = 0, len(parts) - 1, None
    order = [0, high]
    while low <= high:
        at = order.pop(0) if order else (low + high) // 2
        total = _in_a_thread(_total, with_values(recipe, {"train.accumulate": parts[at]}), mesh)
        if total <= limit:
            fits, high = (parts[at], total), at - 1
        elif at == len(parts) - 1:
            return None
        else:
            low = at + 1
    return fits


def _in_a_thread(function: Callable[..., Result], *args: Any) -> Result:
    """The function's result, for which Ctrl-C does not wait, as it does for a compilation here."""
    pool = ThreadPoolExecutor(1, "memory")
    try:
        return pool.submit(function, *args).result()
    finally:
        pool.shutdown(wait=False)


def _total(recipe: Recipe, mesh: Mesh) -> int:
    setup = _setup(recipe, mesh)
    lowered = setup.step.lower(setup.shapes, setup.batch_shapes)
    kinds = (setup.shapes.params, setup.shapes.optimizer, setup.batch_shapes)
    params, optimizer, inputs = map(bytes_on_a_device, kinds)
    return analysed(lowered, params=params, optimizer=optimizer, inputs=inputs).total


def _estimate(setup: TrainSetup) -> int:
    """More bytes than a step without accumulation takes on a device; nothing is compiled."""
    config: Any = setup.model.config
    clips = setup.clips // batch_shards(setup.mesh.shape)
    t, h, w = config.grid
    tokens = t * h * w + 1
    size = 4 if jax.default_backend() == "cpu" else jax.numpy.dtype(config.dtype).itemsize
    kept = _WIDTHS * config.hidden_size + _MLPS * config.intermediate_size
    length = tokens if config.attention_type == "joint" else h * w + 1
    if _implementation(config, length) == "xla":
        kept += 3 * config.num_attention_heads * length
    layers = config.num_hidden_layers + config.temporal_layers
    pixels = 8 * math.prod((config.num_frames, *config.frame_size, config.num_channels))
    state = bytes_on_a_device(setup.shapes) + 2 * bytes_on_a_device(setup.shapes.params)
    return state + clips * (tokens * layers * kept * size + 4 * pixels)


def _implementation(config: Any, length: int) -> str:
    if config.attention != "auto":
        return config.attention
    platform = jax.default_backend()
    return choose_implementation(platform, config.dtype, config.head_width, length)
