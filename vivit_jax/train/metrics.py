# SPDX-License-Identifier: Apache-2.0
"""Accuracies of one or several classification heads; pure functions, usable under jit."""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.layers.linear import at_least_float32
from vivit_jax.masking import AnyArray
from vivit_jax.models.losses import (
    IGNORE_INDEX,
    Labels,
    Logits,
    head_sizes,
    read_labels,
    split_labels,
    split_logits,
)

TOP_K = 5
_SHARE = re.compile(r"(.*_)?accuracy(_top_[0-9]+)?")  # names of metrics


def action_scores(logits: Logits, class_splits: tuple[int, ...]) -> Float[Array, "b combinations"]:
    """The probability of each combination of classes, with independent heads.

    logits [b, sum(class_splits)] -> [b, prod(class_splits)] in float32 or wider: the outer product
    of the heads' softmax, the last head fastest (noun * 97 + verb). Raises UserError for fewer than
    two heads. Source: scenic's Epic-Kitchens evaluation.
    """
    if len(head_sizes(class_splits)) < 2:
        raise UserError(
            f"class_splits must name two or more heads to combine, got {class_splits!r}; one head "
            "needs no action scores"
        )
    heads = split_logits(at_least_float32(jnp.asarray(logits)), class_splits)
    scores, *others = (jax.nn.softmax(head) for head in heads)
    for other in others:
        scores = (scores[:, :, None] * other[:, None, :]).reshape(len(scores), -1)
    return scores


def topk_accuracy(scores: Logits, labels: Integer[AnyArray, " b"], k: int = 1) -> Float[Array, ""]:
    """The share of rows whose label is among the k largest scores, in float32 or wider.

    scores [b, classes], labels int [b]; rows with label -100 do not count (NaN if none does). Equal
    scores rank by class index, as for argmax and `jax.lax.top_k`: a row is right if fewer than k
    classes score higher, or equal with a lower index. So a model that scores all classes alike is
    not right everywhere.

    A label outside [0, classes), or a NaN among the scores, of a row that counts gives NaN. Raises
    UserError for shapes and dtypes that do not fit and for k outside 1..classes.
    """
    scores, labels = at_least_float32(jnp.asarray(scores)), jnp.asarray(labels)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not integers:
        raise UserError(
            f"labels of shape {labels.shape} and dtype {labels.dtype} do not fit scores of shape "
            f"{scores.shape}; expected scores [batch, classes] and integer labels [batch]"
        )
    classes = scores.shape[1]
    if not 1 <= k <= classes:
        raise UserError(f"k must be from 1 to the number of classes {classes}, got {k!r}")
    counted, known, index = read_labels(labels, classes)
    index = index[:, None]
    own = jnp.take_along_axis(scores, index, axis=1)
    lower = jnp.arange(classes)[None] < index
    ahead = jnp.sum((scores > own) | ((scores == own) & lower), axis=1)
    hits = (ahead < k).astype(scores.dtype)
    # Comparisons with NaN are false, which would make a diverged model right everywhere.
    hits = jnp.where(known & ~jnp.isnan(scores).any(axis=1), hits, jnp.nan)
    return jnp.sum(jnp.where(counted, hits, 0)) / jnp.sum(counted)


def classification_metrics(
    logits: Logits,
    labels: Labels,
    class_splits: tuple[int, ...] | None = None,
    split_names: tuple[str, ...] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Accuracies by name, each from `topk_accuracy`.

    Without `class_splits`: "accuracy" and "accuracy_top_5"; logits [b, classes], labels int [b] or
    float [b, classes]. With it: "noun_accuracy" and "noun_accuracy_top_5" for each name of
    `split_names` (None: 1, 2, ... as in the configuration), and for two or more heads together
    "noun-verb_accuracy" and "noun-verb_accuracy_top_5", from `action_scores`; logits
    [b, sum(class_splits)], labels int [b, heads] or float [b, sum(class_splits)]. There is no top 5
    of 5 or fewer classes.

    Float labels mean their largest class; a row of zeros has no label and does not count, as with
    label -100. A row without a label for some head does not count for the combination. Raises
    UserError for shapes, dtypes and names that do not fit. Source: scenic's names and definitions.
    """
    logits = at_least_float32(jnp.asarray(logits))
    if class_splits is None:
        if split_names is not None:
            raise UserError(
                f"split_names {split_names!r} needs class_splits, got None; give the class count "
                "of each head, or split_names=None"
            )
        return _accuracies(logits, _classes(_single_labels(logits, labels)), "")
    sizes = head_sizes(class_splits)
    names = tuple(split_names or (str(i + 1) for i in range(len(sizes))))
    if len(names) != len(sizes) or len(set(names)) != len(names):
        raise UserError(
            f"split_names must be {len(sizes)} different names, one for each of class_splits "
            f"{sizes}, got {split_names!r}; None names them 1, 2, ..."
        )
    heads = split_logits(logits, sizes)
    classes = [_classes(part) for part in split_labels(logits, labels, sizes)]
    metrics = {}
    for name, head, label in zip(names, heads, classes, strict=True):
        metrics |= _accuracies(head, label, f"{name}_")
    if len(heads) > 1:
        joint = _joint_label(classes, sizes)
        metrics |= _accuracies(action_scores(logits, sizes), joint, f"{'-'.join(names)}_")
    return metrics


def metric_text(name: str, value: float) -> str:
    """A metric with its name, as people read it: accuracies in per cent."""
    share = _SHARE.fullmatch(name) is not None
    return f"{name} {value:.1%}" if share else f"{name} {value:.4g}"


def leading_accuracy(config: Config, logits: Logits, labels: Labels) -> Float[Array, ""]:
    """The accuracy, of all heads together if the model has several."""
    metrics = classification_metrics(logits, labels, config.class_splits, config.split_names)
    return metrics[leading_name(config)]


def leading_name(config: Config) -> str:
    """The name of `leading_accuracy` among `classification_metrics`."""
    if config.class_splits is None:
        return "accuracy"
    names = config.split_names or (str(i + 1) for i in range(len(config.class_splits)))
    return f"{'-'.join(names)}_accuracy"


def checkpoint_score(metrics: Mapping[str, float]) -> float:
    """The score by which checkpoints are compared, from the metrics of an evaluation.

    Their last accuracy, which is that of all heads together if there are several; of pre-training
    the loss, negative. Of a few held-out clips many models have the same accuracy; their loss then
    decides, by less than one clip more.
    """
    accuracies = [name for name in metrics if name.endswith("accuracy")]
    loss = metrics.get("loss", math.nan)
    if not accuracies:
        return -loss
    score = metrics[accuracies[-1]]
    return score + math.exp(-loss) / (1 + metrics["videos"]) if math.isfinite(loss) else score


def _accuracies(scores, labels, prefix: str) -> dict[str, jax.Array]:
    metrics = {f"{prefix}accuracy": topk_accuracy(scores, labels, 1)}
    if scores.shape[1] > TOP_K:
        metrics[f"{prefix}accuracy_top_{TOP_K}"] = topk_accuracy(scores, labels, TOP_K)
    return metrics


def _single_labels(logits, labels) -> jax.Array:
    labels = jnp.asarray(labels)
    integers = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:1]
    floats = jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == logits.shape
    if logits.ndim != 2 or not (integers or floats):
        raise UserError(
            f"labels of shape {labels.shape} and dtype {labels.dtype} do not fit logits of shape "
            f"{logits.shape}; expected logits [batch, classes] and labels integers [batch] or "
            "floats [batch, classes]; for several heads give class_splits"
        )
    return labels


def _classes(labels) -> jax.Array:
    """Class indices [b] of int [b] or float [b, classes]."""
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return labels
    return jnp.where((labels != 0).any(axis=1), jnp.argmax(labels, axis=1), IGNORE_INDEX)


def _joint_label(classes, sizes) -> jax.Array:
    """Indices into `action_scores` [b]; -100 if a head has no label."""
    joint, all_counted, all_known = 0, True, True
    for label, count in zip(classes, sizes, strict=True):
        counted, known, index = read_labels(label, count)
        joint = joint * count + index
        all_counted &= counted
        all_known &= known
    # Checked by head, or noun 0, verb 97 would pass for noun 1, verb 0.
    return jnp.where(all_counted, jnp.where(all_known, joint, math.prod(sizes)), IGNORE_INDEX)
