# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and values, attention in float64 by numpy, and how far another's is from it."""

import jax
import jax.numpy as jnp
import numpy as np


def qkv(length, heads=3, width=20, batch=2, dtype=np.float32, keys=None, scale=1):
    rng = np.random.default_rng(length)
    lengths = (length, keys or length, keys or length)
    return [(scale * rng.standard_normal((batch, n, heads, width))).astype(dtype) for n in lengths]


def reference(q, k, v, d_out=None):
    """Softmax attention in float64; with `d_out` also its gradients to q, k and v."""
    inputs = (q, k, v) if d_out is None else (q, k, v, d_out)
    q, k, v, *d_out = (np.asarray(x).astype(np.float64).swapaxes(1, 2) for x in inputs)
    transposed = lambda x: x.swapaxes(-1, -2)  # noqa: E731
    scores = q @ transposed(k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    found = [weights @ v]
    if d_out:
        d_weights = d_out[0] @ transposed(v)
        mean = (weights * d_weights).sum(axis=-1, keepdims=True)
        d_scores = weights * (d_weights - mean) / np.sqrt(q.shape[-1])
        found += [d_scores @ k, transposed(d_scores) @ q, transposed(weights) @ d_out[0]]
    found = [x.swapaxes(1, 2) for x in found]
    return found if d_out else found[0]


def plain(q, k, v):
    """Attention as the textbook writes it, in the operands' dtype, for derivatives by jax."""
    weights = jax.nn.softmax(jnp.einsum("bqne,bkne->bnqk", q, k) * q.shape[-1] ** -0.5)
    return jnp.einsum("bnqk,bkne->bqne", weights, v)


def with_gradients(attend, q, k, v, d_out):
    """Output and the three gradients against a random cotangent, by one jitted function."""

    def run(q, k, v, d_out):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(d_out)

    found = jax.jit(run)(q, k, v, d_out)
    assert [x.dtype for x in found] == [q.dtype] * 4
    return found


def cotangent(q):
    return np.random.default_rng(99).standard_normal(q.shape).astype(q.dtype)


def largest_errors(found, exact):
    """Of the output, and of the worst gradient; all must be finite."""
    errors = [
        np.abs(np.asarray(a, np.float64) - b).max() for a, b in zip(found, exact, strict=True)
    ]
    assert np.isfinite(errors).all()
    return errors[0], max(errors[1:])
