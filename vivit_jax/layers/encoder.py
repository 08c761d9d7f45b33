# SPDX-License-Identifier: Apache-2.0
"""Pre-norm transformer blocks and the stack of them, scanned or looped."""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen.spmd import with_logical_constraint
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.layers import matrices
from vivit_jax.layers.attention import SPACE, SelfAttention
from vivit_jax.layers.chunked import SAVED
from vivit_jax.layers.dropout import draw_kept, dropout
from vivit_jax.layers.linear import (
    PROJECTED,
    LayerNorm,
    Projection,
    at_least_float32,
    wide_type,
    with_axes,
)
from vivit_jax.layers.parts import SUMMED
from vivit_jax.masking import AnyArray


@dataclasses.dataclass(frozen=True)
class StackSpec:
    """A stack of equal blocks: how many, and what their tokens attend to.

    `attention` lists the attention layers of a block in order, parameter name and direction.
    """

    num_layers: int
    attention: tuple[tuple[str, str], ...] = (("attention", SPACE),)
    # One dropout pattern for all frames of a clip: scenic maps the spatial stage of a factorised
    # encoder over the frames with one random key.
    shared_dropout: bool = False
    zero_init: tuple[str, ...] = ()  # the attention layers that contribute nothing at first
    # The last block stays out of the scan, so that it can compute only the tokens that are read.
    unscanned_last: bool = False


@flax.struct.dataclass
class LayerOutput:
    """What a block reports, or all blocks, with a leading layer axis; None where not asked for."""

    hidden: jax.Array | None  # x after the block
    space: jax.Array | None  # attention weights over space, or over all tokens
    time: jax.Array | None  # attention weights over time


# (head mask [n], probability of dropping a branch, clip ids [b]); None where there is none.
BlockInput = tuple[
    Float[AnyArray, " n"] | None, Float[AnyArray, ""] | None, Int[AnyArray, " b"] | None
]


class Block(nn.Module):
    """x + attention(norm(x)) for every attention layer, then x + mlp(norm(x)).

    With `config.layer_scale_init` the branches are scaled by `scale_attention` and `scale_mlp` [d].
    x is [b, l, d], or [b, t, s, d] where attention distinguishes time and space.
    """

    config: Config
    spec: StackSpec

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "b *l d"],
        layer: BlockInput,
        hidden: bool,
        attention: bool,
        num_queries: int | None = None,
    ) -> tuple[Float[jax.Array, "b *q d"], LayerOutput]:
        """As `nn.scan` calls it: (carry, layer input, flags) -> (carry, layer output).

        With `num_queries` only the first so many tokens are computed.
        """
        config, spec = self.config, self.spec
        d, f = config.hidden_size, config.intermediate_size
        head_mask, drop_rate, clip_ids = layer
        shared = (1,) if spec.shared_dropout else ()

        def branch(name, y):
            """y as added to the residual stream: scaled, dropped in part or for a whole clip."""
            y = dropout(self, y, config.hidden_dropout_prob, clip_ids, shared)
            if config.layer_scale_init:
                init = nn.initializers.constant(config.layer_scale_init)
                init = with_axes(init, ("embed",))
                scale = self.param(f"scale_{name}", init, (d,), jnp.dtype(config.param_dtype))
                y = checkpoint_name(y.astype(x.dtype), PROJECTED)  # for the gradient to the scale
                scale = scale.astype(wide).reshape((1,) * (y.ndim - 1) + (d,))
                y = at_least_float32(y) * scale
            if drop_rate is None or clip_ids is None:
                return y
            key, ones = self.make_rng("dropout"), (1,) * (y.ndim - 1)
            keep = draw_kept(key, clip_ids, 1 - drop_rate, ones).astype(wide)
            return y * (keep / (1 - drop_rate).astype(wide) if config.drop_path_rescale else keep)

        x = with_logical_constraint(x, ("batch", *("frames",) * (x.ndim - 3), "length", "embed"))
        wide = wide_type(x.dtype)
        weights = {}
        for name, along in spec.attention:
            before = at_least_float32(x)
            y = LayerNorm(config, config.layer_norm_eps, name=f"ln_{name}")(before)
            zero = name in spec.zero_init
            attend = SelfAttention(config, along, spec.shared_dropout, zero, name=name)
            y, found = attend(y, head_mask, attention, clip_ids, num_queries)
            weights |= {
                k: v for k, v in zip(("space", "time"), found, strict=True) if v is not None
            }
            before = before if num_queries is None else before[..., :num_queries, :]
            x = checkpoint_name((before + branch(name, y)).astype(x.dtype), PROJECTED)

        before = at_least_float32(x)
        y = LayerNorm(config, config.layer_norm_eps, name="ln_mlp")(before)
        y = Projection(config, (d, f), ("embed", "mlp"), name="mlp_in")(y, config.hidden_act)
        y = Projection(config, (f, d), ("mlp", "embed"), name="mlp_out").unrounded(y)
        x = (before + branch("mlp", y)).astype(x.dtype)
        return x, LayerOutput(x if hidden else None, weights.get("space"), weights.get("time"))


def _save_attention(primitive, *_, **__) -> bool:
    """Whether cuDNN's forward attention made this; its backward pass starts from it."""
    return primitive.name.startswith("dot_product_attention_fwd")


def remat_policy(config: Config) -> Callable | None:
    """What the forward pass keeps for the backward pass besides each block's input.

    "block" keeps nothing, "dots" the results of matrix products and of attention, but no scores.
    Recomputing norms, activations and residual sums costs less than their memory traffic.

    Half precision products are kept by name, rounded, since the products themselves return float32.
    Float32 products are kept by primitive: a step of the tests' small model took 594 MiB, by name
    644; sums over devices after a product are kept too, so that they are not sent again.
    """
    if config.remat == "block":
        return None
    policies = jax.checkpoint_policies
    half = wide_type(config.dtype) != np.dtype(config.dtype)
    named = policies.save_only_these_names(SAVED, *((PROJECTED,) if half else (SUMMED,)))
    kept = policies.save_from_both_policies(named, _save_attention)
    if half:
        return kept
    products = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, matrices.saved
    )
    return policies.save_from_both_policies(products, kept)


def run_blocks(
    config: Config,
    spec: StackSpec,
    x: Float[jax.Array, "b *l d"],
    head_mask: Float[AnyArray, "layers n"] | None = None,
    *,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    clip_ids: Int[AnyArray, " b"] | None = None,
    num_queries: int | None = None,
) -> tuple[Float[jax.Array, "b *q d"], LayerOutput]:
    """Run a stack of blocks; call inside a module's compact method.

    x is [b, l, d] or [b, t, s, d]. The layers' outputs have a leading layer axis; `hidden` starts
    with x itself and so has one entry more. `clip_ids` is None where nothing is dropped. With
    `num_queries`, and nothing to report, the last block returns only the first so many tokens.

    Parameters live in the calling module, under `layers` with a leading layer axis if
    `config.scan_layers` (the last block apart with `spec.unscanned_last`), else under `layers_0`,
    `layers_1`, ...
    """
    layers = spec.num_layers
    flags = (output_hidden_states, output_attentions)
    if not layers:
        return x, _no_blocks(config, x, *flags)
    num_queries = None if output_hidden_states or output_attentions else num_queries
    rates = None
    if clip_ids is not None:
        if config.drop_path_rate:
            rates = jnp.asarray(np.linspace(0, config.drop_path_rate, layers), jnp.float32)
        clip_ids = jnp.broadcast_to(clip_ids, (layers, len(clip_ids)))

    def inputs(at):
        return jax.tree.map(lambda values: values[at], (head_mask, rates, clip_ids))

    def block(in_scan: bool):
        if config.remat == "none":
            return Block
        # In a scan XLA cannot merge the recomputation with the forward pass anyway.
        policy, static = remat_policy(config), (3, 4, 5)
        return nn.remat(Block, prevent_cse=not in_scan, static_argnums=static, policy=policy)

    embedding, outputs, together = x, [], 0
    if config.scan_layers:
        together = layers - spec.unscanned_last
    if together:
        scanned = nn.scan(
            block(in_scan=True),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *(nn.broadcast,) * 3),  # pyright: ignore[reportArgumentType]  # or a tuple
            length=together,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        first = inputs(slice(together))
        x, out = scanned(config, spec, name="layers")(x, first, *flags, None)
        outputs.append(out)
    for i in range(together, layers):
        wanted = num_queries if i == layers - 1 else None
        one = block(in_scan=False)(config, spec, name=f"layers_{i}")
        x, out = one(x, inputs(i), *flags, wanted)
        outputs.append(jax.tree.map(lambda value: value[None], out))
    out = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)
    if output_hidden_states:
        out = out.replace(hidden=jnp.concatenate([embedding[None], out.hidden]))
    return x, out


def _no_blocks(config: Config, x, hidden: bool, attention: bool) -> LayerOutput:
    """The output of no blocks for x [b, ..., l, d], which is its only hidden state."""
    weights = (0, *x.shape[:-2], config.num_attention_heads, x.shape[-2], x.shape[-2])
    return LayerOutput(
        x[None] if hidden else None, jnp.zeros(weights, x.dtype) if attention else None, None
    )


def check_attention_mask(attention_mask) -> None:
    """UserError for an attention mask: clips are whole, there is nothing to mask."""
    if attention_mask is not None:
        raise UserError(
            f"attention_mask must be None, got {type(attention_mask).__name__}: every token of a "
            "clip is attended to; VideoMAE leaves tokens out by mask, head_mask silences heads"
        )


def per_layer(head_mask, layers: int, heads: int) -> Float[jax.Array, "layers n"] | None:
    """A head mask [heads] or [layers, heads] as [layers, heads]; UserError for another shape."""
    if head_mask is None:
        return None
    head_mask = jnp.asarray(head_mask)
    if head_mask.shape not in ((heads,), (layers, heads)):
        raise UserError(
            f"head_mask must have shape ({heads},) or ({layers}, {heads}), got {head_mask.shape}"
        )
    return jnp.broadcast_to(head_mask, (layers, heads))
