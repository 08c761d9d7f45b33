# SPDX-License-Identifier: Apache-2.0
"""The files of VideoMAE's authors: finds the parameters and infers the config from them.

V1 (MCG-NJU/VideoMAE) and V2 (OpenGVLab/VideoMAEv2) save a state dict under `model`, or, trained
with DeepSpeed, under `module`, and beside it the optimiser, the epoch, the script's arguments and a
moving average; published files may be the bare state dict. Other scripts save it under
`state_dict`, which is read but never written.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.files.torch_files import is_beside, write_state_dict
from checkpoints_convert.layouts.hf import predicts_as_published
from checkpoints_convert.layouts.infer import build_config, count_blocks
from checkpoints_convert.layouts.layout import Layout, SingleFile
from checkpoints_convert.layouts.state_dicts import USUAL, left_out, unwrapped
from checkpoints_convert.tables import videomae_authors as table
from vivit_jax.config import VideoMAEConfig
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import CheckpointError, ConfigError
from vivit_jax.typed import Settings, parse_settings

CONTAINERS = {"model": "model/", "module": "module/", "bare": ""}
FILE = "checkpoint.pth"
# Files that readers of a directory open first, or that make it ambiguous.
RIVALS = re.compile(r"checkpoint(_\d+)?|.*\.(pth|pt|npz|msgpack|safetensors)")
# Heads by width: the weights do not say them, and the authors' code has only these models.
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 640: 8}
_CLIP = {"num_frames": 16, "image_size": 224}  # of all their models
_LAYER_SCALE = 0.1
_EPS = 1e-6
# What the authors' code always computes, whatever the checkpoint holds.
_FUNCTION = {
    "hidden_act": "gelu",
    "layer_norm_eps": _EPS,
    "fc_norm_eps": _EPS,
    "decoder_norm_eps": _EPS,
}
_OF_THE_ENCODER = re.compile(r"(encoder\.)?(patch_embed|blocks)\.")


def parameters(path: Path, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters by the authors' names, and the names left out with the reason.

    Raises CheckpointError if there are none, if two names differ only in their prefixes, and for
    learned positions.
    """
    container = next((c for c in USUAL if any(n.startswith(c) for n in tensors)), "")
    candidates = tensors
    if not container:
        candidates = {name: t for name, t in tensors.items() if not is_beside(name, t)}
    found = unwrapped(path, candidates, container)
    if not any(map(_OF_THE_ENCODER.match, found)):
        raise CheckpointError(_nothing_found(path, tensors))
    learned = [found[name][0] for name in ("pos_embed", "encoder.pos_embed") if name in found]
    if learned:
        raise CheckpointError(
            f"{path} holds {', '.join(learned)}: learned positions (use_learnable_pos_emb) are not "
            "supported, VideoMAE here has the fixed sin-cos table of every published model"
        )
    return {plain: tensor for plain, (_, tensor) in found.items()}, left_out(tensors, found)


def _nothing_found(path: Path, tensors: Mapping[str, Any]) -> str:
    """The error for a file without parameters: what it holds, and where they are expected."""
    tops = dict.fromkeys(name.partition("/")[0] for name in tensors)
    names = [*tops][:8] + [f"{len(tops) - 8} more"] * (len(tops) > 8)
    elsewhere = next((name for name in tensors if name.endswith("patch_embed.proj.weight")), None)
    nested = f" Its patch embedding is {elsewhere}." if elsewhere else ""
    return (
        f"{path} holds {', '.join(names)}, and a VideoMAE of its authors is read from "
        f"{', '.join(c.removesuffix('/') for c in USUAL)} or from a file that is only the state "
        f"dict.{nested} Save the state dict of the model in one of these"
    )


def infer_config(
    path: Path,
    tensors: Mapping[str, Any],
    entries: Mapping[str, Any],
    settings: Settings,
    **execution: Any,
) -> tuple[VideoMAEConfig, str, list[str]]:
    """The config of the authors' parameters, the head they hold, and what was assumed.

    Names and shapes say most of it, the script's arguments among all `entries` say the clip, and
    the widths of the authors' models the heads. `settings` must say the rest; ConfigError lists it.
    """
    given, args = parse_settings(VideoMAEConfig, settings), script_arguments(entries)
    head, found = _read_off(path, tensors)
    heads = {"num_attention_heads": (found["hidden_size"], HEADS)}
    if head == "pretraining":
        heads["decoder_num_attention_heads"] = (found["decoder_hidden_size"], DECODER_HEADS)
    guessed = {"norm_pix_loss": True} if head == "pretraining" else {}
    if found["hidden_size"] in HEADS:
        guessed |= _CLIP
    guessed = {k: v for k, v in guessed.items() if k not in given and k not in args}
    known = {"layer_scale_init": _LAYER_SCALE}
    known |= {name: table[width] for name, (width, table) in heads.items() if width in table}
    examples = {name: _heads_of_64(width) for name, (width, _) in heads.items()}
    config = build_config(
        path,
        VideoMAEConfig,
        found,
        given,
        asked={
            name: (str(value),)
            for name, value in {**_CLIP, **examples}.items()
            if not any(name in said for said in (found, args, guessed, known))
        },
        assumed={**_FUNCTION, **known, **guessed, **args},
        hint=f"of its widths {', '.join(str(width) for width, _ in heads.values())} the authors' "
        f"models have {_widths(HEADS)}, and {_widths(DECODER_HEADS)} in the decoder. ",
        **execution,
    )
    notes = []
    if guessed:
        listed = ", ".join(f"{name}={_typed(value)}" for name, value in guessed.items())
        notes.append(f"{listed}: assumed, as in the authors' models (--config)")
    if "layer_scale_init" not in found and "layer_scale_init" not in given:
        notes.append(
            f"layer_scale_init={_LAYER_SCALE}: assumed, since trained factors do not say their "
            "initial value; it matters only for fresh weights (--config)"
        )
    return config, head, notes


def script_arguments(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config from the training script's arguments, if the file has them."""

    def said(name: str) -> Any:
        entry = entries.get(f"args/{name}")
        return None if entry is None or entry.shape else entry.read().item()

    frames, segments = said("num_frames"), said("num_segments") or 1
    fields = {
        "num_frames": frames * segments if type(frames) is type(segments) is int else None,
        "image_size": said("input_size"),
        "norm_pix_loss": said("normlize_target"),
    }
    kinds = {"norm_pix_loss": bool}
    return {name: v for name, v in fields.items() if type(v) is kinds.get(name, int)}


def _heads_of_64(width: int) -> int:
    """An example: the number of heads that divides the width with heads nearest to 64 wide."""
    divisors = (n for n in range(1, width + 1) if width % n == 0)
    return min(divisors, key=lambda n: abs(width / n - 64))


def _widths(known: Mapping[int, int]) -> str:
    return ", ".join(map(str, known))


def _read_off(path: Path, tensors: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(head, fields found in names and shapes)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    head, prefix, *_ = table.names_in(shapes)
    kernel = f"{prefix}patch_embed.proj.weight"
    mlp, decoder_mlp = f"{prefix}blocks.0.mlp.fc1.weight", "decoder.blocks.0.mlp.fc1.weight"
    ranks = {kernel: 5, mlp: 2}
    if head == "classification":
        ranks["head.weight"] = 2
    if head == "pretraining":
        ranks[decoder_mlp] = 2
    wrong = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]
    if wrong:
        raise CheckpointError(
            f"{path} is not a VideoMAE of its authors: no tensor of the right rank is named "
            f"{', '.join(wrong)}"
        )
    width, channels, frames, height, across = shapes[kernel]
    found = {
        "num_channels": channels,
        "tubelet_size": frames,
        "patch_size": height if height == across else (height, across),
        "hidden_size": width,
        "num_hidden_layers": count_blocks(shapes, rf"{re.escape(prefix)}blocks\.(\d+)\."),
        "intermediate_size": shapes[mlp][0],
        "qkv_bias": any(name.endswith(".attn.q_bias") for name in shapes),
        "use_mean_pooling": f"{prefix}norm.weight" not in shapes and head != "pretraining",
        "cosine_attention": any(name.endswith(".attn.scale") for name in shapes),
    }
    if not any(name.endswith(".gamma_1") for name in shapes):
        found["layer_scale_init"] = 0.0
    if head == "classification":
        found["num_labels"] = shapes["head.weight"][0]
    if head == "pretraining":
        found |= {
            "decoder_hidden_size": shapes[decoder_mlp][1],
            "decoder_num_hidden_layers": count_blocks(shapes, r"decoder\.blocks\.(\d+)\."),
            "decoder_intermediate_size": shapes[decoder_mlp][0],
        }
    for stage, blocks in (("", f"{prefix}blocks"), ("decoder_", "decoder.blocks")):
        scale = shapes.get(f"{blocks}.0.attn.scale")
        if scale:
            found[f"{stage}num_attention_heads"] = scale[0]
    return head, found


def config_differences(config: VideoMAEConfig, head: str, pooler: bool = False) -> dict[str, Any]:
    """What the authors' code computes, by field, for fields in which this config differs."""
    fixed = dict(_FUNCTION)
    if not pooler and (head != "classification" or not config.use_mean_pooling):
        del fixed["fc_norm_eps"]
    if head != "pretraining":
        del fixed["decoder_norm_eps"]
    if config.hidden_size in HEADS:
        fixed["num_attention_heads"] = HEADS[config.hidden_size]
    if head == "pretraining":
        fixed["use_mean_pooling"] = False
        if config.decoder_hidden_size in DECODER_HEADS:
            fixed["decoder_num_attention_heads"] = DECODER_HEADS[config.decoder_hidden_size]
        # Normalised tubelets do not depend on the statistics, and the authors define none for other
        # channels than RGB.
        pixels = config.num_channels == 3 and not config.norm_pix_loss
        if pixels and not predicts_as_published(config):
            fixed |= {"image_mean": None, "image_std": None}
    return {name: value for name, value in fixed.items() if getattr(config, name) != value}


def check_function(
    config: VideoMAEConfig, head: str, pooler: bool = False, beside: Path | None = None
) -> None:
    """ConfigError if the authors' code would compute something else than this config says.

    `beside` is the config.json that lies beside their checkpoint; without it the checkpoint is
    about to be written.
    """
    wrong = config_differences(config, head, pooler)
    if wrong:
        listed = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        computed = ", ".join(f"{name}={value!r}" for name, value in wrong.items())
        flags = " ".join(f"{name}={_typed(value)}" for name, value in wrong.items())
        if beside:
            raise ConfigError(
                f"{beside} says {listed}, and the code of VideoMAE's authors, whose checkpoint is "
                f"beside it, computes {computed}. Remove it if it belongs to another model, or "
                f"read it as the authors' model: --config {flags}"
            )
        raise ConfigError(
            f"a checkpoint of VideoMAE's authors does not hold its config, and their code computes "
            f"{computed}; this model has {listed}. Write it in the hf layout; or, for weights "
            "published by HuggingFace, which were converted from the authors' files, write them as "
            f"the authors' model: --config {flags}"
        )


def _typed(value: Any) -> str:
    """A value as `--config` takes it."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else f"{value}"


def processor(config: VideoMAEConfig) -> Any:
    """The authors' preprocessing, ImageNet's mean and std; None unless there are 3 channels."""
    if config.num_channels != 3:
        return None
    height, width = config.frame_size
    return VideoProcessor.named(
        "videomae-imagenet",
        size={"shortest_edge": min(height, width)},
        crop_size={"height": height, "width": width},
    )


def write(directory: Path, tensors: Mapping[str, Any], container: str) -> Path:
    """Write parameters as the authors save them, in their order; returns the file."""
    return write_state_dict(
        directory / FILE, tensors, CONTAINERS[container].removesuffix("/") or None
    )


VIDEOMAE_AUTHORS = Layout(
    name="videomae",
    tables={"videomae": table.TABLE},
    parameters=parameters,
    patch_kernels=("patch_embed.proj.weight",),
    block_names=re.compile(r"(.*[./])?blocks\.\d+\.attn\.q_bias$"),
    infer_config=infer_config,
    check_beside=check_function,
    processor=processor,
    normalised="by ImageNet's mean and std, as VideoMAE's authors do",
    check_function=check_function,
    file=SingleFile(FILE, RIVALS, CONTAINERS, write),
)
