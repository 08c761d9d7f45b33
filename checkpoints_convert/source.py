# SPDX-License-Identifier: Apache-2.0
"""A checkpoint together with its config and layout."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert import scenic, trees
from checkpoints_convert.config_json import Config, config_path, override, read_config
from checkpoints_convert.io import Checkpoint, open_checkpoint
from checkpoints_convert.layouts import IMAGE, Layout, architecture, detect, naming
from vivit_jax.config import VivitConfig
from vivit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint, the config beside it, and the layout its tensors are in.

    `tensors` are the parameters by the names of the layout's table; `left_out` names what else the
    files hold, with the reason, and `notes` say what was assumed.
    """

    checkpoint: Checkpoint
    config: Config
    layout: Layout
    tensors: Mapping[str, Any]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The checkpoint and the model it is read as, the subject of error messages."""
        name = architecture(self.layout.family, self.layout.head)
        return f"{self.checkpoint.path}, read as {name},"

    def describe(self) -> str:
        """Layout, model and dialect in one line."""
        layout = self.layout
        name = architecture(layout.family, layout.head)
        prefix = f"prefix {layout.prefix!r}" if layout.prefix else "no prefix"
        spelling = "" if layout.name == "scenic" else f", dialect {layout.dialect!r}, {prefix}"
        return f"{layout.name}: {name}{spelling} ({self.checkpoint.path})"

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of the model that the checkpoint holds, one entry per layer."""
        from vivit_jax.pretrained import abstract_params, build_model

        model = build_model(self.config, self.layout.head, self.layout.pooler)
        leaves = trees.shapes_of(trees.flatten(abstract_params(model)))
        return {path: slot.shape for path, slot in trees.slots(leaves).items()}


def open_source(
    source: str | Path,
    *,
    revision: str | None = None,
    layout: str | None = None,
    settings: Iterable[str] = (),
    **execution: Any,
) -> Source:
    """Open a directory, weight file or hub id; the layout is detected unless it is named.

    `settings` are `key=value` changes to the config, or, for scenic's files, which have none, what
    their tensors do not say. `execution` are execution fields. Raises CheckpointError or
    ConfigError for whatever is missing or wrong; data is not read yet.
    """
    from vivit_jax.hub import resolve_checkpoint

    checkpoint = open_checkpoint(resolve_checkpoint(source, revision))
    settings = tuple(settings)
    layout = layout or layout_of(checkpoint, settings)
    if layout == IMAGE:
        raise UserError(
            f"{checkpoint.path} holds an image model. Start a video model from it with "
            "vivit_jax.init_from_image_model, or vivit-convert convert SRC DST"
        )
    tensors, left_out, notes = checkpoint.tensors, {}, []
    if layout == "scenic":
        tensors, left_out = scenic.parameters(tensors)
    if layout != "scenic" or config_path(checkpoint.path).is_file():
        config, head = read_config(checkpoint.path, **execution)
        config = override(config, settings)
    else:
        config, head, notes = scenic.infer_config(checkpoint.path, tensors, settings, **execution)
    spelling = detect(tensors, config, head, layout)
    return Source(checkpoint, config, spelling, tensors, left_out, tuple(notes))


def layout_of(checkpoint: Checkpoint, settings: Iterable[str] = ()) -> str:
    """The layout of a checkpoint, by the name and the rank of its patch embedding.

    `settings` decide where an image model and a video model of sampled frames look the same.
    """
    tensors = checkpoint.tensors
    kind, _ = naming(tensors) or ("hf", "")
    if kind == "flax":
        image = scenic.is_image_model(scenic.parameters(tensors)[0])
        sampled = any(setting.startswith("num_sampled_frames=") for setting in settings)
        image = image and not sampled and not _beside_vivit(checkpoint.path)
        return IMAGE if image else "scenic"
    if naming(tensors) is None and any("Transformer/encoderblock_" in name for name in tensors):
        return "scenic"  # damaged, and to be told so by scenic's names
    kernels = [tensor for name, tensor in tensors.items() if naming({name: tensor})]
    return IMAGE if kernels and all(len(k.shape) == 4 for k in kernels) else "hf"


def _beside_vivit(path: Path) -> bool:
    """Whether config.json says ViViT; names and shapes of an image model can be the same."""
    try:
        values = json.loads(config_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # whoever needs the file says what is wrong with it
    types = (VivitConfig.model_type, VivitConfig.own_model_type)
    return isinstance(values, dict) and values.get("model_type") in types
