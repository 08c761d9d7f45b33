# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model among what training scripts save: containers, and prefixes of names.

torch.save writes whatever it is given: a state dict, or one under `model`, `module`, `state_dict`
(Lightning's .ckpt), `model_state_dict`, beside the optimiser, the epoch and hyperparameters. A
module around the model, of DistributedDataParallel, torch.compile, Accelerate or a LightningModule,
puts its own name for the model before the names of its parameters.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.files.torch_files import check_flat
from checkpoints_convert.layouts.registry import PREFIXES, naming
from vivit_jax.errors import CheckpointError

USUAL = ("model/", "module/", "state_dict/")  # containers, read in this order
TRAINING_STATE = "training state, not in the container of the parameters"
_COMPILED = re.compile(r"(^|(?<=\.))_orig_mod\.")
_WRAPPERS = re.compile(r"^((module|model|backbone|net|network|_forward_module)\.)+")


def plain_name(name: str) -> str:
    """A parameter's name without the names of the modules around the model."""
    return _WRAPPERS.sub("", _COMPILED.sub("", name))


def unwrapped(
    path: Path, tensors: Mapping[str, Any], container: str = ""
) -> dict[str, tuple[str, Any]]:
    """The stored name and the tensor of every parameter in a container, by its plain name.

    Raises CheckpointError where two names differ in the prefixes of wrappers only.
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


def hf_parameters(
    path: Path, tensors: Mapping[str, Any], known: tuple[str, ...] = PREFIXES
) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The tensors of a model by HuggingFace's names, and the names left out with the reason.

    `known` are the prefixes of a model's own names. Raises CheckpointError where the model has
    another one, for a file that holds several models, and for one that is no state dict.
    """
    prefixes = [
        found[1] for name in tensors if (found := naming({name: None})) and found[0] == "hf"
    ]
    container = _container(path, prefixes)
    if not container:
        check_flat(path, tensors)
    found = unwrapped(path, tensors, container)
    inside = [p.removeprefix(container) for p in prefixes if p.startswith(container)]
    if inside and not any(plain_name(prefix) in ("", *known) for prefix in inside):
        parts = inside[0].removesuffix(".").split(".")
        module = ".".join(parts[:-1] if f"{parts[-1]}." in known else parts)
        raise CheckpointError(
            f"{path}: the model's tensors are named {inside[0]}*; expected "
            f"{', '.join(f'{own}*' for own in known)} or no prefix, behind module., model., net., "
            f"backbone. or _orig_mod. at most. Save the state dict of {module} alone"
        )
    return {plain: tensor for plain, (_, tensor) in found.items()}, left_out(tensors, found)


def _container(path: Path, prefixes: list[str]) -> str:
    """The container of the model whose patch embedding's names have these prefixes."""
    held = list(dict.fromkeys(prefix[: prefix.rfind("/") + 1] for prefix in prefixes)) or [""]
    usual = [container for container in ("", *USUAL) if container in held]
    if len(held) > 1 and not usual:
        listed = ", ".join(container.removesuffix("/") for container in held)
        raise CheckpointError(
            f"{path} holds a model in each of {listed}; save the state dict of one of them alone"
        )
    return usual[0] if usual else held[0]
