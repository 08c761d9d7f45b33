# SPDX-License-Identifier: Apache-2.0
"""Traces of some steps of a run by jax.profiler, for TensorBoard, XProf or Perfetto."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vivit_jax.errors import UserError, quoted
from vivit_jax.files.atomic import check_directory


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which steps are traced, and into which directory.

    Attributes:
        directory: jax.profiler's log directory; each process writes files of its own into it.
        steps: how many are traced.
        skip: steps of this run that pass before; the first compiles.
        first: the first traced step, counted from the first of all, in place of `skip`.
    """

    directory: str | Path
    steps: int = 3
    skip: int = 2
    first: int | None = None

    def __post_init__(self):
        for name, least in (("steps", 1), ("skip", 0), ("first", 1)):
            value = getattr(self, name)
            if name == "first" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"Profile.{name} is {value!r}; expected an int from {least} on")

    @classmethod
    def of_steps(cls, text: str, directory: Path) -> "Profile":
        """From "10:15", the first and the last traced step, or "10". Raises UserError."""
        first, _, last = text.partition(":")
        if re.fullmatch(r"[1-9][0-9]*(:[1-9][0-9]*)?", text) and int(last or first) >= int(first):
            return cls(directory, int(last or first) - int(first) + 1, first=int(first))
        raise UserError(
            f"--profile is {quoted(text)}; expected the first and the last step to trace, such as "
            "10:15"
        )

    def of_run(self, taken: range) -> range:
        """The steps to trace in a run that takes these. Raises UserError if it takes none of them.

        Of a run too short for `skip` nothing is traced.
        """
        first = taken.start + self.skip if self.first is None else self.first
        if self.first is not None and taken and first not in taken:
            raise UserError(
                f"the profile begins at step {first}, and this run takes steps {taken[0]} to "
                f"{taken[-1]}"
            )
        return range(first, first + self.steps)

    @classmethod
    def checked(cls, given: "Profile | str | os.PathLike | None") -> "Profile | None":
        """From what `train` was given. Raises UserError, also for a directory it cannot write."""
        if given is None:
            return None
        if not isinstance(given, Profile | str | os.PathLike):
            raise UserError(
                f"profile is {given!r}; expected a directory, or a vivit_jax.train.Profile"
            )
        profile = given if isinstance(given, Profile) else cls(Path(given))
        check_directory(Path(profile.directory), (), "profile")
        return profile


class Tracer:
    """Traces some steps into a profile's directory; without a profile it does nothing."""

    def __init__(self, profile: Profile | None, steps: range, say: Callable[[str], None]):
        self._profile, self._steps, self._say = profile, steps, say
        self._traced, self._running = 0, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Callable[[Any], None]]:
        """Around the start of a step; the block passes what it returns the step's results."""
        profile, waiting = self._profile, []
        if profile is None:
            yield waiting.append
            return
        if number == self._steps.start:
            jax.profiler.start_trace(profile.directory)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield waiting.append
        self._traced += self._running
        if number == self._steps[-1]:
            jax.block_until_ready(waiting)
            self.close()

    def close(self) -> None:
        """End the trace, if one is running, and say where it is or why there is none."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._say(
                f"traced {self._traced} steps into {profile.directory}; look at them with xprof or "
                "TensorBoard"
            )
        else:
            self._say(f"no step was traced: the run ended before step {self._steps.start}")
