# SPDX-License-Identifier: Apache-2.0
"""ViViT (Arnab et al. 2021) in its four forms, as in scenic; the joint one also as in HuggingFace.

Tokens are tubelets in (t, h, w) order. The four models arrange the same blocks in four ways
(section 3.3 of the paper; x is the input of the blocks):

    joint                      x [b, thw, d]   attention over all tokens
    factorised encoder         x [b, t, hw, d] attention over the frame, one token per frame;
                               x [b, t, d]     then attention over the frames
    factorised self-attention  x [b, t, hw, d] attention over time, attention over space, MLP
    factorised dot-product     x [b, t, hw, d] half of the heads over time, half over space

Parameters: `patch_embed`, then those of an `Encoder` (`cls`, `pos_embed`, `layers`, `ln_final`), at
the top or, in a factorised encoder, under `spatial` and `temporal`; `pooler`. The classifier holds
the model as `backbone` and adds `head`. With a class token the last block stays out of the scan,
because it may run for that token alone: `layers` has 11 of 12 blocks, `layers_11` is the last.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int

from vivit_jax.config import VivitConfig
from vivit_jax.layers.attention import SPACE, SPLIT_HEADS, TIME
from vivit_jax.layers.dropout import dropout, dropout_ids
from vivit_jax.layers.embed import TubeletEmbed, check_clip, resize_positions
from vivit_jax.layers.encoder import (
    LayerOutput,
    StackSpec,
    check_attention_mask,
    per_layer,
    run_blocks,
)
from vivit_jax.layers.explicit_axes import as_automatic
from vivit_jax.layers.linear import LayerNorm, Projection, at_least_float32, with_axes
from vivit_jax.layers.tubelets import PixelValues
from vivit_jax.masking import AnyArray, Grid
from vivit_jax.models import products
from vivit_jax.models.family import Family
from vivit_jax.models.head import AttentivePool, Labels, classify
from vivit_jax.outputs import ClassifierOutput, ModelOutput, asked_for, choose_states

_TIME, _SPACE = ("attention_time", TIME), ("attention_space", SPACE)


def stack_specs(config: VivitConfig) -> tuple[StackSpec, ...]:
    """The stack of blocks of each stage: one, or two in a factorised encoder."""
    layers, cls = config.num_hidden_layers, config.pooling == "cls"
    if config.attention_type == "factorised_self_attention":
        order = (_TIME, _SPACE) if config.attention_order == "time_space" else (_SPACE, _TIME)
        # scenic sets all four projections to zero instead, which no gradient ever changes.
        zero = ("attention_time",) if config.zero_init_temporal_attention else ()
        return (StackSpec(layers, order, zero_init=zero),)
    if config.attention_type == "factorised_dot_product":
        return (StackSpec(layers, (("attention", SPLIT_HEADS),)),)
    if config.attention_type == "factorised_encoder":
        spatial = StackSpec(layers, shared_dropout=True, unscanned_last=cls)
        temporal = StackSpec(config.temporal_layers, unscanned_last=cls)
        return (spatial, temporal) if config.temporal_layers else (spatial,)
    return (StackSpec(layers, unscanned_last=cls),)


class Encoder(nn.Module):
    """Class token, learned positions, blocks and the final norm over the tokens of a grid.

    x is [b, l, d] or [b, t, s, d]. `table` is the grid of the learned positions, `grid` that of x;
    if x has a frame axis and the grid one frame, every frame gets the same positions and its own
    class token. `pooled_only` computes only the class token, if there is one, in the last block.
    """

    config: VivitConfig
    spec: StackSpec
    table: Grid
    pooled_only: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "b *l d"],
        grid: Grid,
        head_mask: Float[AnyArray, "layers n"] | None,
        flags: dict[str, Any],
    ) -> tuple[Float[jax.Array, "b *q d"], LayerOutput]:
        config, d = self.config, x.shape[-1]
        param_dtype = jnp.dtype(config.param_dtype)
        zeros = nn.initializers.zeros
        with_cls = config.pooling == "cls"
        positions = self.param(
            "pos_embed",
            with_axes(zeros, (None, "length", "embed")),
            (1, with_cls + int(np.prod(self.table)), d),
            param_dtype,
        )
        x, positions = at_least_float32(x), at_least_float32(positions)
        patch_positions = resize_positions(positions[0, with_cls:], self.table, grid)
        positions = jnp.concatenate([positions[0, :with_cls], patch_positions]).astype(x.dtype)
        if with_cls:
            cls = self.param(
                "cls",
                with_axes(zeros, (None, None, "embed")),
                (1, 1, d),
                param_dtype,
            )
            cls = jnp.broadcast_to(cls.astype(x.dtype).reshape(-1), (*x.shape[:-2], 1, d))
            x = jnp.concatenate([cls, x], axis=-2)
        frames = x.shape[1:-2] if grid[0] > 1 else (1,) * (x.ndim - 3)
        x = x + positions.reshape(1, *frames, -1, d)
        shared = (1,) if self.spec.shared_dropout else ()
        x = dropout(self, x, config.hidden_dropout_prob, flags["clip_ids"], shared)
        x = x.astype(config.dtype)
        num_queries = 1 if self.pooled_only and self.spec.unscanned_last else None
        x, layers = run_blocks(config, self.spec, x, head_mask, num_queries=num_queries, **flags)
        return LayerNorm(config, config.layer_norm_eps, name="ln_final")(x), layers


def pool(
    config: VivitConfig, x: Float[jax.Array, "*b l d"], stage: str = "temporal"
) -> Float[jax.Array, "*b d"]:
    """One vector of a stage's tokens; means are not rounded."""
    if stage == "temporal" and config.spatial_only:
        return at_least_float32(x).mean(-2)  # frames have no class token
    if config.pooling == "cls":
        return x[..., 0, :]
    if config.pooling == "max":
        # The gradient of jnp.max searches for the maximum among values that XLA may have recomputed
        # with other rounding; if it finds none it is NaN.
        place = jnp.argmax(x, axis=-2, keepdims=True)
        return jnp.take_along_axis(x, place, axis=-2)[..., 0, :]
    x = at_least_float32(x)
    return x.mean(-2) if config.pooling == "mean" else x.sum(-2)


class VivitModel(nn.Module):
    """ViViT without a head; `add_pooling_layer` adds a dense layer on the pooled token.

    With `pooled_only`, which the classifier sets, the last block computes only the class token, if
    there is one, and last_hidden_state holds no other.
    """

    config: VivitConfig
    add_pooling_layer: bool = True
    pooled_only: bool = False

    @as_automatic
    @nn.compact
    def __call__(
        self,
        pixel_values: PixelValues,
        *,
        head_mask: Float[AnyArray, "*layers n"] | None = None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids: Int[AnyArray, " b"] | None = None,
        return_dict: bool = True,
    ) -> ModelOutput | tuple:
        """pixel_values [b, t, h, w, c] float -> last_hidden_state [b, tokens, d].

        Tokens are the class token, if there is one, and the tubelets; in a factorised encoder the
        class token and the frames. `head_mask` [n] or [layers, n] scales attention weights per head
        (0 silences a head); its rows for temporal layers follow those for spatial ones.
        `interpolate_pos_encoding` accepts any frame count and resolution of at least one tubelet.
        `deterministic=False` turns dropout on and needs rngs={"dropout": key}. Each clip drops by
        its id in `clip_ids` [b], by default 0, 1, ..., so a batch computed in parts drops what the
        whole batch does. `output_hidden_states` is a flag or, as in transformers, indices of hidden
        states (a tuple under jit); it and `output_attentions` default to the configuration's.
        `attention_mask` must be None: every token is attended to. Raises UserError for a clip of
        the wrong size, and for pixels that are not floats, such as frames before the processor.
        """
        config = self.config
        check_attention_mask(attention_mask)
        states, attentions = asked_for(config, output_hidden_states, output_attentions)
        grid = check_clip(config, pixel_values.shape, any_size=interpolate_pos_encoding)
        (t, h, w), (table_t, table_h, table_w) = grid, config.grid
        flags = dict(
            output_hidden_states=bool(states),
            output_attentions=attentions,
            clip_ids=dropout_ids(clip_ids, pixel_values.shape[0], deterministic),
        )
        stages = stack_specs(config)
        depth = sum(stage.num_layers for stage in stages)
        head_mask = per_layer(head_mask, depth, config.num_attention_heads)
        x = TubeletEmbed(config, name="patch_embed")(pixel_values)
        b, _, d = x.shape
        temporal_hidden = None
        if config.attention_type == "factorised_encoder":
            masks = (None,) * 2
            if head_mask is not None:
                masks = jnp.split(head_mask, [config.num_hidden_layers])
            table = (1, table_h, table_w)
            encoder = Encoder(config, stages[0], table, pooled_only=True, name="spatial")
            x, layers = encoder(x.reshape(b, t, h * w, d), (1, h, w), masks[0], flags)
            hidden, over_space, over_time = layers.hidden, layers.space, None
            x = pool(config, x, "spatial")
            if config.spatial_only:
                x = x.astype(config.dtype)
            else:
                table = (table_t, 1, 1)
                encoder = Encoder(config, stages[1], table, self.pooled_only, name="temporal")
                x, layers = encoder(x, (t, 1, 1), masks[1], flags)
                temporal_hidden, over_time = layers.hidden, layers.space
        else:
            encoder = Encoder(config, stages[0], config.grid, self.pooled_only)
            nn.share_scope(self, encoder)
            tokens = x if config.attention_type == "joint" else x.reshape(b, t, h * w, d)
            x, layers = encoder(tokens, grid, head_mask, flags)
            hidden, over_space, over_time = layers.hidden, layers.space, layers.time
            if config.attention_type != "joint":
                x = x.reshape(b, -1, d)
                hidden = hidden if hidden is None else hidden.reshape(-1, *x.shape)
        pooled = None
        if self.add_pooling_layer:
            shape = (config.hidden_size, config.pooler_output_size or config.hidden_size)
            dense = Projection(config, shape, ("embed", "pooled"), name="pooler")
            pooled = dense(pool(config, x), config.pooler_act)
        hidden = choose_states(hidden, states)
        out = ModelOutput(x, pooled, hidden, over_space, temporal_hidden, over_time)
        return out if return_dict else out.to_tuple()


class VivitForVideoClassification(nn.Module):
    """ViViT with a linear classifier on the pooled token after the final norm.

    With `attentive_heads` an `AttentivePool` of all tokens, the class token among them, takes the
    place of the pooled one.
    """

    config: VivitConfig

    @as_automatic
    @nn.compact
    def __call__(
        self,
        pixel_values: PixelValues,
        *,
        labels: Labels | None = None,
        head_mask: Float[AnyArray, "*layers n"] | None = None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids: Int[AnyArray, " b"] | None = None,
        return_dict: bool = True,
    ) -> ClassifierOutput | tuple:
        """As `VivitModel`; logits [b, classes]; labels add `loss`, see `classification_loss`."""
        config = self.config
        pooled = config.attentive_heads is None
        backbone = VivitModel(config, add_pooling_layer=False, pooled_only=pooled, name="backbone")
        out = backbone(
            pixel_values,
            head_mask=head_mask,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            deterministic=deterministic,
            clip_ids=clip_ids,
        )
        x = out.last_hidden_state
        x = pool(config, x) if pooled else AttentivePool(config, name="attentive")(x)
        loss, logits = classify(config, x, labels)
        out = ClassifierOutput(
            loss,
            logits,
            out.hidden_states,
            out.attentions,
            out.temporal_hidden_states,
            out.temporal_attentions,
        )
        return out if return_dict else out.to_tuple()


def flops(
    config: VivitConfig, head: str, visible: int | None, decoded: int | None, all_tokens: bool
) -> products.Flops:
    """The products of a forward pass; ViViT has no masks, so `visible` and `decoded` are None."""
    return products.Flops(
        products.embedding(config, config.num_tokens),
        _block_flops(config, head, all_tokens),
        products.classifier(config, head, _last_tokens(config)),
    )


def _block_flops(config: VivitConfig, head: str, all_tokens: bool) -> int:
    t, h, w = config.grid
    layers, tokens, has_cls = config.num_hidden_layers, config.num_tokens, config.pooling == "cls"
    # The tokens that the last block of a stage is read at: a frame's class token, the classifier's.
    of_frame = 1 if has_cls and not all_tokens else None
    read_there = head == "classification" and config.attentive_heads is None
    of_clip = of_frame if read_there else None
    if config.attention_type == "factorised_encoder":
        found = t * products.joint_blocks(config, layers, has_cls + h * w, of_frame)
        return found + products.joint_blocks(config, config.temporal_layers, has_cls + t, of_clip)
    # Every token attends to those of its place in every frame and to those of its frame.
    attended = (t + h * w) * products.attended_width(config)
    if config.attention_type == "factorised_self_attention":
        return layers * products.block(config, tokens, attended, attention_layers=2)
    if config.attention_type == "factorised_dot_product":
        return layers * products.block(config, tokens, attended // 2)
    return products.joint_blocks(config, layers, has_cls + tokens, of_clip)


def _last_tokens(config: VivitConfig) -> int:
    """The tokens of last_hidden_state."""
    t, h, w = config.grid
    if config.attention_type != "factorised_encoder":
        return t * h * w + (config.pooling == "cls")
    return t + (config.pooling == "cls" and not config.spatial_only)


FAMILY = Family(
    config=VivitConfig,
    models={"none": VivitModel, "classification": VivitForVideoClassification},
    stacks=stack_specs,
    flops=flops,
)
