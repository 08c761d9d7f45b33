# SPDX-License-Identifier: Apache-2.0
"""Both programs before a command runs: help, versions, completion, and what is misspelt."""

import contextlib
import os
import pty
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

import checkpoints_convert.__main__
import vivit_jax.cli.__main__
from vivit_jax import __version__
from vivit_jax.console.devices import no_device

PROGRAMS = {"vivit-jax": vivit_jax.cli.__main__, "vivit-convert": checkpoints_convert.__main__}
MODULES = {"vivit-jax": "vivit_jax.cli", "vivit-convert": "checkpoints_convert"}
COMMANDS = [(name, each) for name, program in PROGRAMS.items() for each in program.COMMANDS]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_a_screen_and_has_a_line_for_each_command(name, capsys):
    assert PROGRAMS[name].main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 100
    for command in PROGRAMS[name].COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [command]]
        assert re.fullmatch(r"  [\w-]+  +[A-Z].*[.]", line), line
    assert "--version" in lines[-4]


def test_every_command_has_its_place_in_the_help():
    grouped = [name for names in PROGRAMS["vivit-jax"].GROUPS.values() for name in names]
    assert len(set(grouped)) == len(grouped)
    assert set(PROGRAMS["vivit-jax"].COMMANDS) <= set(grouped)


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_help_of_a_command_is_readable(name, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert PROGRAMS[name].main([command, "--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith(f"usage: {name} {command}")
    # Only lists of choices are wider.
    assert all(len(line) <= 80 or re.match(r"  --[\w-]+ \[?{", line) for line in lines)
    assert not re.search(r"None|default: False|[│╭]|\x1b", text)
    assert "--overwrite, --no-overwrite" not in text and "[[" not in text
    required = [line for line in lines if line.endswith("(required)")]
    options = [line for line in lines if re.match(r"  (--|[A-Z])", line)]
    assert not required or "(required)" in text.split(options[1])[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_versions(name, capsys):
    assert PROGRAMS[name].main(["--version"]) == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"
    assert PROGRAMS[name].main(["--versions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{name} {__version__}" and lines[1].startswith("Python 3.")
    assert any(re.fullmatch(r"jax \d+\.\d+\S*", line) for line in lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("evalute", "there is no command evalute; did you mean evaluate?"),
        ("zzz", "there is no command zzz; known: attention, "),
        ("--verison", "there is no option --verison; did you mean --version or --versions?"),
        ("", "name a command; vivit-jax --help lists them"),
        ("predict --modle x", "predict has no option --modle; did you mean --model?"),
        ("evaluate --clip=3", "evaluate has no option --clip; did you mean --clips?"),
        ("finetune --epochs 3", "no option --epochs; did you mean --set train.epochs=3?"),
        ("finetune --batch-size=8", "--batch-size; did you mean --set train.batch_size=8?"),
        ("finetune --learning-rate 1e-4", "--learning-rate; did you mean --set optim.lr=1e-4?"),
        ("finetune --lr --data x", "--lr; did you mean --set optim.lr=VALUE?"),
        ("finetune --num_frames 8", "did you mean --set model.config.num_frames=8?"),
        ("pretrain --max-epochs 9", "did you mean --set train.epochs=9?"),
        ("pretrain --warmup 2", "did you mean --set optim.warmup_epochs=2?"),
        ("finetune --stride 2", "mean --set data.stride=2 or --set evaluation.stride=2?"),
        ("finetune --dat x", "finetune has no option --dat; did you mean --data"),
        ("finetune --zzzz", "has no option --zzzz; see vivit-jax finetune --help"),
        ("evaluate --average mean", "--average is 'mean'; known: logits, softmax"),
        ("predict --zzz", "predict has no option --zzz; see vivit-jax predict --help"),
        ("evaluate", "evaluate needs --model STR and --data STR; see vivit-jax evaluate --help"),
        ("evaluate --model x --data", "evaluate: --data needs a value; see"),
        ("evaluate --model x --data y --clips x", "--clips must be a whole number, got 'x'"),
        ("check-data a --validation x", "--validation must be a number, got 'x'"),
        ("check-data a --write-split b", "check-data: --write-split "),
        ("check-data a b", "check-data takes no argument b; see"),
        ("demo --model vidomae", "demo: --model is 'vidomae'; did you mean videomae? known: vide"),
        ("benchmark --work forwrd", "--work is 'forwrd'; did you mean forward? known: forward, "),
        ("benchmark --models videomae-bas", "no preset 'videomae-bas'; did you mean videomae-base"),
        ("recipes demo-fintune", "there is no recipe 'demo-fintune'; did you mean demo-finetune"),
        ("finetune --out x --resume a", "finetune: --resume: expected a step, such as 1200"),
        ("--tyro-print-completion", "takes one of bash, zsh, tcsh, fish, got ''"),
        ("--tyro-print-completion zhs", "takes one of bash, zsh, tcsh, fish, got 'zhs'"),
    ],
)
def test_a_near_miss_is_answered_with_what_was_meant(args, message, capsys):
    assert PROGRAMS["vivit-jax"].main(args.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert err.startswith("vivit-jax: error: ")


def test_a_file_whose_name_begins_with_a_hyphen(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-clip.mp4").touch()
    assert PROGRAMS["vivit-jax"].main(["predict", "-clip.mp4", "--model", "x"]) == 2
    wanted = f"takes no argument -clip.mp4; write the file as {os.path.join('.', '-clip.mp4')}"
    assert wanted in capsys.readouterr().err


def test_underscores_are_hyphens(capsys):
    assert PROGRAMS["vivit-jax"].main(["predict", "a.mp4", "--model", "x", "--top_k", "0"]) == 2
    assert "--top-k must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_completions_hold_the_options_of_every_command(name, shell, capsys):
    assert PROGRAMS[name].main(["--tyro-print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in PROGRAMS[name].COMMANDS)
    option = {"vivit-jax": "--views-at-once", "vivit-convert": "--max-shard-size"}[name]
    assert option in script and "\x1b" not in script
    if shell == "bash":
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


# --- colours --------------------------------------------------------------------------------------


def shown(name: str, *args: str, terminal: bool, **environment: str) -> str:
    """What a program prints on stdout, to a terminal or to a pipe."""
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env = plain | {"TERM": "xterm"} | environment
    run = [sys.executable, "-m", MODULES[name], *args]
    if not terminal:
        return subprocess.run(run, env=env, capture_output=True, text=True).stdout
    ours, theirs = pty.openpty()
    with subprocess.Popen(run, env=env, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # the end of a pseudo-terminal
            while part := os.read(ours, 4096):
                text += part
        os.close(ours)
        assert process.wait() == 0
    return text.decode().replace("\r\n", "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
    ],
    ids=str,
)
def test_colours_are_for_terminals_unless_the_environment_says_otherwise(
    name, terminal, environment, coloured
):
    text = shown(name, "--help", terminal=terminal, **environment)
    assert ("\x1b[" in text) == coloured
    assert "usage" in text


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said", "line"),
    [
        (
            "cuda",
            "Unable to initialize backend 'cuda': no GPU",
            r"JAX_PLATFORMS=cuda: jax finds no cuda device; unset it, or set JAX_PLATFORMS=cpu; if "
            r"this machine has one: .*pip install .*\[cuda\]'",
        ),
        (
            "tpu,cpu",
            "in another process:\nRuntimeError: Unable to initialize backend 'tpu': INTERNAL: x",
            r"JAX_PLATFORMS=tpu,cpu: jax finds no tpu device; .*\[tpu\]'",
        ),
        (
            "gpu",
            "Unable to initialize backend 'rocm': Backend 'rocm' is not in the list",
            r"JAX_PLATFORMS=gpu: jax finds no gpu device; .*\[cuda\]'",
        ),
        (
            "cdua",
            "Unable to initialize backend 'cdua': Backend 'cdua' is not in the list",
            "JAX_PLATFORMS=cdua: jax has no platform cdua; did you mean cuda.*known: cpu, cuda, .*",
        ),
    ],
)
def test_a_platform_without_a_device_is_one_line(asked, said, line, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    message = no_device(RuntimeError(said))
    assert message is not None and re.fullmatch(line, message), message
    assert no_device(RuntimeError("RESOURCE_EXHAUSTED: Out of memory")) is None


def test_an_assertion_of_jax_is_told_from_others(monkeypatch):
    """Without any GPU, JAX_PLATFORMS=cuda leaves jax with no backend, which it only asserts."""

    def no_default():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert no_device(AssertionError("ours")) is None
    monkeypatch.setattr(jax, "devices", no_default)
    message = no_device(AssertionError())
    assert message is not None and message.startswith("JAX_PLATFORMS=cuda: jax finds no cuda")
    assert no_device(MemoryError()) is None


DEVICES = [
    "demo --out {tmp}/out",
    "finetune --recipe demo-finetune --data {tmp}/clips --out {tmp}/out",
    "pretrain --recipe demo-pretrain --data {tmp}/clips --out {tmp}/out",
    "evaluate --model {model} --data {tmp}/clips",
    "predict {tmp}/clips/a/0.mp4 --model {model}",
    "extract {tmp}/clips --model {model} --out {tmp}/out",
    "attention {tmp}/clips/a/0.mp4 --model {model} --out {tmp}/a.png",
    "reconstruct {tmp}/clips/a/0.mp4 --model {pretrained} --out {tmp}/a.png",
    "export {model} --out {tmp}/a.stablehlo",
    "probe --data {tmp}/clips --model {model} --out {tmp}/out",
    "push {model} org/name --dry-run",
    "benchmark --models videomae-small --no-peak-memory",
    "convert verify {model}",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "lines"), [("cuda", DEVICES), ("tpu", DEVICES[3:5]), ("cdua", DEVICES[3:5])]
)
def test_commands_without_their_device_say_so_and_leave_nothing(
    platform, lines, finished, tmp_path
):
    """In processes of their own, which choose a device anew; two at a time."""
    demo, *_ = finished
    for kind in ("a", "b"):
        (tmp_path / "clips" / kind).mkdir(parents=True)
        shutil.copy(demo / "data/test/grow/0000.mp4", tmp_path / "clips" / kind / "0.mp4")
    places = {"tmp": tmp_path, "model": demo / "model", "pretrained": demo / "pretrained"}
    before = sorted(tmp_path.rglob("*"))

    def failed(line: str) -> str | None:
        args = [part.format(**places) for part in line.split()]
        module = "checkpoints_convert" if args[0] == "convert" else "vivit_jax.cli"
        done = subprocess.run(
            [sys.executable, "-m", module, *args[args[0] == "convert" :]],
            env=os.environ | {"JAX_PLATFORMS": platform},
            capture_output=True,
            text=True,
        )
        one_line = done.stderr.count("\n") == 1 and f"JAX_PLATFORMS={platform}" in done.stderr
        return None if done.returncode == 2 and one_line else f"{line}: {done.stderr}"

    with ThreadPoolExecutor(2) as pool:
        assert not list(filter(None, pool.map(failed, lines)))
    assert sorted(tmp_path.rglob("*")) == before
