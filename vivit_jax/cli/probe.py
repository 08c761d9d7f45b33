# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax probe`: a head on a frozen model's features, and how well they tell classes apart."""

import dataclasses
from pathlib import Path
from typing import Annotated

from checkpoints_convert.processor import processor_of
from vivit_jax.cli.evaluate import ViewOptions, check_views, chosen_views
from vivit_jax.cli.model import open_model
from vivit_jax.cli.options import SourceOptions, validation_share
from vivit_jax.console import FLAT, ConfigOption, PlaceOption, joined
from vivit_jax.errors import UserError, printable
from vivit_jax.inference.probe import RESULT, check_out, check_settings, probe
from vivit_jax.inference.probe_data import sides_of
from vivit_jax.inference.probe_record import PROBE, Probe, ProbeSettings
from vivit_jax.progress import format_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(SourceOptions):
    """The labelled clips.

    Attributes:
        data: A list file with a path and a label in each line or in columns, or a directory with a
            folder for each class.
        validation: Held-out clips: a list file or directory of their own; or the share of each
            class of --data to hold out, such as 0.2; or none, as 0. Default: the validation clips
            of --data with splits (rows of a list, or folders train and val), else 0.2.
    """

    data: PlaceOption
    validation: str | None = None


VIEWS = ViewOptions()  # the defaults


def probe_command(
    *,
    model: str,
    out: Path,
    config: ConfigOption = (),
    data: Annotated[DataOptions, FLAT],
    views: Annotated[ViewOptions, FLAT] = VIEWS,
    settings: Annotated[ProbeSettings, FLAT] = PROBE,
    overwrite: bool = False,
) -> int:
    """Train a classifier on a frozen model's features, and print how good they are.

    Features are computed once; an interrupted probe goes on with the same command. Cross-validation
    on the training clips chooses the regularisation, held-out clips are scored once, and k nearest
    neighbours say what the features do without training. OUT/model is an ordinary model, which
    predict, evaluate and, with a linear head, transformers open; all numbers are in OUT/probe.json.

    Args:
        model: Directory, weight file or hub id, with any head, and its preprocessor_config.json.
        out: Directory to write: new, or that of an interrupted probe.
        overwrite: Replace the model and numbers of a finished probe.
    """
    check_settings(settings)
    check_out(out, overwrite)
    check_views(views)
    if data.first_frame < 0:
        raise UserError(f"--first-frame must be at least 0, got {data.first_frame}")
    held_out = data.validation
    share = None if held_out is None else validation_share(held_out)
    source = open_model(model, joined(config), dtype=settings.dtype)
    chosen = chosen_views(views, source.config, processor_of(source))
    data.check_split(data.data)
    sides = sides_of(
        data.data,
        held_out if share is None else share,
        seed=settings.seed,
        split=data.split or "train",
        root=data.root,
        frame_name=data.frame_name,
        first_frame=data.first_frame,
        class_names=data.class_names,
    )
    found = probe(
        source, sides, out, views=chosen, settings=settings, overwrite=overwrite, say=_said
    )
    print("\n" + as_text(found))
    return 0


def _said(line: str) -> None:
    print(line, flush=True)


def as_text(found: Probe) -> str:
    """The result as text: cross-validation, accuracies, and what else is worth knowing."""
    parts = []
    if found.trials:
        rows = [("weight decay", f"accuracy, {found.folds} folds", "loss", "")]
        for trial in found.trials:
            chosen = "chosen" * (trial.weight_decay == found.weight_decay)
            row = (f"{trial.weight_decay:g}", f"{trial.accuracy:.1%}", f"{trial.loss:.3f}", chosen)
            rows.append(row)
        parts.append("\n".join(format_table(rows)))
    parts.append("\n".join(format_table(_accuracies(found))))
    if found.notes:
        parts.append("\n".join(f"note: {printable(note, one_line=True)}" for note in found.notes))
    if found.unreadable:
        lines = [f"left out {_with_path(*item)}" for item in found.unreadable.items()]
        parts.append("\n".join(lines))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in found.seconds.items())
    parts.append(f"{seconds}; model in {found.model}, numbers in {found.model.parent / RESULT}")
    return "\n\n".join(parts)


def _accuracies(found: Probe) -> list[tuple[str, ...]]:
    neighbours = f"{found.k} nearest neighbour{'s' * (found.k > 1)}"
    rows = [("", "clips", f"{found.head} head", "standard error", neighbours, "chance")]
    sides = {"training": found.train, "held out": found.held_out}
    last = found.held_out or found.train
    for name, score in sides.items():
        if score is not None:
            error = f"{score.standard_error:.1%}" if score is found.held_out else ""
            chance = f"{found.chance:.1%}" if score is last else ""
            head, votes = f"{score.accuracy:.1%}", f"{score.neighbours:.1%}"
            rows.append((name, str(score.clips), head, error, votes, chance))
    return rows


def _with_path(path: str, error: str) -> str:
    return error if error.startswith(path) else f"{path}: {error}"
