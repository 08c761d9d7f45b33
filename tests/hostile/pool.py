# SPDX-License-Identifier: Apache-2.0
"""Workers that may crash, hang or take all memory, and the outcome of each input."""

import collections
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

HANG = 10.0  # seconds of processor time that one input may take
_SILENT = 120.0  # seconds of any time, on a busy machine
GROWN = 512 * 2**20
OUTCOMES = ("same", "other", "error", "WRONG", "HANG", "MEMORY", "CRASH")
_HERE = Path(__file__).parent
_PATHS = (_HERE.parents[1], _HERE, _HERE.parent, _HERE.parent / "data", _HERE.parent / "train")


class Result(NamedTuple):
    kind: str
    seed: int
    outcome: str
    told: str

    @property
    def good(self) -> bool:
        return self.outcome in ("same", "other", "error")


class _Worker:
    def __init__(self, root: Path):
        paths = os.pathsep.join(map(str, _PATHS))
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE / "worker.py"), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
        )

    def ask(self, kind: str, seed: int) -> dict[str, Any]:
        try:
            self._process.stdin.write(f"{kind}\t{seed}\n".encode())
            self._process.stdin.flush()
        except OSError:
            return {"outcome": "CRASH", "told": "it had ended"}
        silent = threading.Event()

        def end() -> None:
            silent.set()
            self._process.kill()

        timer = threading.Timer(_SILENT, end)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if silent.is_set():
            return {"outcome": "HANG", "told": f"no answer for {_SILENT:g} s"}
        if not line:
            return {"outcome": "CRASH", "told": f"it ended with {self._process.wait()}"}
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run(root: Path, jobs: Sequence[tuple[str, int]], workers: int) -> list[Result]:
    """The outcome of each (kind, seed), of inputs made below `root`, in any order."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    results: list[Result] = []

    def work() -> None:
        worker = _Worker(root)
        try:
            while True:
                kind, seed = waiting.get_nowait()
                answer = worker.ask(kind, seed)
                found, told = answer["outcome"], answer["told"]
                if answer.get("seconds", 0) > HANG:
                    found, told = "HANG", f"{answer['seconds']:.0f} s of processor time, {told}"
                elif answer.get("grown", 0) > GROWN:
                    found, told = "MEMORY", f"{answer['grown'] >> 20} MiB, {told}"
                results.append(Result(kind, seed, found, f"[{answer.get('how')}] {told}"))
                if found in ("HANG", "CRASH"):
                    worker.close()
                    worker = _Worker(root)
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def table(results: Sequence[Result], seconds: float) -> str:
    """Outcomes by kind, and every bad one by its seed."""
    counts = {
        kind: collections.Counter() for kind in dict.fromkeys(r.kind for r in sorted(results))
    }
    for result in results:
        counts[result.kind][result.outcome] += 1
    counts["all"] = sum(counts.values(), collections.Counter())
    width = max(map(len, counts))
    lines = [f"{'kind':{width}}" + "".join(f"{name:>8}" for name in OUTCOMES)]
    for kind, found in counts.items():
        lines.append(f"{kind:{width}}" + "".join(f"{found[name] or '':>8}" for name in OUTCOMES))
    bad = sorted(result for result in results if not result.good)
    lines += [f"{r.kind}, seed {r.seed}: {r.outcome} {r.told}" for r in bad]
    return "\n".join([*lines, f"{len(results)} inputs in {seconds:.0f} s"])


def timed(root: Path, jobs: Sequence[tuple[str, int]], workers: int) -> tuple[list[Result], str]:
    """`run`, and the table of it."""
    began = time.monotonic()
    results = run(root, jobs, workers)
    return results, table(results, time.monotonic() - began)
