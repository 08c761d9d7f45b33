# SPDX-License-Identifier: Apache-2.0
"""Packs: written, read back bit for bit, interrupted, damaged, and tar shards of others."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import shutil
import tarfile
import zipfile
import zlib

import fsspec
import numpy as np
import pytest
from clips import painted, write_clip
from full_disk import file_size
from PIL import Image
from stores import store

from vivit_jax.data.datasets.dataset import (
    count_frames,
    read_dataset,
    read_frames,
    read_whole,
)
from vivit_jax.data.datasets.packs import Index, expanded, read_index, read_manifest
from vivit_jax.data.packing import pack as packing
from vivit_jax.data.packing.pack import Packing, pack
from vivit_jax.data.packing.verify import changed_clips
from vivit_jax.data.video.decode import read_video
from vivit_jax.errors import UserError, VideoError, WriteError
from vivit_jax.files import block_cache, ranges, storage
from vivit_jax.files.addresses import place
from vivit_jax.files.atomic import whole_file
from vivit_jax.files.reading import content as content_of

SMALL = Packing(shard_bytes=20_000, threads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A list of clips of every kind, two of them parts of one video; all but one are labelled 1."""
    path = tmp_path_factory.mktemp("clips")
    write_clip(path / "a b.mp4", 30)
    write_clip(path / "turned.mov", 20, display=(90, False))
    write_clip(path / "c.mkv", 12, codec="mpeg4")
    np.save(path / "array.npy", np.stack([painted(k) for k in range(9)]))
    np.savez_compressed(path / "array.npz", np.stack([painted(k) for k in range(7)]))
    (path / "frames").mkdir()
    for k in range(12):
        Image.fromarray(painted(k)).save(path / "frames" / f"img_{k:05}.jpg", quality=95)
    pictures = [Image.fromarray(painted(k)) for k in range(6)]
    moving = {"save_all": True, "append_images": pictures[1:], "duration": 100}
    pictures[0].save(path / "w.webp", **moving, lossless=True)
    pictures[0].save(path / "g.gif", **moving)
    lines = ['"a b.mp4" 0', "turned.mov 1", "c.mkv 1", "array.npy 1", "array.npz 1", "w.webp 1"]
    lines += ["g.gif 1", "frames 2 8 1", "frames 1"]
    (path / "list.txt").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def packed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("packs") / "k400"
    pack(listed(data), out, SMALL)
    return out


def test_resized_videos_have_the_same_frames_at_the_same_times(data, tmp_path):
    """What is small enough is the file as it is; arrays and pictures stay too."""
    dataset = listed(data)
    pack(dataset, tmp_path / "out", Packing(shard_bytes=20_000, resize=32))
    found = read_dataset(tmp_path / "out")
    assert [p.path.rpartition(".")[2] for p in found.examples][:7] == [
        "mp4", "mp4", "mp4", "npy", "npz", "mp4", "mp4"
    ]  # fmt: skip
    for ours, theirs in zip(found.examples, dataset.examples, strict=True):
        assert count_frames(ours) == count_frames(theirs)
    (kept,) = [pack(dataset, tmp_path / f"{k}", Packing(resize=k)) for k in (48,)]
    assert kept.clips == len(dataset)
    assert_same(read_dataset(tmp_path / "48"), dataset)


def listed(data, labels=1):
    return read_dataset(data / "list.txt", labels=labels)


def assert_same(found, expected):
    assert len(found) == len(expected)
    np.testing.assert_array_equal(found.labels, expected.labels)
    for ours, theirs in zip(found.examples, expected.examples, strict=True):
        assert count_frames(ours) == count_frames(theirs)
        np.testing.assert_array_equal(read_whole(ours), read_whole(theirs))
        some = [3, 0, 5, 3]
        np.testing.assert_array_equal(read_frames(ours, some), read_frames(theirs, some))


def test_clips_are_the_same_bit_for_bit(data, packed):
    expected = listed(data)
    assert_same(read_dataset(packed), expected)
    assert_same(read_dataset(packed / "manifest.json"), expected)
    shards = sorted(path.name for path in packed.glob("*.tar"))
    assert len(shards) > 3 and shards[0] == "k400-000000.tar"
    assert {path.name for path in packed.iterdir()} == {*shards, "manifest.json", "index.npz"}
    last = len(shards) - 1
    assert_same(read_dataset(f"{packed}/k400-{{000000..{last:06}}}.tar"), expected)


@pytest.mark.parametrize("container", ["tar", "arrayrecord"])
def test_parts_of_videos_stay_parts(data, tmp_path, container):
    """Of all shards and of some; between them whole clips."""
    lines = ['"a b.mp4" 3 12 1', "c.mkv 0 12 0", "c.mkv 2 7 1", "c.mkv 3 9 2", '"a b.mp4" 9 20 0']
    (data / "parts.txt").write_text("\n".join(lines) + "\n")
    expected = read_dataset(data / "parts.txt", labels=1)
    assert [count_frames(each) for each in expected.examples] == [12, 12, 7, 9, 20]
    how = Packing(shard_bytes=1000, container=container)  # each is a shard
    pack(expected, tmp_path / "k", how)
    assert_same(read_dataset(tmp_path / "k"), expected)
    some = read_dataset(f"{tmp_path}/k/k-{{000004,000000,000002}}.{container}")
    lines = [lines[k] for k in (4, 0, 2)]
    (data / "some.txt").write_text("\n".join(lines) + "\n")
    assert_same(some, read_dataset(data / "some.txt", labels=1))


@pytest.mark.parametrize("container", ["tar", "arrayrecord"])
def test_checksums_are_of_whole_clips(tmp_path, container):
    """Of those that are longer than what is copied at a time, too."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 100, 120, 3), np.uint8)
    np.save(tmp_path / "a.npy", noise)
    (tmp_path / "list.txt").write_text("a.npy 0\n")
    manifest = pack(read_dataset(tmp_path / "list.txt"), tmp_path / "k", Packing())
    expected = zlib.crc32((tmp_path / "a.npy").read_bytes())
    assert read_index(str(tmp_path / "k"), manifest).checksums.tolist() == [expected]
    assert changed_clips(str(tmp_path / "k"), 1) == []


def test_tar_files_are_webdatasets(data, packed):
    """By the samples that their members make, and through our own reader without the index."""
    members = {}
    for shard in sorted(packed.glob("*.tar")):
        with tarfile.open(shard) as archive:
            assert all(m.mtime == m.uid == 0 and m.isreg() for m in archive)
            members |= {m.name: archive.extractfile(m).read() for m in archive}
    assert members["000000000.mp4"] == (data / "a b.mp4").read_bytes()
    assert members["000000001.cls"] == b"1"
    assert json.loads(members["000000000.json"]) == {"label": 0, "path": "a b.mp4"}
    with zipfile.ZipFile(io.BytesIO(members["000000007.zip"])) as archive:
        names = [f"{k:06}.jpeg" for k in range(8)]
        assert archive.namelist() == names
        assert archive.read(names[0]) == (data / "frames" / "img_00002.jpg").read_bytes()
    alone = packed.parent / "without"
    shutil.copytree(packed, alone, ignore=shutil.ignore_patterns("manifest.json", "index.npz"))
    assert_same(read_dataset(alone), listed(data))


def test_array_records_are_those_of_the_package(data, tmp_path):
    """Read by its own reader, by number, and by ours from their places; clips cross its blocks."""
    from array_record.python.array_record_module import ArrayRecordReader

    expected, how = listed(data), Packing(shard_bytes=200_000, container="arrayrecord")
    out = tmp_path / "k400"
    manifest = pack(expected, out, how)
    assert_same(read_dataset(out), expected)
    records = []
    for shard in manifest.shards:
        reader = ArrayRecordReader(str(out / shard.name))
        assert reader.num_records() == shard.clips
        records += reader.read_all()
        reader.close()
    paths = [example.path for example in read_dataset(out).examples]
    assert [content_of(path) for path in paths] == records
    assert records[0] == (data / "a b.mp4").read_bytes() and max(map(len, records)) > 2**16
    with pytest.raises(UserError, match="there is no manifest.json beside it"):
        (out / "manifest.json").unlink()
        read_dataset(out)


def test_some_shards_in_their_order(packed):
    whole = read_dataset(packed)
    paths = [example.path for example in whole.examples]
    found = read_dataset(f"{packed}/k400-{{000002,000000}}.tar")
    expected = [p for n in (2, 0) for p in paths if f"k400-00000{n}.tar@" in p]
    assert [example.path for example in found.examples] == expected
    one = read_dataset(packed / "k400-000001.tar")
    assert [e.path for e in one.examples] == [p for p in paths if "k400-000001.tar@" in p]


def test_class_names_and_several_labels(data, tmp_path):
    for name in ("walk", "run"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        shutil.copy(data / "c.mkv", tmp_path / "classes" / name / f"{name}.mkv")
    pack(read_dataset(tmp_path / "classes"), tmp_path / "named", SMALL)
    found = read_dataset(tmp_path / "named")
    assert found.classes == ("run", "walk") and found.labels[:, 0].tolist() == [0, 1]
    assert read_dataset(tmp_path / "named", labels=0).labels.shape == (2, 0)
    with pytest.raises(UserError, match="1 labels for each clip; expected 2"):
        read_dataset(tmp_path / "named", labels=2)
    (tmp_path / "names.txt").write_text("one\n")
    with pytest.raises(UserError, match="has label 1, and .*names.txt names classes 0 to 0"):
        read_dataset(tmp_path / "named", class_names=tmp_path / "names.txt")
    (tmp_path / "two.txt").write_text(
        f"{data / 'c.mkv'} 3 4\n{data / 'a b.mp4'} 5 6\n".replace(
            f"{data / 'a b.mp4'}", f'"{data / "a b.mp4"}"'
        )
    )
    pack(read_dataset(tmp_path / "two.txt", labels=2), tmp_path / "two", SMALL)
    assert read_dataset(tmp_path / "two").labels.tolist() == [[3, 4], [5, 6]]


def test_the_data_may_move(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "elsewhere")
    assert read_dataset(tmp_path / "elsewhere").fingerprint == read_dataset(packed).fingerprint


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Killed(BaseException):
    """As good as SIGKILL where nothing cleans up after it."""


@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_pack_goes_on(data, tmp_path, monkeypatch, seed):
    """Ended at random writes; at last its bytes are those of the undisturbed one."""
    rng, out, dataset = (
        np.random.default_rng(seed),
        tmp_path / "k400",
        listed(data),
    )
    how = dataclasses.replace(SMALL, container=("tar", "arrayrecord")[seed % 2])
    whole = tmp_path / "whole" / "k400"
    pack(dataset, whole, how)
    write, moments = packing.write_json, itertools.count()

    def dying(path, values):
        if next(moments) == when:
            raise Killed
        write(path, values)

    monkeypatch.setattr(packing, "write_json", dying)
    for _ in range(3):
        when, moments = int(rng.integers(0, 4)), itertools.count()
        try:
            pack(dataset, out, how)
        except Killed:
            assert not (out / "manifest.json").exists()
    when = -1
    seen = []
    pack(dataset, out, how, lambda done, total: seen.append((done, total)))
    assert content(out) == content(whole) and (not seen or seen[-1] == (9, 9))
    pack(dataset, out, how)  # which looks whether it is whole
    assert content(out) == content(whole)


def test_a_finished_shard_that_was_damaged_is_written_again(data, packed, tmp_path, monkeypatch):
    out, dataset = tmp_path / "k400", listed(data)
    write = packing.write_json
    monkeypatch.setattr(
        packing,
        "write_json",
        lambda path, values: (
            write(path, values) if "000003" not in path.name else (_ for _ in ()).throw(Killed())
        ),
    )
    with pytest.raises(Killed):
        pack(dataset, out, SMALL)
    damaged = bytearray((out / "k400-000001.tar").read_bytes())
    damaged[700] ^= 1
    (out / "k400-000001.tar").write_bytes(damaged)
    monkeypatch.undo()
    pack(dataset, out, SMALL)
    assert content(out) == content(packed)
    (out / "k400-000001.tar").write_bytes(damaged)
    with pytest.raises(UserError, match="k400-000001.tar is damaged: its content is not what"):
        pack(dataset, out, SMALL)


def test_other_packs_and_files_are_not_touched(data, packed, tmp_path):
    dataset, before = listed(data), content(packed)
    with pytest.raises(UserError, match="holds a pack of other clips or with other settings"):
        pack(dataset, packed, Packing(shard_bytes=30_000))
    with pytest.raises(UserError, match="holds a pack of other clips or with other settings"):
        pack(listed(data, labels=0), packed, SMALL)
    assert content(packed) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds 1 other file, such as notes.txt; expected a new"):
        pack(dataset, tmp_path, SMALL)
    assert content(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("container", ["tar", "arrayrecord"])
@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "it became longer"),
        (lambda path: os.truncate(path, 50), "it became shorter"),
        (lambda path: path.unlink(), "No such file or directory"),
    ],
)
def test_a_clip_that_changes_while_it_is_packed_is_named(
    data, tmp_path, monkeypatch, container, change, how
):
    """And never packed in part; what is whole by then stays, and the same command goes on."""
    for k in range(6):
        shutil.copy(data / "a b.mp4", tmp_path / f"{k}.mp4")
    (tmp_path / "list.txt").write_text("".join(f"{k}.mp4 0\n" for k in range(6)))
    dataset, added = read_dataset(tmp_path / "list.txt"), packing._added

    def changing(shard, dataset, member):
        if member.index == 4:
            change(tmp_path / "4.mp4")
        return added(shard, dataset, member)

    monkeypatch.setattr(packing, "_added", changing)
    packed = Packing(shard_bytes=20_000, container=container, max_bad_share=0.2)
    with pytest.raises(UserError, match=f"/4.mp4 changed while it was packed: {how}; the same"):
        pack(dataset, tmp_path / "k400", packed)
    assert [*(tmp_path / "k400").glob("*.json")]
    monkeypatch.undo()
    shutil.copy(data / "a b.mp4", tmp_path / "4.mp4")
    assert pack(dataset, tmp_path / "k400", packed).clips == 6


@pytest.mark.parametrize("container", ["tar", "arrayrecord"])
def test_a_full_disk_is_named_and_leaves_nothing(data, tmp_path, container):
    """Also the temporary directory, where shards for storage and smaller videos are written."""
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "in" / "a.mp4", 60, size=(128, 96))
    dataset = read_dataset(tmp_path / "in")
    full = f"k400-000000.{container} cannot be written: File too large; make room"
    with file_size(3000), pytest.raises(WriteError, match=full):
        pack(dataset, tmp_path / "k400", Packing(container=container))
    with file_size(3000), pytest.raises(WriteError, match="a.mp4: .* takes no more .File too la"):
        pack(dataset, tmp_path / "k400", Packing(container=container, resize=64))
    told = pytest.raises(WriteError, match="k400.tar: .*; make room, or name another TMPDIR")
    with file_size(3000), told, whole_file(place("s3://bucket/k400.tar")) as partial:
        partial.write_bytes(bytes(4000))
    assert not (tmp_path / "k400").exists()


def test_two_processes_do_not_pack_into_one_directory(data, tmp_path, monkeypatch):
    """A lock is a file's that is open, so a second one in this process stands for the other."""
    dataset, added, told = listed(data), packing._added, []

    def meanwhile(shard, dataset, member):
        if not told:
            told.append(0)
            with pytest.raises(UserError, match="k: another process is packing into it; wait for"):
                pack(dataset, tmp_path / "k", Packing(shard_bytes=30_000))
        return added(shard, dataset, member)

    monkeypatch.setattr(packing, "_added", meanwhile)
    pack(dataset, tmp_path / "k", SMALL)
    assert told
    assert_same(read_dataset(tmp_path / "k"), dataset)


def test_clips_that_cannot_be_read_are_left_out_and_named(data, tmp_path):
    lines = [f'"{data / "a b.mp4"}" 0'] * 30
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    lines[7] = "bad.mp4 0"
    (tmp_path / "list.txt").write_text("\n".join(lines))
    manifest = pack(read_dataset(tmp_path / "list.txt"), tmp_path / "out", SMALL)
    ((name, why),) = manifest.left_out.items()
    assert name == str(tmp_path / "bad.mp4") and "no readable video" in why
    assert len(read_dataset(tmp_path / "out")) == manifest.clips == 29
    lines[3:9] = ["bad.mp4 0"] * 6
    (tmp_path / "list.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match="6 of 20 clips cannot be read, more than --max-bad-share"):
        pack(read_dataset(tmp_path / "list.txt"), tmp_path / "worse", SMALL)
    (tmp_path / "list.txt").write_text("bad.mp4 0\n")
    with pytest.raises(UserError, match="1 of 1 clip cannot be read"):
        pack(read_dataset(tmp_path / "list.txt"), tmp_path / "none", SMALL)
    assert not (tmp_path / "none").exists()


def test_unreadable_clips_at_the_end_of_an_interrupted_pack(data, tmp_path, monkeypatch):
    """No shard is made for them, and none is said to be unreadable that is not."""
    lines = [f'"{data / "a b.mp4"}" 0'] * 60 + ["bad.mp4 0", "worse.mp4 0"]
    for name in ("bad.mp4", "worse.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset, how = read_dataset(tmp_path / "list.txt"), Packing(shard_bytes=150_000, threads=1)
    expected = pack(dataset, tmp_path / "whole" / "k400", how)
    assert len(expected.left_out) == 2 and expected.clips == 60
    write = packing.write_json

    def dying(path, values):  # when the last shard is there, before what follows it
        if path.name == "manifest.json":
            raise Killed
        write(path, values)

    monkeypatch.setattr(packing, "write_json", dying)
    with pytest.raises(Killed):
        pack(dataset, tmp_path / "k400", how)
    notes = sorted(path for path in (tmp_path / "k400").glob("*.tar.json"))
    last = json.loads(notes[-1].read_text())
    assert last["next"] == 62 and len(last["left_out"]) == 2
    # As if it had been killed before it looked at the last two.
    notes[-1].write_text(json.dumps(last | {"next": 60, "left_out": {}}))
    monkeypatch.undo()
    assert pack(dataset, tmp_path / "k400", how) == expected
    assert content(tmp_path / "k400") == content(tmp_path / "whole" / "k400")
    notes[-1].write_text("[]")
    (tmp_path / "k400" / "manifest.json").unlink()
    notes[0].write_text('{"other": 1}')
    with pytest.raises(UserError, match="is no note of a pack that was begun; remove it"):
        pack(dataset, tmp_path / "k400", how)


def test_unreadable_clips_of_a_pack_that_was_begun_count(data, tmp_path, monkeypatch):
    """A pack that is interrupted and goes on leaves out no more than one that is not."""
    lines = [f'"{data / "a b.mp4"}" 0'] * 40
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for k in (2, 21, 30):  # 1 of 20, and 3 of 31
        lines[k] = "bad.mp4 0"
    (tmp_path / "list.txt").write_text("\n".join(lines))
    dataset, added = read_dataset(tmp_path / "list.txt"), packing._added
    how = Packing(shard_bytes=20_000, threads=1, max_bad_share=0.095)

    def dying(shard, dataset, member):
        if member.index == 25:
            raise Killed
        return added(shard, dataset, member)

    monkeypatch.setattr(packing, "_added", dying)
    with pytest.raises(Killed):
        pack(dataset, tmp_path / "k400", how)
    monkeypatch.undo()
    with pytest.raises(UserError, match="3 of 31 clips cannot be read, more than"):
        pack(dataset, tmp_path / "k400", how)


def test_a_pack_that_was_begun_in_storage_goes_on(data, tmp_path, monkeypatch):
    """A shard of another size is written again; nothing but the pack is there in the end."""
    dataset, out, added = listed(data), place("memory://b/begun/k400"), packing._added
    expected = pack(dataset, tmp_path / "k400", SMALL)

    def dying(shard, dataset, member):
        if member.index == 5:
            raise Killed
        return added(shard, dataset, member)

    monkeypatch.setattr(packing, "_added", dying)
    with pytest.raises(Killed):
        pack(dataset, out, SMALL)
    files = fsspec.filesystem("memory")
    last = sorted(files.glob("/b/begun/k400/*.tar"))[-1]
    files.pipe(last, files.cat(last)[:-1])
    ranges.forget()
    monkeypatch.undo()
    assert pack(dataset, out, SMALL) == expected
    there = {path.rpartition("/")[2]: files.cat(path) for path in files.find("/b/begun/k400")}
    assert there == content(tmp_path / "k400")


def damaged(packed, tmp_path, change):
    out = tmp_path / "k400"
    shutil.copytree(packed, out)
    change(out)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "k400-000001.tar").unlink(), "1 of its .* shards are missing, such as"),
        (
            lambda out: (out / "k400-000001.tar").write_bytes(b"x" * 600),
            "k400-000001.tar has 600 bytes; manifest.json says .*: it is cut off or of another",
        ),
        (lambda out: (out / "k400-000001.tar").write_bytes(b""), "an empty shard"),
        (lambda out: (out / "index.npz").write_bytes(b"x"), "is not the index of the shards"),
        (lambda out: (out / "index.npz").unlink(), "index.npz: No such file or directory; get"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json: no JSON"),
        (lambda out: (out / "manifest.json").write_text("{}"), "no manifest of a pack"),
        (
            lambda out: (out / "manifest.json").write_text('{"format": "vivit_jax pack"}'),
            "a pack of version None; this release reads 1",
        ),
    ],
)
def test_damaged_packs_are_refused(packed, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as found:
        read_dataset(damaged(packed, tmp_path, change))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "^[^:]*manifest.json: a pack of version 2; this release reads 1$"),
        ({"shards": []}, "damaged: no shards, or two of one name"),
        ({"shards": "abc"}, "damaged: shards is 'abc', not of type list"),
        ({"shards": [{"name": 7}]}, "damaged: name is 7, not of type str"),
        ({"clips": None}, "damaged: clips is None, not of type int"),
        ({"clips": 3}, "index.npz does not fit manifest.json: one is damaged"),
    ],
)
def test_a_damaged_manifest_is_refused(packed, tmp_path, changes, message):
    def change(out):
        values = json.loads((out / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps(values | changes))

    with pytest.raises(UserError, match=message):
        read_dataset(damaged(packed, tmp_path, change))


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": lambda shards: shards + 1},
        {"shards": lambda shards: shards * 0},
        {"starts": lambda starts: starts[1:]},
        {"lengths": lambda lengths: -lengths},
        {"labels": lambda labels: labels - 2},
        {"names": lambda names: names[:20]},
        {"extents": lambda extents: np.zeros((1, 2), np.int32)},
        {"checksums": lambda sums: sums[1:]},
    ],
)
def test_an_index_that_cannot_be_the_manifest_s_is_refused(packed, tmp_path, changes):
    """Though its checksum is right: both were changed."""

    def change(out):
        index = Index.from_npz((out / "index.npz").read_bytes())
        made = {name: made(getattr(index, name)) for name, made in changes.items()}
        data = dataclasses.replace(index, **made).to_npz()
        (out / "index.npz").write_bytes(data)
        values = json.loads((out / "manifest.json").read_text())
        values["index_sha256"] = hashlib.sha256(data).hexdigest()
        (out / "manifest.json").write_text(json.dumps(values))

    with pytest.raises(UserError, match="index.npz does not fit manifest.json: one is damaged"):
        read_dataset(damaged(packed, tmp_path, change))
    with pytest.raises(ValueError, match="starts is not a file"):
        np.savez(tmp_path / "other.npz", shards=np.zeros(1))
        Index.from_npz((tmp_path / "other.npz").read_bytes())


@pytest.mark.parametrize("container", ["tar", "arrayrecord"])
def test_shards_of_equal_sizes_that_were_swapped_are_refused(tmp_path, container):
    """Arrays of one shape begin at the same places: a swap would give clips with others' labels."""
    for k in range(6):
        np.save(tmp_path / f"{k}.npy", np.full((4, 8, 8, 3), k, np.uint8))
    (tmp_path / "list.txt").write_text("".join(f"{k}.npy {k}\n" for k in range(6)))
    size = 1000 if container == "arrayrecord" else 4000
    how = Packing(shard_bytes=size, container=container)
    manifest = pack(read_dataset(tmp_path / "list.txt"), tmp_path / "k", how)
    first, second, *_ = (tmp_path / "k" / shard.name for shard in manifest.shards)
    assert first.stat().st_size == second.stat().st_size
    assert [read_whole(each)[0, 0, 0, 0] for each in read_dataset(tmp_path / "k").examples][1] == 1
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    wrong = "its first clip is not the one that index.npz says: shards were swapped"
    for source in (tmp_path / "k", tmp_path / "k" / f"k-{{000000,000001}}.{container}"):
        with pytest.raises(UserError, match=wrong):
            read_dataset(source)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("k400-{000000..000999}.tar", "does not have 9.. of 1000 shards, such as k400-000"),
        ("other-000000.tar", "does not have 1 of 1 shards"),
        ("k400-{000000..}.tar", "is no range and no list"),
        ("k400-{000000.tar", "a brace without the other"),
        ("k400-{000000,000000}.tar", "names 1 of its shards twice"),
        ("k400-{0..99999999}.tar", "more than 100,000 shards"),
    ],
)
def test_wrong_names_of_shards(packed, pattern, message):
    with pytest.raises(UserError, match=message):
        read_dataset(f"{packed}/{pattern}")


def test_a_shard_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="nowhere-000000.tar: No such file or directory"):
        read_dataset(tmp_path / "nowhere-000000.tar")
    with pytest.raises(UserError, match="2 of its 2 shards are missing, such as .*-0.tar"):
        read_dataset(f"{tmp_path}/nowhere-{{0..1}}.tar")


def test_a_damaged_clip_in_a_shard_is_named(packed, tmp_path):
    out = tmp_path / "k400"
    shutil.copytree(packed, out)
    example = read_dataset(out).examples[0]
    shard = out / "k400-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512:1512] = bytes(1000)
    shard.write_bytes(content)
    with pytest.raises(VideoError, match=r"k400-000000.tar@512\+[0-9]+/000000000.mp4: "):
        read_whole(example)
    shard.write_bytes(content[:800])  # cut off after it was listed
    with pytest.raises(VideoError, match=r"000000000.mp4: cut off: its shard has 800 bytes of"):
        read_whole(example)


def test_braces():
    assert [*expanded("k-{000..002}.tar")] == ["k-000.tar", "k-001.tar", "k-002.tar"]
    assert [*expanded("k-{8..10}")] == ["k-8", "k-9", "k-10"]
    assert [*expanded("k-{08..10}")] == ["k-08", "k-09", "k-10"]
    assert [*expanded("{a,b}-{1..0}")] == ["a-1", "a-0", "b-1", "b-0"]
    assert [*expanded("plain.tar")] == ["plain.tar"]


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_shards_of_others(data, tmp_path):
    """Long names, folders, hidden files, other members; labels by number, name and JSON."""
    clip = (data / "c.mkv").read_bytes()
    expected = read_video(data / "c.mkv", indices=[2])
    long = "x" * 150
    members = [
        ("./b/one.mkv", clip),
        ("./b/one.cls", b"3\n"),
        (f"b/{long}.json", b'{"label": 5, "caption": "x"}'),
        (f"b/{long}.mkv", clip),
        ("b/._one.mkv", b"mac"),
        ("b/one.txt", b"a caption"),
        ("c/one.seg.mkv", clip),
        ("c/one.cls", b"1"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "s-0.tar", members, format=form)
        found = read_dataset(tmp_path / "s-0.tar")
        assert found.labels[:, 0].tolist() == [3, 5, 1] and found.classes is None
        for example in found.examples:
            np.testing.assert_array_equal(read_frames(example, [2]), expected)
    write_tar(tmp_path / "s-1.tar", [("z.mkv", clip), ("z.cls", b"run")])
    write_tar(tmp_path / "s-2.tar", [("y.mkv", clip), ("y.json", b'{"class": "eat"}')])
    named = read_dataset(f"{tmp_path}/s-{{1..2}}.tar")
    assert named.classes == ("eat", "run") and named.labels[:, 0].tolist() == [1, 0]
    write_tar(tmp_path / "s-3.tar", [("k.mkv", clip)])
    assert read_dataset(tmp_path / "s-3.tar").labels_per_example == 0


def test_links_in_shards_of_others_stand_for_their_members(data, tmp_path):
    """tar writes a file's second name as a hard link; both forms, before and after their files."""
    clip = (data / "c.mkv").read_bytes()
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE

    def link(name, target, kind):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        return member

    def write(*members):
        with tarfile.open(tmp_path / "s.tar", "w") as archive:
            for each in members:
                if isinstance(each, tarfile.TarInfo):
                    archive.addfile(each)
                    continue
                member = tarfile.TarInfo(each[0])
                member.size = len(each[1])
                archive.addfile(member, io.BytesIO(each[1]))

    write(
        link("first.mkv", "x/a.mkv", soft),
        link("first.cls", "./x/a.cls", hard),
        ("x/a.mkv", clip),
        ("x/a.cls", b"3"),
        link("x/b.mkv", "x/a.mkv", hard),
        ("x/b.cls", b"4"),
        link("x/c.mkv", "b.mkv", soft),
        ("x/c.cls", b"5"),
    )
    found = read_dataset(tmp_path / "s.tar")
    assert found.labels[:, 0].tolist() == [3, 3, 4, 5]
    assert [content_of(each.path) for each in found.examples] == [clip] * 4
    names = [each.path.rpartition("/")[2] for each in found.examples]
    assert names == ["first.mkv", "a.mkv", "b.mkv", "c.mkv"]
    for target, kind in (("../x.mkv", soft), ("gone.mkv", hard), ("a.mkv", soft)):
        write(link("a.mkv", target, kind))
        with pytest.raises(UserError, match="s.tar: a.mkv is a link to .*, which is no file in it"):
            read_dataset(tmp_path / "s.tar")


def test_shards_of_others_in_storage_are_looked_at_once(tmp_path, monkeypatch):
    """With a cache; a file that became another is looked at again."""
    monkeypatch.setenv(block_cache.DIRECTORY, str(tmp_path / "cache"))
    files, counts = fsspec.filesystem("memory"), []
    labels = [("a.cls", b"3"), ("b.json", b'{"label": [1, 2]}'), ("c.cls", b"run"), ("d.txt", b"")]
    for (name, text), clip in itertools.product(labels, (b"x", b"another")):
        write_tar(tmp_path / "s.tar", [(f"{name[0]}.mkv", clip), (name, text)])
        files.pipe("/b/others/s.tar", (tmp_path / "s.tar").read_bytes())
        expected = read_dataset(tmp_path / "s.tar")
        for _ in range(2):
            ranges.forget()
            before = storage.TRAFFIC.bytes_read
            found = read_dataset("memory://b/others/s.tar")
            counts.append(storage.TRAFFIC.bytes_read - before)
            assert found.classes == expected.classes
            assert [each.label for each in found.examples] == [
                each.label for each in expected.examples
            ]
            assert [content_of(each.path) for each in found.examples] == [clip]
    assert min(counts[::2]) > 1000 and counts[1::2] == [0] * len(labels) * 2


def test_what_is_not_read_of_shards_of_others_is_said(tmp_path, caplog):
    """Labels without a clip, and clips and folders beside the shards."""
    members = [("a.mkv", b"x"), ("./a.cls", b"3"), ("b.cls", b"1"), ("__meta__/c.mkv", b"x")]
    write_tar(tmp_path / "S.TAR", members)
    found = read_dataset(tmp_path / "S.TAR")
    assert found.labels[:, 0].tolist() == [3] and content_of(found.examples[0].path) == b"x"
    assert caplog.messages == [f"{tmp_path}/S.TAR: 1 label without a clip, such as b"]
    caplog.clear()
    (tmp_path / "run").mkdir()
    (tmp_path / "c.mp4").touch()
    (tmp_path / "readme.txt").touch()
    assert len(read_dataset(tmp_path)) == 1
    others = "other clips and folders there are not read: 2, such as c.mp4"
    assert caplog.messages[0] == f"{tmp_path}: read by its 1 shard; {others}"


@pytest.mark.parametrize("name", ["s.tar.gz", "s.tgz", "s.tar", "{s,t}.tar.gz", "s.tar.zst"])
def test_a_compressed_shard_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / name, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.mkv"))
    with pytest.raises(UserError, match="a compressed tar file.*; decompress it, such as with gun"):
        read_dataset(tmp_path / name)


def test_what_follows_the_end_of_a_shard_is_refused(tmp_path):
    """`cat` of two tar files, of which readers see the first; the padding of tar's is none."""
    write_tar(tmp_path / "s.tar", [("a.mkv", b"x")])
    one = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(one + bytes(2**21))
    assert len(read_dataset(tmp_path / "s.tar")) == 1
    for more in (one, bytes(2**21) + b"x"):
        (tmp_path / "s.tar").write_bytes(one + more)
        with pytest.raises(UserError, match="s.tar: more follows the end mark at byte 1,024"):
            read_dataset(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("text", "expected"), [("7", 7), (" 007\n", 7), ('["1", 2]', (1, 2)), ('"12"', 12)]
)
def test_numbers_that_are_written_as_texts(tmp_path, text, expected):
    """In the order of names 10 would come before 2."""
    json_, cls = ("a.json", f'{{"label": {text}}}'.encode()), ("a.cls", text.encode())
    write_tar(tmp_path / "s.tar", [("a.mkv", b"x"), json_ if text[0] in '"[' else cls])
    assert read_dataset(tmp_path / "s.tar").examples[0].label == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.mkv", b"x"), ("a.cls", b"-1")], "a.cls: label '-1'; expected a number from 0"),
        ([("a.mkv", b"x"), ("a.cls", b"1 2")], "a.cls: label '1 2'; expected a number from 0"),
        ([("a.mkv", b"x"), ("a.cls", b"9" * 5000)], "a.cls: label '999.*; expected a number"),
        ([("a.mkv", b"x"), ("a.mp4", b"y")], "two clips are named a: a.mkv and a.mp4"),
        ([("a.txt", b"x")], "no clips in it"),
        ([("a.mkv", b"x"), ("a.json", b"{")], "a.json: no JSON"),
        ([("a.mkv", b"x"), ("a.json", b'{"label": 1.5}')], "a.json: label 1.5; expected"),
        ([("a.mkv", b"x"), ("a.cls", b"1"), ("b.mkv", b"x")], "differing numbers of labels"),
        ([("a.mkv", b"x"), ("a.cls", b"1"), ("b.mkv", b"x"), ("b.cls", b"run")], "expected one"),
    ],
)
def test_wrong_shards_of_others(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path / "s.tar")


def test_two_shards_with_one_name(tmp_path):
    for number in range(2):
        write_tar(tmp_path / f"s-{number}.tar", [("a.mkv", b"x")])
    with pytest.raises(UserError, match="two clips are named a, in s-0.tar and s-1.tar; leave out"):
        read_dataset(f"{tmp_path}/s-{{0..1}}.tar")


@pytest.mark.parametrize("length", [100, 512, 700, 1100, 1536, 1800])
def test_a_tar_file_that_is_cut_off_anywhere(tmp_path, length):
    write_tar(tmp_path / "s.tar", [("a.mkv", b"x" * 400), ("b.mkv", b"x" * 400)])
    whole = (tmp_path / "s.tar").read_bytes()
    assert len(read_dataset(tmp_path / "s.tar")) == 2
    (tmp_path / "s.tar").write_bytes(whole[:length])
    with pytest.raises(UserError, match="s.tar: no uncompressed tar file, or cut off"):
        read_dataset(tmp_path / "s.tar")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "container"), [("s3", "tar"), ("gs", "tar"), ("s3", "arrayrecord")]
)
def test_packs_in_storage(data, tmp_path, protocol, container):
    """Written there and read there, the same bytes and clips; one clip takes a part of a shard."""
    expected, how = listed(data), dataclasses.replace(SMALL, container=container)
    here = pack(expected, tmp_path / "k400", how)
    with store(protocol) as bucket:
        pack(expected, place(f"{bucket}/packs/k400"), how)
        manifest = read_manifest(f"{bucket}/packs/k400")
        assert manifest == here
        assert_same(read_dataset(f"{bucket}/packs/k400"), expected)
        last = len(manifest.shards) - 1
        names = f"k400-{{000000..{last:06}}}.{container}"
        assert_same(read_dataset(f"{bucket}/packs/k400/{names}"), expected)
        pack(expected, place(f"{bucket}/packs/k400"), how)
        with pytest.raises(UserError, match="holds a pack of other clips"):
            pack(expected, place(f"{bucket}/packs/k400"), Packing(shard_bytes=30_000))
        with pytest.raises(UserError, match="999"):
            read_dataset(f"{bucket}/packs/k400/k400-{{000000..000999}}.{container}")
