# SPDX-License-Identifier: Apache-2.0
"""Training and inference for clips that fit in memory, on one device: the least that works."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.core import meta

from vivit_jax.data.processor import VideoProcessor
from vivit_jax.errors import UserError
from vivit_jax.masking import Mask
from vivit_jax.train.metrics import classification_metrics
from vivit_jax.train.step import gradient_step, jit_step


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What one pass over the clips came to; `loss` and `accuracy` are means while training."""

    number: int  # from 1
    loss: float
    accuracy: float | None  # None in pre-training
    clips_per_second: float


def init_params(model: nn.Module, seed: int, mask: Mask | None = None) -> Any:
    """Fresh params, without partitioning metadata; a model for pre-training needs a `mask`."""
    config = model.config
    clip = jnp.zeros((1, config.num_frames, *config.frame_size, config.num_channels))
    inputs = {} if mask is None else {"mask": mask}
    # On CPU this generator compiles in less than half the time of the default one.
    key = jax.random.key(seed, impl="rbg")
    return meta.unbox(jax.jit(model.init)(key, clip, **inputs))["params"]


def logits_of(
    model: nn.Module, params: Any, pixel_values: np.ndarray, batch_size: int = 64
) -> np.ndarray:
    """Logits [n, classes] of pixel_values [n, t, h, w, c], with exact matrix products."""
    with jax.default_matmul_precision("highest"):
        batches = np.split(pixel_values, range(batch_size, len(pixel_values), batch_size))
        return np.concatenate([_logits(model, params, batch) for batch in batches])


# Equal models share the compiled function: one that is loaded back is not compiled again.
@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, pixel_values):
    return model.apply({"params": params}, pixel_values).logits


def arithmetic(processor: VideoProcessor) -> tuple[np.ndarray, np.ndarray]:
    """What the processor does after resize and crop: byte * scale + shift, float64 [] or [c]."""
    scale = processor.rescale_factor if processor.do_rescale else 1.0
    shift = -1.0 if processor.offset else 0.0
    if processor.do_normalize:
        mean, std = np.asarray(processor.image_mean), np.asarray(processor.image_std)
        scale, shift = scale / std, (shift - mean) / std
    return np.asarray(scale, np.float64), np.asarray(shift, np.float64)


def normaliser(processor: VideoProcessor) -> Callable[[jax.Array], jax.Array]:
    """The processor's `arithmetic` on the device: uint8 [b, t, h, w, c] to float32 pixels."""
    values = arithmetic(processor)
    scale, shift = (value.astype(np.float32).reshape(1, 1, 1, 1, -1) for value in values)
    return lambda clips: clips.astype(jnp.float32) * scale + shift


def fit(
    model: nn.Module,
    params: Any,
    clips: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    mask: Callable[[jax.Array, int], Mask] | None = None,
    normalise: Callable[[jax.Array], jax.Array],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    b2: float = 0.999,
    seed: int = 0,
    augment: Callable[..., tuple[np.ndarray, ...]] | None = None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> Any:
    """Train with AdamW, linear warmup and cosine decay; returns the new params.

    clips uint8 [n, t, h, w, c]. A classifier learns `labels`, int [n], or [n, heads] for a model of
    several heads, whose accuracy is that of all heads together. A model for pre-training has none
    and learns from masks instead: `mask(key, batch)` draws one for each clip, anew in every step,
    inside `jax.jit`. Raises UserError unless one of the two is given.

    `normalise` turns a batch of clips into the model's float pixels on the device, see
    `normaliser`; `augment` maps a batch (rng, clips, labels), or (rng, clips) in pre-training, to
    the tuple to learn from. `warmup` is a fraction of all steps, `b2` the decay of Adam's second
    moment. Order and augmentation are functions of (seed, epoch); clips that do not fill a batch
    sit the epoch out. `report` is called after every epoch. Dropout and stochastic depth act as the
    config says.
    """
    if (labels is None) == (mask is None):
        got = "neither labels nor a mask" if mask is None else "labels and a mask"
        raise UserError(
            f"fit got {got}; give labels to train a classifier, or a mask, such as "
            "functools.partial(tube_mask, grid=model.config.grid), to pre-train"
        )
    batch_size = min(batch_size, len(clips))
    per_epoch = len(clips) // batch_size
    steps = epochs * per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, int(warmup * steps), steps)
    # Decaying biases and norms as well would pull the norms' scales towards 0.
    kernels = jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)
    optimizer = optax.adamw(schedule, b2=b2, weight_decay=weight_decay, mask=kernels)

    @functools.partial(jit_step, pretraining=mask is not None)
    def step(state, clips, labels=None):
        params, optimizer_state, sums, key = state
        key, dropout = jax.random.split(key)
        # Folded in rather than split off, which would draw other dropout than without masks.
        hidden = mask and mask(jax.random.fold_in(dropout, 1), len(clips))

        def loss_of(params):
            out = model.apply(
                {"params": params},
                normalise(clips),
                **({"labels": labels} if hidden is None else {"mask": hidden}),
                deterministic=False,
                rngs={"dropout": dropout},
            )
            return out.loss, 0.0 if labels is None else _accuracy(model.config, out.logits, labels)

        params, optimizer_state, loss, accuracy = gradient_step(
            optimizer, loss_of, params, optimizer_state
        )
        return params, optimizer_state, sums + jnp.stack([loss, accuracy]), key

    arrays = (clips,) if labels is None else (clips, labels)
    # A copy, because the steps overwrite their state and the caller's params are not ours.
    params = jax.tree.map(jnp.copy, params)
    state = (params, optimizer.init(params), None, jax.random.key(seed, impl="rbg"))
    for epoch in range(epochs):
        start = time.perf_counter()
        state = (*state[:2], jnp.zeros(2), state[3])
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(len(clips))
        for rows in order[: per_epoch * batch_size].reshape(per_epoch, batch_size):
            batch = tuple(array[rows] for array in arrays)
            if augment is not None:
                batch = augment(rng, *batch)
            state = step(state, *batch)
        loss, accuracy = (float(total) / per_epoch for total in state[2])
        seconds = time.perf_counter() - start
        accuracy = None if labels is None else accuracy
        report(Epoch(epoch + 1, loss, accuracy, per_epoch * batch_size / seconds))
    return state[0]


def _accuracy(config, logits, labels):
    """Share of right answers, in all heads together where there are several."""
    metrics = classification_metrics(logits, labels, config.class_splits, config.split_names)
    prefix = f"{'-'.join(config.split_names)}_" if config.split_names else ""
    return metrics[f"{prefix}accuracy"]
