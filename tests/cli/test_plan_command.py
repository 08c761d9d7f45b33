# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax plan`: what it prints and writes, and what it refuses."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
from compilers import needs_libtpu
from full_disk import file_size
from signals import handled

from vivit_jax.benchmark import loader
from vivit_jax.cli import plan as plan_command
from vivit_jax.cli.__main__ import main
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.train import plan as plan_module

SMALL = (
    *("--set", "model.config.num_hidden_layers=1", "model.config.hidden_size=32"),
    *("model.config.decoder_hidden_size=32", "train.batch_size=8"),
)
DEMO = ("--recipe", "demo-pretrain", *SMALL)


@pytest.fixture
def on_cpu(monkeypatch):
    """Topologies are of this machine's CPU devices, so that nothing more has to be there."""
    monkeypatch.setattr(plan_module, "compile_only_devices", lambda t: jax.devices()[: t.count])
    monkeypatch.setattr(plan_module, "_versions", lambda topology: {"jax": "0"})


def run(capsys, *args):
    status = main(["plan", *map(str, args)])
    return status, *capsys.readouterr()


def test_a_plan_is_printed_and_written(on_cpu, capsys, tmp_path):
    figures, text = tmp_path / "plan.json", tmp_path / "program.txt"
    status, out, err = run(
        capsys, *DEMO, "--topology", "h100:4", "--mesh", "data=2,fsdp=2", "--clips", 800,
        "--json", figures, "--hlo", text, "--top", 3,
    )  # fmt: skip
    assert status == 0 and err == ""
    for expected in (
        "demo-pretrain on h100:4, 4 devices of 1 machine, mesh data=2,fsdp=2",
        "nothing was run",
        "it fits",
        "all-reduce",
        "days for 44 epochs of 800 videos",
        "the host reads",
        "ms of CPU for each, as measured here",
    ):
        assert expected in out, expected
    values = json.loads(figures.read_text())
    assert values["mesh"] == dict(data=2, fsdp=2, tensor=1) and values["epoch_videos"] == 800
    reading = values["reading"]
    assert reading["cpu_seconds_of_a_video"] > 0
    assert reading["cores_of_a_host"] == pytest.approx(
        reading["cpu_seconds_of_a_video"] * values["host_videos_per_second"]
    )
    assert text.read_text().startswith("HloModule")
    status, out, err = run(capsys, *DEMO, "--topology", "h100:4", "--json", figures)
    assert status == 2 and "--overwrite" in err


@pytest.mark.parametrize("name", ["--json plan.json", "--hlo plan.hlo"])
def test_a_full_disk_leaves_the_files_that_were_there(name, on_cpu, capsys, tmp_path):
    flag, file = name.split()
    (tmp_path / file).write_text("mine")
    args = ("--topology", "h100:1", "--no-decode", "--top", 0, "--overwrite")
    with file_size(60):
        status, _, err = run(capsys, *DEMO, *args, flag, tmp_path / file)
    told = "cannot be written: File too large; make room, or choose another place"
    assert (status, err) == (2, f"vivit-jax: error: {tmp_path / file} {told}\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_search_ranks_what_it_compiles(on_cpu, capsys, tmp_path):
    figures = tmp_path / "plan.json"
    status, out, err = run(
        capsys, *DEMO, "--topology", "h100:2", "--search", "--most", 2, "--no-decode", "--top", 0,
        "--json", figures,
    )  # fmt: skip
    assert status == 0 and err == ""
    lines = out.splitlines()
    assert lines[0].startswith("mesh ")
    meshes = {line.split()[0] for line in lines[1:3]}
    assert meshes < {"data=2", "fsdp=2", "tensor=2"} and len(meshes) == 2
    assert any("not compiled; --most compiles more" in line for line in lines)
    assert any(line.startswith("demo-pretrain on h100:2") for line in lines)
    found = json.loads(figures.read_text())["search"]
    assert len(found) == 2 and found[0]["step_seconds"] <= found[1]["step_seconds"]


def test_the_cores_of_a_host_read_every_repeat(monkeypatch):
    recipe = apply_settings(recipe_named("demo-pretrain"), ["data.repeats=4"])
    found = types.SimpleNamespace(host_videos_per_second=3.0)
    rate = types.SimpleNamespace(cpu_per_clip=0.5)
    monkeypatch.setattr(loader, "measure_loader", lambda *_, **__: rate)
    reading = plan_command._reading(recipe, found, decode=True)
    assert (reading["cpu_seconds_of_a_video"], reading["cores_of_a_host"]) == (2.0, 6.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topology", "v9:2x2"), "got 'v9', expected one such as v4:4x4x4"),
        (("--topology", "h100:4", "--mesh", "data=3"), "for 3 devices, there are 4"),
        (("--topology", "h100:3"), "do not divide"),
        (("--topology", "h100:4", "--set", "train.batchsize=3"), "did you mean batch_size"),
        (("--topology", "h100:4", "--search", "--mesh", "data=4"), "drop one"),
        (("--topology", "h100:4", "--most", "2"), "--most: only for --search"),
        (("--topology", "h100:4", "--clips", "0"), "--clips must be at least 1"),
        (("--topology", "h100:4", "--json", "plan.txt"), "--json"),
        (("--topology", "v5e:2x4", "--slices", "0"), "--slices 0"),
    ],
)
def test_bad_input_is_one_line(args, message, on_cpu, capsys):
    status, out, err = run(capsys, *DEMO, *args)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and message in err


def test_a_recipe_that_is_none(capsys):
    status, _, err = run(capsys, "--recipe", "demo-train", "--topology", "v5e:2x2")
    assert status == 2 and err.count("\n") == 1 and "demo-pretrain" in err


def test_a_compiler_that_is_missing(capsys, monkeypatch):
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "libtpu" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    status, _, err = run(capsys, *DEMO, "--topology", "v5e:2x2")
    assert status == 2 and err.count("\n") == 1
    assert "pip install 'vivit_jax[plan]'" in err


def test_an_interrupt_waits_for_no_compiler(on_cpu, capsys, monkeypatch, tmp_path):
    """Which keeps its thread for minutes and sees no KeyboardInterrupt."""
    ended = threading.Event()

    def stubborn(*_, before_compiling, **__):
        before_compiling()
        to_main = threading.main_thread().ident, signal.SIGINT
        threading.Timer(0.5, signal.pthread_kill, to_main).start()
        until = time.monotonic() + 20
        while time.monotonic() < until and not ended.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(0.1)

    monkeypatch.setattr(plan_module, "plan", stubborn)
    start = time.monotonic()
    with handled(signal.SIGINT, signal.default_int_handler):
        status, out, err = run(
            capsys, *DEMO, "--topology", "h100:4", "--json", tmp_path / "plan.json"
        )
    seconds = time.monotonic() - start
    ended.set()
    assert (status, out, err) == (130, "", "vivit-jax: interrupted\n")
    assert seconds < 10 and not list(tmp_path.iterdir())


@needs_libtpu
def test_in_a_process_of_its_own():
    """Whatever the environment says, it leaves accelerators alone, and its compiler is silent."""
    free = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-m", "vivit_jax.cli", "plan", *DEMO, "--topology", "v5e:2x2"],
        env=free | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for expected in ("v5e:2x2", "estimated by the compiler", "encoder attention", "host reads"):
        assert expected in done.stdout
