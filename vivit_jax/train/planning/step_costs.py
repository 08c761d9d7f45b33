# SPDX-License-Identifier: Apache-2.0
"""Estimates what the operations and collectives of a compiled step cost on a chip."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from vivit_jax.layers.pallas import cycles
from vivit_jax.train.planning.compiled import Collective, Operation, Program
from vivit_jax.train.planning.hardware import Topology
from vivit_jax.train.planning.step_parts import PARTS, part_of

# Cycles of the attention kernels on a core, forward and backward, relative to v5e.
_OF_V5E = {"v4": (1.55, 1.32), "v5e": (1.0, 1.0), "v5p": (1.0, 1.0), "v6e": (0.7, 0.63)}
_PALLAS = "tpu_custom_call"


@dataclasses.dataclass(frozen=True)
class Part:
    """What one of `step_parts.PARTS` costs in a step."""

    name: str
    seconds: float  # the compiler's estimate plus kernels; 0 on GPU
    bytes: int  # main memory traffic


@dataclasses.dataclass(frozen=True)
class Moved:
    """All collectives of one kind along the same mesh axes, in a step."""

    kind: str
    axes: tuple[str, ...]
    times: int
    bytes: int  # held by a device
    sent: int  # by each device
    seconds: float | None  # on the links; None between slices
    beside_seconds: float  # the part of `seconds` that other operations may overlap


def kernel_seconds(operation: Operation, topology: Topology) -> float:
    """The seconds of all runs of a Pallas kernel; 0 for other operations.

    Attention in half precision is estimated by `vivit_jax.layers.pallas.cycles`. Other kernels get
    a lower bound: the products of their cost estimate or their traffic, at the chip's figures.
    """
    if operation.target != _PALLAS:
        return 0.0
    chip = topology.chip
    once = max(operation.flops / chip.flops, operation.bytes / chip.bandwidth)
    attention = re.search(r"attention_(forward|backward)", f"{operation.name} {operation.op_name}")
    if attention and operation.operands[0].dtype == "bf16":
        backward = attention[1] == "backward"
        (heads, width, queries), (_, _, keys) = (each.shape for each in operation.operands[:2])
        count = cycles(heads, queries, keys, width, backward=backward)
        count *= _OF_V5E[topology.kind][backward] / (2 if chip.megacore else 1)
        once = max(once, count / chip.clock)
    return once * operation.times


def operation_seconds(operation: Operation, topology: Topology) -> float:
    """The seconds of all runs of an operation: its estimated cycles, or `kernel_seconds`."""
    estimated = (operation.cycles or 0) * operation.times
    return estimated / topology.chip.clock + kernel_seconds(operation, topology)


def kernels(program: Program) -> tuple[dict[str, int], int]:
    """Calls of kernels by name, and how many Pallas calls carry no cost estimate.

    Other custom calls in a TPU's program are XLA's own.
    """
    calls, uncounted = defaultdict(int), 0
    on_tpu = any(each.cycles for each in program.operations)
    for each in program.operations:
        if not each.times:
            continue  # in a branch that is not taken
        if each.target == _PALLAS:
            calls[re.sub(r"[.\d]+$", "", each.name)] += each.times
            uncounted += 0 if each.flops else each.times
        elif each.target is not None and not on_tpu:
            calls[each.target] += each.times
    return dict(calls), uncounted


def parts(program: Program, topology: Topology) -> tuple[Part, ...]:
    """The cost of each part of the model that occurs, in the order of PARTS."""
    seconds, traffic = defaultdict(float), defaultdict(int)
    for each in program.operations:
        part = part_of(each.op_name)
        seconds[part] += operation_seconds(each, topology)
        traffic[part] += each.bytes * each.times
    return tuple(Part(name, seconds[name], traffic[name]) for name in PARTS if name in traffic)


def costliest(program: Program, topology: Topology) -> tuple[Operation, ...]:
    """All operations, costliest first."""

    def cost(each: Operation):
        return operation_seconds(each, topology), each.bytes * each.times

    return tuple(sorted(program.operations, key=cost, reverse=True))


def moved(program: Program, mesh: Mesh, topology: Topology) -> tuple[Moved, ...]:
    """The collectives of a step by kind and axes, those that send most first."""
    groups: dict[tuple, list[tuple[Collective, float | None]]] = defaultdict(list)
    for each in program.collectives:
        if not each.times:
            continue  # in a branch that is not taken
        rate = link_bandwidth([mesh.devices.flat[i] for i in each.devices], topology)
        seconds = None if rate is None else each.sent * each.times / rate
        groups[each.kind, each.axes, rate is None].append((each, seconds))
    found = []
    for (kind, axes, unknown), pairs in groups.items():
        each = [one for one, _ in pairs]
        whole = sum(seconds or 0.0 for _, seconds in pairs)
        beside = sum(seconds or 0.0 for one, seconds in pairs if one.beside)
        found.append(
            Moved(
                kind=kind,
                axes=axes,
                times=sum(one.times for one in each),
                bytes=sum(one.bytes * one.times for one in each),
                sent=sum(one.sent * one.times for one in each),
                seconds=None if unknown else whole,
                beside_seconds=beside,
            )
        )
    return tuple(sorted(found, key=lambda each: each.sent, reverse=True))


def sent_to_slices(program: Program) -> int:
    """Bytes sent to other slices, which libtpu compiles to sends through the hosts."""
    sends = (each for each in program.operations if each.opcode == "send")
    return sum(each.operands[0].bytes * each.times for each in sends)


def link_bandwidth(
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
    topology: Topology,
) -> float | None:
    """The bandwidth, in bytes a second, from one device of a group to the others.

    On TPU the links along the sides of the torus that the group spans, each taken as a closed ring;
    on GPU all links. None between slices, or between machines with GPUs.
    """
    if topology.chip.platform == "gpu":
        return topology.chip.links if len({d.process_index for d in devices}) == 1 else None
    if len({getattr(d, "slice_index", 0) for d in devices}) > 1:
        return None
    reached = sum(len(set(place)) > 1 for place in zip(*(d.coords for d in devices), strict=True))
    return topology.chip.links * max(reached, 1) / topology.chip.dimensions
