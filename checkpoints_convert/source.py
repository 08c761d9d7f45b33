# SPDX-License-Identifier: Apache-2.0
"""A checkpoint together with its config and layout."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from checkpoints_convert import trees
from checkpoints_convert.config_json import Config, override, read_config
from checkpoints_convert.io import Checkpoint, open_checkpoint
from checkpoints_convert.layouts import Layout, architecture, detect


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint, the config beside it, and the layout its tensors are in."""

    checkpoint: Checkpoint
    config: Config
    layout: Layout

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
        return (
            f"{layout.name}: {name}, dialect {layout.dialect!r}, {prefix} ({self.checkpoint.path})"
        )

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

    `settings` are `key=value` changes to the config, `execution` its execution fields. Raises
    CheckpointError or ConfigError for whatever is missing or wrong; data is not read yet.
    """
    from vivit_jax.hub import resolve_checkpoint

    checkpoint = open_checkpoint(resolve_checkpoint(source, revision))
    config, head = read_config(checkpoint.path, **execution)
    config = override(config, settings)
    return Source(checkpoint, config, detect(checkpoint.tensors, config, head, layout))
