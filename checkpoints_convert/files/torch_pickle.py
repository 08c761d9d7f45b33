# SPDX-License-Identifier: Apache-2.0
"""Checks torch's pickles before they are loaded: counts what they would build.

torch's restricted unpickler runs no foreign code, but two kilobytes can make it build a tree of
2**30 leaves that share parts, hash such a key, or allocate any number of bytes.
"""

import pickletools
import re
from collections.abc import Iterable
from typing import Any, BinaryIO

from vivit_jax.files.limits import check_unpacked, unpack_limit

MAX_DEPTH = 200
_OBJECT = 256  # the most bytes of memory for one opcode or one leaf
_ALLOCATES = re.compile(r"bytearray|\w*Storage|\w*Tensor")  # if given a number
_PLAIN_DTYPE = re.compile(r"[|<>=]?[?biuf]\d?")


class _Node:
    """A container or an object; `size` counts the leaves it had when it was made."""

    __slots__ = ("below", "size")

    def __init__(self, below: Iterable[Any] = ()):
        self.below = list(below)
        self.size = 1 + sum(_size(each) for each in self.below)


def _size(value: Any) -> int:
    return value.size if isinstance(value, _Node) else 1


def check_pickle(file: BinaryIO, held: int) -> None:
    """Read one pickle of a file of `held` bytes.

    Raises UserError for more opcodes or leaves than the limit allows, and ValueError for a pickle
    that is damaged, nested too deep, contains itself, or allocates by a number.
    """
    most = unpack_limit(held) // _OBJECT
    machine = _Machine(most, held)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file), 1):
            if count > most:
                check_unpacked("its pickle, of so many parts,", _OBJECT * count, held)
            machine.step(opcode.name, argument)
        root = machine.stack[-1]
    except (IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"its pickle takes a value that does not exist: {error!r}") from None
    _check_tree(root, machine)


class _Machine:
    """A pickle machine on stand-ins: texts and numbers as they are, containers as `_Node`s.

    Opcodes that torch does not know are skipped; torch itself stops at the first.
    """

    def __init__(self, most: int, held: int):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self._most, self._held = most, held

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"):
            stack.append(_Node())
        elif name == "TUPLE":
            stack.append(self.made(self.since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(self.made(self.pop(int(name[-1]))))
        elif name in ("APPEND", "SETITEM"):
            below = self.pop(1 if name == "APPEND" else 2)
            stack[-1].below += below
        elif name in ("APPENDS", "SETITEMS"):
            below = self.since_mark()
            stack[-1].below += below
        elif name in ("REDUCE", "NEWOBJ", "BUILD"):
            function, arguments = self.pop(2)
            if name == "BUILD":
                function.below.append(arguments)
                stack.append(function)
            else:
                _check_call(function, arguments)
                stack.append(self.made([arguments]))
        elif name == "BINPERSID":
            self.pop(1)
            stack.append(None)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name not in ("PROTO", "STOP", "FRAME"):
            stack.append(argument)

    def pop(self, count: int) -> list[Any]:
        at = len(self.stack) - count
        if at < (self.marks[-1] if self.marks else 0):
            raise IndexError("too few values on the stack")
        taken = self.stack[at:]
        del self.stack[at:]
        return taken

    def since_mark(self) -> list[Any]:
        return self.pop(len(self.stack) - self.marks.pop())

    def made(self, below: list[Any]) -> _Node:
        node = _Node(below)
        self.check_leaves(node.size)
        return node

    def check_leaves(self, count: int) -> None:
        if count > self._most:
            what = "the tree of shared parts that its pickle unfolds to"
            check_unpacked(what, _OBJECT * count, self._held)


def _check_call(function: Any, arguments: Any) -> None:
    """ValueError for calls of torch's safe types that are cheap to write and expensive to run."""
    given = arguments.below if isinstance(arguments, _Node) else [arguments]
    name = str(function).replace(" ", ".")
    last = name.rpartition(".")[2]
    if _ALLOCATES.fullmatch(last) and any(isinstance(value, int) for value in given):
        raise ValueError(f"it calls {name} with a number")
    if last == "encode" and given[1:] != ["latin1"]:
        raise ValueError(f"it calls {name} for another encoding than latin1")
    if last == "dtype" and not _PLAIN_DTYPE.fullmatch(str(given[0] if given else "")):
        raise ValueError(f"it calls {name} for another dtype than a plain number")


def _check_tree(root: Any, machine: _Machine) -> None:
    """Count the leaves and the depth of a tree with shared parts, without recursion."""
    found: dict[int, tuple[int, int]] = {}
    open_nodes: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, walked = stack.pop()
        if not isinstance(node, _Node) or (id(node) in found and not walked):
            continue
        if walked:
            inside = [found.get(id(below), (1, 0)) for below in node.below]
            leaves = 1 + sum(count for count, _ in inside)
            depth = 1 + max((deep for _, deep in inside), default=0)
            machine.check_leaves(leaves)
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
            found[id(node)] = leaves, depth
            open_nodes.discard(id(node))
            continue
        if id(node) in open_nodes:
            raise ValueError("it holds a tree that contains itself")
        open_nodes.add(id(node))
        stack.append((node, True))
        stack += [(below, False) for below in node.below if isinstance(below, _Node)]
