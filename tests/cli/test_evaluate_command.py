# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax evaluate`: what it prints and writes, and what it refuses."""

import csv
import json
import os
import re
import shutil
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from commands import run_command
from helpers import forward, random_params
from PIL import Image
from tiny import VIDEOMAE, VIVIT, config_of

import vivit_jax
from vivit_jax.cli.__main__ import main
from vivit_jax.data.datasets.dataset import Example, read_views
from vivit_jax.data.sampling import view_indices
from vivit_jax.data.transforms.augment import resize_shortest
from vivit_jax.param_tree import params_hash
from vivit_jax.train.outcomes import wilson_interval

CLASSES = ("walk", "run", "jump", "fly", "sleep")
LENGTHS = (30, 18, 9, 24)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models of 24x16 frames, by name."""
    folder = tmp_path_factory.mktemp("models")
    scenic = vivit_jax.VideoProcessor.vivit(size=28, crop_size=(24, 16))
    imagenet = vivit_jax.VideoProcessor.named(
        "videomae-imagenet", size=26, crop_size={"height": 24, "width": 16}
    )
    heads = dict(num_labels=7, class_splits=(3, 4), split_names=("noun", "verb"))
    made = {
        "vivit": (vivit_jax.VivitConfig(**VIVIT, id2label=CLASSES), "Vivit", scenic),
        "videomae": (config_of("mae cls"), "VideoMAE", imagenet),
        "heads": (vivit_jax.VideoMAEConfig(**VIDEOMAE | heads), "VideoMAE", imagenet),
    }
    for name, (config, family, processor) in made.items():
        model = getattr(vivit_jax, f"{family}ForVideoClassification")(config)
        vivit_jax.save_pretrained(folder / name, model, random_params(model, 0.5), processor)
    model = vivit_jax.VideoMAEForPreTraining(config_of("mae pretraining"))
    vivit_jax.save_pretrained(folder / "pretrained", model, random_params(model), imagenet)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with four arrays, a file that is not one, and lists of them."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        np.save(folder / f"{i}.npy", rng.integers(0, 256, (length, 30, 36, 3), np.uint8))
    (folder / "bad.npy").write_bytes(b"no video")
    labels = (1, 0, 4, 1)
    lines = [f"{i}.npy {label}" for i, label in enumerate(labels)]
    (folder / "good.txt").write_text("\n".join(lines))
    (folder / "all.txt").write_text("\n".join([lines[0], "bad.npy 2", *lines[1:]]))
    (folder / "bad.txt").write_text("bad.npy 2\n")
    (folder / "far.txt").write_text("0.npy 5\n")
    (folder / "two.txt").write_text("\n".join(f"{i}.npy {i % 3} {i}" for i in range(4)))
    for i, name in ((0, "run"), (1, "walk"), (2, "sleep"), (3, "run")):
        (folder / "folders" / name).mkdir(parents=True, exist_ok=True)
        (folder / "folders" / name / f"{i}.npy").write_bytes((folder / f"{i}.npy").read_bytes())
    names = [f"{i}.npy,{CLASSES[label]}" for i, label in enumerate(labels)]
    (folder / "names.csv").write_text("\n".join(["path,label", *names]))
    (folder / "typo.csv").write_text("path,label\n0.npy,jumps\n1.npy,run\n2.npy,ride\n")
    splits = ["split,clip,label", *(f"test,{name}" for name in names), "train,bad.npy,fly"]
    (folder / "splits.csv").write_text("\n".join(splits))
    (folder / "classes.txt").write_text("run\nwalk\nsleep\n")
    numbers = [f"{i}.npy {(1, 0, 4, 1)[i]}" for i in range(4)]
    swapped = [line[:-1] + {"0": "1", "1": "0", "4": "2"}[line[-1]] for line in numbers]
    (folder / "numbered.txt").write_text("\n".join(swapped))
    (folder / "unlabelled").mkdir()
    (folder / "unlabelled" / "0.npy").write_bytes((folder / "0.npy").read_bytes())
    (folder / "other" / "swim").mkdir(parents=True)
    (folder / "other" / "swim" / "0.npy").write_bytes((folder / "0.npy").read_bytes())
    return folder


def evaluated(capsys, model, data, *args):
    return run_command(capsys, "evaluate", "--model", model, "--data", data, *args)


def printed(out):
    return dict(line.rsplit(maxsplit=1) for line in out.splitlines() if " " in line)


def test_one_central_view_of_a_vivit_as_scenic_takes_it(models, videos, capsys, tmp_path):
    """Every figure of the file, recomputed from the model; unreadable videos are left out."""
    path = tmp_path / "result.json"
    args = ("--out", path, "--views-at-once", 8)
    status, out, err = evaluated(capsys, models / "vivit", videos / "all.txt", *args)
    assert status == 1 and err == ""
    result = json.loads(path.read_text())
    model, params = vivit_jax.from_pretrained(models / "vivit")
    processor = vivit_jax.VideoProcessor.from_pretrained(models / "vivit")
    answers, right, sure = [], [], []
    for i, label in enumerate((1, 0, 4, 1)):
        example = Example(str(videos / f"{i}.npy"), None)
        how = dict(num_frames=6, stride=2, sampler="loop", clips=1)
        (frames,), indices = read_views(example, **how)
        frames = resize_shortest(frames, 28)  # 28 x 33, of which the middle is rounded up
        pixels = processor(frames[:, 2:26, 9:25], do_resize=False, do_center_crop=False)
        logits = forward(model, params, pixels).logits[0]
        answers.append(int(logits.argmax()))
        right.append(answers[-1] == label)
        sure.append(float(jax.nn.softmax(logits).max()))
        video = result["videos"][i + (i > 0)]
        assert video == {
            "path": str(videos / f"{i}.npy"),
            "label": label,
            "answer": answers[-1],
            "confidence": pytest.approx(sure[-1], abs=1e-4),
            "views": [answers[-1]],
            "frames": indices.tolist(),
        }
    assert (
        result["videos"][1]["label"] == 2
        and "bad.npy: not an array" in result["videos"][1]["error"]
    )
    assert f"left out {videos}/bad.npy: not an array" in out
    assert result["metrics"] == {"accuracy": np.mean(right), "videos": 4, "unreadable": 1}
    assert printed(out)["accuracy"] == f"{np.mean(right):.2%}" and printed(out)["videos"] == "4"
    assert result["per_class"]["run"] == {
        "videos": 2,
        "accuracy": (right[0] + right[3]) / 2,
        "interval_95": list(wilson_interval(right[0] + right[3], 2)),
    }
    assert result["summary"] == {
        "videos": 4,
        "accuracy": np.mean(right),
        "standard_error": pytest.approx(np.std([*right, 0, 0, 1, 1]) / np.sqrt(len(right) + 4)),
        "interval_95": list(wilson_interval(sum(right), 4)),
        "calibration_error": pytest.approx(result["summary"]["calibration_error"]),
        "calibration_bins": 15,
        "views_disagree": 0,
        "protocol": {
            "clips": 1, "crops": 1, "frames": 6, "stride": 2, "sampler": "loop",
            "average": "logits",
        },
    }  # fmt: skip
    wrong = [(CLASSES[y], CLASSES[a]) for y, a in zip((1, 0, 4, 1), answers, strict=True) if y != a]
    told = [(each["label"], each["answer"]) for each in result["confusions"] for _ in
            range(each["videos"])]  # fmt: skip
    assert sorted(told) == sorted(wrong) and wrong
    assert result["per_class"].keys() == {"walk", "run", "sleep"}
    conditions = result["conditions"]
    assert conditions["views"] == dict(
        clips=1, crops=1, sampler="loop", stride=2, resize=28, average="logits"
    )
    assert conditions["params_sha256"] == params_hash(params)
    assert conditions["processor"] == processor.to_dict()
    assert result["model"] == str(models / "vivit") and result["data"] == str(videos / "all.txt")
    assert out.endswith(f"written to {path}\n")


def test_flags_change_the_views_of_a_recipe(models, videos, capsys, tmp_path):
    path = tmp_path / "result.json"
    flags = ("--clips", 2, "--stride", 3, "--resize", 26, "--out", path, "--overwrite")
    recipe = ("--recipe", "videomae-v1-base-kinetics400-finetune")
    path.write_text("{}")
    status, out, err = evaluated(capsys, models / "videomae", videos / "good.txt", *recipe, *flags)
    assert (status, err) == (0, "") and "left out" not in out
    result = json.loads(path.read_text())
    assert result["conditions"]["views"] == dict(
        clips=2, crops=3, sampler="linspace", stride=3, resize=26, average="softmax"
    )
    for video, length in zip(result["videos"], LENGTHS, strict=True):
        assert video["frames"] == view_indices("linspace", length, 6, 3, 2).tolist()


def test_names_are_matched_with_the_models(models, videos, capsys):
    """Whatever names the classes, in any order, the result is that of the model's numbers."""
    expected = evaluated(capsys, models / "vivit", videos / "good.txt")
    assert expected[0] == 0 and "videos                   4" in expected[1]
    for data, *flags in (
        ("names.csv",),
        ("splits.csv", "--split", "test"),
        ("numbered.txt", "--class-names", videos / "classes.txt"),
    ):
        assert evaluated(capsys, models / "vivit", videos / data, *flags) == expected


@pytest.mark.parametrize(
    ("flags", "resize", "told"),
    [
        (("--recipe", "vivit-b-16x2-kinetics400"), 28, "the model's processor says, not to 256 of"),
        (("--resize", 40), 40, "--resize says, not to 28 of the model's processor"),
        (("--resize", 28), 28, None),
    ],
)
def test_frames_are_resized_as_the_processor_says(
    flags, resize, told, models, videos, capsys, caplog, tmp_path
):
    args = (*flags, "--clips", 1, "--crops", 1, "--stride", 2, "--out", tmp_path / "result.json")
    status, _, _ = evaluated(capsys, models / "vivit", videos / "good.txt", *args)
    views = json.loads((tmp_path / "result.json").read_text())["conditions"]["views"]
    assert (status, views["resize"], views["average"]) == (0, resize, "logits")
    lines = [text for text in caplog.messages if "shorter side" in text]
    assert [told in line for line in lines] == [True] * (told is not None)


def test_folders_are_scored_by_their_names(models, videos, capsys, tmp_path):
    """As a list of the same videos with the model's numbers."""
    results = []
    for name in ("good.txt", "folders"):
        path = tmp_path / f"{name}.json"
        args = ("--out", path, "--views-at-once", 8, "--mesh", "data=8")
        assert evaluated(capsys, models / "vivit", videos / name, *args)[0] == 0
        results.append(json.loads(path.read_text()))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["per_class"] == results[1]["per_class"]
    listed = [sorted((v["label"], v["answer"]) for v in result["videos"]) for result in results]
    assert listed[0] == listed[1]


def test_a_name_that_is_no_text_is_written_and_then_printed(
    models, videos, capsys, tmp_path, monkeypatch
):
    names = [os.fsencode(tmp_path / name) + b"\xff" for name in ("good", "bad")]
    for name, source in zip(names, ("0.npy", "bad.npy"), strict=True):
        shutil.copy(videos / source, name + b".npy")
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"".join(name + b".npy 1\n" for name in names))
    path = tmp_path / "result.json"
    args = ("--out", path, "--views-at-once", 8)
    usual = print

    def after_the_file(*words, **options):
        assert path.exists()
        usual(*words, **options)

    monkeypatch.setattr("builtins.print", after_the_file)
    status, out, _ = evaluated(capsys, models / "vivit", listed, *args)
    assert status == 1 and f"left out {tmp_path}/bad\\udcff.npy: not an array" in out
    found = [os.fsencode(video["path"]) for video in json.loads(path.read_text())["videos"]]
    assert found == [name + b".npy" for name in names]


def test_frames_in_folders_are_found_by_their_numbers(models, videos, capsys, tmp_path):
    """As the same frames in a file."""
    frames = np.load(videos / "0.npy")
    (tmp_path / "clip").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "clip" / f"f{i:04}.png")
    (tmp_path / "folder.txt").write_text(f"clip {len(frames)} 1\n")
    (tmp_path / "file.txt").write_text(f"{videos}/0.npy 1\n")
    flags = ("--frame-name", "f{:04}.png", "--first-frame", 0)
    results = []
    for name, given in (("file.txt", ()), ("folder.txt", flags)):
        path = tmp_path / f"{name}.json"
        args = (*given, "--out", path, "--views-at-once", 8)
        assert evaluated(capsys, models / "vivit", tmp_path / name, *args)[0] == 0
        results.append(json.loads(path.read_text()))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["videos"][0]["frames"] == results[1]["videos"][0]["frames"]


def test_several_heads_average_logits_by_themselves(models, videos, capsys, tmp_path):
    path = tmp_path / "result.json"
    args = ("--out", path, "--views-at-once", 8)
    status, out, _ = evaluated(capsys, models / "heads", videos / "two.txt", *args)
    assert status == 0
    result = json.loads(path.read_text())
    assert {"noun_accuracy", "verb_accuracy", "noun-verb_accuracy"} < result["metrics"].keys()
    assert "noun-verb_accuracy" in out and "per_class" not in result
    assert result["conditions"]["views"]["average"] == "logits"
    assert [video["label"] for video in result["videos"]] == [[i % 3, i] for i in range(4)]
    for video in result["videos"]:
        noun, verb = video["answer"]
        assert 0 <= noun < 3 and 0 <= verb < 4


def page_of(path):
    """The root of a page; the parser refuses one that is not well-formed."""
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_class_names_with_line_breaks_are_one_line(models, videos, capsys, tmp_path):
    shutil.copytree(models / "vivit", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["id2label"] = {key: f"{name}\nfake 99%\x1b" for key, name in config["id2label"].items()}
    config["label2id"] = {name: int(key) for key, name in config["id2label"].items()}
    file.write_text(json.dumps(config))
    _, out, _ = evaluated(capsys, tmp_path / "model", videos / "all.txt", "--clips", 1)
    confused = [line for line in out.splitlines() if line.startswith("confused ")]
    assert confused and all(r"\u000afake 99%\u001b taken for " in line for line in confused)
    assert not [line for line in out.splitlines() if line.startswith("fake")]


def test_a_report_needs_no_other_file_and_names_no_directory(models, videos, capsys, tmp_path):
    report, table, out = (tmp_path / name for name in ("r.html", "c.csv", "r.json"))
    files = ("--report", report, "--confusion", table, "--out", out)
    args = ("--clips", 2, "--crops", 3, "--views-at-once", 24, *files)
    status, printed_out, _ = evaluated(capsys, models / "vivit", videos / "all.txt", *args)
    assert status == 1
    result = json.loads(out.read_text())
    head, *rows = csv.reader(table.read_text().splitlines())
    assert head == ["true class", *CLASSES] and [row[0] for row in rows] == list(CLASSES)
    matrix = np.array([row[1:] for row in rows], int)
    assert matrix.sum() == 4 and np.trace(matrix) / 4 == result["metrics"]["accuracy"]
    for each in result["confusions"]:
        at = CLASSES.index(each["label"]), CLASSES.index(each["answer"])
        assert matrix[at] == each["videos"] and matrix[at[0]].sum() == each["of"]
    page = page_of(report)
    assert page.findtext("body/h1") == "vivit on all.txt"
    headings = [element.text for element in page.iter("h2")]
    assert headings[:4] == ["Result", "Classes", "Confusion matrix", "Most confused"]
    assert headings[-1] == "Clips that could not be read"
    assert len(list(page.iter("img"))) == 4 - np.trace(matrix)
    text = report.read_text()
    assert str(videos) not in text and str(tmp_path) not in text and "bad.npy" in text
    assert re.search("2 clips x 3 crops of 6 frames, 2 apart .*, mean of logits", text)
    disagree = sum(len(set(video["views"])) > 1 for video in result["videos"] if "views" in video)
    assert f"{disagree} of 4 clips, of 6 views each." in text
    assert printed(printed_out)["views_disagree"] == str(disagree)
    lines = printed_out.splitlines()
    assert [line for line in lines if line.startswith("written")] == [
        f"written to {path}" for path in (out, report, table)
    ]


def test_the_names_of_the_data_stand_for_those_that_a_model_lacks(models, videos, capsys, tmp_path):
    for name, clip in zip(CLASSES, "01230", strict=True):
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(videos / f"{clip}.npy", tmp_path / "data" / name)
    args = ("--views-at-once", 8, "--out", tmp_path / "r.json")
    assert evaluated(capsys, models / "videomae", tmp_path / "data", *args)[0] == 0
    assert list(json.loads((tmp_path / "r.json").read_text())["per_class"]) == sorted(CLASSES)


def test_a_report_has_the_sections_of_each_head(models, videos, capsys, tmp_path):
    report, table = tmp_path / "r.html", tmp_path / "c.csv"
    args = ("--views-at-once", 8, "--report", report, "--confusion", table)
    status, out, _ = evaluated(capsys, models / "heads", videos / "two.txt", *args)
    assert status == 0 and "verb_calibration_error" in out
    headings = [element.text for element in page_of(report).iter("h2")]
    assert {"Classes of noun", "Classes of verb", "Confusion matrix of verb"} <= {*headings}
    noun, verb = table.read_text().split("\n\n")
    assert len(noun.splitlines()) == 4 and len(verb.splitlines()) == 5


@pytest.mark.parametrize(
    ("model", "data", "flags", "words"),
    [
        ("vivit", "missing.txt", (), "missing.txt"),
        ("missing", "good.txt", (), "missing"),
        ("pretrained", "good.txt", (), "pretrained holds no classifier; fine-tune it first"),
        ("vivit", "far.txt", (), "far.txt has labels 5 to 5, the model has classes 0 to 4"),
        ("vivit", "two.txt", (), "two.txt"),
        ("heads", "good.txt", (), "good.txt"),
        ("heads", "two.txt", ("--average", "softmax"), "set evaluation.average=logits (--average"),
        (
            "vivit",
            "typo.csv",
            (),
            "2 of 3 names not among the model's classes: jumps (did you mean jump?), ride",
        ),
        ("vivit", "splits.csv", (), "several splits: test (4 rows), train (1 row); say which"),
        ("vivit", "splits.csv", ("--split", "fold"), "no rows of split fold: test (4 rows), train"),
        ("vivit", "numbered.txt", ("--class-names", "none.txt"), "none.txt: No such file"),
        ("vivit", "other", (), "1 of 1 name not among the model's classes: swim"),
        ("vivit", "bad.txt", ("--views-at-once", "8"), "none of the 1 video of"),
        ("vivit", "good.txt", ("--resize", "20"), "smaller than the crop of 24 x 16"),
        ("vivit", "good.txt", ("--clips", "0"), "--clips must be at least 1, got 0"),
        ("vivit", "good.txt", ("--views-at-once", "-1"), "--views-at-once must be at least 1"),
        ("vivit", "good.txt", ("--threads", "0"), "--threads must be at least 1, got 0"),
        ("vivit", "good.txt", ("--first-frame", "-1"), "--first-frame must be at least 0, got -1"),
        ("vivit", "good.txt", ("--frame-name", "a.jpg"), "it is the same for every number"),
        (
            "vivit",
            "good.txt",
            ("--mesh", "data=3"),
            "--mesh 'data=3' is for 3 devices, there are 8",
        ),
        ("vivit", "good.txt", ("--recipe", "vivit"), "there is no recipe 'vivit'"),
        ("vivit", "good.txt", ("--out", "x.txt"), "--out x.txt ends in '.txt'"),
        ("vivit", "good.txt", ("--report", "x.pdf"), "--report x.pdf ends in '.pdf'"),
        ("vivit", "good.txt", ("--confusion", "no/x.csv"), "there is no directory no"),
        ("vivit", "unlabelled", (), "has no labels for each clip, the model has 1 head;"),
        ("vivit", "good.txt", ("--process", "1"), "--processes 1 --process 1 need --coordinator"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(models, videos, capsys, model, data, flags, words):
    status, out, err = evaluated(capsys, models / model, videos / data, *flags)
    assert status == 2 and words in err and err.count("\n") == 1 and out == ""


def test_nothing_is_left_out_of_the_help(capsys):
    assert main(["evaluate", "--help"]) == 0 and jax.device_count() == 8
    text = capsys.readouterr().out
    for flag in ("--model", "--data", "--recipe", "--clips", "--crops", "--average", "--out"):
        assert flag in text
