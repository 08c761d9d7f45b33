# SPDX-License-Identifier: Apache-2.0
"""Accelerators to compile for without having one: topologies and devices.

libtpu compiles TPU programs and jax's CUDA plugin GPU programs, both from a description of the
hardware.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from vivit_jax.console import answer_libtpu
from vivit_jax.errors import MissingExtra, UserError, quoted
from vivit_jax.train.chips import CHIPS, Chip

_EXAMPLES = "v4:4x4x4, v5e:8x8, v5p:4x4x4, v6e:4x4, a100:8, h100:8 or h200:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """The kind and the arrangement of devices, such as "v5e:8x8" or "h100:8"."""

    text: str
    kind: str  # a key of CHIPS
    sizes: tuple[int, ...]  # the sides of the torus; the number of GPUs
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The figures of each device."""
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        """The number of devices in all slices."""
        return math.prod(self.sizes) * self.slices

    @property
    def hosts(self) -> int:
        """The number of machines, each with 4 TPU chips or 8 GPUs."""
        each = math.prod(self.host) if self.chip.platform == "tpu" else min(8, self.count)
        return self.count // each

    @property
    def host(self) -> tuple[int, int, int]:
        """The chips of one machine along each side of the torus."""
        return (min(2, self.sizes[0]), min(2, self.sizes[1]), 1)

    def __str__(self):
        return self.text if self.slices == 1 else f"{self.slices} x {self.text}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Parse "v5e:8x8" or "h100:8"; `slices` is the number of TPU slices joined by a network.

    Raises UserError for a topology that does not exist, before a compiler is loaded.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology {quoted(text)}: got {quoted(kind)!r}, expected one such as {_EXAMPLES}"
        )
    parts = shape.split("x")
    if not all(re.fullmatch("0*[1-9][0-9]{0,5}", part) for part in parts):
        raise UserError(
            f"--topology {quoted(text)}: {quoted(shape)!r} is not a shape; expected {_EXAMPLES}"
        )
    sizes, chip = tuple(map(int, parts)), CHIPS[kind]
    if slices < 1:
        raise UserError(f"--slices {slices}: expected 1 or more")
    if slices > 1 and chip.platform == "gpu":
        raise UserError(f"--slices {slices}: {kind} has none, only TPUs have; say {kind}:N for N")
    found = Topology(text, kind, sizes, slices)
    if chip.platform == "gpu":
        if len(sizes) != 1 or (sizes[0] > 8 and sizes[0] % 8):
            raise UserError(
                f"--topology {text!r}: expected a number of GPUs, up to 8 or a multiple of the 8 "
                f"of a machine, such as {kind}:8"
            )
        return found
    if len(sizes) != chip.dimensions:
        sides = "x".join(["4"] * chip.dimensions)
        raise UserError(
            f"--topology {text!r}: a slice of {kind} has {chip.dimensions} sides, got "
            f"{len(sizes)}; for example {kind}:{sides}"
        )
    if any(size % host for size, host in zip(sizes, found.host, strict=False)):
        raise UserError(
            f"--topology {text!r}: a machine has 2x2 chips, which {sizes[0]}x{sizes[1]} are not "
            "made of; use even sides"
        )
    if math.prod(sizes) > chip.most:
        raise UserError(
            f"--topology {text!r} has {math.prod(sizes)} chips, and a slice of {kind} at most "
            f"{chip.most}; use a smaller one, and --slices for several"
        )
    return found


def compile_only_devices(topology: Topology) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """Devices to compile for, which need not exist and hold no arrays.

    jax uses only the CPU of this machine for the rest of the process. Raises MissingExtra without
    the compiler, UserError if this process already uses an accelerator or the compiler refuses.
    """
    gpu = topology.chip.platform == "gpu"
    if gpu and importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise MissingExtra("jax_cuda13_plugin", "cuda", f"compiling for {topology.kind}")
    if not gpu and importlib.util.find_spec("libtpu") is None:
        raise MissingExtra("libtpu", "plan", f"compiling for {topology.kind}")
    jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != "cpu":
        raise UserError(
            f"this process already computes on {jax.default_backend()}, and a plan needs a process "
            "that uses the CPU alone; start it again with JAX_PLATFORMS=cpu in its environment"
        )
    try:
        return list((_gpus if gpu else _tpus)(topology))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {topology}: its compiler says: {error}") from error


def _tpus(topology: Topology) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    answer_libtpu()
    # It must not query a cloud server, nor lock out other processes, since none of them uses a TPU
    # through it. Below level 3 it leaves a log in the temporary directory.
    answers = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in answers.items():
        os.environ.setdefault(name, value)
    shape = "x".join(map(str, topology.sizes))
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{topology.chip.name}:{shape}",
        chips_per_host_bounds=topology.host,
        num_slices=topology.slices,
        **({"chip_config_name": "megacore"} if topology.chip.megacore else {}),
    ).devices


def _gpus(topology: Topology) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    per_host = topology.count // topology.hosts
    return topologies.get_topology_desc(
        topology.kind,
        "cuda",
        target_config=topology.chip.config,
        topology=f"1x{topology.hosts}x{per_host}",
    ).devices
