# SPDX-License-Identifier: Apache-2.0
"""HuggingFace directories: config.json, and tensors by transformers' names."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.files.torch_files import check_flat
from checkpoints_convert.layouts.hub_v2 import is_hub_form, read_hub_form
from checkpoints_convert.layouts.layout import Layout, name_before
from checkpoints_convert.layouts.state_dicts import USUAL, left_out, plain_name, unwrapped
from checkpoints_convert.tables import hf_videomae, hf_vivit
from checkpoints_convert.tables.table import Table
from vivit_jax.config import (
    ARCHITECTURES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    VideoMAEConfig,
    architecture,
    config_from_dict,
    head_of_architectures,
)
from vivit_jax.errors import CheckpointError, ConfigError
from vivit_jax.files.json_files import read_json
from vivit_jax.files.staging import interrupted

logger = logging.getLogger(__name__)
NAME = "config.json"
PATCH_KERNEL = "embeddings.patch_embeddings.projection.weight"
TABLES: dict[str, Table] = {"vivit": hf_vivit.TABLE, "videomae": hf_videomae.TABLE}  # by family
HF_FIXED_EPS = 1e-5  # VideoMAE's norms outside the blocks, in transformers


def config_path(checkpoint: str | Path) -> Path:
    """The path of the config.json of a checkpoint, a directory or a weight file."""
    checkpoint = Path(checkpoint)
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / NAME


class StoredConfig(NamedTuple):
    """The content of a config.json; `hub_form` says that it is VideoMAE V2's on the hub."""

    config: Config
    head: str | None
    hub_form: bool = False


def read_config(checkpoint: str | Path, **execution: Any) -> StoredConfig:
    """Read the config of a checkpoint (a directory or a weight file) and the head it names.

    `execution` sets execution fields. The head is None if `architectures` is absent or names an
    unknown class. Unknown keys are in the config's `extra`; the caller reports its `kept_note`.
    Raises ConfigError, naming the file, if it is missing, not JSON, of another model_type, or sets
    something that transformers computes with and this library does not.
    """
    path = config_path(checkpoint)
    try:
        values = read_json(path, ConfigError)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; a checkpoint needs its config.json{interrupted(path.parent)}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    try:
        hub_form = is_hub_form(values)
        if hub_form:
            config, head = read_hub_form(values)
        else:
            config = config_from_dict(_with_model_type(values), warn=False)
            head = head_of_architectures(values.get("architectures"), config.model_type)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config.json: ')}") from None
    except TypeError as error:
        raise ConfigError(f"{path}: a value has the wrong type: {error}") from None
    return StoredConfig(dataclasses.replace(config, **execution), head, hub_form)


def _with_model_type(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a config.json, with the model_type of the class it names if it has none.

    transformers' own classes do not need a model_type.
    """
    named = values.get("architectures")
    if values.get("model_type") is not None or not isinstance(named, list):
        return values
    families = (ARCHITECTURES[n][0] for n in named if isinstance(n, str) and n in ARCHITECTURES)
    family = next(families, None)
    return values if family is None else {**values, "model_type": family}


def predicts_as_published(config: VideoMAEConfig) -> bool:
    """Whether pre-training maps pixels back to [0, 1] as HuggingFace and the authors do."""
    statistics = (config.image_mean, config.image_std)
    return statistics in ((None, None), (IMAGENET_MEAN, IMAGENET_STD))


def runs_in_transformers(config: Config, head: str) -> bool:
    """Whether transformers has this architecture and runs it with this head."""
    if not config.in_transformers:
        return False
    pixels = isinstance(config, VideoMAEConfig) and not config.norm_pix_loss
    return head != "pretraining" or not pixels or config.num_channels == 3


def transformers_notes(config: Config, head: str, pooler: bool = False) -> tuple[str, ...]:
    """Notes on what transformers computes differently; `pooler` is of a headless model."""
    if not config.in_transformers:
        return (
            "transformers does not have this model; its Auto classes refuse the model_type "
            f"{config.own_model_type!r}",
        )
    if not runs_in_transformers(config, head):
        return (
            "transformers does not run pre-training with norm_pix_loss=False and "
            f"{config.num_channels} channels: it has no loss for pixels other than RGB",
        )
    notes = []
    if config.class_splits is not None:
        notes.append("transformers computes the logits of class_splits, but has no loss for them")
    if getattr(config, "hidden_act", None) == "selu":
        notes.append("transformers documents hidden_act 'selu' but has no such activation")
    mae = isinstance(config, VideoMAEConfig)
    if mae and head == "pretraining" and not predicts_as_published(config):
        notes.append(
            f"image_mean is {config.image_mean} and image_std {config.image_std} here; "
            "transformers un-normalises RGB pixels with ImageNet's, and other pixels not at all"
        )
    if mae and pooler:
        notes.append(
            "transformers' VideoMAEModel computes the tokens but no pooler_output, the fc_norm of "
            "their mean: it leaves fc_norm.weight and fc_norm.bias out"
        )
    norms = {"pretraining": "decoder_norm_eps"}
    if getattr(config, "use_mean_pooling", False):
        norms["classification"] = "fc_norm_eps"
    eps = getattr(config, norms.get(head, ""), HF_FIXED_EPS)
    if eps != HF_FIXED_EPS:
        notes.append(
            f"{norms[head]} is {eps:g} here; transformers computes with {HF_FIXED_EPS:g} whatever "
            "config.json says"
        )
    return tuple(notes)


def write_config(
    directory: str | Path,
    config: Config,
    head: str,
    dtype: str,
    *,
    pooler: bool = False,
    warn: bool = True,
) -> None:
    """Write config.json for a model with this head whose weights are stored as `dtype`.

    `pooler` is whether a headless model has one. Warns of what transformers computes differently;
    `warn=False` is for callers that report it themselves, and for files that are not for
    transformers.
    """
    for note in transformers_notes(config, head, pooler) if warn else ():
        logger.warning("%s", note)
    values = config.to_dict()
    values["architectures"] = [architecture(config.model_type, head)]
    values["dtype"] = dtype
    text = json.dumps(values, indent=2, sort_keys=True)
    (Path(directory) / NAME).write_text(text + "\n", encoding="utf-8")


def parameters(
    path: Path, tensors: Mapping[str, Any], prefixes: tuple[str, ...] = ()
) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The tensors of a model by HuggingFace's names, and the names left out with the reason.

    A model's own names may have the prefix of a family, or one of `prefixes`. Raises
    CheckpointError for another prefix, a file with several models, and a file that is not a state
    dict.
    """
    known = (*prefixes, *(table.prefix for table in TABLES.values()))
    before = [name_before(name, PATCH_KERNEL) for name in tensors]
    found_before = [prefix for prefix in before if prefix is not None]
    container = _container(path, found_before)
    if not container:
        check_flat(path, tensors)
    found = unwrapped(path, tensors, container)
    inside = [p.removeprefix(container) for p in found_before if p.startswith(container)]
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
    """The container of the model, from the prefixes of its patch embedding's names."""
    held = list(dict.fromkeys(prefix[: prefix.rfind("/") + 1] for prefix in prefixes)) or [""]
    usual = [container for container in ("", *USUAL) if container in held]
    if len(held) > 1 and not usual:
        listed = ", ".join(container.removesuffix("/") for container in held)
        raise CheckpointError(
            f"{path} holds a model in each of {listed}; save the state dict of one of them alone"
        )
    return usual[0] if usual else held[0]


HF = Layout(
    name="hf",
    tables=TABLES,
    parameters=parameters,
    patch_kernels=(PATCH_KERNEL,),
    in_transformers=True,
)
