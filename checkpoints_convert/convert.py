# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert convert`: rewrite a checkpoint, every tensor accounted for."""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from checkpoints_convert.layouts import LAYOUTS

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
LayoutName = Literal[LAYOUTS]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did: a line per tensor read, tensors left out, totals."""

    source: str
    lines: tuple[str, ...]
    read: int
    left_out: int
    written: int
    parameters: int
    files: tuple[Path, ...]

    def __str__(self) -> str:
        from checkpoints_convert.problems import collapse

        names = ", ".join(path.name for path in self.files)
        return "\n".join(
            [
                self.source,
                *(f"  {line}" for line in collapse(self.lines)),
                f"{self.read} tensors read, {self.left_out} of them left out, {self.written} "
                f"written, {self.parameters:,} parameters",
                f"wrote {names} to {self.files[0].parent}",
            ]
        )


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    from_layout: str | None = None,
    to_layout: str = "hf",
    settings: Iterable[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    revision: str | None = None,
) -> Conversion:
    """Write `source` (directory, file or hub id, any dialect) as a directory in `to_layout`.

    Values are bit-exact and dtypes preserved unless `dtype` asks for a cast; the processor's files
    are copied. Raises CheckpointError, ConfigError or OSError and then leaves no directory behind.
    """
    from checkpoints_convert.config_json import write_config
    from checkpoints_convert.layouts import published
    from checkpoints_convert.rules import (
        export_params,
        match_import,
        read_params,
        stored_dtype,
    )
    from checkpoints_convert.save import check_destination, replaced_directory, write_weights
    from checkpoints_convert.source import open_source

    check_destination(destination, overwrite)
    opened = open_source(source, revision=revision, layout=from_layout, settings=settings)
    tensors, layout, config = opened.checkpoint.tensors, opened.layout, opened.config
    target = published(layout.family, layout.head, layout.pooler, to_layout)
    expected = opened.expected()
    rows = match_import(tensors, layout.rules(config), expected, opened.title)
    params = read_params(tensors, rows, expected, dtype)
    written = export_params(params, target.rules(config), expected)
    with replaced_directory(destination, overwrite) as staged:
        files = write_weights(staged, written, max_shard_size)
        write_config(staged, config, layout.head, stored_dtype(written))
        for name in PROCESSOR_FILES:
            beside = opened.checkpoint.path.parent / name
            if beside.is_file():
                files.append(shutil.copyfile(beside, staged / name))
    return Conversion(
        source=opened.describe(),
        lines=tuple(_account(rows, tensors, target.rules(config))),
        read=len(tensors),
        left_out=sum(not row.dst for row in rows),
        written=len(written),
        parameters=sum(array.size for array in params.values()),
        files=tuple(Path(destination) / path.name for path in (*files, staged / "config.json")),
    )


def _account(rows, tensors, target_rules) -> Iterable[str]:
    from checkpoints_convert.rules import dtype_name, expand

    new_names = {path: row.src for row in expand(target_rules) for path in row.dst}
    for row in rows:
        became = sorted({new_names[path] for path in row.dst})
        text = f"{row.src}  {tensors[row.src].shape} {dtype_name(tensors[row.src])}"
        if not row.dst:
            yield f"{text}  left out: {row.rule.reason}"
        elif became == [row.src]:
            yield text
        else:
            yield f"{text} -> {', '.join(became)}"


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    from_layout: Annotated[LayoutName | None, tyro.conf.arg(name="from")] = None,
    to_layout: Annotated[LayoutName, tyro.conf.arg(name="to")] = "hf",
    config: tuple[str, ...] = (),
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
    max_shard_size: str | None = None,
    revision: str | None = None,
) -> None:
    """Rewrite a checkpoint; exit 0 means that every tensor is accounted for.

    Any spelling, sharding or .bin becomes a directory with the hub's names in safetensors, bit for
    bit, with its config.json and preprocessor_config.json.

    Args:
        source: A checkpoint directory, a weight file with config.json beside it, or a hub id.
        destination: The directory to write.
        from_layout: The layout of SRC; detected by default.
        to_layout: The layout of DST.
        config: Changes to the config, key=value with the field names of config.json.
        overwrite: Replace the model files of an existing DST.
        dtype: Cast the weights; they are kept as stored by default.
        max_shard_size: Split the weights into files of at most this size, for example 5GB.
        revision: Branch, tag or commit of a hub id.
    """
    report = convert_checkpoint(
        source,
        destination,
        from_layout=from_layout,
        to_layout=to_layout,
        settings=config,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        revision=revision,
    )
    print(report)
