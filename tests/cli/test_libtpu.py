# SPDX-License-Identifier: Apache-2.0
"""libtpu is installed for plans, and is silent where there is no TPU."""

import os
import subprocess
import sys

import pytest
from compilers import needs_libtpu

from vivit_jax.console import devices, has_tpu, run

CODE = """
from vivit_jax.console import run

def go() -> None:
    import jax
    print(jax.default_backend())

run("tool", "A tool.", {"go": go, "stay": lambda: None}, ["go"])
"""
NAMES = ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE")


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A machine without a TPU, and an environment without answers."""
    for name in (*NAMES, "JAX_FORCE_TPU_INIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "_DEVICES", (f"{tmp_path}/accel*",))
    monkeypatch.setattr(devices, "_VENDORS", f"{tmp_path}/*/vendor")
    return tmp_path


def answers():
    run("tool", "A tool.", {"go": lambda: None, "stay": lambda: None}, ["go"])
    return [os.environ.get(name) for name in NAMES]


def test_a_machine_without_a_tpu_answers(nothing, monkeypatch):
    (nothing / "disk").mkdir()
    (nothing / "disk" / "vendor").write_text("0x1af4\n")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "")  # to be as it was after the test
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE")
    assert answers() == ["mine", "v5litepod-8"]


@pytest.mark.parametrize("how", ["accel0", "chip/vendor", "JAX_FORCE_TPU_INIT"])
def test_a_tpu_speaks_for_itself(how, nothing, monkeypatch):
    if how == "JAX_FORCE_TPU_INIT":
        monkeypatch.setenv(how, "1")
    else:
        (nothing / how).parent.mkdir(exist_ok=True)
        (nothing / how).write_text("0x1ae0\n")
    assert answers() == [None, None]


@needs_libtpu
@pytest.mark.skipif(has_tpu(), reason="there may be a TPU")
def test_commands_are_silent_beside_libtpu():
    free = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=free | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "cpu\n")
