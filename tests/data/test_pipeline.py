# SPDX-License-Identifier: Apache-2.0
"""The sequence of training batches: a function of seed and place, whoever reads it and from where.

Every pixel of a test clip states its clip, its frame and its place in the frame.
"""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import av
import numpy as np
import pytest
from clips import write_clip
from PIL import Image

from vivit_jax.data import cache, pipeline
from vivit_jax.data.datasets.dataset import (
    Dataset,
    Example,
    read_dataset,
    read_training_clip,
    read_whole,
)
from vivit_jax.data.pipeline import Batches, ClipShape, ProcessShard
from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.data.transforms.augment import train_transform
from vivit_jax.errors import UserError, VideoError

COUNT, FRAMES, HEIGHT, WIDTH = 7, 9, 20, 24
SHAPE = ClipShape(num_frames=4, size=(16, 16))
DATA = DataSettings(sampler="loop", stride=1)
CROPS = AugmentSettings(crop="random", flip=0.0)


def pixels(clip, frames=FRAMES, channels=3):
    """uint8 [t, h, w, c]; the channels state clip and frame, row, and column."""
    values = np.zeros((frames, HEIGHT, WIDTH, channels), np.uint8)
    values[..., 0] = 16 * clip + np.arange(frames)[:, None, None]
    values[..., 1] = np.arange(HEIGHT)[:, None]
    values[..., 2] = np.arange(WIDTH)
    return values


@pytest.fixture
def clips(tmp_path):
    """Seven arrays, labelled by their number."""
    for i in range(COUNT):
        np.save(tmp_path / f"{i}.npy", pixels(i))
    return labelled(tmp_path / f"{i}.npy" for i in range(COUNT))


def labelled(paths):
    return Dataset(tuple(Example(str(p), i) for i, p in enumerate(paths)), None, "list.txt")


def batches(dataset, data=DATA, augment=CROPS, **options):
    options = dict(shape=SHAPE, batch_size=3, seed=5) | options
    return Batches(dataset, data, augment, **options)


def first(count, *args, **options):
    with batches(*args, **options) as source:
        return [next(source) for _ in range(count)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], strict=True)


def are_same(found, expected):
    return all(np.array_equal(a["clips"], b["clips"]) for a, b in zip(found, expected, strict=True))


def test_every_clip_comes_once_an_epoch_in_another_order_each():
    examples = tuple(Example(f"{i}", i) for i in range(COUNT))
    order = pipeline.EpochSampler(Dataset(examples, None, "x"), 3, 5, ProcessShard())
    assert order.steps_per_epoch == 2
    epochs = [[order[6 * epoch + i] for i in range(6)] for epoch in range(40)]
    labels = [tuple(example.label for example, _ in epoch) for epoch in epochs]
    assert all(len(set(epoch)) == 6 for epoch in labels)
    assert len(set(labels)) == 40 and {label for epoch in labels for label in epoch} == {*range(7)}
    assert [number for epoch in epochs for _, number in epoch] == list(range(240))


def test_a_batch_holds_what_its_clips_files_do(clips):
    """The definition: a permutation per epoch and a generator per element."""
    read = train_transform(CROPS, (16, 16))
    for step, batch in enumerate(first(5, clips)):
        assert batch["clips"].dtype == np.uint8 and batch["clips"].shape == (3, 4, 16, 16, 3)
        assert batch["labels"].dtype == np.int32
        for row in range(3):
            epoch, place = divmod(3 * step + row, 6)
            label = np.random.default_rng((5, epoch)).permutation(COUNT)[place]
            rng = np.random.default_rng((5, 3 * step + row, 1))
            frames = read_training_clip(
                clips.examples[label], rng, num_frames=4, stride=1, sampler="loop"
            )
            np.testing.assert_array_equal(batch["clips"][row], read(rng, frames))
            assert batch["labels"][row] == label == batch["clips"][row, 0, 0, 0, 0] // 16
            assert np.ptp(batch["clips"][row, :, 0, 0, 0]) == 3  # four frames, one after another


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(clips):
    many = dataclasses.replace(DATA, threads=5)
    expected = first(5, clips)
    assert_same(first(5, clips, many), expected)
    assert not are_same(first(5, clips, seed=6), expected)


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_a_restored_sequence_goes_on_bit_for_bit(clips, tmp_path, step):
    """Also at an unreadable clip, and across the end of an epoch."""
    (tmp_path / "3.npy").write_bytes(b"no array")
    data = dataclasses.replace(DATA, max_bad_share=0.5)
    with batches(clips, data) as source, batches(clips, data) as other:
        for _ in range(step):
            next(source)
        state = json.loads(json.dumps(source.state()))
        assert source.state() == state
        next(other)  # what it read before no longer counts
        other.restore(state)
        assert other.state() == state
        expected = [next(source) for _ in range(6)]
        assert_same([next(other) for _ in range(6)], expected)
        assert other.state() == source.state() != state


@pytest.mark.parametrize("counts", [(1, 2, 4, 1), (2, 1), (4, 2, 1)])
def test_any_number_of_processes_goes_on_with_the_same_batches(clips, tmp_path, counts):
    """Also where clips cannot be read, of which the spare ones are the same everywhere."""
    for k in (1, 2):
        (tmp_path / f"{k}.npy").write_bytes(b"no array")
    data = dataclasses.replace(DATA, max_bad_share=0.9)
    whole = first(3 * len(counts), clips, data, batch_size=4)
    states = []
    for turn, count in enumerate(counts):
        parts = [
            batches(clips, data, batch_size=4, shard=ProcessShard(i, count)) for i in range(count)
        ]
        for part in parts:
            if states:
                part.restore(*states)
        for step in range(3 * turn, 3 * turn + 3):
            shares = [next(part) for part in parts]
            for name, expected in whole[step].items():
                found = np.concatenate([share[name] for share in shares])
                np.testing.assert_array_equal(found, expected, strict=True)
        states = [json.loads(json.dumps(part.state())) for part in parts]
        for part in parts:
            part.close()
        paths = {path for state in states for path in state["bad"]}
        assert paths == {str(tmp_path / "1.npy"), str(tmp_path / "2.npy")}
        assert sum(state["read"] - state["left_out"] for state in states) <= 12 * (turn + 1)


def test_a_run_of_an_earlier_version_goes_on_unless_it_left_out_clips(clips):
    with batches(clips, batch_size=4) as source:
        for _ in range(2):
            next(source)
        state, expected = source.state(), [next(source) for _ in range(2)]
        old = {name: state[name] for name in ("clips", "left_out", "bad")}
        source.restore(old | {"processes": 2, "read": 4})
        assert_same([next(source) for _ in range(2)], expected)
        with pytest.raises(UserError, match="an earlier version saved this run, and 1 clip "):
            source.restore(old | {"processes": 2, "read": 5, "left_out": 1})


def test_other_clips_labels_or_another_order_cannot_go_on(clips):
    with batches(clips) as source:
        state = source.state()
    with batches(Dataset(tuple(clips.examples), None, "the same list elsewhere")) as source:
        source.restore(state)
    relabelled = dataclasses.replace(clips.examples[2], label=0)
    for examples in (
        clips.examples[:-1],
        clips.examples[::-1],
        (*clips.examples[:2], relabelled, *clips.examples[3:]),
    ):
        with pytest.raises(UserError, match="list.txt lists other clips or labels than when"):
            batches(Dataset(examples, None, "list.txt")).restore(state)


def test_shares_put_together_are_the_whole_batch(clips):
    data = dataclasses.replace(DATA, repeats=2)
    whole = first(4, clips, data, batch_size=4)
    halves = [first(4, clips, data, batch_size=4, shard=ProcessShard(i, 2)) for i in range(2)]
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one}
        for one, other in zip(*halves, strict=True)
    ]
    assert_same(joined, whole)


def test_repeats_are_neighbours_of_the_same_frames_augmented_differently(clips):
    data = dataclasses.replace(DATA, repeats=3)
    cut = set()
    for batch in first(4, clips, data):
        assert batch["clips"].shape == (9, 4, 16, 16, 3) and batch["labels"].shape == (9,)
        copies = batch["clips"].reshape(3, 3, *batch["clips"].shape[1:])
        assert (batch["labels"].reshape(3, 3) == batch["labels"][::3, None]).all()
        np.testing.assert_array_equal(copies[..., 0], copies[:, :1, :, :, :, 0].repeat(3, 1))
        corners = copies[:, :, 0, 0, 0, 1:].reshape(3, 3, 2)
        assert any(len({tuple(corner) for corner in row}) > 1 for row in corners)
        cut |= {tuple(corner) for corner in corners.reshape(-1, 2)}
    assert len(cut) > 10


def test_a_clip_that_cannot_be_read_is_left_out_and_named(clips, tmp_path):
    """Another takes its place, with draws of its own, and the sequence is otherwise unchanged."""
    bad, read = str(tmp_path / "3.npy"), train_transform(CROPS, (16, 16))
    whole = first(6, clips)
    (tmp_path / "3.npy").write_bytes(b"no array")
    tries, replaced = 0, set()
    with batches(clips, dataclasses.replace(DATA, max_bad_share=0.5)) as source:
        for step in range(6):
            batch = next(source)
            for row in range(3):
                element, label = 3 * step + row, whole[step]["labels"][row]
                expected = whole[step]["clips"][row]
                if label == 3:
                    start = np.random.default_rng((5, element, 2)).integers(COUNT)
                    attempt = 2 if (start + 1) % COUNT == 3 else 1
                    label, tries = (start + attempt) % COUNT, tries + attempt
                    rng = np.random.default_rng((5, element, 1, attempt))
                    frames = read_training_clip(
                        clips.examples[label], rng, num_frames=4, stride=1, sampler="loop"
                    )
                    expected = read(rng, frames)
                    replaced.add(label)
                assert batch["labels"][row] == label
                np.testing.assert_array_equal(batch["clips"][row], expected)
        state = source.state()
    assert list(source.bad) == [bad] and bad in source.bad[bad]
    assert len(replaced) > 1 and 3 not in replaced
    assert state["left_out"] == tries and state["read"] == 18 + tries and state["steps"] == 6


def test_one_clip_in_many_that_can_be_read_is_found(clips, tmp_path):
    for k in range(COUNT - 1):
        (tmp_path / f"{k}.npy").write_bytes(b"no array")
    data = dataclasses.replace(DATA, max_bad_share=1.0)
    found = [batch["labels"].tolist() for batch in first(3, clips, data)]
    assert found == [[COUNT - 1] * 3] * 3


def test_an_array_of_other_channels_is_a_bad_clip(clips, tmp_path):
    np.save(tmp_path / "0.npy", pixels(0, channels=4))
    with batches(clips, dataclasses.replace(DATA, max_bad_share=0.5)) as source:
        for _ in range(4):
            assert 0 not in next(source)["labels"]
    assert list(source.bad.values()) == [f"{tmp_path}/0.npy has 4 channels, the model takes 3"]
    four = labelled([tmp_path / "0.npy"] * 3)
    assert first(1, four, shape=ClipShape(4, (16, 16), 4))[0]["clips"].shape[-1] == 4


def test_too_many_bad_clips_end_the_run_and_a_few_do_not(clips, tmp_path):
    (tmp_path / "3.npy").write_bytes(b"no array")
    with batches(clips) as source, pytest.raises(UserError) as error:
        for _ in range(20):
            next(source)
    assert "more than data.max_bad_share 0.05: " in str(error.value)
    assert "3.npy: not an array" in str(error.value)
    # Counted from the start of the run, not from where it resumes.
    with batches(clips) as source:
        source.restore(source.state() | {"read": 990, "left_out": 5})
        for _ in range(20):
            next(source)
        assert source.state()["left_out"] > 5


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_data_set_without_a_readable_clip_ends_the_run(clips, share):
    missing = labelled(f"/nowhere/{i}.npy" for i in range(4))
    data = dataclasses.replace(DATA, max_bad_share=share)
    with batches(missing, data) as source, pytest.raises(UserError, match="no such file"):
        next(source)


def test_a_cache_changes_nothing_of_a_damaged_video(clips, tmp_path):
    """Clips with mostly undecodable frames are refused."""
    path = write_clip(tmp_path / "damaged.mp4", frames=60, b_frames=0, size=(WIDTH * 2, HEIGHT * 2))
    with av.open(str(path)) as container:
        spans = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    position, size = spans[30]
    data = bytearray(path.read_bytes())
    data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    example = Example(str(path), 0)
    with pytest.raises(VideoError, match="9 of the 60 frames asked cannot be decoded"):
        read_whole(example)
    dataset = Dataset((example,) * 3, None, "list.txt")
    options = dict(data=dataclasses.replace(DATA, max_bad_share=1.0), batch_size=1)
    plain = first(6, dataset, **options)
    cached = dataclasses.replace(options["data"], cache_gib=1.0)
    assert_same(first(6, dataset, **options | dict(data=cached)), plain)


@pytest.mark.parametrize("gib", [2e-5, 1.0])
def test_a_cache_changes_nothing_but_what_is_read_again(clips, tmp_path, monkeypatch, gib):
    """Even if one video has a damaged frame, so that only parts of it can be read."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for k, frame in enumerate(pixels(7, frames=12)):
        Image.fromarray(frame).save(folder / f"{k}.png")
    (folder / "10.png").write_bytes(b"no image")
    dataset = labelled([*(e.path for e in clips.examples), folder])
    data = dataclasses.replace(DATA, max_bad_share=0.5)

    def run(data):
        opened = []
        original = pipeline.read_training_clip
        monkeypatch.setattr(
            pipeline,
            "read_training_clip",
            lambda e, *a, **k: (opened.append(e), original(e, *a, **k))[1],
        )
        with batches(dataset, data, batch_size=8) as source:
            found = [next(source) for _ in range(8)]
            state = source.state()
        monkeypatch.setattr(pipeline, "read_training_clip", original)
        return found, state, opened

    plain, state, opened = run(data)
    assert 0 < state["left_out"] < 8 and len(opened) >= state["read"]
    cached, cached_state, again = run(dataclasses.replace(data, cache_gib=gib))
    assert_same(cached, plain)
    assert cached_state == state
    direct = {example.path for example in again}
    # A clip takes 9 * 20 * 24 * 3 = 12960 bytes and 2e-5 GiB are 21475: about two fit.
    assert str(folder) in direct
    if gib == 1.0:  # a clip that the cache has not decoded yet is read once
        paths = [example.path for example in again]
        assert all(paths.count(path) == 1 for path in direct - {str(folder)})
    else:
        assert len(direct) >= 5
    assert len(again) < len(opened)


def test_a_cache_decodes_ahead_and_everything_once(clips, monkeypatch):
    decoded, original = [], cache.read_whole
    monkeypatch.setattr(cache, "read_whole", lambda e: (decoded.append(e), original(e))[1])
    data = dataclasses.replace(DATA, cache_gib=1.0, threads=1)
    with batches(clips, data, batch_size=1) as source:
        next(source)
        end = time.monotonic() + 60
        while len(decoded) < len(clips) and time.monotonic() < end:
            time.sleep(0.01)
        for _ in range(12):
            next(source)
    assert sorted(e.path for e in decoded) == sorted(e.path for e in clips.examples)
    # Filling ends with the batches.
    monkeypatch.setattr(cache, "read_whole", lambda e: (time.sleep(0.2), original(e))[1])
    with batches(clips, data, batch_size=1) as source:
        next(source)
    assert "decode ahead" not in [thread.name for thread in threading.enumerate()]


def test_nothing_is_read_any_more_once_batches_are_closed(clips, monkeypatch):
    """Who closes them may remove the files."""
    begun, ended, original = [], [], pipeline.LoadClip.read

    def slow(self, element, *args):
        begun.append(element)
        time.sleep(0.05)
        found = original(self, element, *args)
        ended.append(element)
        return found

    monkeypatch.setattr(pipeline.LoadClip, "read", slow)
    for _ in range(3):
        with batches(clips, dataclasses.replace(DATA, threads=3), batch_size=1) as source:
            next(source)
        assert sorted(begun) == sorted(ended)


def test_labels_of_several_heads(clips):
    heads = tuple(Example(e.path, (e.label, 10 * e.label)) for e in clips.examples)
    data = dataclasses.replace(DATA, repeats=2)
    batch = first(1, Dataset(heads, None, "list.txt"), data)[0]
    assert batch["labels"].shape == (6, 2) and batch["labels"].dtype == np.int32
    np.testing.assert_array_equal(batch["labels"], batch["clips"][:, 0, 0, 0, :1] // 16 * [1, 10])


def test_clips_without_labels(clips):
    bare = Dataset(tuple(Example(e.path, None) for e in clips.examples), None, "list.txt")
    assert first(1, bare, labelled=False)[0].keys() == {"clips"}
    with pytest.raises(UserError, match="list.txt has no labels"):
        batches(bare)


def test_batches_that_cannot_be_made(clips):
    with pytest.raises(UserError, match="list.txt has 7 clips, train.batch_size is 8; "):
        batches(clips, batch_size=8)
    with pytest.raises(UserError, match="train.batch_size 5 is not a multiple of the 2 processes"):
        batches(clips, batch_size=5, shard=ProcessShard(1, 2))


def test_a_clip_that_is_too_small_for_the_crop_is_a_bad_clip(clips, tmp_path):
    words = r"could not be read, .*\.npy: frames of 20 x 24 pixels .* are smaller"
    large = ClipShape(num_frames=4, size=(32, 32))
    with batches(clips, shape=large) as source, pytest.raises(UserError, match=words):
        next(source)
    # Replaced, not rewritten: grain's threads may still read the old file, which is mapped.
    np.save(tmp_path / "small.npy", pixels(2)[:, :10])
    (tmp_path / "small.npy").replace(tmp_path / "2.npy")
    data = dataclasses.replace(DATA, max_bad_share=0.5)
    with batches(clips, data) as source:
        for _ in range(4):
            next(source)
        assert list(source.bad) == [str(tmp_path / "2.npy")]
        assert "2.npy: frames of 10 x 24" in source.bad[str(tmp_path / "2.npy")]


def test_the_same_clips_are_known_wherever_they_lie(clips, tmp_path):
    states = []
    for place in ("here", "there/deeper"):
        folder = tmp_path / place
        for example in clips.examples:
            target = folder / "data" / ("odd" if example.label % 2 else "even")
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(example.path, target)
        (folder / "list.txt").write_text(
            "".join(f"data/{p.parent.name}/{p.name} 1\n" for p in sorted(folder.rglob("*.npy")))
        )
        both = [read_dataset(folder / "data"), read_dataset(folder / "list.txt")]
        both.append(read_dataset(folder / "list.txt", root=folder))
        states.append([dataset.fingerprint for dataset in both])
    assert states[0] == states[1] and len(set(states[0])) == 2


SCRIPT = """
    import dataclasses, hashlib, json, multiprocessing, os, signal, sys, threading, time

    from vivit_jax.data.datasets.dataset import Dataset, Example
    from vivit_jax.data.pipeline import Batches, ClipShape
    from vivit_jax.errors import UserError
    from vivit_jax.recipes.recipe import AugmentSettings, DataSettings

    def probing(transform, calls=[]):
        def probe(rng, frames):
            calls.append(1)
            if len(calls) < 15:
                return transform(rng, frames)
            import jax._src.xla_bridge

            busy = jax._src.xla_bridge.backends_are_initialized()
            heavy = ("vivit_jax.train", "vivit_jax.models", "torch")
            known = [name for name in sys.modules if name.startswith(heavy)]
            raise UserError(f"backend {busy}, modules {known}")
        return probe

    def main(paths, steps):
        said = {"imported jax": "jax" in sys.modules}
        dataset = Dataset(tuple(Example(p, i) for i, p in enumerate(paths)), None, "list.txt")
        data = DataSettings(sampler="loop", stride=1, workers=2, threads=1, max_bad_share=0.5)
        augment = AugmentSettings(crop="random", flip=0.0)
        options = dict(shape=ClipShape(4, (16, 16)), batch_size=3, seed=5)
        with Batches(dataset, data, augment, **options) as source:
            transform = probing(source._load_clip.transform)
            source._load_clip = dataclasses.replace(source._load_clip, transform=transform)
            digest = hashlib.sha256()

            def interrupt():  # Ctrl-C reaches the workers too, and they must ignore it
                while not over:
                    for worker in multiprocessing.active_children():
                        os.kill(worker.pid, signal.SIGINT)
                    time.sleep(0.05)

            over = []
            threading.Thread(target=interrupt, daemon=True).start()
            for step in range(steps):
                batch = next(source)
                digest.update(batch["clips"].tobytes() + batch["labels"].tobytes())
            workers = multiprocessing.active_children()
            over.append(True)
            said |= {"digest": digest.hexdigest(), "state": source.state(), "workers": len(workers)}
            try:
                while True:
                    next(source)
            except UserError as error:
                said["probe"] = str(error)
        said["left"] = len(multiprocessing.active_children())
        print(json.dumps(said))

    if __name__ == "__main__":
        main(sys.argv[2:], int(sys.argv[1]))
"""


def test_processes_read_the_same_batches_and_end_quietly(clips, tmp_path):
    """Workers hold no device: grain imports jax for its trees, but nothing starts a backend."""
    (tmp_path / "3.npy").write_bytes(b"no array")
    script, steps = tmp_path / "script.py", 7
    script.write_text(textwrap.dedent(SCRIPT))
    paths = [example.path for example in clips.examples]
    done = subprocess.run(
        [sys.executable, script, str(steps), *paths], capture_output=True, text=True, timeout=120
    )
    # Python's tracker cleans up the shared memory of a clip that was on its way, and says so, from
    # Python 3.13 on in two lines.
    noise = re.sub(r".*resource_tracker.*\n|^ *warnings\.warn\(\n", "", done.stderr, flags=re.M)
    assert done.returncode == 0 and not noise.strip(), done.stderr
    said = json.loads(done.stdout)
    digest = hashlib.sha256()
    data = dataclasses.replace(DATA, max_bad_share=0.5)
    with batches(clips, data) as source:
        for batch in (next(source) for _ in range(steps)):
            digest.update(batch["clips"].tobytes() + batch["labels"].tobytes())
        # A run may resume with other workers, or none.
        assert said["state"] == source.state()
    assert said["digest"] == digest.hexdigest()
    assert (said["imported jax"], said["workers"], said["left"]) == (False, 2, 0)
    assert said["probe"].endswith(".npy: backend False, modules []")
