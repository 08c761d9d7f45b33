# SPDX-License-Identifier: Apache-2.0
"""The classifier on pooled features that the families share."""

import jax
from jaxtyping import Float, Num

from vivit_jax.config import Config
from vivit_jax.layers.linear import Projection
from vivit_jax.masking import AnyArray
from vivit_jax.models.losses import classification_loss

# Integers [b] or [b, heads], or floats [b], [b, 1] or [b, classes], see `classification_loss`.
Labels = Num[AnyArray, "b *classes"]


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
