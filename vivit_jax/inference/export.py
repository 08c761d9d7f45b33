# SPDX-License-Identifier: Apache-2.0
"""A model as one file that `jax.export` runs, without this library and without flax.

The file is what `jax.export.Exported.serialize` writes: StableHLO for several platforms at once. It
works with versions of jax up to six months older or newer than the one that wrote it, within jax's
stable calling conventions (docs.jax.dev/en/latest/export, "Compatibility guarantees"); after that,
export again from the checkpoint.

A choice made for this machine would be wrong on another, so the program is traced as for CPU
wherever it is exported: attention is exact, in tiles whose size depends on the platform that
compiles the program, or for a single query in one row; cuDNN is not used. It is the same function
on every platform.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jaxlib.version
import numpy as np
from flax import linen as nn
from flax.core import meta

from vivit_jax import param_tree
from vivit_jax.config_base import positive_int
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.transforms.processor_in_jax import pixels_inside
from vivit_jax.errors import MissingExtra, UserError
from vivit_jax.models.registry import head_of
from vivit_jax.outputs import RESULTS_ONLY
from vivit_jax.version import __version__

PLATFORMS = ("cpu", "cuda", "tpu")
PRECISIONS = ("default", "high", "highest")
PARAMS = ("inside", "beside")
# A flatbuffer holds at most 2 GiB; the rest is left for the program.
LARGEST = 2**31 - 2**26


@dataclasses.dataclass(frozen=True)
class Artefact:
    """An exported model: `program` is the file's content, `about` describes it.

    `params` are the parameters by path if they are kept beside the program, which then takes that
    dict as its first argument; else None.
    """

    program: bytearray
    about: dict[str, Any]
    params: dict[str, np.ndarray] | None


def check_extra(purpose: str = "exporting a model") -> None:
    """Raises MissingExtra without flatbuffers, which `jax.export` needs for files."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise MissingExtra("flatbuffers", "export", purpose) from None


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises UserError for no platform and for one that jax does not know."""
    unknown = sorted(set(platforms) - {*PLATFORMS, "rocm"})
    if unknown or not platforms:
        raise UserError(f"platforms are {list(platforms)}, expected some of {list(PLATFORMS)}")


def export_model(
    model: nn.Module,
    params: Mapping[str, Any],
    processor: VideoProcessor | None = None,
    *,
    preprocess: bool = False,
    input_size: tuple[int, int] | None = None,
    batch: int | None = None,
    params_at: str = "inside",
    platforms: Sequence[str] = PLATFORMS,
    precision: str = "default",
) -> Artefact:
    """Export a model's forward pass for any number of clips (or for `batch`) on all `platforms`.

    The program maps pixel_values, float32 [b, t, h, w, c], to a dict of arrays: a classifier's
    "logits" [b, classes], or a headless model's "last_hidden_state" [b, l, d] and, for a ViViT with
    a pooling layer, "pooler_output". With `preprocess` it takes uint8 frames of the model's size
    and normalises them as `processor` does; with `input_size` (height, width) it takes frames of
    that size and also resizes and crops them. Both match the processor bit for bit.

    `params_at` "beside" leaves the parameters out: the program then takes their dict first.
    `precision` of matrix products (jax_default_matmul_precision) is part of the program; "default"
    is TF32 on recent NVIDIA GPUs and bfloat16 on TPU, even in float32.

    Raises UserError for a model that needs a mask, for parameters of 2 GiB or more inside, and for
    arguments that do not fit together; MissingExtra without flatbuffers.

    >>> import vivit_jax
    >>> model, params = vivit_jax.from_pretrained("vivit-demo/model")
    >>> artefact = export_model(model, params, platforms=["cpu"])
    >>> run = jax.export.deserialize(artefact.program)  # needs jax and flatbuffers
    >>> clips = np.zeros((3, model.config.num_frames, *model.config.frame_size, 3), "float32")
    >>> run.call(clips)["logits"].shape[0]
    3
    """
    check_extra()
    _check(model, processor, preprocess, input_size, batch, params_at, platforms, precision)
    config = model.config
    portable = dataclasses.replace(config, attention="auto", remat="none")
    model = model.clone(config=portable)
    flat = param_tree.flatten(meta.unbox(params))
    size = sum(leaf.nbytes for leaf in flat.values())
    if params_at == "inside" and size > LARGEST:
        raise UserError(
            f"params are {size / 2**30:.2f} GiB, and an exported file ends at 2 GiB; put them "
            "beside it (--params beside), or load the model with param_dtype='bfloat16'"
        )
    into_pixels = None
    if preprocess and processor is not None:
        into_pixels = pixels_inside(processor, config.frame_size, config.num_channels, input_size)

    def outputs(params, clips):
        pixels = clips if into_pixels is None else into_pixels(clips)
        out = model.apply({"params": param_tree.unflatten(params)}, pixels, **RESULTS_ONLY)
        return named_outputs(out)

    clips = _clips(config, preprocess, input_size, batch)
    with traced_for("cpu"), jax.default_matmul_precision(precision):
        if params_at == "inside":
            function, inputs = lambda clips: outputs(flat, clips), (clips,)
        else:
            shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flat.items()}
            function, inputs = outputs, (shapes, clips)
        exported = jax.export.export(jax.jit(function), platforms=tuple(platforms))(*inputs)
        program = exported.serialize()
    given = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    about = {
        "format": "jax.export",
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "model": type(model).__name__,
        "inputs": {"frames" if preprocess else "pixel_values": described_array(clips)},
        "outputs": {name: described_array(value) for name, value in given.items()},
        "labels": list(config.labels) if "logits" in given else None,
        "preprocessing": _preprocessing(processor, preprocess, input_size),
        "config": config.to_dict(),
        "dtype": config.dtype,
        "matmul_precision": precision,
        "params": {"at": params_at, **described_params(flat)},
        **described_program(program),
    }
    beside = {path: np.asarray(leaf) for path, leaf in flat.items()}
    return Artefact(program, about, beside if params_at == "beside" else None)


_OUTPUTS = ("logits", "last_hidden_state", "pooler_output")


def named_outputs(out: Any) -> dict[str, Any]:
    """The arrays of a model's output that an exported program returns, by name."""
    named = {name: getattr(out, name, None) for name in _OUTPUTS}
    return {name: value for name, value in named.items() if value is not None}


def described_program(program: bytes | bytearray) -> dict[str, Any]:
    """What made a program, its size and its hash, as JSON values."""
    return {
        "versions": {
            "vivit_jax": __version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
        },
        "bytes": len(program),
        "sha256": hashlib.sha256(program).hexdigest(),
    }


def check_exported(model: nn.Module, batch: int | None) -> None:
    """Raises UserError for a model that needs a mask, and for a wrong number of clips."""
    if head_of(model) == "pretraining":
        raise UserError(
            f"a {type(model).__name__} needs a mask for each clip and cannot be exported; export "
            "its encoder: from_pretrained(..., head='none'), --head none"
        )
    if batch is not None and not positive_int(batch):
        raise UserError(f"batch is {batch!r}, expected None for any number of clips, or 1 or more")


def _check(model, processor, preprocess, input_size, batch, params_at, platforms, precision):
    check_exported(model, batch)
    if preprocess and processor is None:
        raise UserError("preprocess=True needs a processor, got None")
    if input_size is not None and not preprocess:
        raise UserError(f"input_size={input_size} needs preprocess=True (--preprocess)")
    if input_size is not None and (len(input_size) != 2 or not all(map(positive_int, input_size))):
        raise UserError(f"input_size is {input_size!r}, expected (height, width) in pixels")
    for name, value, allowed in (
        ("params_at", params_at, PARAMS),
        ("precision", precision, PRECISIONS),
    ):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")
    check_platforms(platforms)


@contextlib.contextmanager
def traced_for(place: str) -> Iterator[None]:
    """Trace as on "cpu", "gpu" or "tpu", whatever the machine has.

    Leaves out the Python tracebacks of operations, which name this machine's files.
    """
    frames = jax.config.jax_traceback_in_locations_limit  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        with jax.default_device(place):
            yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)


def _clips(config, preprocess: bool, input_size, batch: int | None) -> jax.ShapeDtypeStruct:
    size, count = input_size or config.frame_size, batch
    if count is None:
        (count,) = jax.export.symbolic_shape("b", constraints=["b >= 1"])
    shape = (count, config.num_frames, *size, config.num_channels)
    return jax.ShapeDtypeStruct(shape, np.uint8 if preprocess else np.float32)


def described_array(array) -> dict[str, Any]:
    """The dtype and shape of an array, as JSON values."""
    shape = [side if isinstance(side, int) else str(side) for side in array.shape]
    return {"dtype": np.dtype(array.dtype).name, "shape": shape}


def _preprocessing(processor, preprocess: bool, input_size) -> dict[str, Any]:
    inside = ["rescale and normalise"] if preprocess else []
    if input_size is not None:
        inside = ["resize", "crop", *inside]
    return {"inside": inside, "processor": None if processor is None else processor.to_dict()}


def described_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The number, bytes, dtypes and hash of parameters by path."""
    return {
        "count": sum(leaf.size for leaf in flat.values()),
        "bytes": sum(leaf.nbytes for leaf in flat.values()),
        "dtype": sorted({leaf.dtype.name for leaf in flat.values()}),
        "sha256": param_tree.params_hash(param_tree.unflatten(flat)),
    }
