# SPDX-License-Identifier: Apache-2.0
"""What a command line says of JAX's devices: none of the kind asked for, and compilation."""

import contextlib
import glob
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from vivit_jax.errors import closest, install, quoted
from vivit_jax.progress import CompileClock

# jax loads libtpu wherever it is installed (extras `plan` and `tpu`). Without a TPU, libtpu prints
# five lines on stderr about an unknown machine, unless the environment holds these answers.
_ANSWERS = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
_GOOGLE = "0x1ae0"  # vendor id of PCI devices
_VENDORS = "/sys/bus/pci/devices/*/vendor"
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # TPUs on Linux, by generation

_PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")  # values of JAX_PLATFORMS
_NO_BACKEND = re.compile(r"Unable to initialize backend '([^']*)'|Unknown backend:? '?([\w-]+)")
_COMPILING = "/jax/core/compile/backend_compile_duration"


def has_tpu() -> bool:
    """Whether there may be a TPU; a VFIO device may be something else."""
    if "JAX_FORCE_TPU_INIT" in os.environ or any(map(glob.glob, _DEVICES)):
        return True
    return any(Path(vendor).read_text().strip() == _GOOGLE for vendor in glob.glob(_VENDORS))


def answer_libtpu() -> None:
    """Set libtpu's environment variables that are unset; only for a process without a TPU."""
    for name, value in _ANSWERS.items():
        os.environ.setdefault(name, value)


def no_device(error: BaseException) -> str | None:
    """A line on the platform of JAX_PLATFORMS that has no device here; None for other errors."""
    found, asked = _NO_BACKEND.search(str(error)), os.environ.get("JAX_PLATFORMS", "")
    if found is not None:
        name = found[1] or found[2]
        if asked and name not in asked.split(","):  # jax takes "gpu" as "cuda,rocm"
            name = asked
    elif isinstance(error, AssertionError) and asked and _without_any():
        name = asked  # without a GPU jax leaves "cuda" out, and then lacks a default
    else:
        return None
    given = f"JAX_PLATFORMS={quoted(asked)}" if asked else "jax"
    if name not in _PLATFORMS:
        return f"{given}: jax has no platform {quoted(name)}{closest(name, _PLATFORMS)}"
    extra = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}.get(name)
    more = f"; if this machine has one: {install(extra)}" if extra else ""
    return f"{given}: jax finds no {name} device; unset it, or set JAX_PLATFORMS=cpu{more}"


def _without_any() -> bool:
    """Whether jax finds no device at all."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError):
        return True
    return False


@contextlib.contextmanager
def compilation_shown() -> Iterator[None]:
    """Show in the block that XLA compiles, and for how long, on stderr.

    Does nothing for a command that did not import jax.
    """
    if "jax" not in sys.modules:
        yield
        return
    from jax import monitoring

    clock = CompileClock()

    # jax reports the start of a compilation as a number, and its end as a duration.
    def began(event: str, value: float | int, **about: str | int) -> None:
        if event == _COMPILING:
            name = str(about.get("fun_name", ""))  # jit(step)
            clock.began(name.removeprefix("jit(").removesuffix(")"))

    def ended(event: str, duration_secs: float, **about: str | int) -> None:
        if event == _COMPILING:
            clock.ended()

    monitoring.register_scalar_listener(began)
    monitoring.register_event_duration_secs_listener(ended)
    try:
        yield
    finally:
        monitoring.unregister_scalar_listener(began)
        monitoring.unregister_event_duration_listener(ended)
