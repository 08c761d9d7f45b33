# SPDX-License-Identifier: Apache-2.0
"""ViViT as transformers writes it (reference: VivitModel, VivitForVideoClassification).

What transformers does not have is spelt in the same way: `spatial.` and `temporal.` before the two
stages of a factorised encoder, `_time` and `_space` after the attention layers of a block that has
two.

Dialects: "hub", the names of published files and of every default save; "memory", the names that
transformers 5 writes with save_original_format=False.
"""

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import HUB, MEMORY, blocks, dense, norm, patch_embed
from vivit_jax.config import VivitConfig

PREFIX = "vivit."
_SPELLING = {"hub": ("encoder.layer.{i}.", HUB), "memory": ("layers.{i}.", MEMORY)}
DIALECTS = tuple(_SPELLING)


def rules(
    config: VivitConfig, *, head: str, prefix: str, dialect: str = "hub", pooler: bool = False
) -> list[Rule]:
    """The table of a ViViT checkpoint; `head` is "classification" or "none"."""
    dst = "" if head == "none" else "backbone/"
    table = patch_embed(prefix, dst)
    if config.attention_type == "factorised_encoder":
        # Every stage is spelt like a model of its own.
        layers = {"spatial": config.num_hidden_layers, "temporal": config.temporal_layers}
        for stage in filter(layers.get, layers):
            table += _encoder(
                config, f"{prefix}{stage}.", f"{dst}{stage}/", dialect, layers=layers[stage]
            )
    else:
        table += _encoder(config, prefix, dst, dialect, layers=config.num_hidden_layers)
    if pooler:
        table += dense(f"{prefix}pooler.dense", f"{dst}pooler")
    if head == "classification":
        table += dense("classifier", "head")
    return table


def _encoder(config: VivitConfig, src: str, dst: str, dialect: str, *, layers: int) -> list[Rule]:
    layer, names = _SPELLING[dialect]
    qkv = ("query", "key", "value") if config.qkv_bias else ()
    split = config.attention_type == "factorised_self_attention"
    table = [Rule(f"{src}embeddings.position_embeddings", f"{dst}pos_embed")]
    if config.pooling == "cls":
        table.append(Rule(f"{src}embeddings.cls_token", f"{dst}cls"))
    return [
        *table,
        *blocks(
            src + layer,
            dst + "layers_{i}/",
            layers=layers,
            heads=config.num_attention_heads,
            names=names,
            biases={name: f"{names[name]}.bias" for name in qkv},
            over=("_time", "_space") if split else ("",),
        ),
        *norm(f"{src}layernorm", f"{dst}ln_final"),
    ]


def dialect_of(names) -> str:
    """The dialect in which these tensor names are spelt."""
    return "memory" if any(".q_proj." in name for name in names) else "hub"
