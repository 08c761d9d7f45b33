# SPDX-License-Identifier: Apache-2.0
"""Wrong input to the commands on the way from a folder of clips to a shared model.

Each is answered in one line that says what was got and what helps, and leaves nothing behind.
"""

import collections
import shlex
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from helpers import random_params
from tiny import SMALL_VIDEOMAE

import vivit_jax

CLASSES = ("hop", "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Clips, and models with and without a classifier, by the names that the cases use."""
    root = tmp_path_factory.mktemp("wrong inputs")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        for number in range(3):
            path = root / "clips" / name / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rng.integers(0, 256, (6, 18, 20, 3), np.uint8))
    (root / "one class/hop").mkdir(parents=True)
    np.save(root / "one class/hop/0.npy", np.zeros((6, 18, 20, 3), np.uint8))
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no clips here\n")
    (root / "broken.mp4").write_bytes(b"no video")
    (root / "bad list.csv").write_text("path,label\nclips/hop/0.npy,fly\n")
    (root / "taken.json").write_text("{}")
    (root / "full").mkdir()
    (root / "full/mine").write_text("mine")
    labels = dict(enumerate(CLASSES))
    for name, cls, more in (
        ("model", vivit_jax.VideoMAEForVideoClassification, dict(num_labels=2, id2label=labels)),
        ("pretrained", vivit_jax.VideoMAEForPreTraining, dict(use_mean_pooling=False)),
    ):
        config = vivit_jax.VideoMAEConfig.from_dict(SMALL_VIDEOMAE | more)
        model = cls(config)
        processor = vivit_jax.VideoProcessor.videomae(size=16, crop_size=(16, 16))
        vivit_jax.save_pretrained(root / name, model, random_params(model), processor)
    return root


# Arguments, the exit status, and words of the line.
CASES = [
    ("check-data nowhere", 2, "nowhere: no such file or directory; name a list file or"),
    ("check-data clips --frames 0", 2, "--frames must be at least 1, got 0"),
    ("check-data clips --validation 1.5", 2, "--validation must be between 0 and 1, got 1.5"),
    ("check-data clips --draw sheet.jpg", 2, "--draw sheet.jpg ends in '.jpg'; expected one of"),
    ("check-data clips --json taken.json", 2, "taken.json exists; choose another name, or pass"),
    ("check-data clips --write-split a.csv a.csv", 2, "names a.csv twice; name two files"),
    ("evaluate --data clips --model model --split test", 2, "has no splits: --split test chooses"),
    ("probe --data clips --model model --out p --split val", 2, "has no splits: --split val ch"),
    ("extract clips --model model --out f.npz", 2, "one file, for 6 videos; name a directory"),
    ("extract clips/hop/0.npy --model model --out f", 1, "0.npy: an array, which has no times"),
    ("extract '' --model model --out f", 2, "extract: a path is empty; expected a file or a dir"),
    ("predict '' --model model", 2, "predict: a path is empty; expected a file or a directory"),
    ("check-data ''", 2, "check-data: PATH: a path is empty; expected a file or a directory, ."),
    ("check-data gs://", 2, "check-data: PATH: gs:// names no bucket and no server; expected such"),
    ("extract clips --model model --out gs:", 2, "--out: gs: names no bucket and no server; expec"),
    ("predict s3:/ --model model", 2, "predict: s3:/ names no bucket and no server; expected such"),
    ("pack clips gs:/", 2, "pack: PATH: gs:/ names no bucket and no server; expected such as gs:"),
    ("pack clips s3:///x", 2, "pack: PATH: s3:///x names no bucket and no server; expected such"),
    ("probe --data clips --model model --out gs://", 2, "gs:// names no bucket and no server"),
    ("extract empty --model model --out f", 2, "empty: no clips (.3g2, .3gp, "),
    ("extract broken.mp4 --model model --out f", 1, "broken.mp4: no readable video"),
    ("extract nowhere.mp4 --model model --out f", 1, "nowhere.mp4: no such file; expected a"),
    ("demo --out full", 2, "--out full is not empty; choose another directory, or pass"),
    ("demo --clips-per-class 0", 2, "--clips-per-class must be at least 1, got 0"),
    ("evaluate --data clips --model pretrained", 2, "holds no classifier; fine-tune it first"),
    ("evaluate --data nowhere --model model", 2, "nowhere: No such file or directory; expected"),
    ("evaluate --data clips --model nowhere", 2, "nowhere does not exist, and is not a hub id"),
    ("evaluate --data 'bad list.csv' --model model", 2, "not among the model's classes: fly; name"),
    (
        "evaluate --data clips --model model --out taken.json",
        2,
        "taken.json exists; choose another",
    ),
    ("evaluate --data clips --model model --clips 0", 2, "--clips must be at least 1, got 0"),
    ("evaluate --data clips --model model --resize 8", 2, "takes 16 x 16 pixels of a frame; exp"),
    ("evaluate --data clips --model model --recipe demo-vivi", 2, "did you mean demo-vivit?"),
    ("predict clips/hop/0.npy --model nowhere", 2, "nowhere does not exist, and is not a hub id"),
    ("predict nowhere.mp4 --model model", 1, "nowhere.mp4: no such file; expected a video file"),
    ("predict broken.mp4 --model model", 1, "broken.mp4: no readable video (Invalid data found"),
    ("predict clips/hop/0.npy --model pretrained", 2, "which has no classifier; use a model fine-"),
    ("predict clips/hop/0.npy --model model --top-k 0", 2, "--top-k must be at least 1, got 0"),
    ("predict clips/hop/0.npy --model model --start middle", 2, "a frame index, got 'middle'"),
    ("evaluate --data clips --model model --report report.pdf", 2, "expected one of .html"),
    ("evaluate --data clips --model model --confusion c.txt", 2, "expected one of .csv"),
    ("predict empty --model model", 2, "empty: no clips (.3g2, .3gp, "),
    ("predict clips/hop/0.npy --model model --draw a.jpg", 2, "expected one of .mp4, .png"),
    ("predict clips --model model --draw a.png", 2, "--draw draws one video, got 6; name one"),
    ("probe --data clips --out p", 2, "probe needs --model STR; see vivit-jax probe --help"),
    ("probe --data nowhere --model model --out p", 2, "nowhere: No such file or directory"),
    ("probe --data clips --model nowhere --out p", 2, "nowhere does not exist, and is not a hub"),
    ("probe --data 'one class' --model model --out p", 2, "one class, and there is nothing to"),
    ("probe --data clips --model model --out full", 2, "--out full is not empty"),
    ("probe --data clips --model model --out p --validation 2", 2, "at least 0 and less than 1"),
    ("finetune --data clips --out run", 2, "--start (the weights to fine-tune, such as"),
    ("finetune --data nowhere --start pretrained --out run", 2, "nowhere: No such file or"),
    ("finetune --data clips --start nowhere --out run", 2, "nowhere does not exist, and is not a"),
    ("finetune --data clips --start pretrained --out full", 2, "--out full is not empty; choose a"),
    ("finetune --data clips --start pretrained --out notes.txt", 2, "is a file; expected a dir"),
    ("finetune --data 'one class' --start pretrained --out run", 2, "no clip can be held out"),
    ("finetune --data clips --start pretrained --out run --validation 1.5", 2, "at least 0 and"),
    ("finetune --data clips --start pretrained --out r --set train.epoch=3", 2, "mean epochs?"),
    ("finetune --data clips --start pretrained --out r --mesh data=3", 2, "there are 8; their"),
    ("push nowhere org/name --dry-run", 2, "nowhere is not a directory; expected a run, or a"),
    ("push model '' --dry-run", 2, "an empty text is not a repository's name; expected org/name"),
    ("evaluate --data '' --model model", 2, "the path of a data set is empty; expected a list"),
    ("push model name --dry-run", 2, "not a repository's name; expected org/name"),
    ("push full org/name --dry-run", 2, "full holds no model: expected config.json and weights"),
]


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}


@pytest.mark.parametrize(("line", "status", "words"), CASES, ids=[line for line, *_ in CASES])
def test_one_clear_line_and_nothing_left_behind(line, status, words, made, capsys, monkeypatch):
    monkeypatch.chdir(made)
    before = everything(made)
    found, out, err = run_command(capsys, *shlex.split(line))
    assert (found, out) == (status, "")
    assert words in err and err.count("\n") == 1 and len(err) < 500
    assert err.startswith("vivit-jax: error: ") == (status == 2)
    assert everything(made) == before


def test_there_are_many_wrong_inputs_to_each_command():
    counts = collections.Counter(line.split()[0] for line, *_ in CASES)
    assert len(CASES) >= 30 and min(counts.values()) >= 2


def test_check_data_calls_it_a_finding_that_training_would_stop(made, capsys, monkeypatch):
    monkeypatch.chdir(made)
    for place, *more, words in (
        ("empty", "no clips"),
        ("notes.txt", "there is no label"),
        ("clips", "--split", "test", "has no splits"),
    ):
        status, out, err = run_command(capsys, "check-data", place, *more)
        assert (status, err) == (1, "") and out.startswith(f"STOP     {place}") and words in out
        assert out.endswith("training would stop\n")
