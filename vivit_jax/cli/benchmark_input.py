# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark-input`: how fast clips come out of video files."""

import contextlib
import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vivit_jax.benchmark.input import SAMPLINGS, compare_readers, find_clip, one_core
from vivit_jax.benchmark.loader import many_names
from vivit_jax.benchmark.loader_table import read_hosts, time_loader
from vivit_jax.benchmark.made_video import Video, write_video
from vivit_jax.benchmark.measure import cpu_name, environment
from vivit_jax.console import FLAT
from vivit_jax.data.settings import MOST_READERS
from vivit_jax.data.video.decode import probe_video
from vivit_jax.errors import UserError
from vivit_jax.files.addresses import is_address
from vivit_jax.files.atomic import check_output, write_json
from vivit_jax.recipes import model_config, recipe_named
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
        threads: For --loader, threads that read, in each process; several numbers, such as 1,2,4,
            are timed one after the other.
        workers: For --loader, processes that read beside this one; several numbers as for threads.
        plan: For --loader, a file of `vivit-jax plan --json`, to say how many cores its hosts need.
    """

    loader: bool = False
    recipe: str = "videomae-v1-base-kinetics400-finetune"
    batch: int = 8
    threads: str = "2"
    workers: str = "0"
    plan: Path | None = None


def benchmark_input(
    videos: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
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
    in clips per second: what a training run gets at most. The videos may lie at addresses. How much
    of the time holds Python's lock, which threads share and processes do not, is measured too.

    Args:
        videos: Video files, with --loader also addresses. Default: one that is made for the
            measurement.
        repeats: Rounds in which the readers take turns; with --loader, batches that are timed.
        json: Also write the figures to this file.
        overwrite: Replace the file of --json.
    """
    counts = vars(readers) | vars(loader) | {"repeats": repeats}
    for name in ("frames", "stride", "repeats", "batch"):
        if counts[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {counts[name]}")
    sides = tuple(
        itertools.product(
            _numbers("threads", loader.threads, 1), _numbers("workers", loader.workers, 0)
        )
    )
    if loader.loader and readers != ReaderOptions():
        raise UserError("--frames, --stride and --cores are not for --loader: a recipe's clips are")
    if not loader.loader and loader != LoaderOptions():
        raise UserError("--recipe, --batch, --threads, --workers and --plan are only for --loader")
    if not loader.loader and (there := [path for path in videos if is_address(path)]):
        raise UserError(f"{there[0]} is an address, which only --loader reads")
    if json is not None:
        check_output(json, (".json",), overwrite, flag="--json")
    recipe = recipe_named(loader.recipe)
    hosts = None if loader.plan is None else read_hosts(loader.plan, recipe.name)
    for path in videos:  # everything wrong is reported before anything is timed
        probe_video(path)
        for sampling in () if loader.loader else SAMPLINGS:
            find_clip(Path(path), sampling, readers.frames, readers.stride)

    where = environment()
    print(f"{where.line}\nCPU: {cpu_name()}")
    with _paths(videos, made) as paths:
        if loader.loader:
            names = many_names(Path(paths[0])) if not videos else paths
            print(f"\n{_loader_title(paths, recipe)}", flush=True)
            values = time_loader(names, recipe, sides, batch=loader.batch, rounds=repeats)
            if hosts is not None:
                values["needed"] = hosts.needed(values)
            agree = True
        else:
            values, agree = _time_readers(paths, readers, repeats)
    if json is not None:
        about = {"cpu": cpu_name(), "made": None if videos else dataclasses.asdict(made)}
        about["videos"] = list(videos)
        write_json(json, dataclasses.asdict(where) | about | values)
    return 0 if agree else 1


def _time_readers(
    paths: tuple[str, ...], options: ReaderOptions, repeats: int
) -> tuple[dict[str, Any], bool]:
    """Print each comparison; the figures, and whether all frames agree."""
    results = []
    with contextlib.nullcontext(False) if options.cores == "all" else one_core() as pinned:
        if options.cores == "one" and not pinned:
            print("this system cannot keep a reader to one core: all are used", file=sys.stderr)
        for path in paths:
            for sampling in SAMPLINGS:
                how = options.frames, options.stride, repeats
                results.append(compare_readers(Path(path), sampling, *how))
                print(f"\n{results[-1]}", flush=True)
    values = dataclasses.asdict(options) | {"one_core": pinned, "repeats": repeats}
    values["reading"] = [result.to_dict() for result in results]
    return values, all(result.agrees for result in results)


def _numbers(name: str, text: str, least: int) -> tuple[int, ...]:
    """The numbers of a text such as 1,2,4. Raises UserError."""
    parts = text.split(",")
    try:
        numbers = tuple(map(int, parts))
    except ValueError:
        raise UserError(f"--{name} is {text!r}; expected a number, or several as 1,2,4") from None
    for number in numbers:
        if number < least:
            raise UserError(f"--{name} must be at least {least}, got {number}")
        if number > MOST_READERS:
            raise UserError(f"--{name} must be at most {MOST_READERS}, got {number}")
    return tuple(dict.fromkeys(numbers))


def _loader_title(paths: Sequence[str], recipe: Recipe) -> str:
    config = model_config(recipe)
    (h, w), infos = config.frame_size, [probe_video(path) for path in paths]
    sizes = sorted({f"{info.num_frames} frames {info.width}x{info.height}" for info in infos})
    size = ", ".join(sizes[:3])
    return f"loader of {recipe.name}: {config.num_frames} frames {h}x{w} of videos of {size}"


@contextlib.contextmanager
def _paths(videos: tuple[str, ...], made: Video) -> Iterator[tuple[str, ...]]:
    """The files, or a made one that is removed again."""
    if videos:
        yield videos
        return
    made.check()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "made.mp4"
        print(f"making {made.num_frames} frames of video ...", file=sys.stderr)
        write_video(path, made)
        yield (str(path),)
