# SPDX-License-Identifier: Apache-2.0
"""How a run is run: what `train` takes besides the recipe and what the caller adds to it."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypedDict

from vivit_jax.errors import UserError, closest

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is run.

    Attributes:
        resume: continue the run in the directory, from the latest checkpoint that is not damaged;
            "auto": if there is one, else begin it.
        resume_step: with `resume`, from the checkpoint of this step; it replaces later ones.
        mesh_sizes: of "data", "fsdp", "tensor", 1 where left out; None: all devices along "data".
        tensorboard: whether to write TensorBoard files too.
        say: takes the lines about the start and the end; None: nothing is shown, also no progress.
    """

    resume: bool | Literal["auto"] = False
    resume_step: int | None = None
    mesh_sizes: Mapping[str, int] | None = None
    tensorboard: bool = False
    say: Say | None = print

    @classmethod
    def of(cls, given: Mapping[str, Any], others: Collection[str]) -> "RunOptions":
        """The options of the keywords given. UserError for one that there is not.

        `others` are the names of the other arguments, one of which may be meant.
        """
        own = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in own:
                known = [*(other for other in others if other != "options"), *own]
                raise UserError(f"train takes no argument {name!r}{closest(name, known)}")
        if given.get("say") is not None and not callable(given["say"]):
            raise UserError(f"say is {given['say']!r}; expected a function of a text, or None")
        return cls(**given)

    def tell(self, text: str) -> None:
        """Hand a line to `say`, if there is one."""
        if self.say is not None:
            self.say(text)


class RunKeywords(TypedDict, total=False):
    """The fields of `RunOptions` as keyword arguments, for editors and type checkers."""

    resume: bool | Literal["auto"]
    resume_step: int | None
    mesh_sizes: Mapping[str, int] | None
    tensorboard: bool
    say: Say | None
