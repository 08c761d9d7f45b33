# SPDX-License-Identifier: Apache-2.0
"""The device groups of a collective, in the notations of compiled programs, and their mesh axes."""

import math
import re
from collections.abc import Mapping

import numpy as np

Groups = tuple[tuple[int, ...], ...]


def permuted_pairs(attributes: str) -> Groups:
    """(source, target) of a permutation, without devices that send to themselves."""
    listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if listed is None:
        raise ValueError(f"no source_target_pairs in {attributes[:200]!r}")
    pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", listed[1])]
    return tuple(pair for pair in pairs if pair[0] != pair[1]) or ((0,),)


def replica_groups(attributes: str, devices: int) -> Groups:
    """The groups of a collective: `{{0,1},{2,3}}`, `[2,4]<=[8]`, `mesh['a'=2,'b'=4] {'a'}`.

    Raises ValueError for any other notation.
    """
    found = re.search(
        r"replica_groups=(\{\}|\{\{[\d,{}]*\}\}|\[\S+?(?=, |$)|mesh\[.*?\{.*?\})", attributes
    )
    if found is None:
        raise ValueError(f"no replica_groups that are understood in {attributes[:200]!r}")
    text = found[1]
    if text == "{}":
        return (tuple(range(devices)),)
    if text.startswith("{"):
        groups = [group.split(",") for group in re.findall(r"\{([\d,]+)\}", text)]
    elif text.startswith("["):
        groups = _iota(text)
    else:
        groups = _along_axes(text)
    return tuple(tuple(int(device) for device in group) for group in groups)


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: iota reshaped, transposed, and reshaped again."""
    found = re.fullmatch(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"replica groups {text!r} are not understood")
    shape = tuple(map(int, found[1].split(",")))
    sizes = tuple(map(int, found[2].split(","))) if found[2] else None
    order = tuple(map(int, found[3].split(","))) if found[3] else None
    numbers = np.arange(math.prod(shape)).reshape(sizes or shape).transpose(order)
    return numbers if sizes is None else numbers.reshape(shape)


def _along_axes(text: str) -> np.ndarray:
    """Groups along axes of a mesh, or along part of an axis: `{'a'}`, `{'a':(1)2}`.

    Devices are numbered in order, `mesh['a'=2,'b'=4] {'a'}`, or explicitly:
    `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}`.
    """
    found = re.fullmatch(r"mesh\[(.*?)\](?:, *device_ids=\((.*)\))? *\{(.*)\}", text)
    if found is None:
        raise ValueError(f"replica groups {text!r} are not understood")
    sizes = {name: int(size) for name, size in re.findall(r"'(.+?)'=(\d+)", found[1])}
    if found[2] is None:
        devices = np.arange(math.prod(sizes.values()))
    elif re.fullmatch(r"[\d,]+", found[2]):
        devices = np.array([int(number) for number in found[2].split(",")])
    else:
        devices = _iota(found[2])
    shape, chosen = [], []
    asked = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'(.+?)'(?::\((\d+)\)(\d+))?", found[3])
    }
    for name, whole in sizes.items():
        before, size = asked.get(name, (1, 1))
        chosen += [len(shape) + 1] if name in asked else []
        shape += [before, size, whole // before // size]
    others = [axis for axis in range(len(shape)) if axis not in chosen]
    group = math.prod(shape[axis] for axis in chosen)
    return devices.reshape(shape).transpose(*others, *chosen).reshape(-1, group)


def mesh_axes(groups: Groups, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which the devices of a group differ, in the mesh's order.

    Devices are numbered in the order of `mesh.devices.flat`, as programs number them.
    """
    shape = tuple(sizes.values())
    varied = set()
    for group in groups:
        places = np.unravel_index(np.array(group), shape)
        varied |= {name for name, at in zip(sizes, places, strict=True) if np.ptp(at)}
    return tuple(name for name in sizes if name in varied)
