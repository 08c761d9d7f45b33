# SPDX-License-Identifier: Apache-2.0
"""VideoMAE as transformers writes it (VideoMAEModel, ...ForPreTraining, ...ForVideoClassification).

Dialects differ in the attention biases: "hub" has q_bias and v_bias (every published file, default
saves of transformers 4, 5.0 to 5.3 and from 5.18 on); "memory" has query.bias and value.bias
(save_original_format=False); "key_bias" adds a key.bias (default saves of 5.6 to 5.16). Cosine
attention and layer scale, which transformers refuses by the model_type, have the names it would
give them.
"""

from collections.abc import Collection

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import (
    HUB,
    attentive,
    blocks,
    dense,
    identify,
    norm,
    patch_embed,
)
from checkpoints_convert.tables.table import Names, Table
from vivit_jax.config import VideoMAEConfig

PREFIX = "videomae."
_LINEAR = {"query": f"{HUB['query']}.bias", "value": f"{HUB['value']}.bias"}
_BIASES = {
    "hub": {"query": "attention.attention.q_bias", "value": "attention.attention.v_bias"},
    "memory": _LINEAR,
    "key_bias": _LINEAR,
}
KEY_BIAS_REASON = (
    "a key bias adds the same number to all scores of a query, so it cannot change the softmax"
)


def rules(config: VideoMAEConfig, names: Names) -> list[Rule]:
    """The rules of a VideoMAE checkpoint.

    transformers has no pooler; it is named like the norm before its classifier.
    """
    head, prefix, pooler, dialect = names
    dst = "" if head == "none" else "backbone/"
    table = [
        *patch_embed(prefix, dst),
        *_blocks(config, f"{prefix}encoder.layer.{{i}}.", dst, dialect),
    ]
    if not config.use_mean_pooling:
        table += norm(f"{prefix}layernorm", f"{dst}ln_final")
    averages = config.use_mean_pooling and config.attentive_heads is None
    if pooler or (head == "classification" and averages):
        table += norm("fc_norm", "fc_norm")
    if head == "classification":
        table += attentive(config.attentive_heads)
        table += dense("classifier", "head") if config.num_labels else []
    if head == "pretraining":
        table += [
            *dense("encoder_to_decoder", "to_decoder", bias=False),
            Rule("mask_token", "mask_token"),
            *_blocks(config.decoder(), "decoder.decoder_layers.{i}.", "decoder/", dialect),
            *norm("decoder.norm", "decoder/ln_final"),
            *dense("decoder.head", "decoder/head"),
        ]
    return table


def names_in(tensors: Collection[str], head: str | None) -> Names:
    """The names of a checkpoint with these tensors; `head` is that of its config.json."""
    dialect = "hub"
    if any(name.endswith(".attention.key.bias") for name in tensors):
        dialect = "key_bias"
    elif any(name.endswith(".attention.query.bias") for name in tensors):
        dialect = "memory"
    return identify(tensors, head, PREFIX, "fc_norm.", dialect)


TABLE = Table(rules, names_in, PREFIX, ("classification", "pretraining"), "hub")


def _blocks(config: VideoMAEConfig, src: str, dst: str, dialect: str) -> list[Rule]:
    layers, ours = config.num_hidden_layers, dst + "layers_{i}/"
    own = []
    if config.cosine_attention:
        own.append(Rule(f"{src}attention.attention.scale", f"{ours}attention/scale", layers=layers))
    if config.layer_scale_init > 0:
        own.append(Rule(f"{src}lambda_1", f"{ours}scale_attention", layers=layers))
        own.append(Rule(f"{src}lambda_2", f"{ours}scale_mlp", layers=layers))
    table = blocks(
        src,
        ours,
        layers=layers,
        heads=config.num_attention_heads,
        names=HUB,
        biases=_BIASES[dialect] if config.qkv_bias else {},
        own=own,
    )
    if dialect == "key_bias" and config.qkv_bias:
        table.append(Rule(f"{src}{HUB['key']}.bias", (), layers=layers, reason=KEY_BIAS_REASON))
    return table
