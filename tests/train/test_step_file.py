# SPDX-License-Identifier: Apache-2.0
"""The training step as a file: a process without this library takes the same steps, bit for bit."""

import contextlib
import dataclasses
import functools
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from compiler_flags import TESTS
from helpers import mostly_slow
from test_step import DUAL, PROCESSOR, batches
from tiny_recipes import FINETUNE, PRETRAIN, changed

import vivit_jax
from vivit_jax.errors import CheckpointError, UserError
from vivit_jax.inference import export_step as file_module
from vivit_jax.inference.export_step import export_step, load_step
from vivit_jax.models.build import fresh_params
from vivit_jax.train.setup import make_setup
from vivit_jax.train.sharding import batch_sharding, make_mesh
from vivit_jax.train.start.initial_model import planned_model
from vivit_jax.train.state import new_state
from vivit_jax.train.storage.stored_state import flat

STEPS = 2
# What somebody runs who has the file, jax, and nothing of ours.
RUN = """
import sys
import jax
import numpy as np
jax.config.update("jax_num_cpu_devices", 8)
place, steps = sys.argv[1:]
program = jax.export.deserialize(bytearray(open(place + "/step.stablehlo", "rb").read()))
assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
mesh = program.in_avals[0].sharding.mesh
devices = jax.devices()[:program.nr_devices]
mesh = jax.make_mesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types, devices=devices)
(states, rows), _ = jax.tree.unflatten(program.in_tree, program.in_shardings_jax(mesh))
step = jax.jit(program.call, donate_argnums=0)
state = jax.device_put(dict(np.load(place + "/state.npz")), states)
for i in range(int(steps)):
    batch = jax.device_put(dict(np.load(f"{place}/batch{i}.npz")), rows)
    # Two programs on all devices at once may wait for each other for ever on few cores.
    state, values = jax.block_until_ready(step(state, batch))
np.savez(place + "/out.npz", **state, **{f"value/{k}": v for k, v in values.items()})
for module in ("vivit_jax", "checkpoints_convert", "flax", "optax"):
    assert module not in sys.modules, module
"""
ONE = dict(data=1, fsdp=1, tensor=1)
FROZEN = changed(
    FINETUNE,
    train__accumulate=2,
    optim__algorithm="sgd",
    optim__schedule="scenic",
    optim__freeze=(r"backbone/layers_0/.*", r"backbone/patch_embed/.*"),
    optim__ema=None,
)
FEWEST = "frozen, sgd, no average"  # arrays of a state
CASES = {
    "pretrain": (PRETRAIN, ONE),
    "finetune": (FINETUNE, ONE),
    FEWEST: (FROZEN, ONE),
    "dual masks": (changed(DUAL, train__accumulate=2), ONE),
    "mesh": (PRETRAIN, dict(data=2, fsdp=2, tensor=2)),
}


@functools.cache
def setup_of(name):
    """Compiled once for all tests."""
    recipe, sizes = CASES[name]
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    return make_setup(recipe, mesh, planned_model(recipe)[0], PROCESSOR, per_epoch=2)


def first_state(name):
    setup = setup_of(name)
    params, averaged = fresh_params(setup.model, 0), setup.recipe.optim.ema is not None
    state = new_state(params, setup.optimizer, averaged=averaged)
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, setup.shapes))


def steps_here(name, steps=STEPS):
    """The state and the values after the steps, in this process."""
    setup, state = setup_of(name), first_state(name)
    for batch in batches(setup.recipe, steps):
        batch = jax.device_put(batch, batch_sharding(setup.mesh))
        state, values = jax.block_until_ready(setup.step(state, batch))
    return state, values


def as_numpy(tree):
    return {path: np.asarray(leaf) for path, leaf in flat(tree).items()}


@functools.cache
def exported(name):
    """The file of a case, traced once for all tests."""
    with tempfile.TemporaryDirectory() as directory:
        return traced(Path(directory), name).read_bytes()


def written(directory, name):
    path = directory / "step.stablehlo"
    path.write_bytes(exported(name))
    return path


def traced(directory, name, **options):
    path = directory / "step.stablehlo"
    export_step(setup_of(name), path, **options)
    return path


def steps_in_another_process(place, name):
    """The state and the values after the steps, by path, of a process that has only the file."""
    written(place, name)
    np.savez(place / "state.npz", **as_numpy(first_state(name)))
    for i, batch in enumerate(batches(CASES[name][0], STEPS)):
        np.savez(place / f"batch{i}.npz", **batch)
    # The same compiler as here, since bits are compared.
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(TESTS)}
    command = [sys.executable, "-c", RUN, str(place), str(STEPS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(place / "out.npz") as found:
        return dict(found)


@pytest.mark.parametrize("name", mostly_slow(CASES, FEWEST))
def test_a_process_without_this_library_takes_the_same_steps(name, tmp_path):
    found = steps_in_another_process(tmp_path, name)
    state, values = steps_here(name)
    expected = as_numpy(state) | {f"value/{k}": np.asarray(v) for k, v in values.items()}
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    assert int(state.step) == STEPS and int(state.skipped) == 0


@pytest.mark.slow
def test_a_state_of_any_kind_is_taken_and_donated(tmp_path):
    """A TrainState comes back as one, NumPy's arrays by path as a dict; both from the mesh."""
    setup, step = setup_of("mesh"), load_step(written(tmp_path, "mesh"))
    assert step.platforms == ("cpu", "cuda", "tpu")
    assert dict(step.mesh.shape) == dict(data=2, fsdp=2, tensor=2)

    def places(tree):
        return jax.tree.map(lambda x: x.sharding, tree)

    assert places(step.state) == places(flat(setup.shapes))
    state, batch = first_state("mesh"), next(batches(setup.recipe))
    arrays = as_numpy(first_state("mesh"))  # views, which cannot be donated
    new, values = jax.block_until_ready(step(state, batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert places(new) == places(setup.shapes)
    by_path, again = jax.block_until_ready(step(arrays, batch))
    assert float(values["loss"]) == float(again["loss"]) and int(new.step) == 1
    for path, value in as_numpy(new).items():
        np.testing.assert_array_equal(by_path[path], value, err_msg=path)


def test_traced_as_for_cpu_whatever_the_machine_has(tmp_path, monkeypatch):
    """And without the names of the files that it was traced from."""
    here = written(tmp_path, FEWEST).read_bytes()
    assert str(Path(vivit_jax.__file__).parent).encode() not in here
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert traced(tmp_path, FEWEST).read_bytes() == here
    monkeypatch.setattr(file_module, "traced_for", lambda _: contextlib.nullcontext())
    assert traced(tmp_path, FEWEST).read_bytes() != here


@pytest.mark.slow
def test_what_does_not_fit_a_file_is_told(tmp_path):
    path = written(tmp_path, "mesh")
    with pytest.raises(UserError, match="on 8 devices .data=2,fsdp=2,tensor=2., there are 4"):
        load_step(path, jax.devices()[:4])
    step, state, batch = load_step(path), first_state("mesh"), next(batches(PRETRAIN))
    with pytest.raises(UserError, match="the batch .* missing: clips; unknown: clip. "):
        step(state, {"clip": batch["clips"]})
    with pytest.raises(UserError, match=r"clips \(uint8\[8, .*\] here, uint8\[16, .*\] there\)"):
        step(state, {"clips": batch["clips"][:8]})
    with pytest.raises(UserError, match="the state .* missing: average/.* and 32 more"):
        step(dataclasses.replace(state, average=None), batch)
    assert not state.step.is_deleted()
    with pytest.raises(UserError, match="is a step for tpu, and the devices are of cpu"):
        load_step(traced(tmp_path, "mesh", platforms=["tpu"]))
    with pytest.raises(UserError, match="platforms are .'gpu'."):
        traced(tmp_path, "mesh", platforms=["gpu"])


def test_files_that_hold_no_step_are_told(tmp_path):
    path = tmp_path / "step.stablehlo"
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_step(path)
    whole = written(tmp_path, FEWEST).read_bytes()
    for content in (b"", b"step", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="step.stablehlo is not a program that this jax"):
            load_step(path)
    other = jax.export.export(jax.jit(lambda x: x + 1))(np.zeros(3, np.float32))
    path.write_bytes(other.serialize())
    with pytest.raises(CheckpointError, match="expected one that export_step wrote"):
        load_step(path)
