# SPDX-License-Identifier: Apache-2.0
"""How lists and directories are read, and that an example's frames are those of its file."""

import dataclasses
import gc
import io
import logging
import os
import pickle
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from clips import painted, write_clip
from PIL import Image

from vivit_jax.data.datasets.arrays import open_array
from vivit_jax.data.datasets.dataset import (
    Example,
    count_frames,
    own_validation,
    read_dataset,
    read_frames,
    read_training_clip,
    read_views,
    read_whole,
)
from vivit_jax.data.datasets.folders import by_number, clips_below
from vivit_jax.data.datasets.synthetic import write_mp4
from vivit_jax.data.sampling import training_indices, view_indices
from vivit_jax.data.video import decoder
from vivit_jax.data.video.decode import read_video
from vivit_jax.errors import UserError, VideoError
from vivit_jax.files.limits import VARIABLE


def listed(tmp_path, text, root="/data", name="train.csv", **options):
    """(path, label, start, total) of each example of a list with this text."""
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    examples = read_dataset(file, root, **options).examples
    return [(e.path, e.label, e.start, e.total) for e in examples]


def numbered(count, height=6, width=8):
    """uint8 [t, h, w, 3]; every pixel states its frame."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames += (10 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    frames[..., 1] += 1
    frames[..., 2] += 2
    return frames


def image_folder(folder, frames, name="img_{:05}.png", first=1):
    folder.mkdir(parents=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(first + k))
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """An mp4 of 30 frames, and its decoded frames."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (30, 32, 48, 3))
    write_mp4(path, noise.astype(np.uint8))
    return str(path), read_video(path)


# ---- lists


@pytest.mark.parametrize(
    "text",
    [
        "a/x.mp4 3\nb y.mp4 0\n",
        "a/x.mp4\t3\nb y.mp4\t0",
        "a/x.mp4,3\nb y.mp4,0\n",
        "a/x.mp4, 3\nb y.mp4 , 0\n",
        "  a/x.mp4    3  \r\n\r\n# a comment 4\r\n   \r\nb y.mp4 0\r\n",
        '"a/x.mp4",3\n"b y.mp4" 0\n',
        b"\xef\xbb\xbfa/x.mp4 3\nb y.mp4 0\n",
    ],
)
def test_a_list_of_paths_and_labels(tmp_path, text):
    expected = [("/data/a/x.mp4", 3, 0, None), ("/data/b y.mp4", 0, 0, None)]
    assert listed(tmp_path, text) == expected
    assert listed(tmp_path, text, labels=1) == expected
    assert listed(tmp_path, text, labels=0) == [(path, None, 0, None) for path, *_ in expected]


def test_paths_keep_their_commas_white_space_and_bytes(tmp_path):
    text = b"a, b  c,5.mp4 1\nx\ty\nd 7.mp4 2\nr\xe9.mp4 4\n".replace(b"x\ty\n", b"x  y\t6\n")
    paths = [path for path, *_ in listed(tmp_path, text, root="")]
    assert paths == ["a, b  c,5.mp4", "x  y", "d 7.mp4", "r\udce9.mp4"]


def test_relative_paths_are_below_the_list_or_the_root(tmp_path):
    text = "a.mp4 1\n/b.mp4 2\n"
    below = [path for path, *_ in listed(tmp_path, text, root=None)]
    assert below == [str(tmp_path / "a.mp4"), "/b.mp4"]
    assert [path for path, *_ in listed(tmp_path, text, root="/r")] == ["/r/a.mp4", "/b.mp4"]


HYBRID = "k400/a.mp4 0 -1\nAVA/b 9601 300\nAVA/b 9901 300\nSomethingV2/frames/7 1 58\n"


def test_videomae_lists_for_pretraining(tmp_path):
    assert listed(tmp_path, HYBRID, labels=0) == [
        ("/data/k400/a.mp4", None, 0, None),
        ("/data/AVA/b", None, 9601, 300),
        ("/data/AVA/b", None, 9901, 300),
        ("/data/SomethingV2/frames/7", None, 1, 58),
    ]
    videos = "a.mp4 0 -1\nb.mp4 0 -1\n"
    for labels in (None, 0, 1, 2):
        assert listed(tmp_path, videos, labels=labels)[1] == ("/data/b.mp4", None, 0, None)
    assert listed(tmp_path, "a b.mp4\nc.mp4\n", labels=0)[0] == ("/data/a b.mp4", None, 0, None)
    assert listed(tmp_path, "a.mp4 -1\n") == [("/data/a.mp4", None, 0, None)]
    assert listed(tmp_path, "d 3 40 6\n", labels=0) == [("/data/d", None, 3, 40)]


def test_lists_of_frame_folders_with_labels(tmp_path):
    assert listed(tmp_path, "frames/74225 62 140\n", labels=1) == [
        ("/data/frames/74225", 140, 1, 62)
    ]
    assert listed(tmp_path, "f 62 140\n", labels=1, first_frame=0) == [("/data/f", 140, 0, 62)]
    assert listed(tmp_path, "f 9 62 140\n", labels=1) == [("/data/f", 140, 9, 62)]
    # A video's frames are counted from 0.
    assert listed(tmp_path, "f.mp4 62 140\n", labels=1) == [("/data/f.mp4", 140, 0, 62)]


@pytest.mark.parametrize(
    "text, labels",
    [
        ("a.mp4 12,3\n", None),
        ("a.mp4 12,3\n", 2),
        ("a.mp4 12 3\n", 2),
        ("a.mp4,12,3\n", 2),
        ("a.mp4\t12\t3\n", 2),
        ("a.mp4\t12,3\n", None),
    ],
)
def test_two_labels(tmp_path, text, labels):
    assert listed(tmp_path, text, labels=labels) == [("/data/a.mp4", (12, 3), 0, None)]
    file = tmp_path / "train.csv"
    assert read_dataset(file, labels=labels).labels_per_example == 2


def test_a_part_of_a_video_with_two_labels(tmp_path):
    assert listed(tmp_path, "P01.mp4 120 33 12 3\n", labels=2) == [
        ("/data/P01.mp4", (12, 3), 120, 33)
    ]


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("", {}, "a list without a clip"),
        ("# nothing\n\n", {}, "a list without a clip"),
        ("a.mp4 1\n\nb.mp4 swim\n", {}, "line 3: 'b.mp4 swim': there is no label"),
        ("a.mp4 1\nb.mp4\n", {}, "line 2: 'b.mp4': there is no label, .* pass labels=0"),
        ("a.mp4 1\nb.mp4 1.5\n", {}, "line 2: 'b.mp4 1.5': there is no label"),
        ("a.mp4\t1\nb.mp4\tswim\n", {}, "line 2: .*'swim' is not an integer"),
        ("a 1 58\n", {}, "line 1: 'a 1 58': its numbers are ambiguous"),
        ("a.mp4 3\n", {"labels": 2}, "line 1: .*it has 1 label; expected 2"),
        ("a.mp4 3,4\n", {"labels": 1}, "line 1: .*it has 2 labels; expected 1"),
        ("a.mp4 -2\n", {}, "line 1: .*label -2; expected at least 0, or -1"),
        ("a 0 5\n", {"labels": 1}, "line 1: .*it asks for 0 frames"),
        ("a -3 9 5\n", {"labels": 1}, "line 1: .*9 frames from -3"),
        (",3\n", {}, "line 1: .*there is no path"),
        ("a.mp4 1\nb.mp4 -1\n", {}, "differing numbers of labels: 1 in line 1 and 0 in line 2"),
        ("a.mp4 1\nb.mp4 1,2\n", {}, "differing numbers of labels: 1 in line 1 and 2 in line 2"),
        ("a.mp4 1\nb.mp4 2\na.mp4 2\n", {}, "a.mp4 has label 1 in line 1 and 2 in line 3"),
        ("a.mp4 1\n", {"frame_name": "img.jpg"}, "frame_name is 'img.jpg': it is the same"),
        ("a.mp4 1\n", {"frame_name": "{x}"}, "frame_name is '{x}'"),
        ("a.mp4 1\n", {"labels": -1}, "labels is -1; expected the number"),
        (b"\x00\x01\x02", {}, "not a text file; expected a list file"),
        (f"a.mp4 {2**31}\n", {}, "line 1: .*label 2147483648; expected at most 2147483647"),
        (f"a.mp4 {10**23}\n", {}, "line 1: .*label 10{23}; expected at most"),
        (f"a.mp4 -{10**23}\n", {}, "line 1: .*label -10{22}...; expected at most"),
        (f"a.mp4 3,{2**31}\n", {}, "line 1: .*label 2147483648; expected at most"),
        ("a.mp4 " + "9" * 5000 + "\n", {}, "line 1: .*label 9{24}[.]{3}; expected at most"),
        (f"a 0 {2 * 10**10} 1\n", {"labels": 1}, "line 1: .*number of frames 20000000000; exp"),
        (f"a.mp4 0 {2 * 10**10} 1\n", {"labels": 1}, "line 1: .*number of frames 20000000000"),
        (f"a.mp4 {10**23} 5 1\n", {"labels": 1}, "line 1: .*number of frames 10{23}; expected"),
        (f"a {2**31 - 5} 9 1\n", {"labels": 1}, "line 1: .*9 frames from 2147483643; exp"),
        (f"a 1 {10**23}\n", {"labels": 0}, "line 1: .*number of frames 10{23}; expected"),
    ],
)
def test_refused_lists(tmp_path, text, options, message):
    with pytest.raises(UserError, match=message):
        listed(tmp_path, text, **options)


def test_a_repeated_line_counts_again_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(listed(tmp_path, "a.mp4 1\na.mp4 1\nb.mp4 2\na.mp4 1\n")) == 4
    assert "2 lines repeat an earlier one" in caplog.text


def test_sources_that_are_no_data_sets(tmp_path):
    (tmp_path / "clip.mp4").touch()
    for name, message in (("none.txt", "No such file"), ("clip.mp4", "clip.mp4 is one clip")):
        with pytest.raises(UserError, match=message):
            read_dataset(tmp_path / name)


def test_a_large_list_is_small_and_travels(tmp_path):
    text = "".join(f"k400/{k:06}.mp4 {k % 400}\n" for k in range(5000))
    (tmp_path / "l.txt").write_text(text)
    dataset = read_dataset(tmp_path / "l.txt")
    assert len(dataset) == 5000 and dataset.classes is None
    assert pickle.loads(pickle.dumps(dataset)) == dataset
    assert not hasattr(dataset.examples[0], "__dict__")
    assert len(pickle.dumps(dataset)) < 50 * 5000


@pytest.mark.parametrize("labels", [0, 1, 2])
def test_a_list_in_columns_is_a_sequence_of_examples(labels, tmp_path):
    """Of any form of lines, also mixed with plain ones that are read together."""
    numbers = " 4 5"[: 2 * labels] if labels else " 2 9"
    rows = [f"a b.mp4{numbers}", f"f\u00fc/{numbers}", f"/abs/c.mp4 3 6{numbers if labels else ''}"]
    (tmp_path / "l.txt").write_text("\n".join(rows))
    found = read_dataset(tmp_path / "l.txt", labels=labels).examples
    each = [
        read_dataset(one, tmp_path, labels=labels).examples[0] for one in singles(tmp_path, rows)
    ]
    assert found == each and each == list(found) and found != each[:2]
    assert found[-1] == each[2] and found[1:] == each[1:] and found[::-1] == each[::-1]
    with pytest.raises(IndexError):
        found[3]


def singles(root, rows):
    for k, row in enumerate(rows):
        (root / f"{k}.txt").write_text(f"# alone\n{row}")
        yield root / f"{k}.txt"


@pytest.mark.parametrize(
    "line",
    ["a.mp4 3", "a,b.mp4 3", "12 3", "\u00fc.mp4 3", "a.mp4, 3", "a.mp4  3", "a.mp4 -1", '"a" 3'],
)
@pytest.mark.parametrize("labels", [None, 0, 1])
def test_plain_lines_are_read_together_as_they_are_alone(line, labels, tmp_path):
    """A comment in front keeps lines from being read together."""
    outcomes = []
    for name, before in (("a", ""), ("b", "# one by one\n")):
        (tmp_path / f"{name}.txt").write_text(f"{before}{line}\n" * 2)
        try:
            dataset = read_dataset(tmp_path / f"{name}.txt", labels=labels)
            outcomes.append((list(dataset.examples), dataset.labels.tolist()))
        except UserError as error:
            outcomes.append(str(error).split(": ", 1)[1])
    assert outcomes[0] == outcomes[1]


def test_labels_that_contradict_each_other_far_apart_are_found(tmp_path):
    lines = [f"{k}.mp4 1\n" for k in range(3000)]
    (tmp_path / "l.txt").write_text("".join([*lines, "17.mp4 2\n"]))
    with pytest.raises(UserError, match="17.mp4 has label 1 in line 18 and 2 in line 3001"):
        read_dataset(tmp_path / "l.txt")


def test_other_labels_for_the_same_clips(tmp_path):
    (tmp_path / "l.txt").write_text("a.mp4 1\nb.mp4 0\n")
    listed_ones = read_dataset(tmp_path / "l.txt")
    alone = dataclasses.replace(listed_ones, examples=tuple(listed_ones.examples))
    for dataset in (listed_ones, alone):
        assert dataset.labels.tolist() == [[1], [0]]
        other = dataset.labelled(np.array([[5], [6]], np.int32), classes=("x",) * 7)
        assert [(e.path, e.label) for e in other.examples] == [
            (f"{tmp_path}/a.mp4", 5),
            (f"{tmp_path}/b.mp4", 6),
        ]
        assert other.labels.tolist() == [[5], [6]] and len(other.classes) == 7
        assert dataset.fingerprint == alone.fingerprint != other.fingerprint


_MILLION = """
import resource, sys, time
from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.data.pipeline import EpochSampler, ProcessShard

def most():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

before, start = most(), time.process_time()
dataset = read_dataset(sys.argv[1])
dataset.fingerprint
EpochSampler(dataset, 64, 0, ProcessShard())[0]
print(len(dataset), time.process_time() - start, most() - before)
"""


@pytest.mark.alone
def test_a_list_of_a_million_clips_begins_soon(tmp_path):
    """At a tenth of the 30 s and the 2 GB that ten million may take."""
    with open(tmp_path / "l.txt", "w") as file:
        file.writelines(
            f"class_{k % 400:03}/abcdefghijk_{k:08}.mp4 {k % 400}\n" for k in range(10**6)
        )
    command = [sys.executable, "-c", _MILLION, tmp_path / "l.txt"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(found[0]) == 10**6
    assert float(found[1]) < 3.0 and int(found[2]) < 200e6


# ---- directories


def touched(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_a_folder_for_each_class(tmp_path, caplog):
    touched(tmp_path, "swim/b.mp4", "swim/a.AVI", "run/c.npy", "run/.d.mp4", "run/notes.txt", ".x")
    (tmp_path / "sit").mkdir()
    with caplog.at_level(logging.WARNING):
        dataset = read_dataset(tmp_path)
    assert dataset.classes == ("run", "sit", "swim") and dataset.labels_per_example == 1
    found = [(e.path, e.label) for e in dataset.examples]
    assert found == [
        (str(tmp_path / "run/c.npy"), 0),
        (str(tmp_path / "swim/a.AVI"), 2),
        (str(tmp_path / "swim/b.mp4"), 2),
    ]
    assert "1 file is not a clip, such as notes.txt" in caplog.text
    unlabelled = read_dataset(tmp_path, labels=0)
    assert unlabelled.labels_per_example == 0 and len(unlabelled) == 3


def test_linked_folders_are_searched_too(tmp_path):
    """As training lists them, and not without end."""
    touched(tmp_path, "here/a/1.mp4", "elsewhere/2.mp4", "elsewhere/deep/3.mp4")
    os.symlink(tmp_path / "elsewhere", tmp_path / "here/b")
    for name in ("here/up", "here/a/up"):
        os.symlink(tmp_path / "here", tmp_path / name)
    found = [
        os.path.relpath(path, tmp_path / "here") for path in clips_below(str(tmp_path / "here"))
    ]
    assert found == [os.path.normpath(p) for p in ("a/1.mp4", "b/2.mp4", "b/deep/3.mp4")]


def test_files_of_cameras_are_clips(tmp_path):
    names = ("a.3G2", "b.ASF", "c.M2TS", "d.MTS", "e.f4v", "f.vob")
    touched(tmp_path, *(f"run/{name}" for name in names))
    found = read_dataset(tmp_path)
    assert [os.path.basename(e.path) for e in found.examples] == [*names]


def test_a_directory_is_listed_below_itself_whatever_the_root(tmp_path, monkeypatch):
    touched(tmp_path, "set/run/a.mp4")
    monkeypatch.chdir(tmp_path)
    assert read_dataset("set", "/elsewhere").examples == (Example("set/run/a.mp4", 0),)


def test_a_directory_of_clips_is_unlabelled(tmp_path):
    touched(tmp_path, "b.mp4", "a.webm", "c.npz")
    dataset = read_dataset(tmp_path)
    names = [e.path.removeprefix(f"{tmp_path}/") for e in dataset.examples]
    assert names == ["a.webm", "b.mp4", "c.npz"]
    assert dataset.classes is None and dataset.labels_per_example == 0


def test_folders_of_images_are_clips(tmp_path):
    touched(tmp_path, "one/b/1.jpg", "one/a/1.png", "two/c/1.jpg", "two/d.mp4")
    dataset = read_dataset(tmp_path)
    found = [(e.path.removeprefix(f"{tmp_path}/"), e.label) for e in dataset.examples]
    assert found == [("one/a", 0), ("one/b", 0), ("two/c", 1), ("two/d.mp4", 1)]
    unlabelled = read_dataset(tmp_path / "one")
    assert [e.label for e in unlabelled.examples] == [None, None]


@pytest.mark.parametrize(
    "names, message",
    [
        (["readme.txt"], "no clips .*expected a list file"),
        (["a/readme.txt"], "its folders hold no clips"),
        (["a/x.mp4", "y.mp4"], "holds folders such as a and clips such as y.mp4"),
        (["a/1.jpg", "b/x.mp4"], "a holds images, b clips"),
        (["1.jpg", "2.jpg"], "a folder of images, which is one clip"),
        (["a/x.mp4", "b/c/y.mp4"], "different depths, such as a/x.mp4 and b/c/y.mp4; the folder"),
        (["train/a/x.mp4", "val/a/y.mp4"], "folders train and val are splits .*/train and .*/val"),
        (["T/a/x.mp4", "Test/a/y.mp4", "Val/b/z.mp4"], "folders Test and Val are splits"),
    ],
)
def test_refused_directories(tmp_path, names, message):
    touched(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path)


def test_of_a_directory_of_splits_one_is_read(tmp_path, caplog):
    touched(tmp_path, "train/a/x.mp4", "train/b/y.mp4", "Test/b/z.mp4")
    train = read_dataset(tmp_path, split="train")
    assert [e.path.removeprefix(f"{tmp_path}/") for e in train.examples] == [
        "train/a/x.mp4",
        "train/b/y.mp4",
    ]
    held_out = own_validation(tmp_path, train)
    assert held_out is not None and held_out.classes == ("b",)
    assert "no clips of split validation; those of test are used" in caplog.text
    (tmp_path / "Test").rename(tmp_path / "eval")
    assert own_validation(tmp_path, train).examples[0].path == f"{tmp_path}/eval/b/z.mp4"
    with pytest.raises(UserError, match="no split test, only .*: --split"):
        read_dataset(tmp_path, split="test")
    assert own_validation(tmp_path / "train", read_dataset(tmp_path / "train")) is None


def test_the_class_is_the_folder_above_the_clip(tmp_path, caplog):
    touched(tmp_path, "sport/swim/a.mp4", "sport/run/f/1.jpg", "home/cook/b.webm", "home/run/c.mp4")
    (tmp_path / "home" / "sleep").mkdir()
    (tmp_path / "notes").mkdir()
    dataset = read_dataset(tmp_path)
    assert dataset.classes == ("cook", "run", "sleep", "swim")
    found = [(e.path.removeprefix(f"{tmp_path}/"), e.label) for e in dataset.examples]
    assert found == [
        ("home/cook/b.webm", 0),
        ("home/run/c.mp4", 1),
        ("sport/run/f", 1),
        ("sport/swim/a.mp4", 3),
    ]
    assert "such as home/run and sport/run, are one class" in caplog.text


def test_a_link_to_a_folder_above_ends(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(UserError, match="folders deep; is one of them a link"):
        read_dataset(tmp_path)


def test_folders_name_one_label(tmp_path):
    touched(tmp_path, "a/x.mp4")
    with pytest.raises(UserError, match="folders give one label; for labels=2 write a list"):
        read_dataset(tmp_path, labels=2)


# ---- frames


def test_frames_of_a_video_are_those_of_the_decoder(video):
    path, frames = video
    assert count_frames(Example(path, 0)) == 30
    wanted = [7, 0, 29, 7]
    np.testing.assert_array_equal(read_frames(Example(path, 0), wanted), frames[wanted])
    part = Example(path, 0, start=12, total=9)
    assert count_frames(part) == 9 and count_frames(Example(path, 0, start=12)) == 18
    np.testing.assert_array_equal(read_frames(part, [0, 8]), frames[[12, 20]])
    with pytest.raises(VideoError, match="clip.mp4: no such frames: 9; there are 9"):
        read_frames(part, [9])
    with pytest.raises(VideoError, match="clip.mp4: no such frames: 30"):
        read_frames(Example(path, 0, start=25, total=10), [5])


@pytest.mark.parametrize("sampler", ["hold", "linspace", "loop", "segments"])
def test_clips_and_views_have_the_samplers_frames(video, sampler):
    path, frames = video
    example = Example(path, 3)
    clip = read_training_clip(
        example, np.random.default_rng(5), num_frames=6, stride=3, sampler=sampler
    )
    drawn = training_indices(sampler, 30, 6, 3, np.random.default_rng(5))
    np.testing.assert_array_equal(clip, frames[drawn])
    views, indices = read_views(example, num_frames=6, stride=3, sampler=sampler, clips=4)
    np.testing.assert_array_equal(indices, view_indices(sampler, 30, 6, 3, 4))
    assert views.shape == (4, 6, 32, 48, 3) and views.dtype == np.uint8
    np.testing.assert_array_equal(views, frames[indices])


def test_a_folder_with_a_listed_total_is_read_by_name(tmp_path):
    frames = numbered(9)
    folder = image_folder(tmp_path / "clip", frames)
    example = Example(folder, 0, start=3, total=5, frame_name="img_{:05}.png")
    assert count_frames(example) == 5
    found = read_frames(example, [4, 0, 0])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, frames[[6, 2, 2]])
    with pytest.raises(VideoError, match="clip: no such frames: 5; there are 5"):
        read_frames(example, [5])
    longer = Example(folder, 0, start=3, total=50, frame_name="img_{:05}.png")
    with pytest.raises(VideoError, match="img_00010.png: not a readable image: .*No such file"):
        read_frames(longer, [7])


def test_a_folder_without_a_total_is_read_in_order_of_number(tmp_path):
    frames = numbered(12)
    folder = image_folder(tmp_path / "clip", frames, name="f{}.png", first=0)
    touched(tmp_path / "clip", "notes.txt", ".f99.png")
    assert count_frames(Example(folder, 0)) == 12
    np.testing.assert_array_equal(read_frames(Example(folder, 0), range(12)), frames)
    part = Example(folder, 0, start=2, total=3)
    np.testing.assert_array_equal(read_frames(part, [0, 2]), frames[[2, 4]])


def test_listed_folders_are_read_as_the_list_says(tmp_path):
    frames = numbered(8)
    image_folder(tmp_path / "v1", frames, name="image_{:06}.png", first=5)
    (tmp_path / "train.txt").write_text("v1 6 3\n")
    options = {"labels": 0, "frame_name": "image_{:06}.png"}
    (example,) = read_dataset(tmp_path / "train.txt", **options).examples
    np.testing.assert_array_equal(read_frames(example, [0, 2]), frames[[1, 3]])


def test_jpeg_grey_and_alpha_images_become_rgb(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    grey = Image.fromarray(np.full((6, 8), 77, np.uint8))
    grey.save(folder / "1.png")
    Image.fromarray(np.full((6, 8, 4), (10, 20, 30, 0), np.uint8)).save(folder / "2.png")
    smooth = np.linspace(0, 255, 6 * 8 * 3).astype(np.uint8).reshape(6, 8, 3)
    Image.fromarray(smooth).save(folder / "3.jpg")
    found = read_frames(Example(str(folder), 0), [0, 1, 2])
    assert (found[0] == 77).all() and (found[1] == [10, 20, 30]).all()
    np.testing.assert_array_equal(found[2], np.asarray(Image.open(folder / "3.jpg")))


@pytest.mark.parametrize("name", ["clip.npy", "clip.npz"])
def test_arrays_are_read_by_threads(tmp_path, name):
    """Garbage collections, which jax hooks from Python, switch threads inside a header."""
    save = np.save if name.endswith("npy") else np.savez
    save(tmp_path / name, numbered(3))
    example, before = Example(str(tmp_path / name), 0), gc.get_threshold()

    def switch_threads(*_):
        time.sleep(0)

    gc.callbacks.append(switch_threads)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as threads:
            counts = list(threads.map(count_frames, [example] * 1200))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(switch_threads)
    assert set(counts) == {3}


@pytest.mark.parametrize("kind", ["npy", "npz", "named"])
def test_frames_of_arrays(tmp_path, kind):
    frames = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 5)).astype(np.uint8)
    path = tmp_path / ("clip.npy" if kind == "npy" else "clip.npz")
    if kind == "npy":
        np.save(path, frames)
    elif kind == "npz":
        np.savez_compressed(path, anything=frames)
    else:
        np.savez(path, other=np.zeros(3), frames=frames)
    example = Example(str(path), 0)
    assert count_frames(example) == 9
    found = read_frames(example, [8, 0, 8])
    assert type(found) is np.ndarray and found.flags.writeable
    np.testing.assert_array_equal(found, frames[[8, 0, 8]])
    part = Example(str(path), 0, start=4, total=3)
    np.testing.assert_array_equal(read_frames(part, [2]), frames[[6]])
    with pytest.raises(VideoError, match="9 frames; the list asks for 3 frames from frame 7"):
        count_frames(Example(str(path), 0, start=7, total=3))


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def png(mode="RGB", size=(8, 6)):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "png")
    return file.getvalue()


def jpeg():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(
        file, "jpeg"
    )
    return file.getvalue()


def archive(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        for name, data in files.items():
            writer.writestr(f"{name}.npy", data)
    return file.getvalue()


GOOD = saved(np.zeros((3, 4, 4, 3), np.uint8))


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("none.mp4", None, "no such file"),
        ("empty.mp4", b"", "empty file"),
        ("noise.mp4", bytes(range(256)) * 20, "no readable video"),
        ("none.npy", None, "no such file"),
        ("empty.npy", b"", "not an array in numpy's .npy format"),
        ("noise.npy", b"\x00\xff" * 300, "not an array in numpy's .npy format"),
        ("cut.npy", GOOD[:-1], "not an array in numpy's .npy format"),
        ("header.npy", GOOD[:20] + b"\xfe(" + GOOD[22:], "not an array in numpy's .npy format"),
        ("objects.npy", saved(np.array([[{}]]), allow_pickle=True), "not an array"),
        ("flat.npy", saved(np.zeros((3, 4), np.uint8)), r"of shape \(3, 4\)"),
        ("zero.npy", saved(np.zeros((0, 4, 4, 3), np.uint8)), r"of shape \(0, 4, 4, 3\)"),
        ("floats.npy", saved(np.zeros((3, 4, 4, 3))), "an array of float64; expected uint8"),
        ("noise.npz", b"PK\x03\x04" + bytes(200), "not an array in numpy's .npz format"),
        ("cut.npz", archive(a=GOOD)[:150], "not an array in numpy's .npz format"),
        ("inner.npz", archive(a=GOOD[:-5]), "not an array in numpy's .npz format"),
        ("objects.npz", archive(a=saved(np.array([{}]), allow_pickle=True)), "not an array"),
        ("two.npz", archive(a=GOOD, b=GOOD), r"holds the arrays \['a', 'b'\]; expected one"),
        ("nothing.npz", archive(), r"holds the arrays \[\]; expected one"),
        ("clip/1.jpg", jpeg()[:700], "clip/1.jpg: not a readable image"),
        ("clip/1.jpg", b"", "clip/1.jpg: not a readable image"),
        ("clip/1.png", png()[:45], "clip/1.png: not a readable image"),
        ("clip/1.png", png("I;16"), "clip/1.png: .*pixels of mode I;16, expected 8 bits"),
        ("clip/1.txt", b"", "clip: a folder without images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files_are_video_errors_that_name_them(tmp_path, name, data, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if data is not None:
        path.write_bytes(data)
    example = Example(str(tmp_path / name.split("/")[0]), 0)
    with pytest.raises(VideoError, match=message) as caught:
        read_frames(example, [0])
    assert example.path in str(caught.value) and "allow_pickle" not in str(caught.value)
    with pytest.raises(VideoError):
        read_training_clip(
            example, np.random.default_rng(0), num_frames=2, stride=1, sampler="loop"
        )


def test_images_of_different_sizes_and_a_missing_folder(tmp_path):
    folder = image_folder(tmp_path / "clip", numbered(2))
    Image.new("RGB", (9, 6)).save(tmp_path / "clip/img_00003.png")
    with pytest.raises(VideoError, match=r"clip: .*8x6 \(frame 0\), 9x6 \(frame 2\)"):
        read_frames(Example(folder, 0), [0, 1, 2])
    np.testing.assert_array_equal(read_frames(Example(folder, 0), [1]), numbered(2)[1:])
    gone = Example(str(tmp_path / "gone"), 0, 1, 9, "img_{:05}.png")
    with pytest.raises(VideoError, match="gone: no such folder of images"):
        read_frames(gone, [0])


def test_wrong_arguments_are_not_taken_for_damage(video):
    example = Example(video[0], 0)
    for call in (
        lambda: read_frames(example, []),
        lambda: read_frames(example, [-1]),
        lambda: read_views(example, num_frames=4, stride=0, sampler="loop", clips=2),
        lambda: read_views(example, num_frames=4, stride=1, sampler="dense", clips=2),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert not isinstance(caught.value, VideoError)


def test_the_largest_numbers_of_a_list(tmp_path):
    text = f"a.mp4 {2**31 - 2} 1 {2**31 - 1}\nb 1 {2**31 - 2} 007\n"
    assert listed(tmp_path, text, labels=1) == [
        ("/data/a.mp4", 2**31 - 1, 2**31 - 2, 1),
        ("/data/b", 7, 1, 2**31 - 2),
    ]


def test_a_list_that_says_far_more_frames_than_there_are(tmp_path):
    """No memory is taken for frames that are only claimed; each reader says what is missing."""
    (tmp_path / "frames").mkdir()
    for k in (1, 2, 3):
        Image.fromarray(painted(k)).save(tmp_path / "frames" / f"{k}.png")
    write_clip(tmp_path / "clip.mp4", frames=5)
    many = 2 * 10**9
    folder = Example(str(tmp_path / "frames"), 0, 1, many, "{}.png")
    video = Example(str(tmp_path / "clip.mp4"), 0, 0, many)
    np.testing.assert_array_equal(read_frames(folder, [2, 0]), [painted(3), painted(1)])
    views = dict(num_frames=4, stride=2, sampler="loop", clips=2)
    for example, missing in (
        (folder, "png: not a readable image"),
        (video, "no such frames: .*are 5"),
    ):
        assert count_frames(example) == many
        with pytest.raises(VideoError, match=missing):
            read_whole(example)
        with pytest.raises(VideoError, match=missing):
            read_views(example, **views)
    with pytest.raises(VideoError, match=f"no such frames: {many}; there are {many:,} frames"):
        read_frames(folder, [many])


def test_digits_of_other_scripts_sort_as_letters(tmp_path):
    names = ["a1", "a10", "a2", "\u0663", "\u06631", "\u0663a", "\u00b2", "3", "10"]
    assert sorted(names, key=by_number) == [
        *("3", "10", "a1", "a2", "a10", "\u00b2", "\u0663", "\u06631", "\u0663a")
    ]
    for k, name in enumerate(("a1", "\u06631", "\u0663")):
        Image.fromarray(painted(k)).save(tmp_path / f"{name}.png")
    shown = read_frames(Example(str(tmp_path), 0), [0, 1, 2])
    np.testing.assert_array_equal(shown, [painted(0), painted(1), painted(2)])


@pytest.mark.parametrize(
    "member, content, message",
    [
        ("frames.npy", b"no array", "frames in it is not a numpy array"),
        ("frames", b"no array", "frames in it is not a numpy array"),
        ("frames.npy", b"\x93NUMPY\x01\x00", "not an array in numpy's .npz format"),
        ("frames.npy", b"", "frames in it is not a numpy array"),
    ],
)
def test_an_npz_of_something_else(tmp_path, member, content, message):
    with zipfile.ZipFile(tmp_path / "clip.npz", "w") as archive:
        archive.writestr(member, content)
    with pytest.raises(VideoError, match=f"clip.npz: {message}"):
        open_array(tmp_path / "clip.npz")


def npy_header(*shape):
    file = io.BytesIO()
    about = dict(descr="|u1", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


def test_an_npz_that_unpacks_to_more_than_allowed(tmp_path, monkeypatch):
    path = tmp_path / "clip.npz"
    np.savez_compressed(path, frames=np.zeros((16, 64, 64, 3), np.uint8))
    assert path.stat().st_size < 2000 and open_array(path).shape == (16, 64, 64, 3)
    monkeypatch.setenv(VARIABLE, "100000")
    told = f"clip.npz: frames in it would take 196,736 bytes .* at most 100,000; .*{VARIABLE}="
    with pytest.raises(VideoError, match=told):
        open_array(path)


@pytest.mark.parametrize(
    "shape", [(40, 8, 8, 3), (2**40, 8, 8, 3), (2**62, 2**62, 8, 3), (-1, 8, 8, 3)]
)
@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_an_array_that_claims_more_than_its_file_holds(tmp_path, shape, ending):
    path, content = tmp_path / f"clip.{ending}", npy_header(*shape) + bytes(4 * 8 * 8 * 3)
    if ending == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("frames.npy", content)
    with pytest.raises(VideoError, match=f"clip.{ending}: not an array in numpy's"):
        open_array(path)


def test_frames_are_counted_without_decoding_where_packets_number_them(tmp_path, monkeypatch):
    exact = write_clip(tmp_path / "a.mp4", frames=23, gop=10, b_frames=2)
    counted = write_clip(tmp_path / "b.avi", frames=23, gop=10)
    assert count_frames(Example(str(counted), None)) == 23
    monkeypatch.setattr(decoder, "decode_packet", lambda *_: pytest.fail("a packet is decoded"))
    assert count_frames(Example(str(exact), None)) == 23
