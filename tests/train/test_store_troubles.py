# SPDX-License-Identifier: Apache-2.0
"""Runs in object stores that fail for a while, and for long."""

import contextlib
import os
import time

import pytest
from store_runs import copied, lives, packed_in_s3
from stores import Proxy
from tiny_runs import Parent, assert_same

from vivit_jax.files import storage
from vivit_jax.train.storage.run_store import UPLOADED

pytestmark = pytest.mark.usefixtures("fresh_stores")


def faulty(number: int, method: str) -> str | None:
    """Of ten requests, one is answered with 500, one with 503, one in half and one slowly."""
    return {2: "500", 4: "short" if method == "GET" else None, 6: "503", 8: "slow"}.get(number % 10)


@pytest.mark.slow
def test_a_run_outlives_its_servers_troubles(tmp_path, monkeypatch):
    """Errors, short and slow answers all the time, and in the middle no server for 20 s.

    Shards and run are there. Where it stays away the run ends, and goes on when it is back.
    """
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    steps = 12
    with packed_in_s3(tmp_path, steps) as (bucket, args), contextlib.ExitStack() as stack:
        proxy = stack.enter_context(contextlib.closing(Proxy(os.environ["AWS_ENDPOINT_URL"])))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        parent = stack.enter_context(contextlib.closing(Parent()))
        (whole,) = lives(parent, tmp_path, 1, [*args, tmp_path / "whole"])
        assert whole.end() == 0, whole.text
        proxy.fault = faulty
        (life,) = lives(parent, tmp_path, 1, [*args, f"{bucket}/run"])
        assert life.until(lambda: "step 1/" in life.text), life.text
        back = time.monotonic() + 20
        proxy.fault = lambda n, method: "gone" if time.monotonic() < back else faulty(n, method)
        assert life.end() == 0, life.text
        print(f"\n{proxy.counts}")
        assert all(proxy.counts[fault] >= 2 for fault in ("500", "503", "short", "slow", "gone"))
        assert life.text.count("trying again for") >= 10
        proxy.fault = lambda number, method: None
        assert_same(copied(f"{bucket}/run", tmp_path / "copy"), tmp_path / "whole", steps)

        # It stays away: after the stated time the run ends, with the checkpoint before whole.
        monkeypatch.setenv("VIVIT_JAX_STORAGE_TIMEOUT", "4")
        impatient = stack.enter_context(contextlib.closing(Parent()))
        both = lives(impatient, tmp_path, 2, [*args, f"{bucket}/other"])
        written = f"{bucket}/other/checkpoints/3/{UPLOADED}"
        assert both[0].until(lambda: storage.exists(written)), both[0].text
        proxy.fault = lambda number, method: "gone"
        assert [life.end() for life in both] == [2, 2], "\n".join(life.text for life in both)
        for life in both:
            (error,) = [line for line in life.text.splitlines() if "error:" in line]
            assert "failed for 4 s" in error and "VIVIT_JAX_STORAGE_TIMEOUT" in error
        proxy.fault = lambda number, method: None
        (life,) = lives(impatient, tmp_path, 1, [*args, f"{bucket}/other"])
        assert life.end() == 0, life.text
        found = copied(f"{bucket}/other", tmp_path / "other")
    assert_same(found, tmp_path / "whole", steps, rtol=2e-6)  # as in test_store_kills.py
