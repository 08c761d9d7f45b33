# SPDX-License-Identifier: Apache-2.0
"""Pre-norm transformer blocks and the stack of them, scanned or looped."""

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from vivit_jax.errors import UserError
from vivit_jax.layers.attention import SelfAttention
from vivit_jax.layers.linear import ACTIVATIONS, Config, Projection, layer_norm


@flax.struct.dataclass
class LayerOutput:
    """What one block reports, stacked over layers by `run_blocks`; None where not asked for."""

    hidden: jax.Array | None  # [b, l, d]
    attention: jax.Array | None  # [b, n, l, l]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x [b, l, d]."""

    config: Config

    @nn.compact
    def __call__(self, x, head_mask, hidden: bool, attention: bool, deterministic: bool):
        """The form `nn.scan` wants: (carry, layer input, flags) -> (carry, layer output)."""
        config = self.config
        d, f = config.hidden_size, config.intermediate_size
        dropout = nn.Dropout(config.hidden_dropout_prob, deterministic=deterministic)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))

        y = layer_norm(config, config.layer_norm_eps, "ln_attention")(x)
        y, weights = SelfAttention(config, name="attention")(y, head_mask, attention, deterministic)
        x = x + dropout(y)

        y = layer_norm(config, config.layer_norm_eps, "ln_mlp")(x)
        y = ACTIVATIONS[config.hidden_act](
            Projection(config, (d, f), ("embed", "mlp"), name="mlp_in")(y)
        )
        x = x + dropout(Projection(config, (f, d), ("mlp", "embed"), name="mlp_out")(y))
        return x, LayerOutput(x if hidden else None, weights)


REMAT = {
    "block": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_blocks(
    config: Config,
    x: jax.Array,
    head_mask: jax.Array | None = None,
    *,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
    deterministic: bool = True,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Run `config.num_hidden_layers` blocks; call inside a module's compact method.

    x [b, l, d] -> (x, hidden states [layers + 1, b, l, d] or None, attentions
    [layers, b, n, l, l] or None). Parameters live in the calling module, under `layers` with a
    leading layer axis if `config.scan_layers`, else under `layers_0`, `layers_1`, ...
    """
    layers = config.num_hidden_layers
    flags = (output_hidden_states, output_attentions, deterministic)
    head_mask = _per_layer(head_mask, layers, config.num_attention_heads)
    block = Block
    if config.remat != "none":
        block = nn.remat(
            Block,
            prevent_cse=not config.scan_layers,
            static_argnums=(3, 4, 5),
            policy=REMAT[config.remat],
        )
    embedding = x
    if config.scan_layers:
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, out = scanned(config, name="layers")(x, head_mask, *flags)
    else:
        outputs = []
        for i in range(layers):
            row = None if head_mask is None else head_mask[i]
            x, layer = block(config, name=f"layers_{i}")(x, row, *flags)
            outputs.append(layer)
        out = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    hidden = jnp.concatenate([embedding[None], out.hidden]) if output_hidden_states else None
    return x, hidden, out.attention


def _per_layer(head_mask, layers: int, heads: int):
    if head_mask is None:
        return None
    head_mask = jnp.asarray(head_mask)
    if head_mask.shape not in ((heads,), (layers, heads)):
        raise UserError(
            f"head_mask must have shape ({heads},) or ({layers}, {heads}), got {head_mask.shape}"
        )
    return jnp.broadcast_to(head_mask, (layers, heads))
