# SPDX-License-Identifier: Apache-2.0
"""The image ViT as timm writes it (VisionTransformer), read as a headless ViViT of one frame."""

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import CONV2D, dense, norm
from vivit_jax.config import VivitConfig


def image_rules(config: VivitConfig) -> list[Rule]:
    """The table; query, key and value share one tensor."""
    src, dst, each = "blocks.{i}.", "layers_{i}/", {"layers": config.num_hidden_layers}
    split = each | {"sizes": {"n": config.num_attention_heads}}
    kernels, biases = (
        tuple(f"{dst}attention/{part}/{leaf}" for part in ("query", "key", "value"))
        for leaf in ("kernel", "bias")
    )
    table = [
        Rule("patch_embed.proj.weight", "patch_embed/kernel", CONV2D),
        Rule("patch_embed.proj.bias", "patch_embed/bias"),
        Rule("pos_embed", "pos_embed"),
        *norm(f"{src}norm1", f"{dst}ln_attention", **each),
        Rule(f"{src}attn.qkv.weight", kernels, "(s n e) d -> s d n e", **split),
        Rule(f"{src}attn.proj.weight", f"{dst}attention/out/kernel", "d (n e) -> n e d", **split),
        Rule(f"{src}attn.proj.bias", f"{dst}attention/out/bias", **each),
        *norm(f"{src}norm2", f"{dst}ln_mlp", **each),
        *dense(f"{src}mlp.fc1", f"{dst}mlp_in", **each),
        *dense(f"{src}mlp.fc2", f"{dst}mlp_out", **each),
        *norm("norm", "ln_final"),
    ]
    if config.pooling == "cls":
        table.append(Rule("cls_token", "cls"))
    if config.qkv_bias:
        table.append(Rule(f"{src}attn.qkv.bias", biases, "(s n e) -> s n e", **split))
    reason = "the image model's classifier"
    return table + [Rule(f"head.{leaf}", (), reason=reason) for leaf in ("weight", "bias")]
