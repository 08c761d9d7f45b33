# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert convert`: rewrites a checkpoint and accounts for every tensor."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from checkpoints_convert.card import CardFacts, base_of, write_card
from checkpoints_convert.card_code import SavedModel
from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.files.save import (
    check_destination,
    check_sole,
    replaced_directory,
    write_weights,
)
from checkpoints_convert.layouts import image_vit
from checkpoints_convert.layouts.hf import transformers_notes, write_config
from checkpoints_convert.layouts.layout import Layout
from checkpoints_convert.layouts.registry import (
    LAYOUTS,
    container_names,
    layout_named,
    layout_names,
    layout_of,
    published,
)
from checkpoints_convert.problems import collapse
from checkpoints_convert.rules import (
    Row,
    dtype_name,
    expand,
    export_params,
    match_import,
    read_params,
    stored_dtype,
)
from checkpoints_convert.source import Source, find_checkpoint, open_source
from checkpoints_convert.start.from_image import ImageOptions, read_image_model
from checkpoints_convert.start.label_map import gather_classes, read_label_map
from vivit_jax import param_tree
from vivit_jax.config import Config, VivitConfig
from vivit_jax.console import FLAT, ConfigOption, joined
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import ConfigError, UserError, counted
from vivit_jax.hub import PROCESSOR_FILES
from vivit_jax.models.build import expected_shapes
from vivit_jax.typed import Settings, parse_settings, reusable

Inflation = Literal["central_frame", "average", "rank_pooling"]
Positions = Literal["tile", "resize", "resize_tile"]
TemporalAttention = Literal["copy", "zero", "fresh"]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What a conversion did: a line for each tensor, and totals."""

    source: str
    lines: tuple[str, ...]
    read: int
    left_out: int
    written: int
    parameters: int
    files: tuple[Path, ...]
    dtype: str | None = None  # that floats were cast to

    def __str__(self) -> str:

        names = ", ".join(path.name for path in self.files)
        cast = f" as {self.dtype}" if self.dtype else ""
        return "\n".join(
            [
                self.source,
                *(f"  {line}" for line in collapse(self.lines)),
                f"{counted(self.read, 'tensor')} read, {self.left_out} of them left out, "
                f"{self.written} written{cast}, {self.parameters:,} parameters",
                f"wrote {names} to {self.files[0].parent}",
            ]
        )


def convert_checkpoint(
    source: str | Path | Checkpoint | Source,
    destination: str | Path,
    *,
    from_layout: str | None = None,
    to_layout: str = "hf",
    settings: Iterable[str] | Mapping[str, Any] = (),
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str | None = None,
    revision: str | None = None,
    container: str | None = None,
    label_map: str | Path | None = None,
    **image_options: str,
) -> Conversion:
    """Write `source` (directory, file, hub id or opened checkpoint) as a directory in `to_layout`.

    Values are bit-exact and dtypes kept unless `dtype` asks for a cast; the processor's files are
    copied. Files of scenic and of VideoMAE's authors, which have no config, get it from `settings`
    and their tensors, and the processor that their authors train with. An image model becomes a
    video model as `init_from_image_model` makes it with `image_options`, with a classifier if
    `settings` include `num_labels`. A classifier keeps only the classes that the file `label_map`
    lists, see `read_label_map`. Raises UserError or OSError, and then leaves no directory behind.
    """
    target = layout_named(to_layout)
    container = _container(target, container)
    if not target.writable:
        raise UserError(
            f"layout {to_layout!r} is read only, expected one of "
            f"{', '.join(layout_names(writable=True))}"
        )
    if target.file and max_shard_size is not None:
        raise UserError(
            f"max_shard_size {max_shard_size!r} is for the hf layout; a {to_layout} checkpoint is "
            "one file"
        )
    check_destination(destination, overwrite)
    if target.file:
        check_sole(Path(destination), target.file.name, target.file.rivals)
    settings = reusable(settings)
    opened = source if isinstance(source, Source) else find_checkpoint(source, revision)
    loaded = _loaded(opened, from_layout, settings, dtype, image_options)
    if label_map is not None:
        loaded = loaded.with_classes(Path(label_map))
    config, head = loaded.config, loaded.head
    # Refuses families that the layout does not hold.
    rules = published(config.model_type, head, loaded.pooler, target).rules(config)
    if head == "classification" and config.attentive_heads and not target.in_transformers:
        raise ConfigError(
            f"layout {target.name!r} has no attentive head (attentive_heads "
            f"{config.attentive_heads}), which only hf directories of this library hold: write "
            "--to hf"
        )
    if target.check_function is not None:
        target.check_function(config, head, loaded.pooler)
    written = export_params(loaded.params, rules, loaded.expected)
    with replaced_directory(destination, overwrite) as staged:
        if target.file:
            files = [target.file.write(staged, written, container)]
        else:
            files = write_weights(staged, written, max_shard_size)
        # The report warns.
        write_config(staged, config, head, stored_dtype(written), warn=False)
        files += _write_processor(staged, loaded)
        if target.in_transformers:
            files += _write_card(staged, Path(destination), loaded, stored_dtype(written), opened)
    notes = transformers_notes(config, head, loaded.pooler) if target.in_transformers else ()
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


def _container(layout: Layout, container: str | None) -> str:
    """Where a file of this layout holds the parameters, by default where its authors put them."""
    containers = tuple(layout.file.containers) if layout.file else ()
    if container is not None and container not in containers:
        listed = "; ".join(
            f"{each.name} checkpoints: {', '.join(each.file.containers)}"
            for each in LAYOUTS
            if each.file
        )
        raise UserError(
            f"container {container!r} is not for the {layout.name} layout. Containers of {listed}"
        )
    return container or next(iter(containers), "")


def _write_processor(staged: Path, loaded: "Loaded") -> list[Path]:
    """The processor's files: those beside the checkpoint, or what such models are trained with."""
    beside = loaded.folder
    found = [beside / name for name in PROCESSOR_FILES if (beside / name).is_file()]
    if found and not loaded.own_processor:
        return [Path(shutil.copyfile(file, staged / file.name)) for file in found]
    if loaded.processor is None:
        return []
    loaded.processor.save_pretrained(staged)
    return [staged / PROCESSOR_FILES[0]]


def _write_card(
    staged: Path, destination: Path, loaded: "Loaded", dtype: str, opened: Checkpoint | Source
) -> list[Path]:
    """The model's card, unless the destination has one that was edited."""
    checkpoint = opened if isinstance(opened, Checkpoint) else opened.checkpoint
    processor = None
    with contextlib.suppress(UserError):  # without one, or with one that is copied as it is
        processor = VideoProcessor.from_pretrained(staged)
    saved = SavedModel(
        config=loaded.config,
        head=loaded.head,
        parameters=sum(array.size for array in loaded.params.values()),
        dtype=dtype,
        processor=processor,
        pooler=loaded.pooler,
    )
    facts = CardFacts(
        base=base_of(checkpoint),
        how=(f"Converted by vivit-convert from {loaded.title.partition(' (')[0]}.",),
    )
    card = write_card(staged, destination, saved, facts)
    return [] if card is None else [card]


def _account(rows, tensors, target_rules) -> Iterable[str]:

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """What is written.

    Attributes:
        overwrite: Replace the model files of an existing DST.
        dtype: Cast the weights; they are kept as stored by default.
        max_shard_size: Split the weights into files of at most this size, for example 5GB.
        container: Where the file holds the parameters. scenic: optimizer (optimizer/target, the
            default) or params; videomae: model (the default), module or bare.
        label_map: Keep these classes of the classifier: a JSON list whose entry k is the class of
            SRC that becomes class k of DST, such as VideoMAE V2's label_710to400.json.
    """

    overwrite: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    max_shard_size: str | None = None
    container: "Literal[container_names()] | None" = None  # pyright: ignore[reportInvalidTypeForm]
    label_map: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """How an image model becomes a video model.

    Attributes:
        inflation: Image models: how the kernel spreads over time (default central_frame).
        positions: Image models: how the position table is adapted (default resize_tile).
        temporal_attention: Image models, for factorised_self_attention: how temporal attention
            starts (default copy).
    """

    inflation: Inflation | None = None
    positions: Positions | None = None
    temporal_attention: TemporalAttention | None = None


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    # In quotes, so that they are the layouts registered when a command line is parsed.
    from_layout: "Annotated[Literal[layout_names()] | None, tyro.conf.arg(name='from')]" = None,  # pyright: ignore[reportInvalidTypeForm]
    to_layout: "Annotated[Literal[layout_names(writable=True)], tyro.conf.arg(name='to')]" = "hf",  # pyright: ignore[reportInvalidTypeForm]
    config: ConfigOption = (),
    write: Annotated[WriteOptions, FLAT] = WriteOptions(),
    image: Annotated[ImageFlags, FLAT] = ImageFlags(),
    revision: str | None = None,
) -> None:
    """Rewrite a checkpoint; exit 0 means that every tensor is accounted for.

    A checkpoint in any layout, dialect, sharding or file format becomes a directory with the hub's
    names in safetensors, bit for bit, with config.json and preprocessor_config.json, or a
    checkpoint of scenic or of VideoMAE's authors.

    An image model (HuggingFace ViT, timm, vision_transformer) becomes the start of a video model:
    its kernel is inflated over time, its positions are repeated or resized, and the parameters that
    it lacks start fresh and are listed. --config then sets fields of the video model, for example
    attention_type=factorised_encoder; num_labels=400 adds a fresh classifier.

    Args:
        source: A checkpoint directory, a weight file with config.json beside it, or a hub id.
        destination: The directory to write.
        from_layout: The layout of SRC; detected by default.
        to_layout: The layout of DST.
        revision: Branch, tag or commit of a hub id.
    """
    given = {name: value for name, value in vars(image).items() if value is not None}
    options: dict[str, Any] = vars(write) | given
    report = convert_checkpoint(
        source,
        destination,
        from_layout=from_layout,
        to_layout=to_layout,
        settings=joined(config),
        revision=revision,
        **options,
    )
    print(report)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The parameters of a checkpoint by path, their model, and an account of the tensors read.

    `rows` say which of `tensors` became which parameters; there are none where values changed on
    the way. `processor` is what such models are trained with, None where the checkpoint must bring
    it; a file in the `folder` of the checkpoint is preferred unless `own_processor`.
    """

    title: str
    folder: Path
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
        """The same model with only the classes that a label map lists, in its order.

        Raises UserError as `read_label_map` and `gather_classes` do.
        """
        rows = read_label_map(label_map)
        config, params = gather_classes(self.config, self.params, rows)
        head = {path: array for path, array in params.items() if path.startswith("head/")}
        note = f"classifier: {len(rows)} of {self.config.num_labels} classes, as {label_map} lists"
        return dataclasses.replace(
            self,
            config=config,
            params=params,
            expected={**self.expected, **param_tree.shapes_of(head)},
            notes=(*self.notes, note),
        )


def _loaded(
    opened: Checkpoint | Source,
    from_layout: str | None,
    settings: Settings,
    dtype: str | None,
    image_options: Mapping[str, str],
) -> Loaded:
    """Read the parameters of an opened checkpoint; an image model becomes a video model."""
    if isinstance(opened, Checkpoint):
        layout = layout_named(from_layout) if from_layout else layout_of(opened, settings)
        if layout.image:
            return load_image_model(opened, settings, dtype, image_options)
    if image_options:
        raise UserError(
            f"{opened} is not an image model: {', '.join(image_options)} would have no effect; "
            "leave out the options for image models"
        )
    return load_checkpoint(open_source(opened, layout=from_layout, settings=settings), dtype)


def load_checkpoint(opened: Source, dtype: str | None) -> Loaded:
    """Read an opened checkpoint of any layout, values as they are or cast to `dtype`."""
    stored, layout = opened.stored, opened.layout
    expected = expected_shapes(opened.config, stored.head, stored.pooler)
    rows = match_import(opened.tensors, stored.rules(opened.config), expected, opened.title)
    processor, notes = None, opened.notes
    if layout.processor is not None:
        processor = layout.processor(opened.config)
        if processor is None:
            notes += (
                f"no processor is known for {opened.config.num_channels} channels; write a "
                "preprocessor_config.json for them",
            )
    return Loaded(
        title=opened.describe(),
        folder=opened.checkpoint.path.parent,
        config=opened.config,
        head=stored.head,
        pooler=stored.pooler,
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
    checkpoint: Checkpoint, settings: Settings, dtype: str | None, options: Mapping[str, str]
) -> Loaded:
    """Start a video model from an image model; `settings` are fields of the video model.

    It has a classifier if they set `num_labels`, class names or splits. `options` are those of
    `init_from_image_model`.
    """
    changes = parse_settings(VivitConfig, settings)
    head = "classification" if "num_labels" in changes else "none"
    changes["param_dtype"] = dtype or "float32"
    found, image = read_image_model(checkpoint, changes, ImageOptions(**options), head=head)
    model, params, report = found
    flat = param_tree.flatten(params)
    return Loaded(
        title=f"{image.dialect} names of an image ViT ({image.path})",
        folder=image.path.parent,
        config=model.config,
        head=head,
        pooler=False,
        params=flat,
        expected=param_tree.shapes_of(flat),
        read=len(image.tensors) + len(image.left_out),
        left_out=len(report.dropped),
        notes=tuple(str(report).splitlines()[1:]),
        processor=image_vit.processor(image, model.config),
        own_processor=True,
    )
