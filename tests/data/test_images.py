# SPDX-License-Identifier: Apache-2.0
"""Animated WebP and GIF files as videos, and bounds on what a picture may unpack to."""

import os
import struct
import zlib

import numpy as np
import pytest
from clips import painted, write_clip
from PIL import Image

from vivit_jax import read_video
from vivit_jax.data.datasets.dataset import Example, read_dataset, read_frames, read_views
from vivit_jax.data.video.decode import frame_times, probe_video
from vivit_jax.data.video.frame_stream import open_stream
from vivit_jax.errors import UserError, VideoError
from vivit_jax.files.limits import VARIABLE

# Milliseconds, whole hundredths of a second for gif. Browsers and FFmpeg read 0.01 s as 0.1 s.
DURATIONS = [100, 40, 250, 20, 1000, 60]
STARTS = [0, 0.1, 0.14, 0.39, 0.41, 1.41]


def write_animation(path, count=6, durations=DURATIONS, **options):
    images = [Image.fromarray(painted(k)) for k in range(count)]
    options = dict(lossless=True) | options if path.suffix == ".webp" else options
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=durations[:count], **options
    )
    return path


@pytest.fixture(scope="module", params=["webp", "gif", "apng"])
def animation(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("animations") / f"clip.{request.param}"
    return write_animation(path, **({"format": "png"} if request.param == "apng" else {}))


def as_pillow_shows(path):
    with Image.open(path) as image:
        shown = []
        for k in range(image.n_frames):
            image.seek(k)
            shown.append(np.asarray(image.convert("RGB")))
    return np.stack(shown)


def test_an_animation_is_a_video(animation):
    expected = as_pillow_shows(animation)
    if animation.suffix != ".gif":  # which has 256 colours
        np.testing.assert_array_equal(expected, [painted(k) for k in range(6)])
    np.testing.assert_array_equal(read_video(animation), expected)
    np.testing.assert_array_equal(read_video(animation, indices=[5, 1, 1]), expected[[5, 1, 1]])
    clip = read_video(animation, num_frames=3, stride=2, start="end")
    np.testing.assert_array_equal(clip, expected[[1, 3, 5]])
    looped = read_video(animation, num_frames=8, pad="loop")
    np.testing.assert_array_equal(looped, expected[[0, 1, 2, 3, 4, 5, 0, 1]])
    info = probe_video(animation)
    assert (info.num_frames, info.height, info.width) == (6, 48, 64)
    assert info.duration == pytest.approx(1.47) and info.fps == pytest.approx(6 / 1.47)
    assert (info.rotation, info.mirrored) == (0, False)
    np.testing.assert_allclose(frame_times(animation, [5, 0, 4]), [1.41, 0, 0.41])
    frames = list(open_stream(animation))
    np.testing.assert_allclose([frame.seconds for frame in frames], STARTS)
    assert [frame.index for frame in frames] == list(range(6))
    np.testing.assert_array_equal([frame.image() for frame in frames], expected)
    for read in (lambda: read_video(animation, indices=[6]), lambda: frame_times(animation, [6])):
        with pytest.raises(VideoError, match=f"{animation.name}: no such frames: 6; there are 6"):
            read()
    with pytest.raises(VideoError, match="clip.*: start is frame 9 but there are 6 frames"):
        read_video(animation, num_frames=2, start=9)


def test_an_animation_with_alpha_and_parts_is_shown_whole(tmp_path):
    """Frames that only hold changes, some of them transparent."""
    path = tmp_path / "clip.webp"
    images = []
    for k in range(4):
        image = Image.new("RGBA", (40, 30), (200, 30, 30, 255))
        image.paste((30, 200, 30, 128), (8 * k, 4, 8 * k + 8, 12))
        images.append(image)
    images[0].save(path, save_all=True, append_images=images[1:], duration=50, lossless=True)
    expected = np.stack([np.asarray(image)[..., :3] for image in images])
    np.testing.assert_array_equal(read_video(path), expected)
    assert probe_video(path).pixel_format == "rgba"


def test_a_still_webp_is_a_video_of_one_frame(tmp_path):
    path = tmp_path / "still.webp"
    Image.fromarray(painted(3)).save(path, lossless=True)
    np.testing.assert_array_equal(read_video(path), painted(3)[None])
    info = probe_video(path)
    assert info.num_frames == 1 and info.duration == 0 and np.isnan(info.fps)
    assert frame_times(path, [0]).tolist() == [0]


def test_a_webp_under_another_name_is_one(tmp_path):
    write_animation(tmp_path / "clip.webp").rename(tmp_path / "clip.mp4")
    assert probe_video(tmp_path / "clip.mp4").num_frames == 6
    # A video named like a picture is still a video.
    write_clip(tmp_path / "clip.mkv", frames=5).rename(tmp_path / "other.webp")
    assert probe_video(tmp_path / "other.webp").num_frames == 5


def test_a_truncated_webp(tmp_path, caplog):
    path = write_animation(tmp_path / "cut.webp")
    data, reads = path.read_bytes(), 0
    for kept in range(0, len(data), 97):
        path.write_bytes(data[:kept])
        try:
            info = probe_video(path)
        except VideoError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            with pytest.raises(VideoError):
                read_video(path)
        else:
            reads += 1
            shown = read_video(path)
            assert len(shown) == info.num_frames == len(frame_times(path, range(len(shown))))
            np.testing.assert_array_equal(shown, [painted(k) for k in range(len(shown))])
    assert reads or not caplog.text


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_animations_in_folders_of_classes(tmp_path, ending):
    for label, name in enumerate(("run", "walk")):
        (tmp_path / name).mkdir()
        for k in range(2):
            write_animation(tmp_path / name / f"{k}.{ending}", count=4 + label)
    found = read_dataset(tmp_path)
    assert found.classes == ("run", "walk")
    assert [os.path.relpath(e.path, tmp_path) for e in found.examples] == [
        os.path.join(name, f"{k}.{ending}") for name in ("run", "walk") for k in range(2)
    ]
    how = dict(num_frames=2, stride=1, sampler="loop", clips=1)
    clips, indices = read_views(found.examples[2], **how)
    np.testing.assert_array_equal(clips[0], as_pillow_shows(found.examples[2].path)[indices[0]])
    alone = read_dataset(tmp_path / "run")  # a directory of clips
    assert len(alone) == 2 and alone.classes is None
    (tmp_path / "list.txt").write_text(f"run/0.{ending} 1 2 0\nwalk/0.{ending} 1\n")
    first = read_dataset(tmp_path / "list.txt", labels=1).examples[0]
    np.testing.assert_array_equal(
        read_frames(first, [0, 1]), as_pillow_shows(tmp_path / f"run/0.{ending}")[1:3]
    )


def test_folders_of_still_webp_images_are_clips(tmp_path):
    for name in ("run", "walk"):
        for clip in ("a", "b"):
            (tmp_path / name / clip).mkdir(parents=True)
            for k in range(3):
                Image.fromarray(painted(k)).save(
                    tmp_path / name / clip / f"{k}.webp", lossless=True
                )
    found = read_dataset(tmp_path)
    assert len(found) == 4 and found.classes == ("run", "walk")
    np.testing.assert_array_equal(read_frames(found.examples[0], [2]), [painted(2)])
    write_animation(tmp_path / "run" / "a" / "2.webp")
    with pytest.raises(VideoError, match="2.webp: not a readable image: an animation of 6 frames"):
        read_frames(found.examples[0], [2])


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_bomb(path, width, height):
    """A png of black pixels, a few kB for billions."""
    packed = zlib.compressobj(9)
    line = bytes(1 + width * 3)
    rows = b"".join([packed.compress(line) for _ in range(height)] + [packed.flush()])
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", size), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("size", [(1000, 500), (5000, 40000), (30000, 30000)])
def test_a_picture_of_more_pixels_than_allowed_is_refused(tmp_path, monkeypatch, size):
    """By a lowered limit, by this library's limit and by Pillow's."""
    path = tmp_path / "0.png"
    if size == (1000, 500):
        write_bomb(path, *size)
        assert read_video(path).shape == (1, 500, 1000, 3)
        monkeypatch.setenv(VARIABLE, str(499_999 * 8))
    else:  # refused by its header
        header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") * 2)
    for read in (
        lambda: read_video(path),
        lambda: probe_video(path),
        lambda: read_frames(Example(str(tmp_path), 0), [0]),
    ):
        with pytest.raises(VideoError, match=f"0.png: frames of .* pixels: .*{VARIABLE}") as bad:
            read()
        assert "\n" not in str(bad.value)


def test_the_limit_of_pixels_can_be_raised(tmp_path, monkeypatch):
    path = tmp_path / "0.png"
    write_bomb(path, 1000, 500)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own
    example = Example(str(tmp_path), 0)
    monkeypatch.setenv(VARIABLE, str(100_000 * 8))
    with pytest.raises(VideoError, match="0.png: frames of .* at most 100,000 pixels"):
        read_frames(example, [0])
    monkeypatch.setenv(VARIABLE, str(500_000 * 8))
    assert read_frames(example, [0]).shape == read_video(path).shape == (1, 500, 1000, 3)
    monkeypatch.setenv(VARIABLE, "many")
    with pytest.raises(UserError, match=f"{VARIABLE} is 'many', expected a positive number"):
        read_frames(example, [0])


@pytest.mark.parametrize("name, codec", [("h264.mp4", "libx264"), ("mpeg4.avi", "mpeg4")])
def test_a_video_of_more_pixels_than_allowed_is_refused(tmp_path, monkeypatch, name, codec):
    path = write_clip(tmp_path / name, frames=3, codec=codec, b_frames=0)
    monkeypatch.setenv(VARIABLE, str(64 * 48 * 8))
    assert read_video(path).shape == (3, 48, 64, 3)
    monkeypatch.setenv(VARIABLE, str(64 * 48 * 8 - 8))
    for read in (read_video, probe_video):
        with pytest.raises(VideoError, match=rf"{name}: .*(64 x 48 \(w x h\); expected at most)"):
            read(path)


def test_a_video_that_grows_is_bounded_too(tmp_path, monkeypatch):
    """A frame size that grows after the part that FFmpeg probes."""
    path = tmp_path / "both.h264"
    small = write_clip(tmp_path / "64.h264", frames=200, b_frames=0, size=(64, 64))
    large = write_clip(tmp_path / "512.h264", frames=4, b_frames=0, size=(512, 512))
    path.write_bytes(small.read_bytes() + large.read_bytes())
    assert read_video(path, indices=[202]).shape == (1, 512, 512, 3)
    monkeypatch.setenv(VARIABLE, str(65 * 65 * 8))
    assert read_video(path, indices=[150]).shape == (1, 64, 64, 3)
    with pytest.raises(VideoError):
        read_video(path, indices=[202])
