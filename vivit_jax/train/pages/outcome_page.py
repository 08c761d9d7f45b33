# SPDX-License-Identifier: Apache-2.0
"""The sections of a page that show `Outcomes`: numbers, classes, confusions, calibration, views."""

import base64
import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence

import numpy as np

from vivit_jax.data.datasets.dataset import Example, read_frames
from vivit_jax.data.one_clip import one_clip
from vivit_jax.errors import VideoError, counted
from vivit_jax.train.outcomes import BINS, Confusion, Outcomes
from vivit_jax.train.pages.chart import escape
from vivit_jax.train.pages.outcome_charts import calibration_figure, confusion_figure
from vivit_jax.train.pages.page import percent, table

_CLASSES, _WORST, _VIEWS = 60, 40, 50  # all classes up to the first, else the worst; clips listed
_CONFUSIONS, _CLIPS, _FRAMES = 8, 3, 4  # drawn: confusions, clips of each, frames of each
_HEIGHT, _GAP = 72, 3  # of a frame, in pixels


@dataclasses.dataclass(frozen=True)
class Shown:
    """Where the frames of a clip come from."""

    example: Example
    frames: np.ndarray  # indices that the model saw


def outcome_sections(
    found: Outcomes, shown: Sequence[Shown], protocol: str, top_k: int
) -> Iterator[tuple[str, str]]:
    """(title, content) of each section. `shown` has every clip; `protocol` says how it was seen."""
    head = f" of {found.head}" if found.head else ""
    yield f"Result{head}", table(_numbers(found, protocol, top_k))
    yield f"Classes{head}", _classes(found)
    yield f"Confusion matrix{head}", confusion_figure(found) + _download(found)
    yield f"Most confused{head}", "".join(_confusions(found, shown))
    yield f"Confidence{head}", calibration_figure(found)
    yield f"Clips whose views disagree{head}", _disagreements(found)


def _numbers(found: Outcomes, protocol: str, top_k: int) -> list[tuple[str, str]]:
    low, high = found.interval
    rows = [
        (
            "accuracy",
            f"{percent(found.accuracy)} ± {percent(found.standard_error)} (standard error); "
            f"95 % interval (Wilson) {percent(low)} to {percent(high)}",
        )
    ]
    if len(found.classes) > top_k:
        rows.append((f"among the best {top_k}", percent(found.top(top_k))))
    right = int(found.right.sum())
    rows.append(("clips", f"{counted(len(found), 'clip')}, {right:,} right; {protocol}"))
    error, _ = found.calibration()
    rows.append(("calibration error", f"{percent(error)} (ECE of {BINS} bins)"))
    odd = int((found.answers < 0).sum())
    if odd:
        rows.append(("not finite", f"the scores of {counted(odd, 'clip')}, which count as wrong"))
    never = [found.classes[i] for i in found.never_answered()]
    if never:
        more = f" and {len(never) - 10:,} more" if len(never) > 10 else ""
        rows.append(("never answered", ", ".join(never[:10]) + more))
    return rows


def _classes(found: Outcomes) -> str:
    """A row for each class that has clips, the worst first."""
    results = [each for each in found.per_class() if each.clips]
    results.sort(key=lambda each: (each.accuracy, -each.clips, each.label))
    note = ""
    if len(results) > _CLASSES:
        note = f"<p>The worst {_WORST} of {len(results):,} classes.</p>"
        results = results[:_WORST]
    absent = sum(not each.clips for each in found.per_class())
    if absent:
        note += f"<p>{counted(absent, 'class')} without clips.</p>"
    matrix = found.confusion_matrix()
    rows = []
    for each in results:
        low, high = each.interval
        wrong = matrix[each.label].copy()
        wrong[each.label] = 0
        most = int(wrong.argmax())
        instead = f"{found.classes[most]} ({wrong[most]})" if wrong.any() else ""
        interval = f"{percent(low, 0)} to {percent(high, 0)}"
        cells = (each.clips, each.right, percent(each.accuracy), interval, instead)
        rows.append([found.classes[each.label], *map(str, cells)])
    heads = ["class", "clips", "right", "accuracy", "95 % interval", "most often instead"]
    return note + table(rows, heads)


def _download(found: Outcomes) -> str:
    """A link that saves the matrix."""
    text = confusion_csv(found).encode(errors="backslashreplace")
    data = base64.b64encode(text).decode()
    name = f"confusion{'-' + found.head if found.head else ''}.csv"
    link = f'download="{escape(name)}" href="data:text/csv;charset=utf-8;base64,{data}"'
    return f"<p><a {link}>{escape(name)}</a></p>"


def confusion_csv(found: Outcomes) -> str:
    """The confusion matrix as CSV: a row for each true class, a column for each answer."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true class", *found.classes])
    for name, row in zip(found.classes, found.confusion_matrix().tolist(), strict=True):
        writer.writerow([name, *row])
    return text.getvalue()


def _confusions(found: Outcomes, shown: Sequence[Shown]) -> Iterator[str]:
    """The most frequent wrong answers, each with frames of some clips."""
    everything = found.confusions()
    if not everything:
        yield "<p>No clip of another class was answered.</p>"
        return
    if len(everything) > _CONFUSIONS:
        yield f"<p>The first {_CONFUSIONS} of {len(everything):,} wrong answers.</p>"
    for each in everything[:_CONFUSIONS]:
        yield (
            f'<div class="confusion"><b>{escape(found.classes[each.label])}</b> taken for '
            f"<b>{escape(found.classes[each.answer])}</b>: {each.clips:,} of "
            f"{counted(each.of, 'clip')}"
            f'<div class="strips">{"".join(_strips(found, each, shown))}</div></div>'
        )


def _strips(found: Outcomes, confusion: Confusion, shown: Sequence[Shown]) -> Iterator[str]:
    for place in found.mistaken(confusion)[:_CLIPS]:
        named = f"{found.clips[place]}, {percent(float(found.confidences[place]), 0)} sure"
        try:
            picture = strip(shown[place])
        except VideoError:
            picture = "<p>its frames cannot be read any more</p>"
        yield f"<div>{picture}<small>{escape(named)}</small></div>"


def strip(shown: Shown) -> str:
    """Frames of a clip side by side, evenly spaced over those the model saw, as an <img>."""
    from PIL import Image

    seen = np.unique(shown.frames)
    places = np.linspace(0, len(seen) - 1, min(len(seen), _FRAMES)).round().astype(int)
    with one_clip(shown.example.path):
        frames = read_frames(shown.example, np.unique(seen[places]))
    frames = frames if frames.shape[-1] == 3 else frames[..., :1].repeat(3, -1)
    height, width = frames.shape[1:3]
    size = max(1, round(width * _HEIGHT / height)), _HEIGHT
    page = Image.new("RGB", (len(frames) * (size[0] + _GAP) - _GAP, _HEIGHT), "white")
    for i, frame in enumerate(frames):
        page.paste(
            Image.fromarray(np.ascontiguousarray(frame)).resize(size), (i * (size[0] + _GAP), 0)
        )
    file = io.BytesIO()
    page.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img alt="" width="{page.width}" height="{page.height}" '
        f'src="data:image/jpeg;base64,{data}"/>'
    )


def _disagreements(found: Outcomes) -> str:
    """The clips whose views have different best classes."""
    each = found.views.shape[1]
    places = found.disagreeing
    places = places[np.argsort(found.right[places], kind="stable")]  # wrong ones first
    if each == 1:
        return ""
    note = f"<p>{len(places):,} of {counted(len(found), 'clip')}, of {each} views each.</p>"
    rows = []
    for place in places[:_VIEWS]:
        answers, votes = np.unique(found.views[place], return_counts=True)
        order = np.argsort(-votes, kind="stable")
        said = ", ".join(f"{votes[i]} x {found.classes[answers[i]]}" for i in order)
        answer = int(found.answers[place])
        named = found.classes[answer] if answer >= 0 else "none"
        rows.append([found.clips[place], found.classes[found.labels[place]], named, said])
    if len(places) > _VIEWS:
        note += f"<p>The first {_VIEWS} are listed.</p>"
    return note + table(rows, ["clip", "true class", "answer", "views"])
