# SPDX-License-Identifier: Apache-2.0
"""ViViT as transformers writes it (reference: VivitModel, VivitForVideoClassification).

Parts that transformers does not have are named alike: the temporal stage of a factorised encoder as
a model of its own below `temporal.`, and `_time` and `_space` after the names of a block's two
attention layers. The spatial stage has the plain names, so that transformers' ViViT class, forced
to open such a file, fails at the shape of the positions.

Dialects: "hub", the names of published files and of every default save; "memory", the names that
transformers 5 writes with save_original_format=False.
"""

from collections.abc import Collection

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import (
    CONV2D,
    HUB,
    MEMORY,
    attentive,
    blocks,
    dense,
    identify,
    norm,
    patch_embed,
)
from checkpoints_convert.tables.table import Names, Table
from vivit_jax.config import VivitConfig

PREFIX = "vivit."
# By dialect: the names of a block and those of its modules.
_BLOCKS = {"hub": ("encoder.layer.{i}.", HUB), "memory": ("layers.{i}.", MEMORY)}


def rules(config: VivitConfig, names: Names) -> list[Rule]:
    """The rules of a ViViT checkpoint."""
    head, prefix, pooler, dialect = names
    dst = "" if head == "none" else "backbone/"
    table = patch_embed(prefix, dst)
    staged = config.attention_type == "factorised_encoder"
    stage = f"{dst}spatial/" if staged else dst
    table += _encoder(config, prefix, stage, dialect, layers=config.num_hidden_layers)
    if config.temporal_layers:
        src, layers = f"{prefix}temporal.", config.temporal_layers
        table += _encoder(config, src, f"{dst}temporal/", dialect, layers=layers)
    if pooler:
        table += dense(f"{prefix}pooler.dense", f"{dst}pooler")
    if head == "classification":
        table += attentive(config.attentive_heads)
        table += dense("classifier", "head") if config.num_labels else []
    return table


def image_rules(config: VivitConfig, prefix: str, dialect: str) -> list[Rule]:
    """The table of transformers' image ViT, read as a headless ViViT of one frame."""
    left_out = {
        "the image model's classifier": ("classifier",),
        "the image model's pooling layer": (f"{prefix}pooler.dense",),
    }
    return [
        *patch_embed(prefix, "", CONV2D),
        *_encoder(config, prefix, "", dialect, layers=config.num_hidden_layers),
        *(
            Rule(f"{name}.{leaf}", (), reason=reason)
            for reason, names in left_out.items()
            for name in names
            for leaf in ("weight", "bias")
        ),
        Rule(f"{prefix}embeddings.mask_token", (), reason="the image model's mask token"),
    ]


def _encoder(config: VivitConfig, src: str, dst: str, dialect: str, *, layers: int) -> list[Rule]:
    layer, names = _BLOCKS[dialect]
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


def names_in(tensors: Collection[str], head: str | None) -> Names:
    """The names of a checkpoint with these tensors; `head` is that of its config.json."""
    return identify(tensors, head, PREFIX, "{prefix}pooler.", dialect_of(tensors))


def dialect_of(tensors: Collection[str]) -> str:
    """The dialect of these tensor names."""
    return "memory" if any(".q_proj." in name for name in tensors) else "hub"


TABLE = Table(rules, names_in, PREFIX, ("classification",), "hub")
