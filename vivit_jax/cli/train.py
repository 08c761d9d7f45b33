# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax pretrain` and `vivit-jax finetune`: run a recipe."""

import contextlib
import dataclasses
import logging
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
from tyro.constructors import PrimitiveConstructorSpec

from vivit_jax.cli.options import ONE_PROCESS, ProcessOptions
from vivit_jax.console import FLAT, KeyValues, in_order, stopped_by
from vivit_jax.errors import UserError
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.train.loop import train
from vivit_jax.train.run_directory import saved_recipe
from vivit_jax.train.sharding import parse_mesh


def _step(given: list[str]) -> bool | int:
    """The value of --resume: a step, or nothing."""
    if not given:
        return True
    if len(given) > 1 or not given[0].isdecimal():
        raise ValueError(f"expected a step, such as 1200, or nothing; got {' '.join(given)}")
    return int(given[0])


_RESUME = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[STEP]",
    instance_from_str=_step,
    is_instance=lambda value: isinstance(value, bool | int),
    str_from_instance=lambda value: [] if isinstance(value, bool) else [str(value)],
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The flags of both commands.

    Attributes:
        out: Directory to write: new or empty, or with --resume one that holds a run.
        recipe: A name of `vivit-jax recipes`. Default with --resume: the run's own.
        data: Clips to train on, as --set data.train=...: a list file with a path (to
            fine-tune also a label) in each line or in columns, or a directory, to fine-tune with a
            folder for each class.
        start: Weights to start from, as --set model.start=...: the same kind of model, or a ViViT
            of other sizes; to fine-tune also a masked autoencoder or, for a ViViT, an image ViT.
            Frames are prepared as the processor beside the weights says, unless --set changes it.
        set: Fields of the recipe to change, such as optim.lr=1e-4; may be repeated. `vivit-jax
            recipes NAME` shows all fields.
        mesh: Sizes of the mesh of devices, such as data=4,fsdp=2,tensor=1. Default: all along data.
        resume: Continue the run in --out from its latest undamaged checkpoint, or from that of
            STEP, replacing later ones.
        tensorboard: Write TensorBoard files too (needs the extra tensorboard).
    """

    out: Path
    recipe: str | None = None
    data: str | None = None
    start: str | None = None
    set: KeyValues = ()
    mesh: str | None = None
    resume: Annotated[bool | int, _RESUME] = False
    tensorboard: bool = False
    processes: Annotated[ProcessOptions, FLAT] = ONE_PROCESS


Options = Annotated[RunOptions, FLAT]


def pretrain(options: Options) -> int:
    """Train a masked autoencoder on clips without labels.

    This runs one of the published recipes. Ctrl-C and SIGTERM end the run after the current step or
    validation, with a checkpoint, and a second one at once; the exit status is 130 or 143, and
    --resume continues the run. For several processes, start each with --coordinator, --processes
    and its own --process.
    """
    return _run("pretrain", options)


def finetune(options: Options) -> int:
    """Train a classifier by one of the published recipes.

    Ctrl-C and SIGTERM end the run after the current step or validation, with a checkpoint, and a
    second one at once; the exit status is 130 or 143, and --resume continues the run. For several
    processes, start each with --coordinator, --processes and its own --process.
    """
    return _run("finetune", options)


def _run(task: str, options: RunOptions) -> int:
    out, resume = options.out, options.resume is not False
    if options.recipe is None and not resume:
        raise UserError("--recipe is missing; `vivit-jax recipes` lists the names")
    named = options.recipe
    recipe = saved_recipe(out) if named is None else recipe_named(named)
    if recipe.task != task:
        raise UserError(f"{recipe.name} is a recipe to {recipe.task}; use vivit-jax {recipe.task}")
    given = [*in_order(options.set)]
    for name, value in (("data.train", options.data), ("model.start", options.start)):
        given += [f"{name}={value}"] if value is not None else []
    recipe = apply_settings(recipe, given)
    join(options.processes)

    # When a save fails, Orbax's threads log stack traces; the next step reports the error.
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    with _late_answers_dropped():
        outcome = train(
            recipe,
            out,
            resume=resume,
            resume_step=None if isinstance(options.resume, bool) else options.resume,
            mesh_sizes=parse_mesh(options.mesh, jax.device_count()),
            tensorboard=options.tensorboard,
        )
    if options.processes.coordinator is not None:
        jax.distributed.shutdown()  # now: a process that dies of a signal would not
    status = stopped_by(outcome.stopped) if outcome.stopped else 0
    if options.processes.process:
        return status
    if outcome.stopped:
        print(
            f"stopped by {outcome.stopped} after step {outcome.step}; go on with\n"
            f"  vivit-jax {task} --out {shlex.quote(str(out))} --resume"
        )
    else:
        last = outcome.model.name == str(outcome.step)
        which = "model" if last else "the best model on the held-out clips"
        print(f"step {outcome.step} done; {which} in {outcome.model}, curves in {out}/report.html")
    return status


@contextlib.contextmanager
def _late_answers_dropped() -> Iterator[None]:
    """Hide errors of TensorStore's threads after a failed save, when Orbax no longer listens.

    Python would print a stack trace for each of them, before the one line on the failure.
    """
    shown = sys.unraisablehook

    def hook(dropped):
        if str(dropped.exc_value) != "Event loop is closed":
            shown(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = shown


def join(options: ProcessOptions) -> None:
    """Connect this process with the others, if there are several. Raises UserError."""
    processes, process = options.processes, options.process
    if options.coordinator is None:
        if processes != 1 or process != 0:
            raise UserError(
                f"--processes {processes} --process {process} need --coordinator host:port, the "
                "address of process 0"
            )
        return
    if not 0 <= process < processes:
        raise UserError(f"--process {process} must be from 0 to {processes - 1} (--processes)")

    jax.distributed.initialize(options.coordinator, processes, process)
