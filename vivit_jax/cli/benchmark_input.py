# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark-input`: how fast clips come from files to the device."""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vivit_jax.benchmark import input as reading
from vivit_jax.benchmark.input import one_core, write_video
from vivit_jax.benchmark.loader import many_names, measure_loader
from vivit_jax.benchmark.measure import cpu_name, environment
from vivit_jax.data.video.decode import probe_video, read_video
from vivit_jax.errors import UserError
from vivit_jax.files.atomic import check_output, write_json
from vivit_jax.progress import format_table
from vivit_jax.recipes import recipe_named

_STEPS = ("prepare", "send", "normalise")
_OF_READERS = ("frames", "stride", "start", "cores")
_OF_LOADER = ("recipe", "batch", "threads", "workers")


def benchmark_input(
    videos: Annotated[tuple[Path, ...], tyro.conf.Positional] = (),
    /,
    *,
    frames: int | None = None,
    stride: int | None = None,
    start: Literal["center", "random"] | None = None,
    cores: Literal["one", "all"] | None = None,
    loader: bool = False,
    recipe: str | None = None,
    batch: int | None = None,
    threads: int | None = None,
    workers: int | None = None,
    repeats: int = 5,
    minutes: float = 1.0,
    fps: int = 25,
    gop: int = 250,
    width: int = 320,
    height: int = 180,
    scene_seconds: float = 0.0,
    json: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Time reading clips of video files beside other readers, and sending them to the device.

    Dense clips have frames --stride apart, sparse clips one in each of --frames equal parts of the
    video. read_video is timed beside the loop of transformers' documentation, which decodes from
    the first frame to the last one asked, and beside torchcodec where it is installed. The frames
    are compared first; where those of read_video and of the loop differ in any bit, no ratio is
    printed and the exit status is 1. Every clip is timed as the first one of its file: read_video
    keeps the list of a file's packets, and a second clip takes less.

    With --loader nothing is compared: batches of training clips are read, decoded and augmented as
    --recipe says, in --threads and --workers, and counted in clips per second. That is what a
    training run gets at most.

    Args:
        videos: Video files. Default: one that is made for the measurement.
        frames: Frames of a clip, 16 by default.
        stride: Frames of the video from one frame of a dense clip to the next, 4 by default.
        start: Where clips lie: in the middle (of the parts, if sparse), by default, or at random.
        cores: "one", the default, runs every reader on one core, "all" as they run by themselves.
        loader: Count the clips per second of a recipe's batches instead.
        recipe: For --loader, of `vivit-jax recipes`: frames, sampling, augmentation, repeats.
            Default: videomae-v1-base-kinetics400-finetune.
        batch: For --loader, videos of a batch, 8 by default.
        threads: For --loader, threads that read, in each process; 2 by default, as in recipes.
        workers: For --loader, processes that read beside this one, 0 by default.
        repeats: Rounds in which the readers take turns; for --loader, batches that are timed.
        minutes: Length of the made video.
        fps: Frames per second of the made video.
        gop: Most frames from one keyframe to the next in the made video; 250 is x264's default.
        width: Of the made video, pixels.
        height: Of the made video, pixels.
        scene_seconds: Cut the made video to another scene this often, which starts with a keyframe.
            Default: never, so that as much as --gop allows lies before a wanted frame.
        json: Also write the figures to this file.
        overwrite: Replace the file of --json.
    """
    given = locals()
    for name in ("frames", "stride", "repeats", "batch", "threads"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"--{name} must be at least 1, got {given[name]}")
    if workers is not None and workers < 0:
        raise UserError(f"--workers must be at least 0, got {workers}")
    others = _OF_READERS if loader else _OF_LOADER
    amiss = [f"--{name}" for name in others if given[name] is not None]
    if amiss:
        raise UserError(
            f"{', '.join(amiss)}: not for --loader, whose clips are the recipe's"
            if loader
            else f"{', '.join(amiss)}: only for --loader"
        )

    if json is not None:
        check_output(json, (".json",), overwrite, flag="--json")
    import av

    made = None if videos else reading.Video(minutes, fps, gop, width, height, scene_seconds)
    if loader:
        name = recipe or "videomae-v1-base-kinetics400-finetune"
        values = _loader(videos, made, name, batch or 8, threads or 2, workers or 0, repeats)
        if json is not None:
            write_json(json, values)
        return 0
    frames, stride, start, cores = frames or 16, stride or 4, start or "center", cores or "one"
    codec, missing = reading.torchcodec_reader(threads=1 if cores == "one" else 0)
    readers = {reading.OURS: reading.read_ours, reading.LOOP: reading.read_loop}
    readers |= {reading.TORCHCODEC: codec} if codec else {}
    where = environment()
    ffmpeg = {name: ".".join(map(str, number)) for name, number in av.library_versions.items()}
    print(where.line)
    print(f"FFmpeg of av: libavcodec {ffmpeg['libavcodec']}; CPU: {cpu_name()}")
    results = []
    for path in videos:  # all that is wrong is told before anything is timed
        for sampling in reading.SAMPLINGS:
            reading.draw(path, sampling, frames, stride)
    with _paths(videos, made) as paths, _cores(cores) as pinned:
        for path in paths:
            for sampling in reading.SAMPLINGS:
                result = reading.compare_readers(
                    path,
                    sampling,
                    readers,
                    num_frames=frames,
                    stride=stride,
                    start=start,
                    repeats=repeats,
                )
                print(f"\n{_reading_text(result, missing)}", flush=True)
                results.append(result)
        total = results[0].info.num_frames
        middle = reading.sample("sparse", total, frames, stride, None)
        clip = read_video(paths[0], indices=middle)
    pixels = reading.compare_pixels(clip, repeats)
    print(f"\n{_pixels_text(pixels)}")
    if json is not None:
        values = dataclasses.asdict(where) | {
            "cpu": cpu_name(),
            "ffmpeg": ffmpeg,
            "one_core": pinned,
            "made": None if made is None else dataclasses.asdict(made),
            "frames": frames,
            "stride": stride,
            "start": start,
            "repeats": repeats,
            "torchcodec": missing or "installed",
            "reading": [result.to_dict() for result in results],
            "pixels": pixels.to_dict(),
        }
        write_json(json, values)
    return 0 if all(result.agrees for result in results) else 1


def _loader(
    videos: tuple[Path, ...],
    made,
    name: str,
    batch: int,
    threads: int,
    workers: int,
    rounds: int,
) -> dict:
    """Measure and print the loader; the figures as plain values."""
    recipe = recipe_named(name)
    where, known = environment(), [probe_video(path) for path in videos]
    print(f"{where.line}\nCPU: {cpu_name()}")
    with _paths(videos, made) as paths:
        known = known or [probe_video(paths[0])]
        rate = measure_loader(
            paths if videos else many_names(paths[0]),
            recipe,
            batch=batch,
            threads=threads,
            workers=workers,
            rounds=rounds,
        )
    sizes = sorted({f"{info.num_frames} frames {info.width}x{info.height}" for info in known})
    print(f"\n{_loader_text(rate, sizes)}")
    return dataclasses.asdict(where) | {
        "cpu": cpu_name(),
        "made": None if made is None else dataclasses.asdict(made),
        "videos": [str(path) for path in videos],
        "loader": rate.to_dict(),
    }


@contextlib.contextmanager
def _paths(videos: tuple[Path, ...], made) -> Iterator[tuple[Path, ...]]:
    """The files, or a made one that is removed again."""
    if videos:
        yield videos
        return

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "made.mp4"
        print(f"making {made.num_frames} frames of video ...", file=sys.stderr)
        write_video(path, made)
        yield (path,)


@contextlib.contextmanager
def _cores(cores: str) -> Iterator[bool]:
    """Whether one core is all that the block can use."""
    if cores == "all":
        yield False
        return
    with one_core() as pinned:
        if not pinned:
            print("this system cannot keep a reader to one core: all are used", file=sys.stderr)
        yield pinned


def _loader_text(rate, sizes: list[str]) -> str:
    t, h, w, _ = rate.clip
    repeats = f" x {rate.repeats} repeats" if rate.repeats > 1 else ""
    spread = 100 * rate.rounds.spread
    cpu = "" if rate.cpu_per_clip is None else f", {1e3 * rate.cpu_per_clip:.0f} ms of CPU a clip"
    return "\n".join(
        [
            f"loader of {rate.recipe}: {t} frames {h}x{w} of videos of {', '.join(sizes[:3])}",
            f"  --threads {rate.threads} --workers {rate.workers} --batch {rate.batch}{repeats}; "
            f"{len(rate.rounds.seconds)} batches timed",
            f"  {rate.clips_per_second:.2f} clips/s, {rate.videos_per_second:.2f} videos/s "
            f"(batches +-{spread:.0f}%){cpu}; first batch after {rate.start_seconds:.1f} s",
        ]
    )


def _reading_text(result, missing: str) -> str:
    info, used = result.info, result.num_frames
    lines = [
        f"{result.video}, {info.num_frames} frames {info.width}x{info.height} {info.codec}: "
        f"{result.sampling} clips of {used} frames"
    ]
    rows = [("reader", "ms/clip", "+-", "CPU ms", "clips/s", "decoded")]
    for rate in result.rates:
        rows.append(
            (
                rate.side,
                f"{1e3 * rate.wall.median:.1f}",
                f"{100 * rate.wall.spread:.0f}%",
                f"{1e3 * rate.cpu.median:.1f}",
                f"{rate.clips_per_second:.2f}",
                "unknown" if rate.decoded is None else f"{rate.decoded:.0f}",
            )
        )
    lines += [f"  {line}" for line in format_table(rows)]
    for rate in result.rates:
        if rate.side == "torchcodec" and rate.apart:
            lines.append(f"  torchcodec differs by up to {rate.apart} of 255 grey levels")
    if missing:
        lines.append(f"  torchcodec: {missing}")
    if result.agrees:
        lines.append(
            f"  time of vivit_jax / read loop: {result.ratio:.3f} "
            f"(CPU time {result.cpu_ratio:.3f}), frames bit-equal"
        )
    else:
        gap = next(rate.apart for rate in result.rates if rate.side == "vivit_jax")
        lines.append(
            f"  frames of vivit_jax and of the read loop differ by up to {gap} of 255: no ratio"
        )
    return "\n".join(lines)


def _pixels_text(pixels) -> str:
    shape = "x".join(map(str, pixels.shape))
    rows = [("sent", "bytes/clip", "prepare ms", "send ms", "normalise ms", "sum ms")]
    ways = (
        ("float32", pixels.floats, pixels.float_bytes),
        ("uint8", pixels.bytes, pixels.byte_bytes),
    )
    for name, steps, count in ways:
        times = {step: 1e3 * timing.median for step, timing in steps.items()}
        cells = [f"{times[step]:.2f}" if step in times else "-" for step in _STEPS]
        rows.append((name, f"{count:,}", *cells, f"{sum(times.values()):.2f}"))
    return "\n".join(
        [
            f"pixels {shape} to {pixels.device}: normalised on the CPU, or in the jitted step",
            *(f"  {line}" for line in format_table(rows)),
            f"  the two differ by up to {pixels.apart:.2e}",
        ]
    )
