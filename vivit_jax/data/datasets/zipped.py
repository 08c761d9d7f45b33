# SPDX-License-Identifier: Apache-2.0
"""The pictures of a clip in one .zip file, as packs have them: not compressed, in order."""

import io
import zipfile
from collections.abc import Sequence

from vivit_jax.errors import VideoError, first_line
from vivit_jax.files.reading import opened


class ZippedPictures(Sequence[bytes]):
    """The encoded pictures of a .zip file, each read when it is asked for.

    Raises VideoError for a file that is missing, damaged, empty or compressed.
    """

    def __init__(self, path: str):
        self._path = path
        try:
            self._archive = zipfile.ZipFile(opened(path))
        except (OSError, zipfile.BadZipFile) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise VideoError(f"{path}: no readable .zip of pictures: {why}") from None
        self._members = self._archive.infolist()
        if not self._members:
            raise VideoError(f"{path}: a .zip file without pictures")
        if any(member.compress_type != zipfile.ZIP_STORED for member in self._members):
            raise VideoError(f"{path}: a compressed .zip file; expected pictures as they are")

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return self._archive.read(self._members[index])
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise VideoError(f"{self._path}, frame {index}: damaged: {why}") from None


def zipped(pictures: Sequence[bytes]) -> bytes:
    """The content of a .zip file with these encoded pictures; equal for equal ones."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for number, picture in enumerate(pictures):
            archive.writestr(zipfile.ZipInfo(f"{number:06}{_ending(picture)}"), picture)
    return file.getvalue()


def _ending(picture: bytes) -> str:
    """The ending of a picture's usual file names, for who unpacks it; readers go by the content."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(picture)) as image:
            return f".{image.format or 'bin'}".lower()
    except Exception:  # each format raises exceptions of its own; a damaged one is packed as it is
        return ".bin"
