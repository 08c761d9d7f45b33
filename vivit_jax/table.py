# SPDX-License-Identifier: Apache-2.0
"""Tables as text."""

from collections.abc import Sequence


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def readable(size: int) -> str:
    """Bytes as text: "12.0 MiB", from 1024 MiB on "1.00 GiB"."""
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
