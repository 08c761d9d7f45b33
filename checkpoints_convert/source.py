# SPDX-License-Identifier: Apache-2.0
"""A checkpoint together with its config and layout."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.files.open import Checkpoint, open_checkpoint
from checkpoints_convert.files.tensors import check_readable
from checkpoints_convert.layouts import scenic, videomae_authors
from checkpoints_convert.layouts.hf import config_path, read_config
from checkpoints_convert.layouts.registry import IMAGE, Layout, detect, naming
from checkpoints_convert.layouts.state_dicts import hf_parameters
from checkpoints_convert.problems import summarise
from checkpoints_convert.size_checks import check_sizes
from vivit_jax.config import Config, VivitConfig, architecture
from vivit_jax.errors import UserError
from vivit_jax.files.json_files import read_json
from vivit_jax.hub import resolve_checkpoint
from vivit_jax.typed import Settings, names_set, override, reusable

# The layouts of authors who write one file without its config: what is not hf.
FILE_LAYOUTS = {"scenic": scenic, "videomae": videomae_authors}
_AUTHORS_BLOCK = re.compile(r"(.*[./])?blocks\.\d+\.attn\.q_bias")


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
        spelling = "" if layout.name in FILE_LAYOUTS else f", dialect {layout.dialect!r}, {prefix}"
        if layout.pooler:
            name += " with a pooling layer"
        return f"{layout.name}: {name}{spelling} ({self.checkpoint.path})"

    def summary(self) -> list[str]:
        """A line per part of the files that is left out."""
        # scenic's states hold everything below one or two names, torch's below one each.
        return summarise(self.left_out, depth=2 if self.layout.name == "scenic" else 1)

    @property
    def as_stored(self) -> bool:
        """Whether the files hold the parameters by these names and nothing else."""
        return self.tensors.keys() == self.checkpoint.tensors.keys()


def open_source(
    source: str | Path,
    *,
    revision: str | None = None,
    layout: str | None = None,
    settings: Settings = (),
    **execution: Any,
) -> Source:
    """Open a directory, weight file or hub id; the layout is detected unless it is named.

    `settings` are changes to the config, or, for the files of `FILE_LAYOUTS`, which have none, what
    their tensors do not say; see `parse_settings`. `execution` are execution fields. Raises
    CheckpointError or ConfigError for whatever is missing or wrong; data is not read yet.
    """
    checkpoint = open_checkpoint(resolve_checkpoint(source, revision))
    settings = reusable(settings)
    layout = layout or layout_of(checkpoint, settings)
    if layout == IMAGE:
        raise UserError(
            f"{checkpoint.path} holds an image model. Start a video model from it with "
            "vivit_jax.init_from_image_model, or vivit-convert convert SRC DST"
        )
    path, everything = checkpoint.path, checkpoint.tensors
    tensors, left_out, notes, hub_form = everything, {}, [], False
    if layout == "scenic":
        tensors, left_out = scenic.parameters(everything)
    elif layout == "videomae":
        tensors, left_out = videomae_authors.parameters(path, everything)
    else:
        tensors, left_out = hf_parameters(path, everything)
    check_readable(path, tensors)
    if layout not in FILE_LAYOUTS or config_path(path).exists():
        config, head, hub_form = read_config(path, **execution)
        notes = [config.kept_note] if config.kept_note else []
        config = override(config, settings)
    elif layout == "scenic":
        config, head, notes = scenic.infer_config(path, tensors, settings, **execution)
    else:
        args = videomae_authors.script_arguments(everything)
        config, head, notes = videomae_authors.infer_config(
            path, tensors, settings, args, **execution
        )
    spelling = detect(tensors, config, head, layout)
    if layout == "videomae" and config_path(path).exists() and not hub_form:
        videomae_authors.check_function(
            config, spelling.head, spelling.pooler, beside=config_path(path)
        )
    opened = Source(checkpoint, config, spelling, tensors, left_out, tuple(notes))
    check_sizes(opened.title, tensors, config, spelling.rules(config), spelling.head)
    return opened


def layout_of(checkpoint: Checkpoint, settings: Settings = ()) -> str:
    """The layout of a checkpoint, by the name and the rank of its patch embedding.

    `settings` decide where an image model and a video model of sampled frames look the same.
    """
    tensors = checkpoint.tensors
    kind, _ = naming(tensors) or ("hf", "")
    if kind == "flax":
        image = scenic.is_image_model(scenic.parameters(tensors)[0])
        sampled = "num_sampled_frames" in names_set(settings)
        image = image and not sampled and not _beside_vivit(checkpoint.path)
        return IMAGE if image else "scenic"
    if naming(tensors) is None and any("Transformer/encoderblock_" in name for name in tensors):
        return "scenic"  # damaged, and to be told so by scenic's names
    if naming(tensors) is None and any(map(_AUTHORS_BLOCK.fullmatch, tensors)):
        return "videomae"
    kernels = [tensor for name, tensor in tensors.items() if naming({name: tensor})]
    if kernels and all(len(k.shape) == 4 for k in kernels):
        return IMAGE
    return "videomae" if kind == "timm" else "hf"


def _beside_vivit(path: Path) -> bool:
    """Whether config.json says ViViT; names and shapes of an image model can be the same."""
    try:
        values = read_json(config_path(path))
    except (OSError, UserError):
        return False  # whoever needs the file says what is wrong with it
    types = (VivitConfig.model_type, VivitConfig.own_model_type)
    return isinstance(values, dict) and values.get("model_type") in types
