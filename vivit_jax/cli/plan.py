# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax plan`: a recipe's training step, compiled for hardware that is not there."""

import concurrent.futures
import contextlib
import dataclasses
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import tyro

from checkpoints_convert.settings import KeyValues, in_order
from vivit_jax.errors import UserError

_BATCH, _ROUNDS = 4, 4  # of the loader that is timed
_TICK = 1.0  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned for what.

    Attributes:
        recipe: A name of `vivit-jax recipes`. Its model starts from nothing, and no data are read.
        topology: The devices: v4:4x4x4, v5e:8x8, v5p:4x4x4, v6e:4x4 or any slice of these TPUs
            (extra plan), or a number of GPUs, a100:8, h100:8, h200:8 (extra cuda).
        mesh: Sizes of the mesh, such as data=16,fsdp=4. Default: all along data.
        search: Compile the most promising meshes and rank them, instead of one.
        most: For --search, how many are compiled, 4 by default.
        set: Fields of the recipe to change, such as model.config.dtype=bfloat16; may be repeated.
        slices: So many of the topology, joined by a network, whose time is not estimated.
        clips: Videos of the data, for the days that a run takes. Default: those of the data that
            the recipe is published for.
        top: How many of the costliest operations to list.
        decode: Time this machine's reading of clips, for the cores that a host needs.
        json: Also write the figures to this file; with --search those of all meshes.
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
    """Compile a recipe's training step for TPUs or GPUs that are not there, and say what it takes.

    Memory, arithmetic, time by part of the model, collectives, step time, days, and how many clips
    each host has to decode. Everything is an estimate: nothing is run, nothing is allocated, and
    this machine's accelerator is left alone. Minutes for a model of size B, on two cores.
    """
    from vivit_jax.files import check_output, whole_file, write_json

    _check_numbers(options)
    for path, suffixes, flag in (
        (options.json, (".json",), "--json"),
        (options.hlo, (".txt", ".hlo"), "--hlo"),
    ):
        if path is not None:
            check_output(path, suffixes, options.overwrite, flag=flag)
    from vivit_jax.recipes import apply_settings, recipe_named
    from vivit_jax.train.hardware import parse_topology
    from vivit_jax.train.plan_text import describe, ranking
    from vivit_jax.train.sharding import parse_mesh

    recipe = apply_settings(recipe_named(options.recipe), in_order(options.set))
    topology = parse_topology(options.topology, options.slices)
    refused: dict[str, str] = {}
    if options.search:
        plans, refused = _search(recipe, topology, options)
        print(ranking(plans, refused) + "\n")
    else:
        plans = [_compiled(recipe, topology, parse_mesh(options.mesh, topology.count), options)]
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
    return 0 if best.fits else 1


def _check_numbers(options: PlanOptions) -> None:
    for name, least in (("most", 1), ("clips", 1), ("top", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}")
    if options.search and options.mesh is not None:
        raise UserError(f"--mesh {options.mesh} names one mesh, --search tries several: drop one")
    if options.most is not None and not options.search:
        raise UserError("--most: only for --search")


def _search(recipe, topology, options: PlanOptions):
    """Compiled plans, the fastest first, and why other meshes are out."""
    from vivit_jax.train.meshes import sensible_meshes
    from vivit_jax.train.plan_text import mesh_text

    meshes, refused = sensible_meshes(recipe, topology, options.clips)
    most, plans, last = options.most or 4, [], None
    for number, sizes in enumerate(meshes[:most], 1):
        try:
            plans.append(_compiled(recipe, topology, sizes, options, number, len(meshes[:most])))
        except UserError as error:
            refused[mesh_text(sizes)], last = str(error), error
    if not plans:
        raise last
    for sizes in meshes[most:]:
        refused[mesh_text(sizes)] = "not compiled; --most compiles more"
    return sorted(plans, key=lambda each: each.step_seconds), refused


def _compiled(recipe, topology, sizes, options: PlanOptions, number: int = 1, total: int = 1):
    """One plan, with a line that tells for how long it has been compiled.

    A compiler keeps its thread until it is done, so it gets one of its own: Ctrl-C ends the command
    at once.
    """
    from vivit_jax.progress import LiveLine
    from vivit_jax.train.plan import plan as compile_plan
    from vivit_jax.train.plan_text import mesh_text

    found, compiling = concurrent.futures.Future(), threading.Event()

    def work():
        try:
            found.set_result(
                compile_plan(
                    recipe,
                    topology,
                    sizes,
                    videos=options.clips,
                    before_compiling=compiling.set,
                )
            )
        except BaseException as error:
            found.set_exception(error)
        finally:
            compiling.set()

    threading.Thread(target=work, name="compiling", daemon=True).start()
    compiling.wait()
    name, start = f"compiling for {topology}, {mesh_text(sizes)}", time.monotonic()
    with contextlib.closing(LiveLine(name, total, ends=False)) as line:
        while not concurrent.futures.wait([found], _TICK).done:
            line.update(number - 1, f"for {time.monotonic() - start:.0f} s")
    return found.result()


def _reading(recipe, found, decode: bool) -> dict | None:
    """What reading a clip takes here, by the loader that trains: None where it is not timed."""
    if not decode:
        return None
    from vivit_jax.benchmark.environment import cpu_name
    from vivit_jax.benchmark.input import Video, write_video
    from vivit_jax.benchmark.loader import many_names, measure_loader

    video = Video(minutes=1 / 6, width=340, height=256)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "made.mp4"
        write_video(path, video)
        rate = measure_loader(
            many_names(path), recipe, batch=_BATCH, threads=1, workers=0, rounds=_ROUNDS
        )
    seconds = rate.cpu_per_clip * recipe.data.repeats  # of a video, all its repeats
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
