# SPDX-License-Identifier: Apache-2.0
"""What a layout is: everything that this package knows of one form of checkpoints, in one record.

A layout is how a group of publishers writes checkpoints: which names the tensors have, where they
lie in a file, and where the config comes from. Variants of the names inside one layout are its
*dialects*: "hub", "memory" and "key_bias" of hf; "hf", "timm" and "flax" of image ViTs.

A new layout is a file in this package with one `Layout`, a weight table for each family in
`checkpoints_convert.tables`, and a line in `registry.LAYOUTS` (or a call of `registry.register`).
Every function and command then knows it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.files.open import Checkpoint
from checkpoints_convert.rules import Rule
from checkpoints_convert.tables.table import Names, Table
from vivit_jax.config import Config
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.typed import Settings

# (path, all entries of the files) -> (parameters by the table's names, entries left out and why)
Parameters = Callable[
    [Path, Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, str]]
]  # fmt: skip
# (path, parameters, all entries, settings, **execution) -> (config, head, notes)
InferConfig = Callable[..., tuple[Config, str, list[str]]]


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """How a layout of single files is written.

    `containers` map the names that `--container` takes to the prefix of the parameters in the file,
    the default first. `rivals` matches files that readers of a directory would open instead.
    """

    name: str
    rivals: re.Pattern[str]
    containers: Mapping[str, str]
    write: Callable[[Path, Mapping[str, Any], str], Path]  # (directory, tensors, container)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """One form of checkpoints.

    Recognised: by `patch_kernels`, endings of the name of the patch embedding's kernel; without a
    patch embedding by `block_names`, names that only this layout has; `detects` replaces both.

    Read: `parameters` takes the parameters out of the files; the `tables`, by model family, say
    what they are. Files of a layout with `infer_config` come without a config.json, and their
    tensors and the user's settings say the config; a config.json beside them is preferred, and
    `check_beside(config, head, pooler, path)` compares it with what the publishers compute.
    `square_sizes(parameters, num_frames)` are the sizes that such a file leaves open, of square
    frames and of a clip of `num_frames`; empty where they do not fit. For
    files without a processor `processor(config)` is what they are trained with, and `normalised`
    says what that does to pixels. `image` layouts hold image models, from which video models start.

    Written: `check_function(config, head, pooler)` refuses configs that readers of the layout would
    not compute. `file` is how a single file is written; without it the layout is a directory of
    safetensors with config.json, which transformers opens if `in_transformers`.
    """

    name: str
    tables: dict[str, Table]  # by family; `registry.register_table` adds to it
    parameters: Parameters
    patch_kernels: tuple[str, ...] = ()
    block_names: re.Pattern[str] | None = None
    detects: Callable[[Checkpoint, Settings], bool] | None = None
    infer_config: InferConfig | None = None
    square_sizes: Callable[[Mapping[str, Any], int], dict[str, int]] | None = None
    check_beside: Callable[[Any, str, bool, Path], None] | None = None
    processor: Callable[[Any], VideoProcessor | None] | None = None
    normalised: str = ""
    image: bool = False
    writable: bool = True
    check_function: Callable[[Any, str, bool], None] | None = None
    file: SingleFile | None = None
    in_transformers: bool = False
    # Components of a name that make one line of a report on training state.
    state_depth: int = 1


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """The model that a checkpoint holds, and under which names of which layout."""

    layout: Layout
    family: str
    names: Names

    @property
    def head(self) -> str:
        """ "classification", "pretraining" or "none"."""
        return self.names.head

    @property
    def pooler(self) -> bool:
        """Whether a headless model has a pooling layer."""
        return self.names.pooler

    def rules(self, config: Config) -> list[Rule]:
        """The weight table for a model of `config`."""
        return self.layout.tables[self.family].rules(config, self.names)

    def with_head(self, head: str) -> "StoredModel":
        """The same names read into a model with another head."""
        names = self.names._replace(head=head, pooler=self.pooler and head == "none")
        return dataclasses.replace(self, names=names)


def name_before(name: str, ending: str) -> str | None:
    """What precedes the last parts `ending` of a tensor's name; None for another name."""
    prefix = name.removesuffix(ending)
    return prefix if name.endswith(ending) and (not prefix or prefix[-1] in "./") else None
