# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax predict`: class scores of video files."""

import contextlib
import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import READ, Dtype, ReadOptions
from vivit_jax.console import FLAT, ConfigOption, joined
from vivit_jax.data.read_clip import parse_start
from vivit_jax.errors import UserError, printable
from vivit_jax.inference.classifier import VideoClassifier
from vivit_jax.progress import LiveLine, Pace


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


def predict(
    clips: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    *,
    model: str,
    config: ConfigOption = (),
    top_k: int = 5,
    read: Annotated[ReadOptions, FLAT] = READ,
    views: Annotated[ViewOptions, FLAT] = ViewOptions(),
    dtype: Dtype = "float32",
    json: bool = False,
) -> int:
    """Classify video files by one clip from the middle, or by several views.

    A file that cannot be read is reported on stderr, the others are still classified, and the exit
    status is 1. In Python this is `vivit_jax.VideoClassifier`.

    Args:
        clips: Video files, or .npy with frames [t, h, w, c], uint8 or float in [0, 1].
        model: Directory with config.json, weights and preprocessor_config.json, a weight file with
            both beside it, a hub id, or a file of VideoMAE's authors or scenic.
        top_k: How many classes to print.
        dtype: What the model computes in.
        json: Print a JSON list instead of text.
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
    source = open_model(model, changes)
    classifier = VideoClassifier.from_pretrained(source, dtype=dtype)
    how: dict[str, Any] = vars(read) | vars(views) | {"start": start}
    found = classifier.classify(clips, top_k=top_k, **how)
    results, failed, pace = [], False, Pace()
    with contextlib.closing(LiveLine("clips", len(clips), ends=False)) as progress:
        for number, result in enumerate(found, 1):
            results.append(_as_dict(result))
            if result.error is not None:
                failed = True
                reason = str(result.error)
                # Most errors begin with the path.
                named = reason.startswith((f"{result.clip}:", f"{result.clip} "))
                line = reason if named else f"{result.clip}: {reason}"
                progress.say(printable(line, one_line=True))
            elif not json:
                with progress.hidden():
                    print(_as_text(results[-1]), flush=True)
            pace.update(number)
            progress.update(number, pace.left(len(clips) - number) or "")
    if json:
        print(json_module.dumps(results, indent=2))
    return int(failed)


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
    frames, seen = result["frames"], "frames"
    if isinstance(frames[0], list):
        seen, frames = f"clips of {len(frames[0])} frames", sum(frames, [])
        count = len(result["frames"])
    else:
        count = len(frames)
    clip = printable(result["clip"], one_line=True)
    lines = [f"{clip} ({count} {seen} from {min(frames)} to {max(frames)})"]
    tables = {"": result["predictions"], **result.get("heads", {})}
    for name, predictions in tables.items():
        lines += [f"  {name}:"] if name else []
        for best in predictions:
            lines.append(f"  {best['score']:8.4f}  {printable(best['label'], one_line=True)}")
    return "\n".join(lines)
