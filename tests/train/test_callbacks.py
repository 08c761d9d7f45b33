# SPDX-License-Identifier: Apache-2.0
"""Callbacks: what they see, how they end a run, and what resuming gives them back."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from tiny import SMALL_VIDEOMAE
from tiny_recipes import FINETUNE, changed
from tiny_runs import PLAIN, assert_same, lines, state, write_clip

from vivit_jax.errors import UserError
from vivit_jax.train import EarlyStop, Event, prepare, train
from vivit_jax.train.callbacks import Callbacks
from vivit_jax.train.log import read_metrics
from vivit_jax.train.sharding import parse_mesh

STEPS, PER_EPOCH = 6, 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(2):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(4):
                write_clip(root / split / str(label) / f"{i}.npy", label, rng)
    plain = dataclasses.replace(FINETUNE, augment=PLAIN)
    return changed(
        plain,
        model__config=SMALL_VIDEOMAE | dict(num_labels=2, head_dropout=0.3),
        optim__layer_decay=None,
        data__train=str(root / "train"),
        data__validation=str(root / "test"),
        train__batch_size=4,
        train__epochs=STEPS // PER_EPOCH,
    )


@pytest.fixture(scope="module", autouse=True)
def equal_steps_are_compiled_once():
    made, make_setup = {}, prepare.make_setup

    def remembered(recipe, mesh, model, processor, *others):
        fixed = dataclasses.replace(recipe.train, steps=None)
        key = repr((model, recipe.optim, fixed, mesh))
        found = make_setup(recipe, mesh, model, processor, *others)
        return dataclasses.replace(found, step=made.setdefault(key, found.step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "make_setup", remembered)
        yield


def run(recipe, out, *callbacks, **options):
    mesh = parse_mesh("data=1", 1)
    quiet = dict(mesh_sizes=mesh, say=lambda text: None)
    return train(recipe, out, callbacks=callbacks, **quiet, **options)


class Sum:
    """Remembers what it saw; its state is a number that depends on every event."""

    def __init__(self):
        self.seen, self.total, self.params = [], 0.0, {}

    def __call__(self, event):
        self.seen.append((event.kind, event.step))
        self.total += event.metrics.get("loss", event.metrics.get("accuracy"))
        self.params[event.step] = jax.device_get(event.state.params)
        assert int(event.state.step) == event.step

    def state(self):
        return {"total": self.total}

    def restore(self, state):
        self.total = state["total"]


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    run(recipe, out)
    return out


@pytest.fixture(scope="module")
def seen(recipe, tmp_path_factory):
    """A run with callbacks: its directory and what one of them saw."""
    callback, out = Sum(), tmp_path_factory.mktemp("seen") / "run"
    run(recipe, out, callback, lambda event: None)
    return out, callback


def test_callbacks_see_each_step_and_evaluation_with_its_state(plain, seen):
    out, callback = seen
    expected = []
    for step in range(1, STEPS + 1):
        expected += [("train", step)] + [("evaluate", step)] * (step % PER_EPOCH == 0)
    assert callback.seen == expected
    losses = sum(line["loss"] for line in lines(out))
    held_out = sum(line["loss"] for line in lines(out, "evaluate"))
    assert callback.total == pytest.approx(losses + held_out)
    assert_same(out, plain, STEPS)
    stored = state(out, STEPS)
    for path, value in jax.tree.leaves_with_path(callback.params[STEPS]):
        name = "/".join(("params", *(key.key for key in path)))
        np.testing.assert_array_equal(value, stored[name], err_msg=name)


def test_a_callback_ends_a_run_after_its_step(recipe, plain, tmp_path):
    def stop(event):
        if event.step == 3:
            event.stop("enough is known")

    outcome = run(recipe, tmp_path / "run", stop)
    assert (outcome.step, outcome.stopped, outcome.stop_reason) == (3, None, "enough is known")
    events = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "event"]
    assert events[-1]["text"] == "ended early: enough is known"
    assert lines(tmp_path / "run") == lines(plain)[:3]
    # Resumed without it, the run ends as one that was never stopped.
    assert run(recipe, tmp_path / "run", resume=True).step == STEPS
    assert_same(tmp_path / "run", plain, STEPS)


def test_a_wish_to_stop_at_the_last_step_is_none(recipe, tmp_path):
    def stop(event):
        if event.step == STEPS and event.kind == "evaluate":
            event.stop("late")

    outcome = run(recipe, tmp_path / "run", stop)
    assert (outcome.step, outcome.stop_reason) == (STEPS, None)


@pytest.mark.parametrize("kind, step", [("train", 3), ("evaluate", 4), ("train", STEPS)])
def test_an_error_of_a_callback_ends_the_run_with_a_checkpoint(recipe, plain, tmp_path, kind, step):
    def fails(event):
        if (event.kind, event.step) == (kind, step):
            raise KeyError("no such metric")

    told = rf"callback .*fails failed after step {step}: KeyError: 'no such metric'; a checkpoint"
    with pytest.raises(UserError, match=told) as caught:
        run(recipe, tmp_path / "run", fails)
    assert isinstance(caught.value.__cause__, KeyError)
    assert [p.name for p in (tmp_path / "run" / "models").iterdir()].count(str(step)) == 1
    if step == 3:
        run(recipe, tmp_path / "run", resume=True)
        assert_same(tmp_path / "run", plain, STEPS)


def test_a_callback_gets_its_state_back(recipe, seen, tmp_path):
    first, second = Sum(), Sum()
    run(changed(recipe, train__steps=4), tmp_path / "run", first)
    run(recipe, tmp_path / "run", second, resume=True)
    assert first.seen + second.seen == seen[1].seen
    assert second.total == pytest.approx(seen[1].total, rel=0)
    assert_same(tmp_path / "run", seen[0], STEPS)


def test_callbacks_that_come_and_go_are_told(caplog):
    before = Callbacks([Sum(), EarlyStop(), Sum()])
    after = Callbacks([Sum()])
    after.restore(before.state())
    assert "saved with callbacks that are gone: EarlyStop 0, Sum 1" in caplog.text
    after.restore([])
    assert "no state of the callback Sum 0 is saved; it begins anew" in caplog.text


def evaluation(step, score, **metrics):
    asked = []
    state: Any = None
    return Event("evaluate", step, metrics, state, 9, step / 2, score, asked.append), asked


@pytest.mark.parametrize(
    "scores, options, ends",
    [
        ([0.1, 0.2, 0.2, 0.2, 0.3], dict(patience=2), 3),
        ([0.1, 0.2, 0.2, 0.3, 0.3, 0.3], dict(patience=2), 5),
        ([0.1, 0.2, 0.25, 0.29], dict(patience=2, margin=0.1), None),
        ([0.1, 0.15, 0.19], dict(patience=2, margin=0.1), 2),
        ([math.nan, math.nan], dict(patience=2), 1),
        ([0.5], dict(patience=1), None),
    ],
)
def test_early_stop(scores, options, ends):
    for metric, sign in ((None, 1), ("accuracy", 1), ("val_loss", -1)):
        callback, reasons = EarlyStop(metric=metric, **options), {}
        for k, score in enumerate(scores):
            if k == 2:  # as after a resume
                saved, callback = callback.state(), EarlyStop(metric=metric, **options)
                callback.restore(saved)
            event, asked = evaluation(k, score, accuracy=score, val_loss=sign * score)
            callback(event)
            reasons |= {k: asked[0]} if asked else {}
        assert min(reasons, default=None) == ends
        assert all((metric or "the score") in reason for reason in reasons.values())


def test_early_stop_ends_a_run(recipe, tmp_path):
    slow = changed(recipe, optim__lr=1e-9)
    outcome = run(slow, tmp_path / "run", EarlyStop(1))
    assert outcome.step == 2 * PER_EPOCH and outcome.stop_reason is not None
    assert outcome.stop_reason.endswith("in 1 evaluation")


@pytest.mark.parametrize(
    "callbacks, message",
    [
        (lambda event: None, r"expected a list of them: callbacks=\[it\]"),
        ("wandb", "is one callback"),
        ([3], "callbacks has 3; expected functions"),
    ],
)
def test_what_is_no_callback(recipe, callbacks, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(recipe, tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()
