# SPDX-License-Identifier: Apache-2.0
"""A training run from its first step to its last."""

import contextlib
import dataclasses
import functools
import os
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
from vivit_jax.train.stop_signals import agreed_stop, stop_of_one, stop_signals


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # the last one taken
    steps: int  # of all epochs
    stopped: str | None  # the signal that ended it early
    model: Path  # the best model's directory; without validation the last one's
    metrics: dict[str, float]  # of the last validation


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    resume_step: int | None = None,
    mesh_sizes: dict[str, int] | None = None,
    dataset: Dataset | None = None,
    validation: Dataset | None = None,
    tensorboard: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Run a recipe into the directory `out`, or resume the run that is there.

    The directory gets recipe.json, model.json, metrics.jsonl, checkpoints/ (all that resuming
    needs), models/ (each kept checkpoint's model as a HuggingFace directory, from the moving
    average where there is one), bad_clips.json if clips could not be read, and report.html.

    `resume` continues from the latest checkpoint that is not damaged, or from `resume_step`, and
    replaces later ones. The run continues as if it had never stopped, on any number of devices; on
    the same devices and with the same `train.accumulate` bit for bit. SIGINT and SIGTERM end a run
    with a checkpoint after the current step or validation. `mesh_sizes` are those of
    `vivit_jax.train.sharding.parse_mesh`, by default all devices along "data".

    `dataset` and `validation` replace `data.train` and `data.validation`: the results of
    `read_dataset` or `from_objects`. A resumed run needs them again.

    Raises UserError before anything is written for a recipe that cannot run, and for a directory
    that holds a run if `resume` is not set. Also raises it, after saving the last good state, where
    losses stay not finite or too many clips cannot be read.
    """
    check(recipe)
    sizes = mesh_sizes or parse_mesh(None, jax.device_count())
    first_process = jax.process_index() == 0
    with contextlib.ExitStack() as stack:

        def enter(thing):
            return stack.enter_context(contextlib.closing(thing))

        run = enter(RunDirectory(Path(out), recipe, resume=resume))
        checkpoints = enter(Checkpoints(run.path, keep=recipe.train.keep))
        if resume_step is not None:
            checkpoints.check_step(resume_step)
        saved = resume and checkpoints.latest() is not None
        model_file = run.model_file if saved else None
        data = _listed(recipe, dataset, validation)
        setup, batches, start = _prepare(recipe, make_mesh(sizes), model_file, data)
        enter(batches)
        if start is not None:
            state, taken = _first_state(setup, start.params), 0
        else:
            state, data, taken = checkpoints.restore(setup.shapes, resume_step)
            checkpoints.rewind(taken)
            # The batches refuse a number of processes that differs.
            batches.restore(data.get(str(jax.process_index()), data["0"]))
        run.begin(None if start is None else description(start, recipe.task))
        progress = enter(Progress(setup.last, taken, setup.clips, enabled=first_process))
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
        loop = _Loop(setup, run, checkpoints, batches, log, progress, state, taken)
        stopped = loop.take_steps()
        checkpoints.wait()
        best, step = checkpoints.best(), checkpoints.latest()
        assert step is not None  # a run ends with a checkpoint
    if first_process:
        bad = run.bad_clips()
        if bad and step > taken:
            say(f"left out, as they could not be read: {bad}; {run.path / BAD_CLIPS} says why")
        write_report(run.path)
    model = run.path / "models" / str(step if best is None else best)
    return Outcome(step, setup.steps, stopped, model, loop.metrics)


def _listed(
    recipe: Recipe, dataset: Dataset | None, validation: Dataset | None
) -> tuple[Dataset, Dataset | None]:
    """The clips to train on and to validate with: those that are given, or the recipe's."""
    settings = recipe.data
    if dataset is None and not settings.train:
        raise UserError("data.train is empty; say where the clips are: --set data.train=list.txt")
    finetune = recipe.task == "finetune"
    listed = functools.partial(
        read_dataset,
        root=settings.root,
        labels=len(model_config(recipe).split_sizes) if finetune else 0,
        frame_name=settings.frame_name,
        first_frame=settings.first_frame,
    )

    def read(source: str, split: str) -> Dataset:
        # Folders name their own classes.
        names = None if os.path.isdir(source) else settings.class_names
        return listed(source, split=split, class_names=names)

    if dataset is None:
        dataset = read(settings.train, settings.train_split)
    if validation is None and settings.validation is not None:
        validation = read(settings.validation, settings.validation_split)
    return dataset, validation


def _prepare(
    recipe: Recipe,
    mesh: Mesh,
    model_file: Path | None,
    data: tuple[Dataset, Dataset | None],
) -> tuple[TrainSetup, Batches, Start | None]:
    """The setup, the batches, and what a new run starts from (None for a resumed one).

    `model_file` describes the model of a resumed run, `data` are the clips of `_listed`. Writes
    nothing.
    """
    finetune = recipe.task == "finetune"
    dataset, validation = data
    if model_file is None:
        classes = dataset.classes if finetune else None
        start = starting_model(recipe, classes, _numbers(dataset, validation))
        model, frames = start.model, start.preprocessing
    else:
        start, model = None, described_model(model_file)
        frames = described_preprocessing(model_file, recipe, model.config)
    config, recipe, processor = model.config, frames.recipe, frames.processor
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
    """The number of classes of clips with one numeric label: the largest plus one.

    None for named classes, for several labels, and where all labels are equal.
    """
    both = [dataset] if validation is None else [dataset, validation]
    if any(each.classes is not None or each.labels_per_example != 1 for each in both):
        return None
    labels = (example.label for each in both for example in each.examples)
    found = {label for label in labels if isinstance(label, int)}
    return 1 + max(found) if len(found) > 1 else None


@dataclasses.dataclass
class _Loop:
    """The steps of a run: what they use, and how far they are."""

    setup: TrainSetup
    run: RunDirectory
    checkpoints: Checkpoints
    batches: Batches
    log: MetricLog
    progress: Progress
    state: TrainState
    taken: int  # steps

    def __post_init__(self):
        self.metrics: dict[str, float] = {}  # of the last validation
        self._unreadable: dict[str, str] | None = None  # clips of the last validation: path -> why
        self._clock, self._position = _Clock(), self.batches.state()
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # not reported yet
        self._bad_reported = bool(self.batches.bad)

    def take_steps(self) -> str | None:
        """Take the steps that are left. The signal that ended them early, None where none did."""
        last, stopped = self.setup.last, None
        if self.taken and self.checkpoints.lacks_model(self.taken):
            self.checkpoints.write_model(self.taken, self._model_writer())
        with stop_signals() as received:
            try:
                while self.taken < last and stopped is None:
                    stopped = self._step(received) or stop_of_one(received)
                    validate = self._validation_due()
                    if stopped or validate or self._checkpoint_due():
                        self._report_pending()
                        with self._clock.paused():
                            # A validated step is saved: it may turn out to be the best.
                            self._save(self._validated() if validate else None)
                        stopped = stopped or stop_of_one(received)
            except WriteError:  # a disk that takes no log takes no checkpoint either
                raise
            except UserError:
                # The state is good: steps without finite gradients change nothing.
                with contextlib.suppress(UserError):
                    self._report_pending()
                if self.taken and self.checkpoints.latest() != self.taken:
                    self._save()
                raise
            self.checkpoints.wait()
        return stopped if self.taken < last else None

    def _step(self, received: list[str]) -> str | None:
        """Take a step and report the one before. The signal after which all processes end."""
        batch = failed = None
        try:
            batch = self._clock.fetch(self.batches, self._pending and self._pending[1]["loss"])
        except UserError as error:
            failed = error
        if self.batches.bad and not self._bad_reported:
            self._bad_reported = True
            why = next(iter(self.batches.bad.values()))
            self.progress.say(f"left out, as every clip that cannot be read will be: {why}")
        stopped = agreed_stop(received, failed)
        assert batch is not None  # else agreed_stop raised
        self.state, values = self.setup.step(self.state, _placed(batch, self.setup.mesh))
        self.taken, self._position = self.taken + 1, self.batches.state()
        # One step behind, so that the device has its next step before one is reported.
        previous, self._pending = self._pending, (self.taken, values)
        if previous is not None:
            self._report(*previous)
        return stopped

    def _checkpoint_due(self) -> bool:
        every = self.setup.recipe.train.checkpoint_every or self.setup.per_epoch
        return self.taken == self.setup.last or self.taken % every == 0

    def _validation_due(self) -> bool:
        epoch, within = divmod(self.taken, self.setup.per_epoch)
        every = self.setup.recipe.train.evaluate_every
        due = self.taken == self.setup.last or (not within and epoch % every == 0)
        return due and self.setup.validation is not None

    def _report_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._report(*pending)

    def _report(self, step: int, values: dict[str, jax.Array]) -> None:
        """Log a step's values. UserError after `max_bad_steps` in a row that are not finite."""
        numbers = {name: float(value) for name, value in values.items()}
        (seconds, waited), bad = self._clock.lap(), int(numbers.pop("bad_steps"))
        rate = dict(clips_per_second=self.setup.clips / seconds, wait_share=waited / seconds)
        self.log.write("train", step, numbers | rate)
        self.progress.update(
            step, loss=numbers["loss"], lr=numbers["lr"], wait_seconds=waited, seconds=seconds
        )
        if not bad:
            return
        what = f"loss {numbers['loss']:g}, gradient norm {numbers['gradient_norm']:g}"
        self.progress.say(f"step {step}: {what}; this step changed nothing")
        if bad >= self.setup.recipe.train.max_bad_steps:
            raise UserError(
                f"{bad} steps in a row, up to step {step}, had no finite loss and gradients "
                f"({what}) and changed nothing; the last good state is saved: lower optim.lr, set "
                "optim.clip, or compute in float32"
            )

    def _validated(self) -> dict[str, float]:
        """Validate and log the metrics; returns them with the score of the checkpoint."""
        self.metrics, self._unreadable = _validate(self.setup, self.state)
        self.log.write("evaluate", self.taken, self.metrics)
        text = ", ".join(f"{k} {v:.4g}" for k, v in self.metrics.items())
        epochs = self.taken / self.setup.per_epoch
        self.progress.say(f"step {self.taken}, after {epochs:g} epochs: {text}")
        return _scored(self.setup, self.metrics)

    def _save(self, scores: dict[str, float] | None = None) -> None:
        data = _of_all_processes(self._position)
        self.checkpoints.save(self.taken, self.state, data, scores, self._model_writer())
        self.run.write_bad_clips(data, self._unreadable)

    def _model_writer(self) -> Callable[[Path], None] | None:
        """What writes the model, in the first process; all take part in gathering it."""
        state, setup = self.state, self.setup
        params = _whole(state.params if state.average is None else state.average)
        if jax.process_index():
            return None
        return lambda path: save_pretrained(path, setup.model, params, setup.processor)


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
            f"{run.path}: the run has reached its last step, {taken} of {setup.steps}; nothing is "
            "left to do"
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
    recipe, dataset = setup.recipe, setup.validation
    assert dataset is not None
    params = state.params if state.average is None else state.average
    one = dataclasses.replace(recipe.evaluation, clips=1, crops=1)
    if setup.model.config.class_splits is not None:
        one = dataclasses.replace(one, average="logits")
    what = (setup.model, params, dataset, one)
    mesh, threads = setup.mesh, recipe.data.threads
    if recipe.task == "pretrain":
        found = evaluate_reconstruction(
            *what, recipe.mask, setup.processor, mesh=mesh, threads=threads
        )
    else:
        found = evaluate(*what, setup.processor, mesh=mesh, threads=threads)
    return found.metrics, unreadable_clips(dataset, found)


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
    """The state of each process by its number."""
    return {str(i): each for i, each in enumerate(gathered(state))}


class _Clock:
    """How long a step takes, and for how much of it the device waits for data."""

    def __init__(self):
        self._last, self._waited = time.perf_counter(), 0.0

    def fetch(self, batches: Batches, running: jax.Array | None) -> dict:
        """The next batch. The lap counts how long the device waited for it.

        `running` is a result of the previous step; until it is ready the device is busy.
        """
        start = time.perf_counter()
        batch = next(batches)
        if running is None or running.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
            self._waited += time.perf_counter() - start
        return batch

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and how many of them the device waited."""
        now = time.perf_counter()
        lap = now - self._last, self._waited
        self._last, self._waited = now, 0.0
        return lap

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time spent in the block does not count."""
        start = time.perf_counter()
        yield
        self._last += time.perf_counter() - start
