# SPDX-License-Identifier: Apache-2.0
"""Reconstruction of clips by a masked autoencoder, without use of the hidden pixels.

A model trained with `norm_pix_loss` predicts each tubelet normalised by its own mean and standard
deviation. The papers' pictures restore the true ones, which shows the brightness and colour of
hidden patches whatever the model knows. Here they are estimated from visible patches unless the
true ones are asked for. `Reconstruction` holds the errors of both forms, each with two baselines
that know as much.

Numpy, float64; pixels are in [0, 1]. Patches are [b, l, p, c]: tokens in (t, h, w) order, the
values of one channel of a tubelet in (t, h, w) order, channels.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import einops
import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Shaped

from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError
from vivit_jax.layers.tubelets import whole_tubelets
from vivit_jax.masking import Grid, Mask
from vivit_jax.models.losses import TARGET_EPSILON, pixel_statistics
from vivit_jax.models.videomae import VideoMAEForPreTraining
from vivit_jax.outputs import RESULTS_ONLY
from vivit_jax.train.normalise import arithmetic

ROWS = ("reconstruction", "patch mean", "nearest visible patch")
COLUMNS = ("from visible patches", "true mean and variance")
# The rows' names in each column, for showing one column alone.
ROWS_OF_COLUMNS = (
    ("reconstruction", "patch mean, estimated", "nearest visible patch"),
    ("reconstruction", "true patch mean", "nearest visible patch with true mean and variance"),
)
_TABLE_ROWS = ("reconstruction", "patch mean, estimated or true", "nearest visible patch")

# Weights of visible patches fall with this power of their distance. On held-out synthetic clips
# (160 of 4x6x6 tokens, tube and random masks of 0.75 and 0.9) the RMSE of the estimated mean is
# 0.099 to 0.115 with 3, 0.103 to 0.115 with 2, 0.098 to 0.116 with 4, 0.119 to 0.138 with the
# nearest patch alone and 0.115 to 0.120 with the mean over the clip.
DISTANCE_POWER = 3


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Clips, their reconstructions, and the mean squared errors of hidden patches.

    Clips are cut to whole tubelets, which is what the model sees. `clips` shows visible patches as
    they are and hidden ones as predicted; hidden patches that the model does not predict (a dual
    mask) are NaN. Predictions may leave [0, 1].
    """

    original: np.ndarray  # [b, t, h, w, c]
    clips: np.ndarray  # [b, t, h, w, c]
    hidden: np.ndarray  # bool [b, l]
    predicted: np.ndarray  # bool [b, l]: hidden, and predicted by the model
    tubelet: Grid
    statistics: str  # of hidden patches: "estimated", "true", or "none" if pixels are predicted
    squared_errors: np.ndarray  # [b, ROWS, COLUMNS], means over predicted patches, in [0, 1] pixels

    @property
    def masked_clips(self) -> Float[np.ndarray, "b t h w c"]:
        """The clips as the encoder sees them, with hidden patches NaN."""
        patches = to_patches(self.original, self.tubelet)
        patches[self.hidden] = np.nan
        return to_clips(patches, self.original.shape, self.tubelet)

    def take(self, clips: Sequence[int]) -> "Reconstruction":
        """Some of the clips."""
        per_clip = ("original", "clips", "hidden", "predicted", "squared_errors")
        chosen = {name: getattr(self, name)[list(clips)] for name in per_clip}
        return dataclasses.replace(self, **chosen)


def reconstruct(
    model: VideoMAEForPreTraining,
    params: Any,
    pixel_values: Float[np.ndarray, "b t h w c"],
    mask: Mask,
    processor: VideoProcessor,
    *,
    true_statistics: bool = False,
) -> Reconstruction:
    """Predict the hidden patches of pixel_values [b, t, h, w, c], made by `processor`.

    `true_statistics` is the papers' form, which gives each hidden patch its true mean and variance,
    although nothing predicted them. Without it no hidden pixel influences `clips` in hidden
    patches. Raises UserError for a model without a pre-training head, and for `true_statistics`
    with a model that predicts pixels (`norm_pix_loss=False`).
    """
    if not isinstance(model, VideoMAEForPreTraining):
        raise UserError(
            f"reconstruct got a {type(model).__name__}; expected a VideoMAEForPreTraining: load "
            'the checkpoint with from_pretrained(..., head="pretraining")'
        )
    check_statistics(model.config, true_statistics)
    config, tubelet = model.config, model.config.tubelet
    seen = whole_tubelets(pixel_values, tubelet)
    shape = seen.shape
    t, h, w = (size // patch for size, patch in zip(shape[1:4], tubelet, strict=True))
    grid = t, h, w
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(_predictions(model, params, pixel_values, mask), np.float64)
    if not np.isfinite(logits).all():
        raise UserError("the model predicts values that are not finite; its weights are damaged")

    scale, shift = arithmetic(processor)
    original = (np.asarray(seen, np.float64) - shift) / scale / 255
    patches = to_patches(original, tubelet)
    hidden = np.asarray(mask.to_bool())
    rows = np.arange(len(patches))[:, None]
    guesses = np.full_like(patches, np.nan)
    guesses[rows, np.asarray(mask.predicted)] = einops.rearrange(
        logits, "b k (p c) -> b k p c", c=shape[-1]
    )
    predicted = hidden & ~np.isnan(guesses[:, :, 0, 0])
    if not predicted.any(1).all():
        raise UserError(
            "some clip has no token that is both masked and decoded, so that there is nothing to "
            "reconstruct; mask more tokens, or decode all of them (Mask.decoded=None)"
        )

    nearest = nearest_visible(hidden, grid)
    copies = patches[rows, nearest]
    estimated, true = estimate_statistics(patches, hidden, grid), patch_statistics(patches)
    if config.norm_pix_loss:
        made = [_denormalised(guesses, *statistics) for statistics in (estimated, true)]
    else:
        # From predicted pixels to the model's input to bytes: the identity if the two agree.
        channels = pixel_statistics(config)
        assert channels is not None  # else the model refused to compute its loss
        mean, std = map(np.asarray, channels)
        made = [((guesses - mean) / std - shift) / scale / 255, np.full_like(guesses, np.nan)]
    candidates = [
        made,
        [np.broadcast_to(mean, patches.shape) for mean, _ in (estimated, true)],
        [copies, _denormalised(_normalised(copies, *patch_statistics(copies)), *true)],
    ]
    errors = [
        [_mean_square(candidate - patches, predicted) for candidate in row] for row in candidates
    ]
    shown = np.where(hidden[..., None, None], made[int(true_statistics)], patches)
    return Reconstruction(
        original=original,
        clips=to_clips(shown, shape, tubelet),
        hidden=hidden,
        predicted=predicted,
        tubelet=tubelet,
        statistics=("estimated", "true")[true_statistics] if config.norm_pix_loss else "none",
        squared_errors=np.moveaxis(np.array(errors), -1, 0),
    )


def check_statistics(config, true_statistics: bool) -> None:
    """Raises UserError for true statistics if the model does not predict normalised patches."""
    if true_statistics and not config.norm_pix_loss:
        raise UserError(
            "true statistics are for models that predict normalised patches (norm_pix_loss=True); "
            "this one has norm_pix_loss=False and predicts pixels: leave them out"
        )


def rmse(reconstructions: Iterable[Reconstruction]) -> Float[np.ndarray, "rows columns"]:
    """Root mean square errors [ROWS, COLUMNS] over all predicted patches of all clips.

    NaN where there is none: a model that predicts pixels takes no statistics.
    """
    reconstructions = list(reconstructions)
    squares = np.concatenate([r.squared_errors for r in reconstructions])
    counts = np.concatenate([r.predicted.sum(1) for r in reconstructions])
    return np.sqrt(np.average(squares, axis=0, weights=counts))


def error_table(errors: Float[np.ndarray, "rows columns"]) -> list[str]:
    """`rmse`'s table as lines of text."""
    width = max(map(len, _TABLE_ROWS))
    lines = ["  ".join([" " * width, *COLUMNS])]
    for name, values in zip(_TABLE_ROWS, errors, strict=True):
        cells = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        cells = [cell.rjust(len(title)) for cell, title in zip(cells, COLUMNS, strict=True)]
        lines.append("  ".join([name.ljust(width), *cells]))
    return lines


def error_dict(
    errors: Float[np.ndarray, "rows columns"],
) -> dict[str, dict[str, float | None]]:
    """`rmse`'s table by ROWS, then COLUMNS, for JSON: None for NaN."""
    return {
        row: {
            column: None if np.isnan(value) else float(value)
            for column, value in zip(COLUMNS, values, strict=True)
        }
        for row, values in zip(ROWS, errors, strict=True)
    }


def to_patches(
    clips: Shaped[np.ndarray, "b t h w c"], tubelet: Grid
) -> Shaped[np.ndarray, "b l p c"]:
    """A copy of clips as patches."""
    t, h, w = tubelet
    pattern = "b (t x) (h y) (w z) c -> b (t h w) (x y z) c"
    return einops.rearrange(clips, pattern, x=t, y=h, z=w).copy()


def to_clips(
    patches: Shaped[np.ndarray, "b l p c"], shape: tuple[int, ...], tubelet: Grid
) -> Shaped[np.ndarray, "b t h w c"]:
    """The inverse of `to_patches`, for clips of `shape`."""
    sizes = dict(zip("xyz", tubelet, strict=True))
    sizes |= {n: s // p for n, s, p in zip("thw", shape[1:4], tubelet, strict=True)}
    return einops.rearrange(patches, "b (t h w) (x y z) c -> b (t x) (h y) (w z) c", **sizes)


def patch_statistics(
    patches: Float[np.ndarray, "b l p c"],
) -> tuple[Float[np.ndarray, "b l 1 c"], Float[np.ndarray, "b l 1 c"]]:
    """The mean and unbiased standard deviation of each patch and channel."""
    if patches.shape[2] < 2:
        raise UserError("patches of one pixel have no variance; expected a larger tubelet")
    return patches.mean(2, keepdims=True), patches.std(2, ddof=1, keepdims=True)


def estimate_statistics(
    patches: Float[np.ndarray, "b l p c"], hidden: Bool[np.ndarray, "b l"], grid: Grid
) -> tuple[Float[np.ndarray, "b l 1 c"], Float[np.ndarray, "b l 1 c"]]:
    """`patch_statistics` estimated from visible patches.

    `hidden` is true for some tokens of each clip, not for all. Visible patches keep their own
    statistics. Hidden ones get means over visible patches, weighted by the distance in tokens to
    the power -DISTANCE_POWER.
    """
    distances = _distances(grid)
    means, stds = patch_statistics(patches)
    for clip, (mean, std) in zip(hidden, zip(means, stds, strict=True), strict=True):
        weights = distances[np.ix_(clip, ~clip)] ** (-DISTANCE_POWER / 2)
        weights /= weights.sum(1, keepdims=True)
        for values in (mean, std):
            values[clip, 0] = weights @ values[~clip, 0]
    return means, stds


def nearest_visible(hidden: Bool[np.ndarray, "b l"], grid: Grid) -> Int[np.ndarray, "b l"]:
    """The nearest visible token of each token, by distance in tokens.

    A visible token is its own. Ties go to the first in token order: the earliest, then the topmost,
    then the leftmost.
    """
    distances = _distances(grid)
    return np.stack([np.where(clip, np.inf, distances).argmin(1) for clip in hidden])


@functools.lru_cache(maxsize=1)
def _distances(grid: Grid) -> np.ndarray:
    """Squared distances [l, l] between tokens, in tokens."""
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=-1)
    return np.sum([np.subtract.outer(axis, axis) ** 2.0 for axis in places.T], axis=0)


def _normalised(patches, mean, std):
    return (patches - mean) / (std + TARGET_EPSILON)


def _denormalised(values, mean, std):
    return values * (std + TARGET_EPSILON) + mean


def _mean_square(differences: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Mean squares [b] of differences [b, l, p, c] over tokens, bool [b, l]."""
    squares = np.where(tokens, (differences**2).mean((2, 3)), 0.0)
    return squares.sum(1) / tokens.sum(1)


# Equal models share the compiled function: one that is loaded back is not compiled again.
@functools.partial(jax.jit, static_argnums=0)
def _predictions(model: nn.Module, params, pixel_values, mask):
    out: Any = model.apply({"params": params}, pixel_values, mask, **RESULTS_ONLY)
    return out.logits
