# SPDX-License-Identifier: Apache-2.0
"""What XLA makes of the real training step on eight devices: who sends what, and who computes what.

Losses on a mesh are right whether or not every device computes everything. So the compiled program
is read: its collectives are those of `partitioned.table`, and its loops get shorter.
"""

import itertools
import time

import jax
import numpy as np
import pytest
from helpers import mostly_slow
from partitioned import FAMILIES, build, mesh_of, misplaced, program_of
from tiny_recipes import changed

from vivit_jax.layers import chunked
from vivit_jax.layers.chunked import Tile
from vivit_jax.models.build import fresh_params
from vivit_jax.train.state import new_state

MESHES = (
    "data=8",
    "fsdp=8",
    "data=2,fsdp=4",
    "data=4,tensor=2",
    "data=2,tensor=4",
    "fsdp=4,tensor=2",
    "data=2,fsdp=2,tensor=2",
)
BACKENDS = ("chunked", "xla")
SMALL = Tile(queries=16, rows=64, scores=2**12)  # so that tiny models have loops over heads

CASES = list(itertools.product(FAMILIES, MESHES, BACKENDS))
QUICK = [
    ("videomae finetune", "fsdp=8", "xla"),
    ("dot product", "data=2,tensor=4", "chunked"),
]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("family", "mesh", "backend"), mostly_slow(CASES, *QUICK))
def test_what_moves_between_devices(family, mesh, backend):
    setup = build(FAMILIES[family], mesh_of(mesh), attention=backend)
    wrong = misplaced(setup, program_of(setup))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh"),
    list(
        itertools.product(
            ("videomae pretrain", "videomae finetune", "encoder", "self-attention", "dot product"),
            ("data=8", "data=4,tensor=2", "fsdp=4,tensor=2"),
        )
    ),
)
def test_each_device_attends_for_its_own_heads(family, mesh, monkeypatch):
    """The rounds of all loops over heads are those of one device, divided by eight."""
    monkeypatch.setitem(chunked.TILES, "cpu", SMALL)
    here, together = (
        _rounds(program_of(build(FAMILIES[family], mesh_of(m), attention="chunked")))
        for m in ("data=1", mesh)
    )
    assert here["attention"] > 100
    assert together["attention"] <= here["attention"] / 8
    assert all(b <= a for a, b in zip(here["other"], together["other"], strict=True))


def _rounds(program):
    """Of all loops over heads together, and of each other loop, sorted."""
    rounds = [(loop, (loop.trips or 0) * loop.times) for loop in program.loops]

    def inside(loop):
        return "/attention" in loop.op_name

    return {
        "attention": sum(n for loop, n in rounds if inside(loop)),
        "other": sorted(n for loop, n in rounds if not inside(loop)),
    }


def first_state(setup):
    params, averaged = fresh_params(setup.model, 0), setup.recipe.optim.ema is not None
    state = new_state(params, setup.optimizer, averaged=averaged)
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, setup.shapes))


def some_batch(setup):
    rng = np.random.default_rng(0)
    shapes = setup.batch_shapes
    batch = {k: rng.integers(0, 4, x.shape).astype(x.dtype) for k, x in shapes.items()}
    return jax.device_put(batch, {k: x.sharding for k, x in shapes.items()})


# Attention over 1568 tokens is most of what this model computes.
LONG_CLIPS = dict(
    image_size=112,
    num_frames=16,
    patch_size=8,
    hidden_size=64,
    num_attention_heads=4,
    intermediate_size=128,
    num_hidden_layers=2,
)


@pytest.mark.alone
@pytest.mark.parametrize("mesh", ["data=8", "data=4,tensor=2"])
def test_eight_devices_take_no_longer_than_one(mesh):
    """For the same work on the same cores, each step after one on one device."""
    recipe = changed(FAMILIES["videomae finetune"], train__batch_size=8)
    setups = [build(recipe, mesh_of(m), **LONG_CLIPS) for m in ("data=1", mesh)]
    states = [first_state(setup) for setup in setups]
    laps = [[], []]
    with jax.default_matmul_precision("default"):  # as users compute
        for _ in range(13):  # the first of them compiles
            for i, setup in enumerate(setups):
                batch = some_batch(setup)
                start = time.perf_counter(), time.process_time()
                states[i], _ = jax.block_until_ready(setup.step(states[i], batch))
                laps[i].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    (alone, work), (together, of_all) = (np.min(each[1:], axis=0) for each in laps)
    print(
        f"\n{mesh}: {together:.3f} s, one device {alone:.3f} s; on cores {of_all:.2f}, {work:.2f}"
    )
    assert together / alone <= 1.3
