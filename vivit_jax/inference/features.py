# SPDX-License-Identifier: Apache-2.0
"""Features of untrimmed video: a sliding window of frames gives a row at each place.

Every frame is decoded, resized and cropped once, however many windows share it. A reader thread
does that while the model computes, and holds two batches of windows; only the index of packets
grows with the length of the video.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta
from jaxtyping import UInt8

from vivit_jax import param_tree
from vivit_jax.config import ARCHITECTURES
from vivit_jax.config_base import positive_int
from vivit_jax.data.datasets.folders import ARRAYS, ending
from vivit_jax.data.one_clip import each_of_clip, one_clip
from vivit_jax.data.sliding_window import Stream, Window, Windows, plan_windows, slide
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.video.frame_stream import open_stream, read_ahead
from vivit_jax.errors import UserError, VideoError, counted
from vivit_jax.layers.linear import at_least_float32
from vivit_jax.models.build import headless
from vivit_jax.outputs import RESULTS_ONLY
from vivit_jax.train.normalise import hashable_arithmetic, scaled_and_shifted

POOLS = ("mean", "cls", "tokens", "head")
_AHEAD = 2  # batches


@dataclasses.dataclass(frozen=True)
class FeatureRow:
    """The features of one window, and the frames of the video in it."""

    features: np.ndarray  # [d], or the tokens' [l, d]; in the dtype of the computation
    frame_indices: np.ndarray  # int64 [t]
    frame_seconds: np.ndarray  # float64 [t], from the video's first frame


def extract_features(
    model: nn.Module,
    params: Any,
    processor: VideoProcessor,
    video: str | os.PathLike,
    *,
    layer: str | int = "last",
    pool: str = "mean",
    frame_stride: int | None = None,
    window_stride: str | int | None = None,
    pad: str = "drop",
    batch_size: int = 8,
    exact: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[FeatureRow]:
    """Yield a `FeatureRow` for each window of a video file, in order, without holding the video.

    `model` and `params` are those of `from_pretrained`, with any head. A window is as many frames
    as the model takes, `frame_stride` apart (default: `config.frame_stride`). Windows begin every
    `window_stride` frames, or every "0.5s": at the first frame shown then or later (default: each
    begins where the last one ends). `pad` is that of `Windows`.

    `layer` is "last" (last_hidden_state, after the final norm where there is one), a number from 0
    (the embedding) to the number of blocks, or "temporal:N" for the second stage of a factorised
    encoder, whose numbered layers are those of the first. Blocks after it are not computed.

    `pool` makes a row from the tokens: "mean" of all except class tokens, in float32; "cls", the
    class token; "tokens", all of them, [l, d]; "head", the input of the classifier, or the
    pooler_output of a VideoMAE encoder that has one, such as VideoMAE V2 on the hub. A spatial
    layer of a factorised encoder has tokens [t, s, d] and a class token for each frame, [t, d].

    Rows are independent. With `exact` (default: on CPU, where it costs nothing) windows go through
    the model one by one and their bits do not depend on `batch_size`; without it a batch goes
    through at once, and rows agree up to rounding. Pixels are normalised on the device, equal to
    the processor's up to rounding in float32.

    `progress` is called with the number of frames up to the last row, finally with all frames of
    the video, and with the number that the file announces.

    Raises VideoError for a video that cannot be read, is damaged within a window, or is shorter
    than a window without padding; UserError for a wrong argument.

    >>> import vivit_jax
    >>> model, params = vivit_jax.from_pretrained("vivit-demo/pretrained")
    >>> processor = vivit_jax.VideoProcessor.from_pretrained("vivit-demo/pretrained")
    >>> video = "vivit-demo/data/test/grow/0000.mp4"
    >>> rows = extract_features(model, params, processor, video)
    >>> [row.features.shape == (model.config.hidden_size,) for row in rows]
    [True]
    """
    config = model.config
    windows = plan_windows(config, frame_stride, window_stride, pad)
    if not positive_int(batch_size):
        raise UserError(
            f"batch_size must be an int of at least 1 (--batch-size), got {batch_size!r}"
        )
    exact = jax.default_backend() == "cpu" if exact is None else exact
    check_features(config, processor, layer, pool, has_head=_has_head(model))
    function = feature_function(model, params, processor, layer=layer, pool=pool)
    if ending(os.fspath(video)) in ARRAYS:
        raise VideoError(
            f"{os.fspath(video)}: an array, which has no times to place windows by; expected a "
            "video file"
        )
    with one_clip(video):
        stream = open_stream(video)
    return _rows(stream, windows, processor, function, batch_size, exact, progress)


def feature_function(
    model: nn.Module,
    params: Any,
    processor: VideoProcessor,
    *,
    layer: str | int = "last",
    pool: str = "mean",
) -> Callable[[UInt8[np.ndarray, "b t h w c"]], jax.Array]:
    """The function from frames, resized and cropped, to features [b, ...], as `extract_features`.

    It normalises pixels as the processor does and is compiled once for equal models.
    """
    model, params = _model_for(model, meta.unbox(params), layer, pool)
    program = _program(model, layer, pool, hashable_arithmetic(processor))
    return functools.partial(program, params)


def window_logits(
    model: nn.Module,
    params: Any,
    processor: VideoProcessor,
    stream: Stream,
    windows: Windows,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[FeatureRow]:
    """The logits [classes] of each window, in float32; otherwise as `extract_features`."""
    program = functools.partial(_logits(model, hashable_arithmetic(processor)), meta.unbox(params))
    return _rows(stream, windows, processor, program, batch_size, False, progress)


@functools.lru_cache(maxsize=8)
def _logits(model: nn.Module, values) -> Callable:
    """(params, uint8 [b, t, h, w, c]) -> [b, classes] in float32."""
    normalise = scaled_and_shifted(*values)

    @jax.jit
    def logits(params, clips):
        out: Any = model.apply({"params": params}, normalise(clips), **RESULTS_ONLY)
        return out.logits.astype(jnp.float32)

    return logits


def has_head(head: str, family: str, pooler: bool) -> bool:
    """Whether a model with this head has the pooling "head"."""
    return head == "classification" or (family == "videomae" and pooler)


def _has_head(model: nn.Module) -> bool:
    family, head = ARCHITECTURES[type(model).__name__]
    return has_head(head, family, getattr(model, "add_pooling_layer", False))


def check_features(
    config, processor: VideoProcessor, layer: str | int, pool: str, *, has_head: bool
) -> None:
    """Raises UserError if a model of this configuration has no such layer or pooling.

    Also if it does not take the frames that the processor makes. For `has_head` see there.
    """
    size = tuple(processor.crop_size[side] for side in ("height", "width"))
    if processor.do_center_crop and size != config.frame_size:
        raise UserError(
            f"the processor crops frames to {size} (height, width), the model takes "
            f"{config.frame_size}: set crop_size in preprocessor_config.json"
        )
    if config.num_channels != 3:
        raise UserError(
            f"the model takes {counted(config.num_channels, 'channel')}; features are made from "
            "video files, which have 3"
        )
    field, index = _place(config, layer)
    if pool not in POOLS:
        raise UserError(f"pool must be one of {', '.join(POOLS)} (--pool), got {pool!r}")
    if pool == "head" and (not has_head or field != "last_hidden_state"):
        raise UserError(
            "--pool head is the input of a classifier after the last layer; "
            + (f"got --layer {layer}" if has_head else "the model has none")
            + ": use --pool mean"
        )
    if pool == "cls" and not _class_tokens(config, field):
        raise UserError(
            "--pool cls: the model has no class token"
            + (" there (its frames are averaged)" if config.spatial_only else "")
            + "; use --pool mean"
        )


def _place(config, layer: str | int) -> tuple[str, int]:
    """The output field of a layer and the index in it. UserError if there is none."""
    staged, text = config.temporal_layers, str(layer)
    if text == "last":
        return "last_hidden_state", 0
    stage, _, number = text.rpartition(":")
    field, most = "hidden_states", config.num_hidden_layers
    if stage == "temporal" and staged:
        field, most, stage = "temporal_hidden_states", staged, ""
    if stage or not (number.isascii() and number.isdecimal()) or int(number) > most:
        choices = f"last, 0 (the embedding) to {config.num_hidden_layers}"
        choices += f", or temporal:0 to temporal:{staged}" if staged else ""
        raise UserError(f"layer must be {choices} (--layer), got {layer!r}")
    return field, int(number)


def _class_tokens(config, field: str) -> bool:
    """Whether the first token of this output field is a class token."""
    if config.pooling != "cls":
        return False
    return not (field == "last_hidden_state" and config.spatial_only)


def _model_for(model: nn.Module, params: Any, layer, pool: str) -> tuple[nn.Module, Any]:
    """The part of a model that computes a layer, in a layout that computes no more than that."""
    if pool == "head":
        return model, params
    model, params = headless(model, params)
    config = model.config
    if config.scan_layers and layer != "last":
        # A scan computes all blocks; without it the compiler drops those after the layer.
        config = dataclasses.replace(config, scan_layers=False)
        flat = param_tree.flatten(params)
        places = param_tree.slots(param_tree.shapes_of(flat)).items()
        params = param_tree.unflatten(
            {
                path: flat[at.leaf] if at.layer is None else flat[at.leaf][at.layer]
                for path, at in places
            }
        )
    return model.clone(config=config), params


# Equal models share the compiled function, from one video to the next.
@functools.lru_cache(maxsize=8)
def _program(model: nn.Module, layer, pool: str, values) -> Callable:
    """(params, uint8 [b, t, h, w, c]) -> [b, ...] in the dtype of the computation."""
    normalise = scaled_and_shifted(*values)
    field, index = _place(model.config, layer)
    dtype, with_cls = jnp.dtype(model.config.dtype), _class_tokens(model.config, field)

    @jax.jit
    def features(params, clips):
        pixels = normalise(clips)
        if pool == "head":
            return _read_by_head(model, params, pixels).astype(dtype)
        deep = field != "last_hidden_state"
        flags: dict[str, Any] = RESULTS_ONLY | {"output_hidden_states": deep}
        out: Any = model.apply({"params": params}, pixels, **flags)
        x = getattr(out, field)
        x = x[index] if deep else x  # [b, l, d], or [b, t, s, d]
        if pool == "cls":
            x = x[..., 0, :]
        elif pool == "mean":
            x = x[..., int(with_cls) :, :]
            x = at_least_float32(x)
            x = x.mean(tuple(range(1, x.ndim - 1)))
        return x.astype(dtype)

    return features


def _read_by_head(model: nn.Module, params, pixels) -> jax.Array:
    """The input [b, d] of the classifier's layer `head`, or what a headless model would give it."""
    if ARCHITECTURES[type(model).__name__][1] == "none":
        out: Any = model.apply({"params": params}, pixels)
        return out.pooler_output
    read = []

    def watch(call, args, kwargs, context):
        if context.module.path == ("head",) and context.method_name == "__call__":
            read.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply({"params": params}, pixels, **RESULTS_ONLY)
    (x,) = read
    return x


def _rows(
    stream: Stream,
    windows: Windows,
    processor: VideoProcessor,
    program: Callable,
    batch_size: int,
    exact: bool,
    progress: Callable[[int, int], None] | None,
) -> Generator[FeatureRow, None, None]:
    def prepare(image: np.ndarray) -> np.ndarray:
        frame = processor(
            image,
            input_data_format="channels_last",
            do_rescale=False,
            offset=False,
            do_normalize=False,
        )
        return frame[0, 0].astype(np.uint8)  # whole numbers, which the processor returns as floats

    done = 0

    def passed(frames: int) -> None:
        nonlocal done
        done = frames

    slid = each_of_clip(stream.name, slide(stream, windows, prepare, passed))
    batches = read_ahead(_batches(slid, batch_size), ahead=_AHEAD)
    waiting: list = []  # the batch that the device computes while the next one is prepared
    try:
        for batch in batches:
            waiting.append((batch, _compute(program, batch, batch_size, exact)))
            if len(waiting) > 1:
                computed = waiting.pop(0)
                yield from _fetch(*computed)
                if progress is not None:
                    progress(int(computed[0][-1].indices[-1]) + 1, stream.announced)
        for computed in waiting:
            yield from _fetch(*computed)
        if progress is not None:
            progress(done, stream.announced)
    finally:
        batches.close()


def _batches(windows: Generator[Window, None, None], size: int) -> Generator[list[Window]]:
    batch: list[Window] = []
    try:
        for window in windows:
            batch.append(window)
            if len(batch) == size:
                yield batch
                batch = []
        if batch:
            yield batch
    finally:
        windows.close()


def _compute(program: Callable, batch: list[Window], size: int, exact: bool) -> list[jax.Array]:
    """The outputs of a batch, still being computed: one array [rows, ...], or one for each row."""
    if exact:
        return [program(window.clip[None]) for window in batch]
    # The last batch is padded, since another shape would be compiled again.
    clips = [window.clip for window in batch]
    clips += [np.zeros_like(clips[0])] * (size - len(batch))
    return [program(np.stack(clips))]


def _fetch(batch: list[Window], outputs: list[jax.Array]) -> Iterator[FeatureRow]:
    rows = (row for output in outputs for row in np.asarray(output))
    for window, row in zip(batch, rows, strict=False):
        yield FeatureRow(row, window.indices, window.seconds)
