# SPDX-License-Identifier: Apache-2.0
"""Rules of one transformer block, shared by the tables with HuggingFace names."""

from collections.abc import Collection, Mapping, Sequence

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.table import Names

DENSE = "o i -> i o"
CONV3D = "o c t h w -> t h w c o"
CONV2D = "o c h w -> 1 h w c o"
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

# What the names of each head's own tensors begin with.
_HEADS = {
    "classification": ("classifier.",),
    "pretraining": ("decoder.", "encoder_to_decoder.", "mask_token"),
}


def dense(src: str, dst: str, bias: bool = True, layers: int | None = None) -> list[Rule]:
    """A torch Linear and our kernel [in, out]."""
    rules = [Rule(f"{src}.weight", f"{dst}/kernel", DENSE, layers=layers)]
    return rules + ([Rule(f"{src}.bias", f"{dst}/bias", layers=layers)] if bias else [])


def attentive(heads: int | None) -> list[Rule]:
    """The pooling by a learned query before a classifier, which no other library has; [] without.

    It has the same names in every layout: a model that starts from another has it fresh.
    """
    if heads is None:
        return []
    src, dst, sizes = "attentive_pooler", "attentive", {"n": heads}
    kernels = [
        Rule(f"{src}.{name}.weight", f"{dst}/{name}/kernel", _HEADS_OUT, sizes=sizes)
        for name in ("key", "value")
    ]
    return [Rule(f"{src}.query", f"{dst}/query", _HEADS_BIAS, sizes=sizes), *kernels]


def norm(src: str, dst: str, layers: int | None = None) -> list[Rule]:
    """A torch LayerNorm and our scale and bias."""
    return [
        Rule(f"{src}.weight", f"{dst}/scale", layers=layers),
        Rule(f"{src}.bias", f"{dst}/bias", layers=layers),
    ]


def patch_embed(src: str, dst: str, pattern: str = CONV3D) -> list[Rule]:
    """A torch convolution whose stride is its kernel and our kernel [t, h, w, c, d]."""
    name = f"{src}embeddings.patch_embeddings.projection"
    return [
        Rule(f"{name}.weight", f"{dst}patch_embed/kernel", pattern),
        Rule(f"{name}.bias", f"{dst}patch_embed/bias"),
    ]


def attention(
    src: str,
    dst: str,
    *,
    layers: int,
    heads: int,
    names: Mapping[str, str],
    biases: Mapping[str, str],
) -> list[Rule]:
    """One attention layer; `names` are its modules', `biases` those of its q, k and v biases."""
    sizes = {"n": heads}
    kernels = [
        Rule(f"{src}{names[ours]}.weight", f"{dst}/{ours}/kernel", _HEADS_OUT, layers, sizes)
        for ours in ("query", "key", "value")
    ]
    vectors = [
        Rule(f"{src}{theirs}", f"{dst}/{ours}/bias", _HEADS_BIAS, layers, sizes)
        for ours, theirs in biases.items()
    ]
    out = f"{src}{names['out']}"
    return [
        *kernels,
        *vectors,
        Rule(f"{out}.weight", f"{dst}/out/kernel", _HEADS_IN, layers, sizes),
        Rule(f"{out}.bias", f"{dst}/out/bias", layers=layers),
    ]


def blocks(
    src: str,
    dst: str,
    *,
    layers: int,
    heads: int,
    names: Mapping[str, str],
    biases: Mapping[str, str],
    over: tuple[str, ...] = ("",),
    own: Sequence[Rule] = (),
) -> list[Rule]:
    """All blocks under `src` (ends in '.{i}.') and `dst` (ends in 'layers_{i}/').

    `names` and `biases` are those of `attention`. If a block attends more than once, `over`
    lists the suffixes of each attention layer and its norm: "_time", "_space". `own` are rules of
    further parameters of a block, which come first.
    """
    rules = [*own]
    for suffix in over:
        named = {ours: _suffixed(theirs, suffix) for ours, theirs in names.items()}
        vectors = {ours: _suffixed(theirs, suffix) for ours, theirs in biases.items()}
        rules += norm(f"{src}layernorm_before{suffix}", f"{dst}ln_attention{suffix}", layers=layers)
        rules += attention(
            src,
            f"{dst}attention{suffix}",
            layers=layers,
            heads=heads,
            names=named,
            biases=vectors,
        )
    return [
        *rules,
        *norm(f"{src}layernorm_after", f"{dst}ln_mlp", layers=layers),
        *dense(f"{src}{names['mlp_in']}", f"{dst}mlp_in", layers=layers),
        *dense(f"{src}{names['mlp_out']}", f"{dst}mlp_out", layers=layers),
    ]


def identify(
    tensors: Collection[str], head: str | None, prefix: str, pooler: str, dialect: str
) -> Names:
    """The names of a checkpoint; `prefix` may precede its backbone's, `pooler` its pooler's."""
    prefix = prefix if any(name.startswith(prefix) for name in tensors) else ""
    head = head or _head_of(tensors)
    pooled = head == "none" and any(n.startswith(pooler.format(prefix=prefix)) for n in tensors)
    return Names(head, prefix, pooled, dialect)


def _head_of(tensors: Collection[str]) -> str:
    for head, beginnings in _HEADS.items():
        if any(name.startswith(beginnings) for name in tensors):
            return head
    return "none"


def _suffixed(name: str, suffix: str) -> str:
    """attention.output.dense -> attention_time.output.dense."""
    first, _, rest = name.partition(".")
    return f"{first}{suffix}.{rest}"
