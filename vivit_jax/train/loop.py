# SPDX-License-Identifier: Apache-2.0
"""A training run from its first step to its last."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh

from checkpoints_convert.pretrained import save_pretrained
from vivit_jax.data.datasets.dataset import Dataset, read_dataset
from vivit_jax.data.pipeline import Batches, ClipShape, ProcessShard
from vivit_jax.errors import UserError, WriteError
from vivit_jax.recipes.checks import check, model_config
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.checkpoint import Checkpoints
from vivit_jax.train.evaluate import (
    evaluate,
    evaluate_reconstruction,
    model_labels,
    unreadable_clips,
)
from vivit_jax.train.initial_model import Start, described_model, description, starting_model
from vivit_jax.train.log import MetricLog, Progress
from vivit_jax.train.metrics import leading_name
from vivit_jax.train.preprocessing import described_preprocessing
from vivit_jax.train.report import write_report
from vivit_jax.train.run_directory import BAD_CLIPS, RunDirectory
from vivit_jax.train.setup import TrainSetup, make_setup
from vivit_jax.train.sharding import (
    batch_sharding,
    bytes_on_a_device,
    gathered,
    make_mesh,
    mesh_text,
    parse_mesh,
)
from vivit_jax.train.state import TrainState, new_state


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # the last one taken
    steps: int  # of all epochs
    stopped: str | None  # the signal that ended it, None where it came to its end
    model: Path  # the best model's directory; without validation the last one's
    metrics: dict[str, float]  # of the last validation


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    mesh_sizes: dict[str, int] | None = None,
    tensorboard: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run a recipe into the directory `out`, or go on with the run that is there.

    The directory gets recipe.json, model.json, metrics.jsonl, checkpoints/ (all that is needed to
    go on), models/ (the model of each kept checkpoint as a HuggingFace directory, of the average
    where there is one), bad_clips.json where clips could not be read, and report.html. With
    `resume` the run goes on as if it had never stopped, on as many devices or others; on the same
    ones, in as many parts of a step, bit for bit. SIGINT and SIGTERM end a run after the step or
    validation that is under way, with a checkpoint. A run goes on from its latest checkpoint that
    is not damaged, or from that of `resume_step`; later ones are then replaced. `mesh_sizes` are
    those of `vivit_jax.train.sharding.parse_mesh`, by default all devices along "data".

    Raises UserError for what cannot be run, a directory that holds a run without `resume` among it,
    with nothing written, and where steps keep having no finite loss or too many clips cannot be
    read: then the last good state is saved first.
    """
    check(recipe)
    sizes = mesh_sizes or parse_mesh(None, jax.device_count())
    first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        enter = lambda thing: stack.enter_context(contextlib.closing(thing))  # noqa: E731
        run = enter(RunDirectory(Path(out), recipe, resume=resume))
        checkpoints = enter(Checkpoints(run.path, keep=recipe.train.keep))
        if resume_step is not None:
            checkpoints.check_step(resume_step)
        going_on = resume and checkpoints.latest() is not None
        model_file = run.model_file if going_on else None
        setup, batches, start = _prepare(recipe, make_mesh(sizes), model_file)
        enter(batches)
        if start is not None:
            state, taken = _first_state(setup, start.params), 0
        else:
            state, data, taken = checkpoints.restore(setup.shapes, resume_step)
            checkpoints.rewind(taken)
            # A process more than there were is told so by the batches.
            batches.restore(data.get(str(jax.process_index()), data["0"]))
        run.begin(None if start is None else description(start, recipe.task))
        progress = enter(Progress(setup.last, taken, setup.rows, enabled=first_process))
        log = enter(
            MetricLog(
                run.path,
                resume_at=taken if resume else None,
                tensorboard=tensorboard,
                enabled=first_process,
            )
        )
        if first_process:
            say(_summary(setup, batches, run, taken))
        stopped, metrics = _steps(setup, state, taken, batches, run, checkpoints, log, progress)
        checkpoints.wait()
        best = checkpoints.best()
        step = checkpoints.latest()
    if first_process:
        bad = run.bad_clips()
        if bad and step > taken:
            say(f"left out, as they could not be read: {bad}; {run.path / BAD_CLIPS} says why")
        write_report(run.path)
    model = run.path / "models" / str(step if best is None else best)
    return Outcome(step, setup.steps, stopped, model, metrics)


def _prepare(
    recipe: Recipe, mesh: Mesh, model_file: Path | None
) -> tuple[TrainSetup, Batches, Start | None]:
    """The setup, the batches, and what a run starts from, None for one that goes on.

    `model_file` describes the model of a run that goes on. Writes nothing.
    """
    if not recipe.data.train:
        raise UserError("data.train is empty; say where the clips are: --set data.train=list.txt")
    finetune = recipe.task == "finetune"
    heads = len(model_config(recipe).split_sizes) if finetune else 0
    listed = lambda source: read_dataset(  # noqa: E731
        source,
        recipe.data.root,
        labels=heads,
        frame_name=recipe.data.frame_name,
        first_frame=recipe.data.first_frame,
    )
    dataset = listed(recipe.data.train)
    validation = None if recipe.data.validation is None else listed(recipe.data.validation)
    start = None
    if model_file is None:
        classes = dataset.classes if finetune else None
        start = starting_model(recipe, classes, _numbers(dataset, validation))
    model = described_model(model_file) if start is None else start.model
    config = model.config
    frames = (
        described_preprocessing(model_file, recipe, config)
        if start is None
        else start.preprocessing
    )
    recipe, processor = frames.recipe, frames.processor
    if finetune:
        dataset = model_labels(dataset, config)
        validation = None if validation is None else model_labels(validation, config)
    batches = Batches(
        dataset,
        recipe.data,
        recipe.augment,
        shape=ClipShape(config.num_frames, config.frame_size, config.num_channels),
        batch_size=recipe.train.batch_size,
        seed=recipe.train.seed,
        shard=ProcessShard(jax.process_index(), jax.process_count()),
        labelled=finetune,
    )
    per_epoch = batches.sampler.steps_per_epoch
    setup = make_setup(recipe, mesh, model, processor, per_epoch, validation)
    return setup, batches, start


def _numbers(dataset: Dataset, validation: Dataset | None) -> int | None:
    """How many classes there are where each clip's one label is a number, up to the largest.

    None where one number is all that there is, which says nothing of how many there are.
    """
    both = [dataset] if validation is None else [dataset, validation]
    if any(each.classes is not None or each.labels_per_example != 1 for each in both):
        return None
    found = {example.label for each in both for example in each.examples}
    return 1 + max(found) if len(found) > 1 else None


def _steps(
    setup: TrainSetup,
    state: TrainState,
    taken: int,
    batches: Batches,
    run: RunDirectory,
    checkpoints: Checkpoints,
    log: MetricLog,
    progress: Progress,
) -> tuple[str | None, dict[str, float]]:
    """Take the steps after `taken`; what stopped them early, and the last validation's metrics."""
    recipe, per_epoch, last = setup.recipe, setup.per_epoch, setup.last
    clock, metrics, unreadable = _Clock(), {}, None
    position = batches.state()

    def export() -> Callable[[Path], None] | None:
        """What writes the model, in the first process; all have a part in putting it together."""
        params = _whole(state.params if state.average is None else state.average)
        if jax.process_index():
            return None
        return lambda path: save_pretrained(path, setup.model, params, setup.processor)

    def save(scores: dict[str, float] | None = None) -> None:
        data = _of_all_processes(position)
        checkpoints.save(taken, state, data, scores, export())
        run.write_bad_clips(data, unreadable)

    def report(step: int, values: dict[str, jax.Array]) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        (seconds, waited), bad = clock.lap(), int(numbers.pop("bad_steps"))
        rate = dict(clips_per_second=setup.rows / seconds, wait_share=waited / seconds)
        log.write("train", step, numbers | rate)
        progress.update(
            step, loss=numbers["loss"], lr=numbers["lr"], wait_seconds=waited, seconds=seconds
        )
        if not bad:
            return
        what = f"loss {numbers['loss']:g}, gradient norm {numbers['gradient_norm']:g}"
        progress.say(f"step {step}: {what}; this step changed nothing")
        if bad >= recipe.train.max_bad_steps:
            raise UserError(
                f"{bad} steps in a row, up to step {step}, had no finite loss and gradients "
                f"({what}) and changed nothing; the last good state is saved: lower optim.lr, set "
                "optim.clip, or compute in float32"
            )

    def asked() -> str | None:
        """The signal that ends this process, if it need not ask others, without another step."""
        return received[0] if received and jax.process_count() == 1 else None

    if taken and checkpoints.lacks_model(taken):
        checkpoints.write_model(taken, export())
    pending = stopped = None
    bad_reported = bool(batches.bad)
    with _signals() as received:
        try:
            while taken < last and stopped is None:
                batch = failed = None
                try:
                    batch = clock.fetch(batches, pending and pending[1]["loss"])
                except UserError as error:
                    failed = error
                if batches.bad and not bad_reported:
                    bad_reported = True
                    why = next(iter(batches.bad.values()))
                    progress.say(f"left out, as every clip that cannot be read will be: {why}")
                stopped = _agreed(received, failed)
                state, values = setup.step(state, _placed(batch, setup.mesh))
                taken, position = taken + 1, batches.state()
                # One step behind, so that the device has its next step before one is reported.
                previous, pending = pending, (taken, values)
                if previous is not None:
                    report(*previous)
                stopped = stopped or asked()
                epoch, within = divmod(taken, per_epoch)
                ended = taken == last or stopped is not None
                due = taken % (recipe.train.checkpoint_every or per_epoch) == 0
                validate = setup.validation is not None and (
                    taken == last or (not within and epoch % recipe.train.evaluate_every == 0)
                )
                if not (ended or due or validate):
                    continue
                previous, pending = pending, None
                report(*previous)
                with clock.paused():
                    scores = None
                    if validate:
                        metrics, unreadable = _validate(setup, state)
                        scores = _scored(setup, metrics)
                        log.write("evaluate", taken, metrics)
                        text = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
                        progress.say(f"step {taken}, after {taken / per_epoch:g} epochs: {text}")
                    # What was validated too: else the best of them might be lost.
                    save(scores)
                stopped = stopped or asked()
        except WriteError:  # what could not be written now cannot be saved either
            raise
        except UserError:
            # The state is good: steps without finite gradients change nothing.
            if pending is not None:
                with contextlib.suppress(UserError):
                    report(*pending)
            if checkpoints.latest() != taken and taken:
                save()
            raise
        checkpoints.wait()
    return stopped if taken < last else None, metrics


def _first_state(setup: TrainSetup, params: Any) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.shapes)
    averaged = setup.recipe.optim.ema is not None
    place = jax.jit(
        lambda params: new_state(params, setup.optimizer, averaged=averaged),
        out_shardings=shardings,
    )
    return place(jax.device_put(params, shardings.params))


def _summary(setup: TrainSetup, batches: Batches, run: RunDirectory, taken: int) -> str:
    if taken >= setup.last:
        return (
            f"{run.path}: step {taken} is taken and the run ends with step {setup.last} of "
            f"{setup.steps}; nothing is left to do"
        )
    params, kept = (
        bytes_on_a_device(tree) / 2**20 for tree in (setup.shapes.params, setup.shapes.optimizer)
    )
    clips = f"{len(batches.sampler.dataset)} clips"
    if setup.recipe.task == "finetune":  # as many classes as folders name, whatever recipes say
        clips += f" of {setup.model.config.num_labels} classes"
    return (
        f"{type(setup.model).__name__}, {clips}, "
        f"{setup.per_epoch} steps an epoch, steps {taken + 1} to {setup.last} of "
        f"{setup.steps}; mesh {mesh_text(setup.mesh.shape)}; on each device {params:.1f} MiB "
        f"of parameters and {kept:.1f} MiB of optimiser state"
    )


def _validate(setup: TrainSetup, state: TrainState) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics, and which clips could not be read: path -> why."""
    recipe = setup.recipe
    params = state.params if state.average is None else state.average
    one = dataclasses.replace(recipe.evaluation, clips=1, crops=1)
    if setup.model.config.class_splits is not None:
        one = dataclasses.replace(one, average="logits")
    common = dict(mesh=setup.mesh, threads=recipe.data.threads)
    what = (setup.model, params, setup.validation, one)
    if recipe.task == "pretrain":
        found = evaluate_reconstruction(*what, recipe.mask, setup.processor, **common)
    else:
        found = evaluate(*what, setup.processor, **common)
    return found.metrics, unreadable_clips(setup.validation, found)


def _scored(setup: TrainSetup, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics with the one by which checkpoints are compared."""
    if setup.recipe.task == "pretrain":
        return metrics | {"score": -metrics["loss"]}
    return metrics | {"score": metrics[leading_name(setup.model.config)]}


def _placed(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in batch.items()
    }


def _whole(params: Any) -> Any:
    """The params as numpy arrays, in every process."""
    if jax.process_count() == 1:
        return jax.device_get(params)

    return process_allgather(params, tiled=True)


def _of_all_processes(state: dict[str, Any]) -> dict[str, Any]:
    """What each process says, by the number of the process."""
    return {str(i): each for i, each in enumerate(gathered(state))}


def _agreed(received: list[str], failed: UserError | None) -> str | None:
    """The signal that any process got, so that all stop after the same step.

    Raises `failed`, and in the other processes a UserError that says which one it was.
    """
    if failed is not None and jax.process_count() == 1:
        raise failed
    if jax.process_count() == 1:
        return received[0] if received else None

    number = signal.Signals[received[0]].value if received else 0
    every = process_allgather(np.array([number, failed is not None], np.int32))
    if every[:, 1].any():
        which = int(every[:, 1].argmax())
        raise failed or UserError(f"process {which} cannot go on, for what it says itself")
    largest = int(every[:, 0].max())
    return signal.Signals(largest).name if largest else None


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
    """Names of the SIGINT and SIGTERM that come while the block runs; a second one is not held.

    One that is ignored, as SIGINT by what a script starts with `&`, stays so.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: old for n in numbers if (old := signal.getsignal(n)) is not signal.SIG_IGN}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number, _):
        name = signal.Signals(number).name
        received.append(name)
        restore()
        text = f"{name}: ending after this step or validation, with a checkpoint; again: at once\n"
        # Past print and the live line, which the signal may have interrupted. Where stderr is no
        # file, closed, or read by nobody the line is left out, and the run is saved all the same.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            start = "\n" if sys.stderr.isatty() else ""
            os.write(sys.stderr.fileno(), (start + text).encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()


class _Clock:
    """Seconds a step takes, and how many of them the device had nothing to do for want of data."""

    def __init__(self):
        self._last, self._waited = time.perf_counter(), 0.0

    def fetch(self, batches: Batches, running: jax.Array | None) -> dict:
        """The next batch; how long it kept the device waiting is part of the lap.

        `running` is a result of the step before. While that is not there the device is busy and
        waits for nothing.
        """
        start = time.perf_counter()
        batch = next(batches)
        if running is None or running.is_ready():
            self._waited += time.perf_counter() - start
        return batch

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and those of them that the device waited."""
        now = time.perf_counter()
        lap = now - self._last, self._waited
        self._last, self._waited = now, 0.0
        return lap

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block is no part of a lap."""
        start = time.perf_counter()
        yield
        self._last += time.perf_counter() - start
