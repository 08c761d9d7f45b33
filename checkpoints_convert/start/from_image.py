# SPDX-License-Identifier: Apache-2.0
"""Starts a ViViT from an image model (section 3.4 of the paper, scenic's initialisation).

The image model is read as a ViViT of one frame, through a weight table like any checkpoint. This
file makes a video model of it: it inflates the patch kernel over time, repeats or resizes the
position table, and places the blocks where the variant has them. All other parameters start fresh
and are named in the report.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.layouts.image_vit import TIMM_HEADS, ImageModel, open_image_model
from checkpoints_convert.pretrained import InitialisedModel, LoadReport
from checkpoints_convert.rules import Rule, import_params, match_import, read_params
from checkpoints_convert.start.changes import check_fields
from vivit_jax import param_tree
from vivit_jax.config import VivitConfig
from vivit_jax.errors import ConfigError
from vivit_jax.layers.embed import resize_weights
from vivit_jax.models.build import (
    abstract_params,
    build_model,
    check_float64,
    expected_shapes,
    initialise,
)

logger = logging.getLogger(__name__)

INFLATIONS = ("central_frame", "average", "rank_pooling")
POSITIONS = ("tile", "resize", "resize_tile")
TEMPORAL_ATTENTION = ("copy", "zero", "fresh")


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """How an image model becomes a video model, see `init_from_image_model`."""

    inflation: str = "central_frame"
    positions: str = "resize_tile"
    temporal_attention: str | None = None  # None: as the config says

    def __post_init__(self):
        for name, allowed in (
            ("inflation", INFLATIONS),
            ("positions", POSITIONS),
            ("temporal_attention", (None, *TEMPORAL_ATTENTION)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                known = [each for each in allowed if each is not None]
                raise ConfigError(f"{name} must be one of {known}, got {value!r}")

    def time_of(self, config: VivitConfig) -> str:
        """How temporal attention starts in a model of `config`."""
        default = "zero" if config.zero_init_temporal_attention else "copy"
        return self.temporal_attention or default


def init_from_image_model(
    source: str | Path | Checkpoint,
    config: VivitConfig | Mapping[str, Any] | None = None,
    *,
    head: str = "classification",
    inflation: str = "central_frame",
    positions: str = "resize_tile",
    temporal_attention: str | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> InitialisedModel:
    """Make any ViViT variant from an image ViT: (model, params, report).

    `source` is a HuggingFace ViT directory or hub id (google/vit-*), a safetensors file of timm, or
    an npz or msgpack file of vision_transformer or scenic. `config` is the video model's; a mapping
    changes fields of `video_config(image model)`: its sizes, 32 frames in tubelets of two.

    * `inflation`: the kernel over time. "central_frame" puts it at frame t // 2 and zeros
      elsewhere, so that a tubelet starts as its central frame; "average" spreads it over all
      frames; "rank_pooling" weights the frames by approximate rank pooling, which responds to
      change and, with two frames, not to a still clip.
    * `positions`: "tile" repeats the image's table for every frame; "resize" resizes it, for tables
      of one frame; "resize_tile" does both as needed. Resizing is linear with aligned corners, as
      in scenic. The class token keeps its position.
    * `temporal_attention`, in factorised self-attention: "copy" copies the image model's attention,
      as scenic does; "zero" copies it with a zero output projection, so that the block starts as
      the image model's; "fresh" draws it. Its norm starts fresh, as in scenic. The default is
      "zero" if the config has `zero_init_temporal_attention`, else "copy".

    The class token of a factorised encoder's spatial stage is copied too, so that a frame starts as
    the image model sees it; scenic leaves it at zero and keeps its position.

    The classifier, the temporal stage and other parameters that the image model lacks are drawn
    from `seed`; the report names them and is logged. Raises ConfigError if the models do not fit.
    """
    options = ImageOptions(inflation, positions, temporal_attention)
    found, _ = read_image_model(source, config, options, head=head, revision=revision, seed=seed)
    logger.warning("%s", found.report.brief)
    return found


def read_image_model(
    source: str | Path | Checkpoint,
    config: VivitConfig | Mapping[str, Any] | None = None,
    options: ImageOptions | None = None,
    *,
    head: str = "classification",
    revision: str | None = None,
    seed: int = 0,
) -> tuple[InitialisedModel, ImageModel]:
    """`init_from_image_model` for callers that show the report themselves, and the image model."""
    options = options or ImageOptions()
    if isinstance(config, VivitConfig):
        heads = config.num_attention_heads
        image = open_image_model(source, heads=heads, revision=revision)
    else:
        changes = _checked_changes(config)
        heads = changes.get("num_attention_heads")
        image = open_image_model(source, heads=heads, revision=revision)
        config = video_config(image, **changes)
    _check_sizes(image, config)
    check_float64(config)
    expected = expected_shapes(image.config, "none", pooler=False)
    rows = match_import(image.tensors, image.rules, expected, image.title)
    entries = read_params(image.tensors, rows, expected, config.param_dtype)
    video = _video_entries(entries, image.config, config, options)
    model = build_model(config, head, add_pooling_layer=False)
    prefix = "" if head == "none" else "backbone/"
    video = {prefix + path: value for path, value in video.items()}
    params, fresh = complete_params(model, video, seed, f"{image.title} inflated,")
    # Tensors that reach no parameter: those the table leaves out, and a class token without place.
    no_cls = config.pooling != "cls"
    unread = {row.src for row in rows if not row.dst or (no_cls and row.dst == ("cls",))}
    report = LoadReport(
        source=str(source),
        model=type(model).__name__,
        dropped=tuple(sorted(unread | image.left_out.keys())),
        fresh=fresh,
        notes=tuple(_notes(image, config, options)),
    )
    return InitialisedModel(model, params, report), image


def complete_params(
    model: nn.Module, entries: Mapping[str, np.ndarray], seed: int, title: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The model's parameters, those without an entry drawn from `seed`; and the paths drawn.

    `entries` are by per-layer path. Raises CheckpointError, which begins with `title`, for an entry
    that the model does not have, or has in another shape.
    """
    leaves = param_tree.shapes_of(param_tree.flatten(abstract_params(model)))
    slots = param_tree.slots(leaves)
    fresh = tuple(path for path in slots if path not in entries)
    drawn = initialise(model, {slots[path].leaf for path in fresh}, seed) if fresh else {}
    drawn = {leaf: np.asarray(array) for leaf, array in drawn.items()}
    entries = dict(entries)
    for path in fresh:
        slot = slots[path]
        entries[path] = drawn[slot.leaf] if slot.layer is None else drawn[slot.leaf][slot.layer]
    # Through the engine again, which checks every entry's path and shape.
    rules = [Rule(path, path) for path in entries]
    flat = import_params(entries, rules, leaves, model.config.param_dtype, title)
    flat = {path: jax.device_put(array) for path, array in flat.items()}
    return param_tree.unflatten(dict(sorted(flat.items()))), fresh


def video_config(image: ImageModel, **changes: Any) -> VivitConfig:
    """The ViViT of an image model's sizes: joint attention, 32 frames, tubelets of two frames."""
    _, height, width = image.config.tubelet_size
    # Left open if there is a class token, because not every variant can have one.
    pooling = None if image.config.pooling == "cls" else image.config.pooling
    defaults = dict(num_frames=32, tubelet_size=(2, height, width), pooling=pooling)
    return dataclasses.replace(image.config, **{**defaults, **changes})


def inflate_kernel(
    kernel: Float[np.ndarray, "1 h w c d"], frames: int, inflation: str
) -> Float[np.ndarray, "t h w c d"]:
    """A patch kernel as a kernel of tubelets of so many frames.

    Approximate rank pooling (Bilen et al. 2016, as scenic scales it): frame t of T has the weight
    (2 (T - t + 1) - (T + 1) (H_T - H_(t-1))) / T, H_t the harmonic numbers.
    """
    if inflation == "central_frame":
        weights = np.arange(frames) == frames // 2
    elif inflation == "average":
        weights = np.full(frames, 1 / frames)
    else:
        t = np.arange(1, frames + 1)
        harmonic = np.concatenate([[0], np.cumsum(1 / t)])
        weights = 2 * (frames - t + 1) - (frames + 1) * (harmonic[-1] - harmonic[:-1])
        weights = weights / frames
    return (weights.reshape(-1, 1, 1, 1, 1) * kernel).astype(kernel.dtype)


def inflate_positions(
    table: Float[np.ndarray, "patches d"],
    old: tuple[int, int],
    new: tuple[int, int, int],
    positions: str,
) -> Float[np.ndarray, "tokens d"]:
    """An image's position table [h*w, d] as that of a grid of (frames, height, width) tokens."""
    frames, *size = new
    if positions == "tile" and old != tuple(size):
        raise ConfigError(
            f"positions='tile' needs the image's grid of {old} tokens, the video model has "
            f"{tuple(size)}; use positions='resize_tile'"
        )
    if positions == "resize" and frames > 1:
        raise ConfigError(
            f"positions='resize' fills the table of one frame, the video model's has {frames}; use "
            "positions='resize_tile'"
        )
    return np.tile(resize_table(table, old, tuple(size)), (frames, 1))


def resize_table(
    table: Float[np.ndarray, "before d"], old: tuple[int, ...], new: tuple[int, ...]
) -> Float[np.ndarray, "after d"]:
    """A position table [tokens, d] resized from one grid to another with as many axes.

    Linear along each axis with aligned corners, as scenic resizes (scipy.ndimage.zoom of order 1).
    """
    grid = table.astype(np.float64).reshape(*old, -1)
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        if before != after:
            weights = resize_weights(before, after, "aligned")
            grid = np.moveaxis(np.tensordot(weights, grid, axes=(1, axis)), 0, axis)
    return grid.reshape(-1, table.shape[-1]).astype(table.dtype)


def _video_entries(
    entries: Mapping[str, np.ndarray],
    image: VivitConfig,
    config: VivitConfig,
    options: ImageOptions,
) -> dict[str, np.ndarray]:
    """The video model's backbone parameters that come from the image model, by path."""
    staged = config.attention_type == "factorised_encoder"
    stage = "spatial/" if staged else ""
    frames, height, width = config.grid
    both_cls = image.pooling == config.pooling == "cls"
    video = {"patch_embed/bias": entries["patch_embed/bias"]}
    kernel = entries["patch_embed/kernel"]
    video["patch_embed/kernel"] = inflate_kernel(kernel, config.tubelet_size[0], options.inflation)
    table = entries["pos_embed"][0]
    first = int(image.pooling == "cls")
    grid = (1 if staged else frames, height, width)
    patches = inflate_positions(table[first:], image.grid[1:], grid, options.positions)
    if both_cls:
        video[f"{stage}cls"] = entries["cls"]
        patches = np.concatenate([table[:1], patches])
    elif config.pooling == "cls":
        patches = np.concatenate([np.zeros_like(table[:1]), patches])
    video[f"{stage}pos_embed"] = patches[None]
    for path, value in entries.items():
        if path.startswith(("layers_", "ln_final")):
            placed = _placed(path, value, config, options.time_of(config))
            video |= {stage + target: entry for target, entry in placed.items()}
    return video


def _placed(
    path: str, value: np.ndarray, config: VivitConfig, temporal_attention: str
) -> dict[str, np.ndarray]:
    """An entry of the image model's blocks at its path, or two paths, in the video model."""
    found = re.fullmatch(r"(layers_\d+)/(ln_)?attention/(.+)", path)
    if config.attention_type != "factorised_self_attention" or not found:
        return {path: value}
    layer, norm, rest = found.groups()
    placed = {f"{layer}/{norm or ''}attention_space/{rest}": value}
    if not norm and temporal_attention != "fresh":
        zero = temporal_attention == "zero" and rest.startswith("out/")
        placed[f"{layer}/attention_time/{rest}"] = np.zeros_like(value) if zero else value
    return placed


def _checked_changes(changes: Any) -> Mapping[str, Any]:
    """Fields of a video model, none for None; ConfigError for names that it does not have."""
    if changes is None:
        return {}
    if not isinstance(changes, Mapping):
        raise ConfigError(
            f"config must be a VivitConfig, a mapping of its fields or None, got "
            f"{type(changes).__name__}"
        )
    check_fields(VivitConfig, changes)
    return changes


def _check_sizes(image: ImageModel, config: VivitConfig) -> None:
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "num_channels", "qkv_bias",
    )  # fmt: skip
    wrong = [
        f"{name} is {getattr(config, name)}, the image model's is {getattr(image.config, name)}"
        for name in names
        if getattr(config, name) != getattr(image.config, name)
    ]
    if config.tubelet_size[1:] != image.config.tubelet_size[1:]:
        wrong.append(
            f"tubelet_size is {config.tubelet_size}, the image model's patches are "
            f"{image.config.tubelet_size[1:]}"
        )
    if wrong:
        raise ConfigError(
            f"{image.path} does not fit the video model: {'; '.join(wrong)}. Leave these fields "
            "out to take the image model's"
        )


def _notes(model: ImageModel, config: VivitConfig, options: ImageOptions) -> list[str]:
    """What was done, and where the two models compute differently."""
    image = model.config
    frames, height, width = config.grid
    notes = [
        f"patch kernel inflated to {config.tubelet_size[0]} frames: {options.inflation}",
        f"positions {image.grid[1:]} to {(height, width)} for {frames} frames: {options.positions}",
    ]
    if config.attention_type == "factorised_self_attention":
        notes.append(f"temporal attention: {options.time_of(config)}")
    if image.pooling == "cls" != config.pooling:
        notes.append("the class token and its position are left out: the video model has none")
    if image.pooling != "cls" == config.pooling:
        notes.append("the position of the class token starts at zero: the image model has none")
    for name in ("hidden_act", "layer_norm_eps"):
        ours, theirs = getattr(config, name), getattr(image, name)
        if ours != theirs:
            notes.append(f"{name} is {ours}, the image model's is {theirs}")
    usual = TIMM_HEADS.get(config.hidden_size)
    if model.dialect == "timm" and usual not in (None, config.num_attention_heads):
        notes.append(
            f"num_attention_heads is {config.num_attention_heads} as given; timm's plain ViTs of "
            f"this width have {usual}, and the weights do not say"
        )
    return notes
