# SPDX-License-Identifier: Apache-2.0
"""The layouts that are known, and which of them a checkpoint is in."""

from collections.abc import Collection

from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.layouts.hf import HF
from checkpoints_convert.layouts.image_vit import IMAGE_VIT
from checkpoints_convert.layouts.layout import Layout, StoredModel, name_before
from checkpoints_convert.layouts.scenic import SCENIC
from checkpoints_convert.layouts.videomae_authors import VIDEOMAE_AUTHORS
from checkpoints_convert.tables.table import Table
from vivit_jax.config import Config
from vivit_jax.errors import CheckpointError, UserError
from vivit_jax.typed import Settings

# Image ViTs come first: their names are those of video models, with kernels of another rank.
LAYOUTS: list[Layout] = [IMAGE_VIT, HF, SCENIC, VIDEOMAE_AUTHORS]


def register(layout: Layout) -> None:
    """Add a layout to those that every function and command reads and writes.

    Raises UserError for a name that is taken.
    """
    if layout.name in layout_names():
        raise UserError(f"there is a layout {layout.name!r} already; choose another name")
    LAYOUTS.append(layout)


def register_table(layout: str, family: str, table: Table) -> None:
    """Add the weight table of a family to a layout, which then reads and writes its models.

    Raises UserError for a family that the layout already has a table of.
    """
    found = layout_named(layout)
    if family in found.tables:
        raise UserError(f"layout {layout!r} already has a table of {family}; remove one")
    found.tables[family] = table


def layout_names(*, writable: bool = False) -> tuple[str, ...]:
    """The names of all layouts, or of those that can be written."""
    return tuple(each.name for each in LAYOUTS if each.writable or not writable)


def container_names() -> tuple[str, ...]:
    """The containers of parameters in all layouts of single files."""
    return tuple(
        dict.fromkeys(name for layout in LAYOUTS if layout.file for name in layout.file.containers)
    )


def layout_named(name: str) -> Layout:
    """The layout of this name. Raises UserError for a name that no layout has."""
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise UserError(f"layout is {name!r}, expected one of {', '.join(layout_names())}")


def layout_of(checkpoint: Checkpoint, settings: Settings = ()) -> Layout:
    """The layout of a checkpoint, by the name and the rank of its patch embedding; else hf.

    `settings` decide where an image model and a video model of sampled frames look the same.
    """
    names = checkpoint.tensors.keys()
    endings = [ending for layout in LAYOUTS for ending in layout.patch_kernels]
    kernels = (e for name in names for e in endings if name_before(name, e) is not None)
    kernel = next(kernels, None)
    for layout in LAYOUTS:
        if layout.detects is not None:
            found = layout.detects(checkpoint, settings)
        elif kernel is None:
            found = layout.block_names is not None and any(map(layout.block_names.match, names))
        else:
            found = kernel in layout.patch_kernels
        if found:
            return layout
    return HF


def published(
    family: str, head: str, pooler: bool = False, layout: str | Layout = "hf"
) -> StoredModel:
    """The names under which a layout writes a model: for hf, those of the files on the hub."""
    layout = layout_named(layout) if isinstance(layout, str) else layout
    return StoredModel(layout, family, _table(layout, family).published(head, pooler))


def detect(
    names: Collection[str],
    config: Config,
    head: str | None = None,
    layout: str | Layout = "hf",
) -> StoredModel:
    """The model of `config` in a checkpoint of this layout with these tensor names.

    `head` is what config.json's `architectures` says an hf checkpoint holds; without it, and in
    the other layouts, the names decide. Raises CheckpointError if the names are of another family
    than the config.
    """
    layout = layout_named(layout) if isinstance(layout, str) else layout
    family = config.model_type
    table = _table(layout, family)
    for other, wrong in layout.tables.items():
        if other != family and wrong.prefix and any(n.startswith(wrong.prefix) for n in names):
            raise CheckpointError(
                f"config.json says model_type {family!r} but the tensors are named "
                f"{wrong.prefix}*: this is a {other} checkpoint with the wrong config.json"
            )
    return StoredModel(layout, family, table.identify(names, head))


def _table(layout: Layout, family: str) -> Table:
    if family not in layout.tables:
        held = ", ".join(layout.tables) or "no video model"
        raise UserError(f"layout {layout.name!r} holds {held}, not {family}")
    return layout.tables[family]
