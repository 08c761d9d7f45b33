# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax reconstruct`: a clip as a masked autoencoder reconstructs it."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.processor import processor_of
from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import READ, PictureOptions, ReadOptions
from vivit_jax.cli.panels import Panels, as_frames, channels_note, real_time
from vivit_jax.console import FLAT, ConfigOption, joined
from vivit_jax.data.read_clip import parse_start, read_clip
from vivit_jax.data.video.decode import frame_times
from vivit_jax.errors import UserError, counted
from vivit_jax.files.atomic import check_output, whole_file
from vivit_jax.inference.reconstruction import (
    ROWS_OF_COLUMNS,
    check_statistics,
    error_dict,
    error_table,
    rmse,
)
from vivit_jax.inference.reconstruction import reconstruct as predict_hidden
from vivit_jax.masking import MASKS
from vivit_jax.models.videomae import VideoMAEForPreTraining

SUFFIXES = (".png", ".mp4", ".gif")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """What is hidden of a clip.

    Attributes:
        mask_ratio: Share of the patches to hide.
        mask: tube hides the same places in every frame, random any; dual is a tube of whose hidden
            patches the decoder predicts half, by a running cell (VideoMAE V2).
        seed: Seed of the mask.
    """

    mask_ratio: float = 0.9
    mask: Literal["tube", "random", "dual"] = "tube"
    seed: int = 0


def reconstruct(
    clip: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    model: str,
    config: ConfigOption = (),
    picture: Annotated[PictureOptions, FLAT],
    mask: Annotated[MaskOptions, FLAT] = MaskOptions(),
    true_statistics: bool = False,
    read: Annotated[ReadOptions, FLAT] = READ,
) -> int:
    """Hide most of a clip and draw what a model makes of the rest.

    Draws the original, the visible rest and the reconstruction. A model trained with norm_pix_loss
    predicts patches without their mean and variance, which are estimated from visible patches:
    nothing hidden leaks into the picture. The error on hidden patches is printed beside that of two
    baselines: each patch flat at its mean, and a copy of the nearest visible patch.

    Args:
        clip: Video file, or .npy or .npz with frames [t, h, w, c] of any channel count, uint8 or
            float in [0, 1].
        model: Directory with config.json, weights and preprocessor_config.json, a weight file with
            both beside it, a hub id, or a file of VideoMAE's authors; with a pre-training head.
        true_statistics: Give each hidden patch its true mean and variance, as the papers' pictures
            do. The picture says so, because it shows more than the model knows.
    """
    out = picture.out
    check_output(out, SUFFIXES, picture.overwrite)
    if not 0 < mask.mask_ratio < 1:
        raise UserError(f"--mask-ratio must be between 0 and 1, got {mask.mask_ratio}")
    if mask.seed < 0:
        raise UserError(f"--seed must not be negative, got {mask.seed}")

    start = parse_start(read.start)
    changes = joined(config)
    source = _source(model, changes, true_statistics)
    chosen = draw_mask(mask.mask, mask.seed, 1, source.config.grid, mask.mask_ratio)
    processor = processor_of(source)
    found = read_clip(clip, source.config, stride=read.stride, start=start, pad=read.pad)
    pixel_values = found.pixel_values(processor)
    module, params = from_pretrained(source)
    assert isinstance(module, VideoMAEForPreTraining)
    result = predict_hidden(
        module, params, pixel_values, chosen, processor, true_statistics=true_statistics
    )
    errors = rmse([result])

    # Frames after the last whole tubelet are left out.
    indices = [int(i) for i in found.indices[: result.original.shape[1]]]
    still = out.suffix.lower() == ".png" or found.fps is None
    seconds = None if still else frame_times(clip, indices)
    panels = panels_of(
        result,
        title=f"{clip.name}, reconstructed from {1 - result.hidden.mean():.0%} of it",
        about=f"{' '.join((model, *changes))}; {mask.mask} mask of ratio {mask.mask_ratio:g}, "
        f"seed {mask.seed}",
        times=[f"frame {i}" for i in indices],
    )
    with whole_file(out) as partial:
        panels.save(partial, real_time(seconds, len(indices)))
    if picture.json:
        print(json_module.dumps(_summary(result, errors, clip, out, indices), indent=2))
        return 0
    print(
        f"{clip} ({counted(len(indices), 'frame')} from {indices[0]} to {indices[-1]}): "
        f"{_counts(result)}"
    )
    print("RMSE on predicted hidden patches, pixels in [0, 1]:")
    print("\n".join(f"  {line}" for line in error_table(errors)))
    for note in (_statistics_note(result)[0], channels_note(result.original.shape[-1])):
        if note:
            print(note)
    print(f"written to {out}")
    return 0


def draw_mask(kind: str, seed: int, batch: int, grid, ratio: float):
    """A mask of `kind` (tube, random, dual) for each clip of a batch, determined by `seed`."""
    return MASKS[kind](np.random.default_rng(seed), batch, grid, ratio)


def panels_of(result, *, title: str, about: str, times: list[str]):
    """The picture of all clips of a `vivit_jax.inference.reconstruction.Reconstruction`."""
    column = int(result.statistics == "true")
    errors = zip(ROWS_OF_COLUMNS[column], rmse([result])[:, column], strict=True)
    named = "; ".join(f"{name} {error:.3f}" for name, error in errors)
    note, leaks = _statistics_note(result)
    notes = [
        f"{about}: {_counts(result)}.",
        f"RMSE on the hidden patches shown, pixels in [0, 1]: {named}.",
    ]
    notes += [] if leaks else [note]
    if (result.hidden & ~result.predicted).any():
        notes.append("Hatched in the reconstruction: hidden and not predicted (dual mask).")
    notes += [text for text in [channels_note(result.original.shape[-1])] if text]
    return Panels(
        title=title,
        notes=notes,
        warning=note if leaks else None,
        labels=["original", "masked", "reconstruction"] * len(result.clips),
        clips=[
            as_frames(which[i], hatched)
            for i in range(len(result.clips))
            for which, hatched in (
                (result.original, False),
                (result.masked_clips, False),
                (result.clips, True),
            )
        ],
        times=times,
    )


def _source(model: str, changes: tuple[str, ...], true_statistics: bool):
    """The opened checkpoint, after cheap checks; weights are not read."""
    source = open_model(model, changes)
    if source.head != "pretraining":
        raise UserError(
            f"{model} holds {source.architecture}, which does not predict pixels; "
            "reconstruct needs a pre-trained VideoMAE with its decoder (VideoMAEForPreTraining)"
        )
    check_statistics(source.config, true_statistics)
    return source


def _counts(result) -> str:
    hidden, predicted = int(result.hidden[0].sum()), int(result.predicted[0].sum())
    text = f"{hidden} of {result.hidden.shape[1]} patches hidden"
    return text if predicted == hidden else f"{text}, {predicted} of them predicted"


def _statistics_note(result) -> tuple[str, bool]:
    """The source of the mean and variance of hidden patches, and whether it leaks."""
    return {
        "estimated": (
            "Mean and variance of each hidden patch are estimated from visible patches.",
            False,
        ),
        "true": (
            "Each hidden patch was given its TRUE mean and variance: its brightness, colour and "
            "contrast were not predicted by the model.",
            True,
        ),
        "none": (
            "The model predicts pixels directly, without statistics of hidden patches.",
            False,
        ),
    }[result.statistics]


def _summary(result, errors, clip: Path, out: Path, indices: list[int]) -> dict[str, Any]:
    return {
        "clip": str(clip),
        "out": str(out),
        "frames": indices,
        "patches": result.hidden.shape[1],
        "hidden": int(result.hidden.sum()),
        "predicted": int(result.predicted.sum()),
        "statistics": result.statistics,
        "rmse": error_dict(errors),
    }
