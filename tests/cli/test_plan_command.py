# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax plan`: what it prints and writes, and what it refuses."""

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
from commands import run_command
from compilers import needs_libtpu
from full_disk import file_size
from signals import handled

from vivit_jax.cli import plan as plan_command
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.train.planning import plan as plan_module

SMALL = (
    *("--set", "model.config.num_hidden_layers=1", "model.config.hidden_size=32"),
    *("model.config.decoder_hidden_size=32", "train.batch_size=8"),
)
DEMO = ("--recipe", "demo-pretrain", *SMALL)


class Here:
    """Stands in for Apart, in this process."""

    def __init__(self, function, modules):
        self._function = function

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def begin(self, *args):
        self._args = args

    def done(self, seconds):
        return True

    def result(self):
        return self._function(*self._args)


@pytest.fixture
def on_cpu(monkeypatch):
    """Topologies of this machine's CPU devices, which need no other compiler."""
    monkeypatch.setattr(plan_command, "Apart", Here)
    monkeypatch.setattr(plan_module, "compile_only_devices", lambda t: jax.devices()[: t.count])
    monkeypatch.setattr(plan_module, "_versions", lambda topology: {"jax": "0"})


def test_a_plan_is_printed_and_written(on_cpu, capsys, tmp_path):
    figures, text = tmp_path / "plan.json", tmp_path / "program.txt"
    status, out, err = run_command(
        capsys, "plan", *DEMO, "--topology", "h100:4", "--mesh", "data=2,fsdp=2", "--clips", 800,
        "--json", figures, "--hlo", text, "--top", 3,
    )  # fmt: skip
    assert status == 0 and err == ""
    for expected in (
        "demo-pretrain on h100:4, 4 devices of 1 machine, mesh data=2,fsdp=2",
        "nothing was run",
        "it fits",
        "all-reduce",
        "days for 80 epochs of 800 videos",
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
    status, out, err = run_command(capsys, "plan", *DEMO, "--topology", "h100:4", "--json", figures)
    assert status == 2 and "--overwrite" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["--json plan.json", "--hlo plan.hlo"])
def test_a_full_disk_leaves_the_files_that_were_there(name, on_cpu, capsys, tmp_path):
    flag, file = name.split()
    (tmp_path / file).write_text("mine")
    args = ("--topology", "h100:1", "--no-decode", "--top", 0, "--overwrite")
    with file_size(60):
        status, _, err = run_command(capsys, "plan", *DEMO, *args, flag, tmp_path / file)
    told = "cannot be written: File too large; make room, or choose another place"
    assert (status, err) == (2, f"vivit-jax: error: {tmp_path / file} {told}\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_search_ranks_what_it_compiles(on_cpu, capsys, tmp_path):
    figures = tmp_path / "plan.json"
    status, out, err = run_command(
        capsys, "plan", *DEMO, "--topology", "h100:2", "--search", "--most", 2, "--no-decode",
        "--top", 0, "--json", figures,
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
    monkeypatch.setattr(plan_command, "measure_loader", lambda *_, **__: rate)
    reading = plan_command._reading(recipe, found, decode=True)
    assert (reading["cpu_seconds_of_a_video"], reading["cores_of_a_host"]) == (2.0, 6.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topology", "v9:2x2"), "got 'v9', expected one such as v4:4x4x4"),
        (("--topology", "h100:4", "--mesh", "data=3"), "for 3 devices, there are 4"),
        (("--topology", "h100:3"), "cannot divide"),
        (("--topology", "h100:4", "--set", "train.batchsize=3"), "did you mean batch_size"),
        (("--topology", "h100:4", "--search", "--mesh", "data=4"), "drop one"),
        (("--topology", "h100:4", "--most", "2"), "--most: only for --search"),
        (("--topology", "h100:4", "--clips", "0"), "--clips must be at least 1"),
        (("--topology", "h100:4", "--json", "plan.txt"), "--json"),
        (("--topology", "v5e:2x4", "--slices", "0"), "--slices 0"),
    ],
)
def test_bad_input_is_one_line(args, message, on_cpu, capsys):
    status, out, err = run_command(capsys, "plan", *DEMO, *args)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and message in err


def test_a_recipe_that_is_none(capsys):
    status, _, err = run_command(capsys, "plan", "--recipe", "demo-train", "--topology", "v5e:2x2")
    assert status == 2 and err.count("\n") == 1 and "demo-pretrain" in err


def test_a_compiler_that_is_missing(capsys, monkeypatch):
    found = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "libtpu" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    monkeypatch.setattr(plan_command, "Apart", Here)
    status, _, err = run_command(capsys, "plan", *DEMO, "--topology", "v5e:2x2")
    assert status == 2 and err.count("\n") == 1
    assert "[plan]'" in err


def stubborn(recipe, topology, sizes, videos):
    """A compiler that reports that it works, and then does not react for long."""
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(300)


def test_an_interrupt_waits_for_no_compiler(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_command, "_planned", stubborn)
    with handled(signal.SIGINT, signal.default_int_handler):
        status, out, err = run_command(
            capsys, "plan", *DEMO, "--topology", "h100:4", "--json", tmp_path / "plan.json"
        )
    assert (status, out, err) == (130, "", "vivit-jax: interrupted\n")
    assert not list(tmp_path.iterdir()) and not multiprocessing.active_children()


def overflowing(recipe, topology, sizes, videos):
    """Ends as libtpu does on some programs: of two meshes of the demo, on the one with gathers."""
    if sizes["fsdp"] > 1 or videos == 1000:
        os.write(2, b"*** SIGSEGV STACK OVERFLOW ***\n")
        os.kill(os.getpid(), signal.SIGKILL if sizes["tensor"] > 1 else signal.SIGSEGV)
    devices = jax.local_devices(backend="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "compile_only_devices", lambda t: devices[: t.count])
        patch.setattr(plan_module, "_versions", lambda topology: {"jax": "0"})
        return plan_command._planned(recipe, topology, sizes, videos)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        pytest.param(
            *("data=2", "the compiler ended its process (SIGSEGV: an error of its own"),
            marks=pytest.mark.slow,
        ),
        ("tensor=2", "the compiler's process was killed, as Linux does when memory runs out"),
    ],
)
def test_a_compiler_that_ends_its_process(mesh, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_command, "_planned", overflowing)
    status, out, err = run_command(
        capsys, "plan", *DEMO, "--topology", "h100:2", "--mesh", mesh, "--clips", 1000,
        "--json", tmp_path / "plan.json", "--hlo", tmp_path / "plan.hlo",
    )  # fmt: skip
    assert (status, out) == (1, "") and err.startswith(f"vivit-jax: error: {message}")
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_search_goes_on_after_a_compiler_ends(capsys, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")  # for the other process
    monkeypatch.setattr(plan_command, "_planned", overflowing)
    monkeypatch.setattr(plan_module, "compile_only_devices", lambda t: jax.devices()[: t.count])
    status, out, err = run_command(
        capsys, "plan", *DEMO, "--topology", "h100:2", "--search", "--no-decode", "--top", 0
    )
    assert (status, err) == (0, "")
    lines = out.splitlines()
    ranked = [line.split()[0] for line in lines if line.startswith(("data=2 ", "tensor=2 "))]
    assert sorted(ranked) == ["data=2", "tensor=2"]
    assert any(line.startswith("fsdp=2: the compiler ended its process (SIGSEGV") for line in lines)


@needs_libtpu
@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    """Whatever the environment says, it leaves accelerators alone, and its compiler is silent and
    leaves no logs."""
    free = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-m", "vivit_jax.cli", "plan", *DEMO, "--topology", "v5e:2x2"],
        env=free | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and not list(tmp_path.iterdir())
    for expected in ("v5e:2x2", "estimated by the compiler", "encoder attention", "host reads"):
        assert expected in done.stdout
