# SPDX-License-Identifier: Apache-2.0
"""Callbacks of a training run: they see each step and each evaluation, and may end the run.

A callback is a function, or an object with `__call__`, that takes an `Event`. It is called after
each step and each evaluation, once all of their metrics are logged, with the state as it then is.
So a run with callbacks reports a step before it begins the next one, and a run without them after.
One that reads evaluations only says so by an attribute `evaluations_only = True`, is not called
after steps, and costs that no time.

**Which processes.** A callback is called in the first process only: most write to a file or a
service, once for a run. One that computes with `event.state`, which is spread over all processes,
says so by an attribute `every_process = True`; a computation that only one process takes part in
would wait for the others for ever.

**Resuming.** A callback with `state()` and `restore(state)` has its state, which are JSON values,
saved in each checkpoint and gets it back when the run is resumed. It is found by the name of its
type, and by its place among those of the same type.

**Errors.** A callback that raises ends the run as a UserError in all processes. The state is good,
so a checkpoint of the last step is saved first; `resume` goes on from it.
"""

import collections
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax

from vivit_jax.errors import UserError, counted, first_line, quoted
from vivit_jax.train.state import TrainState

logger = logging.getLogger(__name__)
Kind = Literal["train", "evaluate"]


@dataclasses.dataclass(frozen=True)
class Event:
    """What a callback is told.

    Attributes:
        kind: "train" after a step, "evaluate" after an evaluation on the held-out clips, which
            follows the "train" of its step.
        step: the last step taken, counted from 1.
        metrics: as in metrics.jsonl: "loss", "lr", "accuracy" and so on of the step's clips, or
            those of the evaluation.
        state: after the step. Its arrays are valid until the callback returns: the next step takes
            their memory. On a mesh they are spread over its devices.
        steps: those of all epochs.
        epoch: how many epochs are done, with a fraction.
        score: by which checkpoints are compared, higher is better; None for "train".
        stop: `event.stop("why")` ends the run after this step, with a checkpoint. The reason is
            logged and returned as `Outcome.stop_reason`.
    """

    kind: Kind
    step: int
    metrics: Mapping[str, float]
    state: TrainState
    steps: int
    epoch: float
    score: float | None
    stop: Callable[[str], None]

    @property
    def named_metrics(self) -> dict[str, float]:
        """The metrics by the names that TensorBoard files have: "train/loss", "evaluate/loss"."""
        return {f"{self.kind}/{name}": value for name, value in self.metrics.items()}


@runtime_checkable
class Callback(Protocol):
    """One of the `callbacks` of `vivit_jax.train.train`; any function of an event is one."""

    def __call__(self, event: Event, /) -> Any:
        """What it returns is ignored."""
        ...


class EarlyStop:
    """Ends a run when `patience` evaluations in a row are no better than the best one before.

    `metric` is one of an evaluation's; None takes the score by which checkpoints are compared
    (accuracy, or minus the loss of pre-training). Metrics whose names end in "loss" are better when
    lower. An evaluation is better if it exceeds the best by more than `margin`; one that is not
    finite never is. Resuming keeps the count.
    """

    evaluations_only = True

    def __init__(self, patience: int = 3, *, metric: str | None = None, margin: float = 0.0):
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise UserError(f"patience is {patience!r}; expected 1 or more evaluations")
        if not margin >= 0:
            raise UserError(f"margin is {margin!r}; expected 0 or more")
        self.patience, self.metric, self.margin = patience, metric, margin
        self.best, self.since = -math.inf, 0
        self.best_step: int | None = None

    def __call__(self, event: Event) -> None:
        if event.kind != "evaluate":  # from a caller's own loop
            return
        value = self._value(event)
        if math.isfinite(value) and value > self.best + self.margin:
            self.best, self.since, self.best_step = value, 0, event.step
            return
        self.since += 1
        if self.since >= self.patience:
            count = counted(self.since, "evaluation")
            event.stop(f"{self._name()[0]} was no better than {self._best_text()} in {count}")

    def _best_text(self) -> str:
        """The best evaluation: its step, and its value where that is a number that people know."""
        step = "before" if self.best_step is None else f"at step {self.best_step}"
        if self.metric is None:
            return step
        best = -self.best if self._name()[1] else self.best
        return f"{best:.4g}" if self.best_step is None else f"{best:.4g}, {step},"

    def _name(self) -> tuple[str, bool]:
        """What is compared, and whether lower is better."""
        name = self.metric or "the held-out score"
        return name, name.endswith("loss")

    def _value(self, event: Event) -> float:
        if self.metric is None:
            assert event.score is not None  # it is an evaluation
            return event.score
        if self.metric not in event.metrics:
            raise UserError(
                f"EarlyStop's metric is {self.metric!r}; an evaluation has "
                f"{', '.join(event.metrics)}"
            )
        value = float(event.metrics[self.metric])
        return -value if self._name()[1] else value

    def state(self) -> dict[str, Any]:
        """The best value and how many evaluations it is old."""
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "since": self.since, "best_step": self.best_step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.best = -math.inf if state["best"] is None else state["best"]
        self.since = state["since"]
        self.best_step = state.get("best_step")  # earlier versions did not keep it


class Callbacks:
    """The callbacks of a run, called in their order.

    `failed` is the error of the first that raised, after which none is called; `reason` is what the
    first said that asked for the end.
    """

    def __init__(self, callbacks: Iterable[Callback]):
        if callable(callbacks) or isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
            raise UserError(
                f"callbacks is {callbacks!r}; expected a list of callbacks: callbacks=[it]"
            )
        callbacks = tuple(callbacks)
        for each in callbacks:
            if not callable(each) or isinstance(each, type):
                raise UserError(
                    f"callbacks has {each!r}; expected functions that take an event, or objects "
                    "with __call__, see vivit_jax.train.Callback"
                )
        self.failed: UserError | None = None
        self.reason: str | None = None
        self._all: tuple[Callback, ...] = ()
        self.put_first(callbacks)

    def put_first(self, callbacks: Iterable[Callback]) -> None:
        """Add callbacks, such as the run's own, before the others."""
        self._all, first = (*callbacks, *self._all), jax.process_index() == 0
        self._called = [c for c in self._all if first or getattr(c, "every_process", False)]

    def __bool__(self) -> bool:
        """Whether there are any, in this process or another."""
        return bool(self._all)

    @property
    def see_steps(self) -> bool:
        """Whether there are any, in this process or another, that see steps."""
        return not all(getattr(c, "evaluations_only", False) for c in self._all)

    def call(self, event: Event) -> None:
        """Call those of this process; notes an error or a wish to stop, which all must agree on."""
        for callback in self._called:
            if self.failed is not None:
                return
            if event.kind == "train" and getattr(callback, "evaluations_only", False):
                continue
            try:
                callback(event)
            except Exception as error:
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                self.failed = UserError(
                    f"the callback {_name(callback)} failed after step {event.step}: "
                    f"{kind}{first_line(error)}; a checkpoint of this step is saved: mend the "
                    "callback and resume the run"
                )
                self.failed.__cause__ = error

    def check(self, evaluated: bool) -> None:
        """UserError if the run has no evaluations, and a callback does nothing without them."""
        for callback in self._all:
            if getattr(callback, "evaluations_only", False) and not evaluated:
                raise UserError(
                    f"the callback {_name(callback)} looks at evaluations, and the run has none: "
                    "give it held-out clips, data.validation or validation=, or leave it out"
                )

    def stop(self, reason: str = "it asked for that") -> None:
        """An event's `stop`."""
        self.reason = self.reason or str(reason)

    def state(self) -> list[dict[str, Any]]:
        """The states of those of this process that have one. UserError if it is not JSON values."""
        states = []
        for name, callback in self._with_states():
            state = callback.state()
            try:
                json.dumps(state, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"state() of the callback {name} gave {quoted(repr(state))}, which is not JSON "
                    f"values: {first_line(error)}; return numbers, texts, lists and dicts"
                ) from error
            states.append({"name": name, "state": state})
        return states

    def restore(self, states: Iterable[Mapping[str, Any]]) -> None:
        """Give each its state back. A warning names states and callbacks without a partner."""
        saved = {each["name"]: each["state"] for each in states}
        for name, callback in self._with_states():
            if name in saved:
                callback.restore(saved.pop(name))
            else:
                logger.warning("no state of the callback %s is saved; it begins anew", name)
        if saved and jax.process_index() == 0:  # another may have got the first one's states
            logger.warning("the run was saved with callbacks that are gone: %s", ", ".join(saved))

    def _with_states(self) -> list[tuple[str, Any]]:
        """Those with a state by a name of their own."""
        counts: collections.Counter[str] = collections.Counter()
        found = []
        for callback in self._called:
            if hasattr(callback, "state") and hasattr(callback, "restore"):
                name = _name(callback)
                found.append((f"{name} {counts[name]}", callback))
                counts[name] += 1
        return found


def _name(callback: Any) -> str:
    return getattr(callback, "__qualname__", None) or type(callback).__qualname__
