# SPDX-License-Identifier: Apache-2.0
"""A model read into memory from a checkpoint or from an image model, ready to be written."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert import scenic, trees
from checkpoints_convert.config_json import Config, Settings, parse_settings
from checkpoints_convert.image_model import pixel_range
from checkpoints_convert.rules import Row, match_import, read_params
from checkpoints_convert.source import FILE_LAYOUTS, open_source
from vivit_jax.config import VivitConfig


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters by path, what they are a model of, and the account of the tensors read.

    `rows` say which of `tensors` became which parameters; there are none where values changed on
    the way. `processor` is the one of this kind of model, None where the checkpoint must bring it;
    a file that lies beside the checkpoint is preferred unless `own_processor`.
    """

    title: str
    config: Config
    head: str
    pooler: bool
    params: Mapping[str, Any]
    expected: Mapping[str, tuple[int, ...]]
    read: int
    left_out: int
    notes: tuple[str, ...]
    processor: Any = None
    own_processor: bool = False
    rows: tuple[Row, ...] = ()
    tensors: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def with_classes(self, label_map: Path) -> "Loaded":
        """The same model with those classes of its classifier that a label map lists, in its order.

        Raises UserError as `read_label_map` and `gather_classes` do.
        """
        from vivit_jax.heads import gather_classes, read_label_map

        rows = read_label_map(label_map)
        config, params = gather_classes(self.config, self.params, rows)
        head = {path: array for path, array in params.items() if path.startswith("head/")}
        note = f"classifier: {len(rows)} of {self.config.num_labels} classes, as {label_map} lists"
        return dataclasses.replace(
            self,
            config=config,
            params=params,
            expected={**self.expected, **trees.shapes_of(head)},
            notes=(*self.notes, note),
        )


def load_checkpoint(
    path: Path, from_layout: str | None, settings: Settings, dtype: str | None
) -> Loaded:
    """Read a checkpoint of any layout, values as they are or cast to `dtype`."""
    opened = open_source(path, layout=from_layout, settings=settings)
    layout, expected = opened.layout, opened.expected()
    rows = match_import(opened.tensors, layout.rules(opened.config), expected, opened.title)
    processor, notes = None, opened.notes
    if layout.name in FILE_LAYOUTS:
        processor = FILE_LAYOUTS[layout.name].processor(opened.config)
        if processor is None:
            notes += (
                f"no processor is known for {opened.config.num_channels} channels; write a "
                "preprocessor_config.json for them",
            )
    return Loaded(
        title=opened.describe(),
        config=opened.config,
        head=layout.head,
        pooler=layout.pooler,
        params=read_params(opened.tensors, rows, expected, dtype),
        expected=expected,
        read=len(opened.checkpoint.tensors),
        left_out=sum(not row.dst for row in rows) + len(opened.left_out),
        notes=(*opened.summary(), *notes),
        processor=processor,
        rows=tuple(rows),
        tensors=opened.tensors,
    )


def load_image_model(
    path: Path, settings: Settings, dtype: str | None, options: Mapping[str, str]
) -> Loaded:
    """Start a video model from an image model; `settings` are fields of the video model.

    There is a classifier if they give it `num_labels`, class names or splits. `options` are those
    of `init_from_image_model`.
    """
    from vivit_jax.image_init import read_image_model

    changes = parse_settings(VivitConfig, settings)
    head = "classification" if "num_labels" in changes else "none"
    changes["param_dtype"] = dtype or "float32"
    (model, params, report), image = read_image_model(path, changes, head=head, **options)
    flat = trees.flatten(params)
    return Loaded(
        title=f"{image.naming} names of an image ViT ({image.path})",
        config=model.config,
        head=head,
        pooler=False,
        params=flat,
        expected=trees.shapes_of(flat),
        read=len(image.tensors) + len(image.left_out),
        left_out=len(report.dropped),
        notes=tuple(str(report).splitlines()[1:]),
        processor=scenic.processor(model.config, **pixel_range(image)),
        own_processor=True,
    )
