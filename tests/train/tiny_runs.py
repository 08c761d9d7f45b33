# SPDX-License-Identifier: Apache-2.0
"""Runs of tiny recipes: their data, their command lines, their processes and what they wrote."""

import ast
import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import SMALL_VIDEOMAE
from tiny_recipes import FINETUNE, changed

from vivit_jax.data.settings import AugmentSettings
from vivit_jax.recipes import recipe_named, to_dict
from vivit_jax.train import prepare
from vivit_jax.train.clock import MEASURED
from vivit_jax.train.log import read_metrics
from vivit_jax.train.storage.run_directory import differences

# With everything random in data and model, without what only takes longer to compile.
PLAIN = AugmentSettings(crop="random_resized", crop_scale=(0.5, 1.0), smoothing=0.1)
NAME = "videomae-v1-base-kinetics400-finetune"
PATIENCE = 300.0  # seconds to wait for a process on a machine that is busy


def write_clip(path, label, rng):
    """A clip of its class's colour, in noise."""
    clip = rng.integers(0, 120, (6, 18, 20, 3))
    clip[..., (2, 1, 0, slice(None))[label]] += 100
    np.save(path, clip.astype(np.uint8))


_STEPS: dict = {}  # of `share_steps`


@contextlib.contextmanager
def share_steps():
    """Runs of one recipe on one mesh share the compiled step, which takes seconds."""
    make_setup = prepare.make_setup

    def remembered(recipe, mesh, model, processor, per_epoch, validation, own):
        fixed = dataclasses.replace(recipe.train, steps=None)
        of_recipe = (recipe.task, recipe.optim, recipe.augment, fixed)
        key = repr((model, of_recipe, mesh, own.loss, own.augment))
        found = make_setup(recipe, mesh, model, processor, per_epoch, validation, own)
        return dataclasses.replace(found, step=_STEPS.setdefault(key, found.step))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "make_setup", remembered)
        yield


def small_recipe(root, classes=2, clips=4):
    """The recipe of a run of 3 epochs of 2 steps; writes its clips below `root`."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            (root / split / str(label)).mkdir(parents=True)
            for i in range(clips):
                write_clip(root / split / str(label) / f"{i}.npy", label, rng)
    return changed(
        dataclasses.replace(FINETUNE, augment=PLAIN),
        model__config=SMALL_VIDEOMAE | dict(num_labels=classes, head_dropout=0.3),
        optim__layer_decay=None,
        data__train=str(root / "train"),
        data__validation=str(root / "test"),
        train__batch_size=classes * clips // 2,
        train__epochs=3,
    )


def settings(recipe, name=NAME):
    """What --set takes to make the recipe of the published one of this name."""

    def text(value):
        return json.dumps(value) if isinstance(value, list) else str(value)

    differs = differences(to_dict(recipe_named(name)), to_dict(recipe))
    return [
        f"{field}={text(value)}"
        for field, (_, value) in differs.items()
        # What the published recipe says of the model, and this one does not, cannot be unsaid.
        if not field.startswith("model.config.") or field[13:] in recipe.model.config
    ]


def lines(out, kind="train"):
    """What metrics.jsonl holds that time has no part in."""
    own = ("time", *MEASURED)
    found = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == kind]
    return [{name: value for name, value in line.items() if name not in own} for line in found]


def state(out, step):
    """Every array of a checkpoint by its path."""
    import orbax.checkpoint as ocp

    reader, path = ocp.PyTreeCheckpointer(), out / "checkpoints" / str(step) / "state"
    tree = reader.metadata(path).item_metadata.tree
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(path, restore_args=numpy)


def assert_same(found, expected, steps, rtol=0.0):
    """Two runs agree: every reported number, once, and every array after `steps`."""
    ours, theirs = lines(found), lines(expected)
    assert [line["step"] for line in ours] == list(range(1, steps + 1))
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    ours, theirs = (np.array([list(line.values())[2:] for line in each]) for each in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=rtol)
    ours, theirs = state(found, steps), state(expected, steps)
    assert ours.keys() == theirs.keys()
    assert {path.split("/")[0] for path in ours} >= {"params", "optimizer"}
    for path, value in theirs.items():
        atol = 10 * rtol * np.abs(value).max()
        np.testing.assert_allclose(ours[path], value, rtol=10 * rtol, atol=atol, err_msg=path)


# Forks a process for each command line, so that what takes seconds to import is imported once.
# It is asked for one with its log, its arguments and what it has in its environment besides, and
# then for its exit status with its number.
# Interrupts may be ignored where the suite runs, as in the background of a script.
_PARENT = """
import json, os, signal, sys, tempfile
import grain.python, orbax.checkpoint, safetensors.numpy
import checkpoints_convert.source, vivit_jax.train.loop
from vivit_jax.cli.__main__ import main
for line in sys.stdin:
    order = json.loads(line)
    if isinstance(order, list):
        child = os.fork()
        if not child:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ |= order[2]
            tempfile.tempdir = None
            for stream in (1, 2):
                os.dup2(os.open(order[0], os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.exit(main(order[1]))
        print(child, flush=True)
    else:
        child, status = os.waitpid(order, os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if child else None, flush=True)
"""


class Parent:
    """Starts processes that run a command line of vivit-jax."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PARENT],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
        )

    def ask(self, order):
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return ast.literal_eval(self._process.stdout.readline())

    def start(self, log, args, **environment):
        log.write_text("")
        return Life(self, log, self.ask([str(log), list(map(str, args)), environment]))

    def close(self):
        self._process.kill()
        self._process.communicate()


class Life:
    """A process, from its start to its end."""

    def __init__(self, parent, log, number):
        self._parent, self._log, self._number, self._status = parent, log, number, None

    @property
    def text(self):
        """What it printed."""
        return self._log.read_text()

    def until(self, condition):
        """Wait for it; False where the process ended before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self._status is None:
                self._status = self._parent.ask(self._number)
            if self._status is not None:
                return False
            if time.monotonic() > deadline:
                os.kill(self._number, signal.SIGKILL)
            time.sleep(0.002)
        return True

    def send(self, number):
        os.kill(self._number, number)

    def end(self):
        """Its exit status, once it has ended."""
        self.until(lambda: False)
        return self._status


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
