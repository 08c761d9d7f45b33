# SPDX-License-Identifier: Apache-2.0
"""Where an MP4 or MOV file keeps its pictures: its index can then be read without them.

Such a file is a sequence of boxes, each with its size and kind in front (ISO/IEC 14496-12). FFmpeg
reads every packet to list them, but what the list says stands outside the boxes `mdat`.
"""

import bisect
from collections.abc import Callable
from typing import BinaryIO

_MEDIA = b"mdat"
_MOST = 100_000  # boxes


def media_of(file: BinaryIO) -> Callable[[int, int], bool]:
    """Whether all bytes from `start` up to `end` are those of pictures and sound."""
    end = file.seek(0, 2)
    starts, ends = list[int](), list[int]()
    at = 0
    for _ in range(_MOST):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            break
        size, kind, length = int.from_bytes(head[:4]), head[4:8], 8
        if size == 1:
            size, length = int.from_bytes(head[8:16]), 16
        elif size == 0:  # up to the end of the file
            size = end - at
        if size < length:  # damaged
            break
        if kind == _MEDIA:
            starts.append(at + length)
            ends.append(min(at + size, end))
        at += size

    def inside(first: int, last: int) -> bool:
        k = bisect.bisect_right(starts, first) - 1
        return k >= 0 and last <= ends[k]

    return inside
