# SPDX-License-Identifier: Apache-2.0
"""Runs in processes of their own: killed again and again, and two at a time."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import SMALL_VIDEOMAE
from tiny_recipes import FINETUNE, changed
from tiny_runs import NAME, PLAIN, Parent, assert_same, free_port, lines, settings, write_clip

EVERY = 3  # steps from one checkpoint to the next


def tiny(data, steps, **fields):
    recipe = changed(
        FINETUNE,
        model__config=SMALL_VIDEOMAE | dict(num_labels=3, drop_path_rate=0.3),
        data__train=str(data / "list.txt"),
        data__max_bad_share=0.5,
        **{f"augment__{name}": value for name, value in vars(PLAIN).items()},
        optim__layer_decay=None,
        optim__clip=None,
        train__epochs=steps // 3,
        train__batch_size=4,
        train__checkpoint_every=EVERY,
    )
    return ["--recipe", NAME, "--set", *settings(changed(recipe, **fields))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fourteen clips, two of which are damaged: three steps of four in an epoch."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = [f"{i}.npy" for i in range(14)]
    for i, name in enumerate(names):
        write_clip(root / name, i % 3, rng)
        if i in (3, 8):
            (root / name).write_bytes((root / name).read_bytes()[:1000])
    listed = [f"{name} {i % 3}\n" for i, name in enumerate(names)]
    (root / "list.txt").write_text("".join(listed))
    (root / "one.txt").write_text("".join(listed[:8] + listed[9:]))
    (root / "good.txt").write_text("".join(listed[:3] + listed[4:8] + listed[9:]))
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return ["--compilation-cache", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module")
def parent():
    found = Parent()
    yield found
    found.close()


def saving(out):
    """What a save that is under way has put there."""
    found = {path.name for path in out.glob("checkpoints/*.orbax-checkpoint-tmp*")}
    return found | {path.name for path in out.glob("models/.*.partial")}


def told(out):
    """How many steps metrics.jsonl tells of."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def live(parent, out, args, deaths, rng, steps):
    """Kill a run once for each of `deaths`, then let it end; how many kills fell into a save."""
    cut, log = 0, out.with_suffix(".log")
    for number, death in enumerate(deaths):
        life = parent.start(log, [*args, "--resume"] if number else args)
        # A resumed run first drops the lines of steps after its last checkpoint.
        alive = life.until(lambda: " an epoch, steps " in log.read_text())
        goal = told(out) + (1 if death == "saving" else rng.randint(1, 2 * EVERY))
        alive = alive and life.until(lambda goal=goal: told(out) >= goal)
        if death == "saving":
            alive = alive and life.until(functools.partial(saving, out))
            time.sleep(rng.uniform(0, 0.02))
        assert alive, life.text
        if death == "interrupt":
            life.send(signal.SIGINT)
            assert life.end() == 130, life.text
            assert "stopped by SIGINT after step" in life.text
            assert f"vivit-jax finetune --out {out} --resume" in life.text
            continue
        life.send(signal.SIGKILL)
        assert life.end() == -signal.SIGKILL, life.text
        cut += bool(saving(out))
    life = parent.start(log, [*args, "--resume"] if deaths else args)
    assert life.end() == 0 and f"step {steps} done" in life.text, life.text
    return cut


def story(tmp_path, parent, cache, data, deaths, steps, seed):
    """`live`, compared with a run that lived once."""
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(seed)

    def run(out):
        return [*cache, "finetune", "--out", out, *tiny(data, steps)]

    live(parent, whole, run(whole), [], rng, steps)
    cut = live(parent, killed, run(killed), deaths, rng, steps)
    for out in (whole, killed):
        bad = json.loads((out / "bad_clips.json").read_text())["clips"]
        assert sorted(bad) == [str(data / "3.npy"), str(data / "8.npy")], bad
    assert_same(killed, whole, steps)
    for name in ("bad_clips.json", f"models/{steps}/model.safetensors", "model.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    for kind in ("checkpoints", "models"):
        kept = sorted(int(path.name) for path in (killed / kind).iterdir())
        assert kept == [steps - EVERY, steps]
    return cut


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_bit_for_bit_as_a_whole_one(tmp_path, parent, cache, data):
    deaths = ["saving", "step"] * 5 + ["interrupt"]
    cut = story(tmp_path, parent, cache, data, deaths, steps=120, seed=1)
    print(f"{cut} of 10 kills fell into a save")
    assert cut >= 2


def together(parent, tmp_path, args):
    """Two processes with the same arguments."""
    shared = ["--coordinator", f"localhost:{free_port()}", "--processes", 2]
    return [parent.start(tmp_path / f"{i}.log", [*args, *shared, "--process", i]) for i in range(2)]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, parent, cache, data):
    """Of a device each."""
    simple = dict(optim__algorithm="sgd", optim__ema=None, optim__lr=0.1)
    one_layer = dict(num_labels=3, num_hidden_layers=1, head_dropout=0.0)
    simple["model__config"] = SMALL_VIDEOMAE | one_layer
    run = ["finetune", *tiny(data, 9, data__train=str(data / "good.txt"), **simple)]
    alone, both = tmp_path / "alone", tmp_path / "both"
    life = parent.start(tmp_path / "alone.log", [*cache, *run, "--out", alone])
    assert life.end() == 0, life.text
    lives = together(parent, tmp_path, [*cache, *run, "--out", both])
    assert [life.end() for life in lives] == [0, 0], "\n".join(life.text for life in lives)
    assert "mesh data=2;" in lives[0].text and "step 9 done" in lives[0].text
    assert "step" not in lives[1].text
    assert lines(both) != lines(alone)  # else the comparison would be of nothing
    assert_same(both, alone, 9, rtol=2e-5)


@pytest.mark.slow
def test_two_processes_stop_and_go_on_together(tmp_path, parent, cache, data):
    """After a signal to one of them; evaluated by two they are as accurate as by one."""
    run = [*cache, "finetune", *tiny(data, 30, data__train=str(data / "good.txt"))]
    alone, both = tmp_path / "alone", tmp_path / "both"
    life = parent.start(tmp_path / "alone.log", [*run, "--out", alone])
    assert life.end() == 0, life.text
    lives = together(parent, tmp_path, [*run, "--out", both])
    assert lives[0].until(lambda: told(both) >= 4), lives[0].text
    lives[1].send(signal.SIGTERM)
    assert [life.end() for life in lives] == [143, 143], "\n".join(life.text for life in lives)
    assert "stopped by SIGTERM after step" in lives[0].text and 4 <= told(both) < 30
    # One process goes on for a while, with the same clips.
    taken = int(re.search("after step ([0-9]+);", lives[0].text)[1])
    life = parent.start(tmp_path / "one.log", [*run, "--out", both, "--resume"])
    assert life.until(lambda: told(both) >= taken + 3), life.text
    life.send(signal.SIGTERM)
    assert life.end() == 143 and f"steps {taken + 1} to 30" in life.text, life.text
    # The first of them sees that the latest checkpoint is damaged; both resume from the one before.
    *_, before, latest = sorted(int(path.name) for path in (both / "checkpoints").iterdir())
    arrays = max(both.glob(f"checkpoints/{latest}/state/**/d/*"), key=lambda p: p.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[:-1] + bytes([arrays.read_bytes()[-1] ^ 1]))
    lives = together(parent, tmp_path, [*cache, "finetune", "--out", both, "--resume"])
    assert [life.end() for life in lives] == [0, 0], "\n".join(life.text for life in lives)
    assert f"step {latest}, {both}/checkpoints/{latest}, is damaged" in lives[0].text
    assert f"steps {before + 1} to 30" in lives[0].text and "damaged" not in lives[1].text
    assert_same(both, alone, 30, rtol=2e-5)

    # Nine test videos, one of them damaged, do not make equal shares.
    (tmp_path / "test.txt").write_text("".join((data / "one.txt").open().readlines()[:9]))
    args = ["evaluate", "--model", both / "models" / "30", "--data", tmp_path / "test.txt"]
    args += ["--root", data, "--clips", 2, "--crops", 3, "--stride", 1, "--out"]
    life = parent.start(tmp_path / "alone.log", [*args, tmp_path / "alone.json"])
    assert life.end() == 1, life.text
    lives = together(parent, tmp_path, [*args, tmp_path / "both.json"])
    assert [life.end() for life in lives] == [1, 1], "\n".join(life.text for life in lives)
    found, expected = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("both", "alone"))
    assert found["metrics"] == expected["metrics"] and found["metrics"]["videos"] == 8
    assert found["videos"] == expected["videos"] and found["per_class"] == expected["per_class"]


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_process_that_is_killed_is_named_by_the_other(tmp_path, parent, cache, data, dead):
    """Which ends soon, and a new start of both goes on from the last checkpoint."""
    run = [*cache, "finetune", *tiny(data, 60, data__train=str(data / "good.txt"))]
    lives = together(parent, tmp_path, [*run, "--out", tmp_path / "run"])
    assert lives[0].until(lambda: told(tmp_path / "run") >= 7), lives[0].text
    lives[dead].send(signal.SIGKILL)
    killed, other = time.monotonic(), lives[1 - dead]
    # jax aborts where the process that it meets at is gone, before or after our own line.
    aborted = dead == 0 and other.end() == -signal.SIGABRT
    assert aborted or other.end() in (1, 2), other.text
    assert time.monotonic() - killed < 40
    if not aborted:
        assert f"process {dead}" in other.text and "ended without a word" in other.text
        assert "--resume goes on from the last checkpoint" in other.text
    lives = together(parent, tmp_path, [*run, "--out", tmp_path / "run", "--resume"])
    assert [life.end() for life in lives] == [0, 0], "\n".join(life.text for life in lives)


@pytest.mark.slow
def test_damaged_clips_of_one_process_end_both(tmp_path, parent, cache, data):
    fields = dict(data__train=str(data / "one.txt"), data__max_bad_share=0.0)
    args = ["finetune", *tiny(data, 60, **fields), "--out", tmp_path / "run"]
    lives = together(parent, tmp_path, [*cache, *args])
    assert [life.end() for life in lives] == [2, 2], "\n".join(life.text for life in lives)
    told_own, told_other = sorted(
        (life.text for life in lives), key=lambda t: "cannot continue" in t
    )
    assert "data.max_bad_share 0: " in told_own and "3.npy" in told_own
    assert "cannot continue; its own message says why" in told_other
    taken = told(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / str(taken)).is_dir() and taken >= 6
    bad = json.loads((tmp_path / "run" / "bad_clips.json").read_text())
    assert list(bad["clips"]) == [str(data / "3.npy")]


@pytest.mark.slow
def test_a_model_that_cannot_be_written_ends_both(tmp_path, parent, cache, data):
    """Only the first writes it; the other would wait for it at the checkpoint."""
    run = [*cache, "finetune", *tiny(data, 9, data__train=str(data / "good.txt"))]
    both = tmp_path / "both"
    lives = together(parent, tmp_path, [*run, "--out", both, "--set", "train.steps=3"])
    assert [life.end() for life in lives] == [0, 0], "\n".join(life.text for life in lives)
    shutil.rmtree(both / "models")
    (both / "models").write_text("in the way")
    lives = together(parent, tmp_path, [*run, "--out", both, "--set", "train.steps=9", "--resume"])
    assert [life.end() for life in lives] == [2, 2], "\n".join(life.text for life in lives)
    assert "File exists" in lives[0].text
    assert "process 0 cannot continue: " in lives[1].text and "File exists" in lives[1].text


_STEPS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from vivit_jax.train.processes.stop_signals import agreed_stop

jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
mesh = Mesh(np.array(jax.devices()), ("data",))
held, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

@jax.jit
def step(weights, clips):
    for _ in range(4):  # a cheap program would be run before the call of it returns
        weights = weights @ weights
    return weights + clips.sum()  # which waits for the other process

weights = jax.device_put(jnp.zeros((300, 300)), held)
clips = jax.make_array_from_process_local_data(split, np.ones((1, 8), np.float32))
step(weights, clips).block_until_ready()
for number in range(9):
    first = number % 2 == jax.process_index()
    if first:
        loss = step(weights, clips)
    signal = ["SIGTERM"] if (number, jax.process_index()) == (8, 1) else []
    stopped, asked = agreed_stop(signal, None, number == 7)
    assert (stopped, asked) == ("SIGTERM" if number == 8 else None, number == 7)
    if first:  # the other one takes this step when both have agreed
        assert not loss.is_ready()
        distributed.global_state.client.key_value_set(f"seen/{number}", "")
    else:
        distributed.global_state.client.blocking_key_value_get(f"seen/{number}", 60_000)
        loss = step(weights, clips)
    assert float(loss[0, 0]) == 16
print("ended")
"""


@pytest.mark.slow
def test_processes_agree_while_their_devices_are_busy():
    """What they agree on does not wait for a step that a device is taking."""
    port, environment = str(free_port()), os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", _STEPS, port]
    both = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True, env=environment)
        for n in range(2)
    ]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, said.splitlines()[-1]) == (0, "ended")
