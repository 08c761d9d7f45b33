# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of processes that share no file system."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from tiny_runs import free_port

from vivit_jax.train.storage.checkpoint import Checkpoints

_PROCESS = """
import functools, shutil, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vivit_jax.errors import UserError, WriteError
from vivit_jax.train.processes.first import of_first
from vivit_jax.train.storage.gathered_checkpoints import GatheredCheckpoints

port, number, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, number)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "fsdp"))

def placed(array, *axes):
    sharding = NamedSharding(mesh, P(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda at: array[at])

def tree(seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((8, 6)).astype(np.float32)
    kernel[0, 0], kernel[5, 1] = -0.0, np.inf
    kernel.view(np.uint32)[3, 2] = 0x7FC01234  # a NaN with bits of its own
    make = functools.partial(jax.random.key, impl="rbg")
    key = jax.jit(make, out_shardings=NamedSharding(mesh, P()))(seed)
    return {
        "over all": placed(kernel, ("data", "fsdp")),
        "over some": placed(kernel.astype(jnp.bfloat16), None, "fsdp"),
        "whole": placed(kernel),
        "count": placed(np.int32(seed)),
        "key": key,
    }

def bits(tree):
    key = np.asarray(jax.random.key_data(tree.pop("key")).addressable_data(0)).tobytes()
    return key, {
        name: [(str(s.index), np.asarray(s.data).tobytes()) for s in array.addressable_shards]
        for name, array in tree.items()
    }

def failure(call, *args):
    try:
        call(*args)
    except UserError as error:
        return type(error).__name__, str(error)

checkpoints = GatheredCheckpoints(directory, keep=2)
assert checkpoints.latest() is None
for step in (1, 2, 3):
    export = (lambda path: path.mkdir()) if number == 0 else None
    state = tree(step)
    checkpoints.save(step, state, {"position": [step, 2**40]}, {"score": 1 / step}, export)
    del state
checkpoints.wait()
assert (checkpoints.steps(), checkpoints.best(), checkpoints.latest()) == ([1, 2, 3], 1, 3)
assert checkpoints.metrics(2) == {"score": 0.5}
assert (directory / "checkpoints").exists() == (number == 0), "only the first process writes"
shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0)
)
state, data, step = checkpoints.restore(shapes)
assert (data, step) == ({"position": [3, 2**40]}, 3)
assert bits(state) == bits(tree(3))
assert not checkpoints.lacks_model(3)

# Errors of the first process, in both.
kind, text = failure(checkpoints.check_step, 7)
assert "holds no checkpoint of step 7; it has 1, 2, 3" in text
assert ("process 0 cannot continue: " in text) == (number == 1)
kind, text = failure(checkpoints.save, 2, tree(2), {})
assert "step 2 is not after it" in text
if number == 0:
    shutil.rmtree(directory / "checkpoints" / "3" / "state" / "d")
state, data, step = checkpoints.restore(shapes)
assert step == 2 and bits(state) == bits(tree(2))
kind, text = failure(checkpoints.restore, shapes, 3)
assert "is damaged" in text and kind == ("DamagedCheckpoint" if number == 0 else "UserError")

def full():
    raise OSError(28, "No space left on device")

try:
    of_first(full)
except (OSError, WriteError) as error:
    assert isinstance(error, OSError) == (number == 0) and "No space left" in str(error)
else:
    raise AssertionError
checkpoints.rewind(2)
checkpoints.save(4, tree(4), {})
assert checkpoints.steps() == [1, 2, 4]
checkpoints.close()
print("ended")
"""


@pytest.mark.slow
def test_the_first_process_holds_the_state_of_all_and_gives_it_back_bit_for_bit(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command, port = [sys.executable, "-c", _PROCESS], str(free_port())
    both = [
        subprocess.Popen(
            [*command, port, str(n), str(tmp_path / str(n))],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | flags,
        )
        for n in range(2)
    ]
    for process in both:
        said, _ = process.communicate(timeout=300)
        assert (process.returncode, said.splitlines()[-1:]) == (0, ["ended"])
    # One process, or several that share a file system, read it as they read their own.
    one = SingleDeviceSharding(jax.devices()[0])
    key = jax.random.key(4, impl="rbg")
    shapes = {
        "over all": ((8, 6), jnp.float32),
        "over some": ((8, 6), jnp.bfloat16),
        "whole": ((8, 6), jnp.float32),
        "count": ((), jnp.int32),
        "key": ((), key.dtype),
    }
    checkpoints = Checkpoints(tmp_path / "0", keep=2)
    assert checkpoints.steps() == [1, 2, 4]
    state, _, step = checkpoints.restore(
        {name: jax.ShapeDtypeStruct(*each, sharding=one) for name, each in shapes.items()}
    )
    checkpoints.close()
    kernel = np.asarray(state["whole"])
    assert (step, state["count"]) == (4, 4)
    assert kernel.tobytes() == np.asarray(state["over all"]).tobytes()
    assert np.signbit(kernel[0, 0]) and kernel.view(np.uint32)[3, 2] == 0x7FC01234
    assert jnp.array_equal(jax.random.key_data(state["key"]), jax.random.key_data(key))
