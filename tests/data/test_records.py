# SPDX-License-Identifier: Apache-2.0
"""TFRecord files of SequenceExamples, as tensorboardX frames them and protobuf writes them."""

import base64
import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from commands import run_command
from PIL import Image
from tensorboardX.record_writer import masked_crc32c

from vivit_jax.data.datasets import records
from vivit_jax.data.datasets.check import find_copies, inspect
from vivit_jax.data.datasets.dataset import (
    count_frames,
    read_dataset,
    read_frames,
    read_training_clip,
    read_views,
    read_whole,
)
from vivit_jax.data.datasets.records import is_records
from vivit_jax.errors import UserError, VideoError

# A file that TensorFlow 2.21 wrote: one record of three grey pictures, of class 3, "swim", with a
# time and sound.
TENSORFLOW = zlib.decompress(
    base64.b85decode(
        "c-oWTU;u-R&mYveqPQfv1d?+y3-ogmlTvf^GxJhXD}-"
        "33n7J64xum)Hk)%peD@ueoxY)Q@ipw)|xfHlWz>>u!iA5#)C7HRYKvr&n5Qh{{#er!XnS^%ob7^vkhdYM3y7>qB>"
        "Zhe9mXsEy>Zj%8Czcco@p178adCm%V$Z<PV9(Xf&&8XWo0y)epPHAPpOTs)^plV4Hw)Jf7Ot-"
        ">|8M+%z#!n|=IO@32n0HeIt&c|Z!<VEFf%cM5D>5c5i18PD+>!N7dtx}2M-"
        "qy4>uP#H!q)%056{)A2+vvn1G<Lh^VM255KsCn23ash^Pq25JqO89u`(kR#r|CUT$6ylEME241ydCEDS8njDieIf"
        "{e_9jQ@`?$TKi7vND1J0~9ba0o};P&cVsW4OFmIfPsmTnVE@&8RTl9Y%Nfpfklv2NYT)dO*k--U8zvSsBz*#4rQl"
        "}2StM}eo!$^Dr(~75)+q@lu}hw*U;25F*P%{u(Wb^admU|@bn4}2@MO6h>S{3Nli=7$jmA(DJ?6nsH|#kX>Duo=<"
        "J#_dCJsj(`U?_wP^8@rOTGDSh;G`<}F*dZQrqT*P+8ljvhOH;^e7Im#<vCcKyc9TMr*Se)9C$^A|5)ef;$K%hzw;"
        "fBgIf@)simGb0RO^%pP@7@1gDm|56C{$gY*2PqI_VO2C_6LJh>Pb?HxGHT=yahkYr<3Ubk<Dd_sNktdA#8gZks(u"
        "7{4eT@GJk~^(&)^<I`0Ew}4>Kb$@|XpI>G99~1^oYSj;6lR)He{R@8`b;dtmDO#lrQSh3m^`>Kjdc^h|v(G?@S2+"
        "$($KHUO1Uflm"
    )
)
rng = np.random.default_rng(0)


def jpeg(frame):
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=95)
    return file.getvalue()


def decoded(frame):
    return np.asarray(Image.open(io.BytesIO(jpeg(frame))).convert("RGB"))


def example(frames, labels=(), text=None, **others):
    """A SequenceExample by protobuf's own message class."""
    found = records._message()()
    if labels:
        found.context.feature[records.LABELS].int64_list.value.extend(labels)
    if text is not None:
        found.context.feature[records.TEXTS].bytes_list.value.append(text.encode())
    for name, value in others.items():
        found.context.feature[name].bytes_list.value.append(value)
    for frame in frames:
        feature = found.feature_lists.feature_list[records.FRAMES].feature.add()
        feature.bytes_list.value.append(frame)
    return found.SerializeToString()


def write(path, *contents):
    with open(path, "wb") as file:
        for content in contents:
            length = struct.pack("<Q", len(content))
            for part in (length, content):
                file.write(part + struct.pack("<I", masked_crc32c(part)))
    return path


@pytest.fixture(scope="module")
def clips():
    """Five clips of 6 to 10 frames, of two classes."""
    return [rng.integers(0, 256, (6 + k, 20, 24, 3), np.uint8) for k in range(5)]


@pytest.fixture
def shards(clips, tmp_path):
    parts = [
        example(map(jpeg, clip), [k % 2], ("run", "swim")[k % 2]) for k, clip in enumerate(clips)
    ]
    write(tmp_path / "train.tfrecord-00000-of-00002", *parts[:2])
    write(tmp_path / "train.tfrecord-00001-of-00002", *parts[2:])
    return tmp_path


def test_frames_are_those_of_the_pictures(shards, clips):
    for source in (shards, f"{shards}/train.tfrecord@2"):
        dataset = read_dataset(source)
        assert dataset.classes == ("run", "swim")
        assert dataset.labels.ravel().tolist() == [0, 1, 0, 1, 0]
        for each, clip in zip(dataset.examples, clips, strict=True):
            assert count_frames(each) == len(clip)
            expected = np.stack([decoded(frame) for frame in clip])
            np.testing.assert_array_equal(read_whole(each), expected)
            np.testing.assert_array_equal(read_frames(each, [4, 1, 1]), expected[[4, 1, 1]])
    how = dict(num_frames=3, stride=2, sampler="loop")
    drawn = read_training_clip(dataset.examples[4], np.random.default_rng(1), **how)
    assert drawn.shape == (3, 20, 24, 3)
    views, indices = read_views(dataset.examples[0], clips=2, **how)
    np.testing.assert_array_equal(views[0, 0], decoded(clips[0][indices[0, 0]]))


def test_a_file_of_tensorflow(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(TENSORFLOW)
    (found,) = read_dataset(tmp_path / "a.tfrecord").examples
    assert found.label == 3 and found.path == "a.tfrecord[0]"
    frames = read_whole(found).astype(int)
    assert frames.shape == (3, 4, 4, 3)
    assert np.abs(frames - np.array([20, 80, 140])[:, None, None, None]).max() <= 1


def test_one_file_without_labels(shards):
    path = shards / "train.tfrecord-00001-of-00002"
    dataset = read_dataset(path, labels=0)
    assert [e.label for e in dataset.examples] == [None] * 3 and dataset.classes is None
    assert [e.path for e in dataset.examples][:2] == [f"{path.name}[0]", f"{path.name}[1]"]


def test_several_labels_and_long_contexts(clips, tmp_path):
    """A context of more bytes than are read at first, and one that comes last."""
    one = example(map(jpeg, clips[0]), [3, 70000], audio=bytes(9000))
    found = records._message().FromString(one)
    context, lists = found.context.SerializeToString(), found.feature_lists.SerializeToString()

    def field(number, content):
        size, out = len(content), bytearray([number << 3 | 2])
        while size > 127:
            out.append(size & 127 | 128)
            size >>= 7
        return bytes([*out, size]) + content

    late = field(2, lists) + field(1, context)
    write(tmp_path / "a.tfrecord", one, late)
    dataset = read_dataset(tmp_path / "a.tfrecord", labels=2)
    assert [e.label for e in dataset.examples] == [(3, 70000)] * 2 and dataset.classes is None
    np.testing.assert_array_equal(*(read_whole(e) for e in dataset.examples))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.tfrecord", True),
        ("k400/train.tfrecord-00003-of-01024", True),
        ("train-00003-of-01024.tfrecord", True),
        ("gs://b/train.tfrecord@1024", True),
        ("tfrecord", False),
        ("list.txt", False),
        ("clip.mp4", False),
    ],
)
def test_names_of_records(path, expected):
    assert is_records(path, None) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8bnot a record, but zipped", "byte 0: no TFRecord begins here"),
        (b"", "no records in it"),
        (b"short", "byte 0: no TFRecord begins here"),
    ],
)
def test_files_that_are_no_records(content, message, tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_dataset(tmp_path / "a.tfrecord")


def test_other_mistakes(clips, tmp_path):
    frames = [jpeg(frame) for frame in clips[0]]
    path = write(tmp_path / "a.tfrecord", example(frames, [1]), example(frames))
    with pytest.raises(UserError, match="labels in clip/label/index: 1 in record 0, 0 in record 1"):
        read_dataset(path)
    with pytest.raises(UserError, match="expected 2 in each record"):
        read_dataset(write(path, example(frames, [1])), labels=2)
    with pytest.raises(UserError, match="class 1 is run and swim in clip/label/text"):
        read_dataset(write(path, example(frames, [1], "run"), example(frames, [1], "swim")))
    with pytest.raises(UserError, match="label -1; expected 0 to"):
        read_dataset(write(path, example(frames, [-1])))
    with pytest.raises(VideoError, match="not a SequenceExample"):
        read_dataset(write(path, b"\x0a\xffnothing of the kind"))
    with pytest.raises(UserError, match="clip/label/index is a bytes_list; expected an int64_list"):
        read_dataset(write(path, example(frames, **{records.LABELS: b"1"})))
    whole = write(path, example(frames, [1])).read_bytes()
    for lost in (100, 4, 1):
        path.write_bytes(whole[:-lost])
        with pytest.raises(UserError, match="is cut off: its last record ends at byte"):
            read_dataset(path)
    path.write_bytes(whole[:8] + b"\0" * 4 + whole[12:])  # a length with a wrong checksum
    with pytest.raises(UserError, match="byte 0: no TFRecord begins here"):
        read_dataset(path)
    with pytest.raises(UserError, match="1 of its 2 shards are missing, such as .*00001-of-00002"):
        write(tmp_path / "b.tfrecord-00000-of-00002", example(frames, [1]))
        read_dataset(tmp_path / "b.tfrecord@2")
    (tmp_path / "names.txt").write_text("run\n")
    write(path, example(frames, [1]))
    with pytest.raises(UserError, match="has label 1, and .*names.txt names classes 0 to 0"):
        read_dataset(path, class_names=tmp_path / "names.txt")


def test_a_record_without_pictures_or_with_damaged_ones(clips, tmp_path):
    path = write(tmp_path / "a.tfrecord", example([], [0]), example([b"no picture"], [0]))
    empty, damaged = read_dataset(path).examples
    with pytest.raises(VideoError, match=r"a.tfrecord\[0\]: no frames in the feature list"):
        read_whole(empty)
    with pytest.raises(VideoError, match=r"a.tfrecord\[1\], frame 0: not a readable image"):
        read_whole(damaged)


def test_check_data_reads_records(shards, capsys):
    status, out, _ = run_command(capsys, "check-data", shards, "--frames", 4, "--json", "-")
    found = json.loads(out)
    assert status == 0, found
    assert found["clips"] == 5 and found["codecs"] == {"images": 5}
    assert [(each["name"], each["clips"]) for each in found["classes"]] == [("run", 3), ("swim", 2)]


def test_copies_among_records_are_found_by_their_content(clips, tmp_path):
    frames = [[jpeg(frame) for frame in clip] for clip in clips]
    write(tmp_path / "a.tfrecord", *(example(frames[k], [0]) for k in (0, 1, 0)))
    facts = [inspect(each) for each in read_dataset(tmp_path / "a.tfrecord").examples]
    assert find_copies(facts) == ((0, 2),)


def test_records_travel_to_other_processes(shards, clips):
    dataset = pickle.loads(pickle.dumps(read_dataset(shards)))
    assert dataset.fingerprint == read_dataset(shards).fingerprint
    np.testing.assert_array_equal(read_frames(dataset.examples[3], [2])[0], decoded(clips[3][2]))
