# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax extract`: features of untrimmed videos, from a sliding window."""

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import Dtype
from vivit_jax.console import FLAT, ConfigOption, PlaceOption, joined
from vivit_jax.data.datasets.folders import clips_below
from vivit_jax.data.sliding_window import plan_windows
from vivit_jax.errors import UserError, VideoError, counted, printable
from vivit_jax.files.addresses import Address, Place
from vivit_jax.files.atomic import check_directory, check_output, whole_file
from vivit_jax.files.reading import exists, is_directory, is_file, size_of
from vivit_jax.files.staging import made_parents
from vivit_jax.files.storage import download, state
from vivit_jax.inference.feature_file import SUFFIXES, RowWriter, changed, read_metadata
from vivit_jax.inference.features import check_features, extract_features, has_head
from vivit_jax.param_tree import params_hash
from vivit_jax.progress import LiveLine, Pace
from vivit_jax.version import __version__

# These endings mean a file, which is refused. Others, as in run.v1, may be a directory's.
_OTHER_FILES = (".npy", ".h5", ".hdf5", ".pt", ".pth", ".pkl", ".csv", ".json", ".parquet", ".mp4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What a row of features is.

    Attributes:
        layer: last (after the final norm, if there is one), 0 (the embedding) to the number of
            blocks, or temporal:N for the second stage of a factorised encoder.
        pool: mean of all tokens except class tokens; cls, the class token; tokens, all of them,
            [rows, l, d]; head, the input of a classifier, also for an encoder of VideoMAE V2
            without one. A numbered layer of a factorised encoder has tokens [t, s, d] and a class
            token for each time step.
        frame_stride: Frames between a window's frames. Default: the model's, as in its
            training.
        window_stride: Frames between the starts of windows, or seconds such as 0.5s: a window then
            starts at the first frame shown at its time or later. Default: windows do not overlap
            and leave no gap.
        pad: What to do with frames left over at the end, and with a video shorter than a window:
            drop leaves them out, and a short video is an error; repeat_last adds a window that
            repeats the last frame.
        dtype: Of the computation and of the features. An .npz has no bfloat16 and holds the same
            values as float32.
        exact: Compute one window at a time on every device, so that no bit depends on batch_size.
    """

    layer: str = "last"
    pool: Literal["mean", "cls", "tokens", "head"] = "mean"
    frame_stride: int | None = None
    window_stride: str | None = None
    pad: Literal["drop", "repeat_last"] = "drop"
    dtype: Dtype = "float32"
    exact: bool = False


def extract(
    videos: Annotated[tuple[PlaceOption, ...], tyro.conf.Positional],
    /,
    *,
    model: str,
    out: PlaceOption,
    config: ConfigOption = (),
    features: Annotated[FeatureOptions, FLAT] = FeatureOptions(),
    batch_size: int = 8,
    format: Literal["safetensors", "npz"] | None = None,
    overwrite: bool = False,
) -> int:
    """Write features of whole videos, from a sliding window.

    A file has a row for each position of the window, in the arrays features [rows, d],
    frame_indices [rows, frames of a window] and frame_seconds of the same shape, from the video's
    first frame, and its settings as JSON. Memory grows with the length of a video only by an index
    of its packets. A video is skipped if its file exists, is undamaged and was made the same way,
    so an interrupted list can be continued. A video that cannot be read is reported on stderr, the
    others are still done, and the exit status is 1. In Python this is `vivit_jax.extract_features`.

    Args:
        videos: Video files, or directories of videos or with folders of them; here, or at gs://,
            s3:// or https://.
        model: Directory with config.json, weights and preprocessor_config.json, a weight file with
            both beside it, a hub id, or a file of VideoMAE's authors or scenic; with any head.
        out: For one video, a .safetensors or .npz file; or a directory, in which each video gets a
            file named after it. Videos of a directory keep their folders, as do files of one name.
        batch_size: Windows that go through the model together. On a CPU they go one by one and no
            bit depends on it; elsewhere rounding does.
        format: Format of the files in a directory. Default: safetensors.
        overwrite: Replace files that exist.
    """
    changes = joined(config)  # first: a video placed after --config is parsed as a setting
    jobs = _outputs(videos, out, format)
    if batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {batch_size}")

    source = open_model(model, changes, dtype=features.dtype)
    how = vars(features).copy()
    exact = how.pop("exact") or jax.default_backend() == "cpu"
    dtype, layer, pool = how.pop("dtype"), features.layer, features.pool
    plan_windows(source.config, features.frame_stride, features.window_stride, features.pad)
    processor = processor_of(source)
    to_head = has_head(source.head, source.family, source.stored.pooler)
    check_features(source.config, processor, layer, pool, has_head=to_head)

    # A scan would compute the blocks after the layer too.
    net, params = from_pretrained(source, dtype=dtype, scan_layers=layer == "last")
    settings = _settings(net.config, params, processor, how | {"exact": exact})
    if not overwrite:
        jobs = [job for job in jobs if not _is_done(*job, settings)]
    failed, listing = False, _Listing([video for video, _ in jobs])
    for video, path in jobs:
        rows = functools.partial(
            extract_features,
            *(net, params, processor, video),
            **how,
            batch_size=batch_size,
            exact=exact,
        )
        try:
            with listing.of(video) as progress:
                done = _write(video, path, rows, {"model": model, "settings": settings}, progress)
        except VideoError as error:
            failed = True
            print(printable(str(error)), file=sys.stderr)
        else:
            print(f"{done}{listing.rest()}", flush=True)
    return int(failed)


class _Listing:
    """Progress over a list of videos: of one by its frames, of all by their bytes."""

    def __init__(self, videos: Sequence[Place]):
        # A missing file counts 0 bytes; reading it raises the error.
        self._sizes = {v: size_of(v) if is_file(v) else 0 for v in videos}
        self._count, self._number = len(videos), 0
        self._pace, self._behind, self._total = Pace(), 0, sum(self._sizes.values())

    @contextlib.contextmanager
    def of(self, video: Place) -> Iterator[Callable[[int, int], None]]:
        """Yields the function to call with the video's frames so far and those announced."""
        self._number += 1
        size, share, pace, line = self._sizes[video], 0.0, Pace(), None
        begun = time.monotonic()
        place = f"[{self._number}/{self._count}] " if self._count > 1 else ""

        def progress(frames: int, announced: int) -> None:
            nonlocal line, share
            if line is None:
                name = f"{place}{video.name}, frame"
                line = LiveLine(name, announced, ends=False, since=begun)
            share = min(1.0, frames / max(announced, 1))
            now = self._behind + size * share
            pace.update(frames)
            self._pace.update(now)
            parts = [pace.rate and f"{pace.rate:.0f} frames/s", pace.left(announced - frames)]
            everything = self._pace.left(self._total - now)
            if self._count > 1 and everything:
                parts.append(f"all videos: {everything}")
            line.update(frames, "  ".join(filter(None, parts)))

        try:
            yield progress
        except BaseException:
            self._total -= size * (1 - share)
            raise
        else:
            share = 1.0
        finally:
            self._behind += size * share
            if line is not None:
                line.close()

    def rest(self) -> str:
        """The end of the line on a finished video: how much of the list is left."""
        more = self._count - self._number
        time_left = self._pace.left(self._total - self._behind)
        return f"; {more} more" + (f", {time_left}" if time_left else "") if more else ""


def _outputs(videos: Sequence[Place], out: Place, format: str | None) -> list[tuple[Place, Place]]:
    """Each video and its file. Raises UserError."""
    if not videos:
        raise UserError("extract needs at least one video file")
    places, suffix = _places(videos), out.suffix.lower()
    if suffix in SUFFIXES and not is_directory(out):
        if len(places) > 1:
            raise UserError(f"--out {out} is one file, for {len(places)} videos; name a directory")
        if format not in (None, suffix[1:]):
            raise UserError(f"--out {out} and --format {format} contradict each other; leave one")
        check_output(out, SUFFIXES, overwrite=True)
        return [(places[0][0], out)]
    if exists(out) and not is_directory(out):
        raise UserError(
            f"--out {out} is a file; expected a directory, or for one video a file name that ends "
            f"in {' or '.join(SUFFIXES)}"
        )
    if suffix in _OTHER_FILES and not is_directory(out):
        raise UserError(
            f"--out {out} ends in {suffix!r}; expected {' or '.join(SUFFIXES)}, or a directory "
            "(create one of this name first)"
        )
    jobs: dict[Place, Place] = {}
    for video, place in places:
        path = out / place.parent / f"{place.stem}.{format or 'safetensors'}"
        if path in jobs:
            raise UserError(
                f"{jobs[path]} and {video} would both be written to {path}; rename one, or choose "
                "another --out for it"
            )
        jobs[path] = video
    for folder in {path.parent for path in jobs}:
        check_directory(folder, [path.name for path in jobs if path.parent == folder])
    return [(video, path) for path, video in jobs.items()]


def _places(given: Sequence[Place]) -> list[tuple[Place, Path]]:
    """Each video with its place below --out, named after it.

    Videos in directories keep their path below these, or below the folder that these have in
    common. Other videos go by their names alone, unless two of one name lie in different folders:
    then these keep their path below the folder that they have in common. Videos of storage keep
    their path below the directory that is given, or go by their names.
    """
    found: list[tuple[Place, Path]] = []
    for remote in (path for path in given if isinstance(path, Address)):
        if not remote.is_dir():
            found.append((remote, Path(remote.name)))
            continue
        for clip in clips_below(str(remote)):
            found.append((Address(clip), Path(clip.removeprefix(f"{remote}/"))))
    return found + _local_places([path for path in given if isinstance(path, Path)])


def _local_places(given: Sequence[Path]) -> list[tuple[Place, Path]]:
    places: list[tuple[Place, Path]]
    folders = [path for path in given if path.is_dir()]
    files = [path for path in given if not path.is_dir()]
    if len({path.name for path in files}) < len(set(files)):
        top = _common([path.parent for path in files])
        places = [(path, Path(os.path.relpath(path, top))) for path in files]
    else:
        places = [(path, Path(path.name)) for path in files]
    top = _common(folders)
    for folder in folders:
        clips = clips_below(str(folder))
        places += [(Path(clip), Path(os.path.relpath(clip, top))) for clip in clips]
    return places


def _common(folders: Sequence[Path]) -> str:
    return os.path.commonpath([os.path.abspath(folder) for folder in folders]) if folders else ""


def _settings(config, params, processor, how: dict[str, Any]) -> dict[str, Any]:
    """Everything the numbers depend on except video and device, as JSON values."""
    named = {k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id")}
    frame_stride = how["frame_stride"] or config.frame_stride
    stride = how["window_stride"] or config.num_frames * frame_stride
    return how | {
        "frame_stride": frame_stride,
        "window_stride": _plain_stride(str(stride)),
        "num_frames": config.num_frames,
        "dtype": config.dtype,
        "params_sha256": params_hash(params),
        "config": named,
        "processor": processor.to_dict(),
    }


def _plain_stride(text: str) -> str:
    """A window stride in its plainest form: .5s and 0.50s become 0.5s, 08 becomes 8."""
    if text.endswith("s"):
        return str(float(text[:-1])).removesuffix(".0") + "s"
    return str(int(text))


def _state(video: Place) -> dict[str, int | str]:
    """Size and time of the file, or its tag in storage, by which a change is recognised."""
    if isinstance(video, Address):
        return state(str(video))._asdict()
    file = video.stat()
    return {"bytes": file.st_size, "mtime_ns": file.st_mtime_ns}


def _is_done(video: Place, path: Place, settings: dict[str, Any]) -> bool:
    """Whether the file holds what would be written. Raises UserError if it holds something else."""
    if not path.exists() or not exists(video):
        return False
    try:
        with _copy_of(path) as file:
            made, damaged = read_metadata(file), changed(file)
    except UserError as error:
        raise UserError(f"{error}; pass --overwrite, or name another --out") from error
    now = {**settings, "video": _state(video)}
    before = {**made.get("settings", {}), "video": made.get("video", {}).get("file")}
    others = [name for name in sorted(now.keys() | before) if now.get(name) != before.get(name)]
    if others:
        changes = ", ".join(
            name
            if isinstance(now.get(name), dict) or name == "params_sha256"
            else f"{name} ({before.get(name)}, now {now.get(name)})"
            for name in others
        )
        raise UserError(
            f"{path} exists and was made with another {changes}; pass --overwrite, or name another "
            "--out"
        )
    if damaged:
        raise UserError(
            f"{path} is damaged: {', '.join(damaged)} not as it was written; remove it or pass "
            "--overwrite"
        )
    if damaged is None:
        print(f"{path} has no checksums; damage in it goes unnoticed", file=sys.stderr)
    print(f"{video}: already in {path}")
    return True


@contextlib.contextmanager
def _copy_of(path: Place) -> Iterator[Path]:
    """The file here that a place names, or a copy of it."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="vivit-jax-") as directory:
        download(str(path), Path(directory, path.name))
        yield Path(directory, path.name)


def _write(
    video: Place,
    path: Place,
    rows_of: Callable[..., Iterator[Any]],
    made: dict[str, Any],
    progress: Callable[[int, int], None],
) -> str:
    """Write a video's file atomically; returns a line on it."""
    started, done = time.monotonic(), 0
    row_shape: tuple[int, ...] = ()

    def count(frames: int, announced: int) -> None:
        nonlocal done
        done = frames
        progress(frames, announced)

    rows = rows_of(progress=count)
    state = _state(video)
    parents = made_parents(path) if isinstance(path, Path) else contextlib.nullcontext()
    with parents, whole_file(path) as partial, RowWriter(partial) as file:
        for row in rows:
            features = row.features
            row_shape = features.shape
            if features.dtype.name == "bfloat16" and path.suffix.lower() == ".npz":
                features = features.astype(np.float32)
            file.add(
                features=features,
                frame_indices=row.frame_indices,
                frame_seconds=row.frame_seconds,
            )
        about = {"path": str(video), "frames": done, "file": state}
        file.finish(made | {"video": about, "vivit_jax": __version__})
    seconds = time.monotonic() - started
    shape = "x".join(map(str, (file.rows, *row_shape)))
    return (
        f"{video}: {shape} features of {counted(done, 'frame')} in {seconds:.1f} s "
        f"({done / seconds:.0f} frames/s), written to {path}"
    )
