# SPDX-License-Identifier: Apache-2.0
"""Damaged videos give the same frames in every call, and as many as reported."""

import itertools

import numpy as np
import pytest
from clips import every_frame, packet_spans, write_clip
from helpers import mostly_slow

import vivit_jax
from vivit_jax.data.datasets.dataset import Example, read_frames
from vivit_jax.data.read_clip import read_clip
from vivit_jax.data.video.decode import frame_times, probe_video, read_video
from vivit_jax.data.video.frame_stream import FrameStream
from vivit_jax.data.video.opened import packet_table
from vivit_jax.data.video.packets import count_needed, divided
from vivit_jax.data.video.sequence import decode_sparse
from vivit_jax.errors import UserError, VideoError

SIZE = (256, 192)
MEDIUM = {"preset": "medium"}
FIRST_INDEX = {"movflags": "faststart"}
KINDS = {
    "h264.mp4": dict(options=MEDIUM, container_options=FIRST_INDEX),
    "h264.mkv": dict(options=MEDIUM),
    "h264.ts": dict(options=MEDIUM),
    "h264.flv": dict(options=MEDIUM),
    "h264.avi": dict(options=MEDIUM),
    "h264.h264": dict(options=MEDIUM),
    "hevc.hevc": dict(codec="libx265"),
    "hevc.mkv": dict(codec="libx265"),
    "hevc.ts": dict(codec="libx265"),
    "vp8.webm": dict(codec="libvpx"),
    "vp9.webm": dict(codec="libvpx-vp9"),
    "av1.mkv": dict(codec="libsvtav1"),
    "ffv1.mkv": dict(codec="ffv1", b_frames=0),
    "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p", b_frames=0),
    "mpeg4.avi": dict(codec="mpeg4"),
    "mpeg2.ts": dict(codec="mpeg2video"),
    "mpeg1.mpg": dict(codec="mpeg1video"),
    "prores.mov": dict(codec="prores_ks", pix_fmt="yuv422p10le", b_frames=0),
}


def damaged(whole: bytes, rng: np.random.Generator, trial: int) -> bytes:
    """Changes bytes, removes a piece, or cuts off the end."""
    data = bytearray(whole)
    for place in rng.integers(len(data) // 8, len(data), rng.integers(1, 6)):
        data[place] = rng.integers(256)
    if trial % 4 == 3:
        place = rng.integers(len(data) // 4, len(data))
        del data[place : place + rng.integers(1, 400)]
    if trial % 7 == 6:
        del data[rng.integers(len(data) // 2, len(data)) :]
    return bytes(data)


def outcome(read, *arguments, **options):
    """What a call returns, or the text of the VideoError that it raises."""
    try:
        return read(*arguments, **options)
    except VideoError as error:
        assert "\n" not in str(error)
        return str(error)


def assert_equal(found, expected) -> None:
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", mostly_slow(KINDS, "h264.ts", "vp9.webm"))
def test_damaged_videos_are_read_alike(tmp_path, name):
    """By `probe_video`, `read_video`, again and again, and `FrameStream`."""
    path = tmp_path / name
    whole = write_clip(path, size=SIZE, gop=12, frames=24, **KINDS[name]).read_bytes()
    rng, compared = np.random.default_rng(0), 0
    for trial in range(14):
        path.write_bytes(damaged(whole, rng, trial))
        info, video = outcome(probe_video, path), outcome(read_video, path)
        for _ in range(3):
            assert_equal(outcome(read_video, path), video)
        if isinstance(info, str):
            assert isinstance(video, str)
            continue
        # A held frame keeps its buffer from the decoder, which may show in damaged frames.
        streamed = [(outcome(frame.image), frame.seconds) for frame in FrameStream(path)]
        assert len(streamed) == info.num_frames
        images, seconds = zip(*streamed, strict=True)
        for k in {0, len(images) // 2, len(images) - 1}:
            one = outcome(read_video, path, indices=[k])
            if not isinstance(one, str) and not isinstance(images[k], str):
                np.testing.assert_array_equal(one[0], images[k])
                compared += 1
        np.testing.assert_allclose(frame_times(path, range(info.num_frames)), seconds)
        if isinstance(video, str):
            assert "damage in frame" in video or "cannot be decoded" in video or "sizes" in video
            continue
        assert len(video) == info.num_frames
        np.testing.assert_array_equal(images, video)
    assert compared >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_threads_change_nothing_of_damaged_videos(tmp_path, monkeypatch, name):
    """On machines with few and many cores."""
    from vivit_jax.data.video import decoder

    path = tmp_path / name
    whole = write_clip(path, size=SIZE, gop=12, frames=24, **KINDS[name]).read_bytes()
    rng, set_threads = np.random.default_rng(1), decoder.set_threads
    for trial in range(10):
        path.write_bytes(damaged(whole, rng, trial))
        found = []
        for threads, _ in itertools.product((1, 4, 16), range(2)):

            def chosen(stream, several, threads=threads):
                set_threads(stream, several and threads > 1)
                if decoder.uses_threads(stream):
                    stream.codec_context.thread_count = threads

            monkeypatch.setattr("vivit_jax.data.video.opened.set_threads", chosen)
            found.append(outcome(read_video, path))
        for other in found[1:]:
            assert_equal(other, found[0])


# Offsets and bits whose change frame threads reported in some of the calls.
UNSTEADY = {
    "h264.flv": (
        dict(size=(320, 240)),
        [(4853, 0), (4911, 3), (4891, 3)],
    ),
    "mpeg4.avi": (dict(codec="mpeg4", size=SIZE), [(7023, 0)]),
}


@pytest.mark.parametrize("name", UNSTEADY)
def test_damage_is_seen_in_every_call_or_in_none(tmp_path, name):
    path = tmp_path / name
    options, bits = UNSTEADY[name]
    whole = write_clip(path, gop=12, frames=24, **options).read_bytes()
    for place, bit in bits:
        data = bytearray(whole)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        first = outcome(read_video, path)
        for _ in range(24):
            assert_equal(outcome(read_video, path), first)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9"])
def test_frames_decoded_from_several_keyframes_at_a_time(tmp_path, monkeypatch, codec):
    """For any number of cores, also in open GOPs, where pictures need the GOP before."""
    options = {"x264-params": "open-gop=1:keyint=12"} if codec == "libx264" else None
    path = write_clip(tmp_path / "clip.mkv", frames=120, gop=12, codec=codec, options=options)
    shown = every_frame(path)
    for cores in (1, 3, 64):
        monkeypatch.setattr("vivit_jax.data.video.sequence.usable_cores", lambda cores=cores: cores)
        np.testing.assert_array_equal(read_video(path), shown)
        wanted = [119, 0, 60, 61, 60, 12, 11, 95]
        np.testing.assert_array_equal(read_video(path, indices=wanted), shown[wanted])


def test_parts_of_a_table(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", frames=120, gop=12, b_frames=0)
    table = packet_table(str(path))
    for parts in (1, 2, 3, 100):
        for wanted in (np.arange(120), np.array([5]), np.array([3, 4, 50, 90, 91])):
            found = divided(table, wanted, parts)
            np.testing.assert_array_equal(np.concatenate(found), wanted)
            assert 0 < len(found) <= parts
            assert sum(count_needed(table, part) for part in found) == count_needed(table, wanted)
    assert [len(part) for part in divided(table, np.arange(120), 3)] == [48, 36, 36]


def test_a_file_whose_end_is_zeros(tmp_path, caplog):
    """Like a preallocated download: clips in the missing part are refused, not frozen."""
    path = tmp_path / "zeros.mp4"
    write_clip(path, frames=60, b_frames=0, options=MEDIUM, container_options=FIRST_INDEX)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + bytes(len(data) - len(data) * 2 // 3))
    assert probe_video(path).num_frames == 60
    assert read_video(path, num_frames=8, start="begin").shape == (8, 48, 64, 3)
    config = vivit_jax.VivitConfig(num_frames=8, tubelet_size=(2, 16, 16))
    for _ in range(2):
        with pytest.raises(VideoError, match="8 of the 8 frames asked cannot be .* .frames 52,"):
            read_video(path, num_frames=8, start="end", lost="few")
        with pytest.raises(VideoError, match="8 of the 8 frames asked cannot be .* .frames 52,"):
            read_clip(path, config, stride=1, start=52)
        with pytest.raises(VideoError, match="8 of the 8 frames asked cannot be .* .frames 52,"):
            read_frames(Example(str(path), 0), range(52, 60))
    assert len(caplog.messages) == 1
    with pytest.raises(VideoError, match=r"\d+ of the 60 frames asked cannot be decoded"):
        read_video(path, lost="error")
    with pytest.raises(UserError, match="lost is 'no'; expected 'repeat', 'few' or 'error'"):
        read_video(path, lost="no")


def test_a_lost_frame_is_the_same_whatever_is_asked_with_it(tmp_path):
    path = tmp_path / "zeros.mp4"
    write_clip(path, frames=60, b_frames=0, options=MEDIUM, container_options=FIRST_INDEX)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] + bytes(len(data) - len(data) * 2 // 3))
    video = read_video(path)
    np.testing.assert_array_equal(video[-1], video[-2])
    np.testing.assert_array_equal([frame.image() for frame in FrameStream(path)], video)
    for start in ("begin", 35, "center", "end"):
        clip = read_video(path, num_frames=8, start=start)
        first = {"begin": 0, "center": 26, "end": 52}.get(start, start)
        np.testing.assert_array_equal(clip, video[first : first + 8])
    for k in (8, 59):
        np.testing.assert_array_equal(read_video(path, indices=[k])[0], video[k])


def test_a_changed_file_is_warned_of_anew(tmp_path, caplog):
    path = tmp_path / "cut.avi"
    whole = write_clip(path, codec="mpeg4", b_frames=0, size=(128, 96)).read_bytes()
    for part in (0.8, 0.7):
        path.write_bytes(whole[: int(len(whole) * part)])
        for _ in range(3):
            read_video(path)
            probe_video(path)
    assert len([m for m in caplog.messages if "incomplete: 30 frames announced" in m]) == 2


def test_a_damaged_keyframe_of_an_open_gop(tmp_path, caplog):
    """Decoding from it and from the start show the same frames."""
    path = tmp_path / "clip.mp4"
    write_clip(path, frames=48, gop=12, codec="libx265", size=SIZE)
    table = packet_table(str(path))
    assert any((table.pts[key:] < table.pts[key]).any() for key in table.keys)  # open
    whole = path.read_bytes()
    caplog.set_level("DEBUG", "vivit_jax.data.video.sequence")
    read_video(path, indices=[20, 47])
    assert not caplog.messages  # not from the start
    position, size = packet_spans(path)[table.keys[-1]]
    for place in range(position + 40, position + size, size // 12):
        data = bytearray(whole)
        data[place] ^= 0x55
        path.write_bytes(data)
        video = read_video(path)
        for k in range(36, 48):
            np.testing.assert_array_equal(read_video(path, indices=[k])[0], video[k])


def test_a_refused_picture_that_no_other_needs(tmp_path):
    """Pictures after it are the same whether seeking skips it or the decoder refuses it."""
    path = tmp_path / "clip.mp4"
    write_clip(path, frames=12, gop=12, size=(128, 96), options=MEDIUM)
    whole, spans, refused = path.read_bytes(), packet_spans(path), 0
    passing = [k for k, (place, _) in enumerate(spans) if not whole[place + 4] & 0x60]
    assert len(passing) > 3
    for packet, byte in itertools.product(passing, (6, 7, 8)):
        data = bytearray(whole)
        data[spans[packet][0] + byte] ^= 0xFF
        path.write_bytes(data)
        video = outcome(read_video, path)
        if isinstance(video, str):
            continue
        refused += len(decode_sparse(str(path), packet_table(str(path)), np.arange(12), id)) == 0
        for k in range(12):
            one = outcome(read_video, path, indices=[k])
            np.testing.assert_array_equal(one[0], video[k], err_msg=f"{packet} {byte} {k}")
    assert refused > 3
