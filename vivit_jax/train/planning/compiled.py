# SPDX-License-Identifier: Apache-2.0
"""The collectives, loops and operations of a compiled program.

`read_program(jax.jit(f).lower(...).compile(), mesh)` reads the compiled text of CPU, TPU and GPU;
nothing is run. All figures are per device; counts include the loops around an operation.
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
# Names, views, and calls whose bodies are counted: they take no time and move nothing themselves.
_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "async-start", "after-all", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip
_PASSED_ON = ("bitcast", "copy", "reshape", "convert", "custom-call")
_SLICES = ("slice", "dynamic-slice", "gather")
# A TPU spreads a transfer over neighbouring fusions; the first of them calls this.
_STARTS, _ENDS = "AsyncCollectiveStart", "AsyncCollectiveDone"
_NO_WORK = (_STARTS, _ENDS, "AllocateBuffer")
_COUNTS = ("s32", "u32", "s64", "u64")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group differ
    devices: tuple[int, ...]  # of one group, as indices into `mesh.devices.flat`
    bytes: int  # on a device: the larger of its operands and its results
    times: int  # how often it runs
    beside: bool  # other operations may run between its start and its end
    channel: int | None
    op_name: str
    name: str

    @property
    def group(self) -> int:
        """The number of devices in a group."""
        return len(self.devices)

    @property
    def sent(self) -> int:
        """Bytes that a device sends each time, with the group as a ring."""
        n = self.group
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return int(self.bytes * (2 if self.kind == "all-reduce" else 1) * (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while`. `trips` is None if the program does not say how often its body runs."""

    name: str
    trips: int | None
    times: int  # how often the loop is entered
    op_name: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction that the device runs; a fusion counts as one.

    `bytes` is the main memory traffic of one run, by the shapes: a slice counts what is sliced, an
    update in place what is updated. `cycles` is the TPU compiler's estimate; it has none for Pallas
    kernels, whose `flops` come from their own `pl.CostEstimate` (0 without one).
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
    """Everything in a compiled program that runs, in the order of its text."""

    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]
    operations: tuple[Operation, ...]

    @property
    def cycles(self) -> int:
        """Estimated cycles of all runs of all operations; 0 except on TPU."""
        return sum((each.cycles or 0) * each.times for each in self.operations)

    @property
    def bytes(self) -> int:
        """Main memory traffic of all runs of all operations."""
        return sum(each.bytes * each.times for each in self.operations)


def read_program(compiled: Any, mesh: Mesh) -> Program:
    """The program of a `jax.stages.Compiled`, or of its text, compiled for a mesh.

    The body of a loop with an unknown count counts once. Only the costliest branch of a conditional
    counts; operations in the others have `times` 0. Raises ValueError for text that is not
    understood.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    module = hlo.parse(text)
    collectives, loops, operations = [], [], []
    for each, within, times in _run(module, module.entry, 1, loops):
        parts = [(each, within)]
        if each.opcode == "fusion":
            parts = _fused(module, each.required("calls"))
        for part, place in parts:
            if part.opcode.removesuffix("-start") in KINDS and _begins(module, part, place):
                collectives.append(_collective(module, part, place, each.op_name, mesh, times))
        if each.opcode not in _NOTHING and not each.opcode.endswith(("-done", "-update")):
            operations.append(_operation(module, each, module.computations[within], times))
    return Program(tuple(collectives), tuple(loops), tuple(operations))


def _run(
    module: Module, computation: str, times: int, loops: list[Loop]
) -> Iterator[tuple[Instruction, str, int]]:
    """(instruction, computation that holds it, times) of all that runs; a fusion counts as one."""
    for each in module.computations[computation].values():
        yield each, computation, times
        if each.opcode == "while":
            trips = _trips(module, each, module.computations[computation])
            loops.append(Loop(each.name, trips, times, each.op_name))
            rounds = 1 if trips is None else trips
            # The condition runs once more than the body, and may hold collectives.
            yield from _run(module, each.required("condition"), times * (rounds + 1), loops)
            yield from _run(module, each.required("body"), times * rounds, loops)
        elif each.opcode in ("call", "async-start"):
            called = each.named("to_apply") or each.required("calls")
            yield from _run(module, called, times, loops)
        elif each.opcode == "conditional":
            branches = _branches(each)
            costs = [_cost(module, branch) for branch in branches]
            costliest = costs.index(max(costs))
            for number, branch in enumerate(branches):
                yield from _run(module, branch, times if number == costliest else 0, loops)


def _cost(module: Module, computation: str) -> tuple[int, int]:
    """The cost of a conditional's branch: estimated cycles, then bytes moved."""
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
    return [conditional.required(f"{case}_computation") for case in ("true", "false")]


def _fused(module: Module, computation: str) -> Iterator[tuple[Instruction, str]]:
    """(instruction, computation that holds it) of a fusion and of the fusions inside it."""
    for each in module.computations[computation].values():
        yield each, computation
        if each.opcode == "fusion":
            yield from _fused(module, each.required("calls"))


def _trips(module: Module, loop: Instruction, around: Mapping[str, Instruction]) -> int | None:
    """How often a body runs: CPU and GPU say so; on TPU it is the limit of the loop's counter.

    The counters of jax's loops go up by one.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = loop.required("condition")
    local, compared = module.computations[condition], module.root(condition)
    constants = list(local.values())
    operands = [local[name] for name in compared.operands]
    if compared.opcode == "fusion":
        fused = compared.required("calls")
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
        first = _source(around[first.operands[int(counters[0].required("index"))]], around)
    # XLA may pass the start in from outside the loop; jax's own loops start at 0.
    start = int(first.literal) if first.opcode == "constant" else 0
    return max(limits.pop() - start, 0)


def _source(each: Instruction, local: Mapping[str, Instruction]) -> Instruction:
    """The instruction that this one is a view or a copy of."""
    while each.opcode in _PASSED_ON and each.operands and each.operands[0] in local:
        each = local[each.operands[0]]
    return each


def _begins(module: Module, each: Instruction, within: str) -> bool:
    """Whether this instruction begins a transfer, rather than continuing one."""
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
    fallbacks = [op_name, *(local[name].op_name for name in each.operands)]
    return Collective(
        kind=kind,
        axes=mesh_axes(groups, mesh.shape),
        devices=max(groups, key=len),
        bytes=max(sum(given), sum(got)),
        times=times,
        beside=_beside(each),
        channel=None if channel is None else int(channel),
        op_name=each.op_name or next(filter(None, fallbacks), ""),
        name=each.name,
    )


def _beside(each: Instruction) -> bool:
    """Whether it is asynchronous: a start and an end on GPU, a chain of fusions on TPU."""
    pair = each.opcode.endswith("-start") and '"is_sync":true' not in each.attributes
    return pair or each.quoted("chain_id") is not None


def _scatters(module: Module, each: Instruction, within: str) -> bool:
    """Whether a fusion keeps only a slice of its all-reduce: TPU's form of a reduce-scatter."""
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
    """The results of an instruction; those of its end if it only starts."""
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
        parts += [part for part, _ in _fused(module, each.required("calls"))]
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
    """Main memory traffic of one run, in bytes."""
    if each.quoted("custom_call_target") in _NO_WORK:
        return 0
    given = [local[name].arrays for name in each.operands]
    if each.opcode == "fusion":
        fused = each.required("calls")
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
    """Bytes of the arrays that lie in main memory."""
    return sum(array.bytes for array in arrays if not array.space)


def _read(module: Module, computation: str, index: int) -> int:
    """Bytes that a fusion reads of an operand; only the slices if it is only sliced."""
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
            total += sum(_read(module, each.required("calls"), place) for place in places)
        elif each.opcode == "dynamic-update-slice" and places == [0]:
            pass  # in place
        elif not (each.opcode == "tuple" or _goes_on(module, each, computation)):
            return sum(array.bytes for array in whole.arrays)
    return total


def _fusion_writes(module: Module, computation: str, results: Sequence[hlo.Array]) -> int:
    """Bytes of main memory that a fusion with these results writes."""
    local, root = module.computations[computation], module.root(computation)
    if root.quoted("custom_call_target") == _STARTS:
        return _main(results[1:])  # the first is the operand
    parts = [local[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(results):
        return _main(results)
    return sum(
        min(_written(module, part, computation), _main([array]))
        for part, array in zip(parts, results, strict=True)
    )


def _written(module: Module, each: Instruction, within: str) -> int:
    """Bytes that a fusion writes of one result; only the update if it updates in place."""
    local = module.computations[within]
    while each.opcode == "bitcast":
        each = local[each.operands[0]]
    if each.opcode == "fusion" and len(each.arrays) == 1:
        called = each.required("calls")
        return _written(module, module.root(called), called)
    if each.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in local[each.operands[1]].arrays)
    if each.opcode == "parameter" or _goes_on(module, each, within):
        return 0
    return sum(array.bytes for array in each.arrays)


def _goes_on(module: Module, each: Instruction, within: str) -> bool:
    """Whether it continues a transfer that another fusion began, and moves nothing itself."""
    if each.quoted("custom_call_target") == _ENDS:
        return True
    return each.opcode in KINDS and not _begins(module, each, within)
