# SPDX-License-Identifier: Apache-2.0
"""What a masked autoencoder makes of a clip, without looking at what was hidden from it.

A model trained with `norm_pix_loss` predicts every tubelet normalised by that tubelet's own mean
and standard deviation. The papers' pictures put the true ones back in, which shows brightness and
colour of every hidden patch whatever the model knows. Here they are estimated from visible patches
unless the true ones are asked for. `Reconstruction` holds the errors of both, each beside two
baselines that know as much.

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
# What the rows are in each of the columns, for where one column is shown alone.
ROWS_OF_COLUMNS = (
    ("reconstruction", "patch mean, estimated", "nearest visible patch"),
    ("reconstruction", "true patch mean", "nearest visible patch with true mean and variance"),
)
_TABLE_ROWS = ("reconstruction", "patch mean, estimated or true", "nearest visible patch")

# Weights of visible patches fall with this power of their distance. On held-out clips of the
# synthetic data (160 clips of 4x6x6 tokens, tube and random masks of 0.75 and 0.9), the estimated
# mean is off by 0.099 to 0.115 in RMSE with 3; with 2 by 0.103 to 0.115, with 4 by 0.098 to 0.116,
# with the nearest patch alone by 0.119 to 0.138, with the mean over the clip by 0.115 to 0.120.
DISTANCE_POWER = 3


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Clips, what the model made of their hidden patches, and mean squared errors there.

    Of a clip that is no multiple of the tubelet it holds the whole tubelets, which the model sees.
    `clips` shows visible patches as they are and hidden ones as predicted; hidden patches that the
    model did not predict (a dual mask) are NaN. Predictions may leave [0, 1].
    """

    original: np.ndarray  # [b, t, h, w, c]
    clips: np.ndarray  # [b, t, h, w, c]
    hidden: np.ndarray  # bool [b, l]
    predicted: np.ndarray  # bool [b, l]: hidden, and predicted by the model
    tubelet: Grid
    statistics: str  # of hidden patches: "estimated", "true", or "none" where pixels are predicted
    squared_errors: np.ndarray  # [b, ROWS, COLUMNS], means over predicted patches, in [0, 1] pixels

    @property
    def masked_clips(self) -> np.ndarray:
        """The clips with hidden patches NaN: what the encoder sees."""
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
    pixel_values: np.ndarray,
    mask: Mask,
    processor: VideoProcessor,
    *,
    true_statistics: bool = False,
) -> Reconstruction:
    """Predict the hidden patches of pixel_values [b, t, h, w, c], made by `processor`.

    `true_statistics` is the papers' form, which gives each hidden patch its own mean and variance:
    it shows what nothing predicted. Without it, no hidden pixel has an influence on `clips` in
    hidden patches. Raises UserError for a model without a pre-training head, and for
    `true_statistics` with a model that predicts pixels (`norm_pix_loss=False`).
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
    grid = tuple(size // patch for size, patch in zip(shape[1:4], tubelet, strict=True))
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
            "the mask has no token that is both masked and decoded in some clip, so that there is "
            "nothing to reconstruct; mask more tokens, or decode all of them (Mask.decoded=None)"
        )

    nearest = nearest_visible(hidden, grid)
    copies = patches[rows, nearest]
    estimated, true = estimate_statistics(patches, hidden, grid), patch_statistics(patches)
    if config.norm_pix_loss:
        made = [_denormalised(guesses, *statistics) for statistics in (estimated, true)]
    else:
        # The model's pixels, to its input, to bytes: the identity where the two agree.
        mean, std = map(np.asarray, pixel_statistics(config))
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
    """UserError for true statistics of a model that does not predict normalised patches."""
    if true_statistics and not config.norm_pix_loss:
        raise UserError(
            "true statistics are for models that predict normalised patches (norm_pix_loss=True); "
            "this one has norm_pix_loss=False and predicts the pixels themselves: leave them out"
        )


def rmse(reconstructions: Iterable[Reconstruction]) -> np.ndarray:
    """Root mean square errors [ROWS, COLUMNS] over all predicted patches of all clips.

    NaN for what does not exist: a model that predicts pixels takes no statistics.
    """
    reconstructions = list(reconstructions)
    squares = np.concatenate([r.squared_errors for r in reconstructions])
    counts = np.concatenate([r.predicted.sum(1) for r in reconstructions])
    return np.sqrt(np.average(squares, axis=0, weights=counts))


def error_table(errors: np.ndarray) -> list[str]:
    """The lines of `rmse`'s table as text."""
    width = max(map(len, _TABLE_ROWS))
    lines = ["  ".join([" " * width, *COLUMNS])]
    for name, values in zip(_TABLE_ROWS, errors, strict=True):
        cells = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        cells = [cell.rjust(len(title)) for cell, title in zip(cells, COLUMNS, strict=True)]
        lines.append("  ".join([name.ljust(width), *cells]))
    return lines


def error_dict(errors: np.ndarray) -> dict[str, dict[str, float | None]]:
    """`rmse`'s table by ROWS, then COLUMNS, for JSON: None for what does not exist."""
    return {
        row: {
            column: None if np.isnan(value) else float(value)
            for column, value in zip(COLUMNS, values, strict=True)
        }
        for row, values in zip(ROWS, errors, strict=True)
    }


def to_patches(clips: np.ndarray, tubelet: Grid) -> np.ndarray:
    """[b, t, h, w, c] -> [b, l, p, c], a copy."""
    t, h, w = tubelet
    pattern = "b (t x) (h y) (w z) c -> b (t h w) (x y z) c"
    return einops.rearrange(clips, pattern, x=t, y=h, z=w).copy()


def to_clips(patches: np.ndarray, shape: tuple[int, ...], tubelet: Grid) -> np.ndarray:
    """The inverse of `to_patches`: [b, l, p, c] -> clips of `shape`."""
    sizes = dict(zip("xyz", tubelet, strict=True))
    sizes |= {n: s // p for n, s, p in zip("thw", shape[1:4], tubelet, strict=True)}
    return einops.rearrange(patches, "b (t h w) (x y z) c -> b (t x) (h y) (w z) c", **sizes)


def patch_statistics(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased standard deviation of every patch and channel, [b, l, 1, c] each."""
    if patches.shape[2] < 2:
        raise UserError("patches of one pixel have no variance; expected a larger tubelet")
    return patches.mean(2, keepdims=True), patches.std(2, ddof=1, keepdims=True)


def estimate_statistics(
    patches: np.ndarray, hidden: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray]:
    """`patch_statistics` as far as visible patches tell, [b, l, 1, c] each.

    hidden bool [b, l], some and not all of each clip. In a visible patch they are its own. In a
    hidden one they are means over visible patches, weighted by distance in tokens to the power
    -DISTANCE_POWER.
    """
    distances = _distances(grid)
    means, stds = patch_statistics(patches)
    for clip, (mean, std) in zip(hidden, zip(means, stds, strict=True), strict=True):
        weights = distances[np.ix_(clip, ~clip)] ** (-DISTANCE_POWER / 2)
        weights /= weights.sum(1, keepdims=True)
        for values in (mean, std):
            values[clip, 0] = weights @ values[~clip, 0]
    return means, stds


def nearest_visible(hidden: np.ndarray, grid: Grid) -> np.ndarray:
    """For every token of hidden, bool [b, l], the nearest visible one in token distance.

    int [b, l]; a visible token is its own. Of several at the same distance the first in token
    order: the earliest, then the topmost, then the leftmost.
    """
    distances = _distances(grid)
    return np.stack([np.where(clip, np.inf, distances).argmin(1) for clip in hidden])


@functools.lru_cache(maxsize=1)
def _distances(grid: Grid) -> np.ndarray:
    """Squared distances [l, l] between tokens, in tokens."""
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=-1)
    return sum(np.subtract.outer(axis, axis) ** 2.0 for axis in places.T)


def _normalised(patches, mean, std):
    return (patches - mean) / (std + TARGET_EPSILON)


def _denormalised(values, mean, std):
    return values * (std + TARGET_EPSILON) + mean


def _mean_square(differences: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """[b]: over tokens, bool [b, l], of differences [b, l, p, c]."""
    squares = np.where(tokens, (differences**2).mean((2, 3)), 0.0)
    return squares.sum(1) / tokens.sum(1)


# Equal models share the compiled function: one that is loaded back is not compiled again.
@functools.partial(jax.jit, static_argnums=0)
def _predictions(model: nn.Module, params, pixel_values, mask):
    return model.apply({"params": params}, pixel_values, mask, **RESULTS_ONLY).logits
