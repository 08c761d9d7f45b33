# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax export`: a model as one file that runs without this library."""

import dataclasses
import json as json_module
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from checkpoints_convert.files.save import write_safetensors
from checkpoints_convert.files.tensors import LazyTensor
from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import Dtype
from vivit_jax.console import FLAT, ConfigOption, joined
from vivit_jax.errors import ConfigError, UserError
from vivit_jax.files.atomic import check_output, whole_files
from vivit_jax.inference.export import check_extra, export_model
from vivit_jax.inference.export_onnx import EXECUTION, check_onnx_extra, export_onnx

SUFFIXES = {"stablehlo": ".stablehlo", "onnx": ".onnx"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramOptions:
    """What the program takes, holds and computes in.

    Attributes:
        preprocess: Take uint8 frames and normalise them in the program; needs
            preprocessor_config.json. Frames must be resized and cropped, unless --input-size is
            given.
        input_size: With --preprocess, the size of the frames, HxW like 256x340: the program resizes
            and crops them, bit for bit as Pillow does.
        batch: Clips in a call. Default: any number.
        params: beside writes the parameters to a .safetensors, the program's first argument; for
            models of 2 GiB and more.
        dtype: What the model computes in.
        param_dtype: What parameters are stored in.
        precision: Precision of matrix products, fixed in the file. default is TF32 on recent NVIDIA
            GPUs and bfloat16 on TPU, as in the library itself; highest is float32 everywhere.
    """

    preprocess: bool = False
    input_size: str | None = None
    batch: int | None = None
    params: Literal["inside", "beside"] = "inside"
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"
    precision: Literal["default", "high", "highest"] = "default"


def export(
    model: Annotated[str, tyro.conf.Positional],
    /,
    *,
    out: Path,
    config: ConfigOption = (),
    head: Literal["classification", "none"] | None = None,
    format: Literal["stablehlo", "onnx"] = "stablehlo",
    program: Annotated[ProgramOptions, FLAT] = ProgramOptions(),
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Write a model as one StableHLO or ONNX file, parameters included.

    The program, for CPU, CUDA and TPU, takes pixel_values, float32 [b, t, h, w, c], of any number
    of clips, and returns a dict: logits of a classifier, or last_hidden_state (and pooler_output)
    of a model without one. Running StableHLO needs jax and flatbuffers (and safetensors with
    --params beside), not vivit_jax:

    jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read())).call(pixel_values)

    A .json beside it describes inputs and outputs, with labels, preprocessing, versions and a hash
    of the parameters. jax guarantees to read such files for six months of releases both ways.

    With --format onnx (extra onnx) the same program, in float32, runs in onnxruntime and the like;
    it is compared with the model before it is written.

    Args:
        model: Directory with config.json and weights, a weight file, a hub id, or a file of
            VideoMAE's authors or scenic.
        out: File to write, .stablehlo or .onnx.
        head: none exports the model without its classifier. Of a masked autoencoder, the encoder is
            exported, with all patches visible.
        format: What is written.
        overwrite: Replace files that exist. A parameter file of the old program is removed if the
            new one holds its parameters.
        json: Print the content of the .json, without labels, instead of text.
    """
    files = _files(out, overwrite, SUFFIXES[format])
    if program.input_size is not None and not program.preprocess:
        raise UserError(f"--input-size {program.input_size} needs --preprocess")
    size = None if program.input_size is None else parse_size(program.input_size)
    if program.batch is not None and program.batch < 1:
        raise UserError(f"--batch must be at least 1, got {program.batch}")

    if format == "onnx":
        _check_for_onnx(program)
        check_onnx_extra()
    else:
        check_extra()

    changes = joined(config)
    source = open_model(model, changes)
    if head == "classification" and source.head != "classification":
        raise UserError(
            f"--head classification: {model} holds {source.architecture}, which has no classifier"
        )
    if head is None and source.head == "pretraining":
        head = "none"
    processor = None
    try:
        processor = processor_of(source)
    except UserError as error:  # without a processor, the program takes normalised pixels
        if program.preprocess or isinstance(error, ConfigError):
            raise
    module, weights = from_pretrained(
        source,
        head,
        dtype=program.dtype,
        param_dtype=program.param_dtype,
        **(EXECUTION if format == "onnx" else {}),
    )
    if format == "onnx":
        artefact = export_onnx(module, weights, processor, batch=program.batch)
    else:
        artefact = export_model(
            module,
            weights,
            processor,
            preprocess=program.preprocess,
            input_size=size,
            batch=program.batch,
            params_at=program.params,
            precision=program.precision,
        )
    about: dict[str, Any] = {"source": model, "file": out.name} | artefact.about
    if artefact.params is not None:
        about["params"]["file"] = files["params"].name
    about["example"] = _example(about)
    _write(artefact, about, out, files)
    if json:
        about = {name: value for name, value in about.items() if name != "labels"}
        print(json_module.dumps(about, indent=2))
    else:
        print(_as_text(about, files))
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of "HxW"; UserError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise UserError(f"--input-size is {text!r}, expected HxW in pixels, like 256x340")
    return int(match[1]), int(match[2])


def _check_for_onnx(program: ProgramOptions) -> None:
    """UserError for options of StableHLO alone."""
    fixed = {f.name: f.default for f in dataclasses.fields(program) if f.name != "batch"}
    given = [name for name, value in fixed.items() if getattr(program, name) != value]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{flags} is for --format stablehlo; leave it out, or write that")


def _files(out: Path, overwrite: bool, suffix: str) -> dict[str, Path]:
    """The files beside the program; UserError for one that exists already.

    The parameter file is checked even if none is written, since an old one would be taken for this
    program's.
    """
    check_output(out, (suffix,), overwrite)
    files = {
        "about": out.with_name(f"{out.name}.json"),
        "params": out.with_name(f"{out.name}.safetensors"),
    }
    for path in files.values():
        check_output(path, (path.suffix,), overwrite, flag=f"--out {out} comes with a file:")
    return files


def _write(artefact, about: dict, out: Path, files: dict[str, Path]) -> None:
    """Write all files together, and remove an old parameter file that is not written again."""
    beside = artefact.params is not None
    others = (files["about"], files["params"]) if beside else (files["about"],)
    removed = not beside and files["params"].exists()
    with whole_files(out, *others, drop=(files["params"],)) as (program, description, *params):
        description.write_text(json_module.dumps(about, indent=2) + "\n", encoding="utf-8")
        program.write_bytes(artefact.program)
        for path in params:
            tensors = {
                name: LazyTensor(value.shape, value.dtype, lambda value=value: value)
                for name, value in artefact.params.items()
            }
            write_safetensors(path, tensors, {"format": "jax"})
    if removed:
        print(f"removed {files['params']}, of the program that was replaced", file=sys.stderr)


def _example(about: dict) -> str:
    """Python that runs the file in its directory."""
    (name, taken), *_ = about["inputs"].items()
    shape = ", ".join(str(2 if side == "b" else side) for side in taken["shape"])
    if about["format"] == "onnx":
        return "\n".join(
            [
                "import numpy as np, onnxruntime",
                f"session = onnxruntime.InferenceSession({about['file']!r})",
                f"{name} = np.zeros(({shape}), {taken['dtype']!r})",
                f"print(session.run(None, {{{name!r}: {name}}}))",
            ]
        )
    lines = ["import jax, numpy as np", "from jax import export"]
    arguments = name
    if about["params"]["at"] == "beside":
        lines.append("from safetensors.numpy import load_file")
        arguments = f"load_file({about['params']['file']!r}), {name}"
    lines += [
        f"model = export.deserialize(bytearray(open({about['file']!r}, 'rb').read()))",
        f"{name} = np.zeros(({shape}), {taken['dtype']!r})",
        f"print(jax.jit(model.call)({arguments}))",
    ]
    return "\n".join(lines)


def _as_text(about: dict, files: dict[str, Path]) -> str:
    def shown(arrays: dict) -> str:
        return ", ".join(
            f"{name} {array['dtype']} [{', '.join(map(str, array['shape']))}]"
            for name, array in arrays.items()
        )

    params = about["params"]
    where = f"in {params['file']}" if "file" in params else "inside"
    lines = [
        f"{about['file']}: {about['model']} for {', '.join(about['platforms'])}, "
        f"{about['bytes'] / 2**20:.1f} MiB",
        f"  takes      {shown(about['inputs'])}",
        f"  gives      {shown(about['outputs'])}",
        f"  inside     {', '.join(about['preprocessing']['inside']) or 'no preprocessing'}",
        f"  parameters {params['count']:,} {where}, {params['bytes'] / 2**20:.1f} MiB, sha256 "
        f"{params['sha256'][:16]}",
        f"  described in {files['about']}; to run it:",
    ]
    return "\n".join(lines + [f"    {line}" for line in about["example"].splitlines()])
