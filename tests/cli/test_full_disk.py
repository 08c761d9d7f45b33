# SPDX-License-Identifier: Apache-2.0
"""Every command that writes, on a disk that takes no more: one line, and nothing half written."""

import json
import re

import pytest
from full_disk import file_size
from helpers import mostly_slow

from checkpoints_convert.__main__ import main as convert_main
from vivit_jax.cli.__main__ import main

LARGEST = 60  # bytes; less than any file of ours
# Each command of the demo's directory, and the files it writes, the one that is named first.
COMMANDS = {
    "convert": ("convert {demo}/model {out}/m --overwrite", ["m/config.json"]),
    "export": (
        "export {demo}/model --out {out}/m.stablehlo --params beside --overwrite",
        ["m.stablehlo", "m.stablehlo.json", "m.stablehlo.safetensors"],
    ),
    "extract": (
        "extract {clip} --model {demo}/model --out {out}/a.npz --overwrite --pad repeat_last",
        ["a.npz"],
    ),
    "extract to a directory": (
        "extract {clip} --model {demo}/model --out {out} --overwrite --pad repeat_last",
        ["0000.safetensors"],
    ),
    "attention": (
        "attention {clip} --model {demo}/model --out {out}/a.png --overwrite --stride 1",
        ["a.png"],
    ),
    **{
        f"reconstruct to {kind}": (
            f"reconstruct {{clip}} --model {{demo}}/pretrained --out {{out}}/r.{kind} --overwrite "
            "--stride 1",
            [f"r.{kind}"],
        )
        for kind in ("png", "gif", "mp4")
    },
    "evaluate": (
        "evaluate --model {demo}/model --data {demo}/data/test --out {out}/e.json --overwrite",
        ["e.json"],
    ),
}


@pytest.mark.parametrize("name", mostly_slow(COMMANDS, "convert", "reconstruct to mp4"))
def test_one_line_and_the_files_that_were_there(finished, tmp_path, capsys, name):
    demo, *_ = finished
    text, files = COMMANDS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    clip = demo / "data" / "test" / "grow" / "0000.mp4"
    args = [part.format(demo=demo, out=tmp_path, clip=clip) for part in text.split()]
    capsys.readouterr()
    with file_size(LARGEST):
        status = (convert_main if name.startswith("convert") else main)(args)
    errors = capsys.readouterr().err
    named = (tmp_path / files[0]).parent if name == "convert" else tmp_path / files[0]
    told = "cannot be written: File too large; make room, or choose another place"
    assert status == 2 and errors.splitlines()[-1].endswith(f"error: {named} {told}"), errors
    assert "Traceback" not in errors and len(errors.splitlines()) == 1, errors
    assert sorted(tmp_path.rglob("*")) == before
    assert all((tmp_path / file).read_text() == "mine" for file in files)


@pytest.mark.slow
def test_a_demo_and_a_run(finished, tmp_path, capsys):
    demo, *_ = finished
    (tmp_path / "demo").mkdir()
    capsys.readouterr()
    with file_size(1000):  # its marker is smaller, a clip is not
        assert main(["demo", "--out", str(tmp_path / "demo"), "--clips-per-class", "1"]) == 2
    told = r"vivit-jax: error: .*/data/train/\S+/0000.mp4 cannot be written: File too large; make.*"
    assert re.fullmatch(told, capsys.readouterr().err.strip())
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob(".vivit*"))
    run = [
        "finetune",
        "--recipe",
        json.loads((demo / "finetuning/recipe.json").read_text())["name"],
    ]
    run += ["--data", str(demo / "data" / "labelled"), "--out", str(tmp_path / "run")]
    with file_size(LARGEST):
        assert main(run) == 2
    told = f"{tmp_path}/run/recipe.json cannot be written: File too large"
    assert told in capsys.readouterr().err and not (tmp_path / "run").exists()
