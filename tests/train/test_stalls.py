# SPDX-License-Identifier: Apache-2.0
"""What a run says of its own time: a step that hangs, compilations, memory, a chip's use."""

import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest

from vivit_jax.train import clock as clock_file
from vivit_jax.train.chips import CHIPS, chip_of
from vivit_jax.train.clock import MEASURED, Clock
from vivit_jax.train.processes.stalls import Stalls


@pytest.fixture
def stalls():
    said = []
    found = Stalls(lambda step, text: said.append((step, text)), least=0.1)
    found.said = said
    yield found
    found.close()


def wait_for_something_rare(event):
    return event.wait(10)


def test_a_step_that_hangs_is_reported_once_with_what_each_thread_waits_for(stalls):
    rare = threading.Event()
    thread = threading.Thread(target=wait_for_something_rare, args=(rare,), name="a reader")
    thread.start()
    for step in range(1, 7):
        stalls.lap(step, 0.001)
    time.sleep(0.5)
    rare.set()
    thread.join()
    ((step, text),) = stalls.said
    assert step == 6 and "times the usual 0.001 s of a step" in text
    assert "a reader: train/test_stalls.py" in text and "`return event.wait(10)`, in" in text
    assert "threading.py" in text
    assert "MainThread: train/test_stalls.py" in text and "`time.sleep(0.5)`" in text
    assert "stalls:" not in text  # the thread that looks
    stalls.lap(7, 0.5)
    time.sleep(0.3)
    assert [step for step, _ in stalls.said] == [6, 7]


def test_what_is_no_stall(stalls):
    for step in range(1, 5):  # too few to know the usual time
        stalls.lap(step, 0.001)
    time.sleep(0.2)
    for step in range(5, 9):
        stalls.lap(step, 0.001)
    with stalls.paused():  # a checkpoint
        time.sleep(0.2)
    for step in range(9, 30):
        stalls.lap(step, 0.1)  # ten times as much is a second
    time.sleep(0.3)
    assert stalls.said == []


def test_a_lap_has_times_compilations_memory_and_the_use_of_a_chip(monkeypatch):
    monkeypatch.setattr(clock_file, "chip_of", lambda device: CHIPS["v5e"])
    clock = Clock(8, 2e9, lambda step, text: None)
    try:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
        start = time.perf_counter()
        first = clock.lap(1)
        with clock.paused():
            time.sleep(0.2)
        time.sleep(0.05)
        second = clock.lap(2)
        longest = time.perf_counter() - start - 0.2
    finally:
        clock.close()
    assert tuple(second) == MEASURED
    assert first["compilations"] >= 1 and 0 < first["compile_seconds"] < first["step_seconds"]
    assert second["compilations"] == second["compile_seconds"] == second["wait_share"] == 0
    seconds = second["step_seconds"]
    assert 0.05 <= seconds <= longest
    assert second["clips_per_second"] == pytest.approx(8 / seconds)
    assert second["tflops_per_device"] == pytest.approx(2e-3 / seconds)
    assert second["mfu"] == pytest.approx(2e9 / seconds / 197e12)
    assert 0.05 < second["device_memory_gib"] < 100
    jax.jit(lambda x: x * 5 + 1)(jnp.ones(7)).block_until_ready()  # nobody listens any more
    assert clock.lap(3)["compilations"] == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "h200"),
        ("cpu", None),
    ],
)
def test_chips_by_the_names_that_their_drivers_give(kind, name):
    assert chip_of(types.SimpleNamespace(device_kind=kind)) == (name and CHIPS[name])
