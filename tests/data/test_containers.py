# SPDX-License-Identifier: Apache-2.0
"""What containers state: times, rates, joins, streams, orientation, pixel shapes."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import every_frame, number_in, painted, write_clip
from PIL import Image, ImageOps

from vivit_jax.data.read_clip import read_clips
from vivit_jax.data.sliding_window import plan_windows, slide
from vivit_jax.data.video.decode import frame_times, probe_video, read_video
from vivit_jax.data.video.frame_stream import FrameStream
from vivit_jax.presets import PRESETS

UNEVEN = [0.04 * round(k**1.3) for k in range(30)]
ORIENTATION = 0x112  # the EXIF tag


def streamed_seconds(path) -> list[float]:
    return [frame.seconds for frame in FrameStream(path)]


def assert_times(path, times, duration: float, atol: float = 1e-3) -> None:
    info = probe_video(path)
    assert info.num_frames == len(times)
    np.testing.assert_allclose(frame_times(path, range(len(times))), times, atol=atol)
    np.testing.assert_allclose(streamed_seconds(path), times, atol=atol)
    assert info.duration == pytest.approx(duration, abs=2 * atol)
    assert info.fps == pytest.approx(len(times) / duration, rel=0.01)


@pytest.mark.parametrize(
    "name, options",
    [
        ("uneven.ts", {}),
        ("uneven.flv", {}),
        ("uneven.mkv", dict(codec="mpeg4", clock=1000)),
        ("uneven.mp4", dict(codec="mpeg4", clock=1000)),
        ("uneven.nut", {}),
    ],
)
def test_times_of_a_variable_rate(tmp_path, caplog, name, options):
    path = write_clip(tmp_path / name, times=UNEVEN, **options)
    info = probe_video(path)
    last = info.duration - UNEVEN[-1]  # stated, or as long as the others
    assert 0.03 < last < 0.12
    assert_times(path, UNEVEN, UNEVEN[-1] + last)
    assert not caplog.messages


@pytest.mark.parametrize("codec, b_frames", [("mjpeg", 0), ("mpeg4", 2), ("libx264", 2)])
def test_times_of_avi_with_dropped_frames(tmp_path, caplog, codec, b_frames):
    """A tick without a frame repeats the one before: it is announced, and nothing is missing."""
    dropped = {5, 6, 11, 20, 21, 22, 23}
    times = [k / 25 for k in range(37) if k not in dropped]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = tmp_path / "dropped.avi"
    write_clip(path, codec=codec, b_frames=b_frames, pix_fmt=pix_fmt, times=times, clock=25)
    info = probe_video(path)
    assert info.announced_frames == 37 and info.num_frames == 30
    assert_times(path, times, 37 / 25)
    assert not caplog.messages
    assert number_in(read_video(path, indices=[7])[0]) == 7


def test_avi_with_two_ticks_a_frame(tmp_path, caplog):
    """Like 25 fps h264 that was copied into avi, whose ticks are fields."""
    path = write_clip(tmp_path / "copied.avi", times=[k / 25 for k in range(30)], clock=50)
    assert probe_video(path).announced_frames > 55
    assert_times(path, np.arange(30) / 25, 1.2)
    assert not caplog.messages


def test_rate_of_dv(tmp_path, caplog):
    options = dict(codec="dvvideo", size=(720, 576), b_frames=0)
    path = write_clip(tmp_path / "two.dv", frames=2, **options)
    assert_times(path, [0, 0.04], 0.08)
    one = write_clip(tmp_path / "one.dv", frames=1, **options)
    assert probe_video(one).fps == pytest.approx(25)
    assert not caplog.messages


@pytest.mark.parametrize("name", ["raw.h264", "raw.hevc"])
def test_a_stream_without_times_has_the_rate_it_states(tmp_path, name):
    codec = "libx265" if name.endswith("hevc") else "libx264"
    path = write_clip(tmp_path / name, codec=codec, fps=10)
    rate = float(probe_video(path).fps)  # for a raw stream from the codec's headers, or guessed
    assert rate in (10, 25)
    assert_times(path, np.arange(30) / rate, 30 / rate)


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    "name, codec",
    [
        ("a.ts", "libx264"),
        ("a.ts", "libx265"),
        ("a.MTS", "libx264"),
        ("a.mpg", "mpeg2video"),
        ("a.flv", "libx264"),
        ("a.h264", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.mkv", "libx264"),
    ],
)
def test_joined_files(tmp_path, caplog, name, codec):
    """A plain decode's frames, numbered through; times continue where the second file begins."""
    one = write_clip(tmp_path / name, codec=codec)
    path = tmp_path / f"joined.{name}"
    path.write_bytes(one.read_bytes() * 2)
    plain = every_frame(path)
    total = 30 if name == "a.flv" else 60  # FFmpeg reads only the first part of flv
    assert [number_in(f) for f in plain] == [*range(30), *range(30)][:total]
    np.testing.assert_array_equal(read_video(path), plain)
    np.testing.assert_array_equal(read_video(path, indices=[total - 3, 4]), plain[[total - 3, 4]])
    assert_times(path, np.arange(total) / 25, total / 25)
    assert len(caplog.messages) == len(set(caplog.messages))
    if name in ("a.ts", "a.MTS", "a.mpg"):
        assert "times go back or leap at frame 30: taken for streams that were" in caplog.text


def test_a_leap_of_a_transport_stream_is_a_join(tmp_path, caplog):
    first = write_clip(tmp_path / "first.ts", times=[k / 25 for k in range(30)])
    second = write_clip(tmp_path / "second.ts", times=[100 + k / 25 for k in range(30)])
    path = tmp_path / "leap.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert_times(path, np.arange(60) / 25, 2.4)
    assert "go back or leap at frame 30:" in caplog.text
    times = [*np.arange(10) / 25, *5 + np.arange(10) / 25]
    gap = write_clip(tmp_path / "gap.ts", frames=20, times=times)
    assert frame_times(gap, [9, 10]).tolist() == pytest.approx([0.36, 5])


def test_lost_bytes_of_a_transport_stream(tmp_path, caplog):
    """The frames and times of a plain decode, whichever packet of the stream is missing."""
    options = {"preset": "medium", "crf": "8"}
    whole = write_clip(tmp_path / "whole.ts", frames=40, size=(128, 96), options=options)
    data, counts = whole.read_bytes(), []
    for place in range(3, len(data) // 188, len(data) // 188 // 12):
        caplog.clear()
        path = tmp_path / f"lost{place}.ts"
        path.write_bytes(data[: 188 * place] + data[188 * (place + 1) :])
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            frames = list(container.decode(stream))
            times = [float((f.pts - frames[0].pts) * stream.time_base) for f in frames]
            marked = any(frame.is_corrupt for frame in frames)
        video = read_video(path)
        np.testing.assert_array_equal(video, [f.to_ndarray(format="rgb24") for f in frames])
        np.testing.assert_allclose(frame_times(path, range(len(video))), times, atol=1e-9)
        np.testing.assert_array_equal([f.image() for f in FrameStream(path)], video)
        assert probe_video(path).num_frames == len(video)
        read_video(path)
        assert len(caplog.messages) == len(set(caplog.messages))
        said = caplog.text
        assert "bytes are missing" in said or "reports errors" in said or not marked
        counts.append(len(video))
    assert 39 in counts and 40 in counts and min(counts) > 25


def test_lost_bytes_of_an_hevc_transport_stream(tmp_path, caplog):
    """Pictures that refer to a lost one are shown too, as FFmpeg's command line shows them."""
    whole = write_clip(tmp_path / "whole.ts", codec="libx265", frames=48, gop=48, size=(128, 96))
    data, path, marked = whole.read_bytes(), tmp_path / "lost.ts", 0
    for place in range(6, len(data) // 188 - 6, len(data) // 188 // 8):
        caplog.clear()
        path.write_bytes(data[: 188 * place] + data[188 * (place + 1) :])
        with av.open(str(path)) as container:
            packets = sum(packet.size > 0 for packet in container.demux(video=0))
        # The picture itself may be lost.
        assert packets - 1 <= probe_video(path).num_frames == len(read_video(path)) <= packets
        marked += "reports errors in frame" in caplog.text
    assert marked > 2


def mux(path, streams, **dispositions) -> None:
    """Writes (source file, disposition) pairs as the video streams of one file."""
    with av.open(str(path), "w") as out:
        opened = [av.open(str(source)) for source, _ in streams]
        outputs = []
        for (_, disposition), container in zip(streams, opened, strict=True):
            stream = out.add_stream_from_template(container.streams.video[0])
            stream.disposition = disposition
            outputs.append(stream)
        for container, stream in zip(opened, outputs, strict=True):
            for packet in container.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
            container.close()


@pytest.mark.parametrize(
    "defaults, read",
    [((False, False, False), 1), ((False, False, True), 2), ((True, True, False), 1)],
)
@pytest.mark.parametrize("name", ["several.mkv", "several.mp4"])
def test_several_video_streams(tmp_path, caplog, name, defaults, read):
    """The default stream is read, else the largest, and the choice is logged once."""
    sizes = [(64, 48), (128, 96), (96, 64)]
    default = av.stream.Disposition.default
    sources = [
        (write_clip(tmp_path / f"{k}.mp4", frames=12 + k, size=size), default if marked else 0)
        for k, (size, marked) in enumerate(zip(sizes, defaults, strict=True))
    ]
    path = tmp_path / name
    mux(path, sources)
    with av.open(str(path)) as container:
        stored = tuple(bool(s.disposition & default) for s in container.streams.video)
    if stored != defaults:  # a muxer marks the first stream if none is marked
        read = stored.index(True)
    width, height = sizes[read]
    for _ in range(2):
        info, video = probe_video(path), read_video(path)
    assert (info.stream, info.width, info.height, info.num_frames) == (
        read,
        width,
        height,
        12 + read,
    )
    assert video.shape == (12 + read, height, width, 3)
    assert [number_in(frame) for frame in video] == list(range(12 + read))
    assert len(caplog.messages) == 1
    assert f"3 video streams: reading stream {read} ({width}x{height}" in caplog.text


@pytest.mark.parametrize("name", ["wide.mp4", "wide.mkv", "wide.ts", "wide.avi"])
@pytest.mark.parametrize("aspect", [Fraction(3, 2), Fraction(1, 2)])
def test_pixels_that_are_not_square(tmp_path, name, aspect):
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = write_clip(tmp_path / name, frames=5, codec=codec, aspect=aspect, size=(96, 48))
    info = probe_video(path)
    assert info.pixel_aspect == float(aspect) and (info.width, info.height) == (96, 48)
    stored, square = read_video(path), read_video(path, square_pixels=True)
    assert stored.shape == (5, 48, 96, 3)
    width = int(96 * aspect)
    assert square.shape == (5, 48, width, 3)
    assert [number_in(frame) for frame in square] == list(range(5))
    for frame, wanted in zip(stored, square, strict=True):
        resized = Image.fromarray(frame).resize((width, 48), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(resized).astype(int) - wanted).mean() < 4
    one = read_video(path, indices=[3], square_pixels=True)[0]
    np.testing.assert_array_equal(one, square[3])


def test_square_pixels_of_a_turned_picture(tmp_path):
    path = tmp_path / "turned.mp4"
    write_clip(path, frames=3, size=(48, 96), display=(90, False), aspect=Fraction(3, 2))
    info = probe_video(path)
    assert info.pixel_aspect == 2 / 3 and (info.width, info.height) == (96, 48)
    assert read_video(path, square_pixels=True).shape == (3, 72, 96, 3)
    square = write_clip(tmp_path / "square.mp4", frames=3)
    assert probe_video(square).pixel_aspect == 1
    np.testing.assert_array_equal(read_video(square, square_pixels=True), read_video(square))


def test_clips_with_square_pixels(tmp_path):
    config = PRESETS["videomae-base"].config
    path = write_clip(tmp_path / "wide.mp4", frames=20, aspect=Fraction(2, 1))
    (stored,), (square,) = (read_clips(path, config, square_pixels=choice) for choice in (0, 1))
    assert stored.frames.shape[1:3] == (48, 64) and square.frames.shape[1:3] == (48, 128)
    np.testing.assert_array_equal(stored.indices, square.indices)


def test_windows_by_the_second_of_a_transport_stream(tmp_path):
    """Windows begin by the frames' own times, not by a constant rate."""
    path = write_clip(tmp_path / "uneven.ts", times=UNEVEN)
    windows = plan_windows(PRESETS["videomae-base"].config, 1, "0.5s", "repeat_last")
    begun = [w.indices[0] for w in slide(FrameStream(path), windows, lambda image: image)]
    due = [int(np.searchsorted(np.array(UNEVEN) + 1e-3, at)) for at in np.arange(0, 4, 0.5)]
    assert begun == [k for k in due if k + 15 < 30] + [k for k in due if k + 15 >= 30][:1]
    assert begun != [round(25 * at) for at in np.arange(0, 4, 0.5)][: len(begun)]


def write_jpegs(path, orientation: int) -> None:
    """Motion JPEG whose pictures carry EXIF data, as cameras write it."""
    exif = Image.Exif()
    exif[0x10F], exif[ORIENTATION] = "a camera", orientation
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for k in range(6):
            picture = io.BytesIO()
            Image.fromarray(painted(k)).save(picture, "JPEG", exif=exif, subsampling=2)
            packet = av.Packet(picture.getvalue())
            packet.pts = packet.dts = k
            packet.time_base, packet.stream = Fraction(1, 25), stream
            packet.is_keyframe = True
            out.mux(packet)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["exif.avi", "exif.mkv"])
def test_exif_of_motion_jpeg(tmp_path, name, orientation):
    path = tmp_path / name
    write_jpegs(path, orientation)
    with av.open(str(path)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = []
    for frame in stored:
        image = Image.fromarray(frame)
        image.getexif()[ORIENTATION] = orientation
        expected.append(np.asarray(ImageOps.exif_transpose(image)))
    np.testing.assert_array_equal(read_video(path), expected)
    np.testing.assert_array_equal([f.image() for f in FrameStream(path)], expected)
    info = probe_video(path)
    assert (info.height, info.width) == expected[0].shape[:2]


def test_a_cover_picture_hides_no_missing_end(tmp_path, caplog):
    """A cover picture does not count as a second video whose length the file might state."""
    path, picture = tmp_path / "cover.mkv", io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "png")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": "5", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.add_attachment("cover.png", "image/png", picture.getvalue())
        noise = np.random.default_rng(0)
        for _ in range(40):
            image = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert probe_video(path).num_frames == 40 and not caplog.messages
    whole = path.read_bytes()
    path.write_bytes(whole[: int(0.6 * len(whole))])
    assert 10 < probe_video(path).num_frames < 36
    assert "incomplete or longer in sound: 1.60 s announced" in caplog.text
