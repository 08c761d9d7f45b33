# SPDX-License-Identifier: Apache-2.0
"""Training: `setup` builds what a run needs, `step` is one step of it, `loop` the whole run.

`log` writes metrics.jsonl, `pages.report` draws it and says where a new metric goes. What a run
takes from its caller is in `callbacks`, `own`, `own_model` and `profile`. Rooms: `start`, what a
run starts from; `storage`, what it keeps; `pages`, what is shown of it; `processes` that make it;
`suggest`, settings that suit data and machine; `planning`, what a step costs elsewhere.

The names of `__all__` load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from vivit_jax.data.datasets.dataset import Dataset, from_objects, read_dataset
    from vivit_jax.recipes import apply_settings, recipe_named
    from vivit_jax.recipes.recipe import Recipe
    from vivit_jax.train.callbacks import Callback, EarlyStop, Event
    from vivit_jax.train.evaluation import evaluate
    from vivit_jax.train.loop import Outcome, train
    from vivit_jax.train.own import Augment
    from vivit_jax.train.own_model import ClipConfig, read_params
    from vivit_jax.train.profile import Profile
    from vivit_jax.train.run_options import RunOptions
    from vivit_jax.train.state import TrainState

# The module of each public name. tests/unit/test_public_names.py compares all three lists.
_PUBLIC = {
    "Augment": "vivit_jax.train.own",
    "Callback": "vivit_jax.train.callbacks",
    "ClipConfig": "vivit_jax.train.own_model",
    "Dataset": "vivit_jax.data.datasets.dataset",
    "EarlyStop": "vivit_jax.train.callbacks",
    "Event": "vivit_jax.train.callbacks",
    "Outcome": "vivit_jax.train.loop",
    "Profile": "vivit_jax.train.profile",
    "Recipe": "vivit_jax.recipes.recipe",
    "RunOptions": "vivit_jax.train.run_options",
    "TrainState": "vivit_jax.train.state",
    "apply_settings": "vivit_jax.recipes",
    "evaluate": "vivit_jax.train.evaluation",
    "from_objects": "vivit_jax.data.datasets.dataset",
    "read_dataset": "vivit_jax.data.datasets.dataset",
    "read_params": "vivit_jax.train.own_model",
    "recipe_named": "vivit_jax.recipes",
    "train": "vivit_jax.train.loop",
}
__all__ = [
    "Augment",
    "Callback",
    "ClipConfig",
    "Dataset",
    "EarlyStop",
    "Event",
    "Outcome",
    "Profile",
    "Recipe",
    "RunOptions",
    "TrainState",
    "apply_settings",
    "evaluate",
    "from_objects",
    "read_dataset",
    "read_params",
    "recipe_named",
    "train",
]


if not TYPE_CHECKING:  # with it, type checkers would take any name for a public one

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'vivit_jax.train' has no attribute {name!r}")
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
