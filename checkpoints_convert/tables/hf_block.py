# SPDX-License-Identifier: Apache-2.0
"""Rows of one transformer block, shared by every table of HuggingFace names."""

from collections.abc import Mapping

from checkpoints_convert.rules import Rule

DENSE = "o i -> i o"
CONV3D = "o c t h w -> t h w c o"
_HEADS_OUT, _HEADS_BIAS, _HEADS_IN = "(n e) d -> d n e", "(n e) -> n e", "d (n e) -> n e d"

# Module names inside a block: published files, and what transformers 5 holds of ViViT in memory.
HUB = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
}
MEMORY = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}


def dense(src: str, dst: str, bias: bool = True, **options) -> list[Rule]:
    """A torch Linear and our kernel [in, out]."""
    rules = [Rule(f"{src}.weight", f"{dst}/kernel", DENSE, **options)]
    return rules + ([Rule(f"{src}.bias", f"{dst}/bias", **options)] if bias else [])


def norm(src: str, dst: str, **options) -> list[Rule]:
    """A torch LayerNorm and our scale and bias."""
    return [
        Rule(f"{src}.weight", f"{dst}/scale", **options),
        Rule(f"{src}.bias", f"{dst}/bias", **options),
    ]


def patch_embed(src: str, dst: str) -> list[Rule]:
    """A torch Conv3d whose stride is its kernel and our kernel [t, h, w, c, d]."""
    name = f"{src}embeddings.patch_embeddings.projection"
    return [
        Rule(f"{name}.weight", f"{dst}patch_embed/kernel", CONV3D),
        Rule(f"{name}.bias", f"{dst}patch_embed/bias"),
    ]


def blocks(
    src: str,
    dst: str,
    *,
    layers: int,
    heads: int,
    names: Mapping[str, str],
    biases: Mapping[str, str],
) -> list[Rule]:
    """All blocks under `src` (ends in '.{i}.') and `dst` (ends in 'layers_{i}/').

    `names` spells the modules, `biases` the query, key and value biases that exist.
    """
    each = {"layers": layers}
    split = each | {"sizes": {"n": heads}}
    rules = []
    for ours in ("query", "key", "value"):
        weight = f"{src}{names[ours]}.weight"
        rules.append(Rule(weight, f"{dst}attention/{ours}/kernel", _HEADS_OUT, **split))
    for ours, theirs in biases.items():
        rules.append(Rule(f"{src}{theirs}", f"{dst}attention/{ours}/bias", _HEADS_BIAS, **split))
    out = f"{src}{names['out']}"
    return [
        *norm(f"{src}layernorm_before", f"{dst}ln_attention", **each),
        *rules,
        Rule(f"{out}.weight", f"{dst}attention/out/kernel", _HEADS_IN, **split),
        Rule(f"{out}.bias", f"{dst}attention/out/bias", **each),
        *norm(f"{src}layernorm_after", f"{dst}ln_mlp", **each),
        *dense(f"{src}{names['mlp_in']}", f"{dst}mlp_in", **each),
        *dense(f"{src}{names['mlp_out']}", f"{dst}mlp_out", **each),
    ]
