# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer, or its rollout, as maps over the token grid.

A map is a row of a matrix T whose rows sum to one: how a query token's attention spreads over the
tokens. For `kind="map"` T is the attention of one block, for `kind="rollout"` the product of
(A + I) / 2 over the blocks from the last to the first (Abnar and Zuidema 2020,
https://arxiv.org/abs/2005.00928, section 4); I is the residual connection. Rows of A sum to one, so
that no normalisation is needed. With heads averaged A is

* joint ViViT, VideoMAE: the block's attention over all tokens;
* factorised self-attention: the product of the block's two attentions, the second one first, since
  it reads what the first has mixed; in a rollout each is (A + I) / 2 by itself, since each has its
  own residual connection;
* factorised dot-product: half the attention over time plus half that over space, since half of the
  heads attend along each axis and their results are concatenated;
* factorised encoder: the temporal stage's attention between frames times the spatial stage's inside
  each frame, since the temporal stage reads one token of each frame; a rollout is the product of
  the two stages' rollouts. With `spatial_only` all frames have the same weight, as in the model.

Only rows are propagated, from the last block to the first, and each block's attention is recomputed
from its hidden state. So one block's attention is held at a time; `output_attentions=True` holds
all of them, 5.7 GB for a clip of ViViT-B.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from jaxtyping import Float, Float32, Float64

from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.layers.attention import SPLIT_HEADS, TIME
from vivit_jax.layers.embed import check_clip, uniform_frames
from vivit_jax.layers.encoder import Block
from vivit_jax.masking import AnyArray, Grid
from vivit_jax.models.build import headless
from vivit_jax.models.registry import family_of

KINDS = ("map", "rollout")
Query = str | tuple[int, int, int]  # "cls", "mean" or the token at (t, y, x)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The arguments of `map_attention` with all defaults filled in; made by `choose`."""

    kind: str  # one of KINDS
    query: Query
    layer: int  # of a map, or the last of a rollout; the spatial one in a factorised encoder
    temporal_layer: int | None  # in a factorised encoder's temporal stage, if it has one
    head: int | None  # None: the mean of all heads


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """The query's attention over the tubelets of clips.

    `maps` sums to one over each clip. It leaves out attention to class tokens, which have no place
    on the grid; `class_share` is that part (0 without a class token).
    """

    maps: np.ndarray  # float64 [b, t, h, w], on the token grid
    class_share: np.ndarray  # float64 [b]
    choice: Choice
    tubelet: Grid
    frames: np.ndarray  # int [t * tubelet frames]: the clip's frames that the model embeds

    @property
    def time_weights(self) -> Float64[np.ndarray, "b t"]:
        """The share of each time step; sums to one."""
        return self.maps.sum((2, 3))

    @property
    def relative(self) -> Float64[np.ndarray, "b t h w"]:
        """`maps` as multiples of uniform attention; the mean over a clip is 1."""
        return self.maps * np.prod(self.maps.shape[1:])


def map_attention(
    model: nn.Module,
    params: Any,
    pixel_values: Float[AnyArray, "b t h w c"],
    *,
    kind: str = "map",
    query: Query | None = None,
    layer: int | None = None,
    temporal_layer: int | None = None,
    head: int | None = None,
    interpolate_pos_encoding: bool = False,
) -> AttentionMaps:
    """A model's attention on pixel_values [b, t, h, w, c] as maps [b, t, h, w] over its tokens.

    Takes every model of this library; the encoder of a pre-training model sees the whole clip.
    `kind` is "map", the attention of one `layer`, or "rollout", through all layers up to it; layers
    count from 0, negative ones from the end, and the default is the last. `temporal_layer` is the
    one of a factorised encoder's temporal stage. `head` is one head of a map (the first half of
    them attends over time in a factorised dot-product model), by default their mean.

    `query` is "cls", the class token (of each stage in a factorised encoder), the default if there
    is one; "mean", the mean over all tubelets, which is the attention that each tubelet receives;
    or (t, y, x), one tubelet. In a factorised encoder a tubelet is a token of the spatial stage and
    attends to its own frame only.

    Raises UserError for a layer, head or query that the model does not have, and for a clip that
    does not fit it. Definitions and source: this module's docstring.

    >>> import vivit_jax
    >>> model, params = vivit_jax.from_pretrained("vivit-demo/model")
    >>> clip = vivit_jax.read_video("vivit-demo/data/test/grow/0000.mp4")
    >>> processor = vivit_jax.VideoProcessor.from_pretrained("vivit-demo/model")
    >>> found = map_attention(model, params, processor(clip), kind="rollout")
    >>> found.maps.shape[1:] == model.config.grid
    True
    """
    config = model.config
    grid = check_clip(config, np.shape(pixel_values), any_size=interpolate_pos_encoding)
    choice = choose(
        config,
        kind=kind,
        query=query,
        layer=layer,
        temporal_layer=temporal_layer,
        head=head,
        grid=grid,
    )
    backbone, params = headless(model, meta.unbox(params))
    out = _hidden_states(backbone, params, jnp.asarray(pixel_values), interpolate_pos_encoding)
    stages, with_cls, (t, h, w) = family_of(config).stacks(config), config.pooling == "cls", grid
    batch = len(pixel_values)
    if config.attention_type == "factorised_encoder":
        shares = _staged_shares(config, stages, params, out, choice, (batch, *grid))
    else:
        shape = (batch, -1) if config.attention_type == "joint" else (batch, t, h * w)
        row = np.tile(_query_row(choice.query, grid, with_cls), (batch, 1)).reshape(shape)
        hidden = out.hidden_states.reshape(-1, *row.shape, config.hidden_size)
        row = _back(config, stages[0], params, hidden, row, choice, choice.layer)
        shares = row[..., with_cls:]
    shares = shares.reshape(batch, t, h, w)
    total = shares.sum((1, 2, 3), keepdims=True)
    if not (np.isfinite(total).all() and (total > 0).all()):
        raise UserError(
            "the model's attention to the tubelets is not finite, or zero; its weights or the clip "
            "are damaged"
        )
    shape = np.shape(pixel_values)
    frames = np.arange(shape[1] // config.tubelet[0] * config.tubelet[0])
    sampled = config.num_sampled_frames
    return AttentionMaps(
        maps=shares / total,
        class_share=np.maximum(0.0, 1 - total.reshape(-1)) if with_cls else np.zeros(batch),
        choice=choice,
        tubelet=config.tubelet,
        frames=uniform_frames(len(frames), sampled) if sampled else frames,
    )


def choose(
    config: Config,
    *,
    kind: str = "map",
    query: Query | None = None,
    layer: int | None = None,
    temporal_layer: int | None = None,
    head: int | None = None,
    grid: Grid | None = None,
) -> Choice:
    """The arguments of `map_attention` with defaults filled in; UserError for a wrong one.

    `grid` is the clip's, by default that of the configuration. Needs no weights.
    """
    if kind not in KINDS:
        raise UserError(f"kind must be one of {list(KINDS)}, got {kind!r}")
    query = _checked_query(query, config.pooling == "cls", grid or config.grid)
    layers, temporal = config.num_hidden_layers, config.temporal_layers
    if not layers:
        raise UserError("the model has num_hidden_layers=0: it has no attention to show")
    if temporal_layer is not None and not temporal:
        raise UserError(
            f"temporal_layer {temporal_layer} needs a factorised encoder with a temporal stage, "
            "which this model is not; leave it out"
        )
    if temporal_layer is not None and not isinstance(query, str):
        raise UserError(
            f"temporal_layer {temporal_layer} has no effect on query {query}: a tubelet is a token "
            "of the spatial stage; leave one of them out"
        )
    heads = config.num_attention_heads
    if head is not None and not 0 <= head < heads:
        raise UserError(f"head must be from 0 to {heads - 1}, got {head}")
    if head is not None and kind == "rollout":
        raise UserError(
            f"head {head}: a rollout takes the mean of all heads, since head {head} of one layer "
            f"is unrelated to head {head} of the next; leave it out, or ask for kind 'map'"
        )
    return Choice(
        kind=kind,
        query=query,
        layer=_place("layer", layer, layers),
        temporal_layer=_place("temporal_layer", temporal_layer, temporal) if temporal else None,
        head=head,
    )


def _checked_query(query: Query | None, with_cls: bool, grid: Grid) -> Query:
    if query is None:
        return "cls" if with_cls else "mean"
    if query == "cls" and not with_cls:
        raise UserError(
            "query 'cls' needs a class token, which this model does not have; expected 'mean' or a "
            "tubelet's place (t, y, x)"
        )
    if isinstance(query, str):
        if query not in ("cls", "mean"):
            raise UserError(f"query must be 'cls', 'mean' or a place (t, y, x), got {query!r}")
        return query
    place = tuple(query)
    if len(place) != 3 or not all(0 <= i < n for i, n in zip(place, grid, strict=True)):
        last = tuple(n - 1 for n in grid)
        raise UserError(
            f"query {place} is not on the token grid: expected a place (t, y, x) from "
            f"(0, 0, 0) to {last}"
        )
    return place


def _place(name: str, index: int | None, count: int) -> int:
    if index is None:
        return count - 1
    if not -count <= index < count:
        raise UserError(
            f"{name} must be from 0 to {count - 1}, or from -{count} to -1 to count from the end, "
            f"got {index}"
        )
    return index % count


def _query_row(query: Query, grid: Grid, with_cls: bool) -> Float32[np.ndarray, " l"]:
    """The weight of every token as a query; sums to one."""
    row = np.zeros(with_cls + int(np.prod(grid)), np.float32)
    if not isinstance(query, str):
        row[with_cls + np.ravel_multi_index(query, grid)] = 1
    elif query == "cls":
        row[0] = 1
    else:
        row[with_cls:] = 1 / np.prod(grid)
    return row


def _staged_shares(config, stages, params, out, choice: Choice, shape) -> np.ndarray:
    """The tubelets' shares [b, t, h * w] in a factorised encoder, for shape [b, t, h, w]."""
    (batch, t, h, w), with_cls = shape, config.pooling == "cls"
    of_frame, place = choice.query, None
    if not isinstance(choice.query, str):
        place, of_frame = choice.query[0], (0, *choice.query[1:])
    rows = np.tile(_query_row(of_frame, (1, h, w), with_cls), (batch, t, 1))
    if place is not None:
        rows[:, np.arange(t) != place] = 0
    hidden, layer = out.hidden_states, choice.layer
    rows = _back(config, stages[0], params["spatial"], hidden, rows, choice, layer)
    shares = rows[..., with_cls:]
    if place is not None:
        return shares
    weights = np.full((batch, t), 1 / t)
    if choice.temporal_layer is not None:
        row = np.tile(_query_row(choice.query, (t, 1, 1), with_cls), (batch, 1))
        hidden, layer = out.temporal_hidden_states, choice.temporal_layer
        row = _back(config, stages[1], params["temporal"], hidden, row, choice, layer)
        weights = row[:, with_cls:]
    return weights[..., None] * shares


def _back(config, spec, params, hidden, row, choice: Choice, last: int) -> np.ndarray:
    """A row [b, ..., l] of queries of block `last`, propagated to the tokens it attends to.

    `hidden` [layers + 1, b, ..., l, d] holds the input of every block. Returns float64.
    """
    block, heads = Block(config, spec), config.num_attention_heads
    rollout = choice.kind == "rollout"
    residual = jnp.float32(0.5 if rollout else 0.0)
    weights = jnp.full(heads, 1 / heads) if choice.head is None else jnp.eye(heads)[choice.head]
    row = jnp.asarray(row)
    for i in range(last, -1 if rollout else last - 1, -1):
        row = _through(block, _of_layer(params, i), hidden[i], row, weights, residual)
    return np.asarray(row, np.float64)


def _of_layer(params, i: int):
    """The parameters of block i, which are stacked if the model scans its layers."""
    if f"layers_{i}" in params:
        return params[f"layers_{i}"]
    return jax.tree.map(lambda leaf: leaf[i], params["layers"])


# Equal blocks share the compiled function. XLA drops what follows the attention.
@functools.partial(jax.jit, static_argnums=0)
def _through(block: Block, params, x, row, heads, residual):
    """row [b, ..., l] times the block's transition, from the block's input x [b, ..., l, d].

    `heads` [n] weights the heads and sums to one; `residual` is the weight of the residual.
    """
    found: Any
    _, found = block.apply({"params": params}, x, (None, None, None), False, True)

    def over_space(row, heads):
        return _times(row, found.space, heads)

    def over_time(row, heads):
        return _times(row.swapaxes(-1, -2), found.time, heads).swapaxes(-1, -2)

    for _, along in reversed(block.spec.attention):
        if along == SPLIT_HEADS:
            of_time, of_space = jnp.split(heads, 2)
            attended = over_time(row, of_time) + over_space(row, of_space)
        else:
            attended = (over_time if along == TIME else over_space)(row, heads)
        row = residual * row + (1 - residual) * attended
    return row


def _times(row, weights, heads):
    """row [..., q] times attention weights [..., n, q, k], with heads weighted by `heads` [n]."""
    by_head = jnp.einsum("...q,...nqk->...nk", row, weights.astype(row.dtype))
    return jnp.einsum("...nk,n->...k", by_head, heads)


# Equal models share the compiled function.
@functools.partial(jax.jit, static_argnums=(0, 3))
def _hidden_states(backbone: nn.Module, params, pixel_values, any_size: bool):
    out: Any = backbone.apply(
        {"params": params},
        pixel_values,
        output_hidden_states=True,
        output_attentions=False,
        interpolate_pos_encoding=any_size,
    )
    # XLA drops the rest.
    return out.replace(last_hidden_state=None, pooler_output=None)
