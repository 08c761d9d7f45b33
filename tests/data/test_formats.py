# SPDX-License-Identifier: Apache-2.0
"""Which formats FFmpeg may read, and how other files are named in errors."""

import os
import shutil

import av
import numpy as np
import pytest
from clips import number_in, write_clip
from PIL import Image

from vivit_jax import read_video
from vivit_jax.data.video.decode import open_video, probe_video
from vivit_jax.data.video.formats import SAFE_OPTIONS, VIDEO_FORMATS, open_container
from vivit_jax.errors import VideoError

SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
MPD = '<?xml version="1.0"?>\n<MPD profiles="urn:mpeg:dash"><BaseURL>{clip}</BaseURL></MPD>\n'
IMF = '<?xml version="1.0"?>\n<CompositionPlaylist xmlns="x"></CompositionPlaylist>\n'
HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n"
# Kind -> a playlist of that kind that names {clip}, another video.
PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile {clip}\n",
    "hls": HLS + "#EXT-X-ENDLIST\n",
    "sdp": SDP,
    "dash": MPD,
    "imf": IMF,
    "smooth streaming": "<SmoothStreamingMedia MajorVersion='2'>{clip}</SmoothStreamingMedia>",
    "pls": "[playlist]\nFile1={clip}\n",
    "asx": "<asx version='3.0'><entry><ref href='{clip}'/></entry></asx>",
    "xspf": "<?xml version='1.0'?>\n<playlist version='1'><location>{clip}</location></playlist>",
    "smil": "<smil><body><video src='{clip}'/></body></smil>",
    "concat": "# made by a script\nfile '{clip}'\n",
    "redirector": "[Reference]\nRef1={clip}\n",
}
# Demuxers that open other files, connections or devices, in any build of FFmpeg.
OPENERS = {"avisynth", "concat", "dash", "hls", "image2", "imf", "lavfi", "rtp", "rtsp", "sap"}
OPENERS |= {"mlv", "sdp", "vapoursynth", "vobsub", "webm_dash_manifest"}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("formats") / "clip.mp4", frames=4, b_frames=0)


def demuxers():
    found = {}
    for name in sorted(av.formats_available):
        try:
            found[name] = av.ContainerFormat(name, "r")
        except ValueError:  # write-only formats
            continue
    return found


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_is_refused_by_name(tmp_path, video, kind, name):
    path = tmp_path / name
    path.write_text(PLAYLISTS[kind].format(clip=video))
    for read in (read_video, probe_video):
        with pytest.raises(VideoError, match=rf"{name}: a playlist, not a video \({kind}") as bad:
            read(path)
        assert "\n" not in str(bad.value)


@pytest.mark.parametrize(
    "text",
    [
        "\n ffconcat version 1.0\nfile {clip}\n",
        "ffconcat version 1.0\n\0file {clip}\n",
        "\ufeff#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nlist.mp4\n",  # names itself
        HLS,  # which never ends
        "some words\n" + SDP,
        "<!-- " + "x" * 5000 + " -->" + MPD,
    ],
)
def test_playlists_in_other_forms(tmp_path, video, text):
    (tmp_path / "list.mp4").write_text(text.format(clip=video))
    with pytest.raises(VideoError, match="list.mp4: a playlist, not a video"):
        read_video(tmp_path / "list.mp4")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no FIFOs")
def test_no_playlist_waits_for_what_it_names(tmp_path):
    os.mkfifo(tmp_path / "fifo.ts")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile fifo.ts\n")
    with pytest.raises(VideoError, match="a playlist, not a video"):
        read_video(tmp_path / "list.mp4")


def test_every_demuxer_that_is_not_listed_is_refused(video):
    """Even if it is requested by name, so that nothing depends on how FFmpeg probes."""
    listed = set(SAFE_OPTIONS["format_whitelist"].split(","))
    refused = []
    for name in demuxers():
        if listed & set(name.split(",")):
            continue
        with pytest.raises(av.ArgumentError):  # before the format reads or opens anything
            av.open(str(video), format=name, options=SAFE_OPTIONS)
        refused.append(name)
    assert {"concat", "hls", "sdp", "image2", "rtsp"} <= set(refused)
    assert not OPENERS & listed


def test_no_listed_format_reads_anything_but_its_file():
    """A device or a pattern says so in its flags."""
    listed = set(VIDEO_FORMATS.split(","))
    held = {name: made for name, made in demuxers().items() if listed & set(name.split(","))}
    assert len(held) > 100
    assert not [name for name, made in held.items() if made.no_file]


def asked_for(path, **arguments) -> list[str]:
    """The other files that FFmpeg opens."""
    asked = []

    def opened(url, flags, options):
        if url == str(path):
            return open(path, "rb")
        asked.append(url)
        raise OSError(url)

    try:
        with av.open(str(path), io_open=opened, **arguments) as container:
            for _, packet in zip(range(100), container.demux(), strict=False):
                assert packet.size < 1 << 20
    except (av.FFmpegError, OSError, ValueError):
        pass
    return asked


@pytest.mark.parametrize("kind", ["ffconcat", "hls", "dash", "imf", "sdp"])
def test_no_listed_format_opens_what_a_text_names(tmp_path, video, kind):
    path = tmp_path / "list.mp4"
    path.write_text(PLAYLISTS[kind].format(clip=video))
    if kind == "hls":  # a control: opening is noticed
        assert str(video) in asked_for(path, format=kind)
    listed = set(VIDEO_FORMATS.split(","))
    for name in demuxers():
        if listed & set(name.split(",")):
            assert not asked_for(path, format=name, options=SAFE_OPTIONS), name


def test_the_only_protocol_is_file(video):
    for address in (f"cache:{video}", f"subfile,,start,0,end,0,,:{video}", "tcp://127.0.0.1:9"):
        with pytest.raises(av.FFmpegError):
            av.open(address, options=SAFE_OPTIONS)
    with av.open(f"file:{video}", options=SAFE_OPTIONS) as container:
        assert container.format.name.startswith("mov")


@pytest.mark.parametrize("name", ["clip%03d.png", "c?.png", "c*.png", "c{1}.png", "clip%d.jpg"])
def test_a_pattern_is_the_file_named(tmp_path, name):
    if os.name == "nt" and set(name) & set("?*"):
        name = "clip%03d.png"  # other names are not allowed there
    format = name.rsplit(".")[-1].replace("jpg", "jpeg")
    for number, other in enumerate(("clip001.png", "c1.png", "ca.png", "clip1.jpg", name)):
        image = Image.fromarray(np.full((16, 24, 3), 40 * number, np.uint8))
        image.save(tmp_path / other, format=format)
    for read in (read_video(tmp_path / name), read_video(tmp_path / name, indices=[0])):
        np.testing.assert_allclose(read, np.full((1, 16, 24, 3), 160), atol=2)
    (tmp_path / name).unlink()
    with pytest.raises(VideoError, match="no such file"):
        read_video(tmp_path / name)


def test_a_video_may_be_called_like_a_pattern(tmp_path, video):
    path = tmp_path / "clip%03d{.png"
    shutil.copy(video, path)
    assert [number_in(frame) for frame in read_video(path)] == [0, 1, 2, 3]


def test_text_and_subtitles_are_named(tmp_path):
    (tmp_path / "talk.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n")
    with pytest.raises(VideoError, match="talk.srt: a text file; expected a video"):
        read_video(tmp_path / "talk.srt")


def test_options_reach_the_container(video):
    with open_container(str(video), {"fflags": "noparse"}) as container:
        assert container.streams.video[0].frames == 4


def test_a_file_that_is_gone_once_it_is_opened(tmp_path):
    with (
        pytest.raises(VideoError, match="clip.mp4: no readable video .No such file"),
        open_video(str(tmp_path / "clip.mp4")),
    ):
        pass
