# SPDX-License-Identifier: Apache-2.0
"""What a model family is: what builds, initialises and measures its models, in one record.

A new family is a config in `vivit_jax.config` (its fields, its names in config.json and in texts,
its heads, how its papers read videos), a module file here with the models and their `Family`, a
weight table in `checkpoints_convert.tables` for each layout, and a line in `config.py`, in
`registry.FAMILIES` and in the layout. From outside, `registry.register_family` and
`checkpoints_convert.layouts.registry.register_table` take the place of these lines, as
tests/models/test_family.py shows. Named sizes go into `vivit_jax.presets`, recipes into
`vivit_jax.recipes`, the initial values of its paper into `vivit_jax.train.start.initial_params`.
"""

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
