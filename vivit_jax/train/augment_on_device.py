# SPDX-License-Identifier: Apache-2.0
"""Augmentations that run on the device inside a training step: colour, erasing, mixing.

All are functions of keys, and work under jit and with sharded batches. Each clip or group of clips
has a key of its own, so that a batch computed in parts or on several devices equals the whole
batch. The frames of a clip share every draw except the noise of random erasing. Drawing is separate
from applying. Give each augmentation its own keys: equal keys draw equal numbers.

`training_pixels` applies all but mixing, which `vivit_jax.train.step` does. A new augmentation gets
a field in `vivit_jax.data.settings.AugmentSettings`, its range in `vivit_jax.recipes.checks`, and a
function here that `training_pixels` calls.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Integer, Key, PRNGKeyArray

from vivit_jax.data.settings import AugmentSettings
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError
from vivit_jax.layers.dropout import clip_keys
from vivit_jax.layers.tubelets import ByteClips
from vivit_jax.masking import AnyArray
from vivit_jax.models.losses import head_sizes
from vivit_jax.train.normalise import hashable_arithmetic, scaled_and_shifted

Keys = Key[Array, " b"]  # one for each clip or group of clips
ClassLabels = Integer[AnyArray, "b *heads"]
# TensorFlow's grayscale weights of red, green and blue.
_LUMA = (0.2989, 0.587, 0.114)
_TRIES = 10  # to draw a box that fits, as in the papers' code


def training_pixels(
    processor: VideoProcessor,
    settings: AugmentSettings,
    own: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    floats: bool = False,
) -> Callable[[jax.Array, jax.Array, jax.Array], ByteClips | jax.Array]:
    """(key, clip_ids [b], uint8 [b, t, h, w, c]) -> the model's input, augmented except for mixing.

    The input is bytes with the processor's arithmetic if nothing changes a pixel and `floats` are
    not asked for, else float32 pixels. Colour jitter precedes normalisation, as in scenic (which
    undoes it first); erasing follows it, as in VideoMAE; `own`, (key, pixels of a clip) -> pixels,
    comes last. A clip's augmentation is a function of the key and its id.
    """
    values = hashable_arithmetic(processor)
    if not (settings.colour or settings.erase or settings.mixes or own or floats):
        return lambda key, clip_ids, clips: ByteClips(clips, *values)
    normalise = scaled_and_shifted(*values)

    def pixels(key, clip_ids, clips):
        colour, erase = (clip_keys(jax.random.fold_in(key, i), clip_ids) for i in range(2))
        if settings.colour:
            clips = 255 * colour_jitter(colour, clips.astype(jnp.float32) / 255, settings.colour)
        clips = normalise(clips)
        clips = random_erasing(erase, clips, settings.erase) if settings.erase else clips
        if own is not None:
            clips = _by_own(own, clip_keys(jax.random.fold_in(key, 2), clip_ids), clips)
        return clips

    return pixels


def _by_own(own: Callable, keys: Keys, clips: jax.Array) -> jax.Array:
    """Each clip as a function of the caller changes it."""
    changed = jax.vmap(own)(keys, clips)
    known = isinstance(changed, jax.Array) and jnp.issubdtype(changed.dtype, jnp.floating)
    if not known or changed.shape != clips.shape:
        kind = f"{changed.dtype} " if isinstance(changed, jax.Array) else ""
        raise UserError(
            f"the augmentation of pixels returned {kind}{jnp.shape(changed)[1:]} for a clip of "
            f"{clips.shape[1:]}; expected an array of floats of the same shape"
        )
    return changed.astype(clips.dtype)


def _uniform(keys: Keys, count: int) -> jax.Array:
    """Uniform numbers [count, b] in [0, 1): `count` draws for each clip or group of keys [b]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)), out_axes=1)(_fold(keys, 0))


def _fold(keys: Keys, number: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


class Colours(NamedTuple):
    """The parameters of `colour_jitter` for each clip, all [b]."""

    jittered: jax.Array  # bool: whether the next four apply
    brightness: jax.Array  # added
    saturation: jax.Array  # factor
    contrast: jax.Array  # factor
    hue: jax.Array  # added, in turns
    grey: jax.Array  # bool


def draw_colours(keys: Keys, probability: float, grayscale: float) -> Colours:
    """Draw for each of keys [b]; the two probabilities are independent."""
    first, *amounts, last = _uniform(keys, 6)
    ranges = ((-32 / 255, 32 / 255), (0.6, 1.4), (0.6, 1.4), (-0.2, 0.2))
    brightness, saturation, contrast, hue = (
        low + (high - low) * u for u, (low, high) in zip(amounts, ranges, strict=True)
    )
    return Colours(first < probability, brightness, saturation, contrast, hue, last < grayscale)


def colour_jitter(
    keys: Keys,
    pixels: Float[AnyArray, "b t h w 3"],
    probability: float,
    grayscale: float = 0.1,
) -> Float[Array, "b t h w 3"]:
    """scenic's colour augmentation; pixels float [b, t, h, w, 3] in [0, 1] -> the same.

    With `probability` brightness, saturation, contrast and hue change in that order and the result
    is clipped to [0, 1]; with probability `grayscale` the clip then turns grey. All frames share
    the draws. The definitions are TensorFlow's; contrast is relative to each frame's own mean.
    Source: DMVR's default colours, with the probabilities of scenic's ViViT.
    """
    if pixels.ndim != 5 or pixels.shape[-1] != 3:
        raise UserError(
            f"colour_jitter takes RGB clips [b, t, h, w, 3], got {pixels.shape}; set "
            "augment.colour=0 for other channels"
        )
    draws = Colours(
        *(jnp.reshape(x, (-1, 1, 1, 1, 1)) for x in draw_colours(keys, probability, grayscale))
    )
    x = pixels + draws.brightness
    x = adjust_contrast(adjust_saturation(x, draws.saturation), draws.contrast)
    x = jnp.clip(adjust_hue(x, draws.hue), 0, 1)
    x = jnp.where(draws.jittered, x, pixels)
    grey = sum(weight * x[..., i : i + 1] for i, weight in enumerate(_LUMA))
    return jnp.where(draws.grey, grey, x).astype(pixels.dtype)


def adjust_contrast(pixels: Float[AnyArray, "... h w c"], factor) -> Float[Array, "... h w c"]:
    """Scale the distance from the mean of each image and channel by factor."""
    mean = jnp.mean(pixels, axis=(-3, -2), keepdims=True)
    return (pixels - mean) * factor + mean


def adjust_saturation(pixels: Float[AnyArray, "... 3"], factor) -> Float[Array, "... 3"]:
    """Scale the HSV saturation of RGB pixels by factor, clipped to [0, 1].

    Values may lie outside [0, 1], as after a change of brightness: as in TensorFlow the largest
    channel stays, and a pixel without positive channels has saturation 0.
    """
    high = jnp.max(pixels, axis=-1, keepdims=True)
    spread = high - jnp.min(pixels, axis=-1, keepdims=True)
    saturation = jnp.where(high > 0, spread / jnp.where(high > 0, high, 1), 0)
    new_spread = jnp.clip(saturation * factor, 0, 1) * high
    return high - (high - pixels) * new_spread / jnp.where(spread > 0, spread, 1)


def adjust_hue(pixels: Float[AnyArray, "... 3"], delta) -> Float[Array, "... 3"]:
    """Rotate the hue of RGB pixels by delta, in turns; the extreme channels keep their values."""
    r, g, b = (pixels[..., i : i + 1] for i in range(3))
    high = jnp.max(pixels, axis=-1, keepdims=True)
    low = jnp.min(pixels, axis=-1, keepdims=True)
    spread = high - low
    unit = jnp.where(spread > 0, spread, 1)
    # In sixths of a turn from red; the pure colours are at 0, 2 and 4. Channels are compared with
    # each other, not with `high`: XLA may compute a channel twice with different rounding, and a
    # pixel without an equal channel would pass for blue.
    hue = jnp.where(g >= b, 2 + (b - r) / unit, 4 + (r - g) / unit)
    hue = jnp.where((r >= g) & (r >= b), (g - b) / unit, hue)
    hue = jnp.mod(hue + 6 * delta, 6)
    red = jnp.abs(hue - 3) - 1
    green, blue = 2 - jnp.abs(hue - 2), 2 - jnp.abs(hue - 4)
    return low + spread * jnp.clip(jnp.concatenate([red, green, blue], axis=-1), 0, 1)


class Box(NamedTuple):
    """A box in every frame of a clip, all int [b]: `top` <= row < `bottom`, and so on."""

    top: jax.Array
    bottom: jax.Array
    left: jax.Array
    right: jax.Array

    def mask(self, height: int, width: int) -> Bool[Array, "b h w"]:
        """True inside the box."""
        rows, columns = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None]
        top, bottom, left, right = (x[:, None, None] for x in self)
        return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


def draw_erased(
    keys: Keys,
    size: tuple[int, int],
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Box:
    """The box that random erasing removes from each clip of keys [b], empty for none.

    `size` is (height, width). The box's share of the frame is uniform in `area`, its ratio of
    height to width log-uniform in `aspect`, its place uniform. The first of ten such boxes that is
    smaller than the frame in both directions counts; without one nothing is erased.
    """
    height, width = size
    coin, down, across, *tries = _uniform(keys, 3 + 2 * _TRIES)
    areas, aspects = jnp.stack(tries[:_TRIES]), jnp.stack(tries[_TRIES:])
    pixels = height * width * (area[0] + (area[1] - area[0]) * areas)
    low, high = map(math.log, aspect)
    ratio = jnp.exp(low + (high - low) * aspects)
    h, w = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (pixels * ratio, pixels / ratio))
    fits = (h < height) & (w < width)
    erased = (coin < probability) & jnp.any(fits, axis=0)
    first = jnp.argmax(fits, axis=0)[None]
    h, w = (jnp.where(erased, jnp.take_along_axis(x, first, axis=0)[0], 0) for x in (h, w))
    top = (down * (height - h + 1).astype(down.dtype)).astype(jnp.int32)
    left = (across * (width - w + 1).astype(across.dtype)).astype(jnp.int32)
    return Box(top, top + h, left, left + w)


def random_erasing(
    keys: Keys,
    pixels: Float[AnyArray, "b t h w c"],
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "b t h w c"]:
    """Replace a box by noise, in normalised pixels.

    The box of `draw_erased` is the same in all frames; every value in it is drawn from N(0, 1).
    Source: VideoMAE's fine-tuning, with timm's form of Zhong et al. 2020.
    """
    height, width = pixels.shape[2:4]
    box = draw_erased(keys, (height, width), probability, area, aspect)
    shape = pixels.shape[1:]
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, pixels.dtype))(_fold(keys, 1))
    inside = box.mask(height, width)[:, None, :, :, None]
    return jnp.where(inside, noise, pixels)


class Mixing(NamedTuple):
    """How each group of clips is mixed, all [g]; `share` is a clip's own part of the result."""

    share: jax.Array
    cut: jax.Array  # bool: cutmix, not mixup
    box: Box  # taken from the partner, for cutmix
    drawn: jax.Array  # the share before the box was cut at the border and rounded to pixels


def draw_mixing(keys: Keys, size: tuple[int, int], settings: AugmentSettings) -> Mixing:
    """Draw for each group of keys [g]; `size` is (height, width)."""
    height, width = size
    on, which, down, across = _uniform(keys, 4)
    both = settings.mixup > 0 and settings.cutmix > 0
    cut = which < (settings.mix_switch if both else float(settings.cutmix > 0))
    alpha = jnp.where(cut, settings.cutmix, settings.mixup)
    drawn = jax.vmap(jax.random.beta)(_fold(keys, 1), alpha, alpha)
    drawn = jnp.where(on < settings.mix_prob, drawn, 1.0)

    def extent(place, whole):  # the centre may be anywhere; the box is cut at the border
        half = jnp.floor(whole * jnp.sqrt(1 - drawn)).astype(jnp.int32) // 2
        centre = (place * whole).astype(jnp.int32)
        return jnp.clip(centre - half, 0, whole), jnp.clip(centre + half, 0, whole)

    box = Box(*extent(down, height), *extent(across, width))
    inside = (box.bottom - box.top) * (box.right - box.left)
    share = jnp.where(cut, 1 - inside / (height * width), drawn)
    return Mixing(share, cut, box, drawn)


def mix(
    key: PRNGKeyArray,
    pixels: Float[AnyArray, "b t h w c"],
    targets: Float[AnyArray, "b classes"],
    settings: AugmentSettings,
    clip_ids: Int[AnyArray, " b"],
) -> tuple[Float[AnyArray, "b t h w c"], Float[AnyArray, "b classes"]]:
    """mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) of clips and their targets.

    pixels [b, t, h, w, c] and targets float [b, classes] of `soft_targets` -> the same. In every
    group of `mix_group` consecutive clips (None: all clips) clip i is mixed with clip -1 - i, with
    one share and one box for the group; cutmix mixes the targets by the box's true area.
    `clip_ids`, int [b], are the clips' numbers in the whole batch, where groups start at multiples
    of their size, so that parts made of whole groups equal the whole batch.

    Raises UserError for groups that are odd or do not divide the batch. Source: VideoMAE's and
    scenic's training, which group the clips of a device.
    """
    if not settings.mixes:
        return pixels, targets
    b, _, height, width, _ = pixels.shape
    group = b if settings.mix_group is None else settings.mix_group
    if group < 2 or group % 2 or b % group:
        raise UserError(
            f"augment.mix_group={settings.mix_group} makes groups of {group} of {b} clips; a group "
            "must be even and divide them: change mix_group or the batch size, or turn mixup and "
            "cutmix off"
        )
    if targets.shape[:1] != (b,) or not jnp.issubdtype(targets.dtype, jnp.floating):
        raise UserError(
            f"targets of shape {targets.shape} and dtype {targets.dtype} cannot be mixed with "
            f"{b} clips; expected floats [{b}, classes], see soft_targets"
        )
    groups = jnp.asarray(clip_ids)[::group] // group
    mixing = draw_mixing(clip_keys(key, groups), (height, width), settings)
    share = mixing.share[:, None, None]
    kept = jnp.where(mixing.box.mask(height, width), 0.0, 1.0)
    kept = jnp.where(mixing.cut[:, None, None], kept, share)

    def blend(x, own):
        """x [b, ...] mixed with its partners; own [g, ...] has the rank of a clip of x."""
        x_by_group, own = x.reshape(-1, group, *x.shape[1:]), own[:, None]
        mixed = own * x_by_group + (1 - own) * x_by_group[:, ::-1]
        return mixed.astype(x.dtype).reshape(x.shape)

    return blend(pixels, kept[:, None, :, :, None]), blend(targets, share[:, 0])


def soft_targets(
    labels: ClassLabels,
    classes: int,
    smoothing: float = 0.0,
    class_splits: tuple[int, ...] | None = None,
) -> Float32[Array, "b classes"]:
    """Smoothed one-hot targets: 1 - s + s / C on the label's class, s / C elsewhere.

    labels int [b], or [b, heads] with `class_splits`, the class counts C of the heads, whose
    targets are concatenated. `multi_head_loss` takes them without smoothing of its own; smoothing
    before mixing equals scenic's, which follows it. Any other label, -100 too, gives NaN, since a
    soft target cannot leave a row out of a mean. Raises UserError for labels and counts that do not
    fit.
    """
    sizes = (classes,) if class_splits is None else head_sizes(class_splits)
    labels = jnp.asarray(labels)
    by_head = labels[:, None] if class_splits is None and labels.ndim == 1 else labels
    if (
        sum(sizes) != classes
        or by_head.ndim != 2
        or by_head.shape[1] != len(sizes)
        or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise UserError(
            f"labels of shape {labels.shape} and dtype {labels.dtype} do not fit {classes} classes "
            f"in heads of {sizes}; expected integers "
            + ("[b]" if class_splits is None else f"[b, {len(sizes)}]")
        )
    if not 0 <= smoothing < 1:
        raise UserError(f"augment.smoothing must be in [0, 1), got {smoothing!r}")
    heads = []
    for i, size in enumerate(sizes):
        label = by_head[:, i : i + 1]
        on = label == jnp.arange(size)[None]
        target = jnp.where(on, 1 - smoothing + smoothing / size, smoothing / size)
        heads.append(jnp.where((label >= 0) & (label < size), target, jnp.nan))
    return jnp.concatenate(heads, axis=1).astype(jnp.float32)
