# SPDX-License-Identifier: Apache-2.0
"""Losses of the classification heads and of masked pre-training, in float32 or wider."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer, Num

from vivit_jax.config import IMAGENET_MEAN, IMAGENET_STD, VideoMAEConfig
from vivit_jax.errors import UserError
from vivit_jax.layers.linear import at_least_float32
from vivit_jax.layers.tubelets import (
    CHANNELS_FIRST,
    FRAMES_FIRST,
    PixelValues,
    check_pixels,
    tubelets,
)
from vivit_jax.masking import AnyArray, Mask

IGNORE_INDEX = -100
TARGET_EPSILON = 1e-6  # added to the standard deviation that a target is divided by

Logits = Float[AnyArray, "b classes"]
Labels = Num[AnyArray, "b *classes"]  # integers are classes, floats targets


def classification_loss(
    logits: Logits,
    labels: Labels,
    problem_type: str | None = None,
    class_splits: tuple[int, ...] | None = None,
) -> Float[jax.Array, ""]:
    """The loss HuggingFace computes for video classification.

    Without `problem_type` the inputs decide: one class is a regression, integer labels are classes,
    float labels a multi-label target.

    * regression: mean squared error, labels [b] or [b, 1] for one class, else [b, classes];
    * single_label_classification: cross entropy, labels int [b]; clips labelled -100 are ignored
      (all ignored: NaN, as in PyTorch);
    * multi_label_classification: mean binary cross entropy, labels float [b, classes].

    With `class_splits` it is `multi_head_loss` without smoothing. A class index outside
    [0, classes) gives NaN: under jit nothing can be raised. Raises UserError for labels of the
    wrong shape or dtype, and for `class_splits` with another problem type.
    """
    if class_splits is not None:
        if problem_type not in (None, "single_label_classification"):
            raise UserError(
                f"problem_type {problem_type!r} does not go with class_splits {class_splits}; each "
                "head is single_label_classification: use that, None, or class_splits=None"
            )
        return multi_head_loss(logits, labels, class_splits)
    logits, labels = at_least_float32(jnp.asarray(logits)), jnp.asarray(labels)
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
        return jnp.mean((logits - labels.reshape(logits.shape).astype(logits.dtype)) ** 2)
    if problem_type == "multi_label_classification":
        y = labels.astype(logits.dtype)
        return -jnp.mean(y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits))
    return _cross_entropy(logits, labels)


def multi_head_loss(
    logits: Logits,
    labels: Labels,
    class_splits: tuple[int, ...],
    label_smoothing: float = 0.0,
) -> Float[jax.Array, ""]:
    """Mean over heads of each head's softmax cross entropy, in float32 or wider.

    logits [b, sum(class_splits)] are the heads' logits one after the other. labels are int [b,
    heads], the class in each head, where -100 keeps the clip out of that head's mean (a head with
    no clips left: NaN); or float [b, sum(class_splits)], concatenated one-hots or soft targets.
    Smoothing uses each head's own class count: y (1 - s) + s / classes. One head,
    `class_splits=(classes,)`, is plain cross entropy with smoothing or soft targets.

    A class index outside its head gives NaN. Raises UserError for wrong shapes, dtypes and
    smoothing. Source: scenic's multi-head model for Epic-Kitchens, (300, 97) for nouns and verbs.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(
            f"label_smoothing must be in [0, 1), got {label_smoothing!r}; 0 turns it off"
        )
    logits = at_least_float32(jnp.asarray(logits))
    heads = split_logits(logits, class_splits)
    targets = split_labels(logits, labels, class_splits)
    losses = [_cross_entropy(*head, label_smoothing) for head in zip(heads, targets, strict=True)]
    return sum(losses[1:], losses[0]) / len(heads)


def split_logits(
    logits: Logits, class_splits: tuple[int, ...]
) -> tuple[Float[jax.Array, "b _"], ...]:
    """The logits [b, classes] of each head, which in `logits` come one after the other.

    Raises UserError unless the class counts are positive integers that add up.
    """
    logits, sizes = jnp.asarray(logits), head_sizes(class_splits)
    if logits.ndim != 2 or logits.shape[1] != sum(sizes):
        raise UserError(
            f"logits of shape {logits.shape} do not fit class_splits {sizes}; expected "
            f"[batch, {sum(sizes)}], the logits of all heads one after the other"
        )
    return tuple(jnp.split(logits, np.cumsum(sizes)[:-1], axis=1))


def split_labels(
    logits: Logits, labels: Labels, class_splits: tuple[int, ...]
) -> tuple[jax.Array, ...]:
    """The labels of each head: int [b] each, or float [b, classes] each.

    labels are int [b, heads] or float [b, sum(class_splits)]. Raises UserError for any other shape
    or dtype.
    """
    labels, sizes = jnp.asarray(labels), head_sizes(class_splits)
    if jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == (len(logits), len(sizes)):
        return tuple(labels[:, i] for i in range(len(sizes)))
    if jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == logits.shape:
        return split_logits(labels, sizes)
    raise UserError(
        f"labels of shape {labels.shape} and dtype {labels.dtype} do not fit class_splits {sizes} "
        f"of logits {logits.shape}; expected integers of shape {(len(logits), len(sizes))}, a "
        f"class per head, or floats of shape {logits.shape}, concatenated one-hots"
    )


def head_sizes(class_splits) -> tuple[int, ...]:
    """The class count of each head; UserError unless it is a sequence of positive integers."""
    if (
        not isinstance(class_splits, tuple | list)
        or not class_splits
        or not all(isinstance(n, int | np.integer) and n > 0 for n in class_splits)
    ):
        raise UserError(
            f"class_splits must be a tuple with one positive class count per head, got "
            f"{class_splits!r}; for example (300, 97)"
        )
    return tuple(class_splits)


def _cross_entropy(
    logits: Float[jax.Array, "b classes"],
    labels: Num[jax.Array, "b ..."],
    label_smoothing: float = 0.0,
) -> Float[jax.Array, ""]:
    """Mean over clips; labels are int [b] or float [b, classes]."""
    classes = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        y = labels.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
        return -jnp.mean(jnp.sum(y * log_probs, axis=1))
    counted, known, index = read_labels(labels, classes)
    losses = -jnp.take_along_axis(log_probs, index[:, None], axis=1)[:, 0]
    if label_smoothing:  # without: a class masked with -inf would give 0 * inf, which is NaN
        losses = (1 - label_smoothing) * losses - label_smoothing * jnp.mean(log_probs, axis=1)
    losses = jnp.where(known, losses, jnp.nan)
    return jnp.sum(jnp.where(counted, losses, 0)) / jnp.sum(counted, dtype=losses.dtype)


def read_labels(
    labels: Integer[jax.Array, " b"], classes: int
) -> tuple[Bool[jax.Array, " b"], Bool[jax.Array, " b"], Integer[jax.Array, " b"]]:
    """Which labels count (are not -100), which are classes, and indices that are safe to use.

    Labels are widened first: compared as uint8, 156 would equal -100.
    """
    labels = labels.astype(jax.dtypes.canonicalize_dtype(np.promote_types(labels.dtype, np.int32)))
    known = (labels >= 0) & (labels < classes)
    return labels != IGNORE_INDEX, known, jnp.where(known, labels, 0)


def pixel_statistics(config: VideoMAEConfig) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std per channel that turn the model's pixels back into [0, 1].

    `config.image_mean` and `image_std`, or ImageNet's for RGB whatever the processor used, like the
    authors and HuggingFace. None where neither is known.
    """
    mean, std = config.image_mean, config.image_std
    if isinstance(mean, tuple) and isinstance(std, tuple):
        return mean, std
    return (IMAGENET_MEAN, IMAGENET_STD) if config.num_channels == 3 else None


def reconstruction_targets(
    pixel_values: PixelValues, mask: Mask, config: VideoMAEConfig, order: str = FRAMES_FIRST
) -> Float[jax.Array, "b k p"]:
    """The targets of VideoMAE's decoder: the pixels of the tokens `mask.predicted`.

    pixel_values are first un-normalised, see `pixel_statistics`. With `norm_pix_loss` each tubelet
    and channel is then normalised: (x - mean) / (std + 1e-6), std with the unbiased variance.
    Values are ordered (t, h, w, c), or for `ByteClips` CHANNELS_FIRST if asked for. Raises
    UserError for pixels of another type, and without `norm_pix_loss` for pixels that cannot be
    un-normalised.
    """
    check_pixels(pixel_values)
    statistics = pixel_statistics(config)
    if statistics is None and not config.norm_pix_loss:
        raise UserError(
            f"norm_pix_loss=False predicts pixels in [0, 1], and for num_channels="
            f"{config.num_channels} nothing says how they were normalised; give the config the "
            "processor's image_mean and image_std, or norm_pix_loss=True"
        )
    x = at_least_float32(tubelets(pixel_values, config.tubelet, mask.predicted, order))
    channels = config.num_channels
    mean, std = (np.zeros(channels), np.ones(channels)) if statistics is None else statistics

    def target(x, mean, std, axis):
        """The target of pixels x, all pixels of a tubelet and channel being along `axis`."""
        if statistics is not None:
            x = x * jnp.asarray(std, x.dtype) + jnp.asarray(mean, x.dtype)
        if not config.norm_pix_loss:
            return x
        std = jnp.sqrt(jnp.var(x, axis=axis, keepdims=True, ddof=1)) + TARGET_EPSILON
        # The barrier makes the rounding the same for any number of tokens.
        mean, std = jax.lax.optimization_barrier((jnp.mean(x, axis=axis, keepdims=True), std))
        return (x - mean) / std

    if order == CHANNELS_FIRST:
        of_channels = zip(jnp.split(x, channels, axis=-1), mean, std, strict=True)
        targets = [target(x, mean, std, 2) for x, mean, std in of_channels]
        return jnp.concatenate(targets, axis=-1)
    x = einops.rearrange(x, "b m (p c) -> b m p c", c=channels)
    mean, std = (np.reshape(v, (1, 1, 1, -1)) for v in (mean, std))
    x = target(x, mean, std, 2)
    return einops.rearrange(x, "b m p c -> b m (p c)")


def reconstruction_loss(
    logits: Float[AnyArray, "b k p"],
    targets: Float[AnyArray, "b k p"],
    counted: Bool[AnyArray, "b k"] | None = None,
) -> Float[jax.Array, ""]:
    """Mean squared error over every value of every token; no gradient to the targets.

    `counted` selects tokens of the batch (VideoMAE V2); NaN if it selects none.
    """
    targets = jax.lax.stop_gradient(at_least_float32(jnp.asarray(targets)))
    errors = (at_least_float32(jnp.asarray(logits)) - targets) ** 2
    if counted is None:
        return jnp.mean(errors)
    counted = counted.astype(errors.dtype)
    return jnp.sum(jnp.mean(errors, axis=-1) * counted) / jnp.sum(counted)
