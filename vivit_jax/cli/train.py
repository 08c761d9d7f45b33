# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax pretrain` and `vivit-jax finetune`: run a recipe."""

import contextlib
import dataclasses
import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
from tyro.constructors import PrimitiveConstructorSpec

from vivit_jax.cli.model import best_of_run
from vivit_jax.cli.options import ONE_PROCESS, ProcessOptions, validation_share
from vivit_jax.cli.suggest import Clips, comparison, suggested_recipe
from vivit_jax.console import FLAT, KeyValues, PlaceOption, offers, stopped_by
from vivit_jax.errors import UserError
from vivit_jax.files.addresses import Address
from vivit_jax.files.json_files import read_json
from vivit_jax.recipes import apply_settings, from_dict, recipe_named
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.recipes.settings import fields_like
from vivit_jax.train.loop import train
from vivit_jax.train.profile import Profile
from vivit_jax.train.sharding import parse_mesh
from vivit_jax.train.storage.run_directory import HELD_OUT_LIST, RunDirectory, resumes, saved_recipe
from vivit_jax.train.storage.run_store import check_new


def _resume(given: list[str]) -> bool | int | str:
    """The value of --resume: a step, auto, or nothing."""
    if not given:
        return True
    if len(given) == 1 and (given[0] == "auto" or given[0].isdecimal()):
        return given[0] if given[0] == "auto" else int(given[0])
    raise ValueError(f"expected a step, such as 1200, auto, or nothing; got {' '.join(given)}")


_RESUME = PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="[STEP|auto]",
    instance_from_str=_resume,
    is_instance=lambda value: isinstance(value, bool | int | str),
    str_from_instance=lambda value: [] if isinstance(value, bool) else [str(value)],
)


def _as_setting(option: str, value: str) -> list[str]:
    """The fields of a recipe that an option may mean, as they are set."""
    name = option.replace("-", "_")
    return [f"--set {field}={shlex.quote(value or 'VALUE')}" for field in fields_like(name)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The flags of both commands.

    Attributes:
        out: Directory to write: new or empty, or with --resume one that holds a run; here, or at
            gs:// or s3://.
        recipe: A name of `vivit-jax recipes`, or a recipe.json of a run. Default with --resume:
            the run's own; to fine-tune, settings that suit --data, --start and this machine.
        data: Clips to train on, as --set data.train=...: a list file with a path (to
            fine-tune also a label) in each line or in columns, or a directory, to fine-tune with a
            folder for each class.
        start: Weights to start from, as --set model.start=..., or a run, for its best model: the
            same kind of model, or a ViViT of other sizes; to fine-tune also a masked autoencoder
            or, for a ViViT, an image ViT.
            Frames are prepared as the processor beside the weights says, unless --set changes it.
        validation: Held-out clips, as --set data.validation=...: a list file or directory of their
            own; or the share of each class of --data to hold out, such as 0.2; or none, as 0.
            Default: the recipe's; without one, the validation clips of --data with splits (rows of
            a list, or folders train and val), else 0.2.
        set: Fields of the recipe to change, such as optim.lr=1e-4; may be repeated. `vivit-jax
            recipes NAME` shows all fields.
        mesh: Sizes of the mesh of devices, such as data=4,fsdp=2,tensor=1. Default: all along data.
        resume: Continue the run in --out from its latest undamaged checkpoint, or from that of
            STEP, replacing later ones. With auto begin it, if --out holds none: for jobs that a
            cluster stops and starts again.
        profile: Steps to trace with jax.profiler, the first and the last, such as 10:15, into
            profile/ in --out.
        tensorboard: Write TensorBoard files too (needs the extra tensorboard).
    """

    out: PlaceOption
    recipe: str | None = None
    data: str | None = None
    start: str | None = None
    validation: str | None = None
    set: KeyValues = ()
    mesh: str | None = None
    resume: Annotated[bool | int | str, _RESUME] = False
    profile: str | None = None
    tensorboard: bool = False
    processes: Annotated[ProcessOptions, FLAT] = ONE_PROCESS


Options = Annotated[RunOptions, FLAT]


@offers(_as_setting)
def pretrain(options: Options) -> int:
    """Train a masked autoencoder on clips without labels.

    This runs one of the published recipes. Ctrl-C and SIGTERM end the run after the current step or
    validation, with a checkpoint, and a second one at once; the exit status is 130 or 143, and
    --resume continues the run. For several processes, start each with --coordinator, --processes
    and its own --process, or in a cluster's job with --processes auto. If one dies or hangs, the
    others end too, and say which it was.
    """
    return _run("pretrain", options)


@offers(_as_setting)
def finetune(options: Options) -> int:
    """Train a classifier, by settings that suit your clips or by a published recipe.

    Without --recipe, settings are chosen for --data, --start and this machine, and printed with
    their reasons; the run's recipe.json has them. --set changes single ones.

    Ctrl-C and SIGTERM end the run after the current step or validation, with a checkpoint, and a
    second one at once; the exit status is 130 or 143, and --resume continues the run. For several
    processes, start each with --coordinator, --processes and its own --process, or in a cluster's
    job with --processes auto. If one dies or hangs, the others end too, and say which it was.
    """
    return _run("finetune", options)


def _run(task: str, options: RunOptions) -> int:
    # When a save fails, Orbax's threads log stack traces; the next step reports the error.
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    out, traced = options.out, options.profile
    if traced is not None and isinstance(out, Address):
        raise UserError(
            f"--profile writes to --out, and {out} is not on this machine; leave it out"
        )
    profile = None if traced is None else Profile.of_steps(traced, Path(out) / "profile")
    step = None if isinstance(options.resume, bool | str) else options.resume
    with options.processes.connected(), _late_answers_dropped():
        first = jax.process_index() == 0
        sizes = parse_mesh(options.mesh, jax.device_count())
        resume = step is not None or resumes(out, options.resume)
        recipe, (dataset, validation) = _recipe(task, options, sizes, resume)
        outcome = train(
            recipe,
            out,
            dataset=dataset,
            validation=validation,
            resume=resume,
            resume_step=step,
            mesh_sizes=sizes,
            tensorboard=options.tensorboard,
            profile=profile,
        )
    status = stopped_by(outcome.stopped) if outcome.stopped else 0
    if not first:
        return status
    if outcome.stopped:
        print(
            f"stopped by {outcome.stopped} after step {outcome.step}; go on with\n"
            f"  vivit-jax {task} --out {shlex.quote(str(out))} --resume"
        )
    else:
        last = outcome.model.name == str(outcome.step)
        which = "model" if last else "the best model on the held-out clips"
        done = f"step {outcome.step} done"
        if outcome.stop_reason is not None:
            done += f" of {outcome.steps}: {outcome.stop_reason}"
        print(f"{done}; {which} in {outcome.model}, curves in {out}/report.html")
        local = isinstance(out, Path)
        if local and options.recipe is None and not resume and (out / HELD_OUT_LIST).exists():
            for line in comparison(out, recipe):
                print(line)
    return status


def _recipe(
    task: str, options: RunOptions, sizes: dict[str, int], resume: bool
) -> tuple[Recipe, Clips]:
    """The recipe that is named, resumed or chosen, with the fields that are set.

    With the clips, where they were listed to choose it.
    """
    named, given = options.recipe, _given(options)
    if named is None and not resume:
        return _chosen(task, options, sizes, given)
    if named is None:
        recipe = saved_recipe(options.out)
    elif named.endswith(".json"):
        recipe = from_dict(read_json(named, hint="name a recipe.json as a run writes it"))
    else:
        recipe = recipe_named(named)
    if recipe.task != task:
        raise UserError(f"{recipe.name} is a recipe to {recipe.task}; use vivit-jax {recipe.task}")
    return apply_settings(recipe, given, agree=False), (None, None)


def _chosen(
    task: str, options: RunOptions, sizes: dict[str, int], given: Sequence[str]
) -> tuple[Recipe, Clips]:
    """A recipe that suits the clips, the start and the machine, and the clips; says why."""
    if task != "finetune":
        raise UserError("--recipe is missing; `vivit-jax recipes` lists the names")
    values = dict(each.split("=", 1) for each in given if "=" in each)
    missing = [
        f"{flag} ({what})"
        for flag, name, what in (
            ("--data", "data.train", "your clips"),
            ("--start", "model.start", "the weights to fine-tune, such as MCG-NJU/videomae-base"),
        )
        if not values.get(name)
    ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing, to choose settings for; or name a --recipe: "
            "`vivit-jax recipes` lists them"
        )
    # Before the clips are opened.
    if isinstance(options.out, Address):
        check_new(options.out, resume=False)
    else:
        RunDirectory(options.out, recipe_named("demo-finetune"), resume=False).close()
    say = print if jax.process_index() == 0 else lambda text: None
    return suggested_recipe(values["data.train"], values["model.start"], sizes, given, say)


def _given(options: RunOptions) -> list[str]:
    """The fields that are set; a later --set replaces what an earlier one says of a field."""
    given: dict[str, str] = {}
    for together in options.set:
        names = [each.partition("=")[0].strip() for each in together]
        given = {name: text for name, text in given.items() if name not in names}
        for place, (name, text) in enumerate(zip(names, together, strict=True)):
            # One that is repeated within a --set is refused by `apply_settings`.
            given[name if names.index(name) == place else f"{name} again"] = text
    found = [*given.values()]
    start = None if options.start is None else best_of_run(options.start, "--start")
    for name, value in (("data.train", options.data), ("model.start", start)):
        found += [f"{name}={value}"] if value is not None else []
    return found + _validation(options.validation)


def _validation(value: str | None) -> list[str]:
    """--validation as settings: a share, clips or none."""
    if value is None:
        return []
    share = validation_share(value)
    if share is None:
        return [f"data.validation={value}", "data.hold_out=none"]
    return [f"data.hold_out={value if share else 'none'}", "data.validation=none"]


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
