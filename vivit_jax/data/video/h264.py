# SPDX-License-Identifier: Apache-2.0
"""What packets of h264 say of themselves: those that no other picture needs."""

# NAL units that leave nothing behind for other pictures if their nal_ref_idc is 0: slice,
# delimiter, filler. Messages (SEI) and parameter sets may hold for the pictures that follow.
_SLICE, _IDR = 1, 5
_PASSING_UNITS = (_SLICE, 9, 12)
# Profiles whose parameter sets say more of colours.
_HIGH = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)
_HEAD = 24  # bytes that hold what is read of a slice's header


class Passing:
    """Tells of packets, given one after the other from a keyframe on, whether others need them.

    A picture that no other is predicted from still changes those after it where its header is
    damaged: with another number (frame_num) it stands for pictures that are missing, with another
    first block it goes on with the picture before. Such a packet does not pass, and none does of
    streams without lengths before their units (transport streams), of fields, or with tables of
    their own for quantisation.
    """

    def __init__(self, header: bytes | None):
        self._length_bytes = _length_bytes(header)
        self._number_bits = _number_bits(header) if self._length_bytes else 0
        self._last = None  # the number of the reference picture before

    def __call__(self, packet: bytes | memoryview) -> bool:
        if not self._number_bits:
            return False
        units, whole = _units(memoryview(packet), self._length_bytes)
        passes = whole and bool(units)
        for place, unit in enumerate(u for u in units if u[0] & 0x1F in (_SLICE, _IDR)):
            bits = _Bits(unit[1:_HEAD])
            first, _, _, number = bits.ue(), bits.ue(), bits.ue(), bits.u(self._number_bits)
            if unit[0] & 0x60:
                self._last, passes = number, False
            elif self._last is None or number != (self._last + 1) % (1 << self._number_bits):
                passes = False
            passes = passes and (first == 0) == (place == 0)
        return passes and not any(u[0] & 0x60 or u[0] & 0x1F not in _PASSING_UNITS for u in units)


def _length_bytes(header: bytes | None) -> int:
    """Bytes of the length before each NAL unit, as the stream's header says; 0 where none is."""
    if not header or len(header) < 8 or header[0] != 1:
        return 0
    return (header[4] & 3) + 1


def _units(data: memoryview, length_bytes: int) -> tuple[list[memoryview], bool]:
    """The NAL units of a packet, and whether they fill it."""
    at, units = 0, []
    while at + length_bytes < len(data):
        end = at + length_bytes + int.from_bytes(data[at : at + length_bytes], "big")
        if end == at + length_bytes:  # an empty one
            return units, False
        units.append(data[at + length_bytes : end])
        at = end
    return units, at == len(data)


def _number_bits(header: bytes) -> int:
    """Bits of frame_num, by the first parameter set in the header; 0 where it is not to be read."""
    size = int.from_bytes(header[6:8], "big")
    bits = _Bits(header[9 : 8 + size])
    profile = bits.u(8)
    bits.u(16)
    bits.ue()
    if profile in _HIGH:
        if bits.ue() == 3:  # chroma_format_idc
            bits.u(1)
        bits.ue(), bits.ue(), bits.u(1)
        if bits.u(1):  # scaling matrices
            return 0
    number_bits, order = bits.ue() + 4, bits.ue()
    if order == 1 or number_bits > 16:
        return 0
    if order == 0:
        bits.ue()
    bits.ue(), bits.u(1), bits.ue(), bits.ue()
    return number_bits if bits.u(1) else 0  # frame_mbs_only_flag


class _Bits:
    """Reads numbers from the bits of a NAL unit; zeros follow its end."""

    def __init__(self, data: bytes | memoryview):
        plain = bytes(data).replace(b"\0\0\3", b"\0\0")
        self._bits = "".join(f"{byte:08b}" for byte in plain)
        self._at = 0

    def u(self, count: int) -> int:
        """A number of so many bits."""
        self._at += count
        return int(self._bits[self._at - count : self._at].ljust(count, "0") or "0", 2)

    def ue(self) -> int:
        """An exponential Golomb code."""
        one = self._bits.find("1", self._at)
        zeros = min((one if one >= 0 else len(self._bits)) - self._at, 32)
        self._at += zeros
        return self.u(zeros + 1) - 1
