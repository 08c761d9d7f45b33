# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax check-data`: what it prints, writes and draws, and what it refuses."""

import json
import logging
import os
import shutil

import numpy as np
import pytest
from clips import number_in, write_clip
from commands import run_command
from PIL import Image

from vivit_jax.cli import check_sheet, check_text
from vivit_jax.cli.check_sheet import contact_sheet
from vivit_jax.cli.check_text import CheckOptions
from vivit_jax.data.datasets.check import check_dataset
from vivit_jax.data.datasets.dataset import read_dataset

ODD = "odd [bold]\x1b[31m\n"  # a terminal would obey, a table break and rich format it


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two classes of 12 clips, each of its own length; tests copy it."""
    root = tmp_path_factory.mktemp("made")
    for label, name in enumerate(("clap", "wave")):
        (root / name).mkdir()
        for number in range(12):
            size = (64, 48) if number else (48, 64)
            path = root / name / f"a {number}.mp4"
            write_clip(path, frames=61 + 2 * number + label, size=size)
    return root


@pytest.fixture
def data(made, tmp_path):
    return shutil.copytree(made, tmp_path / "my data")


def check(capsys, *args):
    return run_command(capsys, "check-data", *args)


def test_a_good_data_set(data, capsys):
    status, out, err = check(capsys, data)
    assert status == 0 and err == ""
    assert out.startswith(f"{data}: 24 clips, 2 classes, 1,740 frames, 1.2 min, ")
    lines = out.splitlines()
    assert "frames       61    72.5     84" in lines
    assert "sizes: 64x48 (22), 48x64 (2)" in lines and "codecs: h264 (24)" in lines
    assert "0 clap     12           0      0     10           2" in lines
    assert lines[-1] == "training would run"


def test_the_most_serious_comes_first(data, capsys):
    (data / "wave" / "broken.mp4").write_text("not a video")
    (data / "wave" / "lfs.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")
    write_clip(data / "clap" / "short.mp4", frames=9)
    (data / "clap" / "notes.docx").write_text("x")
    status, out, err = check(capsys, data)
    assert status == 1 and err == ""
    blocks = out.split("\n\n")
    assert blocks[1].startswith(
        "STOP     2 of 27 clips cannot be read; training stops at more than"
    )
    assert "broken.mp4: " in blocks[1] and "git lfs pull" in blocks[1]
    assert "-> repair or remove them, or raise data.max_bad_share" in blocks[1]
    assert blocks[2].startswith("warning  1 of 25 clips too short")
    assert "1 file is not a clip, such as notes.docx" in blocks[3]
    assert blocks[-1] == "training would stop, 2 warnings\n"


def test_only_some_of_many_are_shown_and_json_has_all(data, capsys, tmp_path):
    for number in range(6):
        (data / "wave" / f"bad {number}.mp4").write_bytes(b"")
    path = tmp_path / "found.json"
    status, out, _ = check(capsys, data, "--json", path)
    assert status == 1 and out.count("an empty file") == 3 and "and 3 more; --json" in out
    found = json.loads(path.read_text())
    assert len(found["unreadable"]) == 6 and found["trains"] is False and found["clips"] == 30
    status, out, err = check(capsys, data, "--json", "-")
    assert json.loads(out) == found and err == ""
    assert found["ranges"]["frames"] == {"least": 61, "median": 72.5, "most": 84}
    assert found["findings"][0]["level"] == "stop" and len(found["findings"][0]["items"]) == 6


def test_damage_needs_decode(data, capsys):
    path = data / "clap" / "a 11.mp4"
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + len(content) // 4
    content[begin : begin + len(content) // 2] = bytes(len(content) // 2)
    path.write_bytes(content)
    assert "cannot be read" not in check(capsys, data)[1]
    status, out, err = check(capsys, data, "--decode")
    assert "1 of 24 clips cannot be read" in out and err == "" and status == 0
    assert "a 11.mp4" in out


def test_odd_names_are_printed_safely(data, capsys, tmp_path):
    os.rename(data / "clap", data / ODD)
    (data / ODD / f"{ODD}.mp4").write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    status, out, _ = check(capsys, data, "--draw", sheet)
    assert "\x1b" not in out and status == 0
    assert any(line.startswith(r"0 odd [bold]\u001b[31m\u000a ") for line in out.splitlines())
    assert sheet.stat().st_size > 1000


def test_the_split_is_read_as_training_reads_lists(data, capsys, tmp_path):
    os.rename(data / "clap" / "a 3.mp4", data / "clap" / 'a "b", 3 4.mp4')
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    status, out, _ = check(capsys, data, "--validation", 0.25, "--write-split", train, val)
    assert status == 0 and "18 clips to train on, 6 to hold out (25% of each class)" in out
    assert out.endswith(f"training would run\nwritten to {train}\nwritten to {val}\n")
    sides = [read_dataset(path, labels=1).examples for path in (train, val)]
    assert [sum(e.label == 0 for e in side) for side in sides] == [9, 3]
    both = {(e.path, e.label) for side in sides for e in side}
    assert both == {(e.path, e.label) for e in read_dataset(data).examples}
    assert read_dataset(train).classes == ("clap", "wave")
    assert check(capsys, train)[0] == check(capsys, val)[0] == 0
    status, _, err = check(capsys, data, "--write-split", train, val)
    assert status == 2 and "--write-split" in err and "--overwrite" in err


def test_ranges_of_frames_and_several_labels_stay_in_the_split(data, capsys, tmp_path):
    files = sorted((data / "clap").iterdir())
    listed, train, val = (data / name for name in ("list.txt", "train.txt", "val.txt"))
    lines = [f"clap/{path.name}\t{k}\t30\t{k % 2}\t4\n" for k, path in enumerate(files)]
    listed.write_text("".join(lines))
    status, *_ = check(capsys, listed, "--labels", 2, "--write-split", train, val)
    assert status == 0
    sides = [read_dataset(path, labels=2).examples for path in (train, val)]
    assert {*sides[0], *sides[1]} == set(read_dataset(listed, labels=2).examples)
    assert len(sides[1]) == 2 and {e.label for e in sides[1]} == {(0, 4), (1, 4)}


def test_a_path_that_a_list_cannot_hold_writes_nothing(data, capsys, tmp_path):
    os.rename(data / "wave", data / " a\nb")  # lists drop blanks around a name
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    status, _, err = check(capsys, data, "--write-split", train, val)
    assert status == 2 and "a list cannot hold a path with a line break" in err
    assert not train.exists() and not val.exists()


def test_unlabelled_clips_are_for_pre_training(data, capsys, tmp_path):
    status, out, _ = check(capsys, data / "clap")
    assert status == 1 and "STOP     the clips have no labels, which fine-tuning needs" in out
    train, val = tmp_path / "train.csv", tmp_path / "val.csv"
    split = ("--write-split", train, val)
    status, out, _ = check(capsys, data / "clap", "--labels", 0, *split)
    assert status == 0 and len(read_dataset(val, labels=0)) == 2
    status, _, err = check(capsys, data / "clap", *split, "--overwrite")
    assert status == 2 and "the clips have no labels" in err


def test_the_sheet_has_the_middle_frames_of_each_class(data, capsys, tmp_path):
    (data / "wave" / "bad.mp4").write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    assert check(capsys, data, "--draw", sheet)[0] == 0
    panels = contact_sheet(check_dataset(read_dataset(data)))
    assert panels.labels == ["clap\n12 clips", "wave\n12 clips"]
    assert panels.warning == "1 of 25 clips cannot be read."
    clips = sorted((data / "wave").glob("a*.mp4"))
    for place, name in ((1, clips[2]), (5, clips[11])):
        frames = 62 + 2 * int(name.stem.split()[1])
        assert number_in(panels.clips[1][place].astype(float)) == frames // 2
    assert panels.clips[0][0][0, 0].tolist() == [255] * 3  # beside an upright frame
    with Image.open(sheet) as image:
        page = np.asarray(image)
    height = 2 * check_sheet._TILE[0]
    assert page.shape[0] > height and (page != 255).any(-1).mean() > 0.2


def test_a_sheet_of_unlabelled_clips_and_none_of_unreadable_ones(data, capsys, tmp_path):
    panels = contact_sheet(check_dataset(read_dataset(data / "clap")))
    assert panels.labels == ["row 1", "row 2"] and panels.clips[0].shape[0] == 6
    (data / "bad").mkdir()
    (data / "bad" / "a.mp4").write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    status, out, err = check(capsys, data / "bad", "--draw", sheet, "--labels", 0)
    assert status == 1 and "STOP     1 of 1 clip cannot be read" in out and not sheet.exists()
    assert err == "--draw: no clip can be read, so that nothing is drawn\n"


def test_lists_that_cannot_be_read_stop_training(data, capsys, tmp_path):
    listed = data / "list.txt"
    listed.write_text("clap/a 1.mp4 0\nwave/a 1.mp4 wave?\n")
    status, out, err = check(capsys, listed)
    assert status == 1 and err == "" and out.startswith("STOP     ")
    assert "line 2" in out and out.endswith("\ntraining would stop\n")
    status, out, _ = check(capsys, listed, "--json", "-")
    assert status == 1 and json.loads(out)["findings"][0]["level"] == "stop"
    listed.write_text("a 1.mp4 0\na 2.mp4 1\na 3.mp4 1\n")
    assert check(capsys, listed)[0] == 1
    status, out, _ = check(capsys, listed, "--root", data / "clap")
    assert status == 0 and "3 clips, 2 classes" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--frames", 0), "--frames must be at least 1, got 0"),
        (("--threads", 0), "--threads must be at least 1, got 0"),
        (("--labels", -1), "--labels must be at least 0, got -1"),
        (("--validation", 1.5), "--validation must be between 0 and 1, got 1.5"),
        (("--draw", "a.jpg"), "--draw a.jpg ends in '.jpg'; expected one of .png"),
        (("--json", "a.txt"), "--json a.txt ends in '.txt'"),
        (("--write-split", "a.csv", "a.csv"), "--write-split names a.csv twice"),
    ],
)
def test_wrong_arguments(made, capsys, monkeypatch, tmp_path, args, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = check(capsys, made, *args)
    assert status == 2 and message in err and out == "" and not list(tmp_path.iterdir())


def test_a_missing_data_set(capsys, tmp_path):
    status, _, err = check(capsys, tmp_path / "none")
    assert status == 2 and "no such file or directory" in err


def test_progress_tells_the_time_left_and_readers_log_again_afterwards(data, capsys, monkeypatch):
    lines = []

    class Line:
        def __init__(self, name, total, **_):
            lines.append((name, total))

        def update(self, done, text):
            lines.append((done, text))

        def close(self):
            pass

    monkeypatch.setattr("vivit_jax.progress.LiveLine", Line)
    assert check(capsys, data)[0] == 0
    assert lines[0] == ("clips", 24) and [done for done, _ in lines[1:]] == list(range(1, 25))
    assert lines[-2][1].endswith(" left")
    logger = logging.getLogger("vivit_jax.data")
    assert logger.propagate and not logger.handlers


def test_many_classes_are_shown_in_part(capsys, tmp_path, made):
    names = [f"class {number:02}" for number in range(25)]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir()
        for copy in range(1 + (number == 7)):
            path = made / "clap" / f"a {number % 12}.mp4"
            shutil.copy(path, tmp_path / name / f"{copy}.mp4")
    report = check_dataset(read_dataset(tmp_path))
    text = check_text.as_text(report, CheckOptions())
    rows = [line for line in text.splitlines() if line[:1].isdigit()]
    assert len(rows) == 20 and rows[-1].startswith("7 class 07") and "... 5 more" in text


def test_a_split_of_a_list_is_checked_by_the_names_of_a_file(capsys, tmp_path):
    """The flags of `evaluate`, from the same dataclass."""
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", np.full((70, 8, 8, 3), ord(name), np.uint8))
    (tmp_path / "list.csv").write_text(
        "path,label,split\na.npy,0,test\nb.npy,1,test\nb.npy,1,train\nc.npy,0,train\n"
    )
    (tmp_path / "names.txt").write_text("walk\nrun\n")
    flags = ("--split", "test", "--class-names", tmp_path / "names.txt")
    status, out, _ = run_command(capsys, "check-data", tmp_path / "list.csv", *flags)
    assert status == 0 and "2 clips" in out and "0 walk" in out and "1 run" in out
    # Without the flag those that training takes.
    status, out, _ = run_command(capsys, "check-data", tmp_path / "list.csv")
    assert status == 0 and "note     these are the clips of split train, which training" in out
    status, out, _ = run_command(capsys, "check-data", tmp_path / "list.csv", "--split", "no")
    assert status == 1 and "has no rows of split no" in out
