# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax predict`: class scores of video files."""

import itertools
import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vivit_jax.errors import UserError


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
        clips: Video files, or .npy with frames [t, h, w, c], uint8 or float in [0, 1].
        model: Directory with config.json, weights and preprocessor_config.json, a weight file with
            both beside it, a hub id, or a file of VideoMAE's authors or scenic.
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

    from vivit_jax.data.clip import parse_start

    results, failed = [], False
    bar = tqdm(total=len(clips), unit="clip", disable=None if len(clips) > 1 else True)
    with bar:
        for result in classify(
            clips, model, top_k=top_k, stride=stride, start=parse_start(start), pad=pad
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
    """Yield one JSON-ready dict per clip: frame indices and the `top_k` classes, or the error.

    A model of several heads gives the `top_k` combinations, and under "heads" the classes of each.
    """
    import jax

    import vivit_jax
    from checkpoints_convert.layouts import architecture
    from checkpoints_convert.source import open_source
    from vivit_jax.cli.model import pixel_values_of, processor_of
    from vivit_jax.data.clip import read_clip

    # What is cheap to check comes before the weights.
    source = open_source(model)
    held = source.layout
    if held.head != "classification":
        raise UserError(
            f"{model} holds {architecture(held.family, held.head)}, which has no classifier; "
            "predict needs a model fine-tuned for classification"
        )
    processor = processor_of(source)
    module, params = vivit_jax.from_pretrained(model)
    config = module.config

    @jax.jit
    def scores(params, pixel_values):
        return _scores(config, module.apply({"params": params}, pixel_values).logits)

    for clip in clips:
        try:
            read = read_clip(clip, config, stride=stride, start=start, pad=pad)
        except vivit_jax.VideoError as error:
            yield {"clip": str(clip), "error": str(error)}
            continue
        values, heads = scores(params, pixel_values_of(read, processor))
        result = {
            "clip": str(clip),
            "frames": [int(i) for i in read.indices],
            "predictions": _best(values[0], top_k, config.labels, config.class_splits),
        }
        if heads:
            labels = iter(config.labels)
            named = zip(config.split_names, config.class_splits, heads, strict=True)
            result["heads"] = {
                name: _best(values[0], top_k, tuple(itertools.islice(labels, classes)))
                for name, classes, values in named
            }
        yield result


def _scores(config, logits):
    """Scores of every class, or of every combination of several heads' classes; of each head."""
    import jax

    from vivit_jax.train.losses import split_logits
    from vivit_jax.train.metrics import action_scores

    splits = config.class_splits
    if splits is not None:
        heads = tuple(map(jax.nn.softmax, split_logits(logits, splits)))
        return action_scores(logits, splits), heads
    scores_of = {
        "multi_label_classification": jax.nn.sigmoid,
        "regression": lambda logits: logits,
    }.get(config.problem_type, jax.nn.softmax)
    return scores_of(logits), ()


def _best(values, top_k: int, labels, splits=None) -> list[dict]:
    """The largest scores with their labels; a combination has an index and a label per head."""
    import numpy as np

    values = np.asarray(values)
    predictions = []
    for place in np.argsort(-values, kind="stable")[:top_k]:
        index = int(place)
        if splits is None:
            label = labels[index]
        else:
            index = [int(i) for i in np.unravel_index(place, splits)]
            starts = np.cumsum((0, *splits[:-1]))
            label = ", ".join(labels[s + i] for s, i in zip(starts, index, strict=True))
        predictions.append({"label": label, "index": index, "score": float(values[place])})
    return predictions


def _as_text(result: dict) -> str:
    frames = result["frames"]
    lines = [f"{result['clip']} ({len(frames)} frames from {frames[0]} to {frames[-1]})"]
    tables = {"": result["predictions"], **result.get("heads", {})}
    for name, predictions in tables.items():
        lines += [f"  {name}:"] if name else []
        lines += [f"  {best['score']:8.4f}  {best['label']}" for best in predictions]
    return "\n".join(lines)
