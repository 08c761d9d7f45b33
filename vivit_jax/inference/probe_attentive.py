# SPDX-License-Identifier: Apache-2.0
"""Trains attentive heads on the tokens of a frozen model: many at once, on the same batches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.core import meta
from jaxtyping import Bool, Float, Float32, Int

from vivit_jax import param_tree
from vivit_jax.inference.probe_features import (
    ClipFeatures,
    count_views,
    read_tokens,
    read_view,
)
from vivit_jax.inference.probe_linear import Scaling, averaged, spread_at_least
from vivit_jax.models.head import AttentivePool, classify
from vivit_jax.progress import live_line

LEARNING_RATE = 1e-3  # as in V-JEPA's attentive probes
EPOCHS, STEPS = 20, 400  # at least
_BATCH = 16  # clips


class AttentiveHead(nn.Module):
    """The attentive pool and the classifier of a model, by the names that they have in it."""

    config: Any

    @nn.compact
    def __call__(self, tokens: Float[jax.Array, "b l d"]) -> Float[jax.Array, "b classes"]:
        pooled = AttentivePool(self.config, name="attentive")(tokens)
        return classify(self.config, pooled, None)[1]


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """Clips with tokens in files, and their labels."""

    files: tuple[Path, ...]
    labels: Int[np.ndarray, " n"]

    def scaling(self) -> Scaling:
        """Mean and spread of each of the d features over all tokens of all clips."""
        total, squares, count = 0.0, 0.0, 0
        for file in self.files:
            tokens = read_tokens(file).astype(np.float64)
            tokens = tokens.reshape(-1, tokens.shape[-1])
            total, squares = total + tokens.sum(0), squares + (tokens**2).sum(0)
            count += len(tokens)
        mean = np.asarray(total / count)
        return spread_at_least(mean, np.sqrt(np.maximum(squares / count - mean**2, 0)))


def train_heads(
    config: Any,
    clips: TokenFiles,
    taken: Bool[np.ndarray, "m n"],
    weight_decays: Sequence[float],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, np.ndarray]]:
    """m attentive heads, each trained on the clips of its row of `taken`.

    Head j has weight_decays[j]. All start alike and see the same batches, so that tokens are read
    once. AdamW with a learning rate that falls from LEARNING_RATE along a cosine; kernels decay.
    Tokens are scaled (`TokenFiles.scaling`) as by AIM's batch norm, and the scaling is part of the
    heads that are returned: parameters by path, for tokens as they are.
    """
    # The config's own initial values suit a model's width, or a checkpoint's past.
    width = config.hidden_size
    config = dataclasses.replace(
        config, dtype="float32", param_dtype="float32", initializer_range=width**-0.5
    )
    head = AttentiveHead(config)
    first, views = read_view(clips.files[0], 0), count_views(clips.files[0])
    values = head.init(jax.random.key(seed), jnp.asarray(first[None]))["params"]
    count = len(weight_decays)
    params = jax.tree.map(lambda x: jnp.stack([x] * count), meta.unbox(values))
    scaling = clips.scaling()
    scale = jnp.asarray(scaling.mean, jnp.float32), jnp.asarray(scaling.spread, jnp.float32)
    state = jax.vmap(_optimizer(0.0).init)(params)
    decays, step = jnp.asarray(weight_decays, jnp.float32), _step(config)
    per_epoch = -(-len(clips.files) // _BATCH)
    steps = max(EPOCHS * per_epoch, STEPS)
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [rng.permutation(len(clips.files)) for _ in range(-(-steps * _BATCH // len(clips.files)))]
    )
    for number in range(steps):
        rows = order[number * _BATCH : (number + 1) * _BATCH]
        drawn = rng.integers(views, size=len(rows))
        tokens = np.stack(
            [read_view(clips.files[i], int(view)) for i, view in zip(rows, drawn, strict=True)]
        )
        rate = LEARNING_RATE * 0.5 * (1 + np.cos(np.pi * number / steps))
        weights = jnp.asarray(taken[:, rows], jnp.float32)
        labels = clips.labels[rows]
        params, state = step(
            params, state, decays, scale, tokens, labels, weights, np.float32(rate)
        )
        if progress is not None:
            progress(number + 1, steps)
    folded = jax.vmap(_folded, in_axes=(0, None, None))(params, *scale)
    flat = {path: np.asarray(leaf) for path, leaf in param_tree.flatten(folded).items()}
    return [{path: leaf[j] for path, leaf in flat.items()} for j in range(count)]


@functools.lru_cache(maxsize=4)
def _step(config: Any) -> Callable:
    """(params, state, decays [m], scale, tokens, labels, weights [m, b], rate) -> params, state."""

    head = AttentiveHead(config)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, decays, scale, tokens, labels, weights, rate):
        def loss(params, taken):
            logits: Any = head.apply({"params": _folded(params, *scale)}, tokens)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return (losses * taken).sum() / jnp.maximum(taken.sum(), 1)

        def one(params, state, decay, taken):
            changes = jax.grad(loss)(params, taken)
            changes, state = _optimizer(decay).update(changes, state, params)
            return optax.apply_updates(params, jax.tree.map(lambda x: -rate * x, changes)), state

        return jax.vmap(one)(params, state, decays, weights)

    return step


def _optimizer(decay: Any) -> optax.GradientTransformation:
    """AdamW without its learning rate; the query and the bias do not decay."""

    def kernels(params):
        return param_tree.unflatten(
            {path: path.endswith("kernel") for path in param_tree.flatten(params)}
        )

    decayed = optax.add_decayed_weights(decay, mask=kernels)
    return optax.chain(optax.scale_by_adam(), decayed)


def _folded(params: Any, mean: jax.Array, spread: jax.Array) -> dict[str, Any]:
    """The head that computes from tokens as they are what `params` do from scaled ones.

    The mean adds the same to all scores of a query, which softmax drops, and to values a constant.
    """
    flat = param_tree.flatten(params)
    for name in ("attentive/key/kernel", "attentive/value/kernel"):
        flat[name] = flat[name] / spread[:, None, None]
    constant = jnp.einsum("d,dne->ne", mean, flat["attentive/value/kernel"]).reshape(-1)
    flat["head/bias"] = flat["head/bias"] - constant @ flat["head/kernel"]
    return param_tree.unflatten(flat)


def head_scores(
    config: Any, heads: Sequence[dict[str, np.ndarray]], files: Sequence[Path]
) -> Float32[np.ndarray, "m n views classes"]:
    """The logits of each head for each view of each clip."""
    params = param_tree.unflatten(
        {path: jnp.stack([head[path] for head in heads]) for path in heads[0]}
    )
    scores = _scores(dataclasses.replace(config, dtype="float32"))
    return np.stack([np.asarray(scores(params, read_tokens(f))) for f in files], axis=1)


@functools.lru_cache(maxsize=4)
def _scores(config: Any) -> Callable:
    """(params of m heads, tokens [views, l, d]) -> [m, views, classes]."""
    head = AttentiveHead(config)

    def scores(params, tokens):
        return head.apply({"params": params}, tokens)

    return jax.jit(jax.vmap(scores, in_axes=(0, None)))


@dataclasses.dataclass(frozen=True)
class AttentiveProbe:
    """An attentive head on all tokens; see `train_heads`.

    Attributes:
        config: of the model with the head.
        train: the clips that it is trained on.
        labels: theirs.
        average: what is averaged over views, "softmax" or "logits".
        seed: of initial values and batches.
    """

    config: Any
    train: ClipFeatures
    labels: Int[np.ndarray, " n"]
    average: str
    seed: int = 0

    def out_of_fold(
        self, folds: Int[np.ndarray, " n"], weight_decays: Sequence[float]
    ) -> Float[np.ndarray, "decays n classes"]:
        """Scores of each clip by heads that were not trained on its fold; NaN in no fold."""
        count, each = folds.max() + 1, len(weight_decays)
        taken = np.repeat(folds[None] != np.arange(count)[:, None], each, axis=0)
        heads = self._trained(taken, [*weight_decays] * count, "cross-validation")
        logits = head_scores(self.config, heads, self.train.files)
        logits = logits.reshape(count, each, *logits.shape[1:])
        scores = np.full((each, len(folds), logits.shape[-1]), np.nan)
        for fold in range(count):
            held = folds == fold
            for row, found in zip(scores, logits[fold], strict=True):
                row[held] = averaged(found[held].astype(np.float64), self.average)
        return scores

    def fit(self, weight_decay: float) -> dict[str, np.ndarray]:
        """The head trained on all clips: parameters of the model by path."""
        everything = np.ones((1, len(self.labels)), bool)
        return self._trained(everything, [weight_decay], "head")[0]

    def scores(
        self, head: dict[str, np.ndarray], clips: ClipFeatures
    ) -> Float[np.ndarray, "m classes"]:
        """The scores of clips by a head of `fit`."""
        (logits,) = head_scores(self.config, [head], clips.files)
        return averaged(logits.astype(np.float64), self.average)

    def _trained(self, taken, weight_decays: Sequence[float], name: str):
        clips = TokenFiles(self.train.files, self.labels)
        with live_line(name) as progress:
            return train_heads(
                self.config, clips, taken, weight_decays, seed=self.seed, progress=progress
            )
