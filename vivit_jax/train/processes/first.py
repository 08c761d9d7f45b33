# SPDX-License-Identifier: Apache-2.0
"""What the first process of a run does alone, and all must know of."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from vivit_jax.errors import UserError, WriteError
from vivit_jax.train.sharding import gathered

_SENT_BYTES = 64 * 2**20  # at once, on each device


def of_first(call: Callable[[], Any]) -> Any:
    """What `call` returns in the first process, a JSON value, in all of them.

    Raises its UserError or OSError there, and a UserError that quotes it in the others (a
    WriteError if what cannot be written is the reason).
    """
    if jax.process_count() == 1:
        return call()
    value = error = None
    if jax.process_index() == 0:
        try:
            value = call()
        except (UserError, OSError) as failed:
            error = failed
    unwritten = isinstance(error, WriteError | OSError)
    value, failed, unwritten, text = gathered([value, error is not None, unwritten, str(error)])[0]
    if error is not None:
        raise error
    if failed:
        raise (WriteError if unwritten else UserError)(f"process 0 cannot continue: {text}")
    return value


def sent(array: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The first process's array, bit for bit, in all of them; the others give its shape."""
    whole = np.empty(shape, dtype) if array is None else np.array(array, order="C")
    # As bytes: what other processes add to numbers would turn -0 into 0.
    data = whole.reshape(-1).view(np.uint8)
    for start in range(0, data.size, _SENT_BYTES):
        part = slice(start, start + _SENT_BYTES)
        data[part] = broadcast_one_to_all(data[part])
    return whole
