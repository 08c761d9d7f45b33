# SPDX-License-Identifier: Apache-2.0
"""The graceful end of a run: SIGINT and SIGTERM stop all its processes after the same step."""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# There is no public way to the service that `jax.distributed.initialize` starts.
from jax._src import distributed
from jax.experimental.multihost_utils import process_allgather

from vivit_jax.errors import UserError

_LONGEST_WAIT = 2**31 - 1  # milliseconds


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects the names of SIGINT and SIGTERM while the block runs; a second one acts at once.

    Ignored signals (SIGINT in shell background jobs) stay ignored.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: old for n in numbers if (old := signal.getsignal(n)) is not signal.SIG_IGN}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, _):
        name = signal.Signals(number).name
        received.append(name)
        restore()
        text = f"{name}: ending after this step or validation, with a checkpoint; again: at once\n"
        # Not by print or the live line, which the signal may have interrupted. Where stderr is
        # closed or nobody reads it the line is dropped; the run is saved all the same.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            start = "\n" if sys.stderr.isatty() else ""
            os.write(sys.stderr.fileno(), (start + text).encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


def agreed_stop(
    received: list[str], failed: UserError | None, asked: bool = False
) -> tuple[str | None, bool]:
    """What all processes agree on: the signal that any received, and whether any `asked` to end.

    Raises `failed`; the other processes raise a UserError that names the one that failed.
    """
    if failed is not None and jax.process_count() == 1:
        raise failed
    if jax.process_count() == 1:
        return received[0] if received else None, asked

    number = signal.Signals[received[0]].value if received else 0
    every = _exchanged([number, failed is not None, asked])
    if every[:, 1].any():
        which = int(every[:, 1].argmax())
        raise failed or UserError(f"process {which} cannot continue; its own message says why")
    largest = int(every[:, 0].max())
    return signal.Signals(largest).name if largest else None, bool(every[:, 2].any())


_exchanges = itertools.count()  # all processes make the same ones


def _exchanged(values: list[int]) -> np.ndarray:
    """The numbers of all processes, [process, number].

    Over JAX's coordination service: an exchange between devices would begin after the step that
    they are taking, so that the next one would be given to them after its end.
    """
    client: Any = distributed.global_state.client
    if client is None:  # a TPU's processes know each other without the service
        return process_allgather(np.array(values, np.int32))
    number, process = next(_exchanges), jax.process_index()
    here, before = (f"vivit_jax/agreed/{n}" for n in (number, number - 1))
    client.key_value_set(f"{here}/{process}", json.dumps(values))
    # What hangs is `vivit_jax.train.processes.peers`' to find out.
    client.wait_at_barrier(here, _LONGEST_WAIT)
    if process == 0:  # all have read it, since all are here
        client.key_value_delete(f"{before}/")
    found = dict(client.key_value_dir_get(f"{here}/"))
    return np.array([json.loads(found[f"{here}/{n}"]) for n in range(jax.process_count())])


def stop_of_one(received: list[str]) -> str | None:
    """The signal that ends a run of one process, which need not ask others first."""
    return received[0] if received and jax.process_count() == 1 else None
