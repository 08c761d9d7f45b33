# SPDX-License-Identifier: Apache-2.0
import gc
import logging
import re
import threading
import weakref

import av
import numpy as np
import pytest
from clips import every_frame, number_in, write_clip

import vivit_jax
from vivit_jax.data.video import decoder, pictures
from vivit_jax.data.video.frame_stream import FrameStream, read_ahead

KINDS = {
    "h264 mp4": ("a.mp4", {}),
    "h264 mkv, b-frames": ("a.mkv", {"b_frames": 3, "gop": 12}),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4", "b_frames": 0}),
    "vp9 webm": ("a.webm", {"codec": "libvpx-vp9", "b_frames": 0}),
    "rotated": ("a.mp4", {"display": (90, False), "size": (48, 64)}),
    "variable rate": ("a.mp4", {"times": [k / 25 + 0.3 * (k > 9) for k in range(30)]}),
}


@pytest.fixture(scope="module", params=KINDS)
def clip(request, tmp_path_factory):
    name, options = KINDS[request.param]
    return write_clip(tmp_path_factory.mktemp("stream") / name, **options), request.param


def images(path) -> np.ndarray:
    return np.stack([frame.image() for frame in FrameStream(path)])


def test_frames_are_those_of_read_video(clip):
    path, _ = clip
    frames = list(FrameStream(path))
    assert [frame.index for frame in frames] == list(range(30))
    np.testing.assert_array_equal([f.image() for f in frames], vivit_jax.read_video(path))
    assert [number_in(f.image()) for f in frames] == list(range(30))


def test_seconds_are_the_times_that_were_written(clip):
    path, kind = clip
    times = KINDS[kind][1].get("times") or [k / 25 for k in range(30)]
    stream = FrameStream(path)
    # Matroska counts milliseconds.
    np.testing.assert_allclose([f.seconds for f in stream], times, atol=6e-4)
    assert stream.announced == 30
    expected = vivit_jax.probe_video(path).fps
    assert abs(stream.fps - expected) < 1e-6


def test_a_second_pass_decodes_anew(clip):
    stream = FrameStream(clip[0])
    first = next(iter(stream)).image()
    again = [frame.image() for frame in stream]
    assert len(again) == 30 and np.array_equal(first, again[0])


def test_frames_are_not_held(tmp_path):
    """Of 200 frames no more are alive than a decoder with its threads holds."""
    path = write_clip(tmp_path / "long.mp4", frames=200)
    alive, most = weakref.WeakSet(), 0
    for frame in FrameStream(path):
        alive.add(frame)
        most = max(most, len(alive))
    assert most <= 2


def test_pixels_are_converted_only_where_asked(tmp_path, monkeypatch):
    converted, rgb = [], pictures.rgb
    monkeypatch.setattr(pictures, "rgb", lambda *args: converted.append(1) or rgb(*args))
    path = write_clip(tmp_path / "a.mp4")
    for frame in FrameStream(path):
        if frame.index % 10 == 0:
            frame.image()
    assert len(converted) == 3


def test_closing_early_ends_decoding(tmp_path, monkeypatch):
    calls, decode_packet = [], decoder.decode_packet
    monkeypatch.setattr(
        decoder, "decode_packet", lambda *args: calls.append(1) or decode_packet(*args)
    )
    frames = iter(FrameStream(write_clip(tmp_path / "a.mp4", frames=200)))
    next(frames)
    frames.close()
    assert len(calls) < 60


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_truncated_file_gives_the_frames_that_read_video_gives(tmp_path, caplog, name):
    options = {"container_options": {"movflags": "faststart"}} if name == "a.mp4" else {}
    path = write_clip(tmp_path / name, frames=60, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    with caplog.at_level(logging.WARNING):
        streamed = images(path)
    told = caplog.text
    np.testing.assert_array_equal(streamed, vivit_jax.read_video(path))
    assert 10 < len(streamed) < 60 and "incomplete" in told


def packet_bytes(path, number: int) -> slice:
    """The span of a packet of an mp4 in the file."""
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][number]
        return slice(packet.pos, packet.pos + packet.size)


@pytest.mark.parametrize("frames", [30, 120])
def test_decoding_goes_on_after_a_packet_that_cannot_be_decoded(tmp_path, caplog, frames):
    """Also if the decoder's threads have given frames before the error surfaces."""
    path = write_clip(tmp_path / "damaged.mp4", frames=frames, b_frames=2)
    data, place, half = bytearray(path.read_bytes()), packet_bytes(path, frames // 2), frames // 2
    data[place] = bytes(place.stop - place.start)
    path.write_bytes(data)
    streamed = images(path)
    assert len(streamed) == frames == vivit_jax.probe_video(path).num_frames
    lost = r"\d+ frames can be decoded from %d packets .packet %d: Invalid data.*; frames? \d+"
    assert re.search(lost % (frames, half), caplog.text) and len(caplog.messages) == 1
    np.testing.assert_array_equal(streamed, vivit_jax.read_video(path))
    kept = [*range(half - 4), *range(half + 10, frames)]
    assert [number_in(streamed[k]) for k in kept] == kept
    np.testing.assert_allclose([f.seconds for f in FrameStream(path)], np.arange(frames) / 25)


def shortage_of(path) -> str:
    stream = FrameStream(path)
    return stream.shortage(len(list(stream)))


def test_a_whole_file_is_not_called_damaged(tmp_path):
    assert shortage_of(write_clip(tmp_path / "a.mp4")) == ""


def test_a_damaged_frame_is_refused_where_its_pixels_are_asked_for(tmp_path, caplog):
    path = write_clip(tmp_path / "a.mp4", b_frames=0, options={"preset": "medium"}, size=(128, 96))
    whole, data, place = every_frame(path), bytearray(path.read_bytes()), packet_bytes(path, 13)
    middle = slice((place.start + place.stop) // 2, place.stop - 4)
    data[middle] = bytes(byte ^ 255 for byte in data[middle])
    path.write_bytes(data)
    seen = 0
    for frame in FrameStream(path):
        seen += 1
        if frame.index < 13:
            np.testing.assert_array_equal(frame.image(), whole[frame.index])
        if frame.index == 13:
            with pytest.raises(vivit_jax.VideoError, match=f"{path}.*damage in frame 13 of those"):
                frame.image()
    assert seen == 30 and "reports errors in frame 13" in caplog.text


def test_frames_of_different_sizes_are_refused(tmp_path):
    small, large = tmp_path / "small.ts", tmp_path / "large.ts"
    write_clip(small, frames=10)
    write_clip(large, frames=10, size=(128, 96))
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(vivit_jax.VideoError, match="64x48 .frame 0., 128x96 .frame 10."):
        images(path)


@pytest.mark.parametrize("content", [b"", b"not a video"])
def test_no_video(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(vivit_jax.VideoError, match="a.mp4.*expected a video file"):
        FrameStream(path)


def test_no_path():
    with pytest.raises(vivit_jax.UserError, match="expected the path of a video file"):
        FrameStream(7)


def test_plain_decode_is_the_definition(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=50, b_frames=3, gop=20)
    np.testing.assert_array_equal(images(path), every_frame(path))


def test_read_ahead_keeps_order_and_is_bounded():
    made, most = [], 0

    def numbers():
        for k in range(50):
            made.append(k)
            yield k

    found = []
    for taken, item in enumerate(read_ahead(numbers(), 3)):
        most = max(most, len(made) - taken)
        found.append(item)
    # Three are queued, the generator holds one, and one has just been taken.
    assert found == list(range(50)) and 1 < most <= 5


def test_read_ahead_raises_after_the_items_before():
    def failing():
        yield 1
        yield 2
        raise vivit_jax.VideoError("third")

    found = []
    with pytest.raises(vivit_jax.VideoError, match="third"):
        for item in read_ahead(failing(), 5):
            found.append(item)
    assert found == [1, 2]


def test_read_ahead_closed_early_ends_the_thread_and_the_generator():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    ahead = read_ahead(endless(), 2)
    next(ahead)
    ahead.close()
    gc.collect()
    assert closed.is_set() and threading.active_count() == before
