# SPDX-License-Identifier: Apache-2.0
"""What is asked of cuDNN before `auto` takes it: one device, outside of any mesh."""

import jax
import jax.numpy as jnp
import pytest

from vivit_jax.layers import cudnn
from vivit_jax.layers.cudnn import cudnn_refusal, target_gpu

HERE = jax.devices("cpu")[0]  # a device that the question can be compiled for


@pytest.fixture
def attends(monkeypatch):
    """Puts a function of q, k and v in the place of cuDNN's attention."""

    def put(function):
        monkeypatch.setattr(
            jax.nn, "dot_product_attention", lambda *x, implementation: function(*x)
        )

    return put


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_the_question_knows_neither_the_mesh_nor_what_is_traced(attends):
    seen = []

    def look(q, k, v):
        seen.append(
            (jax.sharding.get_abstract_mesh().empty, jax.config.jax_default_device, q.shape)
        )
        return q * k * v

    def traced(x):
        assert not jax.sharding.get_abstract_mesh().empty
        assert cudnn_refusal("bfloat16", 64, 160, HERE) is None
        return x

    attends(look)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))), jax.default_device(HERE):
        jax.jit(jax.vmap(traced))(jnp.ones(8))
    assert seen == [(True, None, (1, 160, 1, 64))]


def test_what_jax_or_cudnn_cannot_do_is_a_refusal(attends, monkeypatch):
    attends(failing(NotImplementedError("The head dim must be <= 128, but got 136.\nmore")))
    assert cudnn_refusal("bfloat16", 136, 160, HERE) == "The head dim must be <= 128, but got 136."
    attends(failing(RuntimeError("cuDNN is not detected.")))
    assert cudnn_refusal("bfloat16", 64, 160, HERE) == "cuDNN is not detected."
    attends(lambda q, k, v: q * k * v)
    for said in ("INTERNAL: No valid engine configs for Matmul", "UNIMPLEMENTED: graph"):
        compiles = failing(jax.errors.JaxRuntimeError(f"{said}\nin cudnn.cc"))
        monkeypatch.setattr(jax.stages.Lowered, "compile", compiles)
        assert cudnn_refusal("bfloat16", 64, 160, HERE) == said


@pytest.mark.parametrize(
    "said",
    [
        "INTERNAL: custom_partitioner: Traceback in jax/_src/cudnn: AttributeError",
        "RESOURCE_EXHAUSTED: Out of memory",
    ],
)
def test_another_failure_to_compile_is_no_refusal(said, attends, monkeypatch):
    attends(lambda q, k, v: q * k * v)
    error = jax.errors.JaxRuntimeError(f"{said}\nnot supported, says a line further down")
    monkeypatch.setattr(jax.stages.Lowered, "compile", failing(error))
    with pytest.raises(jax.errors.JaxRuntimeError, match=said.split(":")[0]):
        cudnn_refusal("bfloat16", 64, 160, HERE)


def test_a_mistake_in_the_question_is_no_refusal(attends):
    attends(failing(ValueError("Q must have a rank of 4, got 3")))
    with pytest.raises(ValueError, match="rank of 4"):
        cudnn_refusal("bfloat16", 64, 160, HERE)


def test_whom_to_ask(monkeypatch):
    if jax.default_backend() != "gpu":
        assert target_gpu() is None

    class Gpu:
        platform = "gpu"

    gpu = Gpu()
    monkeypatch.setattr(jax, "local_devices", lambda backend: [gpu])
    assert target_gpu() is gpu
    with jax.default_device(HERE):
        assert target_gpu() is None
    monkeypatch.setattr(jax, "local_devices", failing(RuntimeError("no such backend")))
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        assert target_gpu() is None  # a mesh of CPU devices
    assert cudnn.cudnn_refusal("bfloat16", 64, 160) == "there is no GPU to ask it on"
