# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert convert`: rewrite a checkpoint, every tensor accounted for."""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from checkpoints_convert.layouts import IMAGE, LAYOUTS
from checkpoints_convert.settings import Settings, joined

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
Container = Literal["optimizer", "params"]
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
    container: Container | None = None,
    **image_options: str,
) -> Conversion:
    """Write `source` (directory, file or hub id, any dialect) as a directory in `to_layout`.

    Values are bit-exact and dtypes preserved unless `dtype` asks for a cast; the processor's files
    are copied. scenic's files, which have no config, get what `settings` and the tensors say, and
    the processor that scenic trains with. An image model becomes a video model as
    `init_from_image_model` makes it with `image_options`, and with a classifier if `settings` give
    it `num_labels`. Raises CheckpointError, ConfigError or OSError and then leaves no directory
    behind.
    """
    from checkpoints_convert.config_json import write_config
    from checkpoints_convert.io import open_checkpoint
    from checkpoints_convert.layouts import published
    from checkpoints_convert.loaded import load_checkpoint, load_image_model
    from checkpoints_convert.rules import export_params, stored_dtype
    from checkpoints_convert.save import check_destination, replaced_directory
    from checkpoints_convert.scenic import check_sole, check_writable
    from checkpoints_convert.source import layout_of
    from vivit_jax.errors import UserError
    from vivit_jax.hub import resolve_checkpoint

    if to_layout == "hf" and container is not None:
        raise UserError(f"container {container!r} is for scenic checkpoints: to_layout='scenic'")
    if to_layout == "scenic" and max_shard_size is not None:
        raise UserError(
            f"max_shard_size {max_shard_size!r} is for the hf layout; a scenic checkpoint is one "
            "file"
        )
    check_destination(destination, overwrite)
    if to_layout == "scenic":
        check_sole(Path(destination))
    path, settings = resolve_checkpoint(source, revision), tuple(settings)
    if (from_layout or layout_of(open_checkpoint(path), settings)) == IMAGE:
        loaded = load_image_model(path, settings, dtype, image_options)
    elif image_options:
        raise UserError(
            f"{path} is no image model: {', '.join(image_options)} would have no effect; leave out "
            "what is for image models"
        )
    else:
        loaded = load_checkpoint(path, from_layout, settings, dtype)
    config, head = loaded.config, loaded.head
    target = published(config.model_type, head, loaded.pooler, to_layout)
    rules = target.rules(config)  # refuses families that the layout does not hold
    if to_layout == "scenic":
        check_writable(config, loaded.pooler)
    written = export_params(loaded.params, rules, loaded.expected)
    with replaced_directory(destination, overwrite) as staged:
        files = _write(staged, written, to_layout, container or "optimizer", max_shard_size)
        write_config(staged, config, head, stored_dtype(written))
        files += _write_processor(staged, path, loaded)
    return Conversion(
        source=loaded.title,
        lines=(*_account(loaded.rows, loaded.tensors, rules), *loaded.notes),
        read=loaded.read,
        left_out=loaded.left_out,
        written=len(written),
        parameters=sum(array.size for array in loaded.params.values()),
        files=tuple(Path(destination) / path.name for path in (*files, staged / "config.json")),
    )


def _write(
    staged: Path, tensors, layout: str, container: str, max_shard_size: int | str | None
) -> list[Path]:
    """The weights of a directory, in one file or several."""
    from checkpoints_convert.save import write_weights

    if layout == "hf":
        return write_weights(staged, tensors, max_shard_size)
    from checkpoints_convert import scenic
    from checkpoints_convert.flax_files import write_msgpack

    write_msgpack(staged / scenic.FILE, scenic.train_state(tensors, container))
    return [staged / scenic.FILE]


def _write_processor(staged: Path, path: Path, loaded) -> list[Path]:
    """The processor's files: those beside the checkpoint, or what its kind was trained with."""
    beside = path if path.is_dir() else path.parent
    found = [beside / name for name in PROCESSOR_FILES if (beside / name).is_file()]
    if loaded.processor is None or (found and loaded.processor == {}):
        return [Path(shutil.copyfile(file, staged / file.name)) for file in found]
    from vivit_jax.data.processor import VideoProcessor

    height, width = loaded.config.frame_size
    VideoProcessor.named(
        "vivit-scenic",
        # scenic resizes 32 pixels above the crop: 256 for 224, 288 for 256.
        size={"shortest_edge": min(height, width) + 32},
        crop_size={"height": height, "width": width},
        **loaded.processor,
    ).save_pretrained(staged)
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
    inflation: Inflation | None = None,
    positions: Positions | None = None,
    temporal_attention: TemporalAttention | None = None,
) -> None:
    """Rewrite a checkpoint; exit 0 means that every tensor is accounted for.

    Any spelling, sharding or file format becomes a directory with the hub's names in safetensors,
    bit for bit, with its config.json and preprocessor_config.json, or a scenic checkpoint.

    An image model (HuggingFace ViT, timm, vision_transformer) becomes the start of a video model:
    its kernel is inflated over time, its positions repeated or resized, and what it does not have
    starts fresh and is listed. --config then sets fields of the video model, for example
    attention_type=factorised_encoder; num_labels=400 adds a fresh classifier.

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
        container: Where a scenic checkpoint holds the parameters: optimizer/target, which is the
            default, or params.
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
        **{name: value for name, value in image.items() if value is not None},
    )
    print(report)
