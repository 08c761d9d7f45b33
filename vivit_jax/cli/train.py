# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax pretrain` and `vivit-jax finetune`: a recipe, run into a directory."""

import contextlib
import dataclasses
import logging
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import tyro
from tyro.constructors import PrimitiveConstructorSpec

from vivit_jax.cli.options import ProcessOptions
from vivit_jax.console import KeyValues, in_order, stopped_by
from vivit_jax.errors import UserError
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.train.loop import train
from vivit_jax.train.run_directory import saved_recipe
from vivit_jax.train.sharding import parse_mesh


def _step(given: list[str]) -> bool | int:
    """What follows --resume: a step, or nothing."""
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
class RunOptions(ProcessOptions):
    """What both commands take.

    Attributes:
        out: Directory to write; new or empty, or with --resume one that holds a run.
        recipe: A name of `vivit-jax recipes`. With --resume the run's own, which need not be named.
        data: Clips to train on, as --set data.train=...: a list file with a path in each line, and
            a label to fine-tune, or a directory, to fine-tune with a folder for each class.
        start: Weights to start from, as --set model.start=...: the same kind of model, a ViViT of
            other sizes too, and to fine-tune a masked autoencoder or, for a ViViT, an image ViT.
            Frames are prepared as the processor beside them says, unless --set says otherwise.
        set: Fields of the recipe to change, such as optim.lr=1e-4; may be repeated. `vivit-jax
            recipes NAME` shows all fields.
        mesh: Sizes of the mesh of devices, such as data=4,fsdp=2,tensor=1. Default: all along data.
        resume: Go on with the run in --out, from its latest checkpoint that is not damaged, or from
            that of STEP, which later ones then make room for.
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


Options = Annotated[RunOptions, tyro.conf.arg(name="")]


def pretrain(options: Options) -> int:
    """Train a masked autoencoder without labels, by one of the published recipes.

    Ctrl-C and SIGTERM save and end the run after the step or validation that is under way, a second
    one at once; --resume goes on with it. The status is then 130 or 143. Several processes are
    started alike, each with --coordinator, --processes and its --process.
    """
    return _run("pretrain", options)


def finetune(options: Options) -> int:
    """Train a classifier by one of the published recipes.

    Ctrl-C and SIGTERM save and end the run after the step or validation that is under way, a second
    one at once; --resume goes on with it. The status is then 130 or 143. Several processes are
    started alike, each with --coordinator, --processes and its --process.
    """
    return _run("finetune", options)


def _run(task: str, options: RunOptions) -> int:

    out, resume = options.out, options.resume is not False
    if options.recipe is None and not resume:
        raise UserError("--recipe is missing; `vivit-jax recipes` lists the names")
    named = options.recipe
    recipe = saved_recipe(out) if named is None else recipe_named(named)
    if recipe.task != task:
        raise UserError(f"{recipe.name} is to {recipe.task}; use vivit-jax {recipe.task}")
    given = [*in_order(options.set)]
    for name, value in (("data.train", options.data), ("model.start", options.start)):
        given += [f"{name}={value}"] if value is not None else []
    recipe = apply_settings(recipe, given)
    join(options)

    # Of a save that fails Orbax's threads log stack traces, and the next step of the run the error.
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
    if options.coordinator is not None:
        jax.distributed.shutdown()  # together: what dies of a signal does not at its end
    status = stopped_by(outcome.stopped) if outcome.stopped else 0
    if options.process:
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
    """After a save that failed, TensorStore's threads may answer an Orbax that no longer listens.

    Python would print a stack trace for each answer, before the one line on what went wrong.
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
