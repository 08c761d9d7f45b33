# SPDX-License-Identifier: Apache-2.0
"""config.json as a file."""

import dataclasses
import difflib
import json
import logging
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.hub_v2 import is_hub_form, read_hub_form
from checkpoints_convert.layouts import ARCHITECTURES, architecture, head_of_architectures
from vivit_jax.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VideoMAEConfig,
    VivitConfig,
    config_from_dict,
)
from vivit_jax.errors import ConfigError
from vivit_jax.json_files import read_json
from vivit_jax.staging import interrupted

logger = logging.getLogger(__name__)
Config = VivitConfig | VideoMAEConfig
Settings = Iterable[str] | Mapping[str, Any]  # key=value, or values by the names of fields
NAME = "config.json"
HF_FIXED_EPS = 1e-5  # of the norms outside the blocks of VideoMAE


def config_path(checkpoint: str | Path) -> Path:
    """Where the config.json of a checkpoint, a directory or a weight file, lies."""
    checkpoint = Path(checkpoint)
    return (checkpoint if checkpoint.is_dir() else checkpoint.parent) / NAME


class StoredConfig(NamedTuple):
    """What a config.json says: the config, the head, and whether it is VideoMAE V2's on the hub."""

    config: Config
    head: str | None
    hub_form: bool = False


def read_config(checkpoint: str | Path, **execution: Any) -> StoredConfig:
    """Read the config of a checkpoint (a directory or a weight file) and the head it names.

    `execution` sets execution fields. The head is None where `architectures` is absent or names a
    class this library does not have. Keys that are not known are in `extra` of the config, whose
    `kept_note` the caller tells. Raises ConfigError, naming the file, if it is missing, not JSON,
    of another model_type, or sets what transformers computes with and this library does not.
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
    """The values of a config.json; the class it names says the family where it does not.

    transformers' own classes do not ask for a model_type.
    """
    named = values.get("architectures")
    if values.get("model_type") is not None or not isinstance(named, list):
        return values
    families = (ARCHITECTURES[n][0] for n in named if isinstance(n, str) and n in ARCHITECTURES)
    family = next(families, None)
    return values if family is None else {**values, "model_type": family}


def predicts_as_published(config: VideoMAEConfig) -> bool:
    """Whether pre-training turns pixels back into [0, 1] as HuggingFace and the authors do."""
    statistics = (config.image_mean, config.image_std)
    return statistics in ((None, None), (IMAGENET_MEAN, IMAGENET_STD))


def runs_in_transformers(config: Config, head: str) -> bool:
    """Whether transformers has this architecture and runs the model with this head."""
    rgb = config.num_channels == 3
    return config.in_transformers and (head != "pretraining" or config.norm_pix_loss or rgb)


def transformers_notes(config: Config, head: str, pooler: bool = False) -> tuple[str, ...]:
    """Where transformers does not compute what `config` says; `pooler` is of a headless model."""
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
    if config.hidden_act == "selu":
        notes.append("transformers documents hidden_act 'selu' but has no such activation")
    if head == "pretraining" and not predicts_as_published(config):
        notes.append(
            f"image_mean is {config.image_mean} and image_std {config.image_std} here; "
            "transformers takes pixels un-normalised with ImageNet's if they are RGB, else as they "
            "are"
        )
    if pooler and isinstance(config, VideoMAEConfig):
        notes.append(
            "transformers' VideoMAEModel computes the tokens and has no pooler_output, the fc_norm "
            "of their mean: it leaves fc_norm.weight and fc_norm.bias out"
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

    `pooler` is whether a headless model has one. Warns where transformers will not compute what
    it says; `warn=False` is for whoever tells it in another way, and for files that are not for
    transformers.
    """
    for note in transformers_notes(config, head, pooler) if warn else ():
        logger.warning("%s", note)
    values = config.to_dict()
    values["architectures"] = [architecture(config.model_type, head)]
    values["dtype"] = dtype
    text = json.dumps(values, indent=2, sort_keys=True)
    (Path(directory) / NAME).write_text(text + "\n", encoding="utf-8")


def override(config: Config, settings: Settings) -> Config:
    """Apply settings, see `parse_settings`."""
    changes = parse_settings(type(config), settings)
    if changes.get("num_labels", config.num_labels) != config.num_labels:
        changes.setdefault("id2label", None)
        changes.setdefault("class_splits", None)
        if changes["class_splits"] is None:
            changes.setdefault("split_names", None)
    return dataclasses.replace(config, **changes)


def reusable(settings: Settings | None) -> Settings:
    """Settings that can be read more than once; none for None. ConfigError for other types."""
    if settings is None:
        return ()
    kept: Any = settings
    if isinstance(settings, Mapping):
        kept = dict(settings)
    elif isinstance(settings, Iterable) and not isinstance(settings, str):
        kept = tuple(settings)
    if isinstance(kept, dict | tuple) and all(isinstance(name, str) for name in kept):
        return kept
    raise ConfigError(f"config must be fields by name or a list of 'key=value' texts, got {kept!r}")


def names_set(settings: Settings) -> set[str]:
    """The fields that settings name, not checked."""
    return {setting.partition("=")[0] for setting in settings}


def parse_settings(cls: type[Config], settings: Settings) -> dict[str, Any]:
    """Fields by name from `key=value` settings, or a mapping, with config.json's field names.

    In a text values are JSON, bare words are strings, `2,16,16` and `noun,verb` are lists; class
    names and splits set `num_labels` if nobody does. Raises ConfigError for an unknown key, for one
    that is set twice and for a value of the wrong type.
    """
    fields = {f.name: f.type for f in dataclasses.fields(cls) if not f.metadata.get("execution")}
    parsed, where, what = map(_split, settings), "--config", cls.model_type
    if isinstance(settings, Mapping):
        parsed, where, what = settings.items(), "config", cls.__name__
    changes = {}
    for name, value in parsed:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(fields)}"
            if name in {f.name for f in dataclasses.fields(cls)}:
                hint = ": it says how a model runs, not what it computes, and is an argument"
            raise ConfigError(f"{where}: {what} has no field {name!r}{hint}")
        if name in changes:
            raise ConfigError(f"{where}: {name} is set twice")
        changes[name] = _typed(where, name, value, fields[name])
    if "num_labels" not in changes:
        # Names and splits say how many classes there are.
        if isinstance(changes.get("id2label"), dict | tuple):
            changes["num_labels"] = len(changes["id2label"])
        elif isinstance(changes.get("class_splits"), tuple):
            changes["num_labels"] = sum(changes["class_splits"])
    return changes


@dataclasses.dataclass(frozen=True)
class _Text:
    """A value as it was typed."""

    text: str

    def __repr__(self):
        return repr(self.text)


def _split(setting: str) -> tuple[str, _Text]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"config takes texts of the form key=value, got {setting!r}")
    return name, _Text(text)


def _typed(where: str, name: str, given: Any, wanted: Any) -> Any:
    value = given
    if isinstance(given, _Text):
        value = _parse(given.text)
        if isinstance(value, str) and _fits((value,), wanted):
            value = tuple(value.split(","))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, list):
        value = tuple(value)
    if name != "id2label" and not _fits(value, wanted):
        expected = getattr(wanted, "__name__", None) if wanted in (int, float, bool, str) else None
        raise ConfigError(f"{where}: {name} must be {expected or wanted}, got {given!r}")
    return value


def _parse(text: str) -> Any:
    for candidate in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(candidate)
        except ValueError:
            continue
    return {"True": True, "False": False, "None": None}.get(text, text)


def _fits(value: Any, wanted: Any) -> bool:
    if wanted is None or wanted is types.NoneType:
        return value is None
    arguments = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        return any(_fits(value, option) for option in arguments)
    if typing.get_origin(wanted) is tuple:
        if not isinstance(value, tuple):
            return False
        items = arguments[:1] * len(value) if Ellipsis in arguments else arguments
        return len(value) == len(items) and all(map(_fits, value, items))
    kind = int | float if wanted is float else wanted
    return isinstance(value, kind) and not (wanted is not bool and isinstance(value, bool))
