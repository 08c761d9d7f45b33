# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax predict`: class scores of video files."""

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vivit_jax.errors import ConfigError, UserError

# Frames between samples that the published recipes train with (Kinetics).
RECIPE_STRIDE = {"vivit": 2, "videomae": 4}


def predict(
    clips: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    *,
    model: str,
    top_k: int = 5,
    stride: int | None = None,
    start: str = "center",
    pad: Literal["error", "repeat_last", "loop"] = "error",
    json: bool = False,
) -> int:
    """Classify video files with one clip each, taken from the middle.

    A file that cannot be read is reported on stderr, the others are still classified, and the exit
    status is 1.

    Args:
        clips: Video files.
        model: Directory with config.json, weights and preprocessor_config.json, or a hub id.
        top_k: How many classes to print.
        stride: Frames between sampled frames. Default: the recipe's (ViViT 2, VideoMAE 4), less
            where the video is too short for it.
        start: Where the clip lies: begin, center, end, or the index of its first frame.
        pad: What to do with a video of fewer frames than the model takes.
        json: Print a JSON list instead of text.
    """
    if not clips:
        raise UserError("predict needs at least one video file")
    if top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {top_k}")
    from tqdm import tqdm

    results, failed = [], False
    bar = tqdm(total=len(clips), unit="clip", disable=None if len(clips) > 1 else True)
    with bar:
        for result in classify(
            clips, model, top_k=top_k, stride=stride, start=_start(start), pad=pad
        ):
            bar.update()
            results.append(result)
            if "error" in result:
                failed = True
                bar.write(f"{result['clip']}: {result['error']}", file=sys.stderr)
            elif not json:
                bar.write(_as_text(result))
    if json:
        print(json_module.dumps(results, indent=2))
    return int(failed)


def classify(clips, model: str, *, top_k: int, stride, start, pad) -> Iterator[dict]:
    """Yield one JSON-ready dict per clip: frame indices and the `top_k` classes, or the error."""
    import jax
    import numpy as np

    import vivit_jax
    from checkpoints_convert.layouts import architecture
    from checkpoints_convert.source import open_source

    # What is cheap to check comes before the weights.
    held = open_source(model).layout
    if held.head != "classification":
        raise UserError(
            f"{model} holds {architecture(held.family, held.head)}, which has no classifier; "
            "predict needs a model fine-tuned for classification"
        )
    processor = vivit_jax.VideoProcessor.from_pretrained(model)
    module, params = vivit_jax.from_pretrained(model)
    config = module.config
    scores_of = {
        "multi_label_classification": jax.nn.sigmoid,
        "regression": lambda logits: logits,
    }.get(config.problem_type, jax.nn.softmax)

    @jax.jit
    def scores(params, pixel_values):
        return scores_of(module.apply({"params": params}, pixel_values).logits[0])

    for clip in clips:
        try:
            indices = clip_indices(clip, config, stride=stride, start=start, pad=pad)
            frames = vivit_jax.read_video(clip, indices=indices)
        except vivit_jax.VideoError as error:
            yield {"clip": str(clip), "error": str(error)}
            continue
        values = np.asarray(scores(params, processor(frames)))
        best = np.argsort(-values, kind="stable")[:top_k]
        yield {
            "clip": str(clip),
            "frames": [int(i) for i in indices],
            "predictions": [
                {"label": config.labels[i], "index": int(i), "score": float(values[i])}
                for i in best
            ],
        }


def clip_indices(path, config, *, stride, start, pad):
    """Frame indices of the one clip that stands for a video file."""
    from vivit_jax.data import decode, sampling

    total = decode.probe_video(path).num_frames
    if stride is None:
        longest = (total - 1) // max(config.num_frames - 1, 1)
        stride = max(1, min(RECIPE_STRIDE[config.model_type], longest))
    return sampling.clip_indices(
        total, num_frames=config.num_frames, stride=stride, start=start, pad=pad
    )


def _start(text: str) -> str | int:
    if text in ("begin", "center", "end"):
        return text
    if text.isdecimal():
        return int(text)
    raise ConfigError(f"--start must be begin, center, end or a frame index, got {text!r}")


def _as_text(result: dict) -> str:
    frames = result["frames"]
    lines = [f"{result['clip']} ({len(frames)} frames from {frames[0]} to {frames[-1]})"]
    for prediction in result["predictions"]:
        lines.append(f"  {prediction['score']:8.4f}  {prediction['label']}")
    return "\n".join(lines)
