# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax demo`: from pre-training to export, on generated videos."""

import contextlib
import dataclasses
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from jax.experimental.compilation_cache import compilation_cache

from vivit_jax.cli import demo_stages
from vivit_jax.cli.demo_run import (
    CLIPS,
    FPS,
    MARKER,
    SEEDS,
    WRITTEN,
    Demo,
    labelled_split,
    say,
)
from vivit_jax.console import FLAT, keep_compiled
from vivit_jax.data.datasets.synthetic import CLASSES, write_dataset
from vivit_jax.errors import UserError
from vivit_jax.files.atomic import write_json
from vivit_jax.files.staging import names_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipOptions:
    """The clips that are made.

    Attributes:
        clips_per_class: Training clips of each of the eight classes. Default: 160, or 80 if quick.
        labelled_clips_per_class: Clips of each class, for each seed, in the comparison on few
            labels.
        test_clips_per_class: Held-out clips of each class. Default: 40, or 20 if quick.
    """

    clips_per_class: int | None = None
    labelled_clips_per_class: int = 4
    test_clips_per_class: int | None = None


def demo(
    *,
    out: Path = Path("vivit-demo"),
    model: Literal["videomae", "vivit"] = "videomae",
    seed: int = 0,
    data_seed: int = 0,
    quick: bool = False,
    clips: Annotated[ClipOptions, FLAT] = ClipOptions(),
    epochs: int | None = None,
    overwrite: bool = False,
) -> int:
    """Pre-train, compare, classify and export on generated videos.

    Needs no network, data or accelerator, and takes about three minutes on two idle cores. The data
    are mp4 files of moving shapes, in eight classes that differ in motion only. A VideoMAE learns
    to fill in hidden patches of clips without labels. Fine-tuned on few labels, it is compared with
    the same model from scratch, for three seeds, in a bar chart. With all labels no pre-training is
    needed: a classifier is trained from scratch, evaluated on held-out clips, saved as a
    HuggingFace directory, loaded back, used on one file and, if PyTorch is installed, compared with
    PyTorch. With --model vivit that classifier is a ViViT, and it is all. The exit status is 1 if
    one of the checks fails.

    Args:
        out: Directory to write, new or empty.
        model: The family to train.
        seed: Seed of the initial weights and of the order of training.
        data_seed: Seed of the data.
        quick: Take less than half of the time, with half of the clips, a quarter of the
            pre-training, and half of the steps on few labels.
        epochs: Passes over the clips in every training run. Default: the recipes'.
        overwrite: Replace what an earlier demo wrote to `out`; other files there are kept.
    """
    for name, value in (vars(clips) | {"epochs": epochs}).items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for flag, value in (("--seed", seed), ("--data-seed", data_seed)):
        if value < 0:
            raise UserError(f"{flag} must not be negative, got {value}")
    if seed > 2**32 - SEEDS:
        raise UserError(
            f"--seed must be at most {2**32 - SEEDS}, got {seed}: of the {SEEDS} seeds from there "
            "on each is below 2**32"
        )
    share = 2 if quick else 1
    splits = {
        "train": clips.clips_per_class or CLIPS["train"] // share,
        "test": clips.test_clips_per_class or CLIPS["test"] // share,
    }
    if model == "videomae":
        few = clips.labelled_clips_per_class
        splits |= dict.fromkeys(map(labelled_split, range(SEEDS)), few)
    seconds: dict[str, float] = {}
    stage = functools.partial(_timed, seconds)
    with stage("start"):
        device = jax.devices()[0].platform
    _prepare(out, overwrite)

    say(f"vivit-jax demo, seed {seed}, on {device} with {os.cpu_count()} processors")
    with stage("write clips"):
        written = write_dataset(out / "data", splits, seed=data_seed, fps=FPS)
    size = sum(path.stat().st_size for files in written.values() for path, _ in files)
    named = ", ".join(f"{len(files)} in {split}" for split, files in written.items())
    say(
        f"\ndata: {named}; {len(CLASSES)} kinds of motion, 8 frames of 48x48, {FPS} per second, "
        f"H.264 in mp4, {size / 1e6:.1f} MB, in {out / 'data'}"
    )
    run = Demo(out, seed, quick, epochs, stage)
    with _programs_kept():
        outcome = (demo_stages.videomae if model == "videomae" else demo_stages.vivit)(run)

    summary = dict(model=model, seed=seed, data_seed=data_seed, quick=quick) | outcome.summary
    summary["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    _mark(out, summary)
    files = outcome.files | {
        "model/": "the classifier: config.json, model.safetensors, preprocessor_config.json",
        "data/": "the clips: <split>/<class>/<number>.mp4",
        MARKER: "figures and times",
    }
    width = max(map(len, files))
    say(f"\nwritten to {out.resolve()}:")
    for name, what in files.items():
        say(f"  {name:{width}}  {what}")
    say("\n".join(["\nnext:", *(f"  {command}" for command in outcome.commands)]))
    say(
        f"\n{sum(seconds.values()):.0f} s: "
        + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    )
    return 0 if outcome.passed else 1


@contextlib.contextmanager
def _programs_kept() -> Iterator[None]:
    """Keep compiled programs on disk during the demo, since its stages share some."""
    # jax's flags become attributes at run time only.
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vivit-demo") as directory:
        keep_compiled(Path(directory))
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _prepare(out: Path, overwrite: bool) -> None:
    """Make `out` a directory without files of a demo, and mark it as a demo's."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a directory, new or empty")
    if out.is_dir() and names_in(out):
        if not overwrite:
            raise UserError(
                f"--out {out} is not empty; choose another directory, or pass --overwrite to "
                "replace an earlier demo"
            )
        if not (out / MARKER).is_file():
            raise UserError(
                f"--out {out} was not written by vivit-jax demo (it holds no {MARKER}), so "
                "--overwrite leaves it alone; choose another directory"
            )
        for name in WRITTEN:
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    _mark(out, {})


def _mark(out: Path, values: dict[str, Any]) -> None:
    write_json(out / MARKER, {"written_by": "vivit-jax demo"} | values)
