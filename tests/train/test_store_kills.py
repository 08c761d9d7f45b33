# SPDX-License-Identifier: Apache-2.0
"""Runs in object stores that are killed, and go on with other numbers of processes."""

import contextlib
import random
import re
import signal
import time

import pytest
from store_runs import copied, lives, packed_in_s3, steps_taken
from tiny_runs import Parent, assert_same, lines

from vivit_jax.files import storage
from vivit_jax.train.storage.run_store import UPLOADED

pytestmark = pytest.mark.usefixtures("fresh_stores")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_in_s3_killed_ten_times_ends_bit_for_bit_as_a_whole_one(
    tmp_path, monkeypatch, processes
):
    """Killed at random moments: one of its processes, or all; shards and run are in the store.

    The processes share no directory, as on machines of their own.
    """
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    steps, rng = 80, random.Random(processes)
    with packed_in_s3(tmp_path, steps) as (bucket, args), contextlib.closing(Parent()) as parent:
        whole = lives(parent, tmp_path, processes, [*args, tmp_path / "whole"])
        assert [life.end() for life in whole] == [0] * processes, whole[0].text
        begun_at = []
        for death in range(10):
            running = lives(parent, tmp_path, processes, [*args, f"{bucket}/run"])
            begun = running[0].until(lambda life=running[0]: " an epoch, " in life.text)
            assert begun, "\n".join(life.text for life in running)
            begun_at.append(int(re.findall(r"steps (\d+) to", running[0].text)[0]))
            until = begun_at[-1] + rng.randint(-1, 8)
            running[0].until(lambda step=until: steps_taken(tmp_path) >= step)
            time.sleep(rng.uniform(0, 0.1))
            for life in running if death % 2 else rng.sample(running, 1):
                if life.until(lambda: True):  # it may have come to its end
                    with contextlib.suppress(ProcessLookupError):
                        life.send(signal.SIGKILL)
            for life in running:
                life.end()
        print(f"\nbegun at steps {begun_at}")
        assert len(set(begun_at)) >= 5  # they went on from checkpoints of one another
        last = lives(parent, tmp_path, processes, [*args, f"{bucket}/run"])
        assert [life.end() for life in last] == [0] * processes, last[0].text
        there = copied(f"{bucket}/run", tmp_path / "copy")
    assert_same(there, tmp_path / "whole", steps)


@pytest.mark.slow
def test_a_run_in_s3_goes_on_with_other_numbers_of_processes(tmp_path, monkeypatch):
    """2, 1, 4 processes with 4 devices each; all but the last are killed after a checkpoint."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    steps = 18
    with packed_in_s3(tmp_path, steps) as (bucket, args), contextlib.closing(Parent()) as parent:
        whole = lives(parent, tmp_path, 2, [*args, tmp_path / "whole"])
        assert [life.end() for life in whole] == [0, 0], whole[0].text
        for processes, until in ((2, 6), (1, 12)):
            running = lives(parent, tmp_path, processes, [*args, f"{bucket}/run"])
            written = f"{bucket}/run/checkpoints/{until}/{UPLOADED}"
            seen = running[0].until(lambda name=written: storage.exists(name))
            assert seen, running[0].text
            for life in running:
                life.send(signal.SIGKILL)
            for life in running:
                life.end()
        last = lives(parent, tmp_path, 4, [*args, f"{bucket}/run"])
        assert [life.end() for life in last] == [0] * 4, last[0].text
        there = copied(f"{bucket}/run", tmp_path / "copy")
    ours, theirs = lines(there), lines(tmp_path / "whole")
    error = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, theirs, strict=True))
    print(f"\nlargest relative difference of a loss: {error:.1e}")
    assert_same(there, tmp_path / "whole", steps, rtol=2e-6)  # measured: 1.3e-7 of a loss
