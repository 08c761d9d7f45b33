# SPDX-License-Identifier: Apache-2.0
"""Losses of the classification heads and of masked pre-training, in float32 or wider."""

import einops
import jax
import jax.numpy as jnp
import numpy as np

from vivit_jax.config import VideoMAEConfig
from vivit_jax.errors import UserError
from vivit_jax.layers.embed import patchify, take_tokens
from vivit_jax.layers.linear import at_least_float32
from vivit_jax.masking import Mask

IGNORE_INDEX = -100
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def classification_loss(logits, labels, problem_type: str | None = None) -> jax.Array:
    """The loss HuggingFace computes for video classification, a scalar.

    logits [b, classes]. `problem_type` None is read off the inputs: one class is a regression,
    integer labels are classes, float labels are a multi-label target.

    * regression: mean squared error, labels [b] or [b, 1] for one class, else [b, classes];
    * single_label_classification: cross entropy, labels int [b], rows with label -100 left out
      (all rows left out: NaN, as in PyTorch);
    * multi_label_classification: mean binary cross entropy, labels float [b, classes].

    A class index outside [0, classes) gives NaN: under jit nothing can be raised. Raises UserError
    for labels whose shape or dtype does not fit.
    """
    logits, labels = at_least_float32(logits), jnp.asarray(labels)
    classes = logits.shape[-1]
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if problem_type is None:
        if classes == 1:
            problem_type = "regression"
        else:
            kind = "single" if integers else "multi"
            problem_type = f"{kind}_label_classification"
    shapes = {
        "regression": [logits.shape, logits.shape[:1]][: 2 if classes == 1 else 1],
        "single_label_classification": [logits.shape[:1]],
        "multi_label_classification": [logits.shape],
    }[problem_type]
    wrong_dtype = {
        "single_label_classification": not integers,
        "multi_label_classification": not jnp.issubdtype(labels.dtype, jnp.floating),
    }.get(problem_type, False)
    if labels.shape not in shapes or wrong_dtype:
        raise UserError(
            f"labels of shape {labels.shape} and dtype {labels.dtype} do not fit {problem_type} "
            f"of logits {logits.shape}; expected "
            f"{'integers' if problem_type.startswith('single') else 'floats'} of shape "
            + " or ".join(map(str, shapes))
        )
    if problem_type == "regression":
        return jnp.mean((logits - labels.reshape(logits.shape)) ** 2)
    if problem_type == "multi_label_classification":
        y = labels.astype(logits.dtype)
        return -jnp.mean(y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits))
    counted = labels != IGNORE_INDEX
    known = (labels >= 0) & (labels < classes)
    index = jnp.where(known, labels, 0)[:, None]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=1)[:, 0]
    losses = jnp.where(known, losses, jnp.nan)
    return jnp.sum(jnp.where(counted, losses, 0)) / jnp.sum(counted)


def reconstruction_targets(pixel_values, mask: Mask, config: VideoMAEConfig) -> jax.Array:
    """What VideoMAE's decoder predicts: the masked tubelets' pixels, [b, m, patch values].

    RGB input is first un-normalised with the ImageNet statistics, whatever the processor used: so
    do the authors and HuggingFace. With `norm_pix_loss` each tubelet and channel is then
    normalised: (x - mean) / (std + 1e-6), std with the unbiased variance. Values are ordered
    (t, h, w, c). Raises UserError for other channel counts without `norm_pix_loss`.
    """
    if config.num_channels != 3 and not config.norm_pix_loss:
        raise UserError(
            f"norm_pix_loss=False needs RGB input to un-normalise, got num_channels="
            f"{config.num_channels}; use norm_pix_loss=True"
        )
    x = at_least_float32(take_tokens(patchify(pixel_values, config.tubelet), mask.masked))
    x = einops.rearrange(x, "b m (p c) -> b m p c", c=config.num_channels)
    if config.num_channels == 3:
        mean, std = (np.reshape(v, (1, 1, 1, 3)) for v in (IMAGENET_MEAN, IMAGENET_STD))
        x = x * jnp.asarray(std, x.dtype) + jnp.asarray(mean, x.dtype)
    if config.norm_pix_loss:
        std = jnp.sqrt(jnp.var(x, axis=2, keepdims=True, ddof=1)) + 1e-6
        x = (x - jnp.mean(x, axis=2, keepdims=True)) / std
    return einops.rearrange(x, "b m p c -> b m (p c)")


def reconstruction_loss(logits, targets) -> jax.Array:
    """Mean squared error over every value of every masked token; no gradient to the targets."""
    return jnp.mean((at_least_float32(logits) - jax.lax.stop_gradient(targets)) ** 2)
