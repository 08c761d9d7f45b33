# SPDX-License-Identifier: Apache-2.0
"""How much of a clip's time holds Python's lock, which the threads of a process share (the GIL).

Threads that wait for the lock leave their cores idle. So the cores that several threads keep busy
say how much of their time holds it: by mean value analysis of a queue with one place, the lock.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from vivit_jax.data.video.sequence import usable_cores

_MOST = 8  # threads
_ROUNDS = 5
_BLOCK, _BLOCKS = 2**20, 40  # bytes that a thread hashes without the lock, for comparison


@dataclasses.dataclass(frozen=True)
class Held:
    """The cost of one video with all of its clips, read by several threads."""

    cpu_seconds: float
    threads: int
    busy: float | None  # cores that they keep busy; None where one core leaves nothing to measure
    share: float | None  # of the time that holds the lock


def measure_lock(read: Callable[[int], None], videos: int) -> Held:
    """Time `read` of numbers in a thread for each core, at most 8: `videos` in each of 5 rounds."""
    read(0)
    threads = min(usable_cores(), _MOST)
    if threads < 2:
        start = time.process_time()
        for number in range(videos):
            read(number)
        return Held((time.process_time() - start) / videos, 1, None, None)
    block, blocks = bytes(_BLOCK), range(threads * _BLOCKS)
    free, kept, spent = 0.0, 0.0, 0.0
    with ThreadPoolExecutor(threads, "read") as pool:
        for number in range(_ROUNDS):
            # Other programs only lower these, so the best round counts.
            free = max(free, _busy(pool, lambda _: hashlib.sha256(block), blocks)[0])
            first = number * threads * videos
            busy, cpu = _busy(pool, read, range(first, first + threads * videos))
            kept, spent = max(kept, busy), spent + cpu
    busy = min(threads * kept / free, threads)
    return Held(spent / (_ROUNDS * threads * videos), threads, busy, held_share(busy, threads))


def _busy(
    pool: ThreadPoolExecutor, work: Callable[[int], object], pieces: range
) -> tuple[float, float]:
    """The cores that the threads of a pool keep busy with pieces of work, and the CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in pool.map(work, pieces):
        pass
    cpu = time.process_time() - cpu
    return cpu / (time.perf_counter() - wall), cpu


def held_share(busy: float, threads: int) -> float:
    """The share of its time for which each of several threads holds a lock, by the cores busy."""
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        low, high = (share, high) if busy_cores(share, threads) > busy else (low, share)
    return low


def busy_cores(share: float, threads: int) -> float:
    """The cores that threads keep busy which hold a lock for a share of their time."""
    waiting = cores = 0.0
    for number in range(1, threads + 1):
        locked = share * (1 + waiting)
        cores = number / (1 - share + locked)
        waiting = cores * locked
    return cores
