# SPDX-License-Identifier: Apache-2.0
"""Finds a model's parameters in what training scripts save: containers, and prefixes of names.

torch.save writes any object: a state dict, or one under `model`, `module`, `state_dict`
(Lightning's .ckpt) or `model_state_dict`, beside the optimiser, the epoch and hyperparameters.
Modules around the model (DistributedDataParallel, torch.compile, Accelerate, LightningModule)
prefix the names of its parameters.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivit_jax.errors import CheckpointError

USUAL = ("model/", "module/", "state_dict/")  # containers, read in this order
TRAINING_STATE = "training state, not in the container of the parameters"
_COMPILED = re.compile(r"(^|(?<=\.))_orig_mod\.")
_WRAPPERS = re.compile(r"^((module|model|backbone|net|network|_forward_module)\.)+")


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of modules around the model."""
    return _WRAPPERS.sub("", _COMPILED.sub("", name))


def unwrapped(
    path: Path, tensors: Mapping[str, Any], container: str = ""
) -> dict[str, tuple[str, Any]]:
    """The stored name and the tensor of every parameter in a container, by its plain name.

    Raises CheckpointError if two names differ only in the prefixes of wrappers.
    """
    found: dict[str, tuple[str, Any]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(container):
            continue
        plain = plain_name(name.removeprefix(container))
        if plain in found:
            raise CheckpointError(
                f"{path}: {found[plain][0]} and {name} are both {plain} without the prefixes of "
                "torch.compile and DistributedDataParallel; save one model alone"
            )
        found[plain] = name, tensor
    return found


def left_out(tensors: Mapping[str, Any], found: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """The names that are not among the parameters found, with the reason."""
    taken = {name for name, _ in found.values()}
    return dict.fromkeys((name for name in tensors if name not in taken), TRAINING_STATE)
