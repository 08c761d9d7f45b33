# SPDX-License-Identifier: Apache-2.0
"""ViViT with joint space-time attention (Arnab et al. 2021, model 1), as in scenic and HuggingFace.

Tokens are [class, tubelets in (t, h, w) order]. Parameters: `patch_embed`, `cls`, `pos_embed`,
`layers`, `ln_final`, `pooler`; the classifier holds the model as `backbone` and adds `head`.
"""

import jax.numpy as jnp
from flax import linen as nn

from vivit_jax.config import VivitConfig
from vivit_jax.layers.embed import TubeletEmbed, check_clip, resize_positions
from vivit_jax.layers.encoder import run_blocks
from vivit_jax.layers.linear import ACTIVATIONS, Projection, layer_norm
from vivit_jax.outputs import ClassifierOutput, ModelOutput
from vivit_jax.train.losses import classification_loss


class VivitModel(nn.Module):
    """ViViT without a head; `add_pooling_layer` adds a dense layer on the class token."""

    config: VivitConfig
    add_pooling_layer: bool = True

    @nn.compact
    def __call__(
        self,
        pixel_values,
        *,
        head_mask=None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        return_dict: bool = True,
    ) -> ModelOutput | tuple:
        """pixel_values [b, t, h, w, c] float -> last_hidden_state [b, 1 + l, d].

        `head_mask` [n] or [layers, n] scales attention weights per head (0 silences a head).
        `interpolate_pos_encoding` accepts any frame count and resolution divisible by the tubelet.
        `deterministic=False` turns dropout on and needs rngs={"dropout": key}. Raises UserError for
        a clip that does not fit.
        """
        config = self.config
        d = config.hidden_size
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        grid = check_clip(config, pixel_values.shape, any_size=interpolate_pos_encoding)
        zeros = nn.initializers.zeros
        cls = self.param(
            "cls",
            nn.with_logical_partitioning(zeros, (None, None, "embed")),
            (1, 1, d),
            param_dtype,
        )
        positions = self.param(
            "pos_embed",
            nn.with_logical_partitioning(zeros, (None, "length", "embed")),
            (1, 1 + config.num_tokens, d),
            param_dtype,
        )
        x = TubeletEmbed(config, name="patch_embed")(pixel_values)
        cls = jnp.broadcast_to(cls, (x.shape[0], 1, d)).astype(dtype)
        patch_positions = resize_positions(positions[0, 1:], config.grid, grid)
        x = jnp.concatenate([cls, x], axis=1)
        x = x + jnp.concatenate([positions[:, :1], patch_positions[None]], axis=1).astype(dtype)
        x = nn.Dropout(config.hidden_dropout_prob)(x, deterministic=deterministic)
        x, hidden_states, attentions = run_blocks(
            config,
            x,
            head_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            deterministic=deterministic,
        )
        x = layer_norm(config, config.layer_norm_eps, "ln_final")(x)
        pooled = None
        if self.add_pooling_layer:
            width = config.pooler_output_size or d
            pooled = Projection(config, (d, width), ("embed", "pooled"), name="pooler")(x[:, 0])
            pooled = ACTIVATIONS[config.pooler_act](pooled)
        out = ModelOutput(x, pooled, hidden_states, attentions)
        return out if return_dict else out.to_tuple()


class VivitForVideoClassification(nn.Module):
    """ViViT with a linear classifier on the class token after the final norm."""

    config: VivitConfig

    @nn.compact
    def __call__(
        self,
        pixel_values,
        *,
        labels=None,
        head_mask=None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        interpolate_pos_encoding: bool = False,
        deterministic: bool = True,
        return_dict: bool = True,
    ) -> ClassifierOutput | tuple:
        """As `VivitModel`; logits [b, classes]; labels add `loss`, see `classification_loss`."""
        config = self.config
        out = VivitModel(config, add_pooling_layer=False, name="backbone")(
            pixel_values,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            deterministic=deterministic,
        )
        shape = (config.hidden_size, config.num_labels)
        logits = Projection(config, shape, ("embed", "classes"), name="head")(
            out.last_hidden_state[:, 0]
        )
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, config.problem_type)
        out = ClassifierOutput(loss, logits, out.hidden_states, out.attentions)
        return out if return_dict else out.to_tuple()
