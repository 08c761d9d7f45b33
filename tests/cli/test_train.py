# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax pretrain`, `finetune` and `recipes`: what they refuse in a line, and one story."""

import json
import re
import sys
import types

import numpy as np
import pytest
from tiny import SMALL, SMALL_DECODER

import vivit_jax
from vivit_jax.cli.__main__ import main
from vivit_jax.cli.train import _late_answers_dropped
from vivit_jax.recipes import RECIPES, from_dict, recipe_named, to_dict
from vivit_jax.train.log import read_metrics
from vivit_jax.train.loop import Outcome


def sets(**fields):
    """--set with section__field=value."""
    return ["--set", *(f"{name.replace('__', '.')}={value}" for name, value in fields.items())]


def sizes(values):
    return {f"model__config__{name}": value for name, value in values.items()}


VIDEOMAE = SMALL | dict(patch_size=8)
COMMON = dict(data__stride=1, evaluation__resize=16, train__batch_size=8, train__epochs=6)
FINETUNE = (
    ["finetune", "--recipe", "videomae-v1-base-kinetics400-finetune"]
    + sets(
        **COMMON,
        **sizes(VIDEOMAE),
        augment__mixup=0,
        augment__cutmix=0,
        data__repeats=1,
    )
    + sets(augment__rand_augment="none")
)
PRETRAIN = ["pretrain", "--recipe", "videomae-v1-base-kinetics400-pretrain"]
PRETRAIN += sets(
    **COMMON,
    **sizes(VIDEOMAE | SMALL_DECODER),
    optim__warmup_epochs=1,
    mask__ratio=0.75,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """clips/<class> of three classes with four clips each, and lists of them."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    paths = []
    for name in ("a", "b", "c"):
        (root / "clips" / name).mkdir(parents=True)
        for i in range(4):
            paths.append(root / "clips" / name / f"{i}.npy")
            np.save(paths[-1], rng.integers(0, 256, (6, 18, 20, 3), np.uint8))
    (root / "far.txt").write_text("".join(f"{path} 400\n" for path in paths))
    (root / "paths.txt").write_text("".join(f"{path}\n" for path in paths))
    (root / "few.txt").write_text("".join(f"{path} 1\n" for path in paths[:5]))
    return root


def refused(capsys, *args):
    """The one line on stderr of a command that fails."""
    assert main(list(map(str, args))) == 2
    out, line = capsys.readouterr()
    assert out == "" and line.startswith("vivit-jax: error: ") and line.endswith("\n")
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pretrain"], "--recipe is missing; `vivit-jax recipes` lists the names"),
        (["finetune"], "--data (your clips) and --start (the weights to fine-tune"),
        (["finetune", "--recipe", "demo-fintune"], "did you mean demo-finetune"),
        ([*FINETUNE, *sets(optim__lrr=1)], "optim has no field 'lrr'; did you mean lr"),
        ([*FINETUNE, *sets(optim__clip="much")], "optim.clip is 'much', expected a number"),
        ([*FINETUNE, "--set", "optim.lr"], "'optim.lr' is not a setting"),
        ([*FINETUNE, *sets(data__train="x"), "--data", "y"], "data.train is set twice"),
        (["pretrain", *FINETUNE[1:]], "is a recipe to finetune; use vivit-jax finetune"),
        (["finetune", *PRETRAIN[1:]], "is a recipe to pretrain; use vivit-jax pretrain"),
        ([*FINETUNE, "--processes", "2"], "--processes 2 --process 0 need --coordinator"),
        (
            [*FINETUNE, "--coordinator", "x:1", "--processes", "2", "--process", "2"],
            "--process 2 must be from 0 to 1",
        ),
        ([*FINETUNE, "--mesh", "data=3"], "is for 3 devices, there are 8"),
        (FINETUNE, "data.train is empty; say where the clips are"),
        ([*FINETUNE, "--data", "/nowhere"], "/nowhere: No such file"),
        ([*PRETRAIN, "--data", "{data}/clips", "--start", "/nowhere"], "/nowhere"),
        ([*FINETUNE, "--data", "{data}/paths.txt"], "there is no label"),
        ([*FINETUNE, "--data", "{data}/far.txt"], "labels 400 to 400, the model has classes 0 to"),
        ([*FINETUNE, "--data", "{data}/few.txt"], "has 5 clips, train.batch_size is 8"),
        (
            [*FINETUNE, "--data", "{data}/clips", *sets(train__batch_size=12)],
            "12 clips, which 8 devices in 1 part (train.accumulate) cannot divide",
        ),
        (
            [*FINETUNE, "--data", "{data}/clips", *sets(data__validation="{data}/no")],
            "no: No such file",
        ),
        (
            [*PRETRAIN, "--data", "{data}/clips", *sets(mask__ratio=0.001)],
            "mask ratio 0.001 masks 0 of",
        ),
        (
            [*FINETUNE, "--data", "{data}/clips", *sets(model__config__num_channels=4)]
            + sets(augment__colour=0.8),
            "augment.colour is 0.8, which changes colours of RGB clips, and the model takes 4 chan",
        ),
        (
            [*FINETUNE, "--data", "{data}/clips", *sets(model__config__num_channels=4)]
            + sets(augment__rand_augment="rand-m7-n4-mstd0.5-inc1"),
            "4 channels: set augment.rand_augment=none",
        ),
        ([*FINETUNE, *sets(train__seed=2**32)], "train.seed is 4294967296, expected in 0 to below"),
        (["finetune", "--resume"], "holds no run to resume: there is no recipe.json in it"),
        ([*FINETUNE, "--resume"], "holds no run to resume: there is no recipe.json in it"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_leaves_no_directory(args, message, data, tmp_path, capsys):
    args = [arg.replace("{data}", str(data)) for arg in args]
    for mine, usual in (
        ("train.batch_size=12", "train.batch_size=8"),
        ("mask.ratio=0.001", "mask.ratio=0.75"),
        ("augment.rand_augment=rand-m7-n4-mstd0.5-inc1", "augment.rand_augment=none"),
    ):
        if mine in args:
            args.remove(usual)
    assert message in refused(capsys, *args, "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_other_directories_are_left_alone(data, tmp_path, capsys):
    args = [*FINETUNE, "--data", data / "clips", "--out"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "recipe.json").write_text("{")
    assert "is a file" in refused(capsys, *args, tmp_path / "file")
    assert "file is a file; expected a dir" in refused(capsys, *args, tmp_path / "file" / "run")
    assert "/proc/run: no file can be made in /proc" in refused(capsys, *args, "/proc/run")
    assert "name too long; choose another" in refused(capsys, *args, tmp_path / ("a" * 300))
    assert "is not empty; choose a new directory" in refused(capsys, *args, tmp_path / "full")
    assert "holds a run; continue it with --resume" in refused(capsys, *args, tmp_path / "damaged")
    for name, message in (
        ("full", "holds no run"),
        ("empty", "holds no run"),
        ("damaged", "is not valid JSON"),
    ):
        assert message in refused(capsys, "finetune", "--resume", "--out", tmp_path / name)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert found == ["damaged", "damaged/recipe.json", "empty", "file", "full", "full/notes"]


@pytest.mark.parametrize(
    ("given", "resume", "step"),
    [
        ([], False, None),
        (["--resume"], True, None),
        (["--resume", "1200"], True, 1200),
        (["--resume", "auto"], False, None),  # there is no run yet
    ],
)
def test_where_a_run_goes_on(given, resume, step, data, tmp_path, monkeypatch):
    seen = {}

    def train(*args, **options):
        seen.update(options)
        return Outcome(20, 20, None, tmp_path / "models" / "20", {})

    monkeypatch.setattr("vivit_jax.cli.train.train", train)
    args = ["--data", str(data / "clips"), "--out", str(tmp_path / "run")]
    assert main([*PRETRAIN, *given, *args]) == 0
    assert (seen["resume"], seen["resume_step"]) == (resume, step)


@pytest.mark.parametrize("text", ["10-15", "15:10", "0:3", "a:b", ":4", ""])
def test_what_is_no_range_of_steps_to_trace(text, data, tmp_path, capsys):
    args = [*PRETRAIN, "--data", data / "clips", "--out", tmp_path / "run", "--profile", text]
    assert "expected the first and the last step to trace, such as 10:15" in refused(capsys, *args)
    assert not (tmp_path / "run").exists()


def test_late_answers_of_a_save_that_failed_are_not_shown(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    late, other = (
        types.SimpleNamespace(exc_value=RuntimeError(text))
        for text in ("Event loop is closed", "something else")
    )
    with _late_answers_dropped():
        sys.unraisablehook(late)
        sys.unraisablehook(other)
    assert shown == [other] and sys.unraisablehook.__self__ is shown


@pytest.mark.parametrize("step", ["-1", "last", "1.5", "1 2"])
def test_what_is_no_step_to_go_on_from(step, data, tmp_path, capsys):
    line = refused(capsys, *PRETRAIN, "--out", tmp_path / "run", "--resume", *step.split())
    assert "--resume" in line


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_help_names_what_every_run_needs_first(command, capsys):
    assert main([command, "--help"]) == 0
    listed = re.findall(r"^  (--[a-z]+)", capsys.readouterr().out, re.MULTILINE)
    assert listed[:4] == ["--out", "--recipe", "--data", "--start"]
    assert listed[-5:] == ["--coordinator", "--processes", "--process", "--coordinator", "--hang"]


def test_recipes_are_listed_with_what_they_are(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 4 for line in lines)


def test_a_recipe_is_shown_with_its_source_and_every_field(capsys):
    name = "videomae-v1-base-kinetics400-finetune"
    assert main(["recipes", name]) == 0
    shown = capsys.readouterr().out
    assert "fine-tuning on Kinetics-400" in shown.splitlines()[0]
    fields = dict(line.split(" = ", 1) for line in shown.split("\n\n")[-1].splitlines() if line)
    assert fields["name"] == name and fields["optim.layer_decay"] == "0.75"
    values = to_dict(recipe_named(name))
    for section, value in values.items():
        for field in value if isinstance(value, dict) else ():
            assert json.loads(fields[f"{section}.{field}"]) == value[field]
    assert main(["recipes", name, "--json"]) == 0
    assert from_dict(json.loads(capsys.readouterr().out)) == recipe_named(name)


def test_a_recipe_that_is_none_is_told(capsys):
    assert "did you mean demo-vivit" in refused(capsys, "recipes", "demo-vivid")


@pytest.mark.parametrize(("kept", "which"), [(20, "model"), (16, "the best model on the held-out")])
def test_a_model_of_an_earlier_step_is_said_to_be_the_best(
    kept, which, data, tmp_path, capsys, monkeypatch
):
    outcome = Outcome(20, 20, None, tmp_path / "models" / str(kept), {})
    monkeypatch.setattr("vivit_jax.cli.train.train", lambda *args, **options: outcome)
    args = [*PRETRAIN, "--data", str(data / "clips"), "--out", str(tmp_path / "run")]
    assert main(args) == 0
    assert capsys.readouterr().out.startswith(f"step 20 done; {which}")


@pytest.mark.slow
def test_pretraining_then_fine_tuning_then_evaluation(data, tmp_path, capsys):
    """As the commands print it, with a space in the name of the directory."""
    first, then = tmp_path / "pre train", tmp_path / "fine tune"
    clips = str(data / "clips")
    once = [*PRETRAIN, "--data", clips, "--out", str(first), "--tensorboard", "--resume", "auto"]
    assert main([*once, "--profile", "2:3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "12 clips, 1 step an epoch, steps 1 to 6 of 6; mesh data=8;" in said[0]
    model = first / "models" / "6"
    assert said[1] == f"step 6 done; model in {model}, curves in {first}/report.html"
    assert list((first / "tensorboard").glob("events*"))
    assert list((first / "profile").rglob("*.xplane.pb"))
    assert main(once) == 0  # which has nothing left to do
    assert "nothing is left to do" in capsys.readouterr().out
    begin, past = once[:-2], tmp_path / "past"
    begin[begin.index(str(first))] = str(past)
    message = "the profile begins at step 9, and this run takes steps 1 to 6"
    assert message in refused(capsys, *begin, "--profile", "9:12") and not past.exists()

    start = ["--data", clips, "--start", str(model), "--out", str(then)]
    assert main([*FINETUNE, *start, *sets(train__steps=2)]) == 0
    assert main([*FINETUNE, *start, *sets(train__steps=3), "--resume"]) == 0
    assert main(["finetune", "--resume", "--out", str(then)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "nothing is left to do" in said[-2] and said[-1].startswith("step 3 done")
    lines = [line for line in read_metrics(then / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    tuned, _ = vivit_jax.from_pretrained(then / "models" / "3")
    assert tuned.config.labels == ("a", "b", "c")
    assert main(["evaluate", "--model", str(then / "models" / "3"), "--data", clips]) == 0
    assert "videos                   12" in capsys.readouterr().out
