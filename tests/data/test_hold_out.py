# SPDX-License-Identifier: Apache-2.0
"""The split that a run makes itself, and the lists that it writes."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vivit_jax.cli import suggest
from vivit_jax.cli.suggest import _shared_line
from vivit_jax.data.datasets import hold_out as hold_out_module
from vivit_jax.data.datasets.dataset import from_objects, read_dataset
from vivit_jax.data.datasets.hold_out import hold_out, shared_clips, write_list
from vivit_jax.errors import UserError


def write(root, clips):
    """Folders of classes with so many clips."""
    for number, (name, count) in enumerate(clips.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            np.save(root / name / f"{i}.npy", np.full((2, 4, 4, 3), 10 * number + i, np.uint8))
    return read_dataset(root)


def names(dataset):
    return [example.path for example in dataset.examples]


def test_each_class_gives_its_share_and_keeps_the_rest(tmp_path):
    whole = write(tmp_path, {"a": 10, "b": 5, "c": 2, "d": 1})
    train, held = hold_out(whole, 0.2, seed=3)
    count = lambda part: np.bincount([e.label for e in part.examples], minlength=4).tolist()  # noqa: E731
    assert count(held) == [2, 1, 1, 0] and count(train) == [8, 4, 1, 1]
    assert sorted(names(train) + names(held)) == names(whole)
    assert train.classes == held.classes == whole.classes
    assert names(hold_out(whole, 0.2, seed=3)[1]) == names(held)
    assert names(hold_out(whole, 0.2, seed=4)[1]) != names(held)


def test_copies_are_on_one_side(tmp_path):
    write(tmp_path, {"a": 3, "b": 3})
    for i in (1, 2):
        (tmp_path / "a" / f"{i}.npy").write_bytes((tmp_path / "a" / "0.npy").read_bytes())
    for seed in range(8):
        _, held = hold_out(read_dataset(tmp_path), 0.5, seed)
        assert {e.label for e in held.examples} == {1}


def test_copies_and_parts_of_a_file_are_held_out_together_where_a_class_has_no_others(tmp_path):
    """Each clip of a twice, and b cut from four long videos."""
    write(tmp_path, {"a": 5, "b": 4})
    lines = [f"a/{i}.npy 0" for i in range(5)] + [f"a/again {i}.npy 0" for i in range(5)]
    for i in range(5):
        (tmp_path / "a" / f"again {i}.npy").write_bytes((tmp_path / "a" / f"{i}.npy").read_bytes())
    lines += [f"b/{i}.npy {start} 1 1" for i in range(4) for start in (0, 1)]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    whole, chosen = read_dataset(tmp_path / "list.txt", labels=1), set()
    for seed in range(8):
        train, held = hold_out(whole, 0.2, seed)
        assert len(train) + len(held) == len(whole)
        assert np.bincount([e.label for e in held.examples]).tolist() == [2, 2]
        assert not {*names(train)} & {*names(held)}
        assert shared_clips(train, held) == []
        chosen.add(tuple(names(held)))
    assert len(chosen) > 2, "the seed decides"


def test_it_is_said_where_copies_are_not_looked_for(tmp_path, caplog, monkeypatch):
    whole = write(tmp_path, {"a": 5, "b": 5})
    hold_out(whole, 0.2)
    assert not caplog.text
    for module in (hold_out_module, suggest):
        monkeypatch.setattr(module, "MOST_COMPARED", 9)
    hold_out(whole, 0.2)
    assert "on both sides of the split: among more than 9 clips they are not looked" in caplog.text
    assert shared_clips(whole, whole) is None
    lines = _shared_line(whole, whole)
    assert lines == [
        "not looked for among more than 9 clips: held-out clips that are also trained on"
    ]
    caplog.clear()
    (tmp_path / "list.txt").write_text("\n".join(f"gs://bucket/{i}.mp4 {i % 2}" for i in range(8)))
    hold_out(read_dataset(tmp_path / "list.txt"), 0.2)
    assert "both sides of the split: in storage they are not looked for; `vivit" in caplog.text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_files_that_cannot_be_compared_are_no_copies(tmp_path):
    """Reading a FIFO, which has the size of an empty file, would wait for ever."""
    write(tmp_path, {"a": 5, "b": 5})
    pipe = tmp_path / "a" / "pipe.mp4"
    os.mkfifo(pipe)
    (tmp_path / "b" / "empty.mp4").touch()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(hold_out, read_dataset(tmp_path), 0.2)
        try:
            train, held = found.result(timeout=30)
        finally:
            if not found.done():  # let the reader go
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    assert len(train) == 10 and len(held) == 2


def test_held_out_clips_that_are_trained_on(tmp_path):
    """By name, by another name of the same file, and as copies; other frames are other clips."""
    write(tmp_path / "train", {"a": 3, "b": 3})
    lists = {name: tmp_path / f"{name}.txt" for name in ("train", "val")}
    os.symlink(tmp_path / "train" / "a" / "1.npy", tmp_path / "link.npy")
    (tmp_path / "copy.npy").write_bytes((tmp_path / "train" / "b" / "2.npy").read_bytes())
    np.save(tmp_path / "new.npy", np.zeros((2, 4, 4, 3), np.uint8) + 99)
    lists["train"].write_text("train/a/0.npy 0 1 0\ntrain/a/1.npy 0\ntrain/b/2.npy 1\n")
    lists["val"].write_text("train/a/0.npy 1 1 0\nlink.npy 0\ncopy.npy 1\nnew.npy 1\n")
    train, held = (read_dataset(path, labels=1) for path in lists.values())
    found = shared_clips(train, held)
    assert [os.path.basename(path) for path in found] == ["link.npy", "copy.npy"]
    assert shared_clips(train, train) == names(train)
    clips = from_objects([(np.zeros((2, 4, 4, 3), np.uint8), label) for label in (0, 1)])
    assert shared_clips(clips, clips) == []


def test_where_nothing_can_be_held_out(tmp_path):
    with pytest.raises(UserError, match="no clip can be held out, since each class keeps one"):
        hold_out(write(tmp_path, {"a": 1, "b": 1}), 0.2)


def test_clips_of_objects_are_held_out_too():
    clips = [(np.zeros((2, 4, 4, 3), np.uint8), label) for label in (0, 0, 0, 1, 1, 1)]
    train, held = hold_out(from_objects(clips), 0.3)
    assert len(train) == 4 and sorted(e.label for e in held.examples) == [0, 1]
    with pytest.raises(UserError, match="a list cannot hold items of objects"):
        write_list("nowhere.csv", held)


@pytest.mark.parametrize("classes", [("swim", "run, fast"), ("9", "10"), ("#1", '"a" b')])
def test_a_list_reads_back_with_its_classes(classes, tmp_path):
    """By name, unless names look like numbers, which lists read as numbers."""
    whole = write(tmp_path / "clips with space", dict.fromkeys(classes, 2))
    write_list(tmp_path / "list.csv", whole)
    found = read_dataset(tmp_path / "list.csv")
    assert names(found) == names(whole)
    same = [e.label for e in found.examples] == [e.label for e in whole.examples]
    assert same and found.classes in (whole.classes, None)
    named = (tmp_path / "list.csv").read_text().startswith("path,label\n")
    assert named == (classes != ("9", "10"))


def test_a_list_with_ranges_and_no_names_reads_back(tmp_path):
    lines = "a.mp4 0 5 1\na.mp4 5 5 0\nb c.mp4 2 9 1\n"
    (tmp_path / "in.txt").write_text(lines)
    whole = read_dataset(tmp_path / "in.txt", labels=1)
    write_list(tmp_path / "out.csv", whole, labels=1)
    assert read_dataset(tmp_path / "out.csv", labels=1).examples == whole.examples


def test_a_path_that_no_list_can_hold(tmp_path):
    whole = write(tmp_path / "of a\nline", {"9": 2, "10": 2})
    with pytest.raises(UserError, match="nor paths with a line break"):
        write_list(tmp_path / "list.csv", whole)
    assert not (tmp_path / "list.csv").exists()
