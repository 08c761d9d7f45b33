# SPDX-License-Identifier: Apache-2.0
"""Accelerators that programs are compiled for where none is there: figures, topologies, devices.

TPU programs are compiled by libtpu, GPU programs by jax's CUDA plugin. Both are given a description
of the hardware, and neither has to find any.
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

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one jax device is, by its maker's figures; a second is one at the nominal clock.

    `flops` is of dense bfloat16 products; `links` is what a chip sends at once over all its links
    to others, in one direction. `dimensions`, `megacore` and `most` are of a TPU's torus.
    """

    platform: str  # "tpu" or "gpu", as jax names it
    flops: float  # a second
    bandwidth: float  # of its main memory, bytes a second
    memory: int  # bytes, of which a program may use a little less
    links: float  # bytes a second
    clock: float  # cycles a second
    name: str = ""  # as its compiler knows it
    dimensions: int = 0
    megacore: bool = False  # two cores that are one device
    most: int = 0  # chips in a slice
    config: str = ""  # of a GPU, a GpuTargetConfigProto as text


def _gpu(
    name: str, capability: int, cores: int, clock: float, shared: int, l2: int, **more
) -> Chip:
    config = f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {capability} }}
  core_count: {cores}
  clock_rate_ghz: {clock / 1e9}
  memory_bandwidth: {more["bandwidth"]:.0f}
  device_memory_size: {more["memory"]}
  l2_cache_size: {l2}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared - 1024}
  shared_memory_per_core: {shared}
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  fpus_per_core: {64 if capability == 8 else 128}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
    return Chip(platform="gpu", name=name, clock=clock, config=config, **more)


CHIPS = {
    "v4": Chip("tpu", 275e12, 1228e9, 32 * _GIB, 300e9, 1.05e9, "v4", 3, True, 4096),
    "v5e": Chip("tpu", 197e12, 819e9, 16 * _GIB, 200e9, 1.5e9, "v5e", 2, False, 256),
    "v5p": Chip("tpu", 459e12, 2765e9, 95 * _GIB, 600e9, 1.75e9, "v5", 3, True, 8960),
    "v6e": Chip("tpu", 918e12, 1640e9, 32 * _GIB, 448e9, 1.75e9, "v6e", 2, False, 256),
    "a100": _gpu(
        "NVIDIA A100-SXM4-80GB", 8, 108, 1.41e9, 167936, 41943040,
        flops=312e12, bandwidth=2039e9, memory=80 * _GIB, links=300e9,
    ),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3", 9, 132, 1.98e9, 233472, 52428800,
        flops=989e12, bandwidth=3352e9, memory=80 * _GIB, links=450e9,
    ),
    "h200": _gpu(
        "NVIDIA H200", 9, 132, 1.98e9, 233472, 62914560,
        flops=989e12, bandwidth=4800e9, memory=141 * 10**9, links=450e9,
    ),
}  # fmt: skip
_EXAMPLES = "v4:4x4x4, v5e:8x8, v5p:4x4x4, v6e:4x4, a100:8, h100:8 or h200:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they lie, as in "v5e:8x8" or "h100:8"."""

    text: str
    kind: str  # a key of CHIPS
    sizes: tuple[int, ...]  # of the torus; of GPUs their number
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """The figures of each device."""
        return CHIPS[self.kind]

    @property
    def count(self) -> int:
        """How many devices there are, in all slices."""
        return math.prod(self.sizes) * self.slices

    @property
    def hosts(self) -> int:
        """Machines that the devices belong to: 4 chips of a TPU each, or 8 GPUs."""
        each = math.prod(self.host) if self.chip.platform == "tpu" else min(8, self.count)
        return self.count // each

    @property
    def host(self) -> tuple[int, int, int]:
        """The chips of one machine, along each side of the torus."""
        return (min(2, self.sizes[0]), min(2, self.sizes[1]), 1)

    def __str__(self):
        return self.text if self.slices == 1 else f"{self.slices} x {self.text}"


def parse_topology(text: str, slices: int = 1) -> Topology:
    """Read "v5e:8x8" or "h100:8"; `slices` of them, where TPUs are joined by a network.

    Raises UserError for one that there is not, before anything is loaded.
    """
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology {quoted(text)}: got {quoted(kind)!r}, expected one such as {_EXAMPLES}"
        )
    parts = shape.split("x")
    if not all(re.fullmatch("0*[1-9][0-9]{0,5}", part) for part in parts):
        raise UserError(
            f"--topology {quoted(text)}: {quoted(shape)!r} is no shape; expected {_EXAMPLES}"
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


def compile_only_devices(topology: Topology) -> list[jax.Device]:
    """Devices to compile for, which need not be there and hold no arrays.

    jax is told to use the CPU of this machine and no accelerator, for the rest of the process.
    Raises MissingExtra without the compiler, UserError where this process has an accelerator
    already and for what the compiler refuses.
    """
    gpu = topology.chip.platform == "gpu"
    if gpu and importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise MissingExtra("jax_cuda13_plugin", "cuda", f"compiling for {topology.kind}")
    if not gpu and importlib.util.find_spec("libtpu") is None:
        raise MissingExtra("libtpu", "plan", f"compiling for {topology.kind}")
    jax.config.update("jax_platforms", "cpu")
    if jax.default_backend() != "cpu":
        raise UserError(
            f"this process computes on {jax.default_backend()} already, and a plan is compiled "
            "beside the CPU alone; start it anew with JAX_PLATFORMS=cpu in its environment"
        )
    try:
        return list((_gpus if gpu else _tpus)(topology))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology {topology}: its compiler says: {error}") from error


def _tpus(topology: Topology) -> list[jax.Device]:
    answer_libtpu()
    # Nor does it ask a server of the cloud; and other processes may use it at the same time, since
    # none of them uses a TPU by it. Below level 3 it leaves a log among all temporary files.
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


def _gpus(topology: Topology) -> list[jax.Device]:
    per_host = topology.count // topology.hosts
    return topologies.get_topology_desc(
        topology.kind,
        "cuda",
        target_config=topology.chip.config,
        topology=f"1x{topology.hosts}x{per_host}",
    ).devices
