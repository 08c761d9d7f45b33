# SPDX-License-Identifier: Apache-2.0
"""Masks over patch tokens, held as indices so that every clip hides the same number of tokens.

Token order is (t, h, w) row-major, time slowest.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vivit_jax.errors import UserError


@flax.struct.dataclass
class Mask:
    """Indices of visible and of masked tokens, ascending, together every token of the clip once."""

    visible: jax.Array  # [b, v] int32
    masked: jax.Array  # [b, m] int32

    @classmethod
    def from_bool(cls, bool_masked_pos) -> "Mask":
        """Convert HuggingFace's mask: bool [b, l], True = masked.

        Needs concrete values, so call it outside `jax.jit`. Raises UserError for another dtype
        (an integer mask would be an index list to PyTorch), for another rank and for rows that
        mask different numbers of tokens.
        """
        if isinstance(bool_masked_pos, jax.core.Tracer):
            raise UserError(
                "Mask.from_bool needs concrete values: the number of masked tokens is a shape. "
                "Call it outside jax.jit and pass the Mask in"
            )
        try:
            mask = np.asarray(bool_masked_pos)
        except ValueError:
            raise UserError(
                "bool_masked_pos must be [batch, tokens], got rows of different lengths"
            ) from None
        if mask.dtype != np.bool_:
            raise UserError(
                f"bool_masked_pos must be bool (True = masked), got {mask.dtype}; "
                "use bool_masked_pos.astype(bool) if 1 means masked"
            )
        if mask.ndim != 2:
            raise UserError(f"bool_masked_pos must be [batch, tokens], got shape {mask.shape}")
        counts = mask.sum(axis=1)
        if counts.size and counts.min() != counts.max():
            raise UserError(
                "every clip must mask the same number of tokens, got "
                f"{counts.tolist()} per row of bool_masked_pos {mask.shape}"
            )
        order = np.argsort(mask, axis=1, kind="stable").astype(np.int32)
        num_visible = mask.shape[1] - (int(counts[0]) if counts.size else 0)
        return cls(jnp.asarray(order[:, :num_visible]), jnp.asarray(order[:, num_visible:]))

    def to_bool(self) -> jax.Array:
        """HuggingFace's form: bool [b, l], True = masked."""
        batch, num_tokens = self.masked.shape[0], self.num_tokens
        rows = jnp.arange(batch)[:, None]
        return jnp.zeros((batch, num_tokens), bool).at[rows, self.masked].set(True)

    @property
    def num_tokens(self) -> int:
        """Tokens per clip, visible and masked."""
        return self.visible.shape[1] + self.masked.shape[1]


def tube_mask(key: jax.Array, batch: int, grid: tuple[int, int, int], ratio: float = 0.9) -> Mask:
    """Tube masking (VideoMAE section 3.2): one random spatial mask per clip, the same at all times.

    `grid` is the token grid (t, h, w), `config.grid` for the configured size. Of the h*w positions
    int(ratio * h * w) are masked, as the authors count: 176 of 196 at ratio 0.9. Jit-safe for
    static `batch`, `grid` and `ratio`.
    """
    if batch < 1 or len(grid) != 3 or not 0 <= ratio <= 1:
        raise UserError(
            f"tube_mask needs batch >= 1, a grid (t, h, w) and a ratio in [0, 1], got batch "
            f"{batch}, grid {grid}, ratio {ratio}"
        )
    t, h, w = grid
    area, hidden = h * w, int(ratio * h * w)
    if not 0 < hidden < area:
        raise UserError(
            f"mask ratio {ratio} masks {hidden} of {area} positions per frame; choose one that "
            "masks some and leaves some"
        )
    keys = jax.random.split(key, batch)
    order = jax.vmap(lambda k: jax.random.permutation(k, area))(keys)

    def tubes(places):  # [b, k] in one frame -> [b, t * k] in the clip, ascending
        frames = jnp.arange(t)[None, :, None] * area + jnp.sort(places, axis=1)[:, None, :]
        return frames.reshape(batch, -1).astype(jnp.int32)

    return Mask(visible=tubes(order[:, hidden:]), masked=tubes(order[:, :hidden]))
