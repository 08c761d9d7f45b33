# SPDX-License-Identifier: Apache-2.0
"""scenic checkpoints: finds the parameters in a train state and infers the config from them.

A train state holds the parameters at `optimizer/target` (flax.optim, every published ViViT) or
`params` (optax), and beside them the step, the random state and the optimiser. Older ones nest the
parameters in one more `params`, and number all submodules together instead of by class.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.files.flax_files import write_msgpack
from checkpoints_convert.layouts.infer import build_config, count_blocks
from checkpoints_convert.layouts.layout import Layout, SingleFile
from checkpoints_convert.tables import scenic_vivit
from vivit_jax.config import VivitConfig
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import CheckpointError, ConfigError
from vivit_jax.typed import Settings, parse_settings

CONTAINERS = {"optimizer": "optimizer/target/", "params": "params/"}
FILE = "checkpoint_0"  # what flax's restore_checkpoint looks for in a directory
# Files that readers of a directory open first: `checkpoint`, and any later step.
RIVALS = re.compile(r"checkpoint(_\d+)?")
_TEMPORAL = "TemporalTransformer"
TRAINING_STATE = "training state, not weights of the model"
# big_vision's npz files name the optimiser `opt`, vision_transformer's have no container.
_NESTS = ("optimizer/target/", "opt/target/", "params/", "")
_NUMBERED = re.compile(r"(.*)_(\d+)")
# What scenic always computes, whatever the checkpoint holds.
_FIXED = {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-6, "qkv_bias": True, "pooler_act": "tanh"}
_TANH_GELU = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")


def parameters(path: Path, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters by path below the container, and the names left out with the reason."""
    nest = next((nest for nest in _NESTS if any(n.startswith(nest) for n in tensors)), "")
    inside = {name.removeprefix(nest): name for name in tensors if name.startswith(nest)}
    if any(name.startswith("params/") for name in inside):
        # Beside them is only state of the old API, which these models do not have.
        inside = {
            n.removeprefix("params/"): m for n, m in inside.items() if n.startswith("params/")
        }
    left_out = dict.fromkeys(sorted(tensors.keys() - set(inside.values())), TRAINING_STATE)
    renamed = linen_names(inside)
    return {renamed[name]: tensors[full] for name, full in inside.items()}, left_out


def linen_names(names: Iterable[str]) -> dict[str, str]:
    """New name by old: submodules numbered by class, as in Linen, not all together.

    LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3 become LayerNorm_0,
    MultiHeadDotProductAttention_0, LayerNorm_1, MlpBlock_0. Linen names stay as they are.
    """
    paths = {name: name.split("/") for name in names}
    children: dict[tuple[str, ...], set[str]] = {}
    for path in paths.values():
        for depth, part in enumerate(path):
            children.setdefault(tuple(path[:depth]), set()).add(part)
    new = {parent: _renumbered(parts) for parent, parts in children.items()}
    return {
        name: "/".join(new[tuple(path[:depth])][part] for depth, part in enumerate(path))
        for name, path in paths.items()
    }


def _renumbered(parts: Iterable[str]) -> dict[str, str]:
    """New names of one module's submodules, if several classes share one sequence of numbers."""
    found = {part: match for part in parts if (match := _NUMBERED.fullmatch(part))}
    stems = {match.group(1) for match in found.values()}
    by_number = {int(match.group(2)): match.group(1) for match in found.values()}
    renamed = {part: part for part in parts}
    if len(stems) == 1 or len(by_number) < len(found):
        return renamed
    counts = dict.fromkeys(stems, 0)
    for number, stem in sorted(by_number.items()):
        renamed[f"{stem}_{number}"] = f"{stem}_{counts[stem]}"
        counts[stem] += 1
    return renamed


def is_image_model(tensors: Mapping[str, Any]) -> bool:
    """Whether parameters are an image ViT's; a video model without tubelets can look the same.

    Both have a kernel of one frame. A video model has a spatial stage, or more positions than a
    square frame; if their number is a square too, the user has to say that it is a video model.
    """
    kernel = tensors.get("embedding/kernel")
    if kernel is None or len(kernel.shape) != 4 or _stage(tensors) == "Spatial":
        return False
    table = tensors.get(f"{_stage(tensors)}Transformer/posembed_input/pos_embedding")
    tokens = 0 if table is None else table.shape[1] - ("cls" in tensors)
    return math.isqrt(tokens) ** 2 == tokens


def infer_config(
    path: Path,
    tensors: Mapping[str, Any],
    entries: Mapping[str, Any],
    settings: Settings,
    **execution: Any,
) -> tuple[VivitConfig, str, list[str]]:
    """The config of scenic parameters, the head they hold, and what was assumed.

    Names and shapes say most of it, `settings` must say the rest; ConfigError lists everything
    that is missing.
    """
    given = parse_settings(VivitConfig, settings)
    found, asked, notes = _read_off(path, tensors, given)
    # Without a class token the weights do not say which pooling it is.
    free = () if "cls" in (found["pooling"], given.get("pooling")) else ("pooling",)
    rows = tensors[f"{_stage(tensors)}Transformer/posembed_input/pos_embedding"].shape[1]
    hint = f"there are {rows} positions, for tubelets of {found['tubelet_size']}. "
    config = build_config(path, VivitConfig, found, given, asked, free=free, hint=hint, **execution)
    _check_positions(path, tensors, config)
    return config, "classification" if "output_projection/kernel" in tensors else "none", notes


def square_sizes(tensors: Mapping[str, Any], num_frames: int) -> dict[str, int]:
    """The sizes that scenic parameters leave open, for square frames, as scenic assumes them.

    `num_frames` is the length of a clip, which only a factorised encoder's parameters say. Empty if
    the positions fit no such clip.
    """
    names = ("embedding/kernel", f"{_stage(tensors)}Transformer/posembed_input/pos_embedding")
    kernel, table = (tuple(getattr(tensors.get(name), "shape", ())) for name in names)
    if len(table) != 3 or len(kernel) != 5 or kernel[1] != kernel[2]:
        return {}
    cls = any(name in tensors for name in ("cls", "cls_SpatialTransformer"))
    tokens, staged = table[1] - cls, bool(_stage(tensors))
    each, rest = divmod(tokens, 1 if staged else max(num_frames // kernel[0], 1))
    side = math.isqrt(each)
    if rest or side**2 != each:
        return {}
    sizes: dict[str, int] = {"image_size": side * kernel[1]}
    return sizes if staged else sizes | {"num_frames": num_frames}


def _check_positions(path: Path, tensors: Mapping[str, Any], config: VivitConfig) -> None:
    """ConfigError if a clip of the config's size has another number of tokens than positions.

    The weight table finds the wrong shapes too, but does not know which settings cause them.
    """
    time, height, width = config.grid
    if config.attention_type == "factorised_encoder":
        wanted = {"Spatial": height * width, "Temporal": time}
    else:
        wanted = {"": time * height * width}
    cls = int(config.pooling == "cls")
    for stage, tokens in wanted.items():
        name = f"{stage}Transformer/posembed_input/pos_embedding"
        if name in tensors and tensors[name].shape[1] != tokens + cls:
            sizes = ("num_frames", "num_sampled_frames", "image_size", "tubelet_size", "pooling")
            values = {size: getattr(config, size) for size in sizes}
            given = ", ".join(f"{size}={v}" for size, v in values.items() if v is not None)
            raise ConfigError(
                f"{path}: {name} holds {tensors[name].shape[1]} positions, expected {tokens + cls} "
                f"for {given}; give the sizes it was trained with (--config)"
            )


def _read_off(path: Path, tensors: Mapping[str, Any], given: Mapping[str, Any]):
    """(fields found in names and shapes, fields to ask for with examples, notes)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stage = _stage(tensors)
    block = f"{stage}Transformer/encoderblock_0/"
    timed = any("/MultiHeadDotProductAttention_time/" in name for name in shapes)
    attention = f"{block}MultiHeadDotProductAttention_{'time' if timed else '0'}/query/kernel"
    mlp = f"{block}MlpBlock{'' if timed else '_0'}/Dense_0/kernel"
    table = f"{stage}Transformer/posembed_input/pos_embedding"
    ranks = {attention: 3, mlp: 2, table: 3}
    # A partial stage is damage, not a model without the stage.
    staged = stage == "Spatial" and any(n.startswith(f"{_TEMPORAL}/") for n in shapes)
    temporal = f"{_TEMPORAL}/posembed_input/pos_embedding"
    ranks |= {temporal: 3} if staged else {}
    wrong = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]
    kernel = shapes.get("embedding/kernel", ())
    if wrong or len(kernel) not in (4, 5):
        what = ", ".join(wrong or ["embedding/kernel"])
        raise CheckpointError(
            f"{path} is not a scenic ViViT: no tensor of the right rank is named {what}"
        )
    cls = any(name in shapes for name in ("cls", "cls_SpatialTransformer", f"cls_{_TEMPORAL}"))
    found = {
        "num_channels": kernel[-2],
        "tubelet_size": ((1,) * (5 - len(kernel)) + kernel)[:3],
        "hidden_size": kernel[-1],
        "num_hidden_layers": _depth(shapes, stage),
        "num_attention_heads": shapes[attention][1],
        "intermediate_size": shapes[mlp][1],
        "pooling": "cls" if cls else "mean",
    }
    asked: dict[str, tuple[str, ...]] = {"image_size": ("224",)}
    notes: list[str] = []
    if not cls and "pooling" not in given:
        notes.append(
            "pooling=mean is assumed: there is no class token, and scenic's gmp and gsp have the "
            "same tensors (--config pooling=max or pooling=sum)"
        )
    if "output_projection/kernel" in shapes:
        found["num_labels"] = shapes["output_projection/kernel"][-1]
    elif "pre_logits/kernel" in shapes:
        found["pooler_output_size"] = shapes["pre_logits/kernel"][-1]
    if stage == "Spatial":
        found["attention_type"] = "factorised_encoder"
        if not staged:
            found["spatial_only"] = True
            notes.append(f"spatial_only=true: there is no {_TEMPORAL}")
        else:
            found["num_temporal_layers"] = _depth(shapes, "Temporal")
            frames = shapes[temporal][1] - cls
            if len(kernel) == 5:
                found["num_frames"] = frames * kernel[0]
            else:
                found["num_sampled_frames"] = frames
    elif timed:
        found["attention_type"] = "factorised_self_attention"
        asked["attention_order"] = ("time_space", "space_time")
    elif cls:
        found["attention_type"] = "joint"
    else:
        # Without a class token both variants have the same tensors.
        asked["attention_type"] = ("joint", "factorised_dot_product")
    if "num_frames" not in found:
        asked["num_frames"] = ("32",)
    if len(kernel) == 4 and "num_sampled_frames" not in found:
        asked["num_sampled_frames"] = ("8",)
    return found, asked, notes


def _stage(tensors: Mapping[str, Any]) -> str:
    return "Spatial" if any(n.startswith("SpatialTransformer/") for n in tensors) else ""


def _depth(shapes: Mapping[str, tuple[int, ...]], stage: str) -> int:
    return count_blocks(shapes, rf"{stage}Transformer/encoderblock_(\d+)/")


def check_function(config: VivitConfig, head: str = "none", pooler: bool = False) -> None:
    """ConfigError if scenic would compute something else than this config says."""
    wrong = {
        name: getattr(config, name)
        for name, fixed in _FIXED.items()
        if getattr(config, name) != fixed
        and not (name == "hidden_act" and config.hidden_act in _TANH_GELU)
        and (name != "pooler_act" or pooler)
    }
    if wrong:
        listed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        fixed = ", ".join(f"{name}={_FIXED[name]!r}" for name in wrong)
        raise ConfigError(
            f"a scenic checkpoint does not hold its config, and scenic computes {fixed}; this "
            f"model has {listed}. Write it in the hf layout, or, for a model that is not trained "
            "yet, set these fields with --config"
        )


def processor(config: VivitConfig, **fields: Any) -> Any:
    """scenic's training preprocessing: frames 32 pixels above the crop, 256 for 224, 288 for 256.

    `fields` replace those of pixel values.
    """
    height, width = config.frame_size
    return VideoProcessor.named(
        "vivit-scenic",
        size={"shortest_edge": min(height, width) + 32},
        crop_size={"height": height, "width": width},
        **fields,
    )


def write(directory: Path, tensors: Mapping[str, Any], container: str) -> Path:
    """Write parameters as the train state that scenic restores from; returns the file."""
    return write_msgpack(directory / FILE, train_state(tensors, container))


def train_state(tensors: Mapping[str, Any], container: str) -> dict[str, Any]:
    """Parameters as the train state that scenic restores from, at step 0."""
    # scenic reads all three; it writes an empty model_state for a model without state.
    state = {"global_step": np.int32(0), "rng": np.zeros(2, np.uint32), "model_state": {}}
    return state | {CONTAINERS[container] + name: tensor for name, tensor in tensors.items()}


SCENIC = Layout(
    name="scenic",
    tables={"vivit": scenic_vivit.TABLE},
    parameters=parameters,
    patch_kernels=("embedding/kernel",),
    # Without a patch embedding the file is damaged, and the table says what is missing.
    block_names=re.compile(r".*Transformer/encoderblock_"),
    infer_config=infer_config,
    square_sizes=square_sizes,
    processor=processor,
    normalised="to [-1, 1], as scenic does",
    check_function=check_function,
    file=SingleFile(FILE, RIVALS, CONTAINERS, write),
    state_depth=2,  # everything lies below one or two names, such as optimizer/state
)
