# SPDX-License-Identifier: Apache-2.0
"""Masks over patch tokens, held as indices so that every clip hides the same number of tokens.

Token order is (t, h, w) row-major, time slowest. The generators take a jax PRNG key, and are then
jit-safe for static `batch`, `grid` and `ratio`, or a `numpy.random.Generator`, and then return
numpy arrays without touching a device, for data loaders. Both count as the papers do; they do not
draw the same numbers.
"""

import dataclasses
from types import ModuleType

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Bool, Int, Int32

from vivit_jax.errors import UserError

Grid = tuple[int, int, int]  # tokens along time, height and width
AnyArray = jax.Array | np.ndarray
Random = jax.Array | np.random.Generator


@flax.struct.dataclass
class Mask:
    """Indices of visible and of masked tokens, ascending, together every token of the clip once.

    `decoded` are the tokens that the decoder predicts, by default the masked ones. VideoMAE V2
    predicts fewer of them, and some that the encoder sees, which its loss leaves out.
    """

    # Fields of pytrees hold tracers, shapes and shardings too: no array types here.
    visible: AnyArray  # [b, v] int32
    masked: AnyArray  # [b, m] int32
    decoded: AnyArray | None = None  # [b, k] int32

    @classmethod
    def from_bool(
        cls,
        bool_masked_pos: Bool[AnyArray, "b l"],
        decode_masked_pos: Bool[AnyArray, "b l"] | None = None,
    ) -> "Mask":
        """Convert HuggingFace's mask: bool [b, l], True = masked.

        `decode_masked_pos`, the second mask of VideoMAE V2, is True where the decoder predicts
        nothing. Needs concrete values, so call it outside `jax.jit`. Raises UserError for another
        dtype (an integer mask would be an index list to PyTorch), for another rank and for rows
        that mask different numbers of tokens.
        """
        visible, masked = _split_rows("bool_masked_pos", bool_masked_pos)
        if decode_masked_pos is None:
            return cls(visible, masked)
        decoded, dropped = _split_rows("decode_masked_pos", decode_masked_pos)
        shapes = [
            (len(a), a.shape[1] + b.shape[1]) for a, b in ((visible, masked), (decoded, dropped))
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"decode_masked_pos has shape {shapes[1]}, bool_masked_pos {shapes[0]}; they are "
                "two masks over the same tokens"
            )
        return cls(visible, masked, decoded)

    def to_bool(self) -> Bool[jax.Array, "b l"]:
        """HuggingFace's form, True = masked."""
        visible = jnp.zeros(self.num_tokens, bool)
        # vmap keeps clips apart for the partitioner too: with .at[rows, masked] every device would
        # make the rows of the whole batch.
        return jax.vmap(lambda masked: visible.at[masked].set(True))(jnp.asarray(self.masked))

    @property
    def num_tokens(self) -> int:
        """Tokens per clip, visible and masked."""
        return self.visible.shape[1] + self.masked.shape[1]

    @property
    def predicted(self) -> Int[AnyArray, "b k"]:
        """Indices of the tokens that the decoder predicts."""
        return self.masked if self.decoded is None else self.decoded

    @property
    def counted(self) -> Bool[jax.Array, "b k"] | None:
        """Which of the predicted tokens the loss counts; None for all of them."""
        if self.decoded is None:
            return None
        return jnp.take_along_axis(self.to_bool(), jnp.asarray(self.decoded), axis=1)


def tube_mask(key: Random, batch: int, grid: Grid, ratio: float = 0.9) -> Mask:
    """Tube masking (VideoMAE section 3.2): one random spatial mask per clip, the same at all times.

    `grid` is the token grid (t, h, w), `config.grid` for the configured size. Of the h*w positions
    int(ratio * h * w) are masked, as the authors count: 176 of 196 at ratio 0.9.
    """
    t, h, w = _check("tube_mask", key, batch, grid, ratio)
    area, hidden = h * w, _hidden(ratio, h * w, "positions per frame")
    order, xp = _permutations(key, batch, area)

    def tubes(places):  # [b, k] in one frame -> [b, t * k] in the clip, ascending
        frames = xp.arange(t)[None, :, None] * area + xp.sort(places, axis=1)[:, None, :]
        return frames.reshape(batch, -1).astype(xp.int32)

    return Mask(visible=tubes(order[:, hidden:]), masked=tubes(order[:, :hidden]))


def random_mask(key: Random, batch: int, grid: Grid, ratio: float = 0.9) -> Mask:
    """Random masking: int(ratio * t * h * w) tokens of each clip, anywhere in it."""
    t, h, w = _check("random_mask", key, batch, grid, ratio)
    hidden = _hidden(ratio, t * h * w, "tokens")
    order, xp = _permutations(key, batch, t * h * w)
    visible, masked = (
        xp.sort(part, axis=1).astype(xp.int32) for part in (order[:, hidden:], order[:, :hidden])
    )
    return Mask(visible=visible, masked=masked)


def running_cell(key: Random, batch: int, grid: Grid, ratio: float = 0.5) -> Int32[AnyArray, "b k"]:
    """Running cell masking (VideoMAE V2 section 3.2): the tokens kept for the decoder.

    A cell of 2x2 tokens, of which int(4 * ratio) are dropped, tiles every frame; from frame to
    frame the pattern moves on by one place in row-major order. The first frame's place is drawn for
    each clip, so that there are four different patterns. Raises UserError for frames of an odd
    height or width in tokens and for a ratio that drops none or all of a cell.
    """
    t, h, w = _check("running_cell", key, batch, grid, ratio)
    dropped = int(4 * ratio)
    if not 0 < dropped < 4 or h % 2 or w % 2:
        raise UserError(
            f"running_cell drops int(4 * ratio) of every 2x2 tokens: it needs a ratio from 0.25 to "
            f"below 1 and an even height and width of the grid, got ratio {ratio}, grid {grid}"
        )
    if isinstance(key, np.random.Generator):
        return cell_patterns(grid, dropped)[key.integers(4, size=batch)]
    return jnp.asarray(cell_patterns(grid, dropped))[jax.random.randint(key, (batch,), 0, 4)]


def cell_patterns(grid: Grid, dropped: int) -> Int32[np.ndarray, "4 k"]:
    """The tokens that a running cell keeps, by the place where the first frame starts."""
    t, h, w = grid
    place = 2 * (np.arange(h) % 2)[:, None] + (np.arange(w) % 2)[None]
    # The pointer moves on before every frame, the first one included.
    pointer = np.arange(4)[:, None] + np.arange(t) + 1
    kept = (place + pointer[:, :, None, None]) % 4 >= dropped
    return np.stack([np.flatnonzero(pattern) for pattern in kept]).astype(np.int32)


def dual_mask(
    key: Random, batch: int, grid: Grid, ratio: float = 0.9, decoder_ratio: float = 0.5
) -> Mask:
    """Dual masking (VideoMAE V2 section 3.2): a tube mask and, for the decoder, a running cell."""
    _check("dual_mask", key, batch, grid, ratio)
    first, second = (key, key) if isinstance(key, np.random.Generator) else jax.random.split(key)
    mask = tube_mask(first, batch, grid, ratio)
    decoded = running_cell(second, batch, grid, decoder_ratio)
    return dataclasses.replace(mask, decoded=decoded)


# Generators by name, of (key, batch, grid, ratio).
MASKS = {"tube": tube_mask, "random": random_mask, "dual": dual_mask}


def _check(name: str, key: Random, batch: int, grid: Grid, ratio: float) -> Grid:
    if not isinstance(key, jax.Array | np.ndarray | np.random.Generator):
        raise UserError(
            f"{name} needs a jax PRNG key or a numpy.random.Generator, got {type(key).__name__}; "
            "jax.random.key(0) or numpy.random.default_rng(0)"
        )
    whole = all(isinstance(n, int | np.integer) for n in (batch, *grid))
    good = whole and batch >= 1 and len(grid) == 3 and min(grid) >= 1
    if not good or not isinstance(ratio, float | int | np.floating) or not 0 <= ratio <= 1:
        raise UserError(
            f"{name} needs batch >= 1, a grid (t, h, w) and a ratio in [0, 1], got batch "
            f"{batch}, grid {grid}, ratio {ratio}"
        )
    return grid


def _hidden(ratio: float, total: int, what: str) -> int:
    hidden = int(ratio * total)
    if not 0 < hidden < total:
        raise UserError(
            f"mask ratio {ratio} masks {hidden} of {total} {what}; choose one that masks some and "
            "leaves some"
        )
    return hidden


def _permutations(key: Random, batch: int, length: int) -> tuple[AnyArray, ModuleType]:
    """A permutation of range(length) for every clip, and the module that made it."""
    if isinstance(key, np.random.Generator):
        return key.permuted(np.tile(np.arange(length), (batch, 1)), axis=1), np
    keys = jax.random.split(key, batch)
    return jax.vmap(lambda k: jax.random.permutation(k, length))(keys), jnp


def _split_rows(name: str, values) -> tuple[Int32[jax.Array, "b k"], Int32[jax.Array, "b m"]]:
    """Indices of the False and of the True entries of each row of bool [b, l]."""
    if isinstance(values, Tracer):
        raise UserError(
            "Mask.from_bool needs concrete values: the number of masked tokens is a shape. "
            "Call it outside jax.jit and pass the Mask in"
        )
    try:
        mask = np.asarray(values)
    except ValueError:
        raise UserError(f"{name} must be [batch, tokens], got rows of different lengths") from None
    if mask.dtype != np.bool_:
        raise UserError(
            f"{name} must be bool (True = masked), got {mask.dtype}; "
            f"use {name}.astype(bool) if 1 means masked"
        )
    if mask.ndim != 2:
        raise UserError(f"{name} must be [batch, tokens], got shape {mask.shape}")
    counts = mask.sum(axis=1)
    if counts.size and counts.min() != counts.max():
        raise UserError(
            "every clip must mask the same number of tokens, got "
            f"{counts.tolist()} per row of {name} {mask.shape}"
        )
    order = np.argsort(mask, axis=1, kind="stable").astype(np.int32)
    kept = mask.shape[1] - (int(counts[0]) if counts.size else 0)
    return jnp.asarray(order[:, :kept]), jnp.asarray(order[:, kept:])
