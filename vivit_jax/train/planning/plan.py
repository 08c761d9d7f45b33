# SPDX-License-Identifier: Apache-2.0
"""A training step compiled for absent hardware: whether it fits, and what it costs.

`plan` compiles what `train` would run, for compile-only devices and with shapes for arrays, and
reads the program. Nothing is run or allocated: every time is an estimate.
"""

import dataclasses
import importlib.metadata
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from vivit_jax.errors import UserError
from vivit_jax.layers.pallas import cycles
from vivit_jax.models.flops import recomputed_flops, step_flops
from vivit_jax.recipes.checks import check
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.train.initial_model import planned_model
from vivit_jax.train.planning.compiled import Collective, Operation, Program, read_program
from vivit_jax.train.planning.hardware import Topology, compile_only_devices
from vivit_jax.train.planning.least_memory import check_least_memory, refused, too_large
from vivit_jax.train.planning.step_parts import PARTS, part_of
from vivit_jax.train.setup import TrainSetup, make_setup
from vivit_jax.train.sharding import bytes_on_a_device, check_mesh, make_mesh
from vivit_jax.train.step import check_division

# Training videos by data set, the end of a recipe's name; the counts of the authors' lists.
VIDEOS = {
    "kinetics400": 240_436,
    "kinetics600": 366_006,
    "kinetics710": 658_340,
    "ssv2": 168_913,
    "epic-kitchens": 67_217,
    "ucf101": 9_537,
    "hmdb51": 3_570,
    "hybrid": 1_350_000,
}
_COMPILERS = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}
_NO_TILES = "find output tile sizes"
# Cycles of the attention kernels on a core, forward and backward, relative to v5e.
_OF_V5E = {"v4": (1.55, 1.32), "v5e": (1.0, 1.0), "v5p": (1.0, 1.0), "v6e": (0.7, 0.63)}
_PALLAS = "tpu_custom_call"
_ANY_STEPS = 1000  # in an epoch of unknown length


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
    beside_seconds: float  # of `seconds`, how many other operations may overlap


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of a recipe costs on one device of a topology; all of it is estimated.

    Sizes are bytes per device, times are seconds per step.
    """

    recipe: str
    topology: Topology
    mesh: Mapping[str, int]
    clips: int  # on all devices, counting repeats
    videos: int  # on all devices, without repeats
    versions: Mapping[str, str]  # of jax and of the compiler
    compile_seconds: float
    # Memory. `peak` is what the compiler checks: all buffers and the program together.
    peak: int
    parameters: int
    optimizer: int
    arguments: int
    temporaries: int
    # Matrix products on one device; `flops` does not include `recomputed`.
    flops: int
    recomputed: int
    cycles: int  # estimated, of all operations except kernels; 0 on GPU
    kernels: Mapping[str, int]  # calls by name; on GPU all custom calls by target
    kernel_seconds: float  # of Pallas kernels, see `kernel_seconds`
    uncounted_kernels: int  # Pallas calls without a cost estimate
    parts: tuple[Part, ...]
    moved: tuple[Moved, ...]
    network_bytes: int  # sent to other slices; not among `moved`
    bytes: int  # main memory traffic
    unknown_loops: int  # loops with an unknown number of rounds, which count once
    operations: tuple[Operation, ...]  # costliest first
    epochs: int
    epoch_videos: int | None  # None if the recipe's data set is not known
    text: str = dataclasses.field(repr=False, compare=False)  # of the compiled program

    @property
    def compute_seconds(self) -> float:
        """Estimated cycles at the nominal clock; on GPU a roofline of products and traffic."""
        chip = self.topology.chip
        if chip.platform == "gpu":
            done = self.flops + self.recomputed
            return max(done / chip.flops, self.bytes / chip.bandwidth)
        return self.cycles / chip.clock

    @property
    def waiting_seconds(self) -> float:
        """The exposed time of collectives.

        Those that nothing overlaps, and the part of the others that exceeds all computing.
        """
        known = [
            (each.seconds, each.beside_seconds) for each in self.moved if each.seconds is not None
        ]
        beside = sum(overlapped for _, overlapped in known)
        alone = sum(seconds for seconds, _ in known) - beside
        return alone + max(0.0, beside - self.compute_seconds - self.kernel_seconds)

    @property
    def step_seconds(self) -> float:
        """compute + kernels + waiting."""
        return self.compute_seconds + self.kernel_seconds + self.waiting_seconds

    @property
    def clips_per_second(self) -> float:
        """On all devices together, counting repeats."""
        return self.clips / self.step_seconds

    @property
    def host_videos_per_second(self) -> float:
        """How many videos each machine must read and decode."""
        return self.videos / self.step_seconds / self.topology.hosts

    @property
    def utilization(self) -> float:
        """MFU: the model's products, without recomputed ones, over the chip's peak."""
        return self.flops / self.topology.chip.flops / self.step_seconds

    @property
    def days(self) -> float | None:
        """The duration of all epochs; None if the number of videos is not known."""
        if self.epoch_videos is None:
            return None
        steps = self.epochs * (self.epoch_videos // self.videos)
        return steps * self.step_seconds / 86400

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the program's text."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("text", "topology", "operations", "parts", "moved")
        }
        for name in ("parts", "moved"):
            values[name] = [dataclasses.asdict(each) for each in getattr(self, name)]
        values["operations"] = [
            {
                name: getattr(each, name)
                for name in ("name", "opcode", "op_name", "bytes", "cycles", "flops", "times")
            }
            | {"part": part_of(each.op_name)}
            for each in self.operations
        ]
        chip = dataclasses.asdict(self.topology.chip)
        del chip["config"]
        derived = (
            "compute_seconds", "waiting_seconds", "step_seconds", "clips_per_second",
            "host_videos_per_second", "utilization", "days",
        )  # fmt: skip
        return {
            "estimate": "nothing was run",
            "topology": str(self.topology),
            "devices": self.topology.count,
            "hosts": self.topology.hosts,
            "chip": chip,
            **values,
            **{name: getattr(self, name) for name in derived},
        }


def plan(
    recipe: Recipe,
    topology: Topology,
    mesh_sizes: Mapping[str, int],
    *,
    videos: int | None = None,
    before_compiling: Callable[[], None] = lambda: None,
) -> Plan:
    """Compile the recipe's training step for a topology and read what it costs.

    `mesh_sizes` are those of `vivit_jax.train.sharding.parse_mesh` for `topology.count` devices.
    `videos` is the size of the data set, by default that of `VIDEOS`. The model is the recipe's,
    without a start; `data.train` is not read. `before_compiling` is called after the quick checks.

    Raises UserError for what `train` would refuse, for a mesh that does not divide the batch, a
    parameter or the machines, and, with what would fit, for a step that needs too much memory
    (before minutes of compiling if state, gradients and batch alone do). Any other refusal of a
    compiler is a one-line UserError too. libtpu may end the process on some programs; to survive
    that, call this through `vivit_jax.processes.Apart`.
    """
    setup = planned_setup(recipe, topology, mesh_sizes, videos)
    check_least_memory(setup, topology)
    before_compiling()
    start = time.monotonic()
    try:
        compiled = _compiled(setup.step.lower(setup.shapes, setup.batch_shapes))
    except jax.errors.JaxRuntimeError as error:
        raise refused(error, setup, topology) from error
    seconds = time.monotonic() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None  # as they are on these platforms
    peak, there = memory.peak_memory_in_bytes, topology.chip.memory
    if peak > there:  # compilers for GPUs only warn
        raise too_large(setup, topology, peak, there)
    program = read_program(text, setup.mesh)
    config, head = setup.model.config, HEADS[setup.recipe.task]
    counts = setup.token_counts
    on_one = setup.rows / topology.count
    kernels, uncounted = _kernels(program)
    return Plan(
        recipe=recipe.name,
        topology=topology,
        mesh=dict(mesh_sizes),
        clips=setup.rows,
        videos=recipe.train.batch_size,
        versions=_versions(topology),
        compile_seconds=seconds,
        peak=peak,
        parameters=bytes_on_a_device(setup.shapes.params),
        optimizer=bytes_on_a_device(setup.shapes.optimizer),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=round(step_flops(config, head, *counts) * on_one),
        recomputed=round(recomputed_flops(config, head, *counts) * on_one),
        cycles=program.cycles,
        kernels=kernels,
        kernel_seconds=sum(kernel_seconds(each, topology) for each in program.operations),
        uncounted_kernels=uncounted,
        parts=_parts(program, topology),
        moved=_moved(program, setup.mesh, topology),
        network_bytes=_sent_to_slices(program),
        bytes=program.bytes,
        unknown_loops=sum(loop.trips is None and loop.times > 0 for loop in program.loops),
        operations=_costliest(program, topology),
        epochs=recipe.train.epochs,
        epoch_videos=videos or training_videos(recipe.name),
        text=text,
    )


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    with warnings.catch_warnings():
        # Programs for absent devices cannot be cached.
        warnings.filterwarnings("ignore", "Error .* persistent compilation cache")
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if _NO_TILES not in str(error):
                raise
            # Without a GPU to tune tiles on, XLA's Triton products fail for some odd shapes.
            return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def planned_setup(
    recipe: Recipe, topology: Topology, mesh_sizes: Mapping[str, int], videos: int | None = None
) -> TrainSetup:
    """What `train` would run, on a mesh of compile-only devices. Takes a second or two."""
    check(recipe)
    if recipe.model.start is not None:
        raise UserError(
            f"model.start is {recipe.model.start!r}, and a plan opens no weights: leave it out and "
            "set the fields in which that model differs by model.config"
        )
    # Checked before making devices, which takes minutes for many slices.
    check_mesh(mesh_sizes, topology.hosts, topology.slices)
    check_division(recipe, mesh_sizes)
    count = videos or training_videos(recipe.name)
    per_epoch = _ANY_STEPS if count is None else count // recipe.train.batch_size
    if not per_epoch:
        raise UserError(
            f"train.batch_size {recipe.train.batch_size} is more than the {count} videos of the "
            "data; use a smaller one"
        )
    mesh = make_mesh(mesh_sizes, compile_only_devices(topology))
    model, frames = planned_model(recipe)
    return make_setup(frames.recipe, mesh, model, frames.processor, per_epoch)


def training_videos(name: str) -> int | None:
    """The number of training videos of a recipe's data set, by its name; None if not known."""
    last = max(VIDEOS, key=name.rfind)
    return VIDEOS[last] if last in name else None


def _versions(topology: Topology) -> dict[str, str]:
    compiler = _COMPILERS[topology.chip.platform]
    return {name: importlib.metadata.version(name) for name in ("jax", compiler)}


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


def _kernels(program: Program) -> tuple[dict[str, int], int]:
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


def _parts(program: Program, topology: Topology) -> tuple[Part, ...]:
    seconds, moved = defaultdict(float), defaultdict(int)
    for each in program.operations:
        part = part_of(each.op_name)
        seconds[part] += operation_seconds(each, topology)
        moved[part] += each.bytes * each.times
    return tuple(Part(name, seconds[name], moved[name]) for name in PARTS if name in moved)


def _costliest(program: Program, topology: Topology) -> tuple[Operation, ...]:
    def cost(each: Operation):
        return operation_seconds(each, topology), each.bytes * each.times

    return tuple(sorted(program.operations, key=cost, reverse=True))


def _moved(program: Program, mesh: Mesh, topology: Topology) -> tuple[Moved, ...]:
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


def _sent_to_slices(program: Program) -> int:
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
