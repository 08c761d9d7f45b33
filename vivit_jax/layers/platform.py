# SPDX-License-Identifier: Apache-2.0
"""The platform that a program is traced for."""

import jax


def platform() -> str:
    """Where what is traced now will run: "cpu", "gpu" or "tpu", after `jax_default_device`."""
    device = jax.config.jax_default_device
    place = jax.default_backend() if device is None else getattr(device, "platform", device)
    return {"cuda": "gpu", "rocm": "gpu"}.get(place, place)
