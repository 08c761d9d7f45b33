# SPDX-License-Identifier: Apache-2.0
"""What Python has on POSIX systems only is not needed to import the packages or to train."""

import subprocess
import sys

PROGRAM = """
import importlib, logging, os, pkgutil, signal, sys, tempfile
from pathlib import Path

import av, einops, flax.linen, grain.python, jax, optax, orbax.checkpoint, PIL.Image, rich, tyro

jax.devices()  # what follows is about our own code: the libraries have started
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for module, names in {
    os: "chown fchmod fchown fork getuid kill killpg mkfifo sched_getaffinity sched_setaffinity "
    "statvfs sync O_DIRECTORY O_NOFOLLOW O_NONBLOCK",
    signal: "SIGHUP SIGKILL SIGUSR1 SIGXFSZ pthread_kill pthread_sigmask setitimer sigwait",
}.items():
    for name in names.split():
        delattr(module, name)

import checkpoints_convert, vivit_jax

for package in (vivit_jax, checkpoints_convert):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)

from vivit_jax.benchmark.measure import environment
from vivit_jax.cli.__main__ import main
from vivit_jax.processes import interrupts_held
from vivit_jax.recipes import RECIPES
from vivit_jax.train.storage.run_directory import RunDirectory

assert environment().cores >= 1
with interrupts_held():
    pass
logging.basicConfig(format="%(message)s")
out, recipe = Path(tempfile.mkdtemp()), RECIPES["demo-pretrain"]()
for resume in (False, True):
    run = RunDirectory(out / "run", recipe, resume=resume)
    run.begin(None)
    run.close()

sys.exit(main(["presets"]))
"""


def test_imports_and_runs_without_what_only_posix_systems_have():
    begin = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(begin, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "vivit-b-16x2-kinetics400" in done.stdout
    warnings = [line for line in done.stderr.splitlines() if "cannot lock a directory" in line]
    assert len(warnings) == 2 and "let no other process write into it" in warnings[0]
