# SPDX-License-Identifier: Apache-2.0
"""A model of one's own in a run: what it has to offer, how it starts and how it is saved.

A linen module of no family here can be fine-tuned as a classifier if it has

- `config`, a `ClipConfig` or a subclass of it, which says what clips the model takes and how many
  classes it has. It is saved, and compared when the run is resumed;
- `__call__(self, pixel_values, *, deterministic=True, **_)`, which takes float [b, t, h, w, c] and
  returns a `vivit_jax.outputs.ClassifierOutput` with logits [b, classes]. With
  `deterministic=False` it may use the rng "dropout". The other arguments are clip_ids [b], the
  clips' numbers in the whole batch, and requests for hidden states, which are False.

Its models are saved as config.json, preprocessor_config.json and model.safetensors with the
parameters by their paths; `read_params` reads them. A model that is to be pre-trained, opened by
`from_pretrained` or written in other layouts needs a family with weight tables: see
`vivit_jax.models.family`.
"""

import dataclasses
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from safetensors.flax import load_file, save_file

from checkpoints_convert.card import CardFacts, write_card
from checkpoints_convert.card_code import SavedModel
from checkpoints_convert.files.save import replaced_directory
from checkpoints_convert.pretrained import save_pretrained
from vivit_jax import param_tree
from vivit_jax.config_base import READING, TransformerConfig
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError, first_line
from vivit_jax.files.atomic import write_json
from vivit_jax.files.inputs import check_file
from vivit_jax.files.json_files import read_json
from vivit_jax.models.build import check_params, fresh_params
from vivit_jax.models.registry import head_of, is_known
from vivit_jax.outputs import RESULTS_ONLY
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.train.own import Own
from vivit_jax.train.start.initial_model import Start, execution_of
from vivit_jax.train.start.preprocessing import preprocessing
from vivit_jax.train.storage.run_directory import differences

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig(TransformerConfig):
    """The config of a model of one's own: the clips it takes and the classes it has.

    Subclass it, as a frozen dataclass with keyword-only fields, to add fields of the model's own.
    Training reads num_frames, image_size, num_channels, num_labels, id2label, dtype and
    param_dtype; the others mean nothing unless the model reads them.
    """

    model_type: ClassVar[str] = "own"
    own_model_type: ClassVar[str] = "own"
    title: ClassVar[str] = "model of one's own"
    heads: ClassVar[Mapping[str, str]] = {}

    num_frames: int = 16
    hidden_act: str = "gelu"

    @property
    def tubelet(self) -> tuple[int, int, int]:
        return (1, 1, 1)

    @property
    def key_bias(self) -> bool:
        return self.qkv_bias

    @property
    def in_transformers(self) -> bool:
        return False


def own_start(recipe: Recipe, own: Own, classes: tuple[str, ...] | None) -> Start:
    """What a new run of the caller's model starts from; `classes` are the names of the data's.

    Raises UserError for a model that does not offer what training needs, and for params that are
    not its own.
    """
    model = own.model
    assert model is not None  # the caller's
    _check(model, recipe)
    config: Any = model.config
    if classes is not None and config.id2label is None and len(classes) == config.num_labels:
        model = model.clone(config=dataclasses.replace(config, id2label=classes))
    frames = preprocessing(recipe, config)
    if own.params is None:
        params, how = fresh_params(model, recipe.train.seed), f"fresh, seed {recipe.train.seed}"
    else:
        params, how = meta.unbox(dict(own.params)), "with the params given"
        check_params(model, params)
    report = "\n  ".join((f"{type(model).__name__}, the caller's, {how}", *frames.notes))
    return Start(model, params, report, frames)


def _check(model: nn.Module, recipe: Recipe) -> None:
    name, config = type(model).__name__, getattr(model, "config", None)
    if not isinstance(config, TransformerConfig):
        raise UserError(
            f"model is a {name} whose config is {type(config).__name__}; expected a field `config` "
            "with a vivit_jax.train.ClipConfig, or a subclass of it"
        )
    if is_known(model) and head_of(model) != HEADS[recipe.task]:
        raise UserError(
            f"model is a {name}, and the recipe's task is {recipe.task!r}; expected a model for "
            f"{HEADS[recipe.task]}"
        )
    if not is_known(model) and recipe.task != "finetune":
        raise UserError(
            f"model is a {name} of no family, which can be fine-tuned only; to pre-train it, "
            "register a family: vivit_jax.models.registry.register_family"
        )
    if not is_known(model):
        _check_call(model)


def _check_call(model: nn.Module) -> None:
    """UserError for a model that cannot be called as the step does, or returns no logits."""
    config: Any = model.config
    call = f"{type(model).__name__}.__call__"
    clip = (2, config.num_frames, *config.frame_size, config.num_channels)
    clips = jax.ShapeDtypeStruct(clip, jnp.float32)
    options = {"deterministic": False, "clip_ids": jnp.arange(2), **RESULTS_ONLY}
    try:
        inspect.signature(type(model).__call__).bind(model, clips, **options)
    except TypeError as error:
        raise UserError(
            f"{call} {error}; expected (self, pixel_values, *, deterministic=True, **_)"
        ) from None

    def results(clips):
        key = jax.random.key(0)
        out, variables = model.init_with_output({"params": key, "dropout": key}, clips, **options)
        return getattr(out, "logits", None), variables

    logits, variables = jax.eval_shape(results, clips)
    if logits is None or logits.shape != (2, config.num_labels):
        found = "no .logits" if logits is None else f"logits of shape {logits.shape}"
        raise UserError(
            f"{call} gives {found} for two clips; expected a vivit_jax.outputs.ClassifierOutput "
            f"with logits of shape {(2, config.num_labels)}"
        )
    others = sorted({*variables} - {"params"})
    if others:
        raise UserError(
            f"{type(model).__name__} has variables of {', '.join(others)}, which are neither "
            "trained nor saved; use what has params only, such as LayerNorm for BatchNorm"
        )


def resumed_model(own: Own, model_file: Path) -> nn.Module:
    """The caller's model of a resumed run, whose description a file holds.

    Raises UserError if its config is another one.
    """
    model = own.model
    assert model is not None  # the caller's
    config: Any = model.config
    held = read_json(model_file, hint="restore it as it was written")
    names = held["config"].get("id2label")
    if config.id2label is None and names is not None:
        config = dataclasses.replace(config, id2label=names)
    # The run's, whatever the caller's model says.
    known = {field.name for field in dataclasses.fields(config)}.intersection(READING)
    read = {name: held["config"].get(name, getattr(type(config), name)) for name in known}
    config = dataclasses.replace(config, **read)
    now = {"config": config.to_dict(), "execution": execution_of(config)}
    now = json.loads(json.dumps(now))
    differs = differences({name: held.get(name) for name in now}, now)
    if differs:
        each = ", ".join(f"{name} {a!r} there, {b!r} now" for name, (a, b) in differs.items())
        raise UserError(f"model differs from that of the run in {model_file.parent}: {each}")
    return model.clone(config=config)


def save_model(
    directory: Path,
    model: nn.Module,
    params: Mapping[str, Any],
    processor: VideoProcessor,
    card: CardFacts | None = None,
) -> None:
    """`save_pretrained`, also for a model of no family, whose card says what opens it."""
    if is_known(model):
        save_pretrained(directory, model, params, processor, card=card)
        return
    config: Any = model.config
    with replaced_directory(directory) as staged:
        flat = param_tree.flatten(meta.unbox(params))
        save_file({path: jnp.asarray(value) for path, value in flat.items()}, staged / _WEIGHTS)
        named = {"architectures": [type(model).__name__]}
        write_json(staged / _CONFIG, config.to_dict() | named)
        processor.save_pretrained(staged)
        saved = SavedModel(
            config=config,
            head="classification",
            parameters=sum(value.size for value in flat.values()),
            dtype=", ".join(sorted({str(value.dtype) for value in flat.values()})),
            processor=processor,
            own_class=type(model).__name__,
        )
        write_card(staged, directory, saved, card or CardFacts())


def read_params(directory: str | Path) -> dict[str, Any]:
    """The params of a model of one's own that a run saved in models/<step>.

    Raises UserError for a directory without them.
    """
    path = Path(directory) / _WEIGHTS
    check_file(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a directory models/<step> of a run")
    try:
        flat = load_file(path)
    except Exception as error:  # damage raises errors of safetensors
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return param_tree.unflatten(flat)
