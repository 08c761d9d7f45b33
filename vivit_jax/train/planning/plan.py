# SPDX-License-Identifier: Apache-2.0
"""A training step compiled for absent hardware: whether it fits, and what it costs.

`plan` compiles what `train` would run, for compile-only devices and with shapes for arrays, and
reads the program. Nothing is run or allocated: every time is an estimate.
"""

import dataclasses
import importlib.metadata
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vivit_jax.errors import UserError, counted
from vivit_jax.models.flops import recomputed_flops
from vivit_jax.recipes.checks import check
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.train.planning import step_costs
from vivit_jax.train.planning.compiled import Operation, read_program
from vivit_jax.train.planning.hardware import Topology, compile_only_devices
from vivit_jax.train.planning.least_memory import check_least_memory, refused, too_large
from vivit_jax.train.planning.step_costs import Moved, Part
from vivit_jax.train.planning.step_parts import part_of
from vivit_jax.train.setup import TrainSetup, make_setup
from vivit_jax.train.sharding import bytes_on_a_device, check_mesh, make_mesh
from vivit_jax.train.start.initial_model import planned_model
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
_ANY_STEPS = 1000  # in an epoch of unknown length


@dataclasses.dataclass(frozen=True)
class Plan:
    """The estimated cost of a recipe's step on one device of a topology.

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

        Collectives that nothing overlaps, and the part of the others that outlasts all computing.
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
    on_one = setup.clips / topology.count
    assert setup.flops is not None  # a recipe's model is of a family
    kernels, uncounted = step_costs.kernels(program)
    return Plan(
        recipe=recipe.name,
        topology=topology,
        mesh=dict(mesh_sizes),
        clips=setup.clips,
        videos=recipe.train.batch_size,
        versions=_versions(topology),
        compile_seconds=seconds,
        peak=peak,
        parameters=bytes_on_a_device(setup.shapes.params),
        optimizer=bytes_on_a_device(setup.shapes.optimizer),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=round(setup.flops),
        recomputed=round(recomputed_flops(config, head, *counts) * on_one),
        cycles=program.cycles,
        kernels=kernels,
        kernel_seconds=sum(
            step_costs.kernel_seconds(each, topology) for each in program.operations
        ),
        uncounted_kernels=uncounted,
        parts=step_costs.parts(program, topology),
        moved=step_costs.moved(program, setup.mesh, topology),
        network_bytes=step_costs.sent_to_slices(program),
        bytes=program.bytes,
        unknown_loops=sum(loop.trips is None and loop.times > 0 for loop in program.loops),
        operations=step_costs.costliest(program, topology),
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
    if count is not None and not per_epoch:
        raise UserError(
            f"train.batch_size {recipe.train.batch_size} is more than the "
            f"{counted(count, 'video')} of the data; use a smaller one"
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
