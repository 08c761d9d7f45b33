# SPDX-License-Identifier: Apache-2.0
"""What libtpu makes of the real training step, for chips that are not there; nothing is run.

The collectives are those of `partitioned.table` here too, in bfloat16: kernels and their gradients
move in half precision, activations forward in float32.
"""

import itertools

import pytest
from compilers import needs_libtpu
from partitioned import FAMILIES
from tpu_compiler import FOUR_CHIPS

from vivit_jax.train.planning.hardware import CHIPS

pytestmark = [needs_libtpu, pytest.mark.slow]
CASES = [
    *itertools.product(FAMILIES, ["data=2,tensor=2"]),
    *itertools.product(["videomae pretrain", "self-attention"], ["data=4", "fsdp=4"]),
    ("videomae finetune", "fsdp=2,tensor=2"),
]


def check(found, chip="v5e"):
    assert not found["wrong"], "\n".join(found["wrong"])
    assert 0 < found["peak"] < CHIPS[chip].memory


@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_what_moves_between_chips(family, mesh, compiler):
    check(compiler("step", topology="v5e:2x2", family=family, mesh=mesh))


@pytest.mark.parametrize("backend", ["chunked", "xla"])
def test_each_backend_of_attention(backend, compiler):
    what = dict(family="videomae finetune", mesh="data=2,tensor=2", attention=backend)
    check(compiler("step", topology="v5e:2x2", **what))


@pytest.mark.parametrize("chip", FOUR_CHIPS)
@pytest.mark.parametrize("tokens", [160, 197, 1568])
def test_attention_moves_nothing(chip, tokens, compiler):
    assert compiler("attention", topology=FOUR_CHIPS[chip], tokens=tokens) == []


def test_a_step_from_a_file(compiler, tmp_path):
    """One file for all platforms, traced on CPU, compiles for a TPU's chips too."""
    path = str(tmp_path / "step.stablehlo")
    found = compiler("from_a_file", topology="v5e:2x2", path=path)
    assert found["kinds"] == ["all-reduce"] and found["donated"] > 0.9


def test_what_moves_between_chips_of_a_base_model(compiler):
    """The published recipe, 8 clips a chip; half a minute on two idle cores."""
    name = "videomae-v1-base-kinetics400-pretrain"
    sizes = dict(data=4, fsdp=1, tensor=1)
    found = compiler("published", topology="v5e:2x2", recipe=name, mesh=sizes, train__batch_size=32)
    assert found["clips"] == 32
    check(found)
