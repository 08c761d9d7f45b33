# SPDX-License-Identifier: Apache-2.0
"""Damage by seed: the same kind and seed give the same bytes everywhere."""

import random
import re

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_VALUES = (
    b"0", b"-1", b"1", b"7", b"2147483648", b"1000000000", b"99999999999999999999", b"1e999",
    b"1e-400", b"0.5", b"null", b"true", b'"x"', b"[]", b"{}", b"[[1]]", b"1" + b"0" * 400, b"NaN",
    b"[" * 3000, b'"\\u001b[2J"', b'"\\ud800"',
)  # fmt: skip
_EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, kind: str, seed: int) -> tuple[bytes, str]:
    """Changed bytes, and a description. In text, numbers and words are changed as well."""
    drawn = random.Random(f"{kind} {seed}")
    changes = [_flip, _flip, _byte, _truncate, _insert, _delete, _double, _swap, _length, _length]
    if _is_text(data):
        changes += [_value] * 8
    told = []
    for _ in range(drawn.choice([1, 1, 1, 2, 3])):
        if not data:
            break
        change = drawn.choice(changes)
        data = change(data, drawn)
        told.append(change.__name__[1:])
    return data, " ".join(told)


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _flip(data: bytes, drawn: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(drawn.choice([1, 1, 2, 8])):
        out[drawn.randrange(len(out))] ^= 1 << drawn.randrange(8)
    return bytes(out)


def _byte(data: bytes, drawn: random.Random) -> bytes:
    out = bytearray(data)
    out[drawn.randrange(len(out))] = drawn.choice([0, 1, 0x7F, 0x80, 0xFF, drawn.randrange(256)])
    return bytes(out)


def _truncate(data: bytes, drawn: random.Random) -> bytes:
    return data[: drawn.randrange(len(data))]


def _insert(data: bytes, drawn: random.Random) -> bytes:
    at = drawn.randrange(len(data) + 1)
    return data[:at] + drawn.randbytes(drawn.choice([1, 2, 4, 64, 1024])) + data[at:]


def _chunk(data: bytes, drawn: random.Random) -> tuple[int, int]:
    at = drawn.randrange(len(data))
    return at, min(len(data), at + drawn.choice([1, 2, 4, 16, 256, 4096]))


def _delete(data: bytes, drawn: random.Random) -> bytes:
    begin, end = _chunk(data, drawn)
    return data[:begin] + data[end:]


def _double(data: bytes, drawn: random.Random) -> bytes:
    begin, end = _chunk(data, drawn)
    return data[:end] + data[begin:end] + data[end:]


def _swap(data: bytes, drawn: random.Random) -> bytes:
    (a, b), (c, d) = sorted(_chunk(data, drawn) for _ in range(2))
    b = min(b, c)
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _length(data: bytes, drawn: random.Random) -> bytes:
    """A boundary value where a length could be."""
    width = drawn.choice([1, 2, 4, 8])
    at = drawn.randrange(len(data))
    value = drawn.choice(_EDGES) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, drawn.choice(["little", "big"])) + data[at + width :]


def _value(data: bytes, drawn: random.Random) -> bytes:
    """Another value in place of a number."""
    found = list(_NUMBER.finditer(data))
    if not found:
        return _byte(data, drawn)
    one = drawn.choice(found)
    return data[: one.start()] + drawn.choice(_VALUES) + data[one.end() :]
