# SPDX-License-Identifier: Apache-2.0
"""VideoMAE (Tong et al. 2022) and V2 (Wang et al. 2023): encoder, pre-training, classification.

Tokens are the tubelets in (t, h, w) order; there is no class token, and positions are a fixed
sin-cos table, which checkpoints do not hold. Parameters: `patch_embed`, `layers`, and `ln_final` if
`use_mean_pooling` is off; the heads hold the encoder as `backbone`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int

from vivit_jax.config import VideoMAEConfig
from vivit_jax.errors import UserError, counted
from vivit_jax.layers.dropout import dropout, dropout_ids
from vivit_jax.layers.embed import TubeletEmbed, check_clip, sincos_positions
from vivit_jax.layers.encoder import StackSpec, check_attention_mask, per_layer, run_blocks
from vivit_jax.layers.explicit_axes import as_automatic
from vivit_jax.layers.linear import LayerNorm, Projection, at_least_float32, with_axes
from vivit_jax.layers.tubelets import (
    CHANNELS_FIRST,
    FRAMES_FIRST,
    PixelValues,
    fastest_order,
    reordered,
    take_tokens,
)
from vivit_jax.masking import AnyArray, Grid, Mask
from vivit_jax.models import products
from vivit_jax.models.family import Family
from vivit_jax.models.head import AttentivePool, Labels, classify
from vivit_jax.models.losses import reconstruction_loss, reconstruction_targets
from vivit_jax.outputs import (
    ClassifierOutput,
    ModelOutput,
    PreTrainingOutput,
    asked_for,
    choose_states,
)


class VideoMAEModel(nn.Module):
    """The encoder; with a mask it embeds and computes only the visible tokens.

    `add_pooling_layer` adds `pooler_output`, the norm (`fc_norm`) of the mean of all tokens:
    VideoMAE V2's feature, and a classifier's input. It needs `use_mean_pooling`.
    """

    config: VideoMAEConfig
    add_pooling_layer: bool = False

    @as_automatic
    @nn.compact
    def __call__(
        self,
        pixel_values: PixelValues,
        *,
        mask: Mask | None = None,
        head_mask: Float[AnyArray, "*layers n"] | None = None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids: Int[AnyArray, " b"] | None = None,
        return_dict: bool = True,
    ) -> ModelOutput | tuple:
        """pixel_values [b, t, h, w, c] float -> last_hidden_state [b, l or visible, d].

        pixel_values may also be `vivit_jax.layers.tubelets.ByteClips`. `add_pooling_layer` adds
        pooler_output [b, d]. `mask` is what HuggingFace calls bool_masked_pos:
        `Mask.from_bool(bool_masked_pos)`. `head_mask` [n] or [layers, n] scales attention weights
        per head (0 silences a head). `interpolate_pos_encoding` accepts any frame count and
        resolution of at least one tubelet and recomputes the position table for that many tokens,
        as the authors do. `deterministic=False` turns dropout on and needs rngs={"dropout": key}.
        Each clip drops by its id in `clip_ids` [b], by default 0, 1, ..., so a batch computed in
        parts drops what the whole batch does. `output_hidden_states` is a flag or, as in
        transformers, indices of hidden states (a tuple under jit); it and `output_attentions`
        default to the configuration's. `attention_mask` must be None: every token is attended to.
        Raises UserError for a clip or a mask of the wrong size, and for pixels that are not floats,
        such as frames before the processor.
        """
        config = self.config
        if self.add_pooling_layer and not config.use_mean_pooling:
            raise UserError(
                "add_pooling_layer needs use_mean_pooling=True, got False: the model then ends in "
                "a norm of each token, and there is no norm of their mean"
            )
        check_attention_mask(attention_mask)
        states, attentions = asked_for(config, output_hidden_states, output_attentions)
        grid = check_clip(config, pixel_values.shape, any_size=interpolate_pos_encoding)
        visible = None
        if mask is not None:
            _check_mask(mask, pixel_values.shape[0], grid)
            visible = mask.visible
        x = TubeletEmbed(config, name="patch_embed")(pixel_values, visible)
        x = (x + _positions(x, grid, visible)).astype(config.dtype)
        x, layers = run_blocks(
            config,
            StackSpec(config.num_hidden_layers),
            x,
            per_layer(head_mask, config.num_hidden_layers, config.num_attention_heads),
            output_hidden_states=bool(states),
            output_attentions=attentions,
            clip_ids=dropout_ids(clip_ids, pixel_values.shape[0], deterministic),
        )
        if not config.use_mean_pooling:
            x = LayerNorm(config, config.layer_norm_eps, name="ln_final")(x)
        pooled = _mean_pooled(config, x) if self.add_pooling_layer else None
        out = ModelOutput(x, pooled, choose_states(layers.hidden, states), layers.space)
        return out if return_dict else out.to_tuple()


class VideoMAEDecoder(nn.Module):
    """Blocks of the decoder's width over its tokens; pixels of the last `num_predicted` tokens.

    The pixels of a token are in `order`, see `vivit_jax.layers.tubelets`.
    """

    config: VideoMAEConfig  # of the whole model

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "b l d"],
        num_predicted: int,
        output_hidden_states: bool,
        clip_ids: Int[AnyArray, " b"] | None = None,
        order: str = FRAMES_FIRST,
    ) -> tuple[Float[jax.Array, "b k p"], Float[jax.Array, "layers b l d"] | None]:
        config = self.config.decoder()
        x, layers = run_blocks(
            config,
            StackSpec(config.num_hidden_layers),
            x,
            output_hidden_states=output_hidden_states,
            clip_ids=clip_ids,
        )
        x = x[:, x.shape[1] - num_predicted :]
        x = LayerNorm(config, config.decoder_norm_eps, name="ln_final")(x)
        shape = (config.hidden_size, config.patch_values)
        head = Projection(config, shape, ("embed", "pixels"), name="head")

        def columns(y):
            return _values_in(config, y, FRAMES_FIRST, order)

        return head(x, columns=columns), layers.hidden


class VideoMAEForPreTraining(nn.Module):
    """Masked autoencoder: predicts the pixels of the masked tubelets from the visible ones.

    A mask with `decoded` tokens is V2's dual masking: the decoder sees the visible tokens and a
    mask token for each decoded one, and predicts the decoded ones.
    """

    config: VideoMAEConfig

    @as_automatic
    @nn.compact
    def __call__(
        self,
        pixel_values: PixelValues,
        mask: Mask | None = None,
        *,
        head_mask: Float[AnyArray, "*layers n"] | None = None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids: Int[AnyArray, " b"] | None = None,
        return_dict: bool = True,
    ) -> PreTrainingOutput | tuple:
        """As `VideoMAEModel`; logits [b, k, patch values] in the order of `mask.predicted`; loss.

        The loss is the mean squared error to `reconstruction_targets` over tokens that the encoder
        did not see. `head_mask` acts on the encoder.
        """
        config = self.config
        if mask is None:
            raise UserError("VideoMAEForPreTraining needs a mask, for example vivit_jax.tube_mask")
        out = VideoMAEModel(config, name="backbone")(
            pixel_values,
            mask=mask,
            head_mask=head_mask,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            deterministic=deterministic,
            clip_ids=clip_ids,
        )
        if not mask.masked.shape[1] or not mask.visible.shape[1]:
            raise UserError(
                f"pre-training needs visible and masked tokens, got {mask.visible.shape[1]} "
                f"visible and {mask.masked.shape[1]} masked per clip"
            )
        width = config.decoder_hidden_size
        mask_token = self.param(
            "mask_token",
            with_axes(nn.initializers.zeros, (None, None, "embed")),
            (1, 1, width),
            jnp.dtype(config.param_dtype),
        )
        grid = check_clip(config, pixel_values.shape, any_size=True)
        shape = (config.hidden_size, width)
        to_decoder = Projection(config, shape, ("embed", None), name="to_decoder", use_bias=False)
        x = to_decoder.unrounded(out.last_hidden_state)
        x = x + _positions(x, grid, mask.visible)
        blanks = jnp.broadcast_to(mask_token.astype(x.dtype), (*mask.predicted.shape, width))
        blanks = blanks + _positions(x, grid, mask.predicted)
        # Visible tokens first, then blanks: attention ignores the order, the slice needs it.
        x = jnp.concatenate([x, blanks], axis=1).astype(config.dtype)
        # Bytes come from a training step, where only the loss reads the logits.
        order = fastest_order(pixel_values)
        order = order if order == CHANNELS_FIRST else FRAMES_FIRST
        logits, decoder_hidden_states = VideoMAEDecoder(config, name="decoder")(
            x,
            mask.predicted.shape[1],
            out.hidden_states is not None,
            dropout_ids(clip_ids, pixel_values.shape[0], deterministic),
            order,
        )
        targets = reconstruction_targets(pixel_values, mask, config, order)
        loss = reconstruction_loss(logits, targets, mask.counted)
        logits = _values_in(config, logits, order, FRAMES_FIRST)
        out = PreTrainingOutput(
            loss, logits, out.hidden_states, out.attentions, decoder_hidden_states
        )
        return out if return_dict else out.to_tuple()


class VideoMAEForVideoClassification(nn.Module):
    """Linear classifier on the norm (`fc_norm`) of the mean of all tokens.

    With `use_mean_pooling` off it reads the first tubelet's token after the final norm, as
    HuggingFace does with a pre-training configuration, and with `attentive_heads` what an
    `AttentivePool` gathers, in place of both.
    """

    config: VideoMAEConfig

    @as_automatic
    @nn.compact
    def __call__(
        self,
        pixel_values: PixelValues,
        *,
        labels: Labels | None = None,
        mask: Mask | None = None,
        head_mask: Float[AnyArray, "*layers n"] | None = None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids: Int[AnyArray, " b"] | None = None,
        return_dict: bool = True,
    ) -> ClassifierOutput | tuple:
        """As `VideoMAEModel`; logits [b, classes]; labels add `loss`, see `classification_loss`."""
        config = self.config
        out = VideoMAEModel(config, name="backbone")(
            pixel_values,
            mask=mask,
            head_mask=head_mask,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            deterministic=deterministic,
            clip_ids=clip_ids,
        )
        if config.attentive_heads:
            x = AttentivePool(config, name="attentive")(out.last_hidden_state)
        elif config.use_mean_pooling:
            x = _mean_pooled(config, out.last_hidden_state)
        else:
            x = out.last_hidden_state[:, 0]
        x = dropout(self, x, config.head_dropout, dropout_ids(clip_ids, x.shape[0], deterministic))
        loss, logits = classify(config, x, labels)
        out = ClassifierOutput(loss, logits, out.hidden_states, out.attentions)
        return out if return_dict else out.to_tuple()


def _values_in(config: VideoMAEConfig, x, old: str, new: str):
    """The last axis of x, the values of a tubelet, in another order."""
    return reordered(x, config.tubelet, config.num_channels, old, new)


def _mean_pooled(config: VideoMAEConfig, x: Float[jax.Array, "b l d"]) -> Float[jax.Array, "b d"]:
    """The norm of the mean over tokens; call inside a module, which then holds the norm."""
    return LayerNorm(config, config.fc_norm_eps, name="fc_norm")(at_least_float32(x).mean(1))


def _positions(
    x: Float[jax.Array, "b ... d"], grid: Grid, indices: Int[AnyArray, "b k"] | None
) -> Float[jax.Array, "... d"]:
    """Positions of the tokens at `indices`, None: of all tokens, for tokens like x."""
    table = sincos_positions(grid[0] * grid[1] * grid[2], x.shape[-1])
    rows = take_tokens(jnp.asarray(table, x.dtype), indices)
    return rows[None] if indices is None else rows


def _check_mask(mask: Mask, batch: int, grid: Grid) -> None:
    if not isinstance(mask, Mask):
        raise UserError(
            f"mask must be a vivit_jax.Mask, got {type(mask).__name__}; convert a bool array with "
            "Mask.from_bool(bool_masked_pos)"
        )
    tokens = grid[0] * grid[1] * grid[2]
    clips = sorted({len(part) for part in (mask.visible, mask.masked, mask.predicted)})
    if mask.num_tokens != tokens or clips != [batch]:
        raise UserError(
            f"mask is for {' or '.join(counted(n, 'clip') for n in clips)} of "
            f"{counted(mask.num_tokens, 'token')}, pixel_values holds {batch} of {tokens} (grid "
            f"{grid}); make the mask with that grid"
        )


def stack_specs(config: VideoMAEConfig) -> tuple[StackSpec, ...]:
    """The encoder's stack of blocks."""
    return (StackSpec(config.num_hidden_layers),)


def init_inputs(config: VideoMAEConfig, head: str) -> dict[str, Mask]:
    """A mask for pre-training, of half of the tokens."""
    if head != "pretraining":
        return {}
    tokens = np.arange(config.num_tokens, dtype=np.int32)[None]
    half = config.num_tokens // 2
    return {"mask": Mask(visible=tokens[:, :half], masked=tokens[:, half:])}


def flops(
    config: VideoMAEConfig, head: str, visible: int | None, decoded: int | None, all_tokens: bool
) -> products.Flops:
    """The products of a forward pass; every token is read, so `all_tokens` changes nothing."""
    _check_token_counts(config, head, visible, decoded)
    tokens = config.num_tokens if visible is None else visible
    blocks = products.joint_blocks(config, config.num_hidden_layers, tokens)
    heads = products.classifier(config, head, tokens)
    if head == "pretraining":
        decoder = config.decoder()
        decoded = config.num_tokens - tokens if decoded is None else decoded
        blocks += products.joint_blocks(decoder, decoder.num_hidden_layers, tokens + decoded)
        heads += products.product(tokens, config.hidden_size, decoder.hidden_size)
        heads += products.product(decoded, decoder.hidden_size, config.patch_values)
    return products.Flops(products.embedding(config, tokens), blocks, heads)


def _check_token_counts(
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


FAMILY = Family(
    config=VideoMAEConfig,
    models={
        "none": VideoMAEModel,
        "pretraining": VideoMAEForPreTraining,
        "classification": VideoMAEForVideoClassification,
    },
    stacks=stack_specs,
    flops=flops,
    init_inputs=init_inputs,
)
