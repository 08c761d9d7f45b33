# SPDX-License-Identifier: Apache-2.0
"""The classifier that both families put on their pooled features."""

import jax

from vivit_jax.config import Config
from vivit_jax.layers.linear import Projection
from vivit_jax.models.losses import classification_loss


def classify(config: Config, features, labels) -> tuple[jax.Array | None, jax.Array]:
    """Features [b, d] -> (loss, None without labels; logits [b, classes]).

    Call inside a module's compact method; the parameters are its `head`. `class_splits` only
    changes how the loss reads the logits. Without classes the logits are the features, as in
    transformers.
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
