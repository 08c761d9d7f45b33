# SPDX-License-Identifier: Apache-2.0
"""What a weight table is: the rules of one family in one layout, and how to read its names."""

import dataclasses
from collections.abc import Callable, Collection
from typing import NamedTuple

from checkpoints_convert.rules import Rule


class Names(NamedTuple):
    """What the tensor names of a checkpoint say about the model in it.

    `prefix` precedes the names of the backbone. `pooler` is whether a headless model has what makes
    one vector of its tokens: ViViT's pooling layer, VideoMAE's norm of their mean. `dialect` is the
    variant of the names inside a layout, "" where a layout has only one.
    """

    head: str
    prefix: str = ""
    pooler: bool = False
    dialect: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """The weight table of one family in one layout.

    `rules(config, names)` are the rules for a model of `config` stored under `names`.
    `identify(tensor_names, head)` reads the `Names` of a checkpoint; `head` is what config.json
    says, None where it says nothing. `prefix` precedes a backbone's names in models with one of the
    heads `prefixed`, and `dialect` is the one that is written.
    """

    rules: Callable[..., list[Rule]]
    identify: Callable[[Collection[str], str | None], Names]
    prefix: str = ""
    prefixed: tuple[str, ...] = ()
    dialect: str = ""

    def published(self, head: str, pooler: bool = False) -> Names:
        """The names under which a model with this head is written."""
        return Names(head, self.prefix if head in self.prefixed else "", pooler, self.dialect)
