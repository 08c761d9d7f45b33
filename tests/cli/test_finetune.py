# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax finetune` without a recipe: what it says, what it refuses, and what it learns."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import threading

import numpy as np
import pytest
from commands import run_command
from signals import handled
from tiny import SMALL_VIDEOMAE

import vivit_jax
from vivit_jax.cli.__main__ import main
from vivit_jax.cli.suggest import suggested_recipe
from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.models.build import build_model, fresh_params
from vivit_jax.recipes import from_dict
from vivit_jax.train import prepare
from vivit_jax.train.log import read_metrics
from vivit_jax.train.sharding import parse_mesh
from vivit_jax.train.storage.saved_models import best_model
from vivit_jax.train.suggest import facts, memory

ONE = parse_mesh("data=1", 1)
NAMES = ("left turn", "right turn", "stop")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """clips/<class> of three classes with five clips of several sizes, and a tiny start."""
    root, rng = tmp_path_factory.mktemp("finetune"), np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        (root / "my clips" / name).mkdir(parents=True)
        for i in range(5):
            frames = rng.integers(0, 120, (6, 18 + 2 * (i % 2), 20, 3))
            frames[..., number] += 100
            np.save(root / "my clips" / name / f"{i}.npy", frames.astype(np.uint8))
    for name, count in (("one class", 1), ("few", 3), ("nothing", 0)):
        for number in range(max(count, 1)):
            (root / name / "clips" / str(number)).mkdir(parents=True)
            for i in range({"one class": 4, "few": 1, "nothing": 0}[name]):
                np.save(
                    root / name / "clips" / str(number) / f"{i}.npy", frames.astype(np.uint8) + i
                )
    config = vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, use_mean_pooling=False)
    model = build_model(config, "pretraining")
    processor = vivit_jax.VideoProcessor.videomae(size=16, crop_size=(16, 16))
    vivit_jax.save_pretrained(root / "start", model, fresh_params(model, 0), processor)
    return root


def line_of(capsys, *args):
    """The error of a command that is refused, without the program's name."""
    status, out, error = run_command(capsys, "finetune", *args)
    assert status == 2 and out == "" and error.startswith("vivit-jax: error: ")
    return error.removeprefix("vivit-jax: error: ").strip()


@pytest.mark.parametrize("where", ["clips", "memory"])
def test_ctrl_c_while_settings_are_chosen(place, capsys, monkeypatch, tmp_path, where):
    """Also while a step compiles for its memory, which nothing stops: it is not waited for."""
    ended = threading.Event()
    look = facts.inspect

    def interrupted(*args):
        if where == "memory" or not args[0].path.endswith("0.npy"):
            os.kill(os.getpid(), signal.SIGINT)
        return ended.wait(300) if where == "memory" else look(*args)

    monkeypatch.setattr(memory, "_SURE", 0)
    monkeypatch.setattr(
        *{"clips": (facts, "inspect"), "memory": (memory, "_total")}[where], interrupted
    )
    args = ("--data", place / "my clips", "--start", place / "start", "--out", tmp_path / "a" / "b")
    with handled(signal.SIGINT, signal.default_int_handler):
        status, out, error = run_command(capsys, "finetune", *args)
    told = error.splitlines()
    waited, _ = ended.is_set(), ended.set()
    assert status == 130 and out == "" and told[-1] == "vivit-jax: interrupted" and not waited
    assert "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data", "{}/my clips"], "--start (the weights to fine-tune, such as MCG-NJU/videomae"),
        (["--start", "{}/start"], "--data (your clips) missing"),
        (["--data", "{}/nothing/clips", "--start", "{}/start"], "its folders hold no clips"),
        (["--data", "{}/nowhere", "--start", "{}/start"], "nowhere: No such file or directory"),
        (["--data", "{}/my clips", "--start", "{}/nowhere"], "nowhere does not exist, and is not"),
        (
            ["--data", "{}/one class/clips", "--start", "{}/start"],
            "all clips are of one class, 0: there is nothing to tell apart",
        ),
        (
            ["--data", "{}/few/clips", "--start", "{}/start"],
            "no clip can be held out, since each class keeps one to train on",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--validation", "nan"],
            "--validation is nan; expected a share of each class, at least 0 and less than 1",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--validation", "1.5"],
            "--validation is 1.5; expected a share of each class, at least 0 and less than 1",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--validation", "{}/none"],
            "none: No such file or directory",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--set", "train.epoch=3"],
            "train has no field 'epoch'; did you mean epochs",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--mesh", "data=1"],
            "--mesh 'data=1' is for 1 device, there are 8",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--validation", "{}/few/clips"],
            "clips: 3 of 3 names not among the model's classes: 0, 1, 2",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--set", "model.classes=checkpoint"],
            "start holds no classifier; set model.classes=data",
        ),
        (
            ["--data", "{}/my clips", "--start", "{}/start", "--profile", "10:5"],
            "--profile is 10:5; expected the first and the last step",
        ),
        (["--recipe", "{}/none.json"], "none.json"),
    ],
)
def test_what_is_refused_leaves_nothing(args, message, place, tmp_path, capsys):
    args = [arg.replace("{}", str(place)) for arg in args]
    found = line_of(capsys, *args, "--out", tmp_path / "run")
    assert message in found and "\n" not in found
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_refused_together(place, tmp_path, capsys):
    found = line_of(
        capsys, "--data", place / "no", "--start", place / "none", "--out", tmp_path / "run"
    )
    assert found.startswith("2 reasons against this run:\n")
    assert "none does not exist" in found and "no: No such file" in found
    own = ["--start", place / "start", "--data", place / "my clips", "--out", tmp_path / "run"]
    other = ["--validation", place / "few/clips", "--set", "train.batch_size=64"]
    found = line_of(capsys, *own, *other, "--mesh", "data=8")
    assert found.startswith("2 reasons against this run:\n")
    assert "not among the model's classes" in found and "train.batch_size is 64" in found


def test_held_out_clips_that_are_trained_on_are_noticed(place):
    said, clips = [], str(place / "my clips")
    held_out = [f"data.validation={clips}"]
    suggested_recipe(clips, str(place / "start"), ONE, held_out, said.append)
    assert "\n15 held-out clips are also trained on, such as " in said[0]
    said.clear()
    suggested_recipe(clips, str(place / "start"), ONE, [], said.append)
    assert "also trained on" not in said[0]


def test_a_class_without_clips_is_noticed(place, tmp_path, caplog):
    said, clips = [], shutil.copytree(place / "my clips", tmp_path / "clips")
    (clips / "jump").mkdir()
    (clips / "notes.txt").touch()
    suggested_recipe(str(clips), str(place / "start"), ONE, [], said.append)
    assert "\nno clip to train on of jump: never predicted; add clips, or remove it\n" in said[0]
    assert caplog.text.count("1 file is not a clip, such as notes.txt") == 1


def test_a_run_to_start_from_stands_for_its_best_model(finished, place, tmp_path, capsys, caplog):
    run, _, _ = finished
    args = ("--data", place / "no", "--start", run, "--out", tmp_path / "run")
    assert "no: No such file" in line_of(capsys, *args)  # the start is fine
    (told,) = [text for text in caplog.messages if "is a run" in text]
    assert told == f"--start {run} is a run; its best model is {best_model(run)}"
    (tmp_path / "empty" / "models").mkdir(parents=True)
    args = ("--data", place / "my clips", "--start", tmp_path / "empty", "--out", tmp_path / "run")
    assert "has no model yet" in line_of(capsys, *args)


def test_another_run_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text("{}")
    clips = ("--data", place / "my clips", "--start", place / "start")
    found = line_of(capsys, *clips, "--out", tmp_path)
    assert "holds a run; continue it with --resume, or choose another" in found
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


@pytest.fixture(scope="module")
def finished(place):
    """A short run without a recipe: its directory, its arguments and what it printed."""
    out, said = place / "run", io.StringIO()
    args = ["--data", place / "my clips", "--start", place / "start", "--out", out]
    settings = ["train.epochs=8", "train.batch_size=8", "optim.lr=1e-9"]
    args = [*map(str, args), "--set", *settings]
    with contextlib.redirect_stdout(said):
        assert main(["finetune", *args]) == 0
    return out, args, said.getvalue()


def test_settings_are_chosen_said_and_saved(finished, place):
    out, _, said = finished
    assert f"{place}/my clips: 15 clips of 3 classes, 12 to train on, 3 held out" in said
    recipe = from_dict(json.loads((out / "recipe.json").read_text()))
    rows = dict(re.findall(r"^([a-z]+\.[a-z_]+) +(\S+)  +\S.*$", said, re.MULTILINE))
    assert rows["train.epochs"] == "8" and rows["optim.lr"] == "1e-09"
    assert rows["augment.flip"] == "0" and "left turn, right turn" in said
    assert recipe.augment.flip == 0 and recipe.augment.crop_scale == (0.5, 1.0)
    assert recipe.data.hold_out == 0.2 and recipe.data.stride == 1
    lists = f"--data {shlex.quote(f'{out}/train.csv')} --validation"
    assert f"\n  vivit-jax probe --model {place}/start {lists}" in said
    assert "4 frames of 16x16, prepared as its preprocessor_config.json says\n" in said
    # The split can be used by itself.
    train_clips, held = (read_dataset(out / f"{name}.csv") for name in ("train", "validation"))
    assert (len(train_clips), len(held)) == (12, 3)
    assert held.classes == NAMES and {e.label for e in held.examples} == {0, 1, 2}
    model, _ = vivit_jax.from_pretrained(max((out / "models").iterdir()))
    assert model.config.labels == NAMES


def test_its_model_is_evaluated_as_it_was_trained(finished, tmp_path, capsys):
    """Without a word of the stride, which is 1, on the run's own held-out clips."""
    out, _, _ = finished
    model = max((out / "models").iterdir(), key=lambda path: int(path.name))
    config = json.loads((model / "config.json").read_text())
    assert config["frame_stride"] == 1 and "view_sampler" not in config
    lines = {e["step"]: e for e in read_metrics(out / "metrics.jsonl") if e["kind"] == "evaluate"}
    args = ("--model", model, "--data", out / "validation.csv", "--out", tmp_path / "result.json")
    status, said, _ = run_command(capsys, "evaluate", *args)
    assert status == 0 and "of 4 frames, 1 apart (as the model was trained), sampler lin" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["accuracy"] == lines[int(model.name)]["accuracy"]
    assert result["summary"]["protocol"]["stride"] == 1
    status, said, _ = run_command(capsys, "evaluate", *args, "--overwrite", "--stride", 2)
    assert status == 0 and "of 4 frames, 2 apart (the model's: 1), sampler" in said
    assert "4 frames, one after the other, from the middle" in (model / "README.md").read_text()


def test_a_run_ends_early_and_its_recipe_repeats_it(finished, place, tmp_path, capsys):
    """Nothing is learned at this rate, so that no validation is better than the first."""
    out, _, _ = finished
    lines = read_metrics(out / "metrics.jsonl")
    steps = [line["step"] for line in lines if line["kind"] == "evaluate"]
    recipe = from_dict(json.loads((out / "recipe.json").read_text()))
    # One epoch is one step; the patience is 3 validations.
    assert recipe.train.patience == 3 and 4 <= steps[-1] < 8
    ended = [line["text"] for line in lines if line["kind"] == "event"]
    assert ended[-1].startswith(
        f"ended early: the held-out score was no better than at step {steps[0]} in 3 evaluations"
    )
    assert f"step {steps[-1]} done of 8" in finished[2]
    again = tmp_path / "again"
    status, said, _ = run_command(
        capsys, "finetune", "--recipe", out / "recipe.json", "--out", again
    )
    assert status == 0 and "setting" not in said
    numbers = ("loss", "accuracy", "lr", "step")
    told = [[line.get(n) for n in numbers] for line in lines]
    repeated = [[line.get(n) for n in numbers] for line in read_metrics(again / "metrics.jsonl")]
    assert repeated == told


@pytest.mark.slow
def test_a_later_set_replaces_an_earlier_one(finished, tmp_path, capsys, monkeypatch):
    """So that the settings of a message can be pasted after those that they mend."""
    listings, read = [], prepare.read_dataset
    monkeypatch.setattr(
        prepare, "read_dataset", lambda *args, **how: listings.append(args) or read(*args, **how)
    )
    _, args, _ = finished
    args = [a.replace("/run", "/other") if a.endswith("/run") else a for a in args]
    wrong = ["--set", "train.batch_size=99", "optim.warmup_epochs=9", "train.accumulate=8"]
    found = line_of(capsys, *args, *wrong)
    assert "3 reasons against this run" in found
    fitting = shlex.split(found.partition("what fits: ")[2])
    listings.clear()
    status, said, _ = run_command(capsys, "finetune", *args, *wrong, *fitting, "--validation=0")
    assert status == 0 and "held out" not in said
    assert len(listings) == 1  # or its warnings would be told twice
