# SPDX-License-Identifier: Apache-2.0
"""Callbacks: what they see, how they end a run, and what resuming gives them back."""

import dataclasses
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_recipes import changed
from tiny_runs import PATIENCE, assert_same, free_port, lines, share_steps, small_recipe, state

from vivit_jax.errors import UserError
from vivit_jax.train import EarlyStop, Event, train
from vivit_jax.train.callbacks import Callbacks
from vivit_jax.train.sharding import parse_mesh

STEPS, PER_EPOCH = 6, 2


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_recipe(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def equal_steps_are_compiled_once():
    with share_steps():
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
    *_, event = lines(tmp_path / "run", "event")
    assert event["text"] == "ended early: enough is known"
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


@pytest.mark.quick_cases(1)
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


def test_a_state_that_is_not_json_is_named():
    callback = Sum()
    callback.total = np.float32(1)
    with pytest.raises(UserError, match=r"state\(\) of the callback Sum 0 gave .* not JSON values"):
        Callbacks([callback]).state()


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
        assert all((metric or "held-out score") in reason for reason in reasons.values())


@pytest.mark.parametrize(
    ("metric", "scores", "told"),
    [
        (None, [0.2, 0.1], "the held-out score was no better than at step 4 in 1 evaluation"),
        ("accuracy", [0.2, 0.1], "accuracy was no better than 0.2, at step 4, in 1 evaluation"),
        ("val_loss", [0.1, 0.2], "val_loss was no better than 0.1, at step 4, in 1 evaluation"),
        (None, [math.nan], "the held-out score was no better than before in 1 evaluation"),
    ],
)
def test_what_early_stop_says(metric, scores, told):
    """A score is a number of nobody's; the step is in the log."""
    callback = EarlyStop(1, metric=metric)
    for k, score in enumerate(scores, 4):
        saved, callback = callback.state(), EarlyStop(1, metric=metric)
        callback.restore(saved)  # as after a resume
        event, asked = evaluation(k, score, accuracy=score, val_loss=score)
        callback(event)
    assert asked == [told]


@pytest.mark.slow
def test_early_stop_ends_a_run(recipe, tmp_path):
    slow = changed(recipe, optim__lr=1e-9)
    outcome = run(slow, tmp_path / "run", EarlyStop(1))
    assert outcome.step == 2 * PER_EPOCH and outcome.stop_reason is not None
    assert outcome.stop_reason.endswith("in 1 evaluation")


def test_early_stop_without_evaluations_is_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="EarlyStop looks at evaluations, and the run has none"):
        run(changed(recipe, data__validation=None), tmp_path / "run", EarlyStop())
    assert not (tmp_path / "run").exists()


def test_callbacks_are_called_in_their_order_until_one_fails():
    calls = []

    class Evaluations:
        evaluations_only = True

        def __call__(self, event):
            calls.append(("evaluations", event.kind))

    def fails(event):
        calls.append(("fails", event.kind))
        if event.kind == "evaluate":
            raise ValueError

    called = Callbacks([lambda event: calls.append(("all", event.kind)), fails, Evaluations()])
    called.put_first([Evaluations()])
    event, _ = evaluation(1, 0.5)
    for kind in ("train", "evaluate"):
        called.call(dataclasses.replace(event, kind=kind))
    assert calls == [
        *[("all", "train"), ("fails", "train")],
        *[("evaluations", "evaluate"), ("all", "evaluate"), ("fails", "evaluate")],
    ]


@pytest.mark.parametrize(
    "callbacks, message",
    [
        (lambda event: None, r"expected a list of callbacks: callbacks=\[it\]"),
        ("wandb", "callbacks is 'wandb'"),
        (None, "callbacks is None"),
        ([3], "callbacks has 3; expected functions"),
        ([EarlyStop], "callbacks has <class .*EarlyStop'>; expected functions"),
    ],
)
def test_what_is_no_callback(recipe, callbacks, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(recipe, tmp_path / "run", callbacks=callbacks)
    assert not (tmp_path / "run").exists()


_PROCESS = """
import pickle, sys
import jax
port, process, out, recipe = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from vivit_jax.errors import UserError
from vivit_jax.train import train
recipe = pickle.load(open(recipe, "rb"))
sums = []

def everywhere(event):
    sums.append(float(sum(abs(x).sum() for x in jax.tree.leaves(event.state.params))))

everywhere.every_process = True

def first(event):
    assert not int(process)
    if event.step == 3:
        event.stop("enough")
    if event.step == 5:
        raise KeyError("gone")

def quiet(text):
    pass

outcome = train(recipe, out, callbacks=[everywhere, first], say=quiet)
print("told:", outcome.step, outcome.stop_reason, sums)
try:
    train(recipe, out, callbacks=[everywhere, first], resume=True, say=quiet)
except UserError as error:
    print("told:", error)
outcome = train(recipe, out, resume=True, say=quiet)
print("told:", outcome.step, outcome.stop_reason)
"""


@pytest.mark.slow
def test_two_processes_agree_on_what_a_callback_of_one_says(recipe, tmp_path):
    held, port = tmp_path / "recipe", str(free_port())
    held.write_bytes(pickle.dumps(recipe))
    root = Path(__file__).parents[2]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    lives = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, port, str(i), str(tmp_path / "run"), str(held)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    told = [life.communicate(timeout=PATIENCE) for life in lives]
    assert [life.returncode for life in lives] == [0, 0], told
    # Collectives on CPUs print lines of their own.
    (a, of_first, end_a), (b, of_second, end_b) = (
        [line[6:] for line in text.splitlines() if line.startswith("told: ")] for text, _ in told
    )
    assert a == b and a.startswith("3 enough [") and a.count(",") == 3  # with one evaluation
    assert "callback first failed after step 5: KeyError: 'gone'; a checkpoint" in of_first
    assert of_second == "process 0 cannot continue; its own message says why"
    assert end_a == end_b == f"{STEPS} None"
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, STEPS + 1))
