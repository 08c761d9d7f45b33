# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax plan`: a recipe's training step, compiled for absent hardware."""

import contextlib
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro

from vivit_jax.benchmark.loader import many_names, measure_loader
from vivit_jax.benchmark.made_video import Video, write_video
from vivit_jax.benchmark.measure import cpu_name
from vivit_jax.console import KeyValues, in_order
from vivit_jax.errors import UserError, printable
from vivit_jax.files.atomic import check_output, whole_file, write_json
from vivit_jax.processes import Apart, Ended
from vivit_jax.progress import LiveLine
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.train.planning.hardware import parse_topology
from vivit_jax.train.planning.meshes import sensible_meshes
from vivit_jax.train.planning.plan import plan as compile_plan
from vivit_jax.train.planning.plan_text import describe, ranking
from vivit_jax.train.sharding import mesh_text, parse_mesh

_BATCH, _ROUNDS = 4, 4  # of the timed loader
_MOST = 4  # meshes that a search compiles
_TICK = 1.0  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The recipe and the hardware to plan for.

    Attributes:
        recipe: A name of `vivit-jax recipes`. Its model starts from scratch, and no data are read.
        topology: The devices: v4:4x4x4, v5e:8x8, v5p:4x4x4, v6e:4x4 or any slice of these TPUs
            (extra plan), or a number of GPUs, a100:8, h100:8, h200:8 (extra cuda).
        mesh: Sizes of the mesh, such as data=16,fsdp=4. Default: all devices along data.
        search: Compile the most promising meshes and rank them, instead of one.
        most: For --search, the most meshes to compile, 4 by default.
        set: Fields of the recipe to change, such as model.config.dtype=bfloat16; may be repeated.
        slices: Number of slices of this topology, joined by a network whose time is not estimated.
        clips: Number of videos, for the days that a run takes. Default: that of the data set that
            the recipe is published for.
        top: How many of the costliest operations to list.
        decode: Time how fast this machine reads clips, to estimate the cores that a host needs.
        json: Also write the figures to this file; with --search, of all meshes.
        hlo: Also write the compiled program's text to this file.
        overwrite: Replace the files of --json and --hlo.
    """

    recipe: str
    topology: str
    mesh: str | None = None
    search: bool = False
    most: int | None = None
    set: KeyValues = ()
    slices: int = 1
    clips: int | None = None
    top: int = 20
    decode: bool = True
    json: Path | None = None
    hlo: Path | None = None
    overwrite: bool = False


def plan(options: Annotated[PlanOptions, tyro.conf.arg(name="")]) -> int:
    """Plan a training step for TPUs or GPUs that are not there.

    Compiles the step of a recipe, and prints memory, arithmetic, time by part of the model,
    collectives, step time, days, and how many clips each host has to decode. Everything is an
    estimate: nothing is run or allocated, and this machine's accelerator is not used. Takes minutes
    for a model of size B, on two cores.
    """
    _check_numbers(options)
    for path, suffixes, flag in (
        (options.json, (".json",), "--json"),
        (options.hlo, (".txt", ".hlo"), "--hlo"),
    ):
        if path is not None:
            check_output(path, suffixes, options.overwrite, flag=flag)
    try:
        with Apart(_planned, ["vivit_jax.train.planning.plan"]) as compiler:
            recipe, plans, refused = _plans(options, compiler)
    except Ended as error:
        print(printable(f"vivit-jax: error: {_compiler_ended(error)}"), file=sys.stderr)
        return 1

    if options.search:
        print(ranking(plans, refused) + "\n")
    best = plans[0]
    print(describe(best, options.top))
    if options.hlo is not None:
        with whole_file(options.hlo) as partial:
            partial.write_text(best.text, encoding="utf-8")
    reading = _reading(recipe, best, options.decode)
    print(_hosts_text(best, reading))
    if options.json is not None:
        values = best.to_dict() | {"reading": reading}
        if options.search:
            values["search"] = [each.to_dict() | {"operations": []} for each in plans]
            values["refused"] = refused
        write_json(options.json, values)
    return 0


def _check_numbers(options: PlanOptions) -> None:
    for name, least in (("most", 1), ("clips", 1), ("top", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if options.search and options.mesh is not None:
        raise UserError(f"--mesh {options.mesh} names one mesh, --search tries several: drop one")
    if options.most is not None and not options.search:
        raise UserError("--most: only for --search")


def _plans(options: PlanOptions, compiler: Apart):
    """The recipe, its plans, fastest first, and the reasons against other meshes."""
    recipe = apply_settings(recipe_named(options.recipe), in_order(options.set))
    topology = parse_topology(options.topology, options.slices)
    what = recipe, topology, options.clips
    if not options.search:
        return recipe, [_compiled(compiler, what, parse_mesh(options.mesh, topology.count))], {}
    meshes, refused = sensible_meshes(*what)
    most, plans, last = options.most or _MOST, [], None
    for number, sizes in enumerate(meshes[:most], 1):
        try:
            plans.append(_compiled(compiler, what, sizes, number, len(meshes[:most])))
        except (UserError, Ended) as error:
            reason = _compiler_ended(error) if isinstance(error, Ended) else str(error)
            refused[mesh_text(sizes)], last = reason, error
    if not plans:
        assert last is not None, "there is at least one mesh"
        raise last
    for sizes in meshes[most:]:
        refused[mesh_text(sizes)] = "not compiled; --most compiles more"
    return recipe, sorted(plans, key=lambda each: each.step_seconds), refused


def _compiled(compiler: Apart, what, sizes, number: int = 1, total: int = 1):
    """One plan; a live line shows how long it has been compiling."""
    recipe, topology, videos = what
    name, start = f"compiling for {topology}, {mesh_text(sizes)}", time.monotonic()
    compiler.begin(recipe, topology, sizes, videos)
    with contextlib.closing(LiveLine(name, total, ends=False)) as line:
        while not compiler.done(_TICK):
            line.update(number - 1, f"for {time.monotonic() - start:.0f} s")
    return compiler.result()


def _planned(recipe, topology, sizes, videos):
    """A plan; runs in the process that compiles."""
    return compile_plan(recipe, topology, sizes, videos=videos)


def _compiler_ended(error: Ended) -> str:
    """One line on a compiler that ended its process, with the way out."""
    if error.signal == "SIGKILL":
        return (
            "the compiler's process was killed, as Linux does when memory runs out, and the plan "
            "is lost; close other programs, or plan on a machine with more memory"
        )
    return (
        f"the compiler ended its process ({error.signal}: an error of its own, not of the recipe), "
        "and the plan is lost; run it again, where the stack has a hard limit without one (ulimit "
        "-Hs), and else change what is compiled: another --mesh, or --set model.config.remat=block"
    )


def _reading(recipe, found, decode: bool) -> dict | None:
    """The cost of reading a video here, by the training loader; None if it is not timed."""
    if not decode:
        return None
    video = Video(minutes=1 / 6, width=340, height=256)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "made.mp4"
        write_video(path, video)
        rate = measure_loader(
            many_names(path), recipe, batch=_BATCH, threads=1, workers=0, rounds=_ROUNDS
        )
    seconds = rate.cpu_per_clip * recipe.data.repeats  # all repeats of a video
    return {
        "cpu_seconds_of_a_video": seconds,
        "cpu": cpu_name(),
        "video": dataclasses.asdict(video),
        "cores_of_a_host": seconds * found.host_videos_per_second,
    }


def _hosts_text(found, reading: dict | None) -> str:
    hosts = found.topology.hosts
    who = "the host" if hosts == 1 else f"each of {hosts} hosts"
    most = "at most " if found.topology.chip.platform == "gpu" else ""
    line = f"{who} reads {most}{found.host_videos_per_second:.1f} videos/s"
    if reading is None:
        return line
    made = reading["video"]
    return (
        f"{line}: {reading['cores_of_a_host']:.1f} cores at "
        f"{1e3 * reading['cpu_seconds_of_a_video']:.0f} ms of CPU for each, as measured here "
        f"({reading['cpu']}) by the recipe's loader on a made video of "
        f"{made['minutes'] * 60:.0f} s, {made['width']}x{made['height']}"
    )
