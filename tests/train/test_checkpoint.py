# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole, bit-equal on any mesh, and as few as asked for."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import file_size
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from vivit_jax.errors import UserError
from vivit_jax.train.storage import checkpoint as checkpoint_module
from vivit_jax.train.storage.checkpoint import Checkpoints, DamagedCheckpoint, UnwrittenCheckpoint


class Moments(NamedTuple):
    count: jax.Array
    mean: dict


def one_device():
    return SingleDeviceSharding(jax.devices()[0])


def on(mesh_shape, spec):
    devices = np.array(jax.devices()[: int(np.prod(mesh_shape))]).reshape(mesh_shape)
    return NamedSharding(jax.sharding.Mesh(devices, ("data", "model")), PartitionSpec(*spec))


def make_state(seed=0, place=lambda spec: one_device()):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((8, 16)).astype(np.float32)
    return {
        "params": {
            "block": [jax.device_put(kernel, place(("data", "model")))],
            "bias": jax.device_put(kernel[0].astype(jnp.bfloat16), place(("model",))),
        },
        "moments": Moments(jnp.int32(seed), {"bias": jax.device_put(kernel[1], place(()))}),
        "key": jax.device_put(jax.random.key(seed, impl="rbg"), place(())),
        "keys": jax.device_put(jax.random.split(jax.random.key(seed, impl="threefry2x32"), 8)),
        "empty": (None, {}),
    }


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def bits(state):
    """Every leaf's path, dtype and bytes."""
    found = []
    for path, leaf in jax.tree.leaves_with_path(state):
        values = leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            values = jax.random.key_data(leaf)
        found.append((str(path), str(leaf.dtype), leaf.shape, np.array(values).tobytes()))
    return found


def step_directories(directory):
    return sorted(path.name for path in directory.iterdir())


def save_all(checkpoints, scores, first=1):
    for step, score in enumerate(scores, first):
        metrics = None if score is None else {"score": score, "loss": 0.5}
        checkpoints.save(
            step, make_state(step), {"position": step}, metrics, lambda path: path.mkdir()
        )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_state_comes_back_bit_for_bit_with_its_data(tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=asynchronous)
    assert checkpoints.latest() is None and checkpoints.best() is None
    state, data = make_state(5), {"position": 12, "skipped": ["a.mp4"], "share": 0.25}
    checkpoints.save(5, state, data)
    data["skipped"].append("too late")
    restored, read, step = checkpoints.restore(abstract(state))
    assert step == 5 and read == {"position": 12, "skipped": ["a.mp4"], "share": 0.25}
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    drawn = [jax.random.uniform(each["key"], 3).tolist() for each in (state, restored)]
    assert drawn[0] == drawn[1]
    checkpoints.close()


@pytest.mark.parametrize(
    "place",
    [
        lambda spec: one_device(),
        lambda spec: on((2, 4), spec),
        lambda spec: on((1, 2), spec[::-1]),
        lambda spec: on((8, 1), ("data",) if spec else ()),
    ],
    ids=["one device", "another mesh", "two devices, axes swapped", "other axes"],
)
def test_a_state_of_eight_devices_comes_back_on_any_mesh(tmp_path, place):
    state = make_state(1, lambda spec: on((4, 2), spec))
    assert len(state["params"]["block"][0].sharding.device_set) == 8
    saving = Checkpoints(tmp_path, keep=1)
    saving.save(1, state, {})
    saving.close()
    target = make_state(2, place)
    restored, _, _ = Checkpoints(tmp_path, keep=1).restore(abstract(target))
    assert bits(restored) == bits(state)
    assert jax.tree.map(lambda x: x.sharding, restored["params"]) == jax.tree.map(
        lambda x: x.sharding, target["params"]
    )


@pytest.mark.parametrize("overwrite", ["donated", "deleted"])
def test_arrays_may_be_donated_or_deleted_as_soon_as_save_returns(tmp_path, overwrite):
    sharding = on((8, 1), ("data",))
    state = {f"{i}": jax.device_put(jnp.full((256, 512), i, "float32"), sharding) for i in range(8)}
    erase = jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)
    erase(jax.tree.map(jnp.copy, state))
    target = abstract(state)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    if overwrite == "donated":
        kept = [erase(state)]
    else:
        for leaf in state.values():
            leaf.delete()
        kept = [jnp.zeros((256, 512)) for _ in range(16)]
    jax.block_until_ready(kept)
    target = {
        name: jax.ShapeDtypeStruct((256, 512), "float32", sharding=sharding) for name in state
    }
    restored, _, _ = checkpoints.restore(target)
    assert all((np.asarray(restored[name]) == int(name)).all() for name in restored)
    checkpoints.close()


@pytest.mark.parametrize(
    ("scores", "steps", "best"),
    [
        ([None] * 5, [4, 5], None),
        ([0.1, 0.9, 0.3, 0.2, 0.4], [2, 4, 5], 2),
        ([0.9, 0.9, 0.9, 0.1, 0.1], [3, 4, 5], 3),
        ([0.5, float("nan"), None, float("inf"), 0.6], [4, 5], 5),
        ([-3.0, -4.0, -5.0, -6.0, -7.0], [1, 4, 5], 1),
    ],
    ids=["no scores", "one best", "the latest of equals", "not finite", "negative"],
)
def test_the_last_two_and_the_best_are_kept_with_their_models(tmp_path, scores, steps, best):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save_all(checkpoints, scores)
    assert checkpoints.steps() == steps
    assert (checkpoints.latest(), checkpoints.best()) == (5, best)
    checkpoints.wait()
    assert step_directories(tmp_path / "checkpoints") == [str(step) for step in steps]
    assert step_directories(tmp_path / "models") == [str(step) for step in steps]
    checkpoints.close()

    again = Checkpoints(tmp_path, keep=2)
    assert (again.steps(), again.best()) == (steps, best)
    state, data, step = again.restore(abstract(make_state()), steps[0])
    assert bits(state) == bits(make_state(steps[0]))
    assert (data, step) == ({"position": steps[0]}, steps[0])


def test_a_resumed_run_still_knows_the_best(tmp_path):
    first = Checkpoints(tmp_path, keep=1)
    save_all(first, [0.8, 0.1])
    first.close()
    second = Checkpoints(tmp_path, keep=1)
    save_all(second, [0.2, 0.3], first=3)
    assert (second.steps(), second.best()) == ([1, 4], 1)
    second.close()


def test_leftovers_are_removed_by_the_first_save_and_not_before(tmp_path):
    first = Checkpoints(tmp_path, keep=2)
    save_all(first, [None, None])
    first.close()
    leftovers = [
        tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp" / "state",
        tmp_path / "checkpoints" / "dropped" / "1",
        tmp_path / "models" / "3",
        tmp_path / "models" / "4",
        tmp_path / "models" / ".vivit-jax.0123456789abcdef.partial",
    ]
    mine = [tmp_path / "models" / "mine", tmp_path / "checkpoints" / "notes"]
    for path in leftovers + mine:
        path.mkdir(parents=True)
    reader = Checkpoints(tmp_path, keep=1)
    assert reader.restore(abstract(make_state()))[2] == 2
    reader.close()
    assert all(path.exists() for path in leftovers)
    resumed = Checkpoints(tmp_path, keep=2)
    save_all(resumed, [None], first=3)
    resumed.close()
    assert all(path.exists() for path in mine)
    assert step_directories(tmp_path / "models") == ["2", "3", "mine"]
    assert step_directories(tmp_path / "checkpoints") == ["2", "3", "notes"]


def test_a_model_that_cannot_be_written_leaves_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)

    def export(path):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        checkpoints.save(1, make_state(), {}, export=export)
    assert checkpoints.steps() == []
    checkpoints.close()


def changed(**changes):
    return make_state() | changes


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: changed(extra=jnp.ones(3)), "not in the checkpoint: extra"),
        (lambda: {"key": make_state()["key"]}, "only in the checkpoint: keys, moments/count, mom"),
        (lambda: changed(keys=jnp.ones(3)), r"keys \(key<fry>\[8\] there, float32\[3\] here\)"),
        (
            lambda: changed(key=jax.random.key(0, impl="threefry2x32")),
            r"different: key \(key<rbg>\[\] there, key<fry>\[\] here\)",
        ),
        (
            lambda: changed(moments=Moments(jnp.float32(0), {"bias": jnp.ones(16)})),
            r"moments/count \(int32\[\] there, float32\[\] here\)",
        ),
        (
            lambda: changed(moments=Moments(jnp.int32(0), {"bias": jnp.ones(15)})),
            r"moments/mean/bias \(float32\[16\] there, float32\[15\] here\)",
        ),
    ],
    ids=["more", "less", "no key", "another generator", "dtype", "shape"],
)
def test_a_state_that_differs_is_named_path_by_path(tmp_path, target, message):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(), {})
    with pytest.raises(UserError, match=message):
        checkpoints.restore(abstract(target()))
    checkpoints.close()


def test_a_save_that_is_interrupted_leaves_no_checkpoint_without_its_model(tmp_path, monkeypatch):
    """Orbax's threads may still be writing it."""
    import orbax.checkpoint as ocp

    def export(path):
        path.mkdir()

    save = ocp.AsyncCheckpointer.save

    def interrupted(self, *args, **kwargs):
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, make_state(), {}, export=export)
    checkpoints.wait()
    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, make_state(), {}, export=export)
    checkpoints.close()
    assert step_directories(tmp_path / "checkpoints") == ["1", "2"]
    assert step_directories(tmp_path / "models") == ["1", "2"]


# TensorStore's threads may answer after Orbax has given up on the first error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_is_told_in_a_line_and_leaves_the_earlier_checkpoints(tmp_path):
    state = make_state() | {"large": jax.device_put(np.random.default_rng(0).random((300, 300)))}
    checkpoints = Checkpoints(tmp_path, keep=2)

    def save(step):
        checkpoints.save(step, state, {"place": step}, export=lambda path: path.mkdir())

    save(1)
    checkpoints.wait()
    told = rf"^a checkpoint of step 2 could not be written to {tmp_path}/checkpoints: .*--resume$"
    with file_size(100_000), pytest.raises(UnwrittenCheckpoint, match=told):
        save(2)
        checkpoints.wait()
    assert checkpoints.steps() == [1]
    for kind in ("checkpoints", "models"):  # neither half a checkpoint nor a model without one
        assert step_directories(tmp_path / kind) == ["1"]
    save(3)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=2)
    assert again.steps() == [1, 3]
    restored, data, _ = again.restore(abstract(state))
    assert bits(restored) == bits(state) and data == {"place": 3}


def test_a_directory_that_is_still_written_to_is_removed_a_little_later(tmp_path, monkeypatch):
    """As Orbax's threads do after a failed save; what cannot be removed is reported."""
    calls, remove = [], shutil.rmtree

    def busy(path):
        calls.append(path)
        if len(calls) < 3:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path)

    waits = types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(checkpoint_module, "time", waits)
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", busy)
    (tmp_path / "checkpoints").mkdir()
    checkpoint_module._remove(tmp_path / "checkpoints")
    assert len(calls) == 3 and not (tmp_path / "checkpoints").exists()

    def always(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", always)
    with pytest.raises(OSError, match="not empty"):
        checkpoint_module._remove(tmp_path)


def test_arguments(tmp_path):
    with pytest.raises(UserError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    checkpoints = Checkpoints(tmp_path, keep=2)
    target = abstract(make_state())
    with pytest.raises(UserError, match="holds no checkpoint; start"):
        checkpoints.restore(target)
    with pytest.raises(UserError, match=r"state 'x' is ndarray \(3,\); expected a jax.Array"):
        checkpoints.save(1, {"x": np.ones(3)}, {})
    with pytest.raises(UserError, match="not plain JSON"):
        checkpoints.save(1, make_state(), {"path": tmp_path})
    with pytest.raises(UserError, match="not plain JSON"):
        checkpoints.save(1, make_state(), {"share": float("nan")})
    assert list(tmp_path.iterdir()) == []
    save_all(checkpoints, [None, None])
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 2"):
        checkpoints.restore(target, 7)
    with pytest.raises(UserError, match="checkpoint of step 2, and step 2 is not after it"):
        checkpoints.save(2, make_state(), {})
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)
    with pytest.raises(UserError, match="needs a sharding for every array; key, keys, moments"):
        checkpoints.restore(bare)
    checkpoints.close()


def truncate(step):
    for data in sorted(step.glob("state/**/d/*")):
        data.write_bytes(data.read_bytes()[:-40])


def flip(step):
    largest = max(step.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 8
    largest.write_bytes(data)


def without_sums(step):
    for path in step.glob("*/checksums.json"):
        path.unlink()


DAMAGE = {
    "arrays cut off": (truncate, "state/.*d/.* has changed since it was written"),
    "a bit of the arrays": (flip, "state/.*d/.* has changed since it was written"),
    "an array's file gone": (
        lambda step: min(step.glob("state/**/d/*")).unlink(),
        "state/.*: No such file or directory",
    ),
    "the tree": (
        lambda step: (step / "state" / "_METADATA").write_text("[]"),
        "state/_METADATA has changed since it was written",
    ),
    "the values": (
        lambda step: (step / "run" / "metadata").write_text("{"),
        "run/metadata has changed since it was written",
    ),
    "values of another kind": (
        lambda step: (step / "run" / "metadata").write_text('{"data": 3, "metrics": []}'),
        "run/metadata has changed since it was written",
    ),
    "the checksums": (
        lambda step: (step / "state" / "checksums.json").write_text("{}"),
        "state/checksums.json has changed since it was written",
    ),
    "a checksum of each file": (
        lambda step: (step / "state" / "checksums.json").write_text('{"sha256": {}}'),
        "state/.* is not listed in checksums.json",
    ),
    "no checksums": (without_sums, "its checksums.json is missing"),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints and models of the steps 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("three")
    saving = Checkpoints(directory, keep=3)
    save_all(saving, [0.1, 0.2, 0.3])
    saving.close()
    return directory


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, three, caplog, what):
    do, message = DAMAGE[what]
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    do(tmp_path / "checkpoints" / "3")
    target = abstract(make_state())
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert not caplog.text
    named = rf"the checkpoint of step 3, {tmp_path}/checkpoints/3, is damaged: {message}"
    with pytest.raises(DamagedCheckpoint, match=f"{named}; other steps there: 1, 2") as told:
        checkpoints.restore(target, 3)
    assert len(str(told.value).splitlines()) == 1
    state, data, step = checkpoints.restore(target)
    assert (data, step) == ({"position": 2}, 2) and bits(state) == bits(make_state(2))
    (warning,) = caplog.messages
    assert re.fullmatch(named, warning)
    checkpoints.close()


def test_hidden_files_are_no_damage(tmp_path, three, caplog):
    """Such as .DS_Store, or what NFS keeps of a file that is removed while it is open."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    for part in ("state", "run"):
        (tmp_path / "checkpoints" / "3" / part / ".DS_Store").write_bytes(b"x")
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.restore(abstract(make_state()))[2] == 3 and not caplog.text
    checkpoints.close()


def test_what_orbax_alone_needs_is_not_needed(tmp_path, three, caplog):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    for text in ("", "{", "[]", "null", '{"item_handlers": 3}', '{"commit_timestamp_nsecs": "x"}'):
        caplog.clear()
        (tmp_path / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text(text)
        checkpoints = Checkpoints(tmp_path, keep=3)
        state, _, step = checkpoints.restore(abstract(make_state()))
        assert step == 3 and bits(state) == bits(make_state(3))
        warned = (
            "3/_CHECKPOINT_METADATA is damaged; resuming from step 3 does not need it"
            in caplog.text
        )
        assert warned == (not text.startswith('{"'))
        checkpoints.close()


def test_orbax_alone_opens_a_checkpoint(three):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(three / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        found = manager.restore(3, args=args)
    assert found["run"]["data"] == {"position": 3} and found["state"]["moments/count"] == 3


def test_damage_in_older_checkpoints_and_in_all_of_them(tmp_path, three, caplog):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "2" / "run" / "metadata").write_text("[]")
    checkpoints = Checkpoints(tmp_path, keep=3)
    (warning,) = caplog.messages
    assert "step 2" in warning and warning.endswith("the score of step 2 is not known")
    assert checkpoints.restore(abstract(make_state()))[2] == 3 and checkpoints.best() == 3
    checkpoints.close()
    for step in "13":
        flip(tmp_path / "checkpoints" / step)
    checkpoints = Checkpoints(tmp_path, keep=3)
    with pytest.raises(DamagedCheckpoint, match=r"all checkpoints are damaged \(1, 2, 3\); start"):
        checkpoints.restore(abstract(make_state()))
    checkpoints.close()


# TensorStore's threads may answer after Orbax has given up on the first error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_of_an_earlier_version_has_no_checksums(tmp_path, three, caplog):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    step = tmp_path / "checkpoints" / "3"
    without_sums(step)
    run = json.loads((step / "run" / "metadata").read_text())
    del run["checksums"]
    (step / "run" / "metadata").write_text(json.dumps(run))
    checkpoints = Checkpoints(tmp_path, keep=3)
    assert checkpoints.restore(abstract(make_state()))[2] == 3
    assert caplog.messages == [f"{step} has no checksums; damage in it goes unnoticed"]
    truncate(step)  # which TensorStore sees by itself
    assert checkpoints.restore(abstract(make_state()))[2] == 2
    assert f"the checkpoint of step 3, {step}, is damaged: " in caplog.messages[-1]
    checkpoints.close()


def test_a_run_goes_on_from_an_earlier_checkpoint(tmp_path, three, caplog):
    """Later ones no longer count, and leave with the next save, not before."""
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path, keep=3)
    with pytest.raises(UserError, match="holds no checkpoint of step 7; it has 1, 2, 3"):
        checkpoints.check_step(7)
    checkpoints.rewind(1)
    (warning,) = caplog.messages
    assert "resuming from step 1: the next checkpoint replaces the later 2, 3" in warning
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([1], 1, 1)
    assert step_directories(tmp_path / "checkpoints") == ["1", "2", "3"]
    save_all(checkpoints, [0.05], first=2)
    checkpoints.close()
    for kind in ("checkpoints", "models"):
        assert step_directories(tmp_path / kind) == ["1", "2"]
    again = Checkpoints(tmp_path, keep=3)
    state, _, _ = again.restore(abstract(make_state()))
    assert bits(state) == bits(make_state(2)) and again.best() == 1
    again.close()


def test_a_step_that_is_saved_keeps_its_model_where_an_older_one_cannot_be_removed(
    tmp_path, monkeypatch
):
    """As on a full disk, where nothing can be moved into a new directory."""

    def full(steps):
        if steps:
            raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path, keep=1)
    save_all(checkpoints, [None])
    checkpoints.wait()
    monkeypatch.setattr(checkpoints._manager._checkpoint_deleter, "delete_steps", full)
    told = f"step 2 is in {tmp_path}/checkpoints, but what it replaces could not be removed: .*No"
    with pytest.raises(UnwrittenCheckpoint, match=told):
        save_all(checkpoints, [None], first=2)
        checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    for kind in ("checkpoints", "models"):
        assert step_directories(tmp_path / kind) == ["1", "2"]
    checkpoints.close()

    again = Checkpoints(tmp_path, keep=1)
    assert again.restore(abstract(make_state()))[2] == 2
    save_all(again, [None], first=3)
    again.close()
    for kind in ("checkpoints", "models"):
        assert step_directories(tmp_path / kind) == ["3"]


CHILD = textwrap.dedent("""
    import sys
    from pathlib import Path
    import jax
    import jax.numpy as jnp
    from checkpoints_convert.files.save import replaced_directory
    from vivit_jax.train.storage.checkpoint import Checkpoints

    def export(path):
        with replaced_directory(path) as staged:
            (staged / "model.safetensors").write_text(path.name)

    checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
    first = (checkpoints.latest() or 0) + 1
    for step in range(first, first + 1000):
        state = {f"{i}": jnp.full((256, 256), step + i, jnp.float32) for i in range(4)}
        checkpoints.save(step, state, {"step": step}, {"score": -step % 7}, export)
        print(step, flush=True)
""")


@pytest.mark.slow
def test_a_killed_run_leaves_whole_checkpoints(tmp_path):
    """SIGKILL at random moments; each process resumes from what the previous one left."""
    rng = random.Random(os.getpid())
    root = Path(__file__).parents[2]
    target = {
        f"{i}": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=one_device())
        for i in range(4)
    }
    unfinished = reached = 0
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            cwd=root,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for _ in range(rng.randint(4, 8)):
            reported = child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        rest = child.communicate()[0].split()
        assert child.returncode == -signal.SIGKILL
        reported = int(rest[-1] if rest else reported)

        names = step_directories(tmp_path / "checkpoints")
        unfinished += any("tmp" in name for name in names)
        checkpoints = Checkpoints(tmp_path, keep=2)
        # The save in progress may be lost; each earlier one had to end first.
        assert checkpoints.latest() >= reported - 1 > reached
        reached = checkpoints.latest()
        for step in checkpoints.steps():
            state, data, _ = checkpoints.restore(target, step)
            assert data == {"step": step}
            assert all((np.asarray(leaf) == step + int(name)).all() for name, leaf in state.items())
            model = tmp_path / "models" / str(step) / "model.safetensors"
            assert model.read_text() == str(step)
        checkpoints.close()
    print(f"{unfinished} of 3 kills fell into a save")
