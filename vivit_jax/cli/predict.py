# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax predict`: class scores of video files."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import READ, Dtype, ReadOptions
from vivit_jax.cli.predict_picture import save_mp4, save_png
from vivit_jax.console import FLAT, ConfigOption, PlaceOption, joined
from vivit_jax.data.datasets.folders import VIDEOS, clips_below, ending
from vivit_jax.data.read_clip import parse_start
from vivit_jax.errors import UserError, counted, printable
from vivit_jax.files.addresses import Place
from vivit_jax.files.atomic import check_output, whole_file
from vivit_jax.files.reading import is_directory
from vivit_jax.inference.classifier import VideoClassifier
from vivit_jax.inference.timeline import check_drawable, score_over_time
from vivit_jax.progress import LiveLine, Pace, live_line

_DRAWN = 5  # labels of a picture, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Which views of a video are averaged into one answer.

    Attributes:
        num_clips: Clips along time, spread over the video as in the papers' tests.
        num_crops: Crops along the longer side, instead of one in the centre.
        average: What is averaged over the views. Default: softmax for VideoMAE, logits for ViViT.
        batch_size: Views that go through the model together.
        square_pixels: Scale videos whose pixels are not square, as players do.
    """

    num_clips: int = 1
    num_crops: int = 1
    average: Literal["softmax", "logits"] | None = None
    batch_size: int = 1
    square_pixels: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed and written.

    Attributes:
        json: Print a JSON list instead of text.
        csv: CSV file for the labels and scores: a row for each video.
        draw: Picture of one video with its labels over time, from a window that slides over all of
            it: .mp4 is the video with a bar for each label at its foot, .png a strip of frames
            above the curves.
        window_stride: Frames between the windows of --draw, or seconds such as 0.5s. Default: a
            quarter of a window.
        overwrite: Replace these files.
    """

    json: bool = False
    csv: PlaceOption | None = None
    draw: Path | None = None
    window_stride: str | None = None
    overwrite: bool = False


def predict(
    clips: Annotated[tuple[PlaceOption, ...], tyro.conf.Positional],
    /,
    *,
    model: str,
    config: ConfigOption = (),
    top_k: int = 5,
    read: Annotated[ReadOptions, FLAT] = READ,
    views: Annotated[ViewOptions, FLAT] = ViewOptions(),
    dtype: Dtype = "float32",
    output: Annotated[OutputOptions, FLAT] = OutputOptions(),
) -> int:
    """Classify video files by one clip from the middle, or by several views.

    Files that cannot be read are named on stderr at the end, the others are still classified, and
    the exit status is 1. In Python this is `vivit_jax.VideoClassifier`.

    Args:
        clips: Video files, .npy or .npz with frames [t, h, w, c], uint8 or float in [0, 1], folders
            of images, or directories, of which all videos are classified, also those in folders
            below.
        model: Directory with config.json, weights and preprocessor_config.json, a weight file with
            both beside it, a hub id, or a file of VideoMAE's authors or scenic.
        top_k: How many classes to print.
        dtype: What the model computes in.
    """
    changes = joined(config)  # first: a clip placed after --config is parsed as a setting
    if not clips:
        raise UserError("predict needs at least one video file")
    counts = {
        "--top-k": top_k,
        "--stride": 1 if read.stride is None else read.stride,
        "--num-clips": views.num_clips,
        "--num-crops": views.num_crops,
        "--batch-size": views.batch_size,
    }
    for flag, value in counts.items():
        if value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")

    start = parse_start(read.start)
    files = _files(clips)
    _check_output(output, files)
    source = open_model(model, changes)
    classifier = VideoClassifier.from_pretrained(source, dtype=dtype)
    if output.draw is not None:
        check_drawable(classifier, read.stride, output.window_stride)
    how: dict[str, Any] = vars(read) | vars(views) | {"start": start}
    found = classifier.classify(files, top_k=top_k, **how)
    results, failed, pace = [], [], Pace()
    with contextlib.closing(LiveLine("clips", len(files), ends=False)) as progress:
        for number, result in enumerate(found, 1):
            results.append(_as_dict(result))
            if result.error is not None:
                failed.append(_reason(result))
            elif not output.json:
                with progress.hidden():
                    print(_as_text(results[-1]), flush=True)
            pace.update(number)
            progress.update(number, pace.left(len(files) - number) or "")
    if output.json:
        print(json.dumps(results, indent=2))
    if output.csv is not None:
        with whole_file(output.csv) as partial:
            partial.write_text(_as_csv(results), encoding="utf-8", errors="backslashreplace")
    if output.draw is not None and not failed:
        _draw(output, classifier, files[0], top_k, read.stride, views.batch_size)
    if not output.json:
        for path in (output.csv, None if failed else output.draw):
            if path is not None:
                print(f"written to {path}")
    if failed and len(files) > len(clips):  # of a directory
        print(f"{len(failed)} of {len(files)} videos could not be read:", file=sys.stderr)
    for line in failed:
        print(line, file=sys.stderr)
    return int(bool(failed))


def _files(clips: tuple[Place, ...]) -> list[str]:
    """The files, and those below the directories. Raises UserError for a directory without any."""
    files: list[str] = []
    for clip in clips:
        path = os.fspath(clip)
        files += clips_below(path, images=True) if is_directory(clip) else [path]
    return files


def _check_output(output: OutputOptions, files: list[str]) -> None:
    if output.csv is not None:
        check_output(output.csv, (".csv",), output.overwrite, flag="--csv")
    if output.draw is None:
        if output.window_stride is not None:
            raise UserError("--window-stride is for the windows of --draw; give both, or neither")
        return
    check_output(output.draw, (".mp4", ".png"), output.overwrite, flag="--draw")
    if len(files) > 1:
        raise UserError(f"--draw draws one video, got {len(files)}; name one")
    if ending(files[0]) not in (*VIDEOS, ".webp"):
        raise UserError(f"--draw needs a video file, got {files[0]}; it has no times")
    if os.path.exists(output.draw) and os.path.samefile(output.draw, files[0]):
        raise UserError(f"--draw {output.draw} is the video itself; choose another name")


def _draw(
    output: OutputOptions,
    classifier: VideoClassifier,
    file: str,
    top_k: int,
    stride: int | None,
    batch_size: int,
) -> None:
    assert output.draw is not None
    with live_line("frames") as progress:
        timeline = score_over_time(
            classifier,
            file,
            top_k=min(top_k, _DRAWN),
            stride=stride,
            window_stride=output.window_stride,
            batch_size=batch_size,
            progress=progress,
        )
    save = save_mp4 if output.draw.suffix.lower() == ".mp4" else save_png
    with whole_file(output.draw) as partial:
        save(partial, Path(file), timeline)


def _reason(result) -> str:
    """Why a file could not be read, in a line that begins with its path."""
    reason = str(result.error)
    # Most errors begin with the path.
    named = reason.startswith((f"{result.clip}:", f"{result.clip} "))
    return printable(reason if named else f"{result.clip}: {reason}", one_line=True)


def _as_csv(results: list[dict]) -> str:
    """A row for each video: its path, labels and scores from the best on, and an error."""
    most = max((len(result.get("predictions", ())) for result in results), default=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pairs = [(f"label_{i}", f"score_{i}") for i in range(1, most + 1)]
    writer.writerow(["path", *itertools.chain.from_iterable(pairs), "error"])
    for result in results:
        cells: list[Any] = []
        for best in result.get("predictions", ()):
            cells += [best["label"], f"{best['score']:.6g}"]
        cells += [""] * (2 * most - len(cells))
        writer.writerow([result["clip"], *cells, result.get("error", "")])
    return text.getvalue()


def _as_dict(result) -> dict:
    """JSON values of a `classifier.Classified`; a single clip has one list of frames."""
    if result.error is not None:
        return {"clip": result.clip, "error": str(result.error)}
    frames = result.frames.tolist()
    values = {
        "clip": result.clip,
        "frames": frames[0] if len(frames) == 1 else frames,
        "predictions": result.predictions,
    }
    return values | ({"heads": result.heads} if result.heads else {})


def _as_text(result: dict) -> str:
    frames = result["frames"]
    if isinstance(frames[0], list):
        seen = f"{counted(len(frames), 'clip')} of {counted(len(frames[0]), 'frame')}"
        frames = sum(frames, [])
    else:
        seen = counted(len(frames), "frame")
    clip = printable(result["clip"], one_line=True)
    lines = [f"{clip} ({seen} from {min(frames)} to {max(frames)})"]
    tables = {"": result["predictions"], **result.get("heads", {})}
    for name, predictions in tables.items():
        lines += [f"  {name}:"] if name else []
        for best in predictions:
            lines.append(f"  {best['score']:8.4f}  {printable(best['label'], one_line=True)}")
    return "\n".join(lines)
