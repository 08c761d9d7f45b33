# SPDX-License-Identifier: Apache-2.0
"""Image ViT checkpoints, read as a headless ViViT of one frame.

HuggingFace directories (google/vit-*), timm's safetensors, and the npz and msgpack files of
vision_transformer and scenic.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.files.open import Checkpoint, open_checkpoint
from checkpoints_convert.files.tensors import check_readable
from checkpoints_convert.files.torch_files import check_flat
from checkpoints_convert.layouts import hf, scenic
from checkpoints_convert.layouts.hf import config_path
from checkpoints_convert.layouts.layout import Layout, name_before
from checkpoints_convert.layouts.state_dicts import left_out as others_of
from checkpoints_convert.layouts.state_dicts import unwrapped
from checkpoints_convert.rules import Rule
from checkpoints_convert.size_checks import check_sizes
from checkpoints_convert.tables import hf_vivit, scenic_vivit, timm_vit
from vivit_jax.config import VivitConfig
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import CheckpointError, ConfigError, UserError
from vivit_jax.files.json_files import read_json
from vivit_jax.hub import resolve_checkpoint
from vivit_jax.typed import Settings, names_set

# Heads of timm's plain ViTs by width; its files do not say them.
TIMM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
# The name of the patch embedding's kernel tells the dialects apart.
_PATCH_KERNELS = {
    "hf": hf.PATCH_KERNEL,
    "timm": "patch_embed.proj.weight",
    "flax": "embedding/kernel",
}


@dataclasses.dataclass(frozen=True)
class ImageModel:
    """An opened image checkpoint: tensors, their table, and the model as a ViViT of one frame.

    `dialect` is "hf", "timm" or "flax", whose names the tensors have.
    """

    path: Path
    dialect: str
    tensors: Mapping[str, Any]
    config: VivitConfig
    rules: tuple[Rule, ...]
    left_out: Mapping[str, str]

    @property
    def title(self) -> str:
        """The checkpoint and what it is read as, for error messages."""
        return f"{self.path}, read as an image ViT,"


def dialect_of(tensors: Mapping[str, Any]) -> tuple[str | None, str]:
    """The dialect of these names and what precedes the patch embedding's; None without one."""
    for name in tensors:
        for dialect, ending in _PATCH_KERNELS.items():
            prefix = name_before(name, ending)
            if prefix is not None:
                return dialect, prefix
    return None, ""


def is_image_model(checkpoint: Checkpoint, settings: Settings = ()) -> bool:
    """Whether a checkpoint is an image ViT's: its patch embedding's kernel has no time axis.

    Image and video models in flax's names can have the same tensors. `settings` for sampled frames
    and a config.json that says ViViT decide for video.
    """
    tensors = checkpoint.tensors
    if dialect_of(tensors)[0] == "flax":
        params, _ = scenic.parameters(checkpoint.path, tensors)
        sampled = "num_sampled_frames" in names_set(settings)
        return scenic.is_image_model(params) and not sampled and not _beside_vivit(checkpoint.path)
    kernels = [tensor for name, tensor in tensors.items() if dialect_of({name: tensor})[0]]
    return bool(kernels) and all(len(kernel.shape) == 4 for kernel in kernels)


def _beside_vivit(path: Path) -> bool:
    """Whether the config.json beside a file says ViViT."""
    try:
        values = read_json(config_path(path))
    except (OSError, UserError):
        return False  # whatever reads the file next reports what is wrong with it
    types = (VivitConfig.model_type, VivitConfig.own_model_type)
    return isinstance(values, dict) and values.get("model_type") in types


def open_image_model(
    source: str | Path | Checkpoint, *, heads: int | None = None, revision: str | None = None
) -> ImageModel:
    """Open an image ViT: a directory, a file, or a hub id; data is not read yet.

    `heads` is needed only for timm's files of unusual width. Raises CheckpointError for a file that
    is not an image ViT, ConfigError for a config.json that asks for what ViViT does not have.
    """
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        checkpoint = open_checkpoint(resolve_checkpoint(source, revision))
    path = checkpoint.path
    tensors, left_out = parameters(path, checkpoint.tensors)
    check_readable(path, tensors)
    dialect, prefix = dialect_of(tensors)
    kernel = _patch_kernel(path, dialect, prefix, tensors)
    if dialect == "hf":
        config = _hf_config(path, tensors, prefix)
        rules = hf_vivit.image_rules(config, prefix, hf_vivit.dialect_of(tensors))
    elif dialect == "timm":
        config = _timm_config(path, tensors, kernel, heads)
        rules = timm_vit.image_rules(config)
    else:
        config = _flax_config(path, tensors, kernel)
        rules = scenic_vivit.image_rules(config)
    image = ImageModel(path, dialect or "", tensors, config, tuple(rules), left_out)
    check_sizes(image.title, tensors, config, rules)
    return image


def parameters(
    path: Path, tensors: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The parameters by the names of their dialect, and the entries left out with the reason."""
    dialect, prefix = dialect_of(tensors)
    if dialect == "flax":
        return scenic.parameters(path, tensors)
    if dialect == "hf":
        return hf.parameters(path, tensors, prefixes=("vit.",))
    if dialect == "timm" and prefix:  # a training state of torch, as DeiT saves it
        found = unwrapped(path, tensors, prefix[: prefix.rfind("/") + 1])
        return {name: t for name, (_, t) in found.items()}, others_of(tensors, found)
    if dialect is not None:
        check_flat(path, tensors)
    return tensors, {}


def _patch_kernel(
    path: Path, dialect: str | None, prefix: str, tensors: Mapping[str, Any]
) -> tuple[int, ...]:
    """Shape of the patch embedding's kernel as (height, width, channels, width of the model)."""
    names = {**_PATCH_KERNELS, "hf": f"{prefix}{hf.PATCH_KERNEL}"}
    kernel = tensors.get(names[dialect]) if dialect else None
    staged = any(name.startswith("SpatialTransformer/") for name in tensors)
    if kernel is not None and (len(kernel.shape) == 5 or staged):
        raise CheckpointError(
            f"{path} is a video model already: its patch embedding has shape "
            f"{tuple(kernel.shape)}{' and it has a SpatialTransformer' if staged else ''}; "
            "expected an image ViT. Load it with vivit_jax.from_pretrained"
        )
    if kernel is None or len(kernel.shape) != 4:
        found = "no patch embedding" if kernel is None else f"a kernel of {tuple(kernel.shape)}"
        raise CheckpointError(
            f"{path} is not an image ViT: it has {found}; expected a convolution over height and "
            f"width named {', '.join(names.values())}"
        )
    if dialect == "flax":
        return tuple(kernel.shape)
    d, c, h, w = kernel.shape
    return h, w, c, d


def _config(path: Path, **fields) -> VivitConfig:
    """One frame of an image model, with joint attention."""
    try:
        return VivitConfig(num_frames=1, **fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _hf_config(path: Path, tensors, prefix: str) -> VivitConfig:
    where = config_path(path)
    try:
        values = read_json(where, ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist; an image model needs its config.json") from None
    if not isinstance(values, dict) or values.get("model_type") != "vit":
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{where}: model_type is {found!r}, expected 'vit'")

    # Files of transformers 4 leave out what equals ViTConfig's default.
    def value(name: str, default: Any) -> Any:
        return values[name] if values.get(name) is not None else default

    patch = value("patch_size", 16)
    sides = patch if isinstance(patch, list) else [patch, patch]
    if len(sides) != 2:
        raise ConfigError(f"{where}: patch_size must be one or two positive integers, got {patch}")
    image = value("image_size", 224)
    return _config(
        where,
        image_size=tuple(image) if isinstance(image, list) else image,
        tubelet_size=(1, *sides),
        num_channels=value("num_channels", 3),
        hidden_size=value("hidden_size", 768),
        num_hidden_layers=value("num_hidden_layers", 12),
        num_attention_heads=value("num_attention_heads", 12),
        intermediate_size=value("intermediate_size", 3072),
        hidden_act=value("hidden_act", "gelu"),
        layer_norm_eps=value("layer_norm_eps", 1e-12),
        qkv_bias=value("qkv_bias", True),
    )


def _timm_config(path: Path, tensors, kernel, heads: int | None) -> VivitConfig:
    h, w, c, d = kernel
    heads = heads or TIMM_HEADS.get(d)
    if heads is None:
        raise ConfigError(
            f"{path}: the weights do not say num_attention_heads, and timm has no plain ViT "
            f"of width {d} ({', '.join(map(str, TIMM_HEADS))}); give it, --config "
            "num_attention_heads=..."
        )
    return _config(
        path,
        image_size=_image_size(path, tensors, "pos_embed", "cls_token", (h, w)),
        tubelet_size=(1, h, w),
        num_channels=c,
        hidden_size=d,
        num_hidden_layers=_depth(tensors, r"blocks\.(\d+)\."),
        num_attention_heads=heads,
        intermediate_size=_shape(path, tensors, "blocks.0.mlp.fc1.weight", 2)[0],
        hidden_act="gelu",
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        pooling="cls" if "cls_token" in tensors else "mean",
    )


def _flax_config(path: Path, tensors, kernel) -> VivitConfig:
    h, w, c, d = kernel
    block = "Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_0/query/kernel"
    positions = "Transformer/posembed_input/pos_embedding"
    return _config(
        path,
        image_size=_image_size(path, tensors, positions, "cls", (h, w)),
        tubelet_size=(1, h, w),
        num_channels=c,
        hidden_size=d,
        num_hidden_layers=_depth(tensors, r"Transformer/encoderblock_(\d+)/"),
        num_attention_heads=_shape(path, tensors, attention, 3)[1],
        intermediate_size=_shape(path, tensors, f"{block}/MlpBlock_0/Dense_0/kernel", 2)[1],
        pooling="cls" if "cls" in tensors else "mean",
    )


def _image_size(path: Path, tensors, positions: str, cls: str, patch) -> int | tuple[int, int]:
    """The size of the images, from a square of patches."""
    tokens = _shape(path, tensors, positions, 3)[1] - (cls in tensors)
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise CheckpointError(
            f"{path}: {positions} holds {tokens} positions of patches, expected a square image"
        )
    height, width = side * patch[0], side * patch[1]
    return height if height == width else (height, width)


def _shape(path: Path, tensors, name: str, rank: int) -> tuple[int, ...]:
    shape = tuple(tensors[name].shape) if name in tensors else None
    if shape is None or len(shape) != rank:
        raise CheckpointError(
            f"{path} is not an image ViT: {name} is {shape or 'missing'}, expected {rank} axes"
        )
    return shape


def _depth(tensors, pattern: str) -> int:
    found = (re.match(pattern, name) for name in tensors)
    return max((int(match.group(1)) for match in found if match), default=0) + 1


def pixel_range(image: ImageModel) -> dict[str, Any]:
    """VideoProcessor fields that give a video model the image model's range of pixels.

    Without a preprocessor_config.json it is [-1, 1], as for ViTs of vision_transformer, scenic and
    timm.
    """
    beside = (image.path if image.path.is_dir() else image.path.parent) / "preprocessor_config.json"
    if not beside.exists():
        return {}
    values = read_json(beside, ConfigError, "expected a processor")
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(f"{beside} is not valid JSON of a processor: a {found}, not an object")
    given = {name: value for name, value in values.items() if value is not None}
    # ViTImageProcessor's defaults for keys that the file lacks.
    defaults = dict(
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=0.5, image_std=0.5
    )
    return {name: given.get(name, value) for name, value in defaults.items()} | {"offset": False}


def processor(image: ImageModel, config: VivitConfig) -> VideoProcessor:
    """What a video model of `config` that starts from an image model gets: scenic's frames."""
    return scenic.processor(config, **pixel_range(image))


# Read as the start of a video model, never written.
IMAGE_VIT = Layout(
    name="vit",
    tables={},
    parameters=parameters,
    detects=is_image_model,
    image=True,
    writable=False,
)
