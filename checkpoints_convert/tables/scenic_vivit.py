# SPDX-License-Identifier: Apache-2.0
"""ViViT as scenic names it, and the image ViT whose names scenic shares (vision_transformer).

Names are the '/'-joined paths below the container of the parameters;
`checkpoints_convert.layouts.scenic` strips that. Kernels already have our shapes, but an
image kernel has no time axis.
"""

from collections.abc import Collection

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import attentive
from checkpoints_convert.tables.table import Names, Table
from vivit_jax.config import VivitConfig

_IMAGE_KERNEL = "h w c d -> 1 h w c d"


def rules(config: VivitConfig, names: Names) -> list[Rule]:
    """The rules of a ViViT checkpoint; the pooler is scenic's `representation_size`."""
    dst = "" if names.head == "none" else "backbone/"
    table = _dense("embedding", f"{dst}patch_embed")
    if config.num_sampled_frames is not None:
        table[0] = Rule("embedding/kernel", f"{dst}patch_embed/kernel", _IMAGE_KERNEL)
    if config.attention_type == "factorised_encoder":
        table += _encoder(config, "Spatial", f"{dst}spatial/", config.num_hidden_layers)
        if config.temporal_layers:
            table += _encoder(config, "Temporal", f"{dst}temporal/", config.temporal_layers)
    else:
        table += _encoder(config, "", dst, config.num_hidden_layers)
    if names.pooler:
        table += _dense("pre_logits", f"{dst}pooler")
    if names.head == "classification":
        table += [*attentive(config.attentive_heads), *_dense("output_projection", "head")]
    return table


def names_in(tensors: Collection[str], head: str | None = None) -> Names:
    """The names of a checkpoint with these tensors, which alone say the head."""
    if "output_projection/kernel" in tensors:
        return Names("classification")
    return Names("none", pooler="pre_logits/kernel" in tensors)


TABLE = Table(rules, names_in)


def image_rules(config: VivitConfig) -> list[Rule]:
    """The table of an image ViT, read as a headless ViViT of one frame."""
    kernel = Rule("embedding/kernel", "patch_embed/kernel", _IMAGE_KERNEL)
    left_out = {
        "the image model's classifier": ("head", "output_projection"),
        "the image model's hidden layer before its classifier": ("pre_logits",),
    }
    return [
        kernel,
        Rule("embedding/bias", "patch_embed/bias"),
        *_encoder(config, "", "", config.num_hidden_layers),
        *(
            Rule(f"{name}/{leaf}", (), reason=reason)
            for reason, names in left_out.items()
            for name in names
            for leaf in ("kernel", "bias")
        ),
    ]


def _encoder(config: VivitConfig, stage: str, dst: str, layers: int) -> list[Rule]:
    """One Transformer, SpatialTransformer or TemporalTransformer and its class token."""
    src, block = f"{stage}Transformer", f"{stage}Transformer/encoderblock_{{i}}"
    ours = f"{dst}layers_{{i}}"
    table = [Rule(f"{src}/posembed_input/pos_embedding", f"{dst}pos_embed")]
    if config.pooling == "cls":
        table.append(Rule(f"cls_{src}" if stage else "cls", f"{dst}cls"))
    if config.attention_type == "factorised_self_attention":
        # scenic names these by what they do, and then the MLP without a number.
        attention = {f"_{axis}": (f"_{axis}", f"_{axis}") for axis in ("time", "space")}
        norm_mlp, mlp = "LayerNorm_mlp", "MlpBlock"
    else:
        attention = {"": ("_0", "_0")}
        norm_mlp, mlp = "LayerNorm_1", "MlpBlock_0"
    for suffix, (norm, layer) in attention.items():
        name = f"{block}/MultiHeadDotProductAttention{layer}"
        table += _norm(f"{block}/LayerNorm{norm}", f"{ours}/ln_attention{suffix}", layers=layers)
        for part in ("query", "key", "value", "out"):
            bias = part == "out" or config.qkv_bias
            table += _dense(
                f"{name}/{part}", f"{ours}/attention{suffix}/{part}", bias, layers=layers
            )
    return [
        *table,
        *_norm(f"{block}/{norm_mlp}", f"{ours}/ln_mlp", layers=layers),
        *_dense(f"{block}/{mlp}/Dense_0", f"{ours}/mlp_in", layers=layers),
        *_dense(f"{block}/{mlp}/Dense_1", f"{ours}/mlp_out", layers=layers),
        *_norm(f"{src}/encoder_norm", f"{dst}ln_final"),
    ]


def _dense(src: str, dst: str, bias: bool = True, layers: int | None = None) -> list[Rule]:
    parts = ("kernel", "bias") if bias else ("kernel",)
    return [Rule(f"{src}/{part}", f"{dst}/{part}", layers=layers) for part in parts]


def _norm(src: str, dst: str, layers: int | None = None) -> list[Rule]:
    return [Rule(f"{src}/{part}", f"{dst}/{part}", layers=layers) for part in ("scale", "bias")]
