# SPDX-License-Identifier: Apache-2.0
"""Parses the text of a compiled program (HLO), as XLA prints it for CPU, TPU and GPU.

Only what `vivit_jax.train.planning.compiled` uses is kept. XLA does not promise this format: text
that is not understood raises ValueError instead of being skipped.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_END = re.compile(r"\}(,|$)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*index=\d+\*/")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array, or an element of a tuple, on one device."""

    dtype: str
    shape: tuple[int, ...]
    # The memory space: 0 is the device's main memory; others are smaller and faster, or the host's.
    space: int = 0

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        bits = {"pred": 8, "token": 0, "opaque": 0}.get(self.dtype)
        if bits is None:
            sized = _BITS.match(self.dtype)  # s32, bf16, f8e4m3fn, c64
            if sized is None:
                raise ValueError(f"dtype {self.dtype!r} is not understood")
            bits = int(sized[1])
        return math.ceil(math.prod(self.shape) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # the result, or the elements of a tuple
    operands: tuple[str, ...]
    literal: str  # the text between the parentheses; a constant's value
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; "" if XLA does not say."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    def named(self, attribute: str) -> str | None:
        """The value of an attribute that may be missing: `body=%loop`, `index=2`."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def required(self, attribute: str) -> str:
        """The value of an attribute, as `named`. ValueError if it is missing."""
        value = self.named(attribute)
        if value is None:
            raise ValueError(f"{self.opcode} {self.name} has no {attribute}")
        return value

    def quoted(self, attribute: str) -> str | None:
        """The value of a quoted attribute: `custom_call_target="x"`, `"n":"3"`."""
        found = re.search(rf'\b{attribute}"?[=:]"((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, each with its instructions by name and in order."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    def root(self, computation: str) -> Instruction:
        """The instruction that gives the computation's result."""
        return next(each for each in self.computations[computation].values() if each.root)


def parse(text: str) -> Module:
    """Parse what `jax.stages.Compiled.as_text` returns. ValueError for any other text."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry = None
    pending: list[str] = []  # the lines of an instruction; a kernel's notes take several

    def finish() -> None:
        if pending and current is not None:
            instruction = _instruction("\n".join(pending))
            current[instruction.name] = instruction
            pending.clear()

    for line in text.splitlines():
        if current is None:
            found = _HEADER.match(line) if "->" in line else None
            if found:
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif _END.match(line):
            finish()
            current = None
        elif _INSTRUCTION.match(line):
            finish()
            pending.append(line)
        elif pending:
            pending.append(line)
    if entry is None:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    found = _INSTRUCTION.match(line)
    if found is None:
        raise ValueError(f"not an instruction: {line[:80]!r}")
    rest = line[found.end() :]
    rest = _COMMENT.sub("", rest)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = opened + _closing(rest[opened:])
    literal = rest[opened + 1 : closed - 1]
    return Instruction(
        name=found[2],
        opcode=rest[:opened],
        arrays=tuple(_arrays(shape)),
        operands=tuple(_NAME.findall(literal)),
        literal=literal,
        attributes=rest[closed:],
        root=bool(found[1]),
    )


def _closing(text: str) -> int:
    """The end of the parenthesis that a text begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"a parenthesis is never closed: {text[:80]!r}")


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, sizes, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        lengths = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        yield Array(dtype, lengths, int(space[1]) if space else 0)
