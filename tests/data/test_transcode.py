# SPDX-License-Identifier: Apache-2.0
"""Videos encoded again in a smaller size, against the source's frames scaled by Pillow."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import number_in, painted, write_clip
from PIL import Image

from vivit_jax.data.video.decode import frame_times, probe_video, read_video
from vivit_jax.data.video.transcode import check_short_side, scaled_size, transcoded
from vivit_jax.errors import UserError, VideoError

TIMES = [*itertools.accumulate([0.04, 0.06, 0.01, 0.4, 0.1] * 4)]
KINDS = {
    "h264.mp4": {},
    "turned.mov": {"display": (90, False)},
    "mirrored.mov": {"display": (270, True)},
    "uneven.mkv": {"times": TIMES},
    "ten.mkv": {"codec": "ffv1", "pix_fmt": "yuv420p10le"},
    "rgb.mkv": {"codec": "ffv1", "pix_fmt": "bgr0"},
    "bt709.mp4": {"options": {"colorspace": "bt709", "color_trc": "bt709"}},
    "full.mp4": {"options": {"x264-params": "fullrange=on"}},
}


def scaled(image, size):
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS))


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_the_sources_scaled_at_the_same_times(tmp_path, name):
    frames = len(TIMES)
    source = write_clip(tmp_path / name, frames, size=(128, 96), **KINDS[name])
    made = tmp_path / "made.mp4"
    made.write_bytes(transcoded(str(source), 48))
    before, after = probe_video(source), probe_video(made)
    assert (after.codec, after.pixel_format, after.rotation) == ("h264", "yuv420p", 0)
    size = scaled_size(before.height, before.width, 48)
    assert min(size) == 48 and (after.height, after.width) == size
    found, whole = read_video(made), read_video(source)
    assert len(found) == len(whole) == frames
    assert [number_in(image) for image in found] == [*range(frames)]
    expected = np.stack([scaled(image, size) for image in whole])
    error = found.astype(float) - expected
    # Measured: 40 to 43 dB, and -0.9 to 0.7 on average in a channel; the last of it is rounding in
    # FFmpeg's conversion to RGB and back where the source is RGB.
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 36
    assert np.abs(error.mean((0, 1, 2))).max() < 2
    times = [frame_times(path, range(frames)) for path in (made, source)]
    np.testing.assert_allclose(*times, atol=2e-5)  # ticks of 1/90000 s


def test_the_form_of_pixels_stays(tmp_path):
    """As sides are scaled alike; of a turned video it is that of the turned pixels."""
    for name, display in (("a.mp4", None), ("turned.mov", (90, False))):
        aspect = Fraction(16, 11)
        source = write_clip(tmp_path / name, 5, size=(128, 96), display=display, aspect=aspect)
        (tmp_path / "made.mp4").write_bytes(transcoded(str(source), 48))
        found = probe_video(tmp_path / "made.mp4").pixel_aspect
        assert found == probe_video(source).pixel_aspect
        assert found == pytest.approx(float(aspect if display is None else 1 / aspect))


def keyframes(path):
    with av.open(str(path)) as made:
        return [k for k, packet in enumerate(made.demux(video=0)) if packet.is_keyframe]


def test_keyframes_are_where_they_are_wanted(tmp_path):
    """Neither at the source's keyframes nor at cuts, where they would take bytes for no seeking."""
    with av.open(str(tmp_path / "cuts.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)  # each frame is a keyframe
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        rng = np.random.default_rng(0)
        for k in range(60):
            if k % 12 == 0:
                scene = rng.integers(0, 256, (96, 128, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scene)))
        container.mux(stream.encode())
    close = write_clip(tmp_path / "close.mp4", 60, size=(128, 96), gop=5)
    for source in (tmp_path / "cuts.mkv", close):
        (tmp_path / "made.mp4").write_bytes(transcoded(str(source), 64))
        assert keyframes(tmp_path / "made.mp4") == [0, 32]


def test_frames_that_are_shown_at_one_time_stay_apart(tmp_path):
    """Closer than a tick of the made video's clock, where an encoder takes no two."""
    times = [0, 0.04, 0.04, 0.08, 0.08, 0.08, 0.2]
    source = write_clip(
        tmp_path / "a.mkv", 7, codec="ffv1", size=(128, 96), times=times, b_frames=0
    )
    (tmp_path / "made.mp4").write_bytes(transcoded(str(source), 48))
    assert [number_in(image) for image in read_video(tmp_path / "made.mp4")] == [*range(7)]
    np.testing.assert_allclose(frame_times(tmp_path / "made.mp4", range(7)), times, atol=4e-5)


def test_moving_pictures_become_videos(tmp_path):
    pictures = [Image.fromarray(painted(k, 128, 96)) for k in range(6)]
    moving = {
        "save_all": True,
        "append_images": pictures[1:],
        "duration": [100, 50, 300, 40, 40, 40],
    }
    for name in ("w.webp", "g.gif"):
        pictures[0].save(tmp_path / name, **moving)
        (tmp_path / "made.mp4").write_bytes(transcoded(str(tmp_path / name), 48))
        assert [number_in(image) for image in read_video(tmp_path / "made.mp4")] == [*range(6)]
        times = frame_times(tmp_path / "made.mp4", range(6))
        np.testing.assert_allclose(times, [0, 0.1, 0.15, 0.45, 0.49, 0.53], atol=2e-5)


def test_the_bytes_are_the_same_each_time_and_ready_for_ranges(tmp_path):
    source = write_clip(tmp_path / "a.mp4", 70, size=(128, 96), gop=70)
    made = transcoded(str(source), 48)
    assert made == transcoded(str(source), 48)
    assert made.index(b"moov") < made.index(b"mdat")
    (tmp_path / "made.mp4").write_bytes(made)
    assert keyframes(tmp_path / "made.mp4") == [0, 32, 64]
    with av.open(str(tmp_path / "made.mp4")) as container:
        assert not container.streams.audio


def test_what_is_small_enough_is_not_encoded_again(tmp_path):
    source = str(write_clip(tmp_path / "a.mp4", 5))
    assert transcoded(source, 48) is None and transcoded(source, 64) is None
    assert transcoded(source, 46) is not None
    assert scaled_size(1080, 1920, 320) == (320, 568) and scaled_size(270, 480, 320) == (270, 480)
    assert scaled_size(97, 331, 64) == (64, 218)


def test_wrong_sizes_and_files(tmp_path):
    for wrong in (8, 225, -2):
        with pytest.raises(UserError, match=f"^--resize is {wrong}; expected an even number"):
            check_short_side(wrong, "--resize")
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 2000)
    with pytest.raises(VideoError, match="bad.mp4: no readable video"):
        transcoded(str(tmp_path / "bad.mp4"), 48)
