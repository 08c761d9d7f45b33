# SPDX-License-Identifier: Apache-2.0
"""Compares the clips of a pack with their checksums."""

import os
import zlib

from vivit_jax.data.datasets.check import Progress, in_threads
from vivit_jax.data.datasets.packs import is_pack, read_pack
from vivit_jax.errors import UserError
from vivit_jax.files.reading import content, is_directory, names_in


def changed_clips(path: str, threads: int, progress: Progress | None = None) -> list[str]:
    """The paths of the clips whose content is not what was packed, or cannot be read.

    Raises UserError for what is no pack, for tar files of others, which have no checksums, and as
    `read_pack` does.
    """
    names = names_in(path) if is_directory(path) else None
    pack = read_pack(path) if is_pack(path, names) else None
    if pack is None or pack.checksums is None:
        raise UserError(f"{path}: has no checksums; expected a pack that vivit-jax pack wrote")
    paths = [os.path.join(pack.root, entry.path) for entry in pack.columns]

    def checksum(clip: str) -> int | None:
        try:
            return zlib.crc32(content(clip))
        except OSError:
            return None

    found = in_threads(checksum, paths, threads, progress)
    both = zip(paths, found, pack.checksums.tolist(), strict=True)
    return [clip for clip, ours, theirs in both if ours != theirs]
