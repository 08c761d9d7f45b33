# SPDX-License-Identifier: Apache-2.0
"""docs/forty_clips.md, line by line in an empty directory, in processes as a reader starts them."""

import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "forty_clips.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
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


@pytest.mark.slow
def test_forty_clips(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    said: dict[str, str] = {}
    for line, args in steps():
        start = time.perf_counter()
        done = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True)
        print(f"{time.perf_counter() - start:6.1f} s  {line}", flush=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        said[" ".join(args[3:5] if "-m" in args else [line])] = done.stdout

    checked = said["check-data clips"]
    assert "40 clips, 4 classes" in checked and "1 of 40 clips cannot be read" in checked
    assert "clip 07.mp4: no readable video" in checked and "clip 06.mp4: 3 frames" in checked
    assert "may tell left from right" in checked and re.search(r"height +60 .* 96$", checked, re.M)
    clips = 80
    chance, error = 1 / 4, math.sqrt(1 / 4 * 3 / 4 / clips)
    accuracies = {}
    for name in ("probe", "run"):
        metrics = json.loads((tmp_path / f"{name}.json").read_text())["metrics"]
        accuracies[name] = metrics["accuracy"]
        assert metrics["accuracy"] > chance + 3 * error, (name, metrics)
    print(f"accuracy on {clips} held-out clips: {accuracies}, chance {chance}, SE {error:.3f}")
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file))) == 1 + 5
    for picture in ("sheet.png", "clip.png", "report.html", "run/report.html"):
        assert (tmp_path / picture).stat().st_size > 1000
    assert "nothing was sent" in said["push run"]
