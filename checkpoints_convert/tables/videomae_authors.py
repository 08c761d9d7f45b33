# SPDX-License-Identifier: Apache-2.0
"""VideoMAE as its authors write it: V1 (MCG-NJU/VideoMAE) and V2 (OpenGVLab/VideoMAEv2).

The order of the rules is that of the authors' state dicts.
`checkpoints_convert.layouts.videomae_authors` strips the containers around the parameters and the
prefixes of their names.
"""

from collections.abc import Collection

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import CONV3D, attentive, dense, norm
from checkpoints_convert.tables.table import Names, Table
from checkpoints_convert.tables.timm_block import blocks
from vivit_jax.config import VideoMAEConfig

PREFIX = "encoder."
_PRETRAINING = ("mask_token", "encoder_to_decoder.", "decoder.")


def rules(config: VideoMAEConfig, names: Names) -> list[Rule]:
    """The rules of a VideoMAE checkpoint; the prefix is that of the encoder's names."""
    head, prefix, pooler, _ = names
    dst = "" if head == "none" else "backbone/"
    table = [Rule("mask_token", "mask_token")] if head == "pretraining" else []
    table += [
        Rule(f"{prefix}patch_embed.proj.weight", f"{dst}patch_embed/kernel", CONV3D),
        Rule(f"{prefix}patch_embed.proj.bias", f"{dst}patch_embed/bias"),
        *_blocks(config, f"{prefix}blocks.{{i}}.", f"{dst}layers_{{i}}/"),
    ]
    if not config.use_mean_pooling:
        table += norm(f"{prefix}norm", f"{dst}ln_final")
    if head == "pretraining":
        table += [
            *_blocks(config.decoder(), "decoder.blocks.{i}.", "decoder/layers_{i}/"),
            *norm("decoder.norm", "decoder/ln_final"),
            *dense("decoder.head", "decoder/head"),
            *dense("encoder_to_decoder", "to_decoder", bias=False),
        ]
    averages = config.use_mean_pooling and config.attentive_heads is None
    if pooler or (head == "classification" and averages):
        table += norm("fc_norm", "fc_norm")
    if head == "classification":
        table += attentive(config.attentive_heads)
        table += dense("head", "head")
    return table


def names_in(tensors: Collection[str], head: str | None = None) -> Names:
    """The names of a checkpoint with these tensors, which alone say the head."""
    if any(name.startswith(_PRETRAINING) for name in tensors):
        return Names("pretraining", PREFIX)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    if any(name.startswith("head.") for name in tensors):
        return Names("classification", prefix)
    return Names("none", prefix, any(name.startswith("fc_norm.") for name in tensors))


TABLE = Table(rules, names_in, PREFIX, ("pretraining",))


def _blocks(config: VideoMAEConfig, src: str, dst: str) -> list[Rule]:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    own, vectors = [], []
    if config.layer_scale_init:
        own.append(Rule(f"{src}gamma_1", f"{dst}scale_attention", layers=layers))
        own.append(Rule(f"{src}gamma_2", f"{dst}scale_mlp", layers=layers))
    if config.cosine_attention:
        scale = f"{dst}attention/scale"
        vectors.append(Rule(f"{src}attn.scale", scale, "n 1 1 -> n", layers=layers))
    for part in ("query", "value") if config.qkv_bias else ():
        name, bias = f"{src}attn.{part[0]}_bias", f"{dst}attention/{part}/bias"
        vectors.append(Rule(name, bias, "(n e) -> n e", layers=layers, sizes={"n": heads}))
    return blocks(src, dst, layers=layers, heads=heads, own=own, vectors=vectors)
