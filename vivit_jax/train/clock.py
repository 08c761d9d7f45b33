# SPDX-License-Identifier: Apache-2.0
"""What a step costs: its time, the wait for data, compilations, memory and the chip's use."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
from jax import monitoring

from vivit_jax.data.pipeline import Batches
from vivit_jax.train.chips import chip_of
from vivit_jax.train.processes.stalls import Stalls

_COMPILED = "/jax/core/compile/backend_compile_duration"
# The names of what `lap` returns.
MEASURED = (
    "step_seconds", "clips_per_second", "wait_share", "compilations", "compile_seconds",
    "device_memory_gib", "tflops_per_device", "mfu",
)  # fmt: skip


class Clock:
    """Measures the steps of a run, of so many clips each, until `close`.

    `flops` are the matrix products of a step on each device, None where they are not known.

    `stalled(step, text)` is called, in another thread, about a step that takes far longer than
    those before it: `vivit_jax.train.processes.stalls`.
    """

    def __init__(self, clips: int, flops: float | None, stalled: Callable[[int, str], None]):
        self._clips, self._flops = clips, flops
        self._chip = chip_of(jax.local_devices()[0])
        self._last, self._waited = time.perf_counter(), 0.0
        self._compilations, self._compiling = 0, 0.0
        self._stalls = Stalls(stalled)
        monitoring.register_event_duration_secs_listener(self._heard)

    def close(self) -> None:
        monitoring.unregister_event_duration_listener(self._heard)
        self._stalls.close()

    def fetch(self, batches: Batches, running: jax.Array | None) -> dict:
        """The next batch. The lap counts how long the device waited for it.

        `running` is a result of the previous step; until it is ready the device is busy.
        """
        start = time.perf_counter()
        batch = next(batches)
        if running is None or running.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            self._waited += time.perf_counter() - start
        return batch

    def lap(self, step: int) -> dict[str, float]:
        """What has been measured since the last lap, which ends now: `step` is done.

        Returns:
            `step_seconds`; `clips_per_second`; `wait_share`, of the time, in which the devices
            waited for clips; `compilations` and `compile_seconds`, of programs that XLA compiled;
            `device_memory_gib`, the most that a local device held since the process began (on CPU
            the process, where the system tells). For a model of the library's families
            `tflops_per_device`, the products of the model and its gradient, without what is
            computed twice, and on chips whose peak for bfloat16 is known their share of it, `mfu`.
        """
        now = time.perf_counter()
        seconds, waited = now - self._last, self._waited
        found = {
            "step_seconds": seconds,
            "clips_per_second": self._clips / seconds,
            "wait_share": waited / seconds,
            "compilations": self._compilations,
            "compile_seconds": self._compiling,
        }
        if (memory := _most_memory()) is not None:
            found["device_memory_gib"] = memory / 2**30
        if self._flops is not None:
            rate = self._flops / seconds
            found["tflops_per_device"] = rate / 1e12
            if self._chip is not None:
                found["mfu"] = rate / self._chip.flops
        self._last, self._waited = now, 0.0
        self._compilations, self._compiling = 0, 0.0
        self._stalls.lap(step, seconds)
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent in the block does not count."""
        start = time.perf_counter()
        with self._stalls.paused():
            yield
        self._last += time.perf_counter() - start

    def _heard(self, event: str, duration_secs: float, **about: str | int) -> None:
        if event == _COMPILED:
            self._compilations += 1
            self._compiling += duration_secs


def _most_memory() -> int | None:
    """Bytes of the fullest local device; of this process on CPU."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        try:
            import resource
        except ImportError:  # Windows
            return None
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
    told = [(each.memory_stats() or {}).get("peak_bytes_in_use") for each in devices]
    return max((most for most in told if most is not None), default=None)
