# SPDX-License-Identifier: Apache-2.0
"""Damaged inputs of every kind give the same result, another sound one, or one line of error.

Never another exception, a crash, 10 s of work or 512 MiB more. More of them, by hand:
`python tests/hostile/test_mutations.py 10000`.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent)]
sys.path += [str(Path(__file__).parents[1] / name) for name in ("", "data", "train")]

import pool  # noqa: E402
from inputs import KINDS, make  # noqa: E402
from pool import timed  # noqa: E402


def jobs(count: int, first: int = 0) -> list[tuple[str, int]]:
    """`count` pairs (kind, seed), cycling through the kinds."""
    turns = ((kind, seed) for seed in itertools.count(first) for kind in KINDS)
    return list(itertools.islice(turns, count))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    make(path)
    return path


@pytest.mark.parametrize(
    ("first", "count", "workers"),
    [
        (0, 150, 1),
        pytest.param(150, 300, 1, marks=pytest.mark.slow),
        pytest.param(10_000, 10_000, 2, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_damaged_inputs(root, first, count, workers):
    results, told = timed(root, jobs(count, first), workers)
    print(told)
    assert len(results) == count
    assert all(result.good for result in results), told
    kinds = {kind: [r.outcome for r in results if r.kind == kind] for kind in KINDS}
    # Some damage of each kind must have an effect.
    assert all(set(outcomes) - {"same"} for outcomes in kinds.values()), told


@pytest.mark.slow
def test_the_harness_notices(root, monkeypatch):
    monkeypatch.setattr(pool, "HANG", 0.9)
    monkeypatch.setattr(pool, "GROWN", 2**25)
    expected = {
        "crash": "CRASH", "raise": "WRONG", "hang": "HANG", "lines": "WRONG", "memory": "MEMORY",
        "random": "WRONG", "checked": "WRONG", "one line": "error",
    }  # fmt: skip
    results, told = timed(root, [(kind, 0) for kind in expected], 1)
    assert {result.kind: result.outcome for result in results} == expected, told


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory))
        first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(timed(Path(directory), jobs(int(sys.argv[1]), first), os.cpu_count() or 1)[1])
