# SPDX-License-Identifier: Apache-2.0
"""What XLA makes of the real training step on eight devices: who sends what, and who computes what.

Losses on a mesh are right whether or not every device computes everything. So the compiled program
is read: its collectives are those of `partitioned.table`, and its loops get shorter.
"""

import itertools

import pytest
from helpers import mostly_slow
from partitioned import FAMILIES, build, mesh_of, misplaced, program_of

from vivit_jax.layers import chunked
from vivit_jax.layers.chunked import Tile

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
    ("videomae pretrain", "data=8", "chunked"),
    ("videomae pretrain", "data=2,fsdp=2,tensor=2", "chunked"),
    ("videomae finetune", "fsdp=8", "xla"),
    ("v2 pretrain", "data=4,tensor=2", "chunked"),
    ("joint", "data=4,tensor=2", "xla"),
    ("encoder", "data=8", "chunked"),
    ("self-attention", "fsdp=4,tensor=2", "chunked"),
    ("dot product", "data=2,tensor=4", "chunked"),
    ("weights of attention", "data=4,tensor=2", "chunked"),
]


@pytest.mark.parametrize(("family", "mesh", "backend"), mostly_slow(CASES, *QUICK))
def test_what_moves_between_devices(family, mesh, backend):
    setting = build(FAMILIES[family], mesh_of(mesh), attention=backend)
    wrong = misplaced(setting, program_of(setting))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("family", "mesh"),
    mostly_slow(
        itertools.product(
            ("videomae pretrain", "videomae finetune", "encoder", "self-attention", "dot product"),
            ("data=8", "data=4,tensor=2", "fsdp=4,tensor=2"),
        ),
        ("videomae pretrain", "data=4,tensor=2"),
        ("self-attention", "data=8"),
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
    inside = lambda loop: "/attention" in loop.op_name  # noqa: E731
    return {
        "attention": sum(n for loop, n in rounds if inside(loop)),
        "other": sorted(n for loop, n in rounds if not inside(loop)),
    }
