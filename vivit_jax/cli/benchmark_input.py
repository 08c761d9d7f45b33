# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark-input`: how fast clips come out of video files."""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vivit_jax.benchmark.input import SAMPLINGS, compare_readers, find_clip, one_core
from vivit_jax.benchmark.loader import many_names, measure_loader
from vivit_jax.benchmark.made_video import Video, write_video
from vivit_jax.benchmark.measure import cpu_name, environment
from vivit_jax.console import FLAT
from vivit_jax.data.video.decode import probe_video
from vivit_jax.errors import UserError
from vivit_jax.files.atomic import check_output, write_json
from vivit_jax.recipes import recipe_named
from vivit_jax.recipes.recipe import Recipe

_MADE = Video()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """The clips that the readers read.

    Attributes:
        frames: Frames of a clip.
        stride: Frames of the video from one frame of a dense clip to the next.
        cores: one runs the readers on one core, all as they run by themselves.
    """

    frames: int = 16
    stride: int = 4
    cores: Literal["one", "all"] = "one"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """The loader that is timed instead.

    Attributes:
        loader: Count the clips per second of a recipe's batches instead.
        recipe: For --loader, a name of `vivit-jax recipes`: frames, sampling, augmentation,
            repeats.
        batch: For --loader, videos of a batch.
        threads: For --loader, threads that read, in each process.
        workers: For --loader, processes that read beside this one.
    """

    loader: bool = False
    recipe: str = "videomae-v1-base-kinetics400-finetune"
    batch: int = 8
    threads: int = 2
    workers: int = 0


def benchmark_input(
    videos: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    /,
    *,
    readers: Annotated[ReaderOptions, FLAT] = ReaderOptions(),
    loader: Annotated[LoaderOptions, FLAT] = LoaderOptions(),
    repeats: int = 5,
    made: Annotated[Video, FLAT] = _MADE,
    json: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Time reading clips of video files, and compare with PyAV's loop.

    The loop of transformers' documentation decodes from the first frame to the last one asked for.
    Dense clips have frames --stride apart, sparse clips one in each of --frames equal parts of the
    video. The frames are compared first; where they differ in any bit no ratio is printed and the
    exit status is 1. Every clip is timed as the first of its file: later ones take less, since
    read_video keeps the list of a file's packets.

    With --loader, batches of a recipe's training clips are read, decoded and augmented, and counted
    in clips per second: what a training run gets at most.

    Args:
        videos: Video files. Default: one that is made for the measurement.
        repeats: Rounds in which the readers take turns; with --loader, batches that are timed.
        json: Also write the figures to this file.
        overwrite: Replace the file of --json.
    """
    counts = vars(readers) | vars(loader) | {"repeats": repeats}
    for name in ("frames", "stride", "repeats", "batch", "threads"):
        if counts[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {counts[name]}")
    if loader.workers < 0:
        raise UserError(f"--workers must be at least 0, got {loader.workers}")
    if loader.loader and readers != ReaderOptions():
        raise UserError("--frames, --stride and --cores are not for --loader: a recipe's clips are")
    if not loader.loader and loader != LoaderOptions():
        raise UserError("--recipe, --batch, --threads and --workers are only for --loader")
    if json is not None:
        check_output(json, (".json",), overwrite, flag="--json")
    recipe = recipe_named(loader.recipe)
    for path in videos:  # everything wrong is reported before anything is timed
        probe_video(path)
        for sampling in () if loader.loader else SAMPLINGS:
            find_clip(path, sampling, readers.frames, readers.stride)

    where = environment()
    print(f"{where.line}\nCPU: {cpu_name()}")
    with _paths(videos, made) as paths:
        if loader.loader:
            values, agree = _time_loader(paths, recipe, loader, repeats, made=not videos), True
        else:
            values, agree = _time_readers(paths, readers, repeats)
    if json is not None:
        about = {"cpu": cpu_name(), "made": None if videos else dataclasses.asdict(made)}
        about["videos"] = [str(path) for path in videos]
        write_json(json, dataclasses.asdict(where) | about | values)
    return 0 if agree else 1


def _time_readers(
    paths: tuple[Path, ...], options: ReaderOptions, repeats: int
) -> tuple[dict[str, Any], bool]:
    """Print each comparison; the figures, and whether all frames agree."""
    results = []
    with contextlib.nullcontext(False) if options.cores == "all" else one_core() as pinned:
        if options.cores == "one" and not pinned:
            print("this system cannot keep a reader to one core: all are used", file=sys.stderr)
        for path in paths:
            for sampling in SAMPLINGS:
                how = options.frames, options.stride, repeats
                results.append(compare_readers(path, sampling, *how))
                print(f"\n{results[-1]}", flush=True)
    values = dataclasses.asdict(options) | {"one_core": pinned, "repeats": repeats}
    values["reading"] = [result.to_dict() for result in results]
    return values, all(result.agrees for result in results)


def _time_loader(
    paths: tuple[Path, ...], recipe: Recipe, options: LoaderOptions, rounds: int, made: bool
) -> dict[str, Any]:
    """Print the loader's rate; the figures."""
    infos = [probe_video(path) for path in paths]
    rate = measure_loader(
        many_names(paths[0]) if made else paths,
        recipe,
        batch=options.batch,
        threads=options.threads,
        workers=options.workers,
        rounds=rounds,
    )
    sizes = sorted({f"{info.num_frames} frames {info.width}x{info.height}" for info in infos})
    t, h, w, _ = rate.clip
    print(f"\nloader of {rate.recipe}: {t} frames {h}x{w} of videos of {', '.join(sizes[:3])}")
    print(f"  {rate}")
    return {"loader": rate.to_dict()}


@contextlib.contextmanager
def _paths(videos: tuple[Path, ...], made: Video) -> Iterator[tuple[Path, ...]]:
    """The files, or a made one that is removed again."""
    if videos:
        yield videos
        return
    made.check()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "made.mp4"
        print(f"making {made.num_frames} frames of video ...", file=sys.stderr)
        write_video(path, made)
        yield (path,)
