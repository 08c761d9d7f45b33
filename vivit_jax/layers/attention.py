# SPDX-License-Identifier: Apache-2.0
"""Self-attention, with one entry point for all backends; each computes exact attention.

A new backend gets a name in `vivit_jax.config_base.Attention`, and either a module with both passes
and an entry in `vivit_jax.layers.placed.PLACED`, or a branch in `attention`, which calls it. For
"auto" to choose it, `choose_implementation` must name it.
"""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from vivit_jax.config import Config
from vivit_jax.config_base import ATTENTION_IMPLEMENTATIONS
from vivit_jax.errors import ConfigError
from vivit_jax.layers.axes import Placement, placement_of
from vivit_jax.layers.chunked import SAVED
from vivit_jax.layers.cudnn import Device, cudnn_refusal, target_gpu
from vivit_jax.layers.dropout import dropout
from vivit_jax.layers.linear import Projection, project_together, wide_type, with_axes
from vivit_jax.layers.pallas import worth_it
from vivit_jax.layers.placed import PLACED, placed_attention
from vivit_jax.layers.platform import flag, platform
from vivit_jax.masking import AnyArray

log = logging.getLogger(__name__)

Queries = Float[jax.Array, "*b q n e"]
Keys = Float[jax.Array, "*b k n e"]  # or values
SplitHeads = Float[jax.Array, "b t s n e"]
Weights = Float[jax.Array, "b ... _n _q _k"]  # over space or over time: sizes differ

# The factor of cosines is at most 100, whose logarithm the authors round to this (100.003).
LARGEST_LOG_SCALE = 4.6052


def attention(
    q: Queries, k: Keys, v: Keys, *, implementation: str = "auto", leading=("batch",)
) -> Queries:
    """softmax(q k^T / sqrt(e)) v, softmax in float32 or wider.

    `leading` are the logical names of the leading axes. On a mesh each device computes its own
    clips and heads, see `vivit_jax.layers.placed`. `implementation`:

    * "xla": `jax.nn.dot_product_attention`, holds the scores [..., n, q, k]; its softmax is in
      float32 for float64 too;
    * "chunked": tiles of scores, on every platform;
    * "cudnn": cuDNN flash attention; raises where cuDNN cannot run;
    * "pallas": two kernels for TPU that keep scores on the chip, see `vivit_jax.layers.pallas`;
    * "auto": what `choose_implementation` says for the platform, logged once.
    """
    place = platform()
    if implementation == "auto":
        implementation = choose_implementation(place, q.dtype.name, q.shape[-1], q.shape[-3])
        if implementation == "cudnn" and (why := _cudnn_is_lost(placement_of(q, leading))):
            log.warning("attention: chunked instead of cudnn, %s", why)
            implementation = "chunked"
    if implementation == "cudnn" and q.shape[-3] == 1 and place == "gpu":
        implementation = "xla"  # one row of scores needs no flash attention
    if implementation == "pallas" and place != "tpu":
        raise ConfigError(
            f"attention='pallas' needs a TPU, got {place}; attention='auto' picks what runs"
        )
    if implementation in PLACED:
        return placed_attention(q, k, v, implementation, leading)
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ConfigError(
            f"attention must be one of {list(ATTENTION_IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if implementation == "xla" and q.dtype == jnp.float16 and place == "cpu":
        raise ConfigError(
            "attention='xla' cannot run float16 on CPU; use attention='auto' or 'chunked', or "
            "dtype='bfloat16'"
        )
    try:
        out = _by_library(q, k, v, implementation, leading)
    except (RuntimeError, NotImplementedError) as error:
        if implementation != "cudnn":
            raise
        raise ConfigError(
            f"attention='cudnn' cannot run here ({error}) on {place} with {q.dtype.name}, head "
            f"width {q.shape[-1]}; it needs an NVIDIA GPU and dtype bfloat16 or float16. "
            "attention='auto' picks what runs"
        ) from error
    # For cuDNN a remat policy keeps the primitive's result, see `encoder.remat_policy`.
    return out if implementation == "cudnn" else checkpoint_name(out, SAVED)


def _by_library(q, k, v, implementation, leading):
    """`jax.nn.dot_product_attention`, which partitioners split by themselves.

    Except cuDNN's inside a `shard_map` over some axes of a mesh, whose partitioner then does not
    find the mesh: there a `shard_map` takes the other axes too.
    """
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    for _ in leading[1:]:
        attend = jax.vmap(attend)
    placement = placement_of(q, leading)
    q, k, v = placement.typed_alike(q, k, v)
    if implementation == "cudnn":
        if why := _cudnn_is_lost(placement):
            raise NotImplementedError(why)
        if placement.inside_others:
            attend = placement.on_each(attend, checked=True)
    dtype = q.dtype
    if implementation == "xla" and flag("jax_numpy_dtype_promotion") == "strict":
        # The gradients of its half precision products promote types when lowered.
        q, k, v = (x.astype(wide_type(dtype)) for x in (q, k, v))
    with jax.numpy_dtype_promotion("standard"):  # which that function is written for
        return attend(q, k, v).astype(dtype)


def _cudnn_is_lost(placement: Placement) -> str | None:
    """Why cuDNN's partitioner would fail here; None where it works."""
    unknown = sorted(placement.free - placement.axes)
    if not placement.inside_others or not unknown:
        return None
    return (
        f"inside a shard_map over some axes of a mesh whose other axes {', '.join(unknown)} have "
        "no flax.linen.logical_axis_rules for 'batch' and 'heads'"
    )


def choose_implementation(place: str, dtype: str, head_dim: int, length: int) -> str:
    """The backend that "auto" stands for on a platform; logs each distinct choice once.

    On an NVIDIA GPU half precision goes to cuDNN, unless cuDNN refuses. On TPU all but float64 goes
    to the Pallas kernels where they win by the compiler's estimate: sequences long enough and heads
    at least 8 wide. A single query, the class token of a last block, goes to XLA: one row of scores
    needs no tiles. The rest is tiled: memory is linear in tokens, float64 keeps a float64 softmax,
    and on CPU it is three times as fast at 1568 tokens as `jax.nn.dot_product_attention`.
    """
    return _choose(place, dtype, head_dim, length, target_gpu() if place == "gpu" else None)


@functools.cache
def _choose(place: str, dtype: str, head_dim: int, length: int, gpu: Device | None) -> str:
    chosen, why = "chunked", ""
    xla_cannot = dtype == "float64" or (place, dtype) == ("cpu", "float16")
    if length == 1 and not xla_cannot:
        chosen = "xla"
    elif place == "gpu" and dtype in ("bfloat16", "float16"):
        refusal = cudnn_refusal(dtype, head_dim, length, gpu)
        chosen, why = ("chunked", f"; cuDNN refuses: {refusal}") if refusal else ("cudnn", "")
    elif place == "tpu" and dtype != "float64":
        chosen = "pallas" if worth_it(length, head_dim) else "chunked"
    log.log(
        logging.WARNING if why else logging.INFO,
        "attention: %s on %s, %s, head width %d, %d queries%s",
        *(chosen, place, dtype, head_dim, length, why),
    )
    return chosen


def cosine_scaled(q: Queries, k: Keys, log_scale: Float[AnyArray, " n"]) -> tuple[Queries, Keys]:
    """Queries and keys whose scaled products are exp(log_scale) times their cosines.

    `log_scale` is cut at LARGEST_LOG_SCALE. Source: VideoMAE V2, after Swin Transformer V2. Every
    backend divides by sqrt(e); the queries' factor undoes that, so that all backends serve both
    kinds of attention.
    """
    dtype, wide = q.dtype, wide_type(q.dtype)
    q, k = q.astype(wide), k.astype(wide)
    factor = jnp.exp(jnp.minimum(log_scale.astype(wide), LARGEST_LOG_SCALE)) * q.shape[-1] ** 0.5
    factor = jnp.expand_dims(factor, (*range(q.ndim - 2), -1))

    def direction(x):  # under the root, so that the gradient at zero is finite
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))

    return (direction(q) * factor).astype(dtype), direction(k).astype(dtype)


def in_halves(
    first: Callable, second: Callable, q: SplitHeads, k: SplitHeads, v: SplitHeads
) -> SplitHeads:
    """Apply one function to the first half of the heads, another to the second.

    Heads that are split over devices stay in place: a device with heads of one half runs that
    half's function only, the one that holds the middle runs both. Giving each device heads of both
    halves would move all of q, k and v.

    Where nothing says which axes of a mesh split heads, both functions run for all heads, so that
    none moves whatever the axes are: 14.5 M estimated cycles against 11.0 M and 20 exchanges (v5e
    2x2, forward and backward, 16 clips of 16 x 196 tokens, 12 heads of 64, bfloat16). Arrays that
    are split with no mesh set still move.
    """

    def parted(heads: int, *operands):
        parts = [jnp.split(x, [heads], axis=-2) for x in operands]
        halves = zip((first, second), zip(*parts, strict=True), strict=True)
        done = [function(*part) for function, part in halves if part[0].shape[-2]]
        return jnp.concatenate(done, axis=-2)

    half, placement = q.shape[-2] // 2, placement_of(q, ("batch", None))
    if placement.parts(placement.free - placement.axes) > 1:
        in_first = jnp.arange(q.shape[-2])[:, None] < half
        return jnp.where(in_first, first(q, k, v), second(q, k, v))
    if placement.parts(placement.heads) == 1:
        return parted(half, q, k, v)

    def on_device(*operands):
        local = operands[0].shape[-2]
        before = half - jax.lax.axis_index(placement.heads) * local  # heads left of the first half
        ways = [functools.partial(parted, heads) for heads in (local, half % local, 0)]
        return jax.lax.switch((before < local).astype(int) + (before <= 0), ways, *operands)

    if placement.typed is not None:
        q, k, v = (jax.reshard(x, placement.typed) for x in (q, k, v))
    # Where an enclosing shard_map checks types, keep checking them.
    checked = bool(jax.typeof(q).mat.varying)
    if checked:
        return _made_again(on_device, functools.partial(placement.on_each, checked=True))(q, k, v)
    return placement.on_each(on_device, mentioned=True)(q, k, v)


def _made_again(function: Callable, placed: Callable) -> Callable:
    """`placed(function)`, recomputed for its gradient.

    For a `shard_map` inside another one that checks types: JAX would split what it keeps for the
    gradient over the outer one's axes too, which cannot be lowered.
    """
    run = jax.custom_vjp(placed(function))

    def back(operands, d_out):
        def gradients(d_out, *operands):
            return jax.vjp(function, *operands)[1](d_out)

        return placed(gradients)(d_out, *operands)

    run.defvjp(lambda *operands: (run(*operands), operands), back)
    return run


# What a token of x [b, l, d] or [b, t, s, d] attends to.
SPACE = "space"  # the tokens along the second axis from the right: all, or those of its frame
TIME = "time"  # those along the third axis from the right: its place in every frame
SPLIT_HEADS = "split_heads"  # the first half of the heads along time, the second along space


class SelfAttention(nn.Module):
    """Multi-head self-attention: the new x, and attention weights if asked for.

    x is [b, l, d] or [b, t, s, d]. The result is in float32 or wider, for additions before
    rounding.

    `along` is SPACE, TIME or SPLIT_HEADS. The weights are a pair (over space, over time), each None
    if unused or if `output_attentions` is off: over space [b, n, l, l] or [b, t, n, s, s], over
    time [b, s, n, t, t].

    `head_mask` multiplies the weights of each head. It, attention dropout and `output_attentions`
    need the weights themselves and take the explicit path; everything else goes through
    `attention`. With `shared_dropout` all frames of a clip lose the same weights. `zero_init`
    starts the output projection at zero, so that the layer at first adds nothing. With
    `num_queries`, for SPACE only, just the first so many tokens are queries. With
    `config.cosine_attention` scores are scaled cosines, see `cosine_scaled`; the parameter `scale`
    [n] is the logarithm of the factor.
    """

    config: Config
    along: str = SPACE
    shared_dropout: bool = False
    zero_init: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "b *l d"],
        head_mask: Float[AnyArray, " n"] | None,
        output_attentions: bool,
        clip_ids: Int[AnyArray, " b"] | None = None,
        num_queries: int | None = None,
    ) -> tuple[Float[jax.Array, "b *q d"], tuple[Weights | None, Weights | None]]:
        config = self.config
        n, d = config.num_attention_heads, config.hidden_size
        e = config.head_width

        def projection(name, use_bias):
            axes = ("embed", "heads", "kv")
            return Projection(config, (d, n, e), axes, use_bias=use_bias, name=name)

        query = projection("query", config.qkv_bias)
        key, value = projection("key", config.key_bias), projection("value", config.qkv_bias)
        if num_queries is None:
            q, k, v = project_together(x, (query, key, value))
        else:
            q, (k, v) = query(x[..., :num_queries, :]), project_together(x, (key, value))
        if config.cosine_attention:
            init = with_axes(nn.initializers.constant(math.log(10)), ("heads",))
            scale = self.param("scale", init, (n,), jnp.dtype(config.param_dtype))
            q, k = cosine_scaled(q, k, scale)
        if num_queries is not None and self.along != SPACE:
            raise ValueError(f"num_queries={num_queries} needs along={SPACE!r}, got {self.along!r}")
        dropped = config.attention_probs_dropout_prob > 0 and clip_ids is not None
        explicit = output_attentions or head_mask is not None or dropped

        def attend(q, k, v, head_mask, axis):
            """Attend along one axis of q, k, v [b, ..., n, e]; the others are batch axes."""
            names = ["batch", *("frames",) * (x.ndim - 3), "length"]
            names.pop(axis + 2)
            q, k, v = (jnp.moveaxis(y, axis, -3) for y in (q, k, v))
            if explicit:
                out, weights = self._explicit(q, k, v, head_mask, clip_ids)
            else:
                out = attention(q, k, v, implementation=config.attention, leading=names)
                weights = None
            return jnp.moveaxis(out, -3, axis), weights

        over_space = over_time = None
        if self.along == SPACE:
            y, over_space = attend(q, k, v, head_mask, -3)
        elif self.along == TIME:
            y, over_time = attend(q, k, v, head_mask, -4)
        elif explicit:
            half = n // 2
            (q0, q1), (k0, k1), (v0, v1) = (jnp.split(y, 2, axis=-2) for y in (q, k, v))
            masks = (None, None) if head_mask is None else (head_mask[:half], head_mask[half:])
            y0, over_time = attend(q0, k0, v0, masks[0], -4)
            y1, over_space = attend(q1, k1, v1, masks[1], -3)
            y = jnp.concatenate([y0, y1], axis=-2)
        else:

            def over_time_only(q, k, v):
                return attend(q, k, v, None, -4)[0]

            def over_space_only(q, k, v):
                return attend(q, k, v, None, -3)[0]

            y = in_halves(over_time_only, over_space_only, q, k, v)
        axes = ("heads", "kv", "embed")
        out = Projection(config, (n, e, d), axes, num_in=2, zero_init=self.zero_init, name="out")
        y = out.unrounded(y)
        return y, ((over_space, over_time) if output_attentions else (None, None))

    def _explicit(
        self, q: Queries, k: Keys, v: Keys, head_mask, clip_ids
    ) -> tuple[Queries, Weights]:
        """Attention by way of its weights, which are returned too."""
        wide = wide_type(q.dtype)
        scores = jnp.einsum("...qne,...kne->...nqk", q, k, preferred_element_type=wide)
        weights = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
        shared = (1,) if self.shared_dropout else ()
        weights = dropout(self, weights, self.config.attention_probs_dropout_prob, clip_ids, shared)
        if head_mask is not None:
            scale = jnp.expand_dims(head_mask.astype(wide), (*range(weights.ndim - 3), -2, -1))
            weights = weights * scale
        weights = weights.astype(v.dtype)
        return jnp.einsum("...nqk,...kne->...qne", weights, v), weights
