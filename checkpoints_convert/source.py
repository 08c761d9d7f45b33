# SPDX-License-Identifier: Apache-2.0
"""A checkpoint together with its config and layout.

A checkpoint is opened once: `find_checkpoint` opens its files, `open_source` reads its config, and
whatever uses the checkpoint next takes the opened `Checkpoint` or `Source` in place of a path.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.files.open import Checkpoint, open_checkpoint
from checkpoints_convert.files.tensors import check_readable
from checkpoints_convert.layouts.hf import StoredConfig, config_path, read_config
from checkpoints_convert.layouts.layout import Layout, StoredModel
from checkpoints_convert.layouts.registry import detect, layout_named, layout_of
from checkpoints_convert.problems import summarise
from checkpoints_convert.size_checks import check_sizes
from vivit_jax.config import Config, architecture
from vivit_jax.errors import UserError
from vivit_jax.hub import resolve_checkpoint
from vivit_jax.typed import Settings, override, parse_settings, reusable


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint, its config, and the model that it holds.

    `tensors` are the parameters by the names of the layout's table; `left_out` names the other
    entries of the files, with the reason; `notes` say what was assumed. `config` has the `settings`
    applied to `config_json`, the config beside the files, which is None where there is none.
    """

    checkpoint: Checkpoint
    config: Config
    stored: StoredModel
    tensors: Mapping[str, Any]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    config_json: StoredConfig | None = None
    settings: Settings = ()

    def __str__(self) -> str:
        return str(self.checkpoint)

    @property
    def layout(self) -> Layout:
        """The layout of the files."""
        return self.stored.layout

    @property
    def family(self) -> str:
        """The model family: "vivit" or "videomae"."""
        return self.stored.family

    @property
    def head(self) -> str:
        """The head that the checkpoint holds: "classification", "pretraining" or "none"."""
        return self.stored.head

    @property
    def architecture(self) -> str:
        """The class of the model, as HuggingFace and this library name it."""
        return architecture(self.family, self.head)

    @property
    def title(self) -> str:
        """The checkpoint and the model it is read as, for error messages."""
        return f"{self.checkpoint.path}, read as {self.architecture},"

    def describe(self) -> str:
        """Layout, model and dialect in one line."""
        names, model = self.stored.names, self.architecture
        if names.pooler:
            model += " with a pooling layer"
        if names.dialect:
            prefix = f"prefix {names.prefix!r}" if names.prefix else "no prefix"
            model += f", dialect {names.dialect!r}, {prefix}"
        return f"{self.layout.name}: {model} ({self.checkpoint.path})"

    def summary(self) -> list[str]:
        """A line for each part of the files that is left out."""
        return summarise(self.left_out, depth=self.layout.state_depth)

    @property
    def as_stored(self) -> bool:
        """Whether the files hold the parameters by these names and nothing else."""
        return self.tensors.keys() == self.checkpoint.tensors.keys()

    def changed(self, settings: Settings = (), **execution: Any) -> "Source":
        """The same checkpoint with more `settings` and other `execution` fields; opens no file."""
        settings, cls = reusable(settings), type(self.config)
        if not settings:
            config = dataclasses.replace(self.config, **execution)
            return dataclasses.replace(self, config=config)
        fields = dataclasses.fields(self.config)
        kept = {f.name: getattr(self.config, f.name) for f in fields if f.metadata.get("execution")}
        both = {**parse_settings(cls, self.settings), **parse_settings(cls, settings)}
        return _configured(self, both, kept | execution)


def find_checkpoint(source: str | Path | Checkpoint, revision: str | None = None) -> Checkpoint:
    """Open the files of a path or hub id, headers only; an opened checkpoint is returned as it is.

    Raises as `resolve_checkpoint` and `open_checkpoint` do.
    """
    if isinstance(source, Checkpoint):
        return source
    opened = open_checkpoint(resolve_checkpoint(source, revision))
    return dataclasses.replace(opened, given=str(source))


def open_source(
    source: str | Path | Checkpoint | Source,
    *,
    revision: str | None = None,
    layout: str | None = None,
    settings: Settings = (),
    **execution: Any,
) -> Source:
    """Open a directory, weight file or hub id; the layout is detected unless it is named.

    An opened `Checkpoint` is read, and an opened `Source` changed, without opening its files again.
    `settings` are changes to the config, or say what the tensors of a file without a config do not;
    see `parse_settings`. `execution` are execution fields. Raises CheckpointError or ConfigError
    for whatever is missing or wrong; data is not read yet.
    """
    if isinstance(source, Source):
        return source.changed(settings, **execution)
    checkpoint = find_checkpoint(source, revision)
    settings = reusable(settings)
    found = layout_named(layout) if layout else layout_of(checkpoint, settings)
    path = checkpoint.path
    if found.image:
        raise UserError(
            f"{path} holds an image model. Start a video model from it with "
            "vivit_jax.init_from_image_model, or vivit-convert convert SRC DST"
        )
    tensors, left_out = found.parameters(path, checkpoint.tensors)
    check_readable(path, tensors)
    alone = found.infer_config is not None and not checkpoint.has_config
    config_json = None if alone else read_config(path)
    return _configured(
        _Parts(checkpoint, found, tensors, left_out, config_json), settings, execution
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What of a `Source` does not depend on settings."""

    checkpoint: Checkpoint
    layout: Layout
    tensors: Mapping[str, Any]
    left_out: Mapping[str, str]
    config_json: StoredConfig | None


def _configured(parts: _Parts | Source, settings: Settings, execution: Mapping[str, Any]) -> Source:
    """The source with a config, checked against its tensors."""
    checkpoint, layout, tensors = parts.checkpoint, parts.layout, parts.tensors
    path, config_json = checkpoint.path, parts.config_json
    if config_json is not None:
        config, head = config_json.config, config_json.head
        notes = [config.kept_note] if config.kept_note else []
        config = override(dataclasses.replace(config, **execution), settings)
    else:
        assert layout.infer_config is not None, "read_config raises where there is no config.json"
        config, head, notes = layout.infer_config(
            path, tensors, checkpoint.tensors, settings, **execution
        )
    stored = detect(tensors, config, head, layout)
    if layout.check_beside is not None and config_json is not None and not config_json.hub_form:
        layout.check_beside(config, stored.head, stored.pooler, config_path(path))
    opened = Source(
        checkpoint=checkpoint,
        config=config,
        stored=stored,
        tensors=tensors,
        left_out=parts.left_out,
        notes=tuple(notes),
        config_json=config_json,
        settings=settings,
    )
    check_sizes(opened.title, tensors, config, stored.rules(config), stored.head)
    return opened
