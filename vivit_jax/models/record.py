# SPDX-License-Identifier: Apache-2.0
"""The record of a model family; `vivit_jax.models.family` has those that there are."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from vivit_jax.config import Config
from vivit_jax.layers.encoder import StackSpec
from vivit_jax.models.products import Flops


def _no_inputs(config: Any, head: str) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What builds, initialises and measures the models of one config class.

    `models` has the class of each head, by the names in `config.heads`. Each takes the config, and
    the headless one `add_pooling_layer` too if the family has pooling. `stacks(config)` are its
    stacks of blocks: one, or one over space and one over time. `flops(config, head, visible,
    decoded, all_tokens)` counts a forward pass, see `vivit_jax.models.flops`.
    `init_inputs(config, head)` are the arguments besides a clip that initialisation needs.
    """

    config: type[Config]
    models: Mapping[str, type[nn.Module]]
    stacks: Callable[[Any], tuple[StackSpec, ...]]
    flops: Callable[[Any, str, int | None, int | None, bool], Flops]
    init_inputs: Callable[[Any, str], dict[str, Any]] = _no_inputs
