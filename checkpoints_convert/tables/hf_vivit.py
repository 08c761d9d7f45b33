# SPDX-License-Identifier: Apache-2.0
"""ViViT as transformers writes it (reference: VivitModel, VivitForVideoClassification).

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
    layer, names = _SPELLING[dialect]
    dst = "" if head == "none" else "backbone/"
    qkv = ("query", "key", "value") if config.qkv_bias else ()
    table = [
        *patch_embed(prefix, dst),
        Rule(f"{prefix}embeddings.cls_token", f"{dst}cls"),
        Rule(f"{prefix}embeddings.position_embeddings", f"{dst}pos_embed"),
        *blocks(
            prefix + layer,
            dst + "layers_{i}/",
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            names=names,
            biases={name: f"{names[name]}.bias" for name in qkv},
        ),
        *norm(f"{prefix}layernorm", f"{dst}ln_final"),
    ]
    if pooler:
        table += dense(f"{prefix}pooler.dense", f"{dst}pooler")
    if head == "classification":
        table += dense("classifier", "head")
    return table


def dialect_of(names) -> str:
    """The dialect in which these tensor names are spelt."""
    return "memory" if any(".attention.q_proj." in name for name in names) else "hub"
