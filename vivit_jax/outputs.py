# SPDX-License-Identifier: Apache-2.0
"""What the models return: pytrees whose absent parts are None, read like transformers' outputs.

`out.logits`, `out["logits"]`, `out[0]`, `out[:2]`, `out.keys()`, `dict(out)` and `out.to_tuple()`
work as on transformers' ModelOutput: only attributes show the parts that are None, and those that
transformers does not return at all (`decoder_hidden_states`).

`hidden_states` and `attentions` are one array with a leading layer axis; `tuple(out.hidden_states)`
gives HuggingFace's form. Index 0 of `hidden_states` is the embedding (positions added, masked
tokens removed), index i the output of block i; the last one precedes the final norm. If some were
asked for by index, it is a tuple with None for the others.

A factorised ViViT's work over time has fields of its own. A factorised encoder has hidden states
per stage: [layers + 1, b, t, tokens of a frame, d] and, over the class token and the frames,
`temporal_hidden_states`. Attention over space is [layers, b, t, n, s, s], over time
[temporal layers, b, n, k, k] in a factorised encoder, [layers, b, s, n, t, t] in the others; in the
dot-product model each holds half of the heads.

Fields have their shapes in comments, not as array types: trees of these classes also hold tracers,
shapes and shardings.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.struct
import jax
import numpy as np
from jaxtyping import Float

from vivit_jax.errors import UserError

# One array with a leading layer axis, or the layers that were asked for and None for the others.
Layers = jax.Array | tuple[jax.Array | None, ...]
# For callers that read nothing but the results, whatever the configuration asks for.
RESULTS_ONLY: dict[str, Any] = {"output_hidden_states": False, "output_attentions": False}


def asked_for(
    config,
    output_hidden_states: bool | int | Sequence[int] | None,
    output_attentions: bool | None,
) -> tuple[bool | tuple[int, ...], bool]:
    """What a model reports: all hidden states, some by index or none; attentions or not.

    None stands for the configuration's value. As in transformers, negative indices count from the
    end, an index without a state selects nothing, and 0 alone asks for nothing. Raises UserError
    for anything but a flag or indices.
    """
    states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    attentions = config.output_attentions if output_attentions is None else output_attentions
    if isinstance(states, bool | np.bool_):
        return bool(states), bool(attentions)
    chosen = (states,) * bool(states) if isinstance(states, int | np.integer) else tuple(states)
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in chosen):
        raise UserError(
            f"output_hidden_states must be true, false or indices of hidden states, got {states!r}"
        )
    return tuple(map(int, chosen)) or False, bool(attentions)


def choose_states(
    hidden: Float[jax.Array, "layers_and_input ..."] | None, asked: bool | tuple[int, ...]
) -> Layers | None:
    """The hidden states that were asked for, None in place of the others."""
    if hidden is None or isinstance(asked, bool):
        return hidden
    count = len(hidden)
    wanted = {i % count for i in asked if -count <= i < count}
    return tuple(hidden[i] if i in wanted else None for i in range(count))


def attribute_only() -> Any:
    """A field that transformers' output lacks; it is read by its name only."""
    return dataclasses.field(default=None, metadata={"attribute_only": True})


class _Output(Mapping):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]  # its subclasses are dataclasses

    def _parts(self) -> dict[str, Any]:
        fields = (f.name for f in dataclasses.fields(self) if "attribute_only" not in f.metadata)
        found = ((name, getattr(self, name)) for name in fields)
        return {name: value for name, value in found if value is not None}

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._parts()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self):
        return iter(self._parts())

    def __len__(self) -> int:
        return len(self._parts())

    def to_tuple(self) -> tuple:
        """The parts that are not None, in order: HuggingFace's `return_dict=False`."""
        return tuple(self._parts().values())


@flax.struct.dataclass
class ModelOutput(_Output):
    """Output of the headless models."""

    last_hidden_state: jax.Array  # [b, l, d]
    pooler_output: jax.Array | None = None  # [b, pooler width]
    hidden_states: Layers | None = None  # [layers + 1, b, l, d]
    attentions: jax.Array | None = None  # [layers, b, n, l, l]
    temporal_hidden_states: jax.Array | None = None  # [temporal layers + 1, b, k, d]
    temporal_attentions: jax.Array | None = None


@flax.struct.dataclass
class ClassifierOutput(_Output):
    """Output of the classification models; `loss` is there when labels were given."""

    loss: jax.Array | None = None  # []
    logits: jax.Array | None = None  # [b, classes]
    hidden_states: Layers | None = None  # [layers + 1, b, l, d]
    attentions: jax.Array | None = None  # [layers, b, n, l, l]
    temporal_hidden_states: jax.Array | None = None  # [temporal layers + 1, b, k, d]
    temporal_attentions: jax.Array | None = None


@flax.struct.dataclass
class PreTrainingOutput(_Output):
    """Output of masked pre-training; hidden states and attentions are the encoder's.

    `decoder_hidden_states` comes with `hidden_states`; HuggingFace does not return it.
    """

    loss: jax.Array | None = None  # []
    logits: jax.Array | None = None  # [b, k, patch values], in the order of mask.predicted
    hidden_states: Layers | None = None  # [layers + 1, b, visible, d]
    attentions: jax.Array | None = None  # [layers, b, n, visible, visible]
    # [decoder layers + 1, b, v + k, decoder width]
    decoder_hidden_states: jax.Array | None = attribute_only()
