# SPDX-License-Identifier: Apache-2.0
"""The platform that a program is traced for, and the flags of jax that it is traced under."""

from typing import Any

import jax


def flag(name: str) -> Any:
    """The value of a flag of jax, here and now; `jax.config.NAME`, which jax's types lack."""
    return getattr(jax.config, name)


def platform() -> str:
    """Where what is traced now will run: "cpu", "gpu" or "tpu", after `jax_default_device`."""
    device = flag("jax_default_device")
    place = jax.default_backend() if device is None else getattr(device, "platform", device)
    return {"cuda": "gpu", "rocm": "gpu"}.get(place, place)
