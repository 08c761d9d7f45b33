# SPDX-License-Identifier: Apache-2.0
"""Collects everything that is wrong with a checkpoint and raises it as one readable error.

Entries that differ only in the layer share a line: `encoder.layer.{0-11}.output.bias`.
"""

import collections
import difflib
import re
from collections.abc import Iterable, Mapping

from vivit_jax.errors import CheckpointError

_FIRST = ("missing", "unexpected", "wrong shape")
# The layer in layer.3.output, layers_3/output, blocks.3.attn, encoderblock_3/LayerNorm_1 of any
# layout, and the parameter in state/3/exp_avg of a torch optimiser.
_LAYER = re.compile(
    r"(?:(?<=layer[._])|(?<=layers[._])|(?<=block[._])|(?<=blocks[._])|(?<=optimizer/state/))"
    r"\d+(?=[./])"
)


class Problems:
    """Collects problems by kind; `raise_if_any` raises them as one CheckpointError."""

    def __init__(self, headline: str):
        self._headline = headline
        self._lines: dict[str, list[str]] = {}
        self._missing: dict[str, tuple[int, ...]] = {}
        self._unexpected: dict[str, tuple[int, ...]] = {}

    def add(self, kind: str, name: str, detail: str) -> None:
        self._lines.setdefault(kind, []).append(f"{name}  {detail}")

    def missing(self, name: str, shape: tuple[int, ...], detail: str) -> None:
        self._missing[name] = shape
        self.add("missing", name, detail)

    def unexpected(self, name: str, shape: tuple[int, ...]) -> None:
        self._unexpected[name] = shape

    def twice(self, kind: str, names: Iterable[str]) -> None:
        for name, count in collections.Counter(names).items():
            if count > 1:
                self.add(kind, name, f"{count} times")

    def raise_if_any(self) -> None:
        for name, shape in self._unexpected.items():
            origin = _likely_origin(name, shape, self._missing)
            hint = f" (perhaps {origin}, renamed)" if origin else ""
            self.add("unexpected", name, f"{shape}{hint}")
        if not self._lines:
            return
        kinds = [kind for kind in dict.fromkeys((*_FIRST, *self._lines)) if kind in self._lines]
        counts = ", ".join(f"{len(self._lines[kind])} {kind}" for kind in kinds)
        parts = [f"{self._headline}: {counts}"]
        for kind in kinds:
            lines = self._lines[kind]
            parts += [f"  {kind} ({len(lines)}):", *(f"    {line}" for line in collapse(lines))]
        raise CheckpointError("\n".join(parts))


def collapse(lines: Iterable[str]) -> list[str]:
    """Merge lines that differ only in the layer, and say which layers they are."""
    groups: dict[str, list[int]] = {}
    for line in lines:
        found = set(_LAYER.findall(line))
        key = _LAYER.sub("{}", line) if len(found) == 1 else line
        groups.setdefault(key, []).extend(map(int, found if len(found) == 1 else ()))
    return [
        key.replace("{}", str(indices[0]) if len(indices) == 1 else "{" + _ranges(indices) + "}")
        if indices
        else key
        for key, indices in groups.items()
    ]


def summarise(left_out: Mapping[str, str], depth: int = 2) -> list[str]:
    """A line per part of a train state: `optimizer/state (400 entries)  left out: ...`.

    A part is named by the first `depth` components of the '/'-joined names.
    """
    parts: dict[tuple[str, str], int] = {}
    for name, reason in left_out.items():
        part = "/".join(name.split("/")[:depth])
        parts[part, reason] = parts.get((part, reason), 0) + 1
    return [
        f"{part}{f' ({count} entries)' if count > 1 else ''}  left out: {reason}"
        for (part, reason), count in parts.items()
    ]


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _likely_origin(name: str, shape: tuple[int, ...], missing: dict[str, tuple[int, ...]]):
    """The most similar missing name with the same shape, and layer if it has one."""
    layer = _LAYER.findall(name)
    same = [m for m, s in missing.items() if s == shape and _LAYER.findall(m) in (layer, [])]
    return max(same, key=lambda m: difflib.SequenceMatcher(None, name, m).ratio(), default=None)
