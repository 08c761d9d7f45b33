# SPDX-License-Identifier: Apache-2.0
"""Rules of one transformer block with timm's names, which VideoMAE's authors share."""

from collections.abc import Sequence

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.hf_block import dense, norm

_QKV = ("query", "key", "value")


def blocks(
    src: str,
    dst: str,
    *,
    layers: int,
    heads: int,
    own: Sequence[Rule] = (),
    vectors: Sequence[Rule] = (),
) -> list[Rule]:
    """All blocks under `src` (ends in 'blocks.{i}.') and `dst` (ends in 'layers_{i}/').

    `own` are the rules of a block's own parameters, `vectors` those of its attention; a torch state
    dict lists both before the modules inside. Query, key and value share one tensor.
    """
    sizes = {"n": heads}
    kernels = tuple(f"{dst}attention/{part}/kernel" for part in _QKV)
    return [
        *own,
        *norm(f"{src}norm1", f"{dst}ln_attention", layers=layers),
        *vectors,
        Rule(f"{src}attn.qkv.weight", kernels, "(s n e) d -> s d n e", layers, sizes),
        Rule(
            f"{src}attn.proj.weight",
            f"{dst}attention/out/kernel",
            "d (n e) -> n e d",
            layers,
            sizes,
        ),
        Rule(f"{src}attn.proj.bias", f"{dst}attention/out/bias", layers=layers),
        *norm(f"{src}norm2", f"{dst}ln_mlp", layers=layers),
        *dense(f"{src}mlp.fc1", f"{dst}mlp_in", layers=layers),
        *dense(f"{src}mlp.fc2", f"{dst}mlp_out", layers=layers),
    ]


def fused_bias(src: str, dst: str, *, layers: int, heads: int) -> Rule:
    """The fused bias of query, key and value, which not every model has."""
    biases = tuple(f"{dst}attention/{part}/bias" for part in _QKV)
    sizes = {"n": heads}
    return Rule(f"{src}attn.qkv.bias", biases, "(s n e) -> s n e", layers=layers, sizes=sizes)
