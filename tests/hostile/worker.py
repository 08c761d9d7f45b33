# SPDX-License-Identifier: Apache-2.0
"""Reads damaged inputs in its own process: one line of JSON per line "kind<TAB>seed"."""

import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from inputs import FAULTS, KINDS, digest, placed
from mutations import mutated

from vivit_jax.errors import UserError

_READ = KINDS | FAULTS
_STATUS = Path("/proc/self/status")
# Errors that list tensors have one line for each.
_LISTS = ("does not fit the model", "disagrees with its shards")


def memory(name: str) -> int:
    """VmRSS or VmHWM in bytes; without /proc, the peak for both."""
    if not _STATUS.exists():
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def whole(root: Path, work: Path, kind: str) -> tuple[bytes, str]:
    """The undamaged bytes of a kind, and the digest of the result of reading them."""
    data = (root / _READ[kind].file).read_bytes()
    return data, digest(_READ[kind].read(placed(kind, root, work, data)))


def outcome(root: Path, work: Path, kind: str, data: bytes, expected: str) -> tuple[str, str]:
    """The outcome of one input ("same", "other", "error", or a fault), and a message."""
    path = placed(kind, root, work, data)
    read = _READ[kind].read
    try:
        result = digest(read(path))
        if result != digest(read(path)):
            return "WRONG", "two reads differ"
    except UserError as error:
        told = str(error)
        first, *more = told.splitlines() or [""]
        if not first or (more and not any(part in first for part in _LISTS)):
            return "WRONG", f"{type(error).__name__} of {len(more) + 1} lines: {told!r}"
        return "error", told
    except Exception as error:
        return "WRONG", f"{type(error).__name__}: {error}"
    if result != expected and _READ[kind].checked:
        return "WRONG", "other numbers under a checksum"
    return ("same" if result == expected else "other"), ""


def main() -> None:
    root = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries' output is not an answer
    logging.disable()
    cache: dict[str, tuple[bytes, str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory) / "work"
        for line in sys.stdin:
            kind, seed = line.rstrip("\n").split("\t")
            if kind not in cache:
                cache[kind] = whole(root, work, kind)
            data, how = mutated(cache[kind][0], kind, int(seed))
            before, began = memory("VmRSS"), time.process_time()
            forget_peak()
            found, told = outcome(root, work, kind, data, cache[kind][1])
            answer = {
                "outcome": found,
                "told": told[:300],
                "how": how,
                "seconds": time.process_time() - began,
                "grown": memory("VmHWM") - before,
            }
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
