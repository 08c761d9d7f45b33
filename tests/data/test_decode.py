# SPDX-License-Identifier: Apache-2.0
"""read_video against a plain decode from start to end, on clips whose pixels state their number."""

import logging
import subprocess
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from clips import (
    MATRICES,
    every_frame,
    number_in,
    packet_spans,
    painted,
    write_clip,
    write_matrix,
)
from helpers import mostly_slow

from vivit_jax.data.sampling import sample_frame_indices
from vivit_jax.data.video import decoder, h264, opened, packets, pictures
from vivit_jax.data.video.decode import frame_times, probe_video, read_video, read_video_pyav
from vivit_jax.errors import UserError, VideoError

H264_OPEN_GOP = {"preset": "medium", "x264-params": "open-gop=1:b-adapt=0:b-pyramid=normal"}
# Pictures stored after a keyframe, shown before it, and decodable without earlier ones.
HEVC_LEADING = {
    "x265-params": "log-level=none:scenecut=0:open-gop=0:radl=2:keyint=10:min-keyint=10:b-adapt=0"
}

# Read by seeking. Names carry the container; the rest are arguments of write_clip.
SPARSE = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.mov": {},
    "h264-all-keys.mp4": dict(gop=1, b_frames=0),
    "h264-all-keys.mkv": dict(gop=1, b_frames=0),
    "h264-short-gop.mp4": dict(gop=3, b_frames=2),
    "h264-no-b.mkv": dict(gop=7, b_frames=0),
    "h264-one-gop.mp4": dict(gop=100, b_frames=3),
    "h264-open-gop.mp4": dict(b_frames=4, options=H264_OPEN_GOP),
    "h264-open-gop.mkv": dict(b_frames=4, options=H264_OPEN_GOP),
    "h264-fragmented.mp4": dict(container_options={"movflags": "frag_keyframe+empty_moov"}),
    "h264-negative-cts.mp4": dict(container_options={"movflags": "negative_cts_offsets"}),
    "h264-10-bit.mp4": dict(pix_fmt="yuv420p10le"),
    "h264-444.mkv": dict(pix_fmt="yuv444p"),
    "hevc.mp4": dict(codec="libx265"),
    "hevc.mkv": dict(codec="libx265", b_frames=3),
    "hevc.mov": dict(codec="libx265"),
    "hevc-10-bit.mkv": dict(codec="libx265", pix_fmt="yuv420p10le"),
    "hevc-leading.mkv": dict(codec="libx265", b_frames=3, options=HEVC_LEADING),
    "vp9.webm": dict(codec="libvpx-vp9"),
    "vp9.mkv": dict(codec="libvpx-vp9", gop=3),
    "vp9.mp4": dict(codec="libvpx-vp9"),
    "vp9-lagged.webm": dict(codec="libvpx-vp9", gop=15, options={"deadline": "good"}),
    "av1.mp4": dict(codec="libsvtav1"),
    "av1.webm": dict(codec="libsvtav1"),
    "av1.mkv": dict(codec="libsvtav1", gop=4),
    "av1-10-bit.mp4": dict(codec="libsvtav1", pix_fmt="yuv420p10le"),
    "variable-rate.mp4": dict(times=[0.04 * k**1.5 for k in range(30)]),
    "variable-rate.mkv": dict(times=[0.04 * k**1.5 for k in range(30)]),
    "variable-rate.webm": dict(codec="libvpx-vp9", times=[0.01 * k**2 for k in range(30)]),
    "late-start.mp4": dict(times=[25 + k / 25 for k in range(30)]),
    "late-start.mkv": dict(times=[25 + k / 25 for k in range(30)]),
}

# Decoded from the start, for the reason given.
SEQUENTIAL = {
    "mpeg4.avi": (dict(codec="mpeg4"), "container avi"),
    "h264.avi": ({}, "container avi"),
    "mpeg4.mp4": (dict(codec="mpeg4"), "codec mpeg4"),
    "mpeg4.mkv": (dict(codec="mpeg4"), "codec mpeg4"),
    "vp8.webm": (dict(codec="libvpx"), "codec vp8"),
    "same-time.mkv": (dict(times=[k * 4e-4 for k in range(30)]), "same presentation time"),
    "refresh.mp4": (
        dict(options={"preset": "medium", "x264-params": "intra-refresh=1"}),
        "marked as a keyframe and is none",
        "decoding from packet",
        "at other times than theirs",
    ),
    "refresh.mkv": (
        dict(options={"preset": "medium", "x264-params": "intra-refresh=1"}),
        "marked as a keyframe and is none",
        "decoding from packet",
        "at other times than theirs",
    ),
}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """clip(name, **arguments of write_clip): path of a clip written once per session."""
    folder, written = tmp_path_factory.mktemp("clips"), {}

    def get(name: str, **arguments) -> Path:
        if name not in written:
            written[name] = write_clip(folder / name, **arguments)
        return written[name]

    return get


@pytest.fixture
def decoded(monkeypatch):
    """A list that collects every frame leaving the decoder."""
    frames = []

    def counted(context, packet):
        new = decode_packet(context, packet)
        frames.extend(new)
        return new

    decode_packet = decoder.decode_packet
    monkeypatch.setattr(decoder, "decode_packet", counted)
    return frames


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.DEBUG, logger="vivit_jax.data")
    return caplog


def assert_same_as_plain_decode(path: Path) -> None:
    reference = every_frame(path)
    assert [number_in(frame) for frame in reference] == list(range(30))
    np.testing.assert_array_equal(read_video(path), reference)
    for k in range(30):
        np.testing.assert_array_equal(read_video(path, indices=[k])[0], reference[k], str(k))
    rng = np.random.default_rng(0)
    for size in (2, 5, 40):
        indices = rng.integers(0, 30, size)
        np.testing.assert_array_equal(read_video(path, indices=indices), reference[indices])
    clip = read_video(path, num_frames=5, stride=3)
    np.testing.assert_array_equal(clip, reference[8:21:3])


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        SPARSE,
        *("h264.mp4", "h264.mkv", "h264-one-gop.mp4", "h264-open-gop.mp4", "h264-no-b.mkv"),
        *("hevc.mp4", "hevc-leading.mkv", "vp9.webm", "av1.mp4", "late-start.mp4"),
        *("h264-negative-cts.mp4", "h264-fragmented.mp4", "variable-rate.mp4"),
    ),
)
def test_seeking_equals_plain_decode(clip, log, name):
    assert_same_as_plain_decode(clip(name, **SPARSE[name]))
    assert not log.messages  # neither a warning nor a decode from the start


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_decoding_from_the_start_equals_plain_decode(clip, log, name):
    arguments, *reasons = SEQUENTIAL[name]
    assert_same_as_plain_decode(clip(name, **arguments))
    assert log.messages
    for record in log.records:
        assert record.levelname == "DEBUG"
        assert record.getMessage().split(": ", 1)[1].startswith("decoding from the start: ")
        assert any(reason in record.getMessage() for reason in reasons)
    assert all(reason in log.text for reason in reasons)


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mkv", "vp9.webm", "av1.mp4"])
def test_seeking_decodes_only_what_is_needed(clip, decoded, name):
    path = clip(name, **SPARSE[name])
    read_video(path, indices=[0])
    assert len(decoded) == 1
    decoded.clear()
    read_video(path, indices=[29, 1])
    assert 2 <= len(decoded) <= 19  # of the three groups of 10, not the middle one
    decoded.clear()
    read_video(path)
    assert len(decoded) == 30
    decoded.clear()
    assert probe_video(path).num_frames == 30
    assert len(decoded) == 1


@pytest.mark.parametrize("name", ["one-gop.mp4", "one-gop.mkv"])
def test_pictures_that_no_other_needs_are_not_decoded(clip, decoded, log, name):
    path = clip(name, gop=100, b_frames=3)  # no other refers to every second picture
    reference = every_frame(path)
    for k in range(30):
        decoded.clear()
        np.testing.assert_array_equal(read_video(path, indices=[k])[0], reference[k], str(k))
        assert len(decoded) <= 2 + 2 * -(-k // 4)
    assert not log.messages


def test_packets_that_leave_nothing_behind(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", options={"preset": "medium"}, size=(128, 96))
    with av.open(str(path)) as container:
        header = container.streams.video[0].codec_context.extradata
        stored = [bytes(packet) for packet in container.demux(video=0) if packet.size]

    def passing(change=bytes, header=header):
        """Whether the packets marked as needed by no other pass, each of them changed."""
        passing, found = h264.Passing(header), []
        for data in stored:
            last = data[4] & 0x60 == 0 and len(data) == 4 + int.from_bytes(data[:4], "big")
            passes = passing(change(data) if last else data)
            found += [passes] if last else []
            assert last or not passes
        return found

    assert len(passing()) > 5 and all(passing())
    slice_, message = (
        (len(stored[1]) - 4).to_bytes(4, "big"),
        (3).to_bytes(4, "big") + b"\x06\x05\0",
    )
    delimiter = (2).to_bytes(4, "big") + b"\x09\x10"
    assert slice_ == stored[1][:4]
    assert all(passing(lambda data: delimiter + data))
    changes = {
        "a message may hold for later pictures": lambda data: message + data,
        "others are predicted from it": lambda data: data[:4] + bytes([data[4] | 0x20]) + data[5:],
        "cut off": lambda data: data[:-1],
        "empty": lambda data: b"",
        "it begins at another block": lambda data: data[:5] + b"\x40" + data[6:],
        "its number": lambda data: data[:5] + bytes([data[5], data[6] ^ 0xFF]) + data[7:],
    }
    for why, change in changes.items():
        assert not any(passing(change)), why
    assert not any(passing(header=None))  # lengths are unknown
    assert not any(passing(header=header[:8]))


def test_decoding_from_the_start_stops_at_the_last_frame(clip, decoded):
    path = clip("mpeg4.avi", codec="mpeg4")
    read_video(path, indices=[5, 2])
    assert len(decoded) <= 6 + 17  # FFmpeg's threads, at most 16, hold frames
    decoded.clear()
    read_video(path, num_frames=4)
    assert len(decoded) == 30  # once: the packets say how many frames to expect


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi"])
def test_only_the_frames_asked_are_converted(clip, monkeypatch, name):
    converted = []

    def counted(image, orientation):
        converted.append(image)
        return oriented(image, orientation)

    oriented = pictures.oriented
    monkeypatch.setattr(pictures, "oriented", counted)
    path = clip(name, **({} if name == "h264.mp4" else SEQUENTIAL[name][0]))
    for arguments in (dict(indices=[29, 0, 29]), dict(num_frames=2)):
        converted.clear()
        read_video(path, **arguments)
        assert len(converted) == 2


def write_all_keyframes(path: Path, **arguments) -> None:
    """An mp4 without its table of keyframes, so that every packet counts as one."""
    data = write_clip(path, **arguments).read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))


@pytest.mark.parametrize(
    "codec, b_frames, reason",
    [
        ("libx265", 0, "decoding from packet 8 fails"),
        ("libx265", 2, "keyframes out of order"),
        ("libx264", 2, None),
        ("libvpx-vp9", 0, None),
        ("libsvtav1", 0, None),
    ],
)
def test_packets_wrongly_marked_as_keyframes(tmp_path, log, codec, b_frames, reason):
    path = tmp_path / "keys.mp4"
    write_all_keyframes(path, codec=codec, b_frames=b_frames)
    assert_same_as_plain_decode(path)
    assert reason is None or reason in log.text


@pytest.mark.parametrize(
    "pts, keys, reason",
    [
        ([0, 2, 1, 3], [0, 3], None),
        ([0, 3, 2, 1], [0, 1], None),  # open: the packets after the second key are shown before it
        ([0, 2, 1, 3], [], "begin with a keyframe"),
        ([0, 2, 1, 3], [1], "begin with a keyframe"),
        ([1, 0, 2, 3], [0], "begin with a keyframe that is shown first"),
        ([0, 2, 2, 3], [0], "same presentation time"),
        ([0, 3, 2, 4], [0, 1, 2], "keyframes out of order"),
        ([0, 1, 3, 2], [0, 3], "keyframes out of order"),
    ],
)
def test_disorder(pts, keys, reason):
    found = packets._disorder(np.array(pts), np.array(keys, int))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("landing", [[0, 1, 2, 3], [2, 3], [1, 2, 3]], ids=str)
def test_seeking_may_land_early(landing):
    assert fake_run(landing) == [2, 3, None]


@pytest.mark.parametrize("landing", [[3], [0, 1, 3], [1, 2, 4], [0, 9]], ids=str)
def test_seeking_that_misses_packets_is_refused(landing):
    with pytest.raises(decoder.Distrusted, match="seeking to packet 2 gives packet"):
        fake_run(landing)


def fake_run(landing: list[int]) -> list[int | None]:
    """The packets that decoder._decode_run decodes for packets 2 and 3 of 5."""
    read = [SimpleNamespace(pts=10 * position, size=1) for position in landing]
    context = SimpleNamespace(decode=lambda packet: [packet.pts // 10 if packet else None])
    container = SimpleNamespace(demux=lambda stream: read)
    position_at = {10 * position: position for position in range(5)}
    stream = SimpleNamespace(codec_context=context)
    return list(decoder._decode_run(container, stream, position_at, 2, 3))


def test_edit_list_that_cuts_into_the_stream(tmp_path, log):
    times = [(k - 7) / 25 for k in range(30)]
    keep_negative = {"avoid_negative_ts": "disabled"}
    path = write_clip(tmp_path / "cut.mp4", times=times, container_options=keep_negative)
    assert [number_in(frame) for frame in read_video(path)] == list(range(7, 30))
    assert number_in(read_video(path, indices=[4])[0]) == 11
    info = probe_video(path)
    assert (info.announced_frames, info.num_frames) == (30, 23)
    assert info.duration == pytest.approx(23 / 25)
    assert all("edit list" in m for m in log.messages)


@pytest.mark.parametrize("name", ["plain.mp4", "plain.mov"])
@pytest.mark.parametrize("display", MATRICES, ids=str)
def test_display_matrix(tmp_path, display, name):
    degrees, mirrored = display
    path = write_clip(tmp_path / name, frames=12, display=display)
    video = read_video(path, indices=[11, 1])
    assert [number_in(frame) for frame in video] == [11, 1]
    height, width = (64, 48) if degrees in (90, 270) else (48, 64)
    assert video.shape == (2, height, width, 3)
    assert np.abs(video[0].astype(int) - painted(11, width, height)).mean() < 15
    stored = every_frame(path)[11]
    shown = np.rot90(stored, -degrees // 90)
    np.testing.assert_array_equal(video[0], shown[:, ::-1] if mirrored else shown)
    info = probe_video(path)
    assert (info.rotation, info.mirrored) == display
    assert (info.height, info.width) == (height, width)


@pytest.mark.parametrize("matrix", [(1, 1, -1, 1), (2, 0, 0, 1), (0, 0, 0, 0), (1, 0, 0.5, 1)])
def test_display_matrix_that_is_no_quarter_turn(tmp_path, matrix):
    path = write_clip(tmp_path / "skew.mp4", frames=2)
    write_matrix(path, [round(entry * 65536) for entry in matrix])
    for read in (read_video, probe_video):
        with pytest.raises(VideoError, match=r"skew.mp4: display matrix \[\[.*-display_rotation 0"):
            read(path)


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("h264.mp4", {}, (30, 25, "h264", "yuv420p", "mov,mp4,m4a,3gp,3g2,mj2")),
        ("h264.mkv", {}, (None, 25, "h264", "yuv420p", "matroska,webm")),
        (
            "hevc-10-bit.mkv",
            SPARSE["hevc-10-bit.mkv"],
            (None, 25, "hevc", "yuv420p10le", "matroska,webm"),
        ),
        ("av1.webm", dict(codec="libsvtav1"), (None, 25, "av1", "yuv420p", "matroska,webm")),
        ("mpeg4.avi", dict(codec="mpeg4"), (30, 25, "mpeg4", "yuv420p", "avi")),
        ("h264.avi", {}, (30, 25, "h264", "yuv420p", "avi")),
        ("50.mov", dict(fps=50), (30, 50, "h264", "yuv420p", "mov,mp4,m4a,3gp,3g2,mj2")),
    ],
)
def test_probe(clip, name, arguments, expected):
    info = probe_video(str(clip(name, **arguments)))
    announced, fps, codec, pixel_format, container = expected
    assert info.announced_frames == announced
    assert info.num_frames == 30
    assert info.fps == pytest.approx(fps, rel=2e-3)
    assert info.duration == pytest.approx(30 / fps, rel=2e-3)
    assert (info.height, info.width, info.rotation, info.mirrored) == (48, 64, 0, False)
    assert (info.codec, info.pixel_format, info.container) == (codec, pixel_format, container)


def test_probe_of_a_variable_rate(clip):
    info = probe_video(clip("variable-rate.mp4", **SPARSE["variable-rate.mp4"]))
    last, before = 0.04 * 29**1.5, 0.04 * 28**1.5
    assert last < info.duration <= last + 2 * (last - before)
    assert info.fps == pytest.approx(30 / info.duration)


def test_packets_are_listed_again_only_when_the_file_changes(tmp_path, monkeypatch):
    scans, scan = [], opened.scan
    monkeypatch.setattr(opened, "scan", lambda *video: scans.append(1) or scan(*video))
    path = write_clip(tmp_path / "clip.mp4")
    assert probe_video(path).num_frames == 30
    for k in (4, 17):
        assert number_in(read_video(path, indices=[k])[0]) == k
    assert len(scans) == 1
    # Another file by the same name.
    write_clip(path, frames=20, gop=7, fps=10)
    assert [number_in(frame) for frame in read_video(path)] == list(range(20))
    assert len(scans) == 2


def announce(path: Path, frames: int) -> None:
    data = bytearray(path.read_bytes())
    length = data.index(b"strh") + 8 + 32
    data[length : length + 4] = frames.to_bytes(4, "little")
    path.write_bytes(data)


@pytest.mark.parametrize("frames", [7, 30, 99])
def test_a_wrong_announcement_is_not_believed(tmp_path, caplog, frames):
    path = write_clip(tmp_path / "wrong.avi", codec="mpeg4")
    announce(path, frames)
    info = probe_video(path)
    assert (info.announced_frames, info.num_frames) == (frames, 30)
    assert [number_in(frame) for frame in read_video(path)] == list(range(30))
    assert [number_in(f) for f in read_video(path, num_frames=2, start="end")] == [28, 29]
    warned = [m for m in caplog.messages if "99 frames announced, 30 frames can be read" in m]
    assert len(warned) == (1 if frames == 99 else 0)  # once per file, not per read


def cut_in_packet(path: Path, number: int) -> None:
    position, size = packet_spans(path)[number]
    path.write_bytes(path.read_bytes()[: position + size // 2])


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4"])
def test_truncated_mp4(tmp_path, caplog, codec):
    index_first = {"movflags": "faststart"}
    path = tmp_path / "cut.mp4"
    write_clip(path, codec=codec, b_frames=0, container_options=index_first)
    cut_in_packet(path, 22)
    info = probe_video(path)
    assert (info.announced_frames, info.num_frames) == (30, 22)
    assert "30 frames announced, 22 frames can be read (packet 22 is cut off" in caplog.text
    assert [number_in(frame) for frame in read_video(path)] == list(range(22))
    assert number_in(read_video(path, indices=[21])[0]) == 21
    stops = "announces 30 frames, decoding stops after 22: it is damaged or truncated"
    with pytest.raises(VideoError, match=f"no such frames: 22, 29; there are 22 frames.*{stops}"):
        read_video(path, indices=[3, 22, 29])
    with pytest.raises(VideoError, match="cut.mp4: 23 frames at stride 1 .* there are 22 frames"):
        read_video(path, num_frames=23)
    looped = read_video(path, num_frames=24, pad="loop")
    assert [number_in(frame) for frame in looped] == [*range(22), 0, 1]


def test_truncated_mp4_with_b_frames(tmp_path):
    path = write_clip(tmp_path / "cut.mp4", container_options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        times = sorted(p.pts for p in list(container.demux(video=0))[:16])
    cut_in_packet(path, 16)
    expected = [time // 512 for time in times]  # 12800 ticks a second, 25 frames
    assert [number_in(frame) for frame in read_video(path)] == expected


@pytest.mark.parametrize("name, codec", [("cut.mkv", "libx264"), ("cut.webm", "libvpx-vp9")])
def test_truncated_mkv(tmp_path, caplog, name, codec):
    path = write_clip(tmp_path / name, codec=codec, b_frames=0)
    cut_in_packet(path, 18)
    kept = probe_video(path).num_frames
    assert 0 < kept <= 18
    assert "1.20 s announced" in caplog.text and f"{kept} frames can be read" in caplog.text
    assert [number_in(frame) for frame in read_video(path)] == list(range(kept))
    with pytest.raises(VideoError, match=f"no such frames: {kept}; there are {kept:,} frames"):
        read_video(path, indices=[kept])


def test_truncated_avi(tmp_path, caplog):
    path = write_clip(tmp_path / "cut.avi", codec="mpeg4", b_frames=0)
    cut_in_packet(path, 12)
    assert [number_in(frame) for frame in read_video(path)] == list(range(12))
    assert "30 frames announced, 12 frames can be read" in caplog.text


def test_damage_in_the_middle(tmp_path, caplog):
    path = write_clip(tmp_path / "damaged.mp4", b_frames=0)
    position, size = packet_spans(path)[15]
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(size)
    path.write_bytes(data)
    info, video = probe_video(path), read_video(path)
    assert info.num_frames == len(video) == 30
    assert "29 frames can be decoded from 30 packets (packet 15: Invalid data" in caplog.text
    assert "frame 15 repeats the one before" in caplog.text
    assert len(caplog.messages) == 1
    # Every frame keeps its packet's number, however it is read.
    np.testing.assert_array_equal(video[15], video[14])
    kept = [*range(15), *range(20, 30)]
    assert [number_in(video[k]) for k in kept] == kept
    for k in (3, 14, 15, 17, 24):
        np.testing.assert_array_equal(read_video(path, indices=[k, 20])[0], video[k])
    np.testing.assert_allclose(frame_times(path, range(30)), np.arange(30) / 25)
    clip = read_video(path, num_frames=8, stride=2)
    np.testing.assert_array_equal(clip, video[7:23:2])
    with pytest.raises(VideoError, match="damaged.mp4: 1 of the 1 frame asked cannot .*frame 15"):
        read_video(path, indices=[15], lost="few")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.avi"])
def test_frames_marked_as_damaged_are_refused(tmp_path, caplog, name):
    path = write_clip(tmp_path / name, b_frames=0, options={"preset": "medium"}, size=(128, 96))
    whole = every_frame(path)
    data = bytearray(path.read_bytes())
    bad = 13
    position, size = packet_spans(path)[bad]
    middle = slice(position + size // 2, position + size - 4)
    data[middle] = bytes(byte ^ 255 for byte in data[middle])
    path.write_bytes(data)
    with av.open(str(path)) as container:
        marked = [k for k, frame in enumerate(container.decode(video=0)) if frame.is_corrupt]
    assert marked == [bad]
    for arguments in (dict(indices=[2, bad]), dict(num_frames=4, start=bad), {}):
        with pytest.raises(VideoError, match=f"{name}: .*damage in frame {bad} of.*re-encoding"):
            read_video(path, **arguments)
    with (
        av.open(str(path)) as container,
        pytest.raises(VideoError, match=f"damage in frame {bad} of"),
    ):
        read_video_pyav(container, [bad])
    caplog.clear()
    np.testing.assert_array_equal(read_video(path, indices=range(13)), whole[:13])
    assert not caplog.messages
    np.testing.assert_array_equal(read_video(path, indices=[12, 25]), whole[[12, 25]])
    assert probe_video(path).num_frames == 30
    # The decoder does not mark frames predicted from damaged ones: one warning for the file.
    for k in (19, 19, 18):
        read_video(path, indices=[k])
    warned = [m for m in caplog.messages if f"decoder reports errors in frame {bad};" in m]
    assert len(warned) == 1


@pytest.mark.parametrize(
    "name, codec",
    mostly_slow(
        [
            ("h264.mp4", "libx264"),
            ("hevc.mkv", "libx265"),
            ("vp9.webm", "libvpx-vp9"),
            ("av1.mp4", "libsvtav1"),
            ("mpeg4.avi", "mpeg4"),
        ],
        ("h264.mp4", "libx264"),
    ),
)
def test_random_damage_raises_nothing_else(tmp_path, name, codec):
    options = {"movflags": "faststart"} if name.endswith("mp4") else None
    path = write_clip(tmp_path / name, codec=codec, container_options=options)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for trial in range(30):
        data = whole.copy()
        spared = 0 if trial % 3 == 0 else len(data) // 2
        places = rng.integers(spared, len(data), rng.integers(1, 40))
        data[places] = rng.integers(0, 256, len(places))
        path.write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)].tobytes())
        for read in (read_video, probe_video, lambda p: read_video(p, num_frames=3, pad="loop")):
            try:
                read(path)
                outcomes["read"] += 1
            except VideoError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 2, outcomes


def test_frames_of_different_sizes(tmp_path):
    small = write_clip(tmp_path / "small.h264", frames=6, b_frames=0)
    large = write_clip(tmp_path / "large.h264", frames=6, b_frames=0, size=(128, 96))
    path = tmp_path / "both.h264"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    assert read_video(path, indices=[0, 5]).shape == (2, 48, 64, 3)
    assert read_video(path, indices=[6, 11]).shape == (2, 96, 128, 3)
    sizes = r"both.h264: frames of different sizes: .*64x48 \(frame 5\).*; expected one size"
    with pytest.raises(VideoError, match=sizes) as raised:
        read_video(path, indices=[5, 7, 8])
    assert "128x96 (frame 7)" in str(raised.value)


def write_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))


def write_text_art(path: Path) -> None:
    path.write_text("not a video\n" * 100)


BAD_FILES = {
    "missing.mp4": (lambda path: None, "no such file"),
    "folder.mp4": (lambda path: path.mkdir(), "a directory"),
    "empty.mp4": (lambda path: path.touch(), r"an empty file \(0 bytes\)"),
    "page.mp4": (
        lambda path: path.write_bytes(b"\n<!DOCTYPE HTML><html><body>Index of /clips</body>"),
        "a web page, not a video: a link has to lead to the file itself",
    ),
    "text.mp4": (write_text_art, r"no readable video \(Invalid data"),
    "text.txt": (write_text_art, "a text file"),
    "noise.mp4": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        "no readable video",
    ),
    "sound.wav": (write_sound, "holds audio streams but no video"),
    "end-missing.mp4": (
        lambda path: path.write_bytes(write_clip(path).read_bytes()[:2000]),
        "no readable video",
    ),
}


@pytest.mark.parametrize("read", [read_video, probe_video], ids=["read", "probe"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_video(tmp_path, name, read):
    write, found = BAD_FILES[name]
    write(tmp_path / name)
    with pytest.raises(VideoError, match=f"{name}: {found}.*expected a video file such as") as bad:
        read(tmp_path / name)
    assert "\n" not in str(bad.value)


def test_a_stream_without_a_decodable_frame(tmp_path):
    path = write_clip(tmp_path / "zeros.mp4", frames=5, b_frames=0)
    data = bytearray(path.read_bytes())
    for position, size in packet_spans(path):
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    for read in (read_video, probe_video):
        with pytest.raises(VideoError, match="zeros.mp4: none of its frames can be decoded"):
            read(path)


def test_headers_that_the_decoder_refuses(tmp_path):
    path = write_clip(tmp_path / "headers.mp4", codec="libx265", frames=5, b_frames=0)
    data = path.read_bytes()
    sets = data.index(b"hvcC") + 4 + 23  # its arrays of parameter sets: type, count, length, data
    path.write_bytes(data[: sets + 3] + b"\xff\xff" + data[sets + 5 :])
    for read in (read_video, probe_video):
        with pytest.raises(VideoError, match="headers.mp4: no readable video .Invalid data"):
            read(path)


def test_paths(clip, tmp_path, monkeypatch):
    source = clip("h264.mp4")
    awkward = tmp_path / "a:b %d 'ü'.mp4"
    awkward.write_bytes(source.read_bytes())
    expected = read_video(source, indices=[3])
    for path in (awkward, str(awkward), bytes(awkward)):
        np.testing.assert_array_equal(read_video(path, indices=[3]), expected)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_video(awkward.name, indices=[3]), expected)


def test_metadata_that_is_no_utf8(clip, tmp_path):
    titled, path = tmp_path / "titled.mkv", tmp_path / "latin.mkv"
    with av.open(str(clip("h264.mkv"))) as source, av.open(str(titled), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        out.metadata["title"] = stream.metadata["comment"] = "Bjoern"
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = titled.read_bytes()
    assert data.count(b"Bjoern") == 2
    path.write_bytes(data.replace(b"Bjoern", b"Bj\xf6\xffrn"))
    assert probe_video(path).num_frames == 30
    assert [number_in(frame) for frame in read_video(path)] == list(range(30))


@pytest.mark.parametrize("read", [read_video, probe_video], ids=["read", "probe"])
def test_what_is_no_path(clip, read):
    with open(clip("h264.mp4"), "rb") as file:
        for path, got in ((None, "None .NoneType"), (3, "3 .int"), (file, ".*BufferedReader")):
            with pytest.raises(UserError, match=f"path is {got}.*expected the path of a video"):
                read(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("a", 4, 64), "clip_len is 'a'; expected an int"),
        ((4, "a", 64), "frame_sample_rate is 'a'; expected a finite number"),
        ((4, float("nan"), 64), "frame_sample_rate is nan"),
        ((4, 4, None), "seg_len is None; expected an int"),
    ],
    ids=str,
)
def test_sample_frame_indices_of_what_is_no_number(arguments, message):
    with pytest.raises(UserError, match=message):
        sample_frame_indices(*arguments)


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.avi"])
def test_clips_and_padding(clip, name):
    path = clip(name, **({} if name == "h264.mp4" else SEQUENTIAL[name][0]))

    def numbers(**arguments):
        return [number_in(frame) for frame in read_video(path, **arguments)]

    assert numbers(num_frames=3, stride=2, start="begin") == [0, 2, 4]
    assert numbers(num_frames=3, stride=2, start="end") == [25, 27, 29]
    assert numbers(num_frames=3, stride=2) == [12, 14, 16]
    assert numbers(num_frames=3, stride=2, start=7) == [7, 9, 11]
    drawn = numbers(num_frames=3, stride=2, start="random", seed=4)
    assert drawn == numbers(num_frames=3, stride=2, start="random", seed=4)
    assert np.diff(drawn).tolist() == [2, 2]
    assert len({numbers(num_frames=1, start="random", seed=(1, k))[0] for k in range(12)}) > 6
    assert numbers(indices=[29, 0, 29]) == [29, 0, 29]
    assert numbers(indices=(28, 40), pad="repeat_last") == [28, 29]
    assert numbers(indices=np.array([28, 40]), pad="loop") == [28, 10]
    assert numbers(num_frames=4, stride=12, pad="repeat_last") == [0, 12, 24, 29]
    assert numbers(num_frames=4, stride=12, pad="loop") == [0, 12, 24, 6]
    assert numbers(num_frames=3, start=28, pad="loop") == [28, 29, 0]
    with pytest.raises(VideoError, match=f"{name}: no such frames: 30; there are 30 frames: ask"):
        read_video(path, indices=[0, 30])
    with pytest.raises(VideoError, match=f"{name}: 4 frames at stride 12 .* there are 30 frames"):
        read_video(path, num_frames=4, stride=12)
    with pytest.raises(VideoError, match="start is frame 30 but there are 30 frames"):
        read_video(path, num_frames=1, start=30, pad="loop")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_frames=2, indices=[1]), "both num_frames and indices"),
        (dict(indices=[1], stride=2), "pass num_frames too"),
        (dict(start="end"), "pass num_frames too"),
        (dict(num_frames=2, start="random"), "no seed: pass seed"),
        (dict(num_frames=2, start="middle"), "expected one of"),
        (dict(num_frames=0), "num_frames is 0"),
        (dict(indices=[]), "expected a list of at least one int"),
        (dict(indices=[-1]), "negative frame indices: -1"),
        (dict(indices=[0.5]), "expected ints"),
        (dict(indices=[1], pad="black"), "pad is 'black'"),
    ],
    ids=str,
)
def test_arguments(clip, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        read_video(clip("h264.mp4"), **arguments)
    assert not isinstance(raised.value, VideoError)


def test_read_video_pyav(clip):
    path = clip("h264.mp4")
    reference = every_frame(path)
    with av.open(str(path)) as container:
        # Twice, as it rewinds; in increasing order without repeats, as in the documentation.
        for indices in ([7, 2, 7, 9], np.array([2, 7, 9])):
            video = read_video_pyav(container, indices)
            np.testing.assert_array_equal(video, reference[[2, 7, 9]])
        with pytest.raises(VideoError, match="h264.mp4: no such frames: 30, 31; there are 30"):
            read_video_pyav(container, [1, 30, 31])
        for indices in ([], [-1]):
            with pytest.raises(UserError, match="expected"):
                read_video_pyav(container, indices)


@pytest.mark.parametrize(
    "data, shows",
    [
        (0b10_00_0_0_1_0, True),  # key, shown
        (0b10_00_0_1_1_0, True),  # not key, shown
        (0b10_00_0_0_0_0, False),
        (0b10_00_0_1_0_1, False),
        (0b10_00_1_000, True),  # shows an earlier picture
        (0b10_10_0_1_0_0, False),  # profile 1
        (0b10_11_0_0_0_1, True),  # profile 3 has one bit more before these
        (0b10_11_0_1_0_0, True),
        (0b10_11_0_0_1_0, False),
    ],
)
def test_vp9_packets_that_show_nothing(data, shows):
    assert packets._vp9_shows(memoryview(bytes([data, 0x12, 0x34]))) is shows
    superframe = bytes([data, 0x12, 0xC1, 1, 1, 0xC1])
    assert packets._vp9_shows(memoryview(superframe))


def test_importing_needs_no_av():
    code = "import sys; sys.modules['av'] = None; import vivit_jax.data.video.decode"
    subprocess.run([sys.executable, "-c", code], check=True)
