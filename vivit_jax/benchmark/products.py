# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a program, timed alone: what bounds it on a machine."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

# (shape, dtype) of both sides, the dimension numbers and the dtype of the result.
Product = tuple[tuple, tuple, tuple, Any]


def products_of(function: jax.stages.Wrapped, *args: Any) -> Counter[Product]:
    """Every dot_general that the jitted `function(*args)` runs on CPU, with how often it does.

    Where a program has a branch for each platform, the first, which is CPU's, is counted.
    """
    return _count(function.trace(*args).jaxpr.jaxpr)


def _count(jaxpr) -> Counter[Product]:
    found = Counter()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            left, right = ((x.aval.shape, x.aval.dtype.name) for x in eqn.invars)
            out = eqn.outvars[0].aval.dtype.name
            found[left, right, params["dimension_numbers"], out] += 1
        times = params["length"] if name == "scan" else 1
        inner = params["branches"][:1] if name == "cond" else jaxprs_in_params(params)
        for each in inner:
            for product, count in _count(getattr(each, "jaxpr", each)).items():
                found[product] += times * count
    return found


def flops_of(product: Product) -> int:
    """Two operations per multiply-add."""
    (left, _), (right, _), ((contracted, _), (batch, _)), _ = product
    terms = math.prod(left[i] for i in contracted)
    rows = math.prod(left) // terms
    shared = terms * math.prod(left[i] for i in batch)
    return 2 * rows * terms * (math.prod(right) // shared)


class ProductsAlone:
    """The products of a program one after the other, on warm operands: a side to alternate with."""

    name = "its products alone"

    def __init__(self, products: Counter[Product]):
        self._calls = [(*_call(product), count) for product, count in products.items()]
        nothing = jax.jit(lambda a: a[0])
        seconds = _median(nothing, (jnp.zeros(1),), repeats=5)
        # A call costs what one that only returns costs, which is not the products' time.
        self.calls_seconds = seconds * products.total()

    def run(self) -> None:
        """Every product as often as the program does it."""
        for multiply, operands, count in self._calls:
            for _ in range(count):
                multiply(*operands).block_until_ready()


def seconds_alone(product: Product, repeats: int = 5) -> float:
    """Median seconds of one product, on warm operands; a short one is timed several in a row."""
    return _median(*_call(product), repeats)


def _call(product: Product) -> tuple[Callable, tuple[jax.Array, jax.Array]]:
    """The product as a compiled function, called once, and operands for it."""
    (left, left_dtype), (right, right_dtype), dimensions, out = product
    keys = jax.random.split(jax.random.key(0))
    operands = (
        jax.random.normal(keys[0], left, left_dtype),
        jax.random.normal(keys[1], right, right_dtype),
    )
    multiply = jax.jit(
        lambda a, b: jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.dtype(out))
    )
    multiply(*operands).block_until_ready()
    return multiply, operands


def product_rate(dtype: str, size: int = 2048) -> float:
    """Operations per second of one large square product, the machine's rate for a dtype."""
    shape = ((size, size), dtype)
    product = (shape, shape, (((1,), (0,)), ((), ())), dtype)
    return flops_of(product) / seconds_alone(product, repeats=9)


def _median(function, operands, repeats: int, at_least: float = 0.02) -> float:
    function(*operands).block_until_ready()
    start = time.perf_counter()
    function(*operands).block_until_ready()
    in_a_row = max(1, math.ceil(at_least / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(in_a_row):
            function(*operands).block_until_ready()
        times.append((time.perf_counter() - start) / in_a_row)
    return statistics.median(times)
