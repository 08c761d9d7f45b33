# SPDX-License-Identifier: Apache-2.0
"""A full disk, for any user and any library, in Python or not."""

import contextlib
import resource


@contextlib.contextmanager
def file_size(largest):
    """No file may grow past `largest` bytes in the block: EFBIG, which does not kill Python."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
