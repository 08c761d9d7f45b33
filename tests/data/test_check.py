# SPDX-License-Identifier: Apache-2.0
"""What is found out about a data set: facts of each clip, copies, classes, a split."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from clips import write_clip
from PIL import Image

from vivit_jax.data.datasets.check import (
    LEVELS,
    ClipFacts,
    Report,
    Span,
    check_dataset,
    find_copies,
    in_threads,
    inspect,
    split,
    stop_chance,
)
from vivit_jax.data.datasets.dataset import Dataset, Example, read_dataset

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A clip of 70 frames at 25 frames a second."""
    return write_clip(tmp_path_factory.mktemp("good") / "good.mp4", frames=70)


def images(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 12, 16, 3), np.uint8)
    for number, image in enumerate(pixels, 1):
        Image.fromarray(image).save(folder / f"img_{number:05}.png")
    return folder


def facts(labels, bad=(), frames: int = 70) -> tuple[ClipFacts, ...]:
    """Facts of made-up clips of different sizes in bytes, whose paths do not exist."""
    return tuple(
        ClipFacts(Example(f"{i}.mp4", label), "broken" if i in bad else None, frames, bytes=i)
        for i, label in enumerate(labels)
    )


def checked(directory: Path, **options) -> Report:
    return check_dataset(read_dataset(directory), **options)


def finding(report: Report, words: str):
    (found,) = [each for each in report.findings if words in each.text]
    return found


def test_facts_of_each_kind_of_clip(good, tmp_path):
    array = tmp_path / "a.npy"
    np.save(array, np.zeros((5, 6, 8, 1), np.uint8))
    folder = images(tmp_path / "frames", 3)
    video, part = inspect(Example(str(good), None)), inspect(Example(str(good), None, 60, 10))
    assert (video.frames, video.width, video.height, video.codec) == (70, 64, 48, "h264")
    assert video.fps == 25 and video.seconds == 2.8 and video.bytes == good.stat().st_size
    assert part.frames == 10 and part.seconds == 0.4 and part.error is None
    stored, several = inspect(Example(str(array), None)), inspect(Example(str(folder), None))
    assert (stored.frames, stored.width, stored.height, stored.channels) == (5, 8, 6, 1)
    assert (several.frames, several.width, several.height) == (3, 16, 12)
    assert (stored.codec, several.codec, several.fps) == ("npy", "images", None)
    assert several.bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_a_clip_without_times_has_no_rate(tmp_path):
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    path = tmp_path / "still.webp"
    first.save(path, save_all=True, append_images=[second], duration=0)
    found = inspect(Example(str(path), None))
    assert (found.frames, found.fps, found.seconds, found.codec) == (2, None, None, "webp")


def test_what_cannot_be_read_gives_a_reason(good, tmp_path):
    (tmp_path / "pointer.mp4").write_bytes(POINTER)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    folder = images(tmp_path / "frames", 3)
    reasons = {
        Example(str(tmp_path / "pointer.mp4"), None): "git lfs pull",
        Example(str(tmp_path / "empty.mp4"), None): "an empty file",
        Example(str(tmp_path / "text.mp4"), None): "text.mp4",
        Example(str(tmp_path / "none.mp4"), None): "no such file",
        Example(str(good), None, 61, 10): "there are 70 frames; the list asks for 10",
        Example(str(good), None, 70): "there are 70 frames; the list asks for 1 from frame 70",
        Example(str(folder), None, 1, 4, "img_{:05}.png"): "img_00004.png",
    }
    for example, reason in reasons.items():
        assert reason in str(inspect(example).error), example
    whole = Example(str(folder), None, 1, 3, "img_{:05}.png")
    assert inspect(whole).error is None and inspect(whole).frames == 3


def test_damage_inside_a_file_is_found_by_decoding(good, tmp_path):
    data = bytearray(good.read_bytes())
    begin = data.index(b"mdat") + len(data) // 4
    data[begin : begin + len(data) // 2] = bytes(len(data) // 2)
    damaged = Example(str(tmp_path / "damaged.mp4"), None)
    Path(damaged.path).write_bytes(data)
    assert inspect(damaged).error is None
    assert "damaged.mp4" in str(inspect(damaged, Span()).error)
    assert inspect(Example(str(good), None), Span()).error is None


def test_copies_have_the_same_bytes_and_other_paths(tmp_path, monkeypatch):
    first = images(tmp_path / "a", 2)
    shutil.copytree(first, tmp_path / "b")
    other = images(tmp_path / "c", 2)
    raw = other / "img_00001.png"
    raw.write_bytes(raw.read_bytes()[:-1] + b"x")  # of the same size
    names = {"x.npy": b"abc", "y.npy": b"abc", "z.npy": b"abd", "w.npy": b"abcd"}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content)
    paths = [str(first), *map(str, (tmp_path / "b", other)), *(str(tmp_path / n) for n in names)]
    paths.append(str(first))  # listed twice: the same clip, no copy
    sizes = [1000] * 3 + [len(content) for content in names.values()] + [1000]
    found = [ClipFacts(Example(p, None), bytes=size) for p, size in zip(paths, sizes, strict=True)]
    assert find_copies(found) == ((0, 1), (3, 4))
    found[1] = ClipFacts(found[1].example, "broken", bytes=1000)
    assert find_copies(found) == ((3, 4),)

    calls = []
    alone = [each for each in found if each.bytes == 4]
    assert find_copies(alone, progress=lambda *done: calls.append(done)) == () and not calls


def test_clips_that_are_not_begun_are_dropped_when_the_caller_stops():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.001)
        return -item

    results = in_threads(work, range(1000), 2)
    assert [next(results) for _ in range(3)] == [0, -1, -2]
    results.close()  # as Ctrl-C does
    assert 3 <= len(begun) < 1000
    assert list(in_threads(work, range(50), 4)) == [-k for k in range(50)]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
def test_a_split_is_stratified_and_complete(share):
    labels = [0] * 30 + [1] * 10 + [2] * 2 + [3]
    found = facts(labels, bad=(5, 31))
    train, held_out = split(found, (), share)
    assert sorted(train + held_out) == [i for i in range(43) if i not in (5, 31)]
    for label, readable in ((0, 29), (1, 9), (2, 2), (3, 1)):
        count = sum(labels[i] == label for i in held_out)
        wanted = min(max(1, round(share * readable)), readable - 1)
        assert count == wanted, label
    assert split(found, (), share) == (train, held_out)
    assert split(found, (), share, seed=1) != (train, held_out)


def test_copies_and_clips_of_one_file_are_on_one_side():
    found = [*facts([0] * 6), ClipFacts(Example("0.mp4", 0, 20))]
    train, held_out = split(found, ((1, 2),), 0.9)
    assert set(held_out) == {3, 4, 5} and set(train) == {0, 1, 2, 6}


def test_the_chance_that_training_stops():
    assert stop_chance(0, 40) == 0
    assert stop_chance(1, 20) == 0 and stop_chance(1, 19) == 1
    assert stop_chance(3, 40) == 1
    # Both must be among the first 39 of 44: 39 * 38 / (44 * 43) = 0.783, give or take 0.03.
    assert abs(stop_chance(2, 44) - 0.783) < 0.1


def test_levels_of_unreadable_clips():
    def level(bad: int, clips: int):
        found = facts([0, 1] * (clips // 2), bad=range(bad))
        dataset = Dataset(tuple(each.example for each in found), None, "list")
        return check_dataset_of(dataset, found)

    assert level(0, 40) is None and level(1, 40) == "warning"
    assert level(2, 44) == "stop" and level(4, 40) == "stop" and level(2, 2000) == "warning"


def check_dataset_of(dataset, found):
    """The level of the finding on unreadable clips, for clips whose facts are made up."""
    with pytest.MonkeyPatch.context() as patch:
        known = {each.example: each for each in found}
        patch.setattr("vivit_jax.data.datasets.check.inspect", lambda e, _: known[e])
        report = check_dataset(dataset)
    levels = [each.level for each in report.findings if "cannot be read" in each.text]
    assert report.trains == ("stop" not in levels)
    return levels[0] if levels else None


def test_names_that_tell_directions(tmp_path, good):
    names = ("turnLeft", "turn_right", "CounterClockwise", "ccw-turn", "leftovers", "upright")
    vertical = ("move-up", "Down", "downwards")
    for name in (*names, *vertical, "bright", "cup"):
        (tmp_path / name).mkdir()
        shutil.copy(good, tmp_path / name)
    report = checked(tmp_path)
    mirrored = finding(report, "left from right")
    assert set(mirrored.items) == set(names[:4]) and mirrored.level == "warning"
    assert "augment.flip=0" in mirrored.help
    assert set(finding(report, "up from down").items) == set(vertical)
    # The same file in each class.
    (copies,) = finding(report, "different labels").items
    assert copies.count(" = ") == 2 and "(Down)" in copies and copies.endswith(" and 8 more")
    assert report.copies == (tuple(range(11)),)


def test_counts_and_lengths(tmp_path, good):
    for name, count in (("many", 10), ("one", 1), ("none", 0)):
        (tmp_path / name).mkdir()
        for number in range(count):
            shutil.copy(good, tmp_path / name / f"{number}.mp4")
    write_clip(tmp_path / "many" / "short.mp4", frames=40, fps=10)
    np.save(tmp_path / "many" / "a.npy", np.zeros((60, 6, 8, 1), np.uint8))
    report = checked(tmp_path)
    rows = {each.name: each for each in report.classes}
    assert (rows["many"].clips, rows["many"].short, rows["one"].clips) == (12, 2, 1)
    assert finding(report, "1 class without a readable clip").items == ("none",)
    assert finding(report, "1 class with one readable clip").items == ("one",)
    assert "12 clips of many, 1 of one" in finding(report, "unbalanced").text
    short = finding(report, "too short for 16 frames 4 apart, which take 61")
    clips = tmp_path / "many"
    assert short.items == (f"{clips / 'short.mp4'}: 40 frames", f"{clips / 'a.npy'}: 60 frames")
    assert finding(report, "1 array without the 3 channels").items == (
        f"{clips / 'a.npy'}: 1 channel",
    )
    assert "data.stride=2, which fits all" in short.help  # 15 * 2 + 1 = 31, 15 * 3 + 1 = 46
    assert "from 10 to 25" in finding(report, "frame rates").text
    assert report.trains
    levels = [LEVELS.index(each.level) for each in report.findings]
    assert levels == sorted(levels) and len(set(levels)) == 2
    fewer = checked(tmp_path, span=Span(41, 1))
    assert "1 of them have fewer than 41 frames" in finding(fewer, "too short").help
    exact = checked(tmp_path, span=Span(40, 1))
    assert not any(each.short for each in exact.classes)
    assert not [each for each in exact.findings if "too short" in each.text]


def test_labels(tmp_path, good):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(good, tmp_path / name)
    unlabelled = checked(tmp_path)
    assert not unlabelled.trains and "--labels 0" in finding(unlabelled, "no labels").help
    assert not [each for each in unlabelled.findings if "one class" in each.text]
    assert checked(tmp_path, labelled=False).trains
    listed = tmp_path / "list.txt"
    listed.write_text("a.mp4 0\nb.mp4 0\n")
    assert finding(checked(listed), "all clips are of one class").level == "stop"
    listed.write_text("a.mp4 0\nb.mp4 1\n")
    assert finding(checked(listed), "no clip can be held out").level == "stop"
    assert checked(listed, holds_out=False).trains
    listed.write_text("a.mp4 0\nb.mp4 1000000\n")
    assert not checked(listed).trains
    assert finding(checked(listed), "labels go up to 1000000").level == "stop"
    listed.write_text("a.mp4 3,1\nb.mp4 3,2\n")
    report = checked(listed)
    assert [each.name for each in report.classes] == ["3,1", "3,2"] and report.trains
