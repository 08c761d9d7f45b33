# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert inspect`: what a checkpoint holds."""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import tyro

from checkpoints_convert.layouts.image_vit import open_image_model
from checkpoints_convert.layouts.registry import layout_of
from checkpoints_convert.problems import collapse, summarise
from checkpoints_convert.rules import dtype_name, match_import
from checkpoints_convert.source import find_checkpoint, open_source
from vivit_jax.console import ConfigOption, joined
from vivit_jax.errors import counted
from vivit_jax.models.build import expected_shapes


def content_hash(tensors: Mapping[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and data, however they are split into files.

    For an `Unreadable` leaf it covers the reason.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {dtype_name(tensor)} {tuple(tensor.shape)}\n".encode())
        data = np.ascontiguousarray(tensor.read()).reshape(-1)
        # A train state may hold None or texts beside its arrays.
        digest.update(repr(data[0]).encode() if data.dtype == object else data.view(np.uint8).data)
    return digest.hexdigest()


def inspect(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    config: ConfigOption = (),
    revision: str | None = None,
) -> None:
    """Show what a checkpoint holds, and everything that does not fit.

    Prints its layout, config, tensors and hash.

    Args:
        source: A checkpoint directory, a weight file with config.json beside it, or a hub id.
        revision: Branch, tag or commit of a hub id.
    """
    checkpoint = find_checkpoint(source, revision)
    tensors = checkpoint.tensors
    count = sum(int(np.prod(t.shape, dtype=np.int64)) for t in tensors.values())
    dtypes = sorted({dtype_name(t) for t in tensors.values()})
    # Tensors come first, so that they are shown even if the config is missing or wrong.
    print(f"files       {', '.join(str(file) for file in checkpoint.files)}")
    print(f"tensors     {len(tensors)}, {count:,} parameters, {', '.join(dtypes)}")
    print(f"sha256      {content_hash(tensors)}")
    for line in collapse(f"{n}  {tuple(t.shape)} {dtype_name(t)}" for n, t in tensors.items()):
        print(f"  {line}")
    layout = layout_of(checkpoint)
    if layout.image:
        image = open_image_model(checkpoint)
        title = f"{layout.name}: image ViT, {image.dialect} names ({image.path})"
        settings = image.config
        expected = expected_shapes(image.config, "none", pooler=False)
        rows = match_import(image.tensors, image.rules, expected, image.title)
        left_out, notes = image.left_out, summarise(image.left_out)
    else:
        opened = open_source(checkpoint, settings=joined(config))
        title, settings = opened.describe(), opened.config
        expected = expected_shapes(settings, opened.head, opened.stored.pooler)
        rules = opened.stored.rules(settings)
        rows = match_import(opened.tensors, rules, expected, opened.title)
        left_out, notes = opened.left_out, (*opened.summary(), *opened.notes)
    print(f"layout      {title}")
    for key, value in settings.to_dict().items():
        if key != "label2id":
            print(f"  {key}: {_short(value)}")
    unread = [row for row in rows if not row.dst]
    lines = [f"{row.src}  left out: {row.rule.reason}" for row in unread]
    for line in (*collapse(lines), *notes):
        print(f"  {line}")
    count = len(unread) + len(left_out)
    print(f"fits        {counted(len(tensors), 'tensor')}, {count} of them left out, none missing")


def _short(value: Any) -> str:
    if isinstance(value, dict) and len(value) > 8:
        first = ", ".join(f"{k}: {v}" for k, v in list(value.items())[:3])
        return f"{first}, ... ({len(value)})"
    return str(value)
