# SPDX-License-Identifier: Apache-2.0
"""Self-attention with one entry point for every backend; all of them compute exact attention."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from vivit_jax.config import ATTENTION_IMPLEMENTATIONS
from vivit_jax.errors import ConfigError
from vivit_jax.layers.linear import Config, Projection, at_least_float32, project

log = logging.getLogger(__name__)

QUERY_BLOCK = 200


def attention(q, k, v, *, implementation: str = "auto"):
    """softmax(q k^T / sqrt(e)) v, softmax in float32 or wider.

    q [b, q, n, e], k and v [b, k, n, e] -> [b, q, n, e]. `implementation`:

    * "xla": `jax.nn.dot_product_attention`, holds the scores [b, n, q, k];
    * "chunked": head by head in blocks of queries, scores of one block at a time, recomputed in
      the backward pass;
    * "cudnn": cuDNN flash attention, raises where cuDNN cannot run;
    * "auto": `choose_implementation` for the default backend, logged once.
    """
    if implementation == "auto":
        implementation = choose_implementation(
            jax.default_backend(), q.dtype.name, q.shape[-1], q.shape[1]
        )
    if implementation == "chunked":
        return _chunked(q, k, v)
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ConfigError(
            f"attention must be one of {list(ATTENTION_IMPLEMENTATIONS)}, got {implementation!r}"
        )
    if implementation == "xla" and q.dtype == jnp.float16 and jax.default_backend() == "cpu":
        raise ConfigError(
            "attention='xla' cannot run float16 on CPU; use attention='auto' or 'chunked', or "
            "dtype='bfloat16'"
        )
    try:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    except (RuntimeError, NotImplementedError) as error:
        if implementation != "cudnn":
            raise
        raise ConfigError(
            f"attention='cudnn' cannot run here ({error}) on {jax.default_backend()} with "
            f"{q.dtype.name}, head width {q.shape[-1]}; it needs an NVIDIA GPU and dtype bfloat16 "
            "or float16. attention='auto' picks what runs"
        ) from error


@functools.cache
def choose_implementation(platform: str, dtype: str, head_dim: int, length: int) -> str:
    """The backend that "auto" stands for; logs each distinct choice once.

    cuDNN takes half precision and head widths that are multiples of 8 up to 128. XLA on CPU runs
    the batched score product several times slower than the same product head by head, and has no
    float16 form of it.
    """
    if platform in ("gpu", "cuda") and dtype in ("bfloat16", "float16"):
        chosen = "cudnn" if head_dim % 8 == 0 and head_dim <= 128 else "xla"
    elif platform == "cpu":
        long = length > QUERY_BLOCK // 2
        chosen = "chunked" if long or dtype == "float16" else "xla"
    else:
        chosen = "xla"
    log.info("attention: %s on %s, %s, head width %d", chosen, platform, dtype, head_dim)
    return chosen


def _chunked(q, k, v):
    b, num_queries, n, e = q.shape
    blocks = math.ceil(num_queries / QUERY_BLOCK)
    size = math.ceil(num_queries / blocks)
    heads_first = lambda x: x.transpose(0, 2, 1, 3).reshape(b * n, x.shape[1], e)  # noqa: E731
    q, k, v = heads_first(q), heads_first(k), heads_first(v)
    q = jnp.pad(q, ((0, 0), (0, blocks * size - num_queries), (0, 0)))
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def one_head(head):
        q_blocks, k, v = head

        # Without the checkpoint the backward pass would keep every block's scores.
        @jax.checkpoint
        def one_block(q):
            scores = jnp.einsum("qe,ke->qk", q, k, preferred_element_type=wide) * e**-0.5
            return project(jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)

        return jax.lax.map(one_block, q_blocks)

    out = jax.lax.map(one_head, (q.reshape(b * n, blocks, size, e), k, v))
    out = out.reshape(b, n, blocks * size, e)[:, :, :num_queries]
    return out.transpose(0, 2, 1, 3)


class SelfAttention(nn.Module):
    """Multi-head self-attention; x [b, l, d] -> [b, l, d] and, if asked for, weights [b, n, l, l].

    `head_mask` [n] multiplies the weights of each head. It, attention dropout and
    `output_attentions` need the weights themselves and take the explicit path; everything else
    goes through `attention`.
    """

    config: Config

    @nn.compact
    def __call__(self, x, head_mask, output_attentions: bool, deterministic: bool):
        config = self.config
        n, d = config.num_attention_heads, config.hidden_size
        e = d // n

        def project(name, use_bias):
            axes = ("embed", "heads", "kv")
            return Projection(config, (d, n, e), axes, use_bias=use_bias, name=name)(x)

        q = project("query", config.qkv_bias)
        k = project("key", config.key_bias)
        v = project("value", config.qkv_bias)
        dropout = nn.Dropout(config.attention_probs_dropout_prob)
        weights = None
        if output_attentions or head_mask is not None or (dropout.rate > 0 and not deterministic):
            wide = jnp.promote_types(q.dtype, jnp.float32)
            scores = jnp.einsum("bqne,bkne->bnqk", q, k, preferred_element_type=wide) * e**-0.5
            weights = jax.nn.softmax(at_least_float32(scores), axis=-1).astype(v.dtype)
            weights = dropout(weights, deterministic=deterministic)
            if head_mask is not None:
                weights = weights * head_mask.astype(v.dtype)[None, :, None, None]
            y = jnp.einsum("bnqk,bkne->bqne", weights, v)
        else:
            y = attention(q, k, v, implementation=config.attention)
        axes = ("heads", "kv", "embed")
        y = Projection(config, (n, e, d), axes, num_in=2, name="out")(y)
        return y, (weights if output_attentions else None)
