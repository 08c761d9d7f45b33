# SPDX-License-Identifier: Apache-2.0
"""What stands in the place of a file is refused by every reader, without being opened."""

import os
import socket

import numpy as np
import pytest
from PIL import Image

from checkpoints_convert.files.open import open_checkpoint
from vivit_jax import read_video
from vivit_jax.data.datasets.arrays import open_array
from vivit_jax.data.datasets.dataset import Example, read_dataset, read_frames
from vivit_jax.data.video.decode import frame_times, probe_video
from vivit_jax.data.video.frame_stream import FrameStream
from vivit_jax.errors import UserError
from vivit_jax.files.inputs import stand_in
from vivit_jax.inference.feature_file import read_metadata

POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


def read_image(path):
    """A folder of two frames, the second of which is `path`."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path.parent / "0.png")
    return read_frames(Example(str(path.parent), 0), [0, 1])


# Name of the file -> its reader.
READERS = {
    "clip.mp4": read_video,
    "probe.mp4": probe_video,
    "times.mp4": lambda path: frame_times(path, [0]),
    "stream.mp4": FrameStream,
    "clip.npy": open_array,
    "clip.npz": lambda path: read_frames(Example(str(path), 0), [0]),
    "list.txt": read_dataset,
    "1.png": read_image,
    "features.safetensors": read_metadata,
    "features.npz": read_metadata,
    "model.safetensors": open_checkpoint,
    "model.pth": open_checkpoint,
    "model.msgpack": open_checkpoint,
    "model.npz": open_checkpoint,
    "checkpoint": open_checkpoint,
}


def make_fifo(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")  # which never ends


def make_socket(path):
    # The length of a socket's path is limited, a link's is not.
    short = f"/tmp/vivit-jax-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(short)
    os.rename(short, path)


SPECIAL = {"FIFO": make_fifo, "device": make_device, "socket": make_socket}


@pytest.mark.skipif(os.name == "nt", reason="has no FIFOs")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file(tmp_path, name, kind):
    path = tmp_path / name
    SPECIAL[kind](path)
    with pytest.raises(UserError, match=f"{name}: a {kind}.*, which is not opened; copy") as bad:
        READERS[name](path)
    assert "\n" not in str(bad.value)


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(UserError, match=f"{name}: a git-lfs pointer, .*: git lfs pull") as bad:
        READERS[name](path)
    assert "\n" not in str(bad.value)


def test_files_directories_and_nothing_are_left_to_their_reader(tmp_path):
    (tmp_path / "list.txt").write_text(POINTER.replace("git-lfs", "other"))
    (tmp_path / "long.txt").write_text(POINTER + "x" * 1024)  # no pointer is as long
    (tmp_path / "empty").touch()
    for name in ("list.txt", "long.txt", "empty", "missing", ".", "\0", "a" * 3000):
        assert stand_in(str(tmp_path / name)) is None
