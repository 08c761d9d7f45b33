# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run whose processes share no file system, such as the machines of a TPU slice.

The first process writes and reads them: it gathers the state from all devices, array by array, and
sends what it reads. Its machine's memory holds a whole state while it is written, and two when that
begins, since Orbax copies what it gets.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vivit_jax.files.addresses import Place
from vivit_jax.train.processes.first import of_first, sent
from vivit_jax.train.sharding import whole
from vivit_jax.train.storage.checkpoint import Checkpoints
from vivit_jax.train.storage.stored_state import flat, from_arrays, storage, to_arrays


class GatheredCheckpoints:
    """`Checkpoints` in a directory that only the first process of a run sees.

    Every process of a run calls every method. They do what those of `Checkpoints` do; errors of
    the first process are raised in all.
    """

    def __init__(self, directory: str | Path, *, keep: int, place: Place | None = None):
        self._checkpoints: Checkpoints | None = None  # of the first process

        def opened() -> None:
            self._checkpoints = Checkpoints(directory, keep=keep, alone=True, place=place)

        of_first(opened)

    @property
    def _first(self) -> Checkpoints:
        assert self._checkpoints is not None  # else not the first process
        return self._checkpoints

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        arrays, keys = to_arrays(state)
        held = {}
        for path, array in arrays.items():
            found = whole(array)
            if found is not None:
                held[path] = found.copy()  # the next step may take the memory of the state
        of_first(lambda: self._first.save_arrays(step, held, keys, data, metrics, export))

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any], int]:
        held: dict[str, np.ndarray] = {}

        def read() -> list[Any]:
            arrays, run, at = self._first.restore_arrays(abstract_state, step, in_memory=True)
            held.update(arrays)
            return [run["keys"], run["data"], at]

        keys, data, found = of_first(read)
        arrays = {
            path: _placed(sent(held.pop(path, None), leaf.shape, leaf.dtype), leaf.sharding)
            for path, leaf in ((path, storage(leaf)) for path, leaf in flat(abstract_state).items())
        }
        return from_arrays(abstract_state, arrays, keys), data, found

    def steps(self) -> list[int]:
        return of_first(lambda: self._first.steps())

    def latest(self) -> int | None:
        return of_first(lambda: self._first.latest())

    def best(self) -> int | None:
        return of_first(lambda: self._first.best())

    def metrics(self, step: int) -> dict[str, float]:
        return of_first(lambda: self._first.metrics(step))

    def check_step(self, step: int) -> None:
        of_first(lambda: self._first.check_step(step))

    def rewind(self, step: int) -> None:
        of_first(lambda: self._first.rewind(step))

    def wait(self) -> None:
        of_first(lambda: self._first.wait())

    def lacks_model(self, step: int) -> bool:
        return of_first(lambda: self._first.lacks_model(step))

    def write_model(self, step: int, export: Callable[[Path], None] | None) -> None:
        of_first(lambda: self._first.write_model(step, export))

    def close(self) -> None:
        """Also while an error ends this process: the others need not take part."""
        if self._checkpoints is not None:
            self._checkpoints.close()


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
