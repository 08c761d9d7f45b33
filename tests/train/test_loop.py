# SPDX-License-Identifier: Apache-2.0
"""Runs in this process: what they write, how they stop and resume, and what they start from."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
import types

import numpy as np
import pytest
from helpers import assert_close, forward, random_params, to_torch
from helpers import clip as random_clip
from signals import handled
from tiny import SMALL_VIDEOMAE, SMALL_VIVIT
from tiny_recipes import FINETUNE, PRETRAIN, changed
from tiny_runs import NAME, PLAIN, assert_same, lines, settings, state, write_clip

import vivit_jax
from vivit_jax import param_tree
from vivit_jax.cli.__main__ import main
from vivit_jax.data.datasets import dataset
from vivit_jax.data.datasets.dataset import from_objects, read_dataset
from vivit_jax.data.pipeline import Batches
from vivit_jax.errors import UserError, VideoError
from vivit_jax.recipes.recipe import ModelSettings
from vivit_jax.train import loop, setup
from vivit_jax.train.clock import MEASURED
from vivit_jax.train.evaluation import evaluate
from vivit_jax.train.log import MetricLog, read_metrics
from vivit_jax.train.metrics import checkpoint_score
from vivit_jax.train.processes import stalls
from vivit_jax.train.processes.stop_signals import stop_signals
from vivit_jax.train.sharding import make_mesh, parse_mesh
from vivit_jax.train.start.initial_model import described_model, description, starting_model

FOLDERS = ("blue", "green", "red", "white")
STEPS = 12  # 4 epochs of 3 steps
STOPPED = 5  # by a signal, neither at the end of an epoch nor where a checkpoint is due
ONE = parse_mesh("data=1", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train/<class> with one damaged clip; test/ lacks the first class, so that numbers differ."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, folders in (("train", FOLDERS), ("test", FOLDERS[1:])):
        for folder in folders:
            (root / split / folder).mkdir(parents=True)
            for i in range(6):
                write_clip(root / split / folder / f"{i}.npy", FOLDERS.index(folder), rng)
    (root / "train" / "green" / "damaged.npy").write_bytes(b"\x93NUMPY no more")
    return root


@pytest.fixture(scope="module")
def recipe(data):
    return changed(
        dataclasses.replace(FINETUNE, augment=PLAIN),
        model__config=SMALL_VIDEOMAE | dict(num_labels=4, drop_path_rate=0.3, head_dropout=0.0),
        optim__layer_decay=None,
        optim__clip=None,
        data__train=str(data / "train"),
        data__validation=str(data / "test"),
        data__max_bad_share=0.2,
        train__batch_size=8,
        train__checkpoint_every=4,
        train__evaluate_every=2,
    )


@pytest.fixture(scope="module", autouse=True)
def equal_steps_are_compiled_once():
    """Runs of one recipe on one mesh share the compiled step, which takes seconds."""
    made, make_step = {}, setup.make_step

    def remembered(model, optimizer, schedule, recipe, processor, mesh, shapes, own):
        free = dict(steps=None, checkpoint_every=None, keep=1, max_bad_steps=1)
        rates = [float(schedule(i)) for i in range(8)]
        train = dataclasses.replace(recipe.train, **free)
        key = (model, recipe.task, recipe.optim, recipe.augment, recipe.mask, train, rates)
        key = repr((*key, recipe.data.repeats, processor.to_dict(), mesh))
        if key not in made:
            made[key] = make_step(model, optimizer, schedule, recipe, processor, mesh, shapes, own)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_step", remembered)
        yield


def run(recipe, out, mesh=ONE, **options):
    """(outcome, lines said)."""
    said = []
    return loop.train(recipe, out, mesh_sizes=mesh, say=said.append, **options), said


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run that nothing stopped."""
    return run(recipe, tmp_path_factory.mktemp("whole") / "run")[0]


@contextlib.contextmanager
def interrupted(number, step):
    """New runs get a signal while the batch of that step is read."""

    class Interrupting(loop.Clock):
        fetched = 0

        def fetch(self, batches, running):
            self.fetched += 1
            if self.fetched == step:
                signal.raise_signal(number)
            return super().fetch(batches, running)

    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    with handled(number, handler), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Clock", Interrupting)
        yield
        assert signal.getsignal(number) is handler


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """The same, stopped by SIGTERM."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with interrupted(signal.SIGTERM, step=STOPPED):
        outcome, _ = run(recipe, out)
    assert (outcome.step, outcome.steps, outcome.stopped) == (STOPPED, STEPS, "SIGTERM")
    return out


def files(out):
    """Every file below a directory with its bytes."""
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_run_tells_each_step_once_and_each_validation(whole):
    out = whole.model.parents[1]
    assert (whole.step, whole.steps, whole.stopped) == (STEPS, STEPS, None)
    told = lines(out)
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    assert told[-1]["loss"] < told[0]["loss"] - 0.1
    # One warm-up epoch to 1e-2, then a cosine.
    np.testing.assert_allclose([line["lr"] for line in told[:4]], [0, 5e-3, 1e-2, 1e-2], rtol=0.05)
    validated = lines(out, "evaluate")
    assert [line["step"] for line in validated] == [6, 12]
    assert {line["videos"] for line in validated} == {18}
    assert validated[-1]["accuracy"] == whole.metrics["accuracy"]
    (start,) = lines(out, "event")
    assert start["step"] == 0 and "fresh" in start["text"]
    report = (out / "report.html").read_text()
    assert report.startswith("<!DOCTYPE html>") and str(out.parent) not in report
    best = max(validated, key=lambda line: (line["accuracy"], -line["loss"], line["step"]))
    held = json.loads((out / "validation.json").read_text())
    assert held["step"] == best["step"] and held["score"] == checkpoint_score(best)
    assert f"best step {best['step']}" in report
    assert held["summary"]["videos"] == 18 and held["summary"]["protocol"]["clips"] == 1
    (head,) = held["heads"]
    right = [a == b for a, b in zip(head["labels"], head["answers"], strict=True)]
    assert np.mean(right) == pytest.approx(best["accuracy"], abs=1e-6)
    assert ("src=" in report) == (not all(right)) and "Confusion matrix" in report


def test_waiting_for_data_is_a_share_of_the_time(recipe, tmp_path, monkeypatch):
    """Also of steps that are reported one after another, or that end an epoch; once, a stall."""
    following, steps = Batches.__next__, itertools.count(1)

    def slow(batches):
        time.sleep(1.2 if next(steps) == 9 else 0.03)
        return following(batches)

    monkeypatch.setattr(Batches, "__next__", slow)
    monkeypatch.setattr(stalls, "_LEAST", 0.5)
    run(recipe, tmp_path)
    told = read_metrics(tmp_path / "metrics.jsonl")
    steps = [line for line in told if line["kind"] == "train"]
    assert {*MEASURED} - {"mfu"} <= steps[0].keys()
    shares = [line["wait_share"] for line in steps]
    assert min(shares) >= 0 and max(shares) <= 1
    assert np.mean(shares) > 0.1  # all but the steps reported at once, with no batch between
    (stall,) = [line for line in told if line.get("about") == "stall"]
    assert 7 <= stall["step"] <= 8
    assert "MainThread: " in stall["notice"] and "batch = next(batches)" in stall["notice"]
    assert "batch = next(batches)" in (tmp_path / "report.html").read_text()


def test_the_best_and_the_last_checkpoints_are_kept(whole):
    out = whole.model.parents[1]
    # Of equal accuracies the one with the lower loss is better.
    best = max(lines(out, "evaluate"), key=lambda line: (line["accuracy"], -line["loss"]))["step"]
    for kind in ("checkpoints", "models"):
        assert {int(path.name) for path in (out / kind).iterdir()} == {best, 8, 12}
    assert whole.model == out / "models" / str(best)


def test_clips_of_training_and_of_validation_are_named(recipe, data, tmp_path, monkeypatch):
    """An unforeseen error: the run continues, reports it, and keeps its earlier reports."""
    bad = [str(data / part / "red" / "0.npy") for part in ("train", "test")]
    opened = dataset.open_array

    def fails(path):
        if path in bad:
            raise ValueError("31 is not a valid Type")
        return opened(path)

    train = dataclasses.replace(recipe.train, steps=6, evaluate_every=1)
    recipe = dataclasses.replace(recipe, train=train)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "open_array", fails)
        outcome, said = run(recipe, tmp_path / "run")
    assert outcome.step == 6
    named = tmp_path / "run" / "bad_clips.json"
    found = json.loads(named.read_text())
    damaged = str(data / "train" / "green" / "damaged.npy")
    assert sorted(found["clips"]) == [damaged, bad[0]] and list(found["validation"]) == [bad[1]]
    for path, why in ((bad[0], found["clips"][bad[0]]), (bad[1], found["validation"][bad[1]])):
        assert why.startswith(f"{path}: ValueError: 31 is not a valid Type (unforeseen, in ")
    counted = "2 clips of training and 1 clip of validation"
    assert said[-1] == f"left out, as they could not be read: {counted}; {named} says why"
    report = (named.parent / "report.html").read_text()
    assert "Clips missing from the last validation: 1." in report


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        ("open_array", VideoError("cut off"), "20 of 20 clips could not be read, .*cut off"),
        ("_placed", RuntimeError("RESOURCE_EXHAUSTED: of memory"), "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_fails_before_the_first_step_leaves_nothing(
    recipe, tmp_path, monkeypatch, broken, error, message
):
    def fails(*_):
        raise error

    monkeypatch.setattr(loop if broken == "_placed" else dataset, broken, fails)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "runs" / "one", tmp_path / "empty"):
        with pytest.raises((UserError, RuntimeError), match=message):
            run(recipe, out)
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]


def test_an_interrupted_beginning_stays(recipe, tmp_path, monkeypatch):
    """It can be resumed, and an error of the resumed run does not take it back."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Loop, "take_steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run")
    held = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"recipe.json", "model.json", "metrics.jsonl"} <= held

    def fails(*_):
        raise UserError("broken")

    monkeypatch.setattr(loop._Loop, "take_steps", fails)
    with pytest.raises(UserError, match="broken"):
        run(recipe, tmp_path / "run", resume=True)
    assert held <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_damaged_clip_is_named(whole, data):
    found = json.loads((whole.model.parents[1] / "bad_clips.json").read_text())
    assert list(found["clips"]) == [str(data / "train" / "green" / "damaged.npy")]
    # 96 clips were used, of 24 or 25 in an epoch.
    assert found["left_out"] in (1, 2, 3, 4) and found["read"] == 96 + found["left_out"]


def test_the_model_opens_in_transformers_with_the_folders_names(whole):
    import torch
    import transformers

    directory = whole.model.parent / str(STEPS)
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(directory).eval()
    assert theirs.config.id2label == dict(enumerate(FOLDERS))
    model, params = vivit_jax.from_pretrained(directory)
    assert model.config.labels == FOLDERS
    clip = random_clip(model.config)
    with torch.no_grad():
        expected = theirs(to_torch(clip)).logits.numpy()
    assert_close(forward(model, params, clip).logits, expected, "logits")
    # The average is exported, not the trained parameters.
    last = state(whole.model.parents[1], STEPS)
    for path, value in param_tree.flatten(params).items():
        np.testing.assert_array_equal(last[f"average/{path}"], value, err_msg=path)
    assert np.abs(last["params/head/kernel"] - last["average/head/kernel"]).max() > 1e-4


def test_the_model_comes_with_its_preprocessing(whole):
    import transformers

    processor = vivit_jax.VideoProcessor.from_pretrained(whole.model)
    named = vivit_jax.VideoProcessor.named("videomae-imagenet", size=16, crop_size=16)
    assert processor.to_dict() == named.to_dict()
    theirs = transformers.VideoMAEImageProcessor.from_pretrained(whole.model)
    assert dict(theirs.size) == {"shortest_edge": 16}
    assert dict(theirs.crop_size) == {"height": 16, "width": 16}
    assert list(theirs.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("source", ["objects", pytest.param("table", marks=pytest.mark.slow)])
def test_names_of_a_table_or_an_object_train_as_folders_do(source, whole, recipe, data, tmp_path):
    """A table that has both splits; objects that replace what the recipe says."""
    train, test = (read_dataset(data / split) for split in ("train", "test"))
    rows = [
        [(e.path, dataset.classes[e.label]) for e in dataset.examples] for dataset in (train, test)
    ]
    options = {}
    if source == "table":
        table = tmp_path / "table.csv"
        lines = [
            f"{path},{name},{split}\n"
            for split, part in zip(("train", "test"), rows, strict=True)
            for path, name in part
        ]
        table.write_text("".join(["video,class,split\n", *lines]))
        changes = dict(data__train=str(table), data__validation=str(table))
    else:
        options = dict(dataset=from_objects(rows[0]), validation=from_objects(rows[1]))
        changes = dict(data__train="", data__validation=None)
    outcome, _ = run(changed(recipe, **changes), tmp_path / "run", **options)
    assert outcome.metrics == whole.metrics
    assert vivit_jax.from_pretrained(outcome.model)[0].config.labels == FOLDERS


def test_validation_goes_by_the_names_of_folders(whole, recipe, data, tmp_path):
    """Its folder 0 is the model's class 1."""
    model, params = vivit_jax.from_pretrained(whole.model.parent / str(STEPS))
    clips = [(path, FOLDERS.index(path.parent.name)) for path in (data / "test").rglob("*.npy")]
    (tmp_path / "list.txt").write_text("\n".join(f"{path} {label}" for path, label in clips))
    result = evaluate(
        model,
        params,
        read_dataset(tmp_path / "list.txt"),
        dataclasses.replace(recipe.evaluation, clips=1),
        vivit_jax.VideoProcessor.from_pretrained(whole.model),
        mesh=make_mesh(ONE),
    )
    assert result.metrics == {k: v for k, v in whole.metrics.items() if k != "loss"}
    assert whole.metrics["accuracy"] > 0.5


def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(
    whole, stopped, recipe, tmp_path
):
    assert lines(stopped) == lines(whole.model.parents[1])[:STOPPED]
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    outcome, said = run(recipe, out, resume=True)
    assert (outcome.step, outcome.stopped) == (STEPS, None) and "steps 6 to 12 of 12" in said[0]
    assert_same(out, whole.model.parents[1], STEPS)
    for kind in ("evaluate", "event"):
        assert lines(out, kind) == lines(whole.model.parents[1], kind)
    bad = [(each / "bad_clips.json").read_text() for each in (out, whole.model.parents[1])]
    assert bad[0] == bad[1]
    assert outcome.model.name == whole.model.name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_a_run_of_eight_devices_is_interrupted_and_goes_on_with_one(
    mesh, whole, recipe, tmp_path, capfd
):
    """By the command line and Ctrl-C, then from Python, with the step in two parts."""
    out, expected = tmp_path / "a run", whole.model.parents[1]
    args = ["finetune", "--out", str(out), "--mesh", mesh, "--recipe", NAME]
    with interrupted(signal.SIGINT, step=3):
        assert main([*args, "--set", *settings(recipe)]) == 130
    printed = capfd.readouterr()
    left_out = f"left out, as they could not be read: 1 clip of training; {out}/bad_clips.json"
    assert printed.out.splitlines()[1:] == [
        f"{left_out} says why",
        "stopped by SIGINT after step 3; go on with",
        f"  vivit-jax finetune --out '{out}' --resume",
    ]
    bad, *said = [line for line in printed.err.splitlines() if not line.startswith("step ")]
    assert bad.startswith("left out, as every clip that cannot be read will be: ")
    assert said == [
        "SIGINT: ending after this step or validation, with a checkpoint; again: at once"
    ]
    outcome, _ = run(changed(recipe, train__accumulate=2), out, resume=True)
    assert outcome.step == STEPS
    assert lines(out) != lines(expected)  # else the comparison would be of nothing
    assert_same(out, expected, STEPS, rtol=2e-5)


def test_threads_and_steps_may_be_others_when_a_run_goes_on(whole, stopped, recipe, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    fewer = changed(recipe, data__threads=1, train__steps=7)
    outcome, said = run(fewer, out, resume=True)
    assert (outcome.step, outcome.stopped) == (7, None) and "steps 6 to 7 of 12" in said[0]
    assert json.loads((out / "recipe.json").read_text())["train"]["steps"] == 7
    assert lines(out) == lines(whole.model.parents[1])[:7]


def test_a_signal_within_a_validation_ends_the_run_without_another_step(recipe, tmp_path):
    class Interrupting(MetricLog):
        def write(self, kind, step, values):
            super().write(kind, step, values)
            if kind == "evaluate":
                signal.raise_signal(signal.SIGTERM)

    recipe = changed(recipe, train__evaluate_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MetricLog", Interrupting)
        outcome, _ = run(recipe, tmp_path / "run")
    (validated,) = lines(tmp_path / "run", "evaluate")
    assert (outcome.step, outcome.stopped) == (validated["step"], "SIGTERM")
    assert outcome.step < outcome.steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_not_held(number):
    received = []

    def second(*_):
        return received.append("second")

    with handled(number, second), stop_signals() as first:
        signal.raise_signal(number)
        assert (first, received) == ([number.name], [])
        signal.raise_signal(number)
        assert (first, received) == ([number.name], ["second"])


def test_a_signal_that_is_ignored_stays_so():
    with handled(signal.SIGINT, signal.SIG_IGN), stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert not received
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == ["SIGTERM"]


def closed():
    stream = io.TextIOWrapper(io.FileIO(os.devnull, "w"))
    stream.close()
    return stream


def unread():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    "stream",
    [lambda: None, lambda: types.SimpleNamespace(isatty=bool), io.StringIO, closed, unread],
)
def test_a_signal_is_noted_where_nobody_can_be_told(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    with stop_signals() as received:
        signal.raise_signal(signal.SIGTERM)
    assert received == ["SIGTERM"]


def test_data_that_moved_are_known_again_and_others_refused(whole, stopped, recipe, data, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(stopped, out)
    shutil.copytree(data, moved)
    fields = dict(data__train=str(moved / "train"), train__steps=7)
    clip = sorted((moved / "train").rglob("*.npy"))[0]
    clip.rename(clip.with_name("zzz.npy"))
    with pytest.raises(UserError, match="lists other clips or labels than when the run was saved"):
        run(changed(recipe, **fields), out, resume=True)
    clip.with_name("zzz.npy").rename(clip)
    outcome, _ = run(changed(recipe, **fields), out, resume=True)
    assert outcome.step == 7 and lines(out) == lines(whole.model.parents[1])[:7]


def test_a_run_at_its_end_says_so_and_changes_nothing(whole, recipe):
    out = whole.model.parents[1]
    before = files(out)
    outcome, said = run(recipe, out, resume=True)
    assert (outcome.step, outcome.stopped, outcome.model) == (STEPS, None, whole.model)
    assert said == [f"{out}: the run has reached its last step, 12 of 12; nothing is left to do"]
    after = files(out)
    assert before.keys() == after.keys()
    assert {path for path in before if before[path] != after[path]} <= {"report.html"}


def test_a_model_that_is_gone_is_written_again_from_its_checkpoint(whole, recipe, tmp_path, caplog):
    first, out = whole.model.parents[1], tmp_path / "run"
    shutil.copytree(first, out)
    shutil.rmtree(out / "models" / str(STEPS))
    run(recipe, out, resume=True)
    told = f"{out}/models/{STEPS} is gone; it is written again from the checkpoint"
    assert [message for message in caplog.messages if str(out) in message] == [told]
    for path in (first / "models" / str(STEPS)).iterdir():
        assert (out / "models" / str(STEPS) / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("chosen", [False, True], ids=["damaged", "chosen"])
def test_a_run_goes_on_from_an_earlier_checkpoint(whole, recipe, tmp_path, caplog, chosen):
    """Its latest one is damaged, or another one is asked for; it ends bit for bit the same."""
    first, out = whole.model.parents[1], tmp_path / "run"
    shutil.copytree(first, out)
    *_, before, latest = sorted(int(path.name) for path in (out / "checkpoints").iterdir())
    assert latest == STEPS
    if not chosen:
        file = max(out.glob(f"checkpoints/{latest}/state/**/d/*"), key=lambda p: p.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 1
        file.write_bytes(data)
    outcome, said = run(recipe, out, resume=True, resume_step=before if chosen else None)
    assert f"steps {before + 1} to {STEPS} of {STEPS}" in said[0] and outcome.step == STEPS
    warnings = [message for message in caplog.messages if str(out) in message]
    told = [f"resuming from step {before}: the next checkpoint replaces the later "]
    if not chosen:
        told.insert(0, f"the checkpoint of step {latest}, {out}/checkpoints/{latest}, is damaged: ")
    assert len(warnings) == len(told) and all(map(str.startswith, warnings, told)), warnings
    assert_same(out, first, STEPS)
    for kind in ("checkpoints", "models"):
        assert (out / kind / str(STEPS)).is_dir()
    model = "model.safetensors"
    ours, theirs = (each / "models" / str(STEPS) / model for each in (out, first))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_step_that_there_is_no_checkpoint_of(whole, recipe, tmp_path):
    with pytest.raises(UserError, match=rf"holds no checkpoint of step 5; it has .*{STEPS}$"):
        run(recipe, whole.model.parents[1], resume=True, resume_step=5)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(whole, recipe, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("recipe.json", "metrics.jsonl"):
        shutil.copy(whole.model.parents[1] / name, out)
    outcome, said = run(changed(recipe, train__steps=2), out, resume=True)
    assert outcome.step == 2 and "steps 1 to 2 of 12" in said[0]
    assert lines(out) == lines(whole.model.parents[1])[:2]


@pytest.mark.parametrize(
    ("fields", "resume", "message"),
    [
        ({}, False, "holds a run; continue it with --resume, or choose another directory"),
        (
            dict(optim__lr=1e-3, train__seed=5),
            True,
            "optim.lr 0.01 there, 0.001 now; train.seed 0 there, 5 now; leave these as they were",
        ),
        (
            {f"optim__{name}": 0.5 for name in ("lr", "b1", "b2", "eps", "clip", "ema")}
            | dict(augment__erase=0.5, augment__flip=0.0, train__epochs=3),
            True,
            "optim.lr 0.01 there, 0.5 now; .*; and 1 more; leave",
        ),
    ],
)
def test_a_directory_with_a_run_is_left_alone(fields, resume, message, whole, recipe, tmp_path):
    out = whole.model.parents[1]
    before = files(out)
    with pytest.raises(UserError, match=message):
        run(changed(recipe, **fields), out, resume=resume)
    assert files(out) == before


def test_too_many_damaged_clips_stop_a_run_that_can_go_on(whole, recipe, tmp_path):
    with pytest.raises(UserError, match=r"data.max_bad_share 0.01: .*damaged.npy"):
        run(changed(recipe, data__max_bad_share=0.01), tmp_path)
    taken = lines(tmp_path)[-1]["step"]
    assert taken % 4 and taken % 6, "a checkpoint was due anyway; use another seed"
    assert max(int(path.name) for path in (tmp_path / "models").iterdir()) == taken
    run(recipe, tmp_path, resume=True)
    assert_same(tmp_path, whole.model.parents[1], STEPS)


@pytest.fixture
def start(whole, tmp_path):
    """A copy of a trained classifier's directory, with its head changed."""

    def copy(change):
        from safetensors.numpy import load_file, save_file

        directory = tmp_path / "start"
        shutil.copytree(whole.model, directory)
        tensors = load_file(directory / "model.safetensors")
        tensors["classifier.bias"] = change(tensors["classifier.bias"])
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return str(directory)

    return copy


def test_steps_that_stay_without_finite_loss_stop_a_run(recipe, start, tmp_path):
    broken, out = start(lambda bias: bias * np.nan), tmp_path / "run"
    with pytest.raises(UserError, match="5 steps in a row, up to step 5, had no finite loss"):
        run(changed(recipe, model__start=broken), out)
    told = lines(out)
    assert [line["step"] for line in told] == [1, 2, 3, 4, 5, 6] and np.isnan(told[-1]["loss"])
    kept = state(out, 6)
    assert kept["bad_steps"] == kept["skipped"] == 6
    _, params = vivit_jax.from_pretrained(broken)
    for path, value in param_tree.flatten(params).items():
        np.testing.assert_array_equal(kept[f"params/{path}"], value, err_msg=path)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A pre-trained model's directory, and its params, which are large."""
    model = vivit_jax.VideoMAEForPreTraining(
        vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, use_mean_pooling=False)
    )
    params, directory = random_params(model), tmp_path_factory.mktemp("start") / "autoencoder"
    vivit_jax.save_pretrained(directory, model, params)
    return str(directory), params


@pytest.mark.slow
def test_fine_tuning_goes_on_where_pretraining_ended(recipe, tmp_path):
    """By the directories of models that runs write."""
    plain = dataclasses.replace(PRETRAIN.augment, crop="center", flip=0.0)
    first = dataclasses.replace(PRETRAIN, data=recipe.data, augment=plain, optim=recipe.optim)
    outcome, _ = run(changed(first, train__batch_size=8, train__steps=2), tmp_path / "first")
    assert outcome.model.name == "2" and 0 < outcome.metrics["loss"] < 10
    begun = changed(recipe, model__start=str(outcome.model), train__steps=1, optim__lr=1e-30)
    then, _ = run(begun, tmp_path / "then")
    _, pretrained = vivit_jax.from_pretrained(outcome.model)
    # It is an average of equal values, which rounds.
    assert_encoder(vivit_jax.from_pretrained(then.model)[1], pretrained, rtol=1e-6)
    told = json.loads((tmp_path / "then" / "model.json").read_text())["start"]
    assert str(outcome.model) in told and "multiplied by 0.001" in told


def assert_encoder(params, expected, rtol=0.0):
    ours, theirs = (param_tree.flatten(each["backbone"]) for each in (params, expected))
    paths = [path for path in theirs if not path.startswith("ln_final")]
    assert len(paths) == 17
    for path in paths:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=rtol, err_msg=path)


def test_fine_tuning_starts_from_an_autoencoder(autoencoder):
    directory, pretrained = autoencoder
    found = starting_model(changed(FINETUNE, model__start=directory), FOLDERS)
    assert_encoder(found.params, pretrained)
    config = found.model.config
    assert config.labels == FOLDERS and config.use_mean_pooling
    assert (config.drop_path_rate, config.head_dropout) == (0.3, 0.2)
    # As its authors hand it over: a new norm and a hundredth of the usual classifier.
    assert (np.asarray(found.params["fc_norm"]["scale"]) == 1).all()
    kernel = np.asarray(found.params["head"]["kernel"])
    assert kernel.shape == (16, 4) and 0 < np.abs(kernel).max() < 1e-4
    assert "the classifier is multiplied by 0.001" in found.report


def test_pretraining_starts_from_an_autoencoder_with_its_decoder(autoencoder):
    directory, pretrained = autoencoder
    found = starting_model(changed(PRETRAIN, model__start=directory))
    for path, value in param_tree.flatten(pretrained).items():
        np.testing.assert_array_equal(param_tree.flatten(found.params)[path], value, err_msg=path)


def test_fine_tuning_starts_from_a_classifier(whole, recipe):
    """With its head where it has as many classes, else with a fresh one."""
    _, trained = vivit_jax.from_pretrained(whole.model)
    begun = changed(recipe, model__start=str(whole.model))
    same = starting_model(begun)
    assert same.model.config.labels == FOLDERS
    np.testing.assert_array_equal(same.params["head"]["kernel"], trained["head"]["kernel"])
    other = starting_model(begun, ("a", "b", "c"))
    assert other.model.config.labels == ("a", "b", "c")
    assert other.params["head"]["kernel"].shape == (16, 3)
    assert "num_labels is 3, the checkpoint's classifier has 4" in other.report
    for found in (same, other):
        assert_encoder(found.params, trained)


VIVIT = ModelSettings(
    preset="vivit-b-16x2-fe-kinetics400",
    config=SMALL_VIVIT | dict(num_temporal_layers=1),
)


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    """A tiny image ViT of transformers, and its directory."""
    import transformers

    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes, num_labels=7)
    model = transformers.ViTForImageClassification(config)
    directory = tmp_path_factory.mktemp("image") / "vit"
    model.save_pretrained(directory)
    return str(directory), model


def test_a_vivit_starts_from_an_image_model(image_model):
    directory, theirs = image_model
    settings = dataclasses.replace(VIVIT, start=directory)
    found = starting_model(dataclasses.replace(FINETUNE, model=settings), FOLDERS)
    assert found.model.config.labels == FOLDERS
    assert found.params["head"]["kernel"].shape == (16, 4)
    tensors = {name: value.detach().numpy() for name, value in theirs.state_dict().items()}
    (name,) = (name for name in tensors if name.endswith("patch_embeddings.projection.weight"))
    kernel = np.asarray(found.params["backbone"]["patch_embed"]["kernel"])
    # The later frame of a tubelet sees what the image model sees.
    np.testing.assert_array_equal(kernel[1], tensors[name].transpose(2, 3, 1, 0))
    assert not kernel[0].any() and "inflated" in found.report


@pytest.mark.parametrize(
    ("wanted", "start", "message"),
    [
        (FINETUNE, "image", "an image model, from which only a ViViT classifier starts"),
        (dataclasses.replace(FINETUNE, model=VIVIT), "mae", "holds a videomae, .* is a vivit"),
        (FINETUNE, "nowhere", "nowhere"),
        (dataclasses.replace(PRETRAIN, model=VIVIT), "mae", "ViViT, which has no masked pre-train"),
    ],
)
def test_a_start_that_does_not_fit_is_told(wanted, start, message, image_model, autoencoder):
    source = {"image": image_model[0], "mae": autoencoder[0]}.get(start, "/nowhere")
    with pytest.raises(UserError, match=message):
        starting_model(changed(wanted, model__start=source), FOLDERS)


@pytest.mark.parametrize(
    ("wanted", "settings", "told"),
    [
        (
            FINETUNE,
            dict(num_attention_heads=4),
            "num_attention_heads 4 (there 2); other heads change what the weights compute; "
            "take the checkpoint's: --set model.config.num_attention_heads=2",
        ),
        (
            PRETRAIN,
            dict(decoder_num_attention_heads=4, qkv_bias=False),
            "--set model.config.qkv_bias=true model.config.decoder_num_attention_heads=2",
        ),
        (
            FINETUNE,
            dict(hidden_size=32, num_attention_heads=4, patch_size=(4, 8), hidden_act="relu"),
            "hidden_size 32 (there 16), num_attention_heads 4 (there 2), patch_size (4, 8) (there "
            "8); take the checkpoint's: --set model.config.hidden_size=16 "
            "model.config.num_attention_heads=2 model.config.patch_size=8",
        ),
    ],
    ids=["heads", "decoder", "sizes"],
)
def test_a_start_of_other_heads_or_sizes_is_refused(wanted, settings, told, autoencoder):
    config = wanted.model.config | settings
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        starting_model(changed(wanted, model__start=autoencoder[0], model__config=config), FOLDERS)
    assert f"model.start {autoencoder[0]} " in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        # What only training or the decoder reads, and another spelling.
        (dict(decoder_num_attention_heads=4, initializer_range=0.5, patch_size=(8, 8)), []),
        (
            dict(hidden_act="gelu_new", num_frames=8, layer_norm_eps=1e-6),
            [
                "config differs from the checkpoint's: num_frames 8 (there 4), "
                "hidden_act 'gelu_new' (there 'gelu'), layer_norm_eps 1e-06 (there 1e-12)"
            ],
        ),
    ],
    ids=["same", "other"],
)
def test_a_config_that_differs_from_the_start_s_is_told(settings, told, autoencoder, caplog):
    config = FINETUNE.model.config | settings
    recipe = changed(FINETUNE, model__start=autoencoder[0], model__config=config)
    report = starting_model(recipe, FOLDERS).report
    logged = [text for text in caplog.messages if "config differs" in text]
    assert logged == [f"model.start {autoencoder[0]}: {line}" for line in told]
    assert [line.strip() for line in report.splitlines() if "config differs" in line] == told


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ("videomae-imagenet", None),
        ("vivit-scenic", "offset True (there False), do_normalize False (there True)"),
        ("damaged", "pixels are not compared with the checkpoint's"),
    ],
)
def test_a_start_of_other_pixels_is_told(beside, told, autoencoder, tmp_path, caplog):
    shutil.copytree(autoencoder[0], tmp_path / "model")
    if beside == "damaged":
        other = json.dumps({"image_processor_type": "CLIPImageProcessor"})
        (tmp_path / "model" / "preprocessor_config.json").write_text(other)
    else:
        vivit_jax.VideoProcessor.named(beside, size=16).save_pretrained(tmp_path / "model")
    recipe = changed(FINETUNE, model__start=str(tmp_path / "model"))
    report = starting_model(recipe, FOLDERS).report
    logged = [text for text in caplog.messages if "processor" in text]
    if told is None:
        assert not logged and "processor" not in report
    else:
        assert len(logged) == 1 and told in logged[0] and told in report
        recipe_s = "the recipe's processor=videomae-imagenet decides"
        assert (recipe_s if beside == "damaged" else "checkpoint's processor decides") in logged[0]


def test_an_image_model_s_pixels_are_compared_too(image_model, tmp_path):
    """[-1, 1] as ViTs have it, which ViViT's processor reaches in one step less."""
    shutil.copytree(image_model[0], tmp_path / "model")
    values = dict(image_processor_type="ViTImageProcessor", image_mean=[0.5] * 3, size=16)
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(values))
    settings = dataclasses.replace(VIVIT, start=str(tmp_path / "model"))
    recipe = dataclasses.replace(FINETUNE, model=settings)
    found = starting_model(recipe, FOLDERS)
    assert "image_std (0.5, 0.5, 0.5) (there (0.229, 0.224, 0.225))" in found.report
    # Pixels as the image model takes them, resized and cropped as the recipe says.
    assert found.preprocessing.processor == dataclasses.replace(
        vivit_jax.VideoProcessor.named("videomae-imagenet", size=16, crop_size=16),
        image_mean=(0.5,) * 3,
        image_std=(0.5,) * 3,
    )
    same = dataclasses.replace(recipe, processor="vivit-scenic")
    assert "processor" not in starting_model(same, FOLDERS).report


def test_a_model_is_described_and_built_again(tmp_path):
    settings = dict(FINETUNE.model.config, dtype="bfloat16", remat="block", id2label=FOLDERS)
    start = starting_model(changed(FINETUNE, model__config=settings))
    (tmp_path / "model.json").write_text(json.dumps(description(start, "finetune")))
    assert described_model(tmp_path / "model.json") == start.model


def test_the_card_of_a_model_has_the_metrics_of_its_step(whole, data):
    """And no more of this machine than the names of the data's folders."""
    from huggingface_hub import ModelCard

    out = whole.model.parents[1]
    told = {line["step"]: line for line in lines(out, "evaluate")}
    for path in (out / "models").iterdir():
        card = ModelCard((path / "README.md").read_text("utf-8"))
        assert str(data) not in card.content and str(out) not in card.content
        assert "| training | train | 25 | 4 |" in card.text
        assert f"{path.name} steps of 8 clips" in card.text
        found = told.get(int(path.name))
        if found is None:  # a checkpoint between two validations
            assert card.data.eval_results is None
            continue
        (result,) = card.data.eval_results
        share = found["accuracy"]
        assert result.metric_value == round(share, 6) and result.dataset_name == "test"
        answers = [1.0] * (round(share * 18) + 2) + [0.0] * (18 - round(share * 18) + 2)
        error = pytest.approx(np.std(answers) / np.sqrt(len(answers)), abs=1e-6)
        assert result.metric_args["videos"] == 18
        assert result.metric_args.get("standard_error") == error
        assert "1 clip x 1 crop of " in result.metric_args["protocol"]
