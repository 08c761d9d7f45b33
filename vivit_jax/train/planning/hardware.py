# SPDX-License-Identifier: Apache-2.0
"""Accelerators to compile for without having one: figures, topologies and devices.

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

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The maker's figures of one jax device, at the nominal clock.

    `flops` are dense bfloat16 products; `links` is the bandwidth of all links to other chips
    together, in one direction. `dimensions`, `megacore` and `most` describe a TPU's torus.
    """

    platform: str  # "tpu" or "gpu", as jax names it
    flops: float  # a second
    bandwidth: float  # of the main memory, bytes a second
    memory: int  # bytes; a program may use a little less
    links: float  # bytes a second
    clock: float  # cycles a second
    name: str = ""  # what its compiler calls it
    dimensions: int = 0
    megacore: bool = False  # two cores act as one device
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
