# SPDX-License-Identifier: Apache-2.0
"""Data set objects, as Hugging Face `datasets` and torchvision have them."""

import importlib.util
import pickle

import numpy as np
import pytest
from PIL import Image

from vivit_jax.data.datasets.dataset import (
    count_frames,
    from_objects,
    labels_wanted,
    read_frames,
    read_training_clip,
    read_views,
    read_whole,
)
from vivit_jax.data.pipeline import Batches, ClipShape
from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.errors import UserError, VideoError

SHAPE = ClipShape(7, (10, 12))
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 7, 10, 12, 3), np.uint8)


class Items:
    """A data set of given items that counts how often each is read."""

    def __init__(self, items, **attributes):
        self.items, self.read = items, [0] * len(items)
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(index, str):  # a column
            return [item[index] for item in self.items]
        self.read[index] += 1
        return self.items[index]


class Names:
    names = ["walk", "run"]


def pictures(clip):
    return [Image.fromarray(frame) for frame in clip]


@pytest.mark.parametrize(
    "form",
    [
        lambda clip: (clip, 1),
        lambda clip: (np.moveaxis(clip, -1, 1), np.zeros(3), np.int64(1)),
        lambda clip: (pictures(clip), 1),
        lambda clip: {"video": clip, "label": 1},
        lambda clip: {"frames": clip.astype(np.int64), "label": 1},
        lambda clip: {"pixel_values": [np.moveaxis(f, -1, 0) for f in clip], "label": 1},
    ],
)
def test_frames_and_labels_of_items(form):
    dataset = from_objects(Items([form(clip) for clip in FRAMES]))
    assert [e.label for e in dataset.examples] == [1] * 4 and dataset.classes is None
    for example, clip in zip(dataset.examples, FRAMES, strict=True):
        assert count_frames(example) == 7
        np.testing.assert_array_equal(read_whole(example), clip)
        np.testing.assert_array_equal(read_frames(example, [6, 0, 0]), clip[[6, 0, 0]])
    options = dict(num_frames=3, stride=2, sampler="linspace")
    views, indices = read_views(dataset.examples[2], clips=2, **options)
    np.testing.assert_array_equal(views, FRAMES[2][indices])
    drawn = read_training_clip(dataset.examples[2], np.random.default_rng(0), **options)
    assert drawn.shape == (3, 10, 12, 3)


def test_items_may_be_paths(tmp_path):
    items = []
    for k, clip in enumerate(FRAMES):
        np.save(tmp_path / f"{k}.npy", clip)
        items.append((tmp_path / f"{k}.npy", ("run", "walk")[k % 2]))
    items[1] = (str(items[1][0]), items[1][1])
    dataset = from_objects(Items(items))
    assert dataset.classes == ("run", "walk") and [e.label for e in dataset.examples] == [0, 1] * 2
    for example, clip in zip(dataset.examples, FRAMES, strict=True):
        np.testing.assert_array_equal(read_whole(example), clip)
    (tmp_path / "3.npy").unlink()
    with pytest.raises(VideoError, match="3.npy: no such file"):
        read_whole(dataset.examples[3])


def test_a_hugging_face_dataset_gives_its_labels_as_a_column():
    items = [{"video": {"path": None, "bytes": b"0"}, "label": k % 2} for k in range(4)]
    source = Items(items, column_names=["video", "label"], features={"label": Names()})
    dataset = from_objects(source, name="hub/clips")
    assert dataset.classes == ("walk", "run") and dataset.source == "hub/clips"
    assert [e.label for e in dataset.examples] == [0, 1, 0, 1] and source.read == [0] * 4
    with pytest.raises(VideoError, match=r"hub/clips\[2\]: 'video' holds bytes and no path; save"):
        read_whole(dataset.examples[2])


class Video:
    """The feature of a column of videos, as `datasets` has it."""

    def __init__(self, decode):
        self.decode = decode


def test_columns_that_cannot_be_read_are_told_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    of = dict(column_names=["video", "label"])
    items = [{"video": "a.mp4", "label": 0}]
    way_out = r"decoded by torchcodec, .*cast_column\('video', datasets.Video\(decode=False\)\)"
    with pytest.raises(UserError, match=way_out):
        from_objects(Items(items, features={"video": Video(True)}, **of))
    assert len(from_objects(Items(items, features={"video": Video(False)}, **of))) == 1
    with pytest.raises(UserError, match="columns file, label; expected one with the clips: video,"):
        from_objects(Items([{"file": "a", "label": 0}], column_names=["file", "label"]))


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        (Items([{"video": "a.mp4", "text": "b"}]), "keys video, text"),
        (Items([{"video": "a.mp4"}], column_names=["video", "text"]), "keys video, text"),
        (["a.mp4"], "a clip alone"),
    ],
)
def test_objects_without_labels_say_what_they_have(source, keys):
    dataset = from_objects(source)
    wanted = f"have {keys}; expected one of label, labels, target, class besides, or a tuple"
    assert wanted in labels_wanted(dataset)
    with pytest.raises(UserError, match=f"has no labels, which this task needs; .*{wanted}"):
        Batches(dataset, DataSettings(), AugmentSettings(), shape=SHAPE, batch_size=1, seed=0)


@pytest.mark.parametrize(
    "attributes", [{"targets": [1, 0, 1, 1]}, {"samples": [("a", k) for k in (1, 0, 1, 1)]}]
)
def test_a_torchvision_dataset_gives_its_labels_as_an_attribute(attributes):
    source = Items([(clip, 9) for clip in FRAMES], classes=["walk", "run"], **attributes)
    dataset = from_objects(source)
    assert [e.label for e in dataset.examples] == [1, 0, 1, 1] and source.read == [0] * 4
    assert dataset.classes == ("walk", "run")
    given = from_objects(source, labels=["b", "a", "b", "b"], classes=("c", "b", "a"))
    assert [e.label for e in given.examples] == [1, 2, 1, 1] and given.classes == ("c", "b", "a")


@pytest.mark.parametrize(
    "source, options, message",
    [
        (iter([]), {}, "no data set object; expected one with a length"),
        ([], {}, "list: a data set object without clips"),
        ([(FRAMES[0], 1)], {"labels": [1, 2]}, "2 labels for 1 clip"),
        ([(FRAMES[0], 1), (FRAMES[1], "x")], {}, "label 'x' of clip 1, and 1 of clip 0; expected"),
        ([(FRAMES[0], 1), (FRAMES[1], None)], {}, "label None of clip 1, and 1 of clip 0"),
        ([(FRAMES[0], 0.5)], {}, "label 0.5 of clip 0; expected an integer"),
        ("clips", {}, "a path; read_dataset reads what is there"),
        ([(FRAMES[0], -1)], {}, "label -1 of clip 0; expected 0 to"),
        ([(FRAMES[0], 3)], {"classes": ["a", "b"]}, "label 3 of clip 0; expected 0 to 1"),
        ([(FRAMES[0], "rum")], {"classes": ["run"]}, "not among its classes: rum .did you mean"),
    ],
)
def test_refused_objects(source, options, message):
    with pytest.raises(UserError, match=message):
        from_objects(source, **options)


@pytest.mark.parametrize(
    "clip, message",
    [
        (FRAMES[0].astype(np.float32), r"list\[0\]: frames of float32 with shape"),
        (FRAMES[0][0], "frames of uint8 with shape .*; expected 0 to 255 as integers .t, h"),
        (FRAMES[0].astype(np.int64) + 1, "frames of int64 with shape"),
        ([FRAMES[0][0], FRAMES[0][0][:5]], "frames of shapes .*; expected one shape"),
        (FRAMES[0][..., :2], "expected 1, 3 or 4 channels"),
        (5, "a clip of type int; expected a mapping"),
    ],
)
def test_refused_clips(clip, message):
    dataset = from_objects([(clip, 0)])
    with pytest.raises(VideoError, match=message):
        read_whole(dataset.examples[0])


def test_a_label_that_cannot_be_had_is_told():
    class Splits(dict):  # as a DatasetDict of Hugging Face
        pass

    with pytest.raises(UserError, match=r"Splits\[0\] gives no label: KeyError: 0; .*choose one"):
        from_objects(Splits(train=[(FRAMES[0], 0)]))


def test_the_same_clips_are_known_again():
    dataset = from_objects([(clip, k) for k, clip in enumerate(FRAMES)])
    again = pickle.loads(pickle.dumps(dataset))
    assert again.fingerprint == dataset.fingerprint
    np.testing.assert_array_equal(read_whole(again.examples[3]), FRAMES[3])
    other = from_objects([(clip, 0) for clip in FRAMES])
    assert other.fingerprint != dataset.fingerprint


def test_batches_of_an_object_leave_out_what_cannot_be_read():
    items = [(clip, k) for k, clip in enumerate(FRAMES)] + [(None, 4)]
    augment = AugmentSettings(crop="center", flip=0.0)
    settings = DataSettings(sampler="segments", stride=1, max_bad_share=0.5, cache_gib=0.1)
    shape = SHAPE
    with Batches(
        from_objects(items), settings, augment, shape=shape, batch_size=2, seed=0
    ) as source:
        seen = {}
        for _ in range(8):
            batch = next(source)
            seen |= dict(zip(batch["labels"].tolist(), batch["clips"], strict=True))
    assert sorted(seen) == [0, 1, 2, 3] and [*source.bad] == ["list[4]"]
    for label, clip in seen.items():
        np.testing.assert_array_equal(clip, FRAMES[label])
