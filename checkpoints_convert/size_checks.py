# SPDX-License-Identifier: Apache-2.0
"""Compares a config with the tensors beside it before a model of its sizes is built.

`rules.match_import` lists everything that does not fit, but needs the shapes of the whole model. A
config with a million layers or terabytes of positions is refused here, by cheap comparisons.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from checkpoints_convert.rules import Rule, expand
from vivit_jax.config import Config
from vivit_jax.errors import CheckpointError
from vivit_jax.files.limits import check_unpacked

_LISTED = 200  # missing tensors, beyond as many as there are, that are still worth a list
_CHEAP_AXIS = 2**14


def check_sizes(
    title: str,
    tensors: Mapping[str, Any],
    config: Config,
    rules: Iterable[Rule],
    head: str = "none",
) -> None:
    """CheckpointError where the config is far larger than the tensors; data is not read."""
    rules = list(rules)
    wanted = sum(rule.layers or 1 for rule in rules)
    if wanted > 2 * len(tensors) + _LISTED:
        missing = next(row.src for row in expand(rules) if row.dst and row.src not in tensors)
        raise CheckpointError(
            f"{title} does not fit the model: its config needs {wanted:,} tensors, the files hold "
            f"{len(tensors):,}, and {missing} is the first that is missing; compare the numbers of "
            "layers in the config with the files"
        )
    longest = max((n for tensor in tensors.values() for n in tensor.shape), default=0)
    for name, size in _axes(config, head).items():
        if size > max(longest, _CHEAP_AXIS):
            raise CheckpointError(
                f"{title} does not fit the model: wrong shape: its config says {name} {size:,}, "
                f"and the longest axis of its tensors is {longest:,}"
            )
    for what, size in config.computed_tables(head).items():
        check_unpacked(f"{title} asks in its config for {what}: it", size, 0, CheckpointError)


def _axes(config: Config, head: str) -> dict[str, int]:
    """Sizes of the config that are the length of some tensor's axis, by name."""
    names = ["hidden_size", "intermediate_size", "num_channels"]
    if head == "classification":
        names.append("num_labels")
    if head == "pretraining":
        names += ["decoder_hidden_size", "decoder_intermediate_size"]
    axes = {name: getattr(config, name) for name in names}
    positions = config.learned_positions()
    return axes | {"positions": positions} if positions else axes
