# SPDX-License-Identifier: Apache-2.0
"""Whether cuDNN can compute attention on the GPU that a program is traced for."""

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.mesh import get_concrete_mesh
from jax.sharding import SingleDeviceSharding

from vivit_jax.errors import first_line
from vivit_jax.layers.platform import flag

Device = Any  # jax.Device, which type checkers take for a variable

# XLA's and cuDNN's messages where no engine runs the operation.
_NO_ENGINE = re.compile(
    r"UNIMPLEMENTED|not supported|unsupported|no (valid )?(engine|execution plan)|NOT_SUPPORTED",
    re.IGNORECASE,
)


def target_gpu() -> Device | None:
    """A GPU of the kind that the program traced now will run on, None where there is none.

    It may be one that programs are only compiled for: a device given to `jax.default_device`, or
    the first of the mesh set by `jax.set_mesh`.
    """
    default = flag("jax_default_device")
    if isinstance(default, jax.Device):
        return default if default.platform == "gpu" else None
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # no such backend
        pass

    mesh = get_concrete_mesh()
    return None if mesh.empty or mesh.devices.flat[0].platform != "gpu" else mesh.devices.flat[0]


def cudnn_refusal(
    dtype: str, head_dim: int, length: int, device: Device | None = None
) -> str | None:
    """Why cuDNN cannot run attention forward and backward over so many tokens; None if it can.

    Compiles both passes for one head, since only compiling shows whether cuDNN has an engine. It
    does so for one device, in a thread of its own where no mesh is set and nothing is traced,
    because cuDNN's partitioner raises if a mesh is set and operands do not lie on it. Raises
    whatever is not a refusal. `device` defaults to `target_gpu()`.
    """
    device = device or target_gpu()
    if device is None:
        return "there is no GPU to ask it on"
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_ask, dtype, head_dim, length, device).result()


def _ask(dtype: str, head_dim: int, length: int, device: Device) -> str | None:
    x = jax.ShapeDtypeStruct((1, length, 1, head_dim), dtype)
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")

    def loss(q, k, v):
        return attend(q, k, v).astype(jnp.float32).sum()

    here = SingleDeviceSharding(device)
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), in_shardings=here, out_shardings=here)
    try:
        lowered = step.lower(x, x, x)
    except RuntimeError as error:  # jax's own checks of shapes, of the GPU and of cuDNN's version
        return first_line(error)
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not _NO_ENGINE.search(first_line(error)):
            raise
        return first_line(error)
    return None
