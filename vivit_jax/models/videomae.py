# SPDX-License-Identifier: Apache-2.0
"""VideoMAE (Tong et al. 2022) and V2 (Wang et al. 2023): encoder, pre-training, classification.

Tokens are the tubelets in (t, h, w) order; there is no class token, and positions are a fixed
sin-cos table that no checkpoint holds. Parameters: `patch_embed`, `layers`, and `ln_final` where
`use_mean_pooling` is off; the heads hold the encoder as `backbone`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from vivit_jax.config import VideoMAEConfig
from vivit_jax.errors import UserError
from vivit_jax.layers.dropout import dropout, dropout_ids
from vivit_jax.layers.embed import TubeletEmbed, check_clip, sincos_positions
from vivit_jax.layers.encoder import StackSpec, check_attention_mask, per_layer, run_blocks
from vivit_jax.layers.explicit import as_automatic
from vivit_jax.layers.linear import LayerNorm, Projection, at_least_float32
from vivit_jax.layers.tubelets import (
    CHANNELS_FIRST,
    FRAMES_FIRST,
    fastest_order,
    reordered,
    take_tokens,
)
from vivit_jax.masking import Grid, Mask
from vivit_jax.models.head import classify
from vivit_jax.models.losses import reconstruction_loss, reconstruction_targets
from vivit_jax.outputs import (
    ClassifierOutput,
    ModelOutput,
    PreTrainingOutput,
    asked_for,
    choose_states,
)


class VideoMAEModel(nn.Module):
    """The encoder; with a mask it embeds and computes the visible tokens only.

    `add_pooling_layer` adds `pooler_output`, the norm (`fc_norm`) of the mean of all tokens, which
    VideoMAE V2 calls its feature and a classifier reads. It needs `use_mean_pooling`.
    """

    config: VideoMAEConfig
    add_pooling_layer: bool = False

    @as_automatic
    @nn.compact
    def __call__(
        self,
        pixel_values,
        *,
        mask: Mask | None = None,
        head_mask=None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids=None,
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
    """Blocks of the decoder's width over its tokens, pixels for the last `num_predicted`.

    The pixels of a token are in `order`, see `vivit_jax.layers.tubelets`.
    """

    config: VideoMAEConfig  # of the whole model

    @nn.compact
    def __call__(
        self,
        x,
        num_predicted: int,
        output_hidden_states: bool,
        clip_ids=None,
        order: str = FRAMES_FIRST,
    ):
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
        columns = lambda y: _values_in(config, y, FRAMES_FIRST, order)  # noqa: E731
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
        pixel_values,
        mask: Mask | None = None,
        *,
        head_mask=None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids=None,
        return_dict: bool = True,
    ) -> PreTrainingOutput | tuple:
        """As `VideoMAEModel`; logits [b, k, patch values] in the order of `mask.predicted`; loss.

        The loss is the mean squared error to `reconstruction_targets` on tokens that the encoder
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
            nn.with_logical_partitioning(nn.initializers.zeros, (None, None, "embed")),
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
        # Visible tokens first, then blanks: attention does not see the order, the slice does.
        x = jnp.concatenate([x, blanks], axis=1).astype(config.dtype)
        # Bytes are of a training step, where nothing but the loss reads the logits.
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
    """Linear classifier on the mean of all tokens, normed (`fc_norm`).

    With `use_mean_pooling` off it reads the first tubelet's token after the final norm, which is
    what HuggingFace does with a pre-training configuration.
    """

    config: VideoMAEConfig

    @as_automatic
    @nn.compact
    def __call__(
        self,
        pixel_values,
        *,
        labels=None,
        mask: Mask | None = None,
        head_mask=None,
        attention_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        clip_ids=None,
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
        if config.use_mean_pooling:
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


def _mean_pooled(config: VideoMAEConfig, x):
    """The norm of the mean over the tokens of x [b, l, d]; called in a module, which holds it."""
    return LayerNorm(config, config.fc_norm_eps, name="fc_norm")(at_least_float32(x).mean(1))


def _positions(x, grid: Grid, indices):
    """Rows of the fixed table for x [b, l, d] at token indices [b, l] (None: all of them)."""
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
            f"mask is for {' or '.join(map(str, clips))} clips of {mask.num_tokens} tokens, "
            f"pixel_values holds {batch} of {tokens} (grid {grid}); make the mask with that grid"
        )
