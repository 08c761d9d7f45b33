# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert convert`: rewrite a checkpoint, every tensor accounted for."""

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from checkpoints_convert.layouts import IMAGE, LAYOUTS
from checkpoints_convert.settings import Settings, joined
from vivit_jax.errors import UserError

Container = Literal["optimizer", "params", "model", "module", "bare"]
Inflation = Literal["central_frame", "average", "rank_pooling"]
Positions = Literal["tile", "resize", "resize_tile"]
TemporalAttention = Literal["copy", "zero", "fresh"]


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
    dtype: str | None = None  # that floats were cast to

    def __str__(self) -> str:
        from checkpoints_convert.problems import collapse

        names = ", ".join(path.name for path in self.files)
        cast = f" as {self.dtype}" if self.dtype else ""
        return "\n".join(
            [
                self.source,
                *(f"  {line}" for line in collapse(self.lines)),
                f"{self.read} tensors read, {self.left_out} of them left out, {self.written} "
                f"written{cast}, {self.parameters:,} parameters",
                f"wrote {names} to {self.files[0].parent}",
            ]
        )


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    from_layout: str | None = None,
    to_layout: str = "hf",
    settings: Iterable[str] | Mapping[str, Any] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    revision: str | None = None,
    container: Container | None = None,
    label_map: str | Path | None = None,
    **image_options: str,
) -> Conversion:
    """Write `source` (directory, file or hub id, any dialect) as a directory in `to_layout`.

    Values are bit-exact and dtypes preserved unless `dtype` asks for a cast; the processor's files
    are copied. Files of scenic and of VideoMAE's authors, which have no config, get what `settings`
    and the tensors say, and the processor that their authors train with. An image model becomes a
    video model as `init_from_image_model` makes it with `image_options`, and with a classifier if
    `settings` give it `num_labels`. Of a classifier only the classes stay that the file `label_map`
    lists, see `read_label_map`. Raises a UserError or OSError and then leaves no directory behind.
    """
    from checkpoints_convert.config_json import reusable, transformers_notes, write_config
    from checkpoints_convert.io import open_checkpoint
    from checkpoints_convert.layouts import published
    from checkpoints_convert.loaded import load_checkpoint, load_image_model
    from checkpoints_convert.rules import export_params, stored_dtype
    from checkpoints_convert.save import (
        check_destination,
        check_sole,
        replaced_directory,
        write_weights,
    )
    from checkpoints_convert.source import FILE_LAYOUTS, layout_of
    from vivit_jax.hub import resolve_checkpoint

    file_layout = FILE_LAYOUTS.get(to_layout)
    container = _container(to_layout, container)
    if file_layout and max_shard_size is not None:
        raise UserError(
            f"max_shard_size {max_shard_size!r} is for the hf layout; a {to_layout} checkpoint is "
            "one file"
        )
    check_destination(destination, overwrite)
    if file_layout:
        check_sole(Path(destination), file_layout.FILE, file_layout.RIVALS)
    path, settings = resolve_checkpoint(source, revision), reusable(settings)
    if (from_layout or layout_of(open_checkpoint(path), settings)) == IMAGE:
        loaded = load_image_model(path, settings, dtype, image_options)
    elif image_options:
        raise UserError(
            f"{path} is no image model: {', '.join(image_options)} would have no effect; leave out "
            "what is for image models"
        )
    else:
        loaded = load_checkpoint(path, from_layout, settings, dtype)
    if label_map is not None:
        loaded = loaded.with_classes(Path(label_map))
    config, head = loaded.config, loaded.head
    target = published(config.model_type, head, loaded.pooler, to_layout)
    rules = target.rules(config)  # refuses families that the layout does not hold
    if file_layout:
        file_layout.check_function(config, head, loaded.pooler)
    written = export_params(loaded.params, rules, loaded.expected)
    with replaced_directory(destination, overwrite) as staged:
        if file_layout:
            files = [file_layout.write(staged, written, container)]
        else:
            files = write_weights(staged, written, max_shard_size)
        # The report warns.
        write_config(staged, config, head, stored_dtype(written), warn=False)
        files += _write_processor(staged, path, loaded)
    notes = () if file_layout else transformers_notes(config, head, loaded.pooler)
    return Conversion(
        source=loaded.title,
        lines=(*_account(loaded.rows, loaded.tensors, rules), *loaded.notes, *notes),
        read=loaded.read,
        left_out=loaded.left_out,
        written=len(written),
        parameters=sum(array.size for array in loaded.params.values()),
        files=tuple(Path(destination) / path.name for path in (*files, staged / "config.json")),
        dtype=dtype,
    )


def _container(layout: str, container: str | None) -> str | None:
    """Where a file of this layout holds the parameters, by default what its authors do."""
    from checkpoints_convert.source import FILE_LAYOUTS

    held = {name: tuple(module.CONTAINERS) for name, module in FILE_LAYOUTS.items()}
    if container is not None and container not in held.get(layout, ()):
        listed = "; ".join(f"{name} checkpoints: {', '.join(held[name])}" for name in held)
        raise UserError(
            f"container {container!r} is not for the {layout} layout. Containers of {listed}"
        )
    return container or next(iter(held.get(layout, ())), None)


def _write_processor(staged: Path, path: Path, loaded) -> list[Path]:
    """The processor's files: those beside the checkpoint, or what its kind was trained with."""
    from checkpoints_convert.io import PROCESSOR_FILES

    beside = path if path.is_dir() else path.parent
    found = [beside / name for name in PROCESSOR_FILES if (beside / name).is_file()]
    if found and not loaded.own_processor:
        return [Path(shutil.copyfile(file, staged / file.name)) for file in found]
    if loaded.processor is None:
        return []
    loaded.processor.save_pretrained(staged)
    return [staged / PROCESSOR_FILES[0]]


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
    from_layout: Annotated[Literal[(*LAYOUTS, IMAGE)] | None, tyro.conf.arg(name="from")] = None,
    to_layout: Annotated[Literal[LAYOUTS], tyro.conf.arg(name="to")] = "hf",
    config: Settings = (),
    overwrite: bool = False,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
    max_shard_size: str | None = None,
    revision: str | None = None,
    container: Container | None = None,
    label_map: Path | None = None,
    inflation: Inflation | None = None,
    positions: Positions | None = None,
    temporal_attention: TemporalAttention | None = None,
) -> None:
    """Rewrite a checkpoint; exit 0 means that every tensor is accounted for.

    Any spelling, sharding or file format becomes a directory with the hub's names in safetensors,
    bit for bit, with its config.json and preprocessor_config.json, or a checkpoint of scenic or of
    VideoMAE's authors.

    An image model (HuggingFace ViT, timm, vision_transformer) becomes the start of a video model:
    its kernel is inflated over time, its positions repeated or resized, and what it does not have
    starts fresh and is listed. --config then sets fields of the video model, for example
    attention_type=factorised_encoder; num_labels=400 adds a fresh classifier.

    Args:
        source: A checkpoint directory, a weight file with config.json beside it, or a hub id.
        destination: The directory to write.
        from_layout: The layout of SRC; detected by default.
        to_layout: The layout of DST.
        overwrite: Replace the model files of an existing DST.
        dtype: Cast the weights; they are kept as stored by default.
        max_shard_size: Split the weights into files of at most this size, for example 5GB.
        revision: Branch, tag or commit of a hub id.
        container: Where the file holds the parameters. scenic: optimizer (optimizer/target, the
            default) or params; videomae: model (the default), module or bare.
        label_map: Keep these classes of the classifier: a JSON list whose entry k is the class of
            SRC that class k of DST was, as VideoMAE V2's label_710to400.json.
        inflation: Image models: how the kernel spreads over time (default central_frame).
        positions: Image models: what becomes of the position table (default resize_tile).
        temporal_attention: Image models, for factorised_self_attention: what temporal attention
            starts from (default copy).
    """
    image = dict(inflation=inflation, positions=positions, temporal_attention=temporal_attention)
    report = convert_checkpoint(
        source,
        destination,
        from_layout=from_layout,
        to_layout=to_layout,
        settings=joined(config),
        dtype=dtype,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        revision=revision,
        container=container,
        label_map=label_map,
        **{name: value for name, value in image.items() if value is not None},
    )
    print(report)
