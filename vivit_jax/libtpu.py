# SPDX-License-Identifier: Apache-2.0
"""What a machine without a TPU answers to libtpu, which the extras `plan` and `tpu` install.

jax loads libtpu wherever it is installed, and where there is no TPU libtpu says in five lines on
stderr that it cannot find out of which kind it is. It looks for answers in the environment first.
"""

import glob
import os
from pathlib import Path

_ANSWERS = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
_GOOGLE = "0x1ae0"  # as a maker of PCI devices
_VENDORS = "/sys/bus/pci/devices/*/vendor"
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # TPUs as Linux gives them, by generation


def has_tpu() -> bool:
    """Whether there may be a TPU: a VFIO device can be another thing, and jax can be told so."""
    if "JAX_FORCE_TPU_INIT" in os.environ or any(map(glob.glob, _DEVICES)):
        return True
    return any(Path(vendor).read_text().strip() == _GOOGLE for vendor in glob.glob(_VENDORS))


def answer_libtpu() -> None:
    """Put the answers into the environment, where it has none. Only for a process without a TPU."""
    for name, value in _ANSWERS.items():
        os.environ.setdefault(name, value)
