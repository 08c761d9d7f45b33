# SPDX-License-Identifier: Apache-2.0
"""The part of a training step that an operation belongs to, by the name tracing gave it."""

import re

# Parts of the encoder and the decoder; the first pattern that a name matches counts.
_OF_STAGE = (
    ("attention", r"/(temporal_)?attention\b"),
    ("MLP", r"/mlp_(in|out)\b"),
    ("norms", r"/ln_\w+"),
)
_DRAWN = re.compile(r"threefry|_shuffle|random_|_uniform|_normal|bernoulli|permutation|rbg|gumbel")
_MODEL = re.compile(r"\bjvp\(\w")
PARTS = (
    "input pixels", "masks and random numbers", "patch embedding", "encoder attention",
    "encoder MLP", "encoder norms", "encoder, rest", "decoder attention", "decoder MLP",
    "decoder norms", "decoder, rest", "loss", "optimiser", "other",
)  # fmt: skip


def part_of(op_name: str) -> str:
    """One of PARTS, for an operation of a step made by `make_step`.

    A name says where in the traced function an operation comes from; a fusion has the name of one
    of its operations. "rest" is residual sums, stacks of layers, positions and projections to the
    decoder; "loss" includes the targets; operations without a name are "other".
    """
    if "jvp(" not in op_name and "layers/" not in op_name:
        if _DRAWN.search(op_name):
            return "masks and random numbers"
        outside = op_name.startswith(("jit(step)", "state."))
        return "optimiser" if outside else "input pixels" if "batch[" in op_name else "other"
    if "patch_embed" in op_name:
        return "patch embedding"
    stage = "decoder" if re.search(r"\b(to_)?decoder\b", op_name) else "encoder"
    for part, pattern in _OF_STAGE:
        if re.search(pattern, op_name):
            return f"{stage} {part}"
    if stage == "decoder" or re.search(r"\bbackbone\b|/layers/|/while/", op_name):
        return f"{stage}, rest"
    if _DRAWN.search(op_name):
        return "masks and random numbers"
    if _MODEL.search(op_name) or "transpose(" in op_name:
        return "loss"  # pixels get no gradient
    return "input pixels"
