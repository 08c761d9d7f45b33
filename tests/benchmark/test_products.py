# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a program, and that they are what is timed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VIDEOMAE

from vivit_jax import VideoMAEConfig
from vivit_jax.benchmark import products
from vivit_jax.benchmark.measure import Rounds, Timing, alternate
from vivit_jax.benchmark.work import KINDS, Work, program
from vivit_jax.layers.matrices import matrix_product


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_formula(kind):
    case = Work("", VideoMAEConfig(**VIDEOMAE, attention="xla", remat="none"), kind)
    assert operations(case) == case.flops()


@pytest.mark.parametrize("scan_layers", [True, False])
def test_products_as_users_run_it(scan_layers):
    """The backward pass of tiled attention recomputes the scores, and nothing else."""
    config = VideoMAEConfig(**VIDEOMAE, scan_layers=scan_layers)
    forward, step = (Work("", config, kind) for kind in ("forward", "finetune"))
    assert operations(forward) == forward.flops()
    scores = 2 * config.num_tokens**2 * config.hidden_size
    assert operations(step) == step.flops() + config.num_hidden_layers * scores


def operations(work) -> int:
    made = program(work)
    return products.operations(products.products_of(made.step, made.state, made.inputs))


def test_products_are_done_as_often_as_they_are_in_the_program(monkeypatch):
    def program(a, b):
        return jax.lax.scan(lambda a, _: (a @ b, None), a, length=3)[0] @ a

    square = np.ones((8, 8), np.float32)
    counted = products.products_of(jax.jit(program), square, square)
    assert counted.total() == 4
    done, call = [], products._call

    def watched(product):
        multiply, operands = call(product)
        return lambda *operands: done.append(product) or multiply(*operands), operands

    monkeypatch.setattr(products, "_call", watched)
    alone = products.ProductsAlone(counted)
    alone.run()
    assert products.Counter(done) == counted


def test_what_calling_costs_is_no_time_of_products():
    square = ((8, 8), "float32")
    product = (square, square, (((1,), (0,)), ((), ())), None, "float32", False)
    alone = products.ProductsAlone(products.Counter({product: 10}))
    long, short = alone.without_calls(Timing((1.0, 1e-9))).seconds
    assert 0.9 < long < 1 and short == 0


def test_operations_and_precision_of_a_product():
    shape = ((512, 512), "float32")
    plain = (None, "float32", False)
    assert products.flops_of((shape, shape, (((1,), (0,)), ((), ())), *plain)) == 2 * 512**3
    batched = (((3, 4, 5), "float32"), ((3, 6, 5), "float32"), (((2,), (2,)), ((0,), (0,))))
    assert products.flops_of((*batched, *plain)) == 2 * 3 * 4 * 5 * 6
    x = np.ones((4, 4), np.float32)
    (found,) = products.products_of(jax.jit(lambda a: jnp.dot(a, a, precision="highest")), x)
    assert found[3] == (jax.lax.Precision.HIGHEST,) * 2
    multiply, operands = products._call(found)
    (again,) = products.products_of(multiply, *operands)
    assert again == found


def test_a_product_is_timed_in_the_form_that_a_program_has_it():
    """The bfloat16 form takes half the time of a plain product with bfloat16 result (jax 0.10)."""
    x, y = np.ones((4, 64), jnp.bfloat16), np.ones((64, 32), jnp.bfloat16)
    of_both = jax.grad(lambda x, y: matrix_product(x, y).astype(jnp.float32).sum(), (0, 1))
    found = products.products_of(jax.jit(of_both), x, y)
    assert found.total() == 3 and all(own_form for *_, own_form in found)
    for product in found:
        multiply, operands = products._call(product)
        (again,) = products.products_of(multiply, *operands)
        assert again == product
    large = products.large_product("bfloat16")
    assert [own_form for *_, own_form in large._products] == [True]


def test_the_rate_of_a_large_product():
    large = products.large_product("float32")
    timing = alternate([large], Rounds(1)).timings[large.name]
    assert 1e9 < large.rate(timing) < 1e15
