# SPDX-License-Identifier: Apache-2.0
"""Signal handlers in tests; a suite started with `&` in a script begins with SIGINT ignored."""

import contextlib
import signal


@contextlib.contextmanager
def handled(number, handler):
    """A signal's handler in the block, and the one before again after it."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
