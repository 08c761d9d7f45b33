# SPDX-License-Identifier: Apache-2.0
"""The image ViT as timm writes it (VisionTransformer), read as a headless ViViT of one frame."""

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import CONV2D, norm
from checkpoints_convert.tables.timm_block import blocks, fused_bias
from vivit_jax.config import VivitConfig


def image_rules(config: VivitConfig) -> list[Rule]:
    """The table; query, key and value share one tensor."""
    src, dst = "blocks.{i}.", "layers_{i}/"
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    biases = [fused_bias(src, dst, layers=layers, heads=heads)] if config.qkv_bias else []
    table = [
        Rule("patch_embed.proj.weight", "patch_embed/kernel", CONV2D),
        Rule("patch_embed.proj.bias", "patch_embed/bias"),
        Rule("pos_embed", "pos_embed"),
        *blocks(src, dst, layers=layers, heads=heads, vectors=biases),
        *norm("norm", "ln_final"),
    ]
    if config.pooling == "cls":
        table.append(Rule("cls_token", "cls"))
    reason = "the image model's classifier"
    return table + [Rule(f"head.{leaf}", (), reason=reason) for leaf in ("weight", "bias")]
