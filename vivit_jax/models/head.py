# SPDX-License-Identifier: Apache-2.0
"""The classifier on pooled features that the families share, and the pooling by a learned query."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Num

from vivit_jax.config import Config
from vivit_jax.layers.linear import Projection, at_least_float32, with_axes
from vivit_jax.masking import AnyArray
from vivit_jax.models.losses import classification_loss

# Integers [b] or [b, heads], or floats [b], [b, 1] or [b, classes], see `classification_loss`.
Labels = Num[AnyArray, "b *classes"]


class AttentivePool(nn.Module):
    """One vector of all tokens, gathered by a learned query: attention in `attentive_heads` heads.

    As in the attentive probes of AIM (El-Nouby et al. 2024) and CAPI (Darcet et al. 2025), without
    V-JEPA's residual, norm and MLP after it. Keys and values have no bias: that of keys adds the
    same to all scores, that of values a constant, as the classifier's does.

    The query is multiplied with the keys' kernel, and tokens are summed before they meet that of
    the values, so that a token takes 4 n d operations and not 4 d^2.
    """

    config: Config

    @nn.compact
    def __call__(self, x: Float[jax.Array, "b l d"]) -> Float[jax.Array, "b d"]:
        """Tokens -> what is gathered, in float32 or wider."""
        config, n, d = self.config, self.config.attentive_heads, x.shape[-1]
        assert n is not None, "the model is built with attentive_heads"
        shape, axes = (d, n, d // n), ("embed", "heads", "kv")
        init = with_axes(nn.initializers.normal(config.initializer_range), axes[1:])
        query = self.param("query", init, shape[1:], jnp.dtype(config.param_dtype))
        key, _ = Projection(config, shape, axes, use_bias=False, name="key").parameters()
        value, _ = Projection(config, shape, axes, use_bias=False, name="value").parameters()
        x, query, key, value = (at_least_float32(y) for y in (x, query, key, value))
        scaled = jnp.einsum("dne,ne->nd", key, query) * (d // n) ** -0.5
        weights = jax.nn.softmax(jnp.einsum("bld,nd->bnl", x, scaled), axis=-1)
        gathered = jnp.einsum("bnl,bld->bnd", weights, x)
        return jnp.einsum("bnd,dne->bne", gathered, value).reshape(x.shape[0], d)


def classify(
    config: Config, features: Float[jax.Array, "b d"], labels: Labels | None
) -> tuple[Float[jax.Array, ""] | None, Float[jax.Array, "b classes"]]:
    """(The loss, None without labels; logits) of pooled features.

    Call inside a module's compact method; the parameters are its `head`. `class_splits` changes
    only the loss. Without classes the logits are the features, as in transformers.
    """
    shape = (config.hidden_size, config.num_labels)
    logits = features.astype(config.dtype)
    if config.num_labels:
        logits = Projection(config, shape, ("embed", "classes"), name="head")(features)
    if labels is None:
        return None, logits
    loss = classification_loss(
        logits, labels, config.problem_type, class_splits=config.class_splits
    )
    return loss, logits
