# SPDX-License-Identifier: Apache-2.0
"""A run's report.html: its curves, settings and evaluations in one self-contained file.

A new metric needs no change here: each number in metrics.jsonl gets a curve, and a column in the
table of evaluations. Metrics of training come from the step (`vivit_jax.train.step.make_step`, on
the device) and from `vivit_jax.train.clock` (times and rates, on the host), those of
evaluation from `vivit_jax.train.metrics` and `vivit_jax.train.evaluation`. `_PANELS` groups metrics
into charts with titles and units.
"""

import dataclasses
import datetime
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vivit_jax.data.datasets.dataset import Dataset
from vivit_jax.errors import UserError, counted
from vivit_jax.files.atomic import whole_file
from vivit_jax.files.json_files import read_json
from vivit_jax.files.reading import absolute
from vivit_jax.recipes import RECIPES, recipe_named
from vivit_jax.recipes.settings import to_dict
from vivit_jax.train.log import METRICS, read_metrics
from vivit_jax.train.metrics import TOP_K, checkpoint_score
from vivit_jax.train.pages.chart import Curve, escape, figure
from vivit_jax.train.pages.outcome_page import Shown, outcome_sections
from vivit_jax.train.pages.page import page, percent, table
from vivit_jax.train.pages.validation import read_validation
from vivit_jax.train.storage.run_directory import BAD_CLIPS, RECIPE, VALIDATION

REPORT = "report.html"
_OWN = ("kind", "step", "time")
_COUNTS = ("videos", "unreadable", "compilations")  # shown in tables, without a curve
_ROWS = 500  # of a table
# The directories of an absolute path, of which the last name stays.
_ABSOLUTE = re.compile(
    r"(?<![\w.~<:/\\])(?:/|[A-Za-z]:[\\/])(?:[^\s/\\<>:;,\"'()&]+[/\\])+(?=[^\s/\\])"
)


@dataclasses.dataclass(frozen=True)
class _Panel:
    """A chart of the metrics whose full name matches."""

    title: str
    names: str  # a regular expression
    unit: str = ""
    share: bool = False  # shown as per cent
    from_zero: bool = False
    noisy: bool = True


_PANELS = (
    _Panel("Loss", r"(.*_)?loss"),
    _Panel("Accuracy", r"(.*_)?accuracy(_top_\d+)?", "right answers", share=True),
    _Panel("Learning rate", "lr", from_zero=True, noisy=False),
    _Panel("Throughput", "clips_per_second", "clips per second", from_zero=True),
    _Panel("Waiting for data", "wait_share", "share of the time", share=True, from_zero=True),
    _Panel("Gradient norm", "gradient_norm", from_zero=True),
    _Panel("Step time", "step_seconds", "seconds", from_zero=True),
    _Panel("Compilation", "compile_seconds", "seconds", from_zero=True, noisy=False),
    _Panel("Most memory of a device", "device_memory_gib", "GiB", from_zero=True, noisy=False),
    _Panel("Model products of a device", "tflops_per_device", "TFLOP/s", from_zero=True),
    _Panel("Model FLOP utilisation", "mfu", "of the peak", share=True, from_zero=True),
)

_MARKED = ("Loss", "Accuracy")  # charts that show the best step


def write_report(directory: str | Path, validation: Dataset | None = None) -> Path:
    """Write report.html beside a run's metrics.jsonl and return its path.

    Shows every number over steps (training and evaluation share a chart where both measure it), the
    settings in recipe.json if that is there, those that differ from the published recipe first,
    what became of the held-out clips, and tables of evaluations and events. Frames of clips that
    were wrong come from their files, or from `validation`, where that data set is an object. Paths
    are relative. Raises UserError for files that are missing or damaged.
    """
    directory = Path(directory)
    lines = read_metrics(directory / METRICS)
    recipe = _read_json(directory / RECIPE)
    settings = dict(_fields(recipe))
    measured = [line for line in lines if line["kind"] != "event" and "notice" not in line]
    evaluations = [line for line in measured if line["kind"] == "evaluate"]
    best = best_step(evaluations)
    title = f"{settings.get('name') or directory.resolve().name}: training report"
    charts = "".join(_charts(measured, best))
    events = [line for line in lines if line["kind"] == "event" and "notice" not in line]
    relative = _Relative(recipe)
    sections = [
        ("What to look at", relative.text(_notices([e for e in lines if "notice" in e]))),
        ("Settings that differ from the recipe", relative.table(_differences(recipe))),
        ("Summary", table(_summary(measured, best))),
        ("Curves", f'<div class="charts">{charts}</div>' if charts else "<p>No metrics yet.</p>"),
        ("Evaluations", _lines_table(evaluations)),
        *_outcomes(directory / VALIDATION, evaluations, validation),
        ("Events", relative.text(_lines_table(events))),
        (
            "Clips that could not be read",
            relative.text(_bad_clips(_read_json(directory / BAD_CLIPS))),
        ),
        ("Settings", relative.table([*settings.items()])),
    ]
    path = directory / REPORT
    with whole_file(path) as partial:
        partial.write_text(page(title, sections), encoding="utf-8")
    return path


def best_step(evaluations: Sequence[Mapping[str, Any]]) -> int | None:
    """The step whose checkpoint is kept as the best, the latest of equal ones; None if unknown.

    By `checkpoint_score`.
    """
    scored = []
    for line in evaluations:
        numbers = {name: v for name, v in line.items() if isinstance(v, int | float)}
        score = checkpoint_score({"videos": 1, **numbers})
        if math.isfinite(score):
            scored.append((score, line["step"]))
    return max(scored)[1] if scored else None


def _notices(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the run noticed, above all else."""
    return "".join(
        f'<p class="notice">step {line["step"]:,}: '
        f"{escape(str(line.get('text', line['notice'])))}</p>"
        for line in lines
    )


def _differences(recipe: Mapping[str, Any]) -> list[list[str]]:
    """The settings of a run that its published recipe has otherwise: name, here, there."""
    name = recipe.get("name")
    if not isinstance(name, str) or name not in RECIPES:
        return []
    published = to_dict(recipe_named(name))
    here = dict(_fields({name: value for name, value in recipe.items() if name != "given"}))
    there = dict(_fields(json.loads(json.dumps(published))))
    rows = [
        [field, here.get(field) or "-", there.get(field) or "-"]
        for field in dict.fromkeys([*here, *there])
        if here.get(field) != there.get(field)
    ]
    return [["", "this run", f"recipe {name}"], *rows] if rows else []


class _Relative:
    """Texts without the directories of this machine: paths below the data are relative to it."""

    def __init__(self, recipe: Mapping[str, Any]):
        data = recipe.get("data")
        data = data if isinstance(data, Mapping) else {}
        given = [data.get(name) for name in ("root", "train", "validation")]
        roots = [absolute(each) for each in given if isinstance(each, str) and each]
        roots += [os.path.dirname(root) for root in roots if os.path.splitext(root)[1]]
        self._roots = sorted({f"{root}{os.sep}" for root in roots}, key=len, reverse=True)

    def text(self, text: str) -> str:
        for root in self._roots:
            text = text.replace(escape(root), "")
        return _ABSOLUTE.sub("", text)

    def table(self, rows: Sequence[Sequence[str]]) -> str:
        rows = [[row[0], *(_ABSOLUTE.sub("", cell) for cell in row[1:])] for row in rows]
        return table(rows)


def _outcomes(
    path: Path, evaluations: Sequence[Mapping[str, Any]], dataset: Dataset | None
) -> Iterator[tuple[str, str]]:
    """Sections on the clips of the best validation, if it is one of this run's."""
    if not path.exists():
        return
    found = read_validation(path)
    if found.step not in [line["step"] for line in evaluations]:
        return  # of steps that a run resumed before them has replaced
    shown = found.shown
    if dataset is not None:
        named = {absolute(example.path): example for example in dataset.examples}
        shown = [Shown(named.get(each.example.path, each.example), each.frames) for each in shown]
    protocol = f"step {found.step:,}, {found.protocol}"
    for head in found.heads:
        yield from outcome_sections(head, shown, protocol, TOP_K)


def _read_json(path: Path) -> dict[str, Any]:
    """A file of a run; {} if there is none."""
    if not path.exists():
        return {}
    hint = "restore or remove it"
    values = read_json(path, hint=hint)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object; {hint}")
    return values


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A recipe's settings as text by dotted name."""
    if isinstance(value, Mapping) and (value or not name):
        for inner, part in value.items():
            yield from _fields(part, f"{name}.{inner}" if name else inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _bad_clips(found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    counts = found.get("left_out"), found.get("read")
    lists = found.get("clips"), found.get("validation", {})
    if not all(isinstance(clips, dict) for clips in lists) or {*map(type, counts)} != {int}:
        raise UserError(f"{BAD_CLIPS}: expected clips and the numbers left_out and read")
    count = f"{found['left_out']:,} of {counted(found['read'], 'read')} of clips failed"
    text = ""
    for clips, what in (
        (found["clips"], f"{count}; clips: "),
        (found.get("validation", {}), "Clips missing from the last validation: "),
    ):
        rows = sorted((clip, str(reason)) for clip, reason in clips.items())
        cut = f"; the first {_ROWS:,} are listed" if len(rows) > _ROWS else ""
        if rows:
            text += f"<p>{what}{len(rows):,}{cut}.</p>"
            text += table(rows[:_ROWS], ["clip", "reason"])
    return text


def _summary(lines: Sequence[Mapping[str, Any]], best: int | None) -> list[tuple[str, str]]:
    """How far the run got, how long it took, and its last metrics."""
    if not lines:
        return []
    start, end = (datetime.datetime.fromtimestamp(lines[i]["time"]) for i in (0, -1))
    rows = [
        ("last step", f"{max(line['step'] for line in lines):,}"),
        ("first report", start.isoformat(" ", "seconds")),
        ("last report", f"{end.isoformat(' ', 'seconds')}, {str(end - start).split('.')[0]} later"),
    ]
    train, evaluate = ([e for e in lines if e["kind"] == kind] for kind in ("train", "evaluate"))
    chosen = [("last of training", train[-1:]), ("last evaluation", evaluate[-1:])]
    if best is not None:
        found = [line for line in evaluate if line["step"] == best]
        chosen.append((f"best evaluation, step {best:,}", found[-1:]))
    for title, found in chosen:
        for line in found:
            values = {name: value for name, value in line.items() if name not in _OWN}
            rows.append((title, ", ".join(f"{n} {_cell(n, v)}" for n, v in values.items())))
    return rows


def _cell(name: str, value: Any) -> str:
    """A value as text: shares in per cent."""
    if isinstance(value, float) and any(p.share and re.fullmatch(p.names, name) for p in _PANELS):
        return percent(value, 2)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _lines_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines of one kind as a table, with a column for each name that occurs."""
    names = [name for name in dict.fromkeys(n for line in lines for n in line) if name not in _OWN]
    rows = [
        [f"{line['step']:,}", *(_cell(n, line[n]) if n in line else "" for n in names)]
        for line in lines[-_ROWS:]
    ]
    cut = f"<p>The last {_ROWS:,} of {len(lines):,}.</p>" if len(lines) > _ROWS else ""
    return cut + table(rows, ["step", *names])


def _charts(lines: Sequence[Mapping[str, Any]], best: int | None) -> Iterator[str]:
    """A figure for each panel that has values, and for each metric without a panel."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in (*_OWN, *_COUNTS) and isinstance(value, int | float):
                series.setdefault((line["kind"], name), []).append((line["step"], value))
    taken = "|".join(panel.names for panel in _PANELS)
    others = dict.fromkeys(name for _, name in series if not re.fullmatch(taken, name))
    for panel in (*_PANELS, *(_Panel(name, re.escape(name)) for name in others)):
        chosen = {key: rows for key, rows in series.items() if re.fullmatch(panel.names, key[1])}
        several = len({name for _, name in chosen}) > 1
        curves = [
            Curve(
                f"{kind} {name}" if several else kind,
                *np.array(rows, float).T,
                dotted=kind == "evaluate",
                noisy=panel.noisy,
            )
            for (kind, name), rows in chosen.items()
        ]
        if curves:
            yield figure(
                panel.title,
                panel.unit,
                curves,
                first=min(line["step"] for line in lines),
                last=max(line["step"] for line in lines),
                share=panel.share,
                marked=best if panel.title in _MARKED else None,
                from_zero=panel.from_zero,
            )
