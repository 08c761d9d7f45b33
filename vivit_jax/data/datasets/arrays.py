# SPDX-License-Identifier: Apache-2.0
"""Opens frames in .npy and .npz files."""

import os
import threading

import numpy as np
from jaxtyping import Shaped

from vivit_jax.data.datasets.folders import ending
from vivit_jax.errors import UserError, VideoError, first_line
from vivit_jax.files.addresses import address_text
from vivit_jax.files.inputs import check_file
from vivit_jax.files.limits import check_unpacked
from vivit_jax.files.local import local_file
from vivit_jax.files.parts import in_ranges

# numpy parses a header with `ast`, whose depth CPython counts over all threads: if a garbage
# collection lets another thread in, intact files fail with SystemError.
_one_header = threading.Lock()


def open_array(path: str | os.PathLike) -> Shaped[np.ndarray, "t h w c"]:
    """The frames of an .npy file (mapped, so only what is used is read) or .npz file.

    An .npz file holds one array, or one called "frames". The result has any type and is not empty.

    Raises:
        VideoError: the file does not exist, is damaged, of another format or holds other arrays; it
            holds Python objects, as unpickling runs code; or an .npz would unpack to more than
            `vivit_jax.files.limits` allows.
    """
    path = os.fspath(path)
    if in_ranges(path):
        with local_file(address_text(path), VideoError, whole=True) as copy:
            return open_array(copy)
    check_file(path, VideoError)
    if not os.path.isfile(path):
        raise VideoError(f"{path}: no such file")
    try:
        names = []
        with _one_header, np.errstate(over="ignore"):  # a damaged shape may overflow
            frames = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(frames, np.lib.npyio.NpzFile):
                with frames as archive:
                    names = archive.files
                    name = names[0] if len(names) == 1 else "frames"
                    frames = _unpacked(path, archive, name) if name in names else None
    except (SystemError, UserError):  # the first is not the file's fault, the second is clear
        raise
    except Exception as error:  # damage in zip files and headers raises many kinds
        why = first_line(error)
        if "pickle" in why:  # numpy's message advises allowing it
            why = "damaged, of another format, or with Python objects, which are not read"
        raise VideoError(f"{path}: not an array in numpy's {ending(path)} format: {why}") from None
    if frames is None:
        names = names if len(names) <= 8 else [*names[:8], "..."]
        raise VideoError(f"{path}: holds the arrays {names}; expected one, or one called 'frames'")
    if frames.ndim != 4 or not frames.size:
        raise VideoError(
            f"{path}: an array of shape {frames.shape}; expected frames [t, h, w, c], not empty"
        )
    return frames


def _unpacked(path: str, archive: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    """An array of an .npz file, if it is an array and not too large."""
    assert archive.zip is not None, "the archive is open"
    members = archive.zip.namelist()
    member = archive.zip.getinfo(f"{name}.npy" if f"{name}.npy" in members else name)
    # zipfile reads no more than this size.
    held = os.path.getsize(path)
    check_unpacked(f"{path}: {name} in it", member.file_size, held, VideoError)
    frames = archive[name]
    if not isinstance(frames, np.ndarray):  # bytes, for a member of another format
        raise VideoError(f"{path}: {name} in it is not a numpy array")
    return frames
