# SPDX-License-Identifier: Apache-2.0
"""The file formats that FFmpeg may read, and errors that name the others.

FFmpeg recognises a format by a file's content, whatever its name, and some formats are lists of
other files: a text that begins with "ffconcat version 1.0" or "#EXTM3U" opens what it names, also
on a network, may wait at a FIFO or never end. Others are devices, or patterns of names
(clip%03d.png). So only listed formats are allowed, in each of which one file holds its own frames,
and the only protocol is `file`. Formats that a build of FFmpeg adds are refused until listed.
"""

import functools
import io
import os
import re
from typing import Any

from vivit_jax.errors import VideoError
from vivit_jax.files.limits import VARIABLE, unpack_limit
from vivit_jax.files.parts import in_ranges
from vivit_jax.files.ranges import RangeFile
from vivit_jax.files.reading import opened, size_of

EXPECTED = "expected a video file such as mp4, mkv, webm, mov or avi"

# Names of FFmpeg's demuxers; one that the installed FFmpeg lacks does no harm.
# Not mlv, which continues in files beside the one named.
_CONTAINERS = (
    "3g2,3gp,asf,asf_o,avi,dhav,dv,flv,gxf,ifv,ivf,kux,live_flv,lmlm4,lxf,"
    "matroska,mods,moflex,mov,mp4,mpeg,mpegts,mpjpeg,msnwctcp,mtv,mv,mxf,"
    "nsv,nut,nuv,ogg,pmp,pva,rm,ser,smjpeg,swf,vividas,vivo,webm,wtv,xmv"
)
_STREAMS = (
    "apv,av1,avs2,avs3,cavsvideo,dirac,dnxhd,evc,h261,h263,h264,hevc,ingenient,"
    "ipu,m4v,mjpeg,mjpeg_2000,mpegvideo,obu,vc1,vc1test,vvc,yuv4mpegpipe"
)
_ANIMATIONS = "anm,apng,flic,gif,iff,jpegxl_anim"
_GAMES = (
    "4xm,argo_brp,avs,bethsoftvid,bfi,bink,bmv,c93,cdg,cdxl,cine,dfa,dsicin,dxa,"
    "ea,film_cpk,filmstrip,frm,gdv,hnm,hxvs,idcin,ipmovie,iv8,jv,lvf,luodat,"
    "mgsts,mm,mvi,nc,paf,psxstr,r3d,rl2,roq,rpl,sga,siff,simbiosis_imx,smk,thp,"
    "tiertexseq,tmv,txd,usm,vmd,wc3movie,wsvqa,yop"
)
# Pictures are videos of one frame. Not image2, which reads a name as a pattern.
_PICTURES = (
    "alias_pix,bmp_pipe,brender_pix,cri_pipe,dds_pipe,dpx_pipe,exr_pipe,fits,"
    "gem_pipe,gif_pipe,hdr_pipe,ico,j2k_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,"
    "jpegxs_pipe,pam_pipe,pbm_pipe,pcx_pipe,pfm_pipe,pgm_pipe,pgmyuv_pipe,pgx_pipe,"
    "phm_pipe,photocd_pipe,pictor_pipe,png_pipe,ppm_pipe,psd_pipe,qdraw_pipe,qoi_pipe,"
    "sgi_pipe,sunrast_pipe,tiff_pipe,vbn_pipe,webp_pipe,xbm_pipe,xpm_pipe,xwd_pipe"
)
# Sound without pictures: opened for an error that says so.
_SOUND = "aac,ac3,aiff,amr,ape,au,caf,eac3,flac,mp3,w64,wav"

VIDEO_FORMATS = ",".join((_CONTAINERS, _STREAMS, _ANIMATIONS, _GAMES, _PICTURES))

# For av.open(options=...), so that nothing but the file itself is opened.
SAFE_OPTIONS = {
    "format_whitelist": f"{VIDEO_FORMATS},{_SOUND}",
    "protocol_whitelist": "file",
}

# How FFmpeg recognises playlists, and some that only players know.
_PLAYLISTS = {
    "ffconcat": rb"\A\s*ffconcat version ",
    "hls": rb"\A\s*#EXTM3U",
    "sdp": rb"(?m)\A\s*v=0\s(?s:.*)^[mc]=|^c=IN IP",
    "dash": rb"<MPD[\s>]",
    "imf": rb"<(?:CompositionPlaylist|PackingList|AssetMap)[\s>]",
    "smooth streaming": rb"<SmoothStreamingMedia[\s>]",
    "pls": rb"(?i)\A\s*\[playlist\]",
    "asx": rb"(?i)\A\s*<asx[\s>]",
    "xspf": rb"(?s)\A\s*(?:<\?xml.*)?<playlist[\s>]",
    "smil": rb"(?s)\A\s*(?:<\?.*)?<smil[\s>]",
    "concat": rb"\A(?:\s*#[^\n]*\n)*\s*file\s+['\"/.\w]",
    "redirector": rb"\A\s*(?:\[Reference\]|RTSPtext|rtsp://)",
}
_HEAD = 1 << 16  # bytes of a file to inspect
_TEXT = "a text file"
_BYTES_PER_PIXEL = 8


def open_container(name: str, options: dict[str, str] | None = None, file: RangeFile | None = None):
    """Opens a file of an allowed format for reading, with further FFmpeg `options`.

    That of an address is read through `file`, or one of its own.

    Raises VideoError for playlists and other texts, and for frames of more than `most_pixels`;
    av's FFmpegError for other files that are not videos.
    """
    import av
    from av.error import ArgumentError, FFmpegError

    most = most_pixels(name)
    # FFmpeg counts the padding of decoders' buffers too.
    bound = {"max_pixels": str(most + most // 4 + 2**16)}
    options = SAFE_OPTIONS | bound | (options or {})
    # The prefix keeps a colon in a file name from being read as a network protocol.
    source: Any = "file:" + name
    if in_ranges(name):
        source = RangeFile(name) if file is None else file
        source.seek(0)
    try:
        return _bounded(name, av.open(source, options=options, **_lenient()), most, bound)
    except FFmpegError as error:
        refused = isinstance(error, ArgumentError)  # not in the whitelists, or damaged
        kind = _kind_of_text(name)
        if kind is not None and (refused or kind != _TEXT):
            raise VideoError(f"{name}: {kind}; {EXPECTED}") from error
        found = _format_by_content(name, options) if refused and set(name) & set("%*?{") else None
        if found is None:
            raise
    named = av.open(source, format=found, options=options, **_lenient())
    return _bounded(name, named, most, bound)


@functools.cache
def _lenient() -> dict[str, Any]:
    """Arguments of `av.open` that accept titles and comments with invalid UTF-8.

    PyAV 19 has no such argument: it escapes those bytes by itself.
    """
    from av.container import InputContainer

    takes = hasattr(InputContainer, "metadata_errors")
    return {"metadata_errors": "replace"} if takes else {}


def most_pixels(name: str | os.PathLike) -> int:
    """How many pixels a picture or a video's frame may have, 2**27 for small files.

    At 8 bytes per pixel, for decoder and RGB together, that is `unpack_limit`.
    """
    try:
        held = size_of(name)
    except OSError:
        held = 0  # opening the file reports the error
    return unpack_limit(held) // _BYTES_PER_PIXEL


def too_large(name: str, most: int, width: int = 0, height: int = 0) -> VideoError:
    """The error for frames of more than `most` pixels, or of unknown size."""
    size = f"frames of {width} x {height} (w x h)" if width else "frames of more, or of no size"
    return VideoError(
        f"{name}: {size}; expected at most {most:,} pixels: resize the file, or if "
        f"you trust it raise the environment's {VARIABLE} (bytes, {_BYTES_PER_PIXEL} for each "
        "pixel)"
    )


def _bounded(name: str, container, most: int, bound: dict[str, str]):
    """The container, with decoders that refuse frames that become too large later."""
    for stream in container.streams.video:
        context = stream.codec_context
        if context is None:
            continue
        context.options = {**context.options, **bound}
        pixels = context.width * context.height
        # FFmpeg states no size for a picture of more than `most` pixels.
        if pixels > most or (not pixels and container.format.name.endswith("_pipe")):
            container.close()
            raise too_large(name, most, context.width, context.height)
    return container


def _kind_of_text(name: str) -> str | None:
    """Describes a text file; None for anything else, and for a file that cannot be read."""
    try:
        with opened(name) as file:
            head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return None
    text, binary, _ = head.partition(b"\0")
    for kind, pattern in _PLAYLISTS.items():
        if re.search(pattern, text):
            return f"a playlist, not a video ({kind}, a list of other files): give the files"
    if binary:
        return None
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < _HEAD - 4:  # otherwise the end of the head cuts a character
            return None
    return _TEXT


def _format_by_content(name: str, options: dict[str, str]) -> str | None:
    """FFmpeg's name for the format of a file, by its content alone; None if it is refused.

    If a picture's name is a pattern, as clip%03d.png, FFmpeg ignores the content otherwise.
    """
    import av
    from av.error import FFmpegError

    try:
        with io.FileIO(name) as file:
            file.name = "a file"  # av passes this name to FFmpeg
            with av.open(file, options=options, **_lenient()) as container:
                return container.format.name
    except (FFmpegError, OSError):
        return None
