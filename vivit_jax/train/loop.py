# SPDX-License-Identifier: Apache-2.0
"""A training run from its first step to its last."""

import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from checkpoints_convert.card import Base
from vivit_jax.data.pipeline import Batches
from vivit_jax.data.transforms.augment import Transform
from vivit_jax.errors import UserError, WriteError
from vivit_jax.files.addresses import Place
from vivit_jax.recipes.checks import check_values
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.agreement import checked_clips
from vivit_jax.train.callbacks import Callback, Callbacks, Event, Kind
from vivit_jax.train.clock import Clock
from vivit_jax.train.evaluation import (
    Evaluation,
    unreadable_clips,
)
from vivit_jax.train.held_out import early_stop, one_view, scored, validate
from vivit_jax.train.log import MetricLog, Progress
from vivit_jax.train.metrics import metric_text
from vivit_jax.train.model_card import run_facts
from vivit_jax.train.own import Augment, Loss, Own
from vivit_jax.train.own_model import save_model
from vivit_jax.train.pages.report import write_report
from vivit_jax.train.pages.validation import validation_record
from vivit_jax.train.prepare import first_state, prepare, summary
from vivit_jax.train.processes.join import reached
from vivit_jax.train.processes.stop_signals import agreed_stop, stop_of_one, stop_signals
from vivit_jax.train.profile import Profile, Tracer
from vivit_jax.train.run_options import RunKeywords, RunOptions
from vivit_jax.train.setup import TrainSetup
from vivit_jax.train.sharding import batch_sharding, gathered, make_mesh, whole, whole_mesh
from vivit_jax.train.start.initial_model import described_base, description
from vivit_jax.train.state import TrainState
from vivit_jax.train.storage.checkpoint import Checkpoints
from vivit_jax.train.storage.gathered_checkpoints import GatheredCheckpoints
from vivit_jax.train.storage.run_directory import BAD_CLIPS, RunDirectory, resumes
from vivit_jax.train.storage.run_store import RunStore, run_store
from vivit_jax.train.watch import Notice, Watch, held_out_loss, watch_of


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # the last one taken
    steps: int  # of all epochs
    stopped: str | None  # the signal that ended it early
    model: Place  # the best model's directory; without validation the last one's
    metrics: dict[str, float]  # of the last validation
    stop_reason: str | None = None  # of the callback that ended it early


def train(
    recipe: Recipe,
    out: str | Path | Place,
    *,
    callbacks: Iterable[Callback] = (),
    loss: Loss | None = None,
    augment: Augment | Transform | None = None,
    model: nn.Module | tuple[nn.Module, Any] | None = None,
    dataset: Any = None,
    validation: Any = None,
    profile: Profile | str | Path | None = None,
    **options: Unpack[RunKeywords],
) -> Outcome:
    """Run a recipe into the directory `out`, or resume the run that is there.

    The directory gets recipe.json, model.json, metrics.jsonl, checkpoints/ (all that resuming
    needs), models/ (each kept checkpoint's model as a HuggingFace directory, from the moving
    average where there is one), validation.json (what the best model answered for the held-out
    clips), bad_clips.json if clips could not be read, and report.html.

    With `resume=True` the run continues as if it had never stopped, on any number of devices; on
    the same devices and with the same `train.accumulate` bit for bit. SIGINT and SIGTERM end a run
    with a checkpoint after the current step or validation.

    Args:
        recipe: its settings.
        out: a new or empty directory; with `resume=True` one that holds a run of the recipe. May
            be an address in an object store: `vivit_jax.train.storage.run_store`.
        callbacks: see each step and evaluation, and may end the run: `vivit_jax.train.callbacks`.
        loss: replaces the recipe's: (params, outputs, batch) -> (loss, metrics). A callable pytree,
            such as `jax.tree_util.Partial(function, arrays)`, brings arrays. `vivit_jax.train.own`.
        augment: after the recipe's augmentation: (numpy Generator, uint8 clip) -> clip, or an
            `Augment`.
        model: a linen module that replaces the recipe's, or one and its params, as
            `from_pretrained` returns; of a family, or your own class: `vivit_jax.train.own_model`.
        dataset: replaces `data.train`: a result of `read_dataset` or `from_objects`, or any object
            that the latter takes. A resumed run needs it again.
        validation: replaces `data.validation`, likewise.
        profile: a directory for a trace of a few steps by jax.profiler, or a `Profile`.
        options: the fields of `RunOptions`: resume, resume_step, mesh_sizes, tensorboard, say.

    Raises UserError before anything is written for a recipe that cannot run, for an argument that
    there is not, and for a directory that holds a run if `resume` is not set. Also raises it, after
    saving the last good state, where losses stay not finite, too many clips cannot be read, or a
    callback fails; before the first step there is nothing to save, and a new run is taken back.
    """
    check_values(recipe)
    given = RunOptions.of(options, others=inspect.signature(train).parameters)
    told, traced = Callbacks(callbacks), Profile.checked(profile)
    resume = resumes(out, given.resume)
    own = Own.checked(loss, augment, model)
    sizes = whole_mesh(given.mesh_sizes, jax.device_count())
    first_process = jax.process_index() == 0
    with run_store(out, resume=resume) as store, contextlib.ExitStack() as stack:

        def enter(thing):
            return stack.enter_context(contextlib.closing(thing))

        run = enter(RunDirectory(store.path, recipe, resume=resume))
        stack.push(run.undo)
        checkpoints = enter(store.checkpoints(keep=recipe.train.keep))
        if given.resume_step is not None:
            checkpoints.check_step(given.resume_step)
        saved = resume and checkpoints.latest() is not None
        model_file = run.model_file if saved else None
        data = checked_clips(recipe, sizes, dataset, validation, new=model_file is None)
        told.put_first(early_stop(recipe, data[1]))
        setup, batches, start = prepare(recipe, make_mesh(sizes), model_file, data, own)
        enter(batches)
        told.check(setup.validation is not None)
        arrays = own.placed_arrays(setup.mesh)
        if own.loss is not None or own.pixels is not None:
            setup.step.trace(setup.shapes, setup.batch_shapes, arrays)  # its errors come now
        if start is not None:
            state, taken = first_state(setup, start.params), 0
        else:
            state, saved_data, taken = checkpoints.restore(setup.shapes, given.resume_step)
            checkpoints.rewind(taken)
            batches.restore(*(saved_data[number] for number in sorted(saved_data, key=int)))
            held = saved_data.get(str(jax.process_index()), saved_data["0"])
            told.restore(held.get("callbacks", ()))
        steps = range(taken + 1, setup.last + 1)
        steps = steps if traced is None else traced.of_run(steps)
        run.begin(None if start is None else description(start, recipe.task, own.named))
        if start is not None and recipe.data.hold_out is not None:
            run.write_lists(recipe.data, batches.sampler.dataset, setup.validation)
        log = enter(
            MetricLog(
                run.path,
                resume_at=taken if resume else None,
                tensorboard=given.tensorboard,
                enabled=first_process,
            )
        )
        if start is not None:
            log.write("event", taken, {"text": start.report})
        if first_process:
            given.tell(summary(setup, batches, store.place, taken))
        # A live line, below the summary.
        shown = first_process and given.say is not None
        progress = enter(Progress(setup.last, taken, setup.clips, enabled=shown))
        clock = enter(Clock(setup.clips, setup.flops, functools.partial(_stalled, log, progress)))
        tracer = enter(Tracer(traced, steps, progress.say))
        base = start.base if start is not None else described_base(run.model_file)
        # What it says of a loss is true of the recipe's.
        known = own.loss is None
        watch = watch_of(setup, batches.sampler.dataset, log.earlier) if known else None
        tools = (store, run, checkpoints, batches, log, progress, clock, told, watch, tracer)
        loop = _Loop(setup, arrays, *tools, state, taken, base)
        stopped = loop.take_steps()
        checkpoints.wait()
        best, step = checkpoints.best(), checkpoints.latest()
        assert step is not None  # a run ends with a checkpoint
        stack.close()  # the report reads what these have written
        if first_process:
            bad = run.bad_clips()
            if bad and step > taken:
                where = store.place / BAD_CLIPS
                given.tell(f"left out, as they could not be read: {bad}; {where} says why")
            write_report(run.path, setup.validation)
        store.finish()
        best_model = store.place / "models" / str(step if best is None else best)
        return Outcome(step, setup.steps, stopped, best_model, loop.metrics, loop.stop_reason)


@dataclasses.dataclass
class _Loop:
    """The steps of a run: what they use, and how far they are."""

    setup: TrainSetup
    arrays: list[jax.Array]  # of a loss of the caller's
    store: RunStore
    run: RunDirectory
    checkpoints: Checkpoints | GatheredCheckpoints
    batches: Batches
    log: MetricLog
    progress: Progress
    clock: Clock
    callbacks: Callbacks
    watch: Watch | None
    tracer: Tracer
    state: TrainState
    taken: int  # steps
    base: Base | None  # the model that the run started from

    def __post_init__(self):
        self.metrics: dict[str, float] = {}  # of the last validation
        self.stop_reason: str | None = None  # of the callback that ended the run
        self._unreadable: dict[str, str] | None = None  # clips of the last validation: path -> why
        self._position = self.batches.state()
        self._pending: tuple[int, dict[str, jax.Array]] | None = None  # not reported yet
        self._bad_reported = bool(self.batches.bad)

    def take_steps(self) -> str | None:
        """Take the steps that are left. The signal that ended them early, None where none did."""
        last, stopped = self.setup.last, None
        if self.taken and self.checkpoints.lacks_model(self.taken):
            metrics = self.checkpoints.metrics(self.taken)
            self.checkpoints.write_model(self.taken, self._model_writer(metrics))
        with stop_signals() as received:
            try:
                while self.taken < last and stopped is None:
                    before = self.taken
                    stopped = self._step(received) or stop_of_one(received)
                    if self.taken == before:  # a callback ends the run
                        break
                    validation = self._validation_due()
                    if stopped or validation or self._checkpoint_due():
                        self._report_pending()
                        with self.clock.paused():
                            # A validated step is saved: it may turn out to be the best.
                            self._save(self._validated() if validation else None)
                        stopped = stopped or stop_of_one(received)
                self._end()
            except WriteError:  # a disk that takes no log takes no checkpoint either
                raise
            except UserError:
                # The state is good: steps without finite gradients change nothing.
                with contextlib.suppress(UserError):
                    self._report_pending()
                self._save_once()
                raise
            self.checkpoints.wait()
        return stopped if self.taken < last else None

    def _step(self, received: list[str]) -> str | None:
        """Take a step and report the one before. The signal after which all processes end.

        Takes none if a callback asked for the end.
        """
        batch = failed = None
        try:
            batch = self.clock.fetch(self.batches, self._pending and self._pending[1]["loss"])
        except UserError as error:
            failed = error
        if self.batches.bad and not self._bad_reported:
            self._bad_reported = True
            why = next(iter(self.batches.bad.values()))
            self.progress.say(f"left out, as every clip that cannot be read will be: {why}")
        if self.callbacks.see_steps:
            # They are to see the state, whose memory the next step takes.
            self._report_pending()
        asked = self.callbacks.reason is not None
        reached(self.taken + 1)
        stopped, ended = agreed_stop(received, failed or self.callbacks.failed, asked)
        if ended:
            return None
        assert batch is not None  # else agreed_stop raised
        with self.tracer.step(self.taken + 1) as results:
            placed = _placed(batch, self.setup.mesh)
            self.state, values = self.setup.step(self.state, placed, self.arrays)
            results(values)
        self.taken, self._position = self.taken + 1, self.batches.state()
        # One step behind, so that the device has its next step before one is reported.
        previous, self._pending = self._pending, (self.taken, values)
        if previous is not None:
            self._report(*previous)
        return stopped

    def _end(self) -> None:
        """After the last step: what callbacks said of it counts too."""
        agreed_stop([], self.callbacks.failed)
        reasons = [each for each in gathered(self.callbacks.reason) if each is not None]
        if reasons and self.taken < self.setup.last:
            self.stop_reason = reasons[0]
            text = f"ended early: {self.stop_reason}"
            self.log.write("event", self.taken, {"text": text})
            self.progress.say(f"step {self.taken}: {text}")
        self._save_once()

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
        bad, measured = int(numbers.pop("bad_steps")), self.clock.lap(step)
        self.run.keep()
        self.log.write("train", step, numbers | measured)
        self.progress.update(step, loss=numbers["loss"], lr=numbers["lr"], measured=measured)
        if self.watch is not None:
            self._notice(step, self.watch.after_step(step, numbers))
        self._tell("train", numbers | measured)
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

    def _notice(self, step: int, notices: Iterable[Notice]) -> None:
        """Log what the watch has noticed, and say it."""
        for notice in notices:
            self.log.write("event", step, notice.values)
            self.progress.say(f"step {step}: notice: {notice.text}")

    def _tell(self, kind: Kind, metrics: dict[str, float], score: float | None = None) -> None:
        """Call the callbacks about the last step."""
        if kind == "evaluate" or self.callbacks.see_steps:
            epoch = self.taken / self.setup.per_epoch
            at = (self.taken, metrics, self.state, self.setup.steps, epoch, score)
            self.callbacks.call(Event(kind, *at, self.callbacks.stop))

    def _validated(self) -> dict[str, float]:
        """Validate and log the metrics; returns them with the score of the checkpoint."""
        dataset, found = self.setup.validation, validate(self.setup, self.state)
        assert dataset is not None  # else none is due
        self.metrics = found.metrics | held_out_loss(self.setup.model.config, dataset, found)
        self._unreadable = unreadable_clips(dataset, found)
        self.log.write("evaluate", self.taken, self.metrics)
        text = ", ".join(metric_text(*each) for each in self.metrics.items())
        epochs = self.taken / self.setup.per_epoch
        many = "" if epochs == 1 else "s"
        self.progress.say(f"step {self.taken}, after {epochs:g} epoch{many}: {text}")
        if self.watch is not None:
            notices = self.watch.after_validation(self.taken, dataset, found)
            self._notice(self.taken, notices)
        metrics = scored(self.metrics)
        if self.setup.recipe.task == "finetune":
            self.run.write_validation(self.taken, metrics["score"], lambda: self._record(found))
        # Before the checkpoint, which has the callbacks' states.
        self._tell("evaluate", self.metrics, metrics["score"])
        return metrics

    def _record(self, found: Evaluation) -> dict[str, Any]:
        """What became of the held-out clips."""
        config, dataset = self.setup.model.config, self.setup.validation
        assert dataset is not None
        return validation_record(config, one_view(self.setup), dataset, found)

    def _save(self, scores: dict[str, float] | None = None) -> None:
        states = self.callbacks.state()
        own = self._position | ({"callbacks": states} if states else {})
        data = _of_all_processes(own)
        self.store.settle()
        self.checkpoints.save(self.taken, self.state, data, scores, self._model_writer(scores))
        self.run.write_bad_clips(data, self._unreadable)
        if self.store.is_remote:
            self.checkpoints.wait()
            self.store.publish()

    def _save_once(self) -> None:
        """Save the last step, unless it is saved."""
        if self.taken and self.checkpoints.latest() != self.taken:
            self._save()

    def _model_writer(self, metrics: Mapping[str, float] | None) -> Callable[[Path], None] | None:
        """What writes the model, in the first process; all take part in gathering it.

        `metrics` are those of this step's validation, for the card.
        """
        state, setup = self.state, self.setup
        params = jax.tree.map(whole, state.params if state.average is None else state.average)
        if jax.process_index():
            return None
        card = run_facts(setup, self.batches.sampler.dataset, self.base, self.taken, metrics)
        return lambda path: save_model(path, setup.model, params, setup.processor, card)


def _stalled(log: MetricLog, progress: Progress, step: int, text: str) -> None:
    """Say in every process, and log in the first, that no step has ended for long."""
    log.write("event", step, Notice("stall", text).values)
    if jax.process_index() == 0:
        progress.say(f"step {step}: notice: {text}")
    else:
        print(f"process {jax.process_index()}: {text}", file=sys.stderr, flush=True)


def _placed(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in batch.items()
    }


def _of_all_processes(state: dict[str, Any]) -> dict[str, Any]:
    """The state of each process by its number."""
    return {str(i): each for i, each in enumerate(gathered(state))}
