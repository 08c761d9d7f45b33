# SPDX-License-Identifier: Apache-2.0
"""Traces of some steps of a run by jax.profiler, for TensorBoard, XProf or Perfetto."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vivit_jax.errors import UserError
from vivit_jax.files.atomic import check_directory


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which steps are traced, and into which directory.

    Attributes:
        directory: jax.profiler's log directory; each process writes files of its own into it.
        steps: how many are traced.
        skip: steps of this run that pass before; the first compiles.
    """

    directory: str | Path
    steps: int = 3
    skip: int = 2

    def __post_init__(self):
        for name, least in (("steps", 1), ("skip", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"Profile.{name} is {value!r}; expected an int from {least} on")

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
    """Traces the steps of a profile; without one it does nothing."""

    def __init__(self, profile: Profile | None, say: Callable[[str], None]):
        self._profile, self._say = profile, say
        self._seen, self._running = 0, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[Callable[[Any], None]]:
        """Around the start of a step; the block passes what it returns the step's results."""
        profile, waiting = self._profile, []
        if profile is None:
            yield waiting.append
            return
        self._seen += 1
        if self._seen == profile.skip + 1:
            jax.profiler.start_trace(profile.directory)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield waiting.append
        if self._running and self._seen == profile.skip + profile.steps:
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
                f"traced {min(self._seen - profile.skip, profile.steps)} steps into "
                f"{profile.directory}; look at them with xprof or TensorBoard"
            )
        else:
            self._say(
                f"no step was traced: the run took {self._seen}, Profile.skip is {profile.skip}"
            )
