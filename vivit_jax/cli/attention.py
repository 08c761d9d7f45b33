# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax attention`: where a model looks in space and time, drawn on a clip."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from vivit_jax.cli.attention_picture import AttentionFooter, blocks, mark, overlay, scale_top
from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import READ, PictureOptions, ReadOptions
from vivit_jax.cli.panels import Panels, as_frames, channels_note, real_time
from vivit_jax.cli.reconstruct import SUFFIXES
from vivit_jax.console import FLAT, ConfigOption, joined
from vivit_jax.data.read_clip import parse_start, read_clip
from vivit_jax.data.video.decode import frame_times
from vivit_jax.errors import UserError, counted
from vivit_jax.files.atomic import check_output, whole_file
from vivit_jax.inference.attention_maps import choose, map_attention
from vivit_jax.train.normalise import arithmetic

# The name of each attention type, and how `vivit_jax.inference.attention_maps` makes one map of it.
_ATTENTION_TYPES = {
    "joint": ("joint attention", None),
    "factorised_encoder": (
        "factorised encoder",
        "Space: the spatial stage, inside each time step. Time: the temporal stage, between them. "
        "Shown is the map of a time step times the weight of the time step.",
    ),
    "factorised_self_attention": (
        "factorised self-attention",
        "Shown is the product of each block's attention over time and over space.",
    ),
    "factorised_dot_product": (
        "factorised dot-product attention",
        "Half of the heads look over time at the query's own place, half over space in its own "
        "time step; the mean of heads covers both.",
    ),
}
_ALL_ALIKE = "Space: the spatial stage, inside each time step; all time steps weigh the same."


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapOptions:
    """Which attention is shown.

    Attributes:
        kind: map is the attention of one layer. rollout follows attention through all layers down
            to the pixels, half of each layer being its residual connection (Abnar and Zuidema
            2020).
        query: Whose attention: cls, the class token (of each stage in a factorised encoder); mean,
            the mean of all tubelets, that is what each token receives; or a tubelet as T,Y,X, from
            0 on the grid of tokens. Default: cls for models with a class token, else mean.
        layer: The layer of a map, or the last layer of a rollout, from 0; -1 is the last, the
            default. In a factorised encoder, a layer of its spatial stage.
        temporal_layer: The same for the temporal stage of a factorised encoder.
        head: mean, or the number of a head from 0; the first half of the heads of a factorised
            dot-product model looks over time. A rollout takes the mean.
    """

    kind: Literal["map", "rollout"] = "map"
    query: str | None = None
    layer: int | None = None
    temporal_layer: int | None = None
    head: str = "mean"


def attention(
    clip: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    model: str,
    config: ConfigOption = (),
    picture: Annotated[PictureOptions, FLAT],
    attend: Annotated[MapOptions, FLAT] = MapOptions(),
    read: Annotated[ReadOptions, FLAT] = READ,
    save: Path | None = None,
) -> int:
    """Draw what a model attends to in a clip, in space and time.

    Space is drawn on the clip's frames, time as a plot. Numbers are multiples of uniform attention:
    1 is the share of a token if all tokens get the same. Attention to a class token, which has no
    place in the clip, is left out, and its share is printed. In Python this is
    `vivit_jax.map_attention`.

    Args:
        clip: Video file, or .npy or .npz with frames [t, h, w, c] of any channel count, uint8 or
            float in [0, 1].
        model: Directory with config.json, weights and preprocessor_config.json, a weight file with
            both beside it, a hub id, or a file of VideoMAE's authors or scenic. Of a pre-trained
            VideoMAE, the encoder is shown, with the whole clip as input.
        save: .npz file for the numbers: maps [t, h, w], which sum to 1; time_weights [t];
            class_token_share; and for each tubelet frames [t, n], frame numbers in the file, and
            seconds [t, n], their times from the video's first frame.
    """
    out = picture.out
    check_output(out, SUFFIXES, picture.overwrite)
    if save is not None:
        check_output(save, (".npz",), picture.overwrite, "--save")
    parsed = {"query": parse_query(attend.query), "head": parse_head(attend.head)}
    wanted: dict[str, Any] = vars(attend) | parsed

    start = parse_start(read.start)
    # Cheap checks come before the weights are read.
    changes = joined(config)
    source = open_model(model, changes)
    choose(source.config, **wanted)
    processor = processor_of(source)
    shown = read_clip(clip, source.config, stride=read.stride, start=start, pad=read.pad)
    pixel_values = shown.pixel_values(processor)
    module, params = from_pretrained(source)
    found = map_attention(module, params, pixel_values, **wanted)

    indices = shown.indices[found.frames]
    seconds = None if shown.fps is None else frame_times(clip, indices.tolist())
    scale, shift = arithmetic(processor)
    seen = (pixel_values[0, found.frames].astype(np.float64) - shift) / scale / 255
    panels = picture_of(
        found,
        module.config,
        seen,
        [int(i) for i in indices],
        seconds,
        title=f"{clip.name}: {_subject(found.choice, module.config)}",
        about=" ".join((model, *changes)),
    )
    with whole_file(out) as partial:
        panels.save(partial, real_time(seconds, len(indices)))
    if save is not None:
        # Given a path instead of a file, numpy would append .npz to a name in .NPZ.
        with whole_file(save) as partial, partial.open("wb") as file:
            np.savez(file, **_numbers(found, indices, seconds))
    summary = _summary(found, indices, clip, out, save)
    if picture.json:
        print(json_module.dumps(summary, indent=2))
        return 0
    print(f"{clip} ({counted(len(indices), 'frame')} from {indices[0]} to {indices[-1]})")
    print(f"  {_subject(found.choice, module.config)}")
    weights = " ".join(f"{w:.2f}" for w in summary["time_weights"])
    print(f"  over time, multiples of uniform: {weights}")
    most = summary["largest"]
    frames = " and ".join(map(str, most["frames"]))
    print(f"  most: {most['relative']:.3g} times uniform, token {most['token']}, frames {frames}")
    if summary["class_token_share"]:
        print(f"  {_left_out(found)}")
    for path in filter(None, (out, save)):
        print(f"written to {path}")
    return 0


def parse_query(text: str | None):
    """Parse --query for `map_attention`. Raises UserError."""
    if text is None or text in ("cls", "mean"):
        return text
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(
            f"--query must be cls, mean, or a tubelet as three numbers T,Y,X, got {text!r}"
        )
    return tuple(map(int, parts))


def parse_head(text: str) -> int | None:
    """Parse --head for `map_attention`. Raises UserError."""
    if text == "mean":
        return None
    if not text.isdecimal():
        raise UserError(f"--head must be mean or the number of a head from 0, got {text!r}")
    return int(text)


def picture_of(found, config, seen, indices: list[int], seconds, *, title: str, about: str):
    """The picture of the first clip of `vivit_jax.inference.attention_maps.AttentionMaps`.

    `seen` [t, h, w, c] are the frames that the model embeds, in [0, 1]; `indices` and `seconds` are
    their places in the file.
    """
    relative, (length, *patch) = found.relative[0], found.tubelet
    # If the patch does not divide the frames, the model sees whole patches only.
    height, width = (n * p for n, p in zip(relative.shape[1:], patch, strict=True))
    seen = seen[:, :height, :width]
    top = scale_top(relative)
    strength = np.repeat(relative / top, length, axis=0)
    frames = as_frames(seen)
    clips = [frames, overlay(frames, strength), blocks(strength, *frames.shape[1:3])]
    query = found.choice.query
    if not isinstance(query, str):
        t, y, x = query
        box = (y * patch[0], x * patch[1], (y + 1) * patch[0], (x + 1) * patch[1])
        where = range(t * length, (t + 1) * length)
        clips = [mark(shown, box, where) for shown in clips]
    ticks = [f"{i}" for i in indices]
    times = [f"frame {i}" for i in indices]
    if seconds is not None:
        shown = ["no time" if np.isnan(s) else f"{s:.2f} s" for s in seconds]
        ticks = [f"{tick}\n{s}" for tick, s in zip(ticks, shown, strict=True)]
        times = [f"{time}\n{s}" for time, s in zip(times, shown, strict=True)]
    return Panels(
        title=title,
        notes=_notes(found, config, about, seen.shape[-1]),
        warning=None,
        labels=["the model's input", "attention on it", "attention"],
        clips=clips,
        times=times,
        footer=AttentionFooter(
            top=top,
            cut=bool((relative > top).any()),
            weights=found.time_weights[0] * len(relative),
            tubelet=length,
            ticks=ticks,
            axis="frame of the file" + (", and its time" if seconds is not None else ""),
        ),
    )


def _subject(choice, config) -> str:
    """One line on kind, layers, heads and query."""
    layers, temporal = config.num_hidden_layers, config.temporal_layers
    # A single tubelet of a factorised encoder takes no part in the temporal stage.
    temporal = temporal if isinstance(choice.query, str) else 0
    if choice.kind == "map":
        where = f"attention in layer {choice.layer} of 0 to {layers - 1}"
        if temporal:
            where += f", over time in layer {choice.temporal_layer} of 0 to {temporal - 1}"
    else:
        where = f"attention rollout from layer {choice.layer} down to 0"
        if temporal:
            where += f", over time from {choice.temporal_layer} to 0"
    heads = f"head {choice.head} of 0 to {config.num_attention_heads - 1}"
    if choice.head is None:
        heads = f"mean of {counted(config.num_attention_heads, 'head')}"
    query = {"cls": "class token", "mean": "mean of all tubelets"}.get(choice.query)
    if query is None:
        query = "tubelet {},{},{} (t,y,x)".format(*choice.query)
    return f"{where}, {heads}; query: {query}"


def _notes(found, config, about: str, channels: int) -> list[str]:
    (t, h, w), length = found.maps.shape[1:], found.tubelet[0]
    arranged = config.attention_type
    name, combined = _ATTENTION_TYPES[arranged]
    query = found.choice.query
    if arranged == "factorised_encoder" and not isinstance(query, str):
        combined = "The query is a token of the spatial stage, which sees its own time step only."
    elif config.spatial_only:
        combined = _ALL_ALIKE
    shared = f"A token covers {length} frames, which share a map. " if length > 1 else ""
    notes = [
        f"{about}: {config.title}, {name} over {t}x{h}x{w} tokens (time, height, width).",
        combined,
        f"{shared}Attention is drawn as a block for each token, and interpolated (bilinear) on the "
        "input; colours mean the same in all frames.",
        None if isinstance(query, str) else "The query's tubelet is outlined.",
        f"{_left_out(found)}." if config.pooling == "cls" else None,
        channels_note(channels),
    ]
    return [note for note in notes if note]


def _left_out(found) -> str:
    share = f"{100 * found.class_share[0]:.2g} %"
    return f"Attention to the class token, {share} of the total, is left out"


def _numbers(found, indices, seconds) -> dict[str, Any]:
    """The arrays of --save."""
    of_tubelets = (len(found.maps[0]), found.tubelet[0])
    times = np.full(len(indices), np.nan) if seconds is None else seconds
    return {
        "maps": found.maps[0],
        "time_weights": found.time_weights[0],
        "class_token_share": found.class_share[0],
        "frames": indices.reshape(of_tubelets),
        "seconds": times.reshape(of_tubelets),
    }


def _summary(found, indices, clip: Path, out: Path, save: Path | None) -> dict[str, Any]:
    relative, choice = found.relative[0], found.choice
    most = np.unravel_index(relative.argmax(), relative.shape)
    length = found.tubelet[0]
    return {
        "clip": str(clip),
        "out": str(out),
        "save": None if save is None else str(save),
        "kind": choice.kind,
        "query": choice.query if isinstance(choice.query, str) else list(choice.query),
        "layer": choice.layer,
        "temporal_layer": choice.temporal_layer,
        "head": "mean" if choice.head is None else choice.head,
        "grid": list(relative.shape),
        "frames": indices.tolist(),
        "time_weights": (found.time_weights[0] * len(relative)).tolist(),
        "class_token_share": float(found.class_share[0]),
        "largest": {
            "token": [int(i) for i in most],
            "frames": indices[most[0] * length :][:length].tolist(),
            "relative": float(relative[most]),
        },
    }
