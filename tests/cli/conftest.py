# SPDX-License-Identifier: Apache-2.0
import fcntl
import json
import os
import subprocess
import sys

import pytest

TINY = (
    *("--clips-per-class", "3", "--labelled-clips-per-class", "2"),
    *("--test-clips-per-class", "2", "--epochs", "1"),
)
# A process of its own has one device, which compiles in half the time of the suite's eight.
PROGRAM = (sys.executable, "-m", "vivit_jax.cli")
# The comparison with PyTorch would be a fifth of a tiny demo's time; other tests make it.
WITHOUT_PYTORCH = """
import sys
from vivit_jax.cli.__main__ import main
from vivit_jax.models import build

build.DRAW_OPTIONS = None  # as in the rest of the suite

class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name=name)

sys.meta_path.insert(0, NoTorch())
sys.exit(main())
"""


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """A directory that a tiny demo wrote without PyTorch, and what it printed; for all workers."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent
    out, printed = base / "demo of all" / "a b", base / "demo.json"
    with open(base / "demo.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            out.parent.mkdir()
            program = (sys.executable, "-c", WITHOUT_PYTORCH)
            done = subprocess.run(
                [*program, "demo", "--out", str(out), *TINY],
                capture_output=True,
                text=True,
                # Drawing parameters is compiled in half the time, as in the rest of the suite.
                env=os.environ | {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
            )
            assert done.returncode == 0, done.stderr
            printed.write_text(json.dumps([done.stdout, done.stderr]))
    return out, *json.loads(printed.read_text())
