# SPDX-License-Identifier: Apache-2.0
"""The report is one well-formed page that shows every metric, whatever was measured."""

import base64
import io
import json
import math
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vivit_jax.errors import UserError
from vivit_jax.recipes import recipe_named
from vivit_jax.recipes.settings import to_dict
from vivit_jax.train.log import METRICS, MetricLog
from vivit_jax.train.pages.chart import Curve, figure
from vivit_jax.train.pages.report import write_report

HOSTILE = """</td><script>alert("1")</script>&amp;\x00\x1b\ud800'"""


def page_of(directory):
    """The report's root; the parser refuses pages that are not well-formed."""
    path = write_report(directory)
    assert path == directory / "report.html"
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def write_metrics(directory, lines):
    log = MetricLog(directory)
    for kind, step, values in lines:
        log.write(kind, step, values)
    log.close()


def text_of(element):
    return " ".join(element.itertext())


def charts(page):
    return {element.findtext("figcaption/b"): element for element in page.iter("figure")}


def tables(page):
    """Cells by the heading above each table."""
    body, found, heading = page.find("body"), {}, None
    for element in body:
        heading = element.text if element.tag == "h2" else heading
        if element.tag == "div" and element.get("class") == "wide":
            found[heading] = [[text_of(c) for c in row] for row in element.iter("tr")]
    return found


def drawn(element):
    """The groups that belong to a chart's curves; a running mean is one of its own."""
    return [g for g in element.iter("g") if g.get("class", "").startswith("curve")]


def points(element):
    """The points of all lines of a chart that belong to a curve."""
    return [
        [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.-]+ [\d.-]+", path.get("d"))]
        for group in drawn(element)
        for path in group.findall("path")
    ]


def dots(element):
    return [dot for group in drawn(element) for dot in group.iter("use")]


def ticks(element, axis):
    """(where, label) of the ticks of an axis, "x" or "y"."""
    anchor = {"x": "middle", "y": "end"}[axis]
    groups = [(list(g.iter("use")), list(g.iter("text"))) for g in element.iter("g")]
    found = [(*uses, *texts) for uses, texts in groups if len(uses) == len(texts) == 1]
    return [
        (float(mark.get(axis)), text.text)
        for mark, text in found
        if f"text-anchor: {anchor}" in text.get("style")
    ]


def training(step, **values):
    rates = dict(lr=1e-3 / step, clips_per_second=100.0 + step % 3, wait_share=0.25)
    return "train", step, {"loss": 2.0 / step, **rates, **values}


def test_every_metric_has_a_curve_and_every_part_its_table(tmp_path):
    lines = []
    for step in range(1, 13):
        lines.append(training(step, odd_one=float(step)))
        if step % 4 == 0:
            accuracies = {"noun_accuracy": step / 16, "noun-verb_accuracy_top_5": step / 12}
            lines.append(("evaluate", step, {"loss": 1.0, "videos": 7, **accuracies}))
    lines.append(("event", 12, {"text": "stopped by SIGTERM"}))
    write_metrics(tmp_path, lines)
    recipe = {
        "name": "tiny",
        "model": {"config": {"num_labels": 3}, "start": None},
        "optim": {"betas": [0.9, 0.999], "rules": {}},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    bad = {"read": 40, "left_out": 3, "clips": {"b.mp4": "no video", "a.mp4": "cut off"}}
    (tmp_path / "bad_clips.json").write_text(json.dumps(bad))
    page = page_of(tmp_path)
    assert page.findtext("head/title") == page.findtext("body/h1") == "tiny: training report"
    found = charts(page)
    assert list(found) == [
        *("Loss", "Accuracy", "Learning rate", "Throughput", "Waiting for data", "odd_one")
    ]
    assert [len(line) for line in points(found["Loss"])] == [12, 3]
    assert [e.text for e in found["Loss"].iter("i")] == [None, None]
    assert "train" in text_of(found["Loss"]) and "evaluate" in text_of(found["Loss"])
    assert "evaluate noun-verb_accuracy_top_5" in text_of(found["Accuracy"])
    assert "100%" in text_of(found["Accuracy"]) and "step 12: 75%" in text_of(found["Accuracy"])
    assert "clips per second" in text_of(found["Throughput"])
    for element in found.values():
        labels = [text.text for text in element.iter("text")]
        assert "step" in labels and "2" in labels and "12" in labels

    shown = tables(page)
    assert shown["Evaluations"][0] == [
        *("step", "loss", "videos", "noun_accuracy", "noun-verb_accuracy_top_5")
    ]
    assert shown["Evaluations"][1:] == [
        ["4", "1", "7", "25.00%", "33.33%"],
        ["8", "1", "7", "50.00%", "66.67%"],
        ["12", "1", "7", "75.00%", "100.00%"],
    ]
    assert shown["Settings"] == [
        ["name", "tiny"],
        ["model.config.num_labels", "3"],
        ["model.start", "null"],
        ["optim.betas", "[0.9, 0.999]"],
        ["optim.rules", "{}"],
    ]
    assert shown["Events"] == [["step", "text"], ["12", "stopped by SIGTERM"]]
    assert shown["Clips that could not be read"][1:] == [
        ["a.mp4", "cut off"],
        ["b.mp4", "no video"],
    ]
    assert "3 of 40 reads" in text_of(page)
    assert ["last step", "12"] in shown["Summary"]


def test_the_page_needs_no_other_file(tmp_path):
    write_metrics(tmp_path, [training(1)])
    page_of(tmp_path)
    text = (tmp_path / "report.html").read_text()
    for needle in ("http:", "https:", "src=", "<script", "@import"):
        assert needle not in text
    inside = re.findall(r"""(?:href="|url\()(.)""", text)
    assert inside and set(inside) == {"#"}
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    # The page's own colours, which are others where it is dark.
    assert "prefers-color-scheme: dark" in text and "var(--c0)" in text
    assert not re.search(r"#[0-9a-f]{6}\b", text.partition("</style>")[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [METRICS, "report.html"]


def test_the_same_metrics_make_the_same_page(tmp_path):
    write_metrics(tmp_path, [training(step) for step in range(1, 200)])
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_the_users_style_of_matplotlib_does_not_matter(tmp_path, monkeypatch):
    write_metrics(tmp_path, [training(step) for step in range(1, 200)])
    first = write_report(tmp_path).read_bytes()
    for name, value in {"text.usetex": True, "lines.linestyle": "--", "font.size": 30}.items():
        monkeypatch.setitem(matplotlib.rcParams, name, value)
    assert write_report(tmp_path).read_bytes() == first


def test_text_of_any_kind_is_shown_and_not_obeyed(tmp_path):
    log = MetricLog(tmp_path)
    log.write("train", 1, {HOSTILE.replace("\ud800", ""): 1.0, "loss": 1.0})
    log.write("event", 1, {"text": HOSTILE})
    log.close()
    (tmp_path / "recipe.json").write_text(json.dumps({"name": HOSTILE, "a<b": [HOSTILE]}))
    page = page_of(tmp_path)
    assert not list(page.iter("script"))
    shown = HOSTILE.replace("\x00\x1b\ud800", "\N{REPLACEMENT CHARACTER}" * 3)
    assert page.findtext("body/h1") == f"{shown}: training report"
    assert tables(page)["Events"][1][1] == shown
    assert any(row[0] == "a<b" for row in tables(page)["Settings"])
    assert any("<script>" in title for title in charts(page))


def test_one_step_is_a_dot(tmp_path):
    write_metrics(tmp_path, [training(7)])
    found = charts(page_of(tmp_path))
    (dot,) = dots(found["Loss"])
    assert text_of(dot) == "step 7: 0.2857"
    assert [label for _, label in ticks(found["Loss"], "x")] == ["6", "7", "8"]


def test_no_metrics_at_all(tmp_path):
    write_metrics(tmp_path, [])
    page = page_of(tmp_path)
    assert "No metrics yet." in text_of(page)
    assert page.findtext("body/h1") == f"{tmp_path.name}: training report"


def test_what_is_not_finite_is_a_gap_and_is_named(tmp_path):
    values = [1.0, 0.5, math.nan, 0.25, math.inf, -math.inf, 0.125, 0.1]
    write_metrics(tmp_path, [("train", s, {"loss": v}) for s, v in enumerate(values, 1)])
    write_metrics(
        tmp_path / "none", [("train", s, {"loss": math.nan, "lr": 0.0}) for s in range(1, 10)]
    )
    element = charts(page_of(tmp_path))["Loss"]
    (group,) = drawn(element)
    (path,) = group.findall("path")
    assert path.get("d").count("M") == 3 and path.get("d").count("L") == 2
    assert [text_of(dot).strip() for dot in dots(element)] == [
        f"step {step}: {values[step - 1]:g}" for step in (1, 2, 4, 7, 8)
    ]
    assert "3 values are not finite (train, step 3, 5, 6)" in text_of(element)
    element = charts(page_of(tmp_path / "none"))["Loss"]
    assert "9 values are not finite (train, step 1, 2, 3, 4, 5, 6, ...)" in text_of(element)


def test_curves_are_where_their_axes_say():
    """Read back from the labelled ticks, by linear interpolation."""
    steps, values = np.arange(10.0, 400.0, 13.0), np.linspace(0.003, 0.047, 30) ** 2
    element = ElementTree.fromstring(
        figure("x", "", [Curve("a", steps, values)], first=0, last=400)
    )
    xs, ys = ([(at, float(label)) for at, label in ticks(element, axis)] for axis in "xy")
    assert len(xs) >= 3 and len(ys) >= 3
    line = np.array(points(element)[0])
    for marks, found, true in ((xs, line[:, 0], steps), (ys, line[:, 1], values)):
        slope, offset = np.polyfit(*np.array(marks).T, 1)
        np.testing.assert_allclose(slope * found + offset, true, atol=abs(slope) * 0.3)


@pytest.mark.slow
def test_long_curves_are_thinned_and_keep_their_extremes(tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.uniform(1.0, 2.0, 100_000)
    losses[[31_415, 92_653]] = 5.0, -3.0
    losses[50_000:50_400] = np.nan
    lines = [
        json.dumps({"kind": "train", "step": s, "time": 0.0, "loss": None if v != v else v}) + "\n"
        for s, v in enumerate(losses.tolist(), 1)
        if v == v
    ]
    tmp_path.joinpath(METRICS).write_text("".join(lines))
    page = page_of(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 100_000
    element = charts(page)["Loss"]
    assert "Bold: mean of 1,993 values (train)" in text_of(element)
    thin, mean = points(element)
    assert 500 <= len(thin) <= 2000 and len(mean) <= 1000
    assert min(y for _, y in thin) == pytest.approx(min(y for _, y in thin + mean))
    heights = np.array([y for _, y in thin])
    assert (np.sort(heights)[[0, -1]] == [heights.min(), heights.max()]).all()
    scale = (heights.max() - heights.min()) / 8.0  # from -3 to 5
    typical = np.array([y for _, y in mean])
    np.testing.assert_allclose((heights.max() - typical) / scale - 3.0, 1.5, atol=0.1)
    xs = np.array([x for x, _ in thin])
    assert (np.diff(xs) >= -1).all()  # simplified to a pixel


@pytest.mark.parametrize(
    ("low", "high"), [(0.69312, 0.69318), (-2e-9, 3e-9), (0, 0.97), (1e4, 1.3e4), (5, 5), (0, 0)]
)
def test_ticks_can_be_told_apart(low, high):
    curve = Curve("a", np.array([1.0, 2.0]), np.array([low, high], float))
    element = ElementTree.fromstring(figure("x", "", [curve], first=1, last=2))
    labels = [label for _, label in ticks(element, "y")]
    assert 2 <= len(labels) <= 8 and len(set(labels)) == len(labels)
    assert all(len(label) <= 10 for label in labels)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read"):
        write_report(tmp_path)
    write_metrics(tmp_path, [training(1)])
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=r"recipe\.json is not valid JSON.*restore or remove it"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


RECIPE = "videomae-v1-base-kinetics400-finetune"


def test_what_was_noticed_and_what_differs_from_the_recipe_come_first(tmp_path):
    recipe = to_dict(recipe_named(RECIPE)) | {"given": ["processor"]}
    recipe["train"] = recipe["train"] | {"epochs": 7}
    recipe["data"] = recipe["data"] | {"train": str(tmp_path / "my clips" / "train")}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    log = MetricLog(tmp_path)
    log.write("event", 3, {"notice": f"the loss of {tmp_path}/run stays at ln 4"})
    log.write("event", 4, {"notice": "kind", "text": "no clip is <taken> for grow"})
    log.write("event", 5, {"text": f"see {tmp_path}/my clips/train/grow/1.mp4"})
    log.close()
    page = page_of(tmp_path)
    shown = tables(page)
    headings = [element.text for element in page.iter("h2")]
    assert headings[:2] == ["What to look at", "Settings that differ from the recipe"]
    texts = [text_of(p) for p in page.iter("p") if p.get("class") == "notice"]
    assert texts == ["step 3: the loss of run stays at ln 4", "step 4: no clip is <taken> for grow"]
    assert shown["Events"][1:] == [["5", "see grow/1.mp4"]]
    published = recipe_named(RECIPE)
    assert shown["Settings that differ from the recipe"] == [
        ["", "this run", f"recipe {RECIPE}"],
        ["data.train", "my clips/train", "-"],
        ["train.epochs", "7", str(published.train.epochs)],
    ]
    text = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in text and "/tmp" not in text


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([{"accuracy": a} for a in (0.25, 0.75, 0.75, 0.5)], 3),  # as the checkpoint: the latest
        ([{"noun_accuracy": 1 - a, "noun-verb_accuracy": a} for a in (0.1, 0.3, 0.2)], 2),
        ([{"loss": value} for value in (0.5, math.nan, 0.2, 0.3)], 3),
        ([{"videos": 3}], None),
        # Of equal accuracies that with the lower loss, if that is less than a clip.
        ([{"accuracy": 0.5, "loss": v, "videos": 4} for v in (0.9, 0.2, 0.5)], 2),
        ([{"accuracy": a, "loss": v, "videos": 4} for a, v in ((0.75, 9.0), (0.5, 0.1))], 1),
    ],
)
def test_the_best_step_is_marked(tmp_path, values, best):
    write_metrics(tmp_path, [("evaluate", step, each) for step, each in enumerate(values, 1)])
    page = page_of(tmp_path)
    marks = [text_of(span) for span in page.iter("span") if span.get("class") == "marked"]
    assert set(marks) == (set() if best is None else {f"best step {best}"})
    if best is not None:
        assert any(row[0] == f"best evaluation, step {best}" for row in tables(page)["Summary"])


def validation(tmp_path, step):
    """A run's file of three clips, one of which is wrong, of a class with an odd name."""
    np.save(tmp_path / "b c.npy", np.full((9, 20, 30, 3), 90, np.uint8))
    names = ("a.npy", "b c.npy", "d.npy")
    head = {
        "head": "",
        "classes": ["walk", HOSTILE.replace("\ud800", "")],
        "labels": [0, 1, 1],
        "answers": [0, 0, 1],
        "confidences": [0.9, 0.8, None],
        "ranks": [0, 1, 0],
    }
    clips = [{"name": n, "path": str(tmp_path / n), "frames": [0, 4, 8]} for n in names]
    values = {"step": step, "score": 2 / 3, "protocol": "1 x 1 views", "clips": clips}
    return values | {"heads": [head]}


def test_what_became_of_the_held_out_clips(tmp_path):
    write_metrics(tmp_path, [training(1), ("evaluate", 2, {"accuracy": 2 / 3})])
    path = tmp_path / "validation.json"
    path.write_text(json.dumps(validation(tmp_path, 2)))
    page = page_of(tmp_path)
    found = tables(page)
    assert found["Result"][0][1].startswith("66.7% \u00b1 18.7% (standard error); 95 % interval")
    assert found["Result"][1] == ["clips", "3 clips, 2 right; step 2, 1 x 1 views"]
    assert [row[1:4] for row in found["Classes"][1:]] == [["2", "1", "50.0%"], ["1", "1", "100.0%"]]
    (image,) = page.iter("img")  # of the wrong clip, three frames side by side
    assert image.get("src").startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(image.get("src").partition(",")[2]))) as picture:
        assert picture.size == (3 * 108 + 2 * 3, 72)
        assert np.abs(np.asarray(picture).astype(int)[:, :100] - 90).max() < 4
    assert "b c.npy, 80% sure" in text_of(page)
    assert {"Confusion matrix", "Confidence"} <= charts(page).keys()
    (link,) = page.iter("a")
    table = base64.b64decode(link.get("href").partition(",")[2]).decode()
    assert table.splitlines()[1] == "walk,1,0"
    text = (tmp_path / "report.html").read_text()
    assert str(tmp_path) not in text
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    (tmp_path / "b c.npy").unlink()  # the data has moved
    assert "its frames cannot be read any more" in text_of(page_of(tmp_path))


def test_a_validation_of_another_step_is_not_shown_and_a_damaged_one_is_told(tmp_path):
    write_metrics(tmp_path, [training(1), ("evaluate", 2, {"accuracy": 2 / 3})])
    path, values = tmp_path / "validation.json", validation(tmp_path, 4)
    path.write_text(json.dumps(values))
    assert "Confusion matrix" not in text_of(page_of(tmp_path))
    values["heads"][0]["answers"] = [0, 0, 2]
    lost = validation(tmp_path, 2)
    lost["clips"][0]["path"] = None
    for damaged in (values, lost, {"step": 2}, [], {"step": 2, "clips": [1]}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"validation\.json has changed since it was written"):
            write_report(tmp_path)
