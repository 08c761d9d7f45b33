# SPDX-License-Identifier: Apache-2.0
"""A run's report.html: its curves, settings and evaluations in one self-contained file.

A new metric needs no change here: each number in metrics.jsonl gets a curve, and a column in the
table of evaluations. Metrics of training come from the step (`vivit_jax.train.step.make_step`, on
the device) and from `_Loop._report` in `vivit_jax.train.loop` (rates, on the host), those of
evaluation from `vivit_jax.train.metrics` and `vivit_jax.train.evaluate`. `_PANELS` groups metrics
into charts with titles and units.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vivit_jax.errors import UserError
from vivit_jax.files.atomic import whole_file
from vivit_jax.files.json_files import read_json
from vivit_jax.train.chart import CHART_STYLE, Curve, escape, figure
from vivit_jax.train.log import METRICS, read_metrics
from vivit_jax.train.run_directory import BAD_CLIPS, RECIPE

REPORT = "report.html"
_OWN = ("kind", "step", "time")
_COUNTS = ("videos", "unreadable")  # of an evaluation: shown in its table, without a curve
_ROWS = 500  # of a table


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
)


def write_report(directory: str | Path) -> Path:
    """Write report.html beside a run's metrics.jsonl and return its path.

    Shows every number over steps (training and evaluation share a chart where both measure it), the
    settings in recipe.json if that is there, and tables of evaluations and events. Raises UserError
    for files that are missing or damaged.
    """
    directory = Path(directory)
    lines = read_metrics(directory / METRICS)
    settings = dict(_fields(_read_json(directory / RECIPE)))
    title = f"{settings.get('name') or directory.resolve().name}: training report"
    charts = "".join(_charts([line for line in lines if line["kind"] != "event"]))
    sections = {
        "Summary": _table(_summary(lines)),
        "Curves": f'<div class="charts">{charts}</div>' if charts else "<p>No metrics yet.</p>",
        "Evaluations": _lines_table([line for line in lines if line["kind"] == "evaluate"]),
        "Events": _lines_table([line for line in lines if line["kind"] == "event"]),
        "Clips that could not be read": _bad_clips(_read_json(directory / BAD_CLIPS)),
        "Settings": _table(list(settings.items())),
    }
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections.items() if content)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}{CHART_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    path = directory / REPORT
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


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
    count = f"{found['left_out']:,} of {found['read']:,} reads of clips failed"
    text = ""
    for clips, what in (
        (found["clips"], f"{count}; clips: "),
        (found.get("validation", {}), "Clips missing from the last validation: "),
    ):
        rows = sorted((clip, str(reason)) for clip, reason in clips.items())
        cut = f"; the first {_ROWS:,} are listed" if len(rows) > _ROWS else ""
        if rows:
            text += f"<p>{what}{len(rows):,}{cut}.</p>"
            text += _table(rows[:_ROWS], ["clip", "reason"])
    return text


def _summary(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How far the run got, how long it took, and its last metrics."""
    if not lines:
        return []
    start, end = (datetime.datetime.fromtimestamp(lines[i]["time"]) for i in (0, -1))
    rows = [
        ("last step", f"{max(line['step'] for line in lines):,}"),
        ("first report", start.isoformat(" ", "seconds")),
        ("last report", f"{end.isoformat(' ', 'seconds')}, {str(end - start).split('.')[0]} later"),
    ]
    for kind, title in (("train", "last of training"), ("evaluate", "last evaluation")):
        found = [line for line in lines if line["kind"] == kind]
        if found:
            values = {name: value for name, value in found[-1].items() if name not in _OWN}
            rows.append((title, ", ".join(f"{n} {_cell(v)}" for n, v in values.items())))
    return rows


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> str:
    """Rows of text as a table, the first column as row headings; "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(c)}</td>' for c in row[1:])}</tr>"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _lines_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines of one kind as a table, with a column for each name that occurs."""
    names = [name for name in dict.fromkeys(n for line in lines for n in line) if name not in _OWN]
    rows = [
        [f"{line['step']:,}", *(_cell(line[n]) if n in line else "" for n in names)]
        for line in lines[-_ROWS:]
    ]
    cut = f"<p>The last {_ROWS:,} of {len(lines):,}.</p>" if len(lines) > _ROWS else ""
    return cut + _table(rows, ["step", *names])


def _charts(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
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
                from_zero=panel.from_zero,
            )


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #5f6670; --line: #dfe2e6; --page: #fff;
  --c0: #1f6fc4; --c1: #c4500a; --c2: #1a7f4b; --c3: #9a3fb5; --c4: #a37800; --c5: #c02c5e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa3ad; --line: #343a41;
  --page: #15181c; --c0: #63a8f2; --c1: #f59154; --c2: #55c48a; --c3: #cf8be6; --c4: #dcb13c;
  --c5: #f2799f; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 1140px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tbody th { font-weight: 500; white-space: nowrap; color: var(--dim); }
"""
