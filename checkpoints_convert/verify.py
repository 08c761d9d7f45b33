# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert verify`: runs a checkpoint on the same input in PyTorch and in JAX.

PyTorch loads the files through transformers, JAX through this package; they share no code. A third
run, PyTorch in float64, shows which of the two is closer to the truth.
"""

import contextlib
import copy
import dataclasses
import json as json_module
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from jaxtyping import Float32

from checkpoints_convert.convert import convert_checkpoint
from checkpoints_convert.layouts.hf import runs_in_transformers, transformers_notes
from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.rules import match_import
from checkpoints_convert.source import Source, open_source
from vivit_jax.config import VideoMAEConfig, VivitConfig
from vivit_jax.config_base import Attention
from vivit_jax.console import FLAT, ConfigOption, joined
from vivit_jax.data.read_clip import read_clip
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import CheckpointError, MissingExtra, UserError, install
from vivit_jax.hub import read_index, resolve_checkpoint
from vivit_jax.masking import Mask
from vivit_jax.models.build import expected_shapes
from vivit_jax.progress import format_table
from vivit_jax.typed import reusable

# Earlier releases from 5.6 on load published VideoMAE files with zero query and value biases.
OLDEST_TRANSFORMERS = (5, 18)


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared quantity; errors are largest absolute differences."""

    name: str
    scale: float  # largest absolute value in float64
    difference: float  # JAX against PyTorch, both in float32
    jax_error: float  # against float64
    torch_error: float  # against float64
    within: bool

    @property
    def relative(self) -> float:
        """`difference` as a share of `scale`."""
        return self.difference / self.scale if self.scale else self.difference


@dataclasses.dataclass(frozen=True)
class Verification:
    """The comparison of one checkpoint; `passed` if every row is within the tolerance."""

    source: str
    model: str
    inputs: str
    tolerance: float
    rows: tuple[Row, ...]
    note: str | None = None  # what the two sides compute differently on purpose

    @property
    def passed(self) -> bool:
        """Whether every row is within the tolerance."""
        return all(row.within for row in self.rows)

    def __str__(self) -> str:
        head = ("", "max |value|", "JAX-PyTorch", "relative", "JAX-f64", "PyTorch-f64", "")
        lines = [head] + [
            (
                row.name,
                f"{row.scale:.4g}",
                *(
                    f"{value:.1e}"
                    for value in (row.difference, row.relative, row.jax_error, row.torch_error)
                ),
                "ok" if row.within else "DIFFERS",
            )
            for row in self.rows
        ]
        differs = sum(not row.within for row in self.rows)
        verdict = (
            f"agree: every difference is within {self.tolerance:g} x max(1, max |value|)"
            if self.passed
            else f"DIFFER: {differs} of {len(self.rows)} rows exceed "
            f"{self.tolerance:g} x max(1, max |value|)"
        )
        title = f"{self.source}: {self.model}, {self.inputs}"
        return "\n".join(
            [title, *format_table(lines), *([self.note] if self.note else []), verdict]
        )


@dataclasses.dataclass(frozen=True)
class _Options:
    """What to run on, and how; see `verify_checkpoint`."""

    clip: str | Path | None
    tolerance: float
    batch: int
    seed: int
    attention: str


def verify_checkpoint(
    source: str | Path,
    *,
    clip: str | Path | None = None,
    tolerance: float = 1e-4,
    batch: int = 1,
    seed: int = 0,
    attention: str = "auto",
    settings: Iterable[str] | Mapping[str, Any] = (),
    revision: str | None = None,
) -> Verification:
    """Run a checkpoint in both frameworks and compare embeddings, every block, logits and loss.

    The input is standard normal noise drawn from `seed`, or `clip`, a video file preprocessed as
    the checkpoint's preprocessor_config.json says. Both sides run in float32 with exact matrix
    products. A checkpoint that transformers does not read (of scenic or VideoMAE's authors) is
    first converted into a temporary directory, with `settings` for fields that it leaves open.
    Raises CheckpointError if either side does not load every tensor, MissingExtra without PyTorch
    or transformers, UserError for a model that transformers does not have or does not run.
    """
    if not 0 < tolerance < np.inf or batch < 1 or seed < 0:
        raise UserError(
            f"tolerance {tolerance} and batch {batch} must be positive and finite, seed {seed} not "
            "negative"
        )
    options = _Options(clip, tolerance, batch, seed, attention)
    path, settings = resolve_checkpoint(source, revision), reusable(settings)
    opened = open_source(path, settings=settings)
    if not runs_in_transformers(opened.config, opened.head):
        raise UserError(_no_reference(opened))
    if not opened.layout.in_transformers or not opened.as_stored:
        found = _compare_converted(opened, options)
    elif settings:
        raise UserError(
            "--config is for checkpoints without a config.json; transformers would read "
            f"{path}/config.json as it is. Write another directory with vivit-convert convert"
        )
    else:
        found = _compare_frameworks(path, opened, options)
    return dataclasses.replace(found, source=str(source))


def _compare_converted(opened: Source, options: _Options) -> Verification:
    """Compare a checkpoint that transformers does not read, converted to the hf layout."""
    with tempfile.TemporaryDirectory() as directory:
        convert_checkpoint(opened, directory)
        found = _compare_frameworks(Path(directory), open_source(directory), options)
    note = (
        f"compared as converted to the hf layout, with transformers' {found.model}: no code of "
        "its authors or of its repository is run"
    )
    return dataclasses.replace(found, note="\n".join(filter(None, (note, found.note))))


def _compare_frameworks(path: Path, opened: Source, options: _Options) -> Verification:
    """Compare a checkpoint that transformers reads from `path`."""
    stored, name = opened.stored, opened.architecture
    match_import(
        opened.tensors,
        stored.rules(opened.config),
        expected_shapes(opened.config, stored.head, stored.pooler),
        opened.title,
    )
    reference = load_transformers(path, name, "vivit-convert verify", pooler=stored.pooler)
    model, params = from_pretrained(opened, attention=options.attention)
    pixels, inputs = _pixels(path, model.config, options)
    extra = _extra_inputs(model, stored.head, len(pixels), options.seed)
    with jax.default_matmul_precision("highest"):
        ours = _run_in_jax(model, params, pixels, extra)
    pool = _torch_pooler(opened) if stored.pooler else None
    theirs = _run_in_torch(reference, pixels, extra, pool)
    double = copy.deepcopy(reference).double()
    truth = _run_in_torch(double, pixels.astype(np.float64), extra, pool)
    rows = tuple(
        _compare(key, ours[key], theirs[key], truth[key], options.tolerance) for key in truth
    )
    notes = list(transformers_notes(opened.config, stored.head, stored.pooler))
    if pool is not None:
        notes.append("pooler output: PyTorch's layer_norm of the mean of transformers' tokens")
    note = "\n".join(notes) or None
    return Verification(str(opened), name, inputs, options.tolerance, rows, note)


def _no_reference(opened: Source) -> str:
    """Why a model cannot be compared with PyTorch, and what to use instead."""
    config = opened.config
    if config.in_transformers:
        (reason,) = transformers_notes(config, opened.head)
        return (
            f"{opened.checkpoint.path} cannot be compared with PyTorch: {reason}. vivit-convert "
            "inspect checks the tensors"
        )
    if config.attentive_heads:
        return (
            f"{opened.checkpoint.path} has an attentive head, which transformers does not have. "
            "tests/models/test_attentive.py of this project compares such heads with PyTorch's "
            "attention; vivit-convert inspect checks the tensors"
        )
    if opened.family == "videomae":
        parts = {
            "cosine attention": config.cosine_attention,
            "layer scale": config.layer_scale_init,
        }
        what = " and ".join(part for part, there in parts.items() if there)
        return (
            f"{opened.checkpoint.path} is a VideoMAE with {what}, which transformers does not "
            "have. The code of VideoMAE V2's authors (OpenGVLab/VideoMAEv2) does, for checkpoints "
            "that vivit-convert convert writes with --to videomae. tests/parity of this project "
            "compares such models with a float64 implementation; vivit-convert inspect checks the "
            "tensors"
        )
    if not isinstance(config, VivitConfig):
        return (
            f"{opened.checkpoint.path} is a {config.title}, which transformers does not have; "
            "vivit-convert inspect checks the tensors"
        )
    what = f"{config.attention_type} attention, pooling {config.pooling!r}"
    if config.num_sampled_frames is not None:
        what += f", {config.num_sampled_frames} sampled frames"
    return (
        f"{opened.checkpoint.path} is a ViViT with {what}. No PyTorch reference exists for it: "
        "transformers has joint attention read from a class token only, and scenic's authors "
        "published JAX code. tests/parity/test_variants.py of this project compares such models "
        "with a float64 implementation of the paper; vivit-convert inspect checks the tensors"
    )


def _compare(name: str, ours, theirs, truth, tolerance: float) -> Row:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != truth.shape:
        raise CheckpointError(f"{name} has shape {ours.shape} in JAX, {truth.shape} in PyTorch")
    scale, difference, jax_error, torch_error = (
        float(np.abs(x).max()) for x in (truth, ours - theirs, ours - truth, theirs - truth)
    )
    # Written so that NaN is not within.
    within = difference <= tolerance * max(1.0, scale)
    return Row(name, scale, difference, jax_error, torch_error, within)


def load_transformers(
    path: Path,
    name: str,
    purpose: str,
    *,
    pooler: bool = False,
    attention: str = "sdpa",
    dtype: str = "float32",
) -> Any:
    """transformers' class `name` with all the weights of `path`, in eval mode.

    `pooler` is whether a headless model has one. Raises MissingExtra, naming the `purpose`, without
    PyTorch or transformers, UserError for a transformers that is too old, and CheckpointError if it
    does not load every tensor.
    """
    check_torch(purpose)
    import torch
    import transformers

    options = {"add_pooling_layer": pooler} if name == "VivitModel" else {}
    with _as_directory(path) as directory, quiet(transformers):
        try:
            model, info = getattr(transformers, name).from_pretrained(
                directory,
                attn_implementation=attention,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                output_attentions=False,
                **options,
            )
        except Exception as error:  # whatever it raises is about the checkpoint
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(f"transformers does not open {path}: {reason}") from error
    # A key bias cannot change the softmax; transformers leaves it out too.
    unexpected = {key for key in info["unexpected_keys"] if not key.endswith(".key.bias")}
    if name == "VideoMAEModel" and pooler:
        unexpected -= {"fc_norm.weight", "fc_norm.bias"}  # its model has no such norm
    problems = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(unexpected)}
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"transformers does not load every tensor of {path}: {listed}")
    model.config.return_dict = True  # transformers fails on its own tuples
    return model.eval()


def check_torch(purpose: str) -> None:
    """MissingExtra without PyTorch or transformers, UserError if transformers is too old."""
    for package in ("torch", "transformers"):
        try:
            __import__(package)
        except ModuleNotFoundError:
            raise MissingExtra(package, "torch", purpose) from None
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST_TRANSFORMERS:
        raise UserError(
            f"{purpose} needs transformers >= 5.18, got {transformers.__version__}: earlier "
            f"releases load VideoMAE weights without their biases. {install('torch')}"
        )


@contextlib.contextmanager
def quiet(transformers) -> Iterator[None]:
    """Silence transformers' load report: here its warnings are errors."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _as_directory(path: Path) -> Iterator[Path]:
    """A directory from which transformers loads `path`; for a file, one with links."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        names = {"config.json": "config.json"}
        if path.name.endswith(".index.json"):
            standard = "pytorch_model.bin" if ".bin." in path.name else "model.safetensors"
            names[path.name] = f"{standard}.index.json"
            names |= {shard: shard for shard in read_index(path).values()}
        else:
            bin_file = path.suffix == ".bin"
            names[path.name] = "pytorch_model.bin" if bin_file else "model.safetensors"
        for name, link in names.items():
            (Path(directory) / link).symlink_to((path.parent / name).resolve())
        yield Path(directory)


def _pixels(
    path: Path, config: Any, options: _Options
) -> tuple[Float32[np.ndarray, "b t h w c"], str]:
    """The input of both sides, and its description."""
    if options.clip is None:
        shape = (options.batch, config.num_frames, *config.frame_size, config.num_channels)
        rng = np.random.default_rng(options.seed)
        return rng.standard_normal(shape).astype(np.float32), f"noise {shape}, seed {options.seed}"
    processor = VideoProcessor.from_pretrained(path if path.is_dir() else path.parent)
    pixels = read_clip(options.clip, config).pixel_values(processor)
    pixels = np.repeat(pixels, options.batch, axis=0)
    return pixels, f"{options.clip} {pixels.shape}"


def _extra_inputs(model, head: str, batch: int, seed: int) -> dict[str, np.ndarray]:
    """Labels of the kind that the config trains with, or a random mask of 90 %."""
    config, rng = model.config, np.random.default_rng(seed)
    if head == "pretraining":
        tokens = config.num_tokens
        count = min(max(int(0.9 * tokens), 1), tokens - 1)
        return {"mask": np.stack([rng.permutation(tokens) < count for _ in range(batch)])}
    if head != "classification" or config.class_splits is not None:
        return {}
    shape = (batch, config.num_labels)
    if config.problem_type == "regression" or config.num_labels == 1:
        return {"labels": rng.standard_normal(shape).astype(np.float32)}
    if config.problem_type == "multi_label_classification":
        return {"labels": (rng.random(shape) < 0.5).astype(np.float32)}
    return {"labels": rng.integers(config.num_labels, size=batch)}


def _run_in_jax(model, params, pixels, extra) -> dict[str, np.ndarray]:

    inputs = {key: Mask.from_bool(x) if key == "mask" else x for key, x in extra.items()}

    @jax.jit
    def run(params, pixels, inputs):
        return model.apply({"params": params}, pixels, output_hidden_states=True, **inputs)

    out = run(params, pixels, inputs)
    return _named(
        out.hidden_states,
        getattr(out, "decoder_hidden_states", None),
        {field.name: getattr(out, field.name) for field in dataclasses.fields(out)},
    )


def _torch_pooler(opened: Source) -> Callable[[Any], Any] | None:
    """A headless VideoMAE's pooler in PyTorch, which transformers' model lacks."""
    import torch

    if not isinstance(opened.config, VideoMAEConfig):
        return None
    eps = opened.config.fc_norm_eps
    weight, bias = (
        torch.from_numpy(opened.tensors[f"fc_norm.{leaf}"].read().astype(np.float32))
        for leaf in ("weight", "bias")
    )

    def pool(tokens):
        mean = tokens.mean(1)
        return torch.nn.functional.layer_norm(
            mean, mean.shape[-1:], weight.to(mean), bias.to(mean), eps
        )

    return pool


def _run_in_torch(model, pixels, extra, pool=None) -> dict[str, np.ndarray]:
    """The outputs of transformers' model; `pool` computes a pooler_output from the tokens."""
    import torch

    inputs: dict[str, Any] = {
        "bool_masked_pos" if key == "mask" else key: torch.from_numpy(x) for key, x in extra.items()
    }
    if "labels" in inputs and inputs["labels"].is_floating_point():
        inputs["labels"] = inputs["labels"].to(model.dtype)
    decoder_states: list[torch.Tensor] = []
    hooks = []
    if hasattr(model, "decoder"):
        # transformers does not return the states between the decoder's blocks.
        layers = model.decoder.decoder_layers
        hooks.append(
            layers[0].register_forward_pre_hook(lambda _, args: decoder_states.append(args[0]))
        )
        hooks += [
            layer.register_forward_hook(
                lambda _, args, out: decoder_states.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            for layer in layers
        ]
    channels_first = np.ascontiguousarray(pixels.transpose(0, 1, 4, 2, 3))
    with torch.inference_mode():
        out = model(
            torch.from_numpy(channels_first),
            output_hidden_states=True,
            return_dict=True,
            **inputs,
        )
        pooled = {} if pool is None else {"pooler_output": pool(out.last_hidden_state)}
    for hook in hooks:
        hook.remove()
    return _named(out.hidden_states, decoder_states or None, dict(out.items()) | pooled)


def _named(hidden_states, decoder_states, outputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """The compared quantities in the order of the table."""
    named = {}
    for title, states in (("", hidden_states), ("decoder ", decoder_states)):
        for i, state in enumerate([] if states is None else states):
            named[f"{title}block {i - 1}" if i else f"{title}embeddings"] = state
    for key in ("last_hidden_state", "pooler_output", "logits", "loss"):
        if outputs.get(key) is not None:
            named[key.replace("_", " ")] = outputs[key]
    return {key: np.asarray(value) for key, value in named.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What both sides run on, and how closely they have to agree.

    Attributes:
        clip: A video file to run on instead of noise.
        tolerance: Largest difference allowed, times the largest value if that exceeds 1.
        batch: Clips per run.
        seed: Seed of the noise, the labels and the mask.
        attention: The attention implementation of the JAX side.
    """

    clip: Path | None = None
    tolerance: float = 1e-4
    batch: int = 1
    seed: int = 0
    attention: Attention = "auto"


def verify(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    run: Annotated[RunOptions, FLAT] = RunOptions(),
    config: ConfigOption = (),
    json: bool = False,
    revision: str | None = None,
) -> int:
    """Run a checkpoint in PyTorch and in JAX and compare.

    The exit status is 1 if they differ. One row each for the embeddings, every block, logits and
    loss: the largest absolute difference, its share of the largest value, and the error of each
    side against PyTorch in float64.

    Args:
        source: A checkpoint directory, a weight file with config.json beside it, or a hub id.
        json: Print a JSON object instead of the table.
        revision: Branch, tag or commit of a hub id.
    """
    options: dict[str, Any] = vars(run)
    result = verify_checkpoint(source, settings=joined(config), revision=revision, **options)
    if json:
        rows = [dataclasses.asdict(row) | {"relative": row.relative} for row in result.rows]
        values = dataclasses.asdict(result) | {"rows": rows, "passed": result.passed}
        print(json_module.dumps(values, indent=2))
    else:
        print(result)
    return 0 if result.passed else 1
