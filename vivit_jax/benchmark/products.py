# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a program timed alone: a bound on its speed."""

import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from vivit_jax.benchmark.measure import Timing
from vivit_jax.layers.matrices import NAME, contracted, matrix_product
from vivit_jax.layers.platform import platform

CALLS = 1000  # timed, for the cost of one

# (shape, dtype) of both factors, the dimension numbers, the precision, the result's dtype, and
# whether `vivit_jax.layers.matrices` gives it a form of its own on CPU.
Product = tuple[tuple, tuple, tuple, Any, Any, bool]


def products_of(function: jax.stages.Wrapped, *args: Any) -> Counter[Product]:
    """Every matrix product that the jitted `function(*args)` runs on a CPU, and how often.

    Of a branch for each platform, the first one, the CPU's, is counted.
    """
    return _count(function.trace(*args).jaxpr.jaxpr)


def _count(jaxpr: Any) -> Counter[Product]:
    found: Counter[Product] = Counter()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        own_form = name == NAME
        if name == "dot_general" or own_form:
            left, right = ((x.aval.shape, x.aval.dtype.name) for x in eqn.invars)
            out = eqn.outvars[0].aval.dtype.name
            (dot,) = params["plain"].eqns if own_form else (eqn,)
            how = (dot.params[name] for name in ("dimension_numbers", "precision"))
            found[left, right, *how, out, own_form] += 1
            continue
        times = params["length"] if name == "scan" else 1
        inner = params["branches"][:1] if name == "cond" else jaxprs_in_params(params)
        for each in inner:
            for product, count in _count(getattr(each, "jaxpr", each)).items():
                found[product] += times * count
    return found


def flops_of(product: Product) -> int:
    """Operations, two for a multiply-add."""
    (left, _), (right, _), ((contracted, _), (batch, _)), *_ = product
    terms = math.prod(left[i] for i in contracted)
    rows = math.prod(left) // terms
    shared = terms * math.prod(left[i] for i in batch)
    return 2 * rows * terms * (math.prod(right) // shared)


def operations(products: Counter[Product]) -> int:
    """Operations of all products."""
    return sum(flops_of(product) * count for product, count in products.items())


class ProductsAlone:
    """A side that runs products one after the other, on warm operands.

    On a CPU each is waited for; other devices run them in order, and only the last is waited for.
    """

    def __init__(self, products: Counter[Product], name: str = "its products alone"):
        self.name, self._products = name, products
        self._calls = [(*_call(product), count) for product, count in products.items()]
        self._each = platform() == "cpu"

    def run(self) -> None:
        """Run every product as often as the program does."""
        done = None
        for multiply, operands, count in self._calls:
            for _ in range(count):
                done = multiply(*operands)
                if self._each:
                    done.block_until_ready()
        jax.block_until_ready(done)

    def without_calls(self, timing: Timing) -> Timing:
        """The timing less the cost of the calls, which on a CPU is that of an empty function."""
        if not self._each:
            return timing
        nothing, operand = jax.jit(lambda a: a[0]), jnp.zeros(1)
        nothing(operand).block_until_ready()
        start = time.perf_counter()
        for _ in range(CALLS):
            nothing(operand).block_until_ready()
        calls = (time.perf_counter() - start) / CALLS * self._products.total()
        return Timing(tuple(max(0.0, seconds - calls) for seconds in timing.seconds))

    def rate(self, timing: Timing) -> float:
        """Operations per second."""
        return operations(self._products) / timing.median


def large_product(dtype: str) -> ProductsAlone:
    """A large square product, repeated for the clock: the machine's rate for a dtype."""
    size, times = (2048, 1) if platform() == "cpu" else (8192, 16)
    square = jax.ShapeDtypeStruct((size, size), dtype)
    (product,) = products_of(jax.jit(matrix_product), square, square)
    return ProductsAlone(Counter({product: times}), "one large product")


def _call(product: Product) -> tuple[Callable, tuple[jax.Array, jax.Array]]:
    """The product as a compiled function, called once, and its operands."""
    (left, left_dtype), (right, right_dtype), dimensions, precision, out, own_form = product
    keys = jax.random.split(jax.random.key(0))
    operands = (
        jax.random.normal(keys[0], left, left_dtype),
        jax.random.normal(keys[1], right, right_dtype),
    )
    plain = partial(
        jax.lax.dot_general,
        dimension_numbers=dimensions,
        precision=precision,
        preferred_element_type=jnp.dtype(out),
    )
    multiply = jax.jit(plain)
    if own_form:
        (summed, _) = dimensions
        multiply = jax.jit(partial(contracted, summed=tuple(axis for (axis,) in summed)))
    multiply(*operands).block_until_ready()
    return multiply, operands
