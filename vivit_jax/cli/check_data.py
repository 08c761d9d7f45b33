# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax check-data`: what a data set holds, and what is wrong with it, before training."""

import contextlib
import dataclasses
import json as json_module
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import tyro

from vivit_jax.cli.check_sheet import contact_sheet
from vivit_jax.cli.check_text import (
    CHECK,
    CheckOptions,
    as_dict,
    as_text,
    finding_dict,
    finding_line,
)
from vivit_jax.cli.options import SourceOptions
from vivit_jax.console import FLAT, PlaceOption
from vivit_jax.data.datasets.check import (
    LEVELS,
    Finding,
    Report,
    Span,
    check_dataset,
)
from vivit_jax.data.datasets.dataset import Dataset, names_shards
from vivit_jax.data.datasets.hold_out import write_list
from vivit_jax.data.packing.verify import changed_clips
from vivit_jax.data.settings import DataSettings
from vivit_jax.errors import UserError, WriteError, counted
from vivit_jax.files.addresses import Place
from vivit_jax.files.atomic import check_output, whole_file, write_json
from vivit_jax.files.reading import exists
from vivit_jax.progress import live_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipOptions(SourceOptions):
    """The clips to check.

    Attributes:
        labels: Labels in each line of a list. 0 checks clips for pre-training, which needs none.
    """

    labels: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Files to write.

    Attributes:
        draw: Picture (.png) of the middle frames of some clips of each class.
        json: File for everything found, with all clips concerned; - prints it instead of the text.
        write_split: Two list files (.csv or .txt), for training and validation, with the suggested
            split. Paths in them are absolute, and classes stand by name.
        overwrite: Replace these files.
    """

    draw: Path | None = None
    json: Path | None = None
    write_split: tuple[Path, Path] | None = None
    overwrite: bool = False


def check_data(
    data: Annotated[PlaceOption, tyro.conf.Positional],
    /,
    *,
    source: Annotated[ClipOptions, FLAT] = ClipOptions(),
    check: Annotated[CheckOptions, FLAT] = CHECK,
    output: Annotated[OutputOptions, FLAT] = OutputOptions(),
) -> int:
    """Check a data set before training: classes, damage, copies.

    Opens every clip, and decodes only what that needs. The most serious findings come first, each
    with what helps. The exit status is 1 if training would stop, and 0 if it would run, whatever
    else was found.

    Args:
        data: A list file with a path and a label in each line, a directory with a folder for each
            class, or a directory of clips.
    """
    _check_options(data, source, check, output)
    to_stdout = str(output.json) == "-"
    with _collected_warnings() as warnings:
        try:
            dataset, others = _listed(data, source)
        except UserError as error:
            return _not_read(error, output.json, to_stdout)
        whole = source.split is None and not others
        changed = _changed(str(data), check) if check.checksums else []
        report = _checked(dataset, check, labelled=source.labels > 0, holds_out=whole)
        report = _with_findings(report, [*others, *changed])
        drawn = output.draw is not None and _draw(report, output.draw, check.threads)
    if warnings:
        text = f"{counted(len(warnings), 'warning')} while reading"
        report = _with_findings(report, [Finding("warning", text, "", tuple(warnings))])

    if to_stdout:
        print(json_module.dumps(as_dict(report, check), indent=2))
    else:
        print(as_text(report, check))
        if output.json is not None:
            write_json(output.json, as_dict(report, check))
    if output.write_split is not None:
        write_split(report, output.write_split, source)
    if not to_stdout:
        for path in (output.draw if drawn else None, output.json, *(output.write_split or ())):
            if path is not None:
                print(f"written to {path}")
    return 0 if report.trains else 1


def _with_findings(report: Report, more: list[Finding]) -> Report:
    findings = sorted((*report.findings, *more), key=lambda each: LEVELS.index(each.level))
    return dataclasses.replace(report, findings=tuple(findings))


def _changed(data: str, check: CheckOptions) -> list[Finding]:
    """The clips of a pack whose content is not what was packed."""
    with live_line("checksums") as progress:
        clips = changed_clips(data, check.threads, progress)
    text = f"{counted(len(clips), 'clip')} of other content than was packed, by the checksums"
    return [Finding("warning", text, "get the shards again", tuple(clips))] if clips else []


def _check_options(
    data: Place, source: ClipOptions, check: CheckOptions, output: OutputOptions
) -> None:
    for name in ("frames", "stride", "threads"):
        if getattr(check, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(check, name)}")
    for flag, value in (("labels", source.labels), ("first-frame", source.first_frame)):
        if value < 0:
            raise UserError(f"--{flag} must be at least 0, got {value}")
    if not 0 < check.validation < 1:
        raise UserError(f"--validation must be between 0 and 1, got {check.validation:g}")
    if not exists(data) and not names_shards(str(data)):
        raise UserError(f"{data}: no such file or directory; name a list file or a directory")
    if output.draw is not None:
        check_output(output.draw, (".png",), output.overwrite, flag="--draw")
    if output.json is not None and str(output.json) != "-":
        check_output(output.json, (".json",), output.overwrite, flag="--json")
    for path in output.write_split or ():
        check_output(path, (".csv", ".txt"), output.overwrite, flag="--write-split")
        if isinstance(data, Path) and os.path.exists(path) and os.path.samefile(path, data):
            raise UserError(f"--write-split {path} is the data set itself; choose another name")
    if output.write_split and len({path.absolute() for path in output.write_split}) == 1:
        raise UserError(f"--write-split names {output.write_split[0]} twice; name two files")


def _listed(data: Place, source: ClipOptions) -> tuple[Dataset, list[Finding]]:
    """The clips, and a note where they are those of one split, which training takes."""
    try:
        return source.listed(data, source.labels), []
    except UserError:
        if source.split is not None:
            raise
        split = DataSettings().train_split
        try:
            dataset = dataclasses.replace(source, split=split).listed(data, source.labels)
        except UserError:
            pass  # the first error says more
        else:
            text = f"these are the clips of split {split}, which training takes"
            return dataset, [Finding("note", text, "--split validation checks the others")]
        raise


def _not_read(error: UserError, json: Path | None, to_stdout: bool) -> int:
    """Report a data set that cannot be listed, at which training would stop too."""
    values = {"trains": False, "findings": [finding_dict(Finding("stop", str(error), ""))]}
    if to_stdout:
        print(json_module.dumps(values, indent=2))
    else:
        print(f"{finding_line('stop', str(error))}\n\ntraining would stop")
        if json is not None:
            write_json(json, values)
            print(f"written to {json}")
    return 1


def _checked(dataset: Dataset, check: CheckOptions, labelled: bool, holds_out: bool) -> Report:
    with (
        live_line("clips") as inspected,
        live_line("comparing files") as compared,
    ):
        return check_dataset(
            dataset,
            span=Span(check.frames, check.stride),
            labelled=labelled,
            validation=check.validation,
            holds_out=holds_out,
            decode=check.decode,
            threads=check.threads,
            progress=(inspected, compared),
        )


class _Collector(logging.Handler):
    def __init__(self, found: list[str]):
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(record.getMessage())


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """The warnings of readers, which would otherwise break up the live line."""
    logger, found = logging.getLogger("vivit_jax.data"), []
    handler, own = _Collector(found), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.propagate = own
        logger.removeHandler(handler)


def write_split(report: Report, paths: tuple[Path, Path], source: ClipOptions) -> None:
    """Write the suggested split as two lists, which read back as the same clips.

    UserError if there is nothing to hold out, or a path that a list cannot hold.
    """
    if not report.validation:
        raise UserError("--write-split: no clip can be held out, so that nothing was written")
    if source.labels and not report.dataset.labels_per_example:
        raise UserError("--write-split: the clips have no labels; for pre-training pass --labels 0")
    how = dict(labels=source.labels, frame_name=source.frame_name, first_frame=source.first_frame)
    with contextlib.ExitStack() as files:
        for path, side in zip(paths, (report.train, report.validation), strict=True):
            examples = tuple(report.clips[i].example for i in side)
            clips = dataclasses.replace(report.dataset, examples=examples)
            partial = files.enter_context(whole_file(path))
            try:
                write_list(partial, clips, **how)
            except WriteError:
                raise
            except UserError:
                raise UserError(
                    f"--write-split {path}: a list cannot hold a path with a line break, or blanks "
                    "at its end; rename the file"
                ) from None


def _draw(report: Report, path: Path, threads: int) -> bool:
    """Draw the contact sheet; whether there was anything to draw."""
    if all(each.error is not None for each in report.clips):
        print("--draw: no clip can be read, so that nothing is drawn", file=sys.stderr)
        return False
    picture = contact_sheet(report, threads)
    with whole_file(path) as partial:
        picture.save_png(partial)
    return True
