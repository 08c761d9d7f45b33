# SPDX-License-Identifier: Apache-2.0
"""Handlers of signals in tests; a suite in the background of a script starts with SIGINT ignored."""

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
