# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a forward pass takes, from the configuration alone."""

from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.models.products import Flops
from vivit_jax.models.registry import family_of

HEADS = ("classification", "pretraining", "none")


def forward_flops(
    config: Config,
    head: str = "classification",
    visible: int | None = None,
    decoded: int | None = None,
    *,
    all_tokens: bool = False,
) -> int:
    """Floating point operations of the matrix products of one clip's forward pass.

    Counted are the tubelet embedding, all projections, attention's scores and weighted sums, the
    MLPs, the decoder and the head, two operations per multiply-add: half of it is the "FLOPs" of
    most papers. Softmax, norms, activations, biases and residual sums are not counted; they add a
    few per cent. Exact for `attention` "xla" and "cudnn"; "chunked" pads the queries to equal
    blocks.

    The clip has the configured size. `head` is "classification", "pretraining" (VideoMAE) or "none"
    for the model alone, without ViViT's pooler. `visible` is how many tokens of a masked clip
    VideoMAE's encoder sees, for example 160 of 1568; pre-training needs it. `decoded` is how many
    tokens the decoder predicts, by default all that are masked; 784 with V2's dual masks.

    If a ViViT's last block is read at its class token only, it runs for that token alone;
    `all_tokens` counts all of them, as papers do and as asking for hidden states computes. Raises
    UserError for a head that the family lacks and for token counts that do not fit.
    """
    found = _flops(config, head, visible, decoded, all_tokens)
    return found.embedding + found.blocks + found.heads


def step_flops(
    config: Config,
    head: str = "classification",
    visible: int | None = None,
    decoded: int | None = None,
) -> int:
    """As `forward_flops`, for the loss and its gradient to all params.

    Every product has two in the backward pass, except the tubelet embedding, whose pixels get no
    gradient. Neither recomputation nor the optimizer is counted.
    """
    found = _flops(config, head, visible, decoded)
    return 2 * found.embedding + 3 * (found.blocks + found.heads)


def recomputed_flops(
    config: Config,
    head: str = "classification",
    visible: int | None = None,
    decoded: int | None = None,
) -> int:
    """The part of `forward_flops` that a training step computes twice, by `remat`.

    With "block" all products of the blocks, else none. Scores are not counted, which all attention
    but "xla" recomputes in its backward pass.
    """
    return _flops(config, head, visible, decoded).blocks if config.remat == "block" else 0


def _flops(
    config: Config,
    head: str,
    visible: int | None,
    decoded: int | None,
    all_tokens: bool = False,
) -> Flops:
    if head not in HEADS:
        raise UserError(f"head must be one of {list(HEADS)}, got {head!r}")
    if not config.has_pretraining and (
        head == "pretraining" or visible is not None or decoded is not None
    ):
        raise UserError(
            f"head {head!r} with visible={visible}, decoded={decoded} is for VideoMAEConfig, got "
            f"{type(config).__name__}; {config.title} has no masked pre-training: use "
            "head='classification' and visible=None"
        )
    return family_of(config).flops(config, head, visible, decoded, all_tokens)
