# SPDX-License-Identifier: Apache-2.0
"""What the compiler made of a program: its collectives, its loops and its operations.

`read_program(jax.jit(f).lower(...).compile(), mesh)` reads the compiled text of CPU, TPU and GPU;
nothing is run. Everything is of one device, and how often a thing runs is counted over the loops
around it.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from vivit_jax.train.planning import hlo
from vivit_jax.train.planning.hlo import Instruction, Module
from vivit_jax.train.planning.replica_groups import mesh_axes, permuted_pairs, replica_groups

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
# What takes no time and moves nothing: names, views, and what is counted inside.
_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "async-start", "after-all", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_PASSED_ON = ("bitcast", "copy", "reshape", "convert", "custom-call")
_SLICES = ("slice", "dynamic-slice", "gather")
# A TPU spreads a transfer over the fusions beside it; the call to this is in the first of them.
_STARTS, _ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"
_NO_WORK = (_STARTS, _ENDS, "AllocateBuffer")
_COUNTS = ("s32", "u32", "s64", "u64")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group differ
    devices: tuple[int, ...]  # of one group, as `mesh.devices.flat` has them
    bytes: int  # what a device has of it: the larger of what it gives and of what it gets
    times: int  # that it runs
    beside: bool  # other operations may run between its start and its end
    channel: int | None
    op_name: str
    name: str

    @property
    def group(self) -> int:
        """How many devices take part together."""
        return len(self.devices)

    @property
    def sent(self) -> int:
        """Bytes that a device sends each time, in a ring of the group."""
        n = self.group
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return int(self.bytes * (2 if self.kind == "all-reduce" else 1) * (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while`. `trips` is None where the program does not say how often its body runs."""

    name: str
    trips: int | None
    times: int  # that the loop is entered
    op_name: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that the device runs, a fusion as one.

    `bytes` is what a run reads and writes of the main memory, by the shapes: a slice counts as
    what is sliced, an update in place as what is updated. `cycles` is the TPU compiler's estimate,
    None where it has none, as inside of Pallas kernels; of these `flops` is what their own
    `pl.CostEstimate` says, 0 without one.
    """

    name: str
    opcode: str
    op_name: str
    target: str | None  # of a custom call
    operands: tuple[hlo.Array, ...]
    results: tuple[hlo.Array, ...]
    bytes: int
    cycles: int | None
    flops: int
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """All of a compiled program that runs, in the order of its text."""

    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]
    operations: tuple[Operation, ...]

    @property
    def cycles(self) -> int:
        """Estimated cycles of all operations, as often as they run; 0 but on TPU."""
        return sum((each.cycles or 0) * each.times for each in self.operations)

    @property
    def bytes(self) -> int:
        """Traffic of the main memory, as often as the operations run."""
        return sum(each.bytes * each.times for each in self.operations)


def read_program(compiled: Any, mesh: Mesh) -> Program:
    """The program of a `jax.stages.Compiled`, or of its text, that was compiled for a mesh.

    Of a loop whose count is unknown the body counts once. Of a conditional the costliest branch
    runs, and what is in the others has `times` 0. Raises ValueError for a text that is not
    understood.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    module = hlo.parse(text)
    collectives, loops, operations = [], [], []
    for each, within, times in _run(module, module.entry, 1, loops):
        parts = _fused(module, each.named("calls")) if each.opcode == "fusion" else [(each, within)]
        for part, place in parts:
            if part.opcode.removesuffix("-start") in KINDS and _begins(module, part, place):
                collectives.append(_collective(module, part, place, each.op_name, mesh, times))
        if each.opcode not in _NOTHING and not each.opcode.endswith(("-done", "-update")):
            operations.append(_operation(module, each, module.computations[within], times))
    return Program(tuple(collectives), tuple(loops), tuple(operations))


def _run(
    module: Module, computation: str, times: int, loops: list[Loop]
) -> Iterator[tuple[Instruction, str, int]]:
    """Instructions that run, fusions as one, with the computation that holds each and how often."""
    for each in module.computations[computation].values():
        yield each, computation, times
        if each.opcode == "while":
            trips = _trips(module, each, module.computations[computation])
            loops.append(Loop(each.name, trips, times, each.op_name))
            rounds = 1 if trips is None else trips
            # A condition asks once more than the body runs, and may ask other devices.
            yield from _run(module, each.named("condition"), times * (rounds + 1), loops)
            yield from _run(module, each.named("body"), times * rounds, loops)
        elif each.opcode in ("call", "async-start"):
            called = each.named("to_apply") or each.named("calls")
            yield from _run(module, called, times, loops)
        elif each.opcode == "conditional":
            branches = _branches(each)
            costs = [_cost(module, branch) for branch in branches]
            costliest = costs.index(max(costs))
            for number, branch in enumerate(branches):
                yield from _run(module, branch, times if number == costliest else 0, loops)


def _cost(module: Module, computation: str) -> tuple[int, int]:
    """By which branches of a conditional compare: estimated cycles, then bytes that they move."""
    cycles = moved = 0
    for each, within, times in _run(module, computation, 1, []):
        if each.opcode not in _NOTHING:
            local = module.computations[within]
            cycles += times * int(each.quoted("estimated_cycles") or 0)
            moved += times * _traffic(module, each, local, _results(each, local))
    return cycles, moved


def _branches(conditional: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
    if listed:
        return re.findall(r"%([\w.\-]+)", listed[1])
    return [conditional.named("true_computation"), conditional.named("false_computation")]


def _fused(module: Module, computation: str) -> Iterator[tuple[Instruction, str]]:
    """The instructions of a fusion and of fusions in it, with the computation that holds each."""
    for each in module.computations[computation].values():
        yield each, computation
        if each.opcode == "fusion":
            yield from _fused(module, each.named("calls"))


def _trips(module: Module, loop: Instruction, around: Mapping[str, Instruction]) -> int | None:
    """How often a body runs: as CPU and GPU say; on TPU the number below which its counter stays.

    The counters of jax's loops go up by one.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = loop.named("condition")
    local, compared = module.computations[condition], module.root(condition)
    constants = list(local.values())
    operands = [local[name] for name in compared.operands]
    if compared.opcode == "fusion":
        fused = compared.named("calls")
        compared = module.root(fused)
        constants += module.computations[fused].values()
    limits = {
        int(each.literal)
        for each in constants
        if each.opcode == "constant" and each.arrays[0].dtype in _COUNTS
    }
    counters = [each for each in operands if each.opcode == "get-tuple-element"]
    below = compared.opcode == "compare" and compared.named("direction") == "LT"
    if not below or len(limits) != 1 or len(counters) != 1:
        return None
    first = around[loop.operands[0]]
    if first.opcode == "tuple":
        first = _source(around[first.operands[int(counters[0].named("index"))]], around)
    # XLA may hand the first number in from outside, where jax's own loops have 0.
    start = int(first.literal) if first.opcode == "constant" else 0
    return max(limits.pop() - start, 0)


def _source(each: Instruction, local: Mapping[str, Instruction]) -> Instruction:
    """What an instruction is a view or a copy of."""
    while each.opcode in _PASSED_ON and each.operands and each.operands[0] in local:
        each = local[each.operands[0]]
    return each


def _begins(module: Module, each: Instruction, within: str) -> bool:
    """Whether a transfer begins with this instruction, rather than going on with one."""
    if each.quoted("chain_id") is None:
        return True
    beside = module.computations[within].values()
    return any(other.quoted("custom_call_target") == _STARTS for other in beside)


def _collective(
    module: Module, each: Instruction, within: str, op_name: str, mesh: Mesh, times: int
) -> Collective:
    local = module.computations[within]
    kind = each.opcode.removesuffix("-start")
    if kind == "all-reduce" and _scatters(module, each, within):
        kind = "reduce-scatter"
    permuted = kind == "collective-permute"
    groups = (
        permuted_pairs(each.attributes)
        if permuted
        else replica_groups(each.attributes, mesh.devices.size)
    )
    given = [array.bytes for name in each.operands for array in local[name].arrays]
    got = [array.bytes for array in _results(each, local)]
    channel = each.named("channel_id")
    told = [op_name, *(local[name].op_name for name in each.operands)]
    return Collective(
        kind=kind,
        axes=mesh_axes(groups, mesh.shape),
        devices=max(groups, key=len),
        bytes=max(sum(given), sum(got)),
        times=times,
        beside=_beside(each),
        channel=None if channel is None else int(channel),
        op_name=each.op_name or next(filter(None, told), ""),
        name=each.name,
    )


def _beside(each: Instruction) -> bool:
    """Whether it has a start and an end: a GPU's pair, a TPU's that fusions have a part in."""
    pair = each.opcode.endswith("-start") and '"is_sync":true' not in each.attributes
    return pair or each.quoted("chain_id") is not None


def _scatters(module: Module, each: Instruction, within: str) -> bool:
    """Whether the device keeps only slices of an all-reduce, in one fusion, as on TPU."""
    local, root = module.computations[within], module.root(within)
    kept = [local[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for one in kept:
        one = _source(one, local)
        if one.opcode != "dynamic-slice":
            return False
        one = _source(local[one.operands[0]], local)
        if one.opcode == "get-tuple-element":
            one = local[one.operands[0]]
        if one is not each:
            return False
    return bool(kept)


def _results(each: Instruction, local: Mapping[str, Instruction]) -> tuple[hlo.Array, ...]:
    """What an instruction gives; of one that only starts, what the end of it does."""
    if each.opcode.endswith("-start"):
        done = each.opcode.removesuffix("-start") + "-done"
        for other in local.values():
            if other.opcode == done and each.name in other.operands:
                return other.arrays
    return each.arrays


def _operation(
    module: Module, each: Instruction, local: Mapping[str, Instruction], times: int
) -> Operation:
    operands = tuple(array for name in each.operands for array in local[name].arrays)
    results, cycles = _results(each, local), each.quoted("estimated_cycles")
    cost = re.search(r'"cost_estimate":\{"flops":"(\d+)"', each.attributes)
    parts = [each]
    if each.opcode == "fusion":
        parts += [part for part, _ in _fused(module, each.named("calls"))]
    targets = [part.quoted("custom_call_target") for part in parts]
    targets = [target for target in targets if target and target not in _NO_WORK]
    return Operation(
        name=each.name,
        opcode=each.opcode,
        op_name=next((part.op_name for part in parts if part.op_name), ""),
        target=targets[0] if targets else None,
        operands=operands,
        results=results,
        bytes=_traffic(module, each, local, results),
        cycles=None if cycles is None else int(cycles),
        flops=int(cost[1]) if cost else 0,
        times=times,
    )


def _traffic(
    module: Module,
    each: Instruction,
    local: Mapping[str, Instruction],
    results: Sequence[hlo.Array],
) -> int:
    """Bytes that one run reads and writes of the main memory."""
    if each.quoted("custom_call_target") in _NO_WORK:
        return 0
    given = [local[name].arrays for name in each.operands]
    if each.opcode == "fusion":
        fused = each.named("calls")
        read = sum(min(_read(module, fused, i), _main(arrays)) for i, arrays in enumerate(given))
        return read + _fusion_writes(module, fused, results)
    if each.opcode.removesuffix("-start") in _SLICES:
        read = sum(array.bytes for array in results) if _main(given[0]) else 0
        return read + _main(results)
    if each.opcode == "dynamic-update-slice":
        update = sum(array.bytes for array in given[1])
        return _main(given[1]) + (update if _main(results) else 0)
    return sum(map(_main, given)) + _main(results)


def _main(arrays: Sequence[hlo.Array]) -> int:
    """Bytes of what lies in the main memory."""
    return sum(array.bytes for array in arrays if not array.space)


def _read(module: Module, computation: str, index: int) -> int:
    """Bytes that a fusion reads of an operand: of one that is only sliced, the slices."""
    local = module.computations[computation]
    whole = next(
        each for each in local.values() if each.opcode == "parameter" and int(each.literal) == index
    )
    total, names = 0, {whole.name}
    for each in local.values():
        places = [i for i, name in enumerate(each.operands) if name in names]
        if not places:
            continue
        if each.opcode == "bitcast":
            names.add(each.name)
        elif each.opcode in _SLICES and places == [0]:
            total += sum(array.bytes for array in each.arrays)
        elif each.opcode == "fusion":
            total += sum(_read(module, each.named("calls"), place) for place in places)
        elif each.opcode == "dynamic-update-slice" and places == [0]:
            pass  # in place
        elif not (each.opcode == "tuple" or _goes_on(module, each, computation)):
            return sum(array.bytes for array in whole.arrays)
    return total


def _fusion_writes(module: Module, computation: str, results: Sequence[hlo.Array]) -> int:
    """Bytes of the main memory that a fusion with these results writes."""
    local, root = module.computations[computation], module.root(computation)
    if root.quoted("custom_call_target") == _STARTS:
        return _main(results[1:])  # the first is what is sent
    parts = [local[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(results):
        return _main(results)
    return sum(
        min(_written(module, part, computation), _main([array]))
        for part, array in zip(parts, results, strict=True)
    )


def _written(module: Module, each: Instruction, within: str) -> int:
    """Bytes of one result that a fusion writes: of an update in place, the update."""
    local = module.computations[within]
    while each.opcode == "bitcast":
        each = local[each.operands[0]]
    if each.opcode == "fusion" and len(each.arrays) == 1:
        return _written(module, module.root(each.named("calls")), each.named("calls"))
    if each.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in local[each.operands[1]].arrays)
    if each.opcode == "parameter" or _goes_on(module, each, within):
        return 0
    return sum(array.bytes for array in each.arrays)


def _goes_on(module: Module, each: Instruction, within: str) -> bool:
    """Whether it belongs to a transfer that another fusion began, and moves nothing itself."""
    if each.quoted("custom_call_target") == _ENDS:
        return True
    return each.opcode in KINDS and not _begins(module, each, within)
