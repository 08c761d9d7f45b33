# SPDX-License-Identifier: Apache-2.0
"""The makers' figures of accelerators."""

import dataclasses

import jax

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
# What a device's `device_kind` begins with, the longer of two first.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "NVIDIA A100": "a100",
    "NVIDIA H100 80GB HBM3": "h100",  # not the PCIe card, whose clock is lower
    "NVIDIA H200": "h200",
}


def chip_of(device: jax.Device) -> Chip | None:  # pyright: ignore[reportInvalidTypeForm]
    """The figures of a device of this machine, None for another kind than `CHIPS` has."""
    found = (kind for start, kind in _KINDS.items() if device.device_kind.startswith(start))
    kind = next(found, None)
    return None if kind is None else CHIPS[kind]
