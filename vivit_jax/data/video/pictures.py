# SPDX-License-Identifier: Apache-2.0
"""Pixels of decoded frames as a player shows them: turned, mirrored, and with square pixels."""

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from vivit_jax.errors import VideoError


def orientation(name: str, frame) -> Int[np.ndarray, "2 2"]:
    """The matrix m with displayed (x, y) = stored (x, y) @ m, up to a shift.

    It comes from the container, or from the EXIF data of a motion JPEG picture.
    """
    from av.sidedata.sidedata import SideDataContainer

    _name_side_data()
    # Not `frame.side_data`: PyAV 18 keeps it in the frame, a cycle, so buffers return to the
    # decoder only at garbage collection, and how it conceals damage may depend on its buffers.
    # PyAV's stub has no constructor.
    data = SideDataContainer(frame).get("DISPLAYMATRIX")  # pyright: ignore[reportCallIssue]
    if data is None:
        return np.eye(2, dtype=int)
    matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2].astype(float)
    scaled = matrix / max(abs(matrix).max(), 1)
    turned = np.rint(scaled).astype(int)
    orthogonal = np.array_equal(turned @ turned.T, np.eye(2))
    if not orthogonal or abs(scaled - turned).max() > 1e-3:
        raise VideoError(
            f"{name}: display matrix {(matrix / 65536).tolist()}; expected a turn by a multiple of "
            "90 degrees, mirrored or not: rewrite the file with "
            "ffmpeg -display_rotation 0 -i IN -c copy OUT"
        )
    return turned


@functools.cache
def _name_side_data() -> None:
    """Lets PyAV 18 list side data that it has no name for, as PyAV 19 does.

    Otherwise one such item, as EXIF data, hides the others: listing them raises ValueError.
    """
    from av.sidedata.sidedata import Type

    if "_missing_" in vars(Type):
        return

    def unknown(cls, value):
        member = object.__new__(cls)
        member._name_, member._value_ = f"UNKNOWN_{value}", value
        return cls._value2member_map_.setdefault(value, member)

    setattr(Type, "_missing_", classmethod(unknown))  # noqa: B010 - the stubs declare a method


def displayed(name: str, frame, aspect: Fraction = Fraction(1)) -> UInt8[np.ndarray, "h w 3"]:
    """A decoded frame, turned and mirrored as a player shows it.

    `aspect` is the width over the height of a stored pixel; the result has square pixels.
    """
    return oriented(rgb(frame, aspect), orientation(name, frame))


def rgb(frame, aspect: Fraction = Fraction(1)) -> UInt8[np.ndarray, "h w 3"]:
    """A decoded frame as stored, but scaled in width to square pixels if `aspect` is not 1."""
    # One thread: by default each frame starts its own, for the same bits at several times the cost.
    if aspect == 1:
        return frame.to_ndarray(format="rgb24", threads=1)
    width = max(1, round(frame.width * aspect))
    return frame.to_ndarray(format="rgb24", width=width, interpolation="BICUBIC", threads=1)


def oriented(
    image: Shaped[np.ndarray, "_ _ c"], orientation: Int[np.ndarray, "2 2"]
) -> Shaped[np.ndarray, "h w c"]:
    """The image as displayed."""
    (a, b), (c, d) = orientation
    if a == 0:
        image, right, down = image.swapaxes(0, 1), c, b
    else:
        right, down = a, d
    return image[::down, ::right]


def rotation(orientation: Int[np.ndarray, "2 2"]) -> tuple[int, bool, bool]:
    """Degrees clockwise, whether then mirrored left to right, and whether height and width swap."""
    (a, b), (c, d) = orientation
    mirrored = a * d - b * c < 0
    cosine = -a if mirrored else a
    degrees = {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): 270}[int(cosine), int(b)]
    return degrees, bool(mirrored), degrees in (90, 270)


def stacked(
    name: str, frames: Mapping[int, UInt8[np.ndarray, "_ _ 3"]], indices: Sequence[int] | np.ndarray
) -> UInt8[np.ndarray, "t h w 3"]:
    """Stacks frames by their numbers, repeats allowed. VideoError for different sizes."""
    refuse_sizes(name, {frames[k].shape[:2]: k for k in reversed(indices)})
    return np.stack([frames[k] for k in indices])


def refuse_sizes(name: str, shapes: dict[tuple[int, ...], int]) -> None:
    """VideoError for more than one (height, width); `shapes` maps each to a frame that has it."""
    if len(shapes) > 1:
        sizes = ", ".join(f"{w}x{h} (frame {k})" for (h, w), k in shapes.items())
        raise VideoError(
            f"{name}: frames of different sizes: {sizes}; expected one size: "
            "read the parts separately with indices=..., or re-encode the file to one size"
        )
