# SPDX-License-Identifier: Apache-2.0
"""docs/forty_clips.md, line by line in an empty directory, in processes as a reader starts them."""

import csv
import json
import math
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "forty_clips.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
HELD_OUT = 80  # clips
PROGRAMS = {
    ".venv/bin/python": [sys.executable],
    ".venv/bin/vivit-jax": [sys.executable, "-m", "vivit_jax.cli"],
}


def steps() -> list[tuple[str, list[str]]]:
    """What the page runs: a line as it is written, and its arguments for subprocess."""
    found = []
    for language, text in BLOCKS:
        if language == "py":
            found.append(("transformers", [sys.executable, "-c", text]))
            continue
        for line in text.splitlines():
            program, *args = shlex.split(line)
            args = [str(DOCS / "forty_clips.py") if a.startswith("docs/") else a for a in args]
            found.append((line, [*PROGRAMS[program], *args]))
    return found


def test_the_page_has_every_step():
    names = [args[3] if "-m" in args else line for line, args in steps()]
    wanted = [
        "pretrain",
        "check-data",
        "probe",
        "finetune",
        "evaluate",
        "evaluate",
        "predict",
        "predict",
        "push",
    ]
    assert names[1:-1] == wanted and names[-1] == "transformers"


def run(args, directory, line):
    """What a process prints; its seconds, and those of the processors, are shown."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(args, cwd=directory, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{time.perf_counter() - start:6.1f} s, {busy:5.1f} of a core  {line}", flush=True)
    assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def accuracies(directory):
    """Of the probe and of the run, on the 80 clips of held-out/."""
    found = {}
    for name in ("probe", "run"):
        result = json.loads((directory / f"{name}.json").read_text())
        assert result["metrics"]["videos"] == HELD_OUT
        found[name] = result["metrics"]["accuracy"]
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The directory of the page's commands, and what each printed."""
    root, said = tmp_path_factory.mktemp("story"), {}
    for line, args in steps():
        said[" ".join(args[3:5] if "-m" in args else [line])] = run(args, root, line)
    return root, said


@pytest.mark.slow
def test_forty_clips(story):
    root, said = story
    checked = said["check-data clips"]
    assert "40 clips, 4 classes" in checked and "1 of 40 clips cannot be read" in checked
    assert "clip 07.mp4: no readable video" in checked and "clip 06.mp4: 3 frames" in checked
    assert "may tell left from right" in checked and re.search(r"height +60 .* 96$", checked, re.M)
    with (root / "answers.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 5
    for picture in ("sheet.png", "clip.png", "report.html", "run/report.html"):
        assert (root / picture).stat().st_size > 1000
    assert "nothing was sent" in said["push run"]


@pytest.mark.slow
def test_probe_and_fine_tuning_beat_chance(story, tmp_path):
    """On the page's clips and two more sets, from the page's pre-training."""
    root, _ = story
    found = [accuracies(root)]
    wanted = ("probe", "finetune", "evaluate")
    for seed in (41, 42):
        directory = tmp_path / str(seed)
        make = [sys.executable, str(DOCS / "forty_clips.py"), str(directory), str(seed)]
        run(make, tmp_path, f"clips, seed {seed}")
        (directory / "pretraining").symlink_to(root / "pretraining")
        for line, args in steps():
            if "-m" in args and args[3] in wanted:
                run(args, directory, line)
        found.append(accuracies(directory))
    chance, error = 1 / 4, math.sqrt(1 / 4 * 3 / 4 / HELD_OUT)
    for name in ("probe", "run"):
        each = np.array([accuracies[name] for accuracies in found])
        spread = each.std(ddof=1) / math.sqrt(len(each))
        shown = ", ".join(f"{value:.1%}" for value in each)
        print(f"{name:6} {shown}; mean {each.mean():.1%}, standard error {spread:.1%}")
        # By the spread of the three, and by what chance alone gives on the clips of each.
        assert each.mean() > chance + 3 * spread, (name, each)
        assert each.min() > chance + 3 * error, (name, each)
    gain = np.array([accuracies["run"] - accuracies["probe"] for accuracies in found])
    print(f"fine-tuning over the probe: {gain.mean():.1%} +- {gain.std(ddof=1) / 3**0.5:.1%}")
    assert gain.mean() > 0, found
