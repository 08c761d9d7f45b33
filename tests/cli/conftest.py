# SPDX-License-Identifier: Apache-2.0
import fcntl
import json
import subprocess
import sys

import pytest

TINY = (
    *("--clips-per-class", "3", "--labelled-clips-per-class", "2"),
    *("--test-clips-per-class", "2", "--epochs", "1"),
)
# A process of its own has one device, which compiles in half the time of the suite's eight.
PROGRAM = (sys.executable, "-m", "vivit_jax.cli")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """A directory that a tiny demo wrote, and what it printed; one for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    out, printed = base / "demo of all" / "a b", base / "demo.json"
    with open(base / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            out.parent.mkdir()
            done = subprocess.run(
                [*PROGRAM, "demo", "--out", str(out), *TINY], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            printed.write_text(json.dumps([done.stdout, done.stderr]))
    return out, *json.loads(printed.read_text())
