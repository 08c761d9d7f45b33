# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on."""

import dataclasses
import datetime
import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path

from vivit_jax.data.sequence import usable_cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "av", "torch", "transformers", "torchcodec")


@dataclasses.dataclass(frozen=True)
class Environment:
    """The machine, the versions, the date and the command of a measurement."""

    device: str
    cores: int
    versions: dict[str, str]  # of the packages that are installed
    date: str
    command: str

    @property
    def line(self) -> str:
        """All of it but the command, in one line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.device}, {self.cores} cores; {versions}; {self.date}"


def environment() -> Environment:
    """The environment of this process."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return Environment(_device(), usable_cores(), versions, f"{datetime.date.today()}", command)


def _device() -> str:
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{cpu_name()} CPU"


def cpu_name() -> str:
    """What the processor calls itself, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
