# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic a forward pass takes, from the configuration alone."""

import math

from vivit_jax.config import Config, VideoMAEConfig, VivitConfig
from vivit_jax.errors import UserError

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

    The last block of a ViViT that reads only its class token runs for that token alone;
    `all_tokens` counts all of them as papers do, and as asking for hidden states computes. Raises
    UserError for a head that the family lacks and for token counts that do not fit.
    """
    if head not in HEADS:
        raise UserError(f"head must be one of {list(HEADS)}, got {head!r}")
    if isinstance(config, VivitConfig):
        if head == "pretraining" or visible is not None or decoded is not None:
            raise UserError(
                f"head {head!r} with visible={visible}, decoded={decoded} is for VideoMAEConfig, "
                "got VivitConfig; ViViT has no masked pre-training: use head='classification' and "
                "visible=None"
            )
        flops = _embedding(config, config.num_tokens) + _vivit_blocks(config, head, all_tokens)
    else:
        _check_mask(config, head, visible, decoded)
        tokens = config.num_tokens if visible is None else visible
        flops = _embedding(config, tokens) + _joint_blocks(config, config.num_hidden_layers, tokens)
    if head == "classification":
        return flops + _product(1, config.hidden_size, config.num_labels)
    if head == "pretraining":
        decoder = config.decoder()
        decoded = config.num_tokens - visible if decoded is None else decoded
        flops += _product(visible, config.hidden_size, decoder.hidden_size)
        flops += _joint_blocks(decoder, decoder.num_hidden_layers, visible + decoded)
        flops += _product(decoded, decoder.hidden_size, config.patch_values)
    return flops


def step_flops(
    config: Config,
    head: str = "classification",
    visible: int | None = None,
    decoded: int | None = None,
) -> int:
    """As `forward_flops`, of the loss and its gradient to all params.

    Every product has two in the backward pass, but for the tubelet embedding, whose pixels get no
    gradient. What is computed again instead of kept is not counted, nor is the optimizer.
    """
    flops = forward_flops(config, head, visible, decoded)
    tokens = config.num_tokens if visible is None else visible
    return 3 * flops - _embedding(config, tokens)


def recomputed_flops(
    config: Config,
    head: str = "classification",
    visible: int | None = None,
    decoded: int | None = None,
) -> int:
    """What of `forward_flops` a training step computes again instead of keeping it, by `remat`.

    With "block" all products of the blocks, else none. Not counted are the scores, which all
    attention but "xla" computes again in its backward pass.
    """
    if config.remat != "block":
        return 0
    flops = forward_flops(config, head, visible, decoded)
    flops -= _embedding(config, config.num_tokens if visible is None else visible)
    if head == "classification":
        flops -= _product(1, config.hidden_size, config.num_labels)
    if head == "pretraining":
        width = config.decoder().hidden_size
        decoded = config.num_tokens - visible if decoded is None else decoded
        flops -= _product(visible, config.hidden_size, width)
        flops -= _product(decoded, width, config.patch_values)
    return flops


def _vivit_blocks(config: VivitConfig, head: str, all_tokens: bool) -> int:
    t, h, w = config.grid
    layers, tokens, has_cls = config.num_hidden_layers, config.num_tokens, config.pooling == "cls"
    # What the last block of a stage is read for: a frame's class token, the classifier's.
    of_frame = 1 if has_cls and not all_tokens else None
    of_clip = of_frame if head == "classification" else None
    if config.attention_type == "factorised_encoder":
        flops = t * _joint_blocks(config, layers, has_cls + h * w, of_frame)
        if not config.spatial_only:
            flops += _joint_blocks(config, config.num_temporal_layers, has_cls + t, of_clip)
        return flops
    # Every token attends to those of its place in every frame and to those of its frame.
    keys = t + h * w
    if config.attention_type == "factorised_self_attention":
        return layers * _block(config, tokens, keys * _attended_width(config), attention_layers=2)
    if config.attention_type == "factorised_dot_product":
        return layers * _block(config, tokens, keys * (_attended_width(config) // 2))
    return _joint_blocks(config, layers, has_cls + tokens, of_clip)


def _joint_blocks(config, layers: int, tokens: int, num_queries: int | None = None) -> int:
    d, a, f = config.hidden_size, _attended_width(config), config.intermediate_size
    block = _block(config, tokens, tokens * a)
    if num_queries is None or not layers:
        return layers * block
    # Keys and values of all tokens; queries, output projection and MLP of those that are read.
    last = 2 * _product(tokens, d, a)
    last += 2 * _product(num_queries, d, a) + 2 * _product(num_queries, d, f)
    return (layers - 1) * block + last + 2 * (2 * num_queries * tokens * a)


def _attended_width(config) -> int:
    """Width of all heads together: hidden_size, unless heads have a width of their own."""
    return config.num_attention_heads * config.head_width


def _block(config, tokens: int, attended: int, attention_layers: int = 1) -> int:
    """One block; `attended` is keys times width, what one query reads of keys and again of values.

    Query, key, value and output projections for each attention layer, then one MLP.
    """
    d, f = config.hidden_size, config.intermediate_size
    projections = attention_layers * 4 * _product(tokens, d, _attended_width(config))
    return projections + 2 * (2 * tokens * attended) + 2 * _product(tokens, d, f)


def _embedding(config, tokens: int) -> int:
    return _product(tokens, math.prod(config.tubelet) * config.num_channels, config.hidden_size)


def _product(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _check_mask(
    config: VideoMAEConfig, head: str, visible: int | None, decoded: int | None
) -> None:
    if decoded is not None and (head != "pretraining" or not 1 <= decoded <= config.num_tokens):
        raise UserError(
            f"decoded must be from 1 to {config.num_tokens} tokens with head 'pretraining', got "
            f"{decoded!r} with head {head!r}; it is mask.predicted.shape[1]"
        )
    if visible is None and head != "pretraining":
        return
    # Pre-training needs something to predict.
    most = config.num_tokens - (head == "pretraining")
    if visible is None or not 1 <= visible <= most:
        raise UserError(
            f"visible must be from 1 to {most} of {config.num_tokens} tokens for head {head!r}, "
            f"got {visible!r}; it is mask.visible.shape[1]"
        )
