# SPDX-License-Identifier: Apache-2.0
"""A model as one ONNX file, for programs without JAX; `jax2onnx` makes it of the traced forward.

The file is compared before it is returned: a clip goes through onnxruntime and through the model.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta

from vivit_jax import param_tree
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import MissingExtra, UserError
from vivit_jax.inference.export import (
    LARGEST,
    Artefact,
    check_exported,
    described_array,
    described_params,
    described_program,
    named_outputs,
    traced_for,
)
from vivit_jax.outputs import RESULTS_ONLY

# The forms of a model that jax2onnx translates; none changes the function.
EXECUTION: Mapping[str, Any] = {"scan_layers": False, "attention": "xla", "remat": "none"}
ALLOWED = 1e-4  # largest difference over the RMS of the model's own output, where that exceeds 1


def check_onnx_extra() -> None:
    """Raises MissingExtra without jax2onnx and onnxruntime."""
    try:
        import jax2onnx  # noqa: F401  # pyright: ignore[reportMissingImports]
        import onnxruntime  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra(error.name or "jax2onnx", "onnx", "exporting to ONNX") from None


def export_onnx(
    model: nn.Module,
    params: Mapping[str, Any],
    processor: VideoProcessor | None = None,
    *,
    batch: int | None = None,
) -> Artefact:
    """Export a model's forward pass in float32, for any number of clips or for `batch`.

    The file maps pixel_values, float32 [b, t, h, w, c], to the outputs of `export_model`.
    Parameters are inside. `model` must be of the EXECUTION fields, as `from_pretrained` loads it.
    `processor` is only described. Raises UserError for a model that needs a mask, is not of these
    fields or this dtype, holds 2 GiB or more, or whose file computes something else, and for a
    factorised ViViT without `batch`; MissingExtra without jax2onnx.
    """
    check_onnx_extra()
    check_exported(model, batch)
    config: Any = model.config
    wanted = {**EXECUTION, "dtype": "float32", "param_dtype": "float32"}
    differs = [f"{n}={getattr(config, n)!r}" for n, v in wanted.items() if getattr(config, n) != v]
    if differs:
        raise UserError(
            f"the model has {', '.join(differs)}; an ONNX file is made of one that was loaded with "
            + ", ".join(f"{name}={value!r}" for name, value in wanted.items())
        )
    flat = param_tree.flatten(meta.unbox(params))
    size = sum(leaf.nbytes for leaf in flat.values())
    if size > LARGEST:
        raise UserError(
            f"params are {size / 2**30:.2f} GiB, and an ONNX file ends at 2 GiB; export to "
            "StableHLO with the parameters beside it"
        )
    shape = (config.num_frames, *config.frame_size, config.num_channels)
    whole = param_tree.unflatten(flat)

    def outputs(clips):
        return named_outputs(model.apply({"params": whole}, clips, **RESULTS_ONLY))

    given = jax.eval_shape(outputs, jax.ShapeDtypeStruct((batch or 1, *shape), np.float32))
    names = sorted(given)
    program = _translated(outputs, names, ("b" if batch is None else batch, *shape))
    clips = np.random.default_rng(0).standard_normal((batch or 2, *shape)).astype(np.float32)
    differences = _differences(program, names, clips, outputs(clips))
    about = {
        "format": "onnx",
        "platforms": ["onnxruntime"],
        "model": type(model).__name__,
        "inputs": {"pixel_values": {"dtype": "float32", "shape": [batch or "b", *shape]}},
        "outputs": {
            name: described_array(given[name]) | {"shape": [batch or "b", *given[name].shape[1:]]}
            for name in names
        },
        "labels": list(config.labels) if "logits" in given else None,
        "preprocessing": {
            "inside": [],
            "processor": None if processor is None else processor.to_dict(),
        },
        "config": config.to_dict(),
        "dtype": "float32",
        "differences": differences,
        "params": {"at": "inside", **described_params(flat)},
        **described_program(program),
    }
    return Artefact(program, about, None)


def _translated(outputs, names: list[str], shape: tuple[Any, ...]) -> bytearray:
    """The file's content; its outputs have the `names`."""
    import jax2onnx  # pyright: ignore[reportMissingImports]

    try:
        with traced_for("cpu"), _quiet():
            proto: Any = jax2onnx.to_onnx(
                lambda clips: tuple(outputs(clips)[name] for name in names),
                [shape],
                model_name="vivit_jax",
                input_names=["pixel_values"],
                output_names=names,
            )
    except TypeError as error:  # from a reshape that joins clips with frames or places
        if isinstance(shape[0], int):
            raise
        raise UserError(
            "jax2onnx translates this model for a fixed number of clips only: give one (--batch 1)"
        ) from error
    return bytearray(proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what jax2onnx and onnx_ir print and log of each of their passes."""
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels, silent = [logger.level for logger in loggers], io.StringIO()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _differences(
    program: bytearray, names: list[str], clips: np.ndarray, expected: Mapping[str, Any]
) -> dict[str, float]:
    """The largest difference of each output from the model's own, see ALLOWED."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(bytes(program), options, ["CPUExecutionProvider"])
    found = dict(zip(names, session.run(names, {"pixel_values": clips}), strict=True))
    differences = {}
    for name in names:
        ours, theirs = np.asarray(expected[name], np.float64), np.asarray(found[name], np.float64)
        scale = max(1.0, float(np.sqrt(np.mean(ours**2))))
        differences[name] = float(np.abs(ours - theirs).max() / scale)
    # This form refuses NaN.
    wrong = {name: value for name, value in differences.items() if not value <= ALLOWED}
    if wrong:
        raise UserError(
            f"the ONNX file computes something else than the model: {wrong}, allowed {ALLOWED:g}; "
            "nothing was written: export to StableHLO, and report the model"
        )
    return differences
