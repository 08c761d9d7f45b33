# SPDX-License-Identifier: Apache-2.0
"""What the models return: pytrees whose absent parts are None.

`hidden_states` and `attentions` are one array with a leading layer axis; `tuple(x)` gives
HuggingFace's form. Index 0 of `hidden_states` is the embedding (positions added, masked tokens
removed), index i the output of block i; the last one precedes the final norm.

What a factorised ViViT does over time is in fields of its own. A factorised encoder has hidden
states per stage: [layers + 1, b, t, tokens of a frame, d] and, over the class token and the frames,
`temporal_hidden_states`. Attention over space is [layers, b, t, n, s, s], over time
[temporal layers, b, n, k, k] in a factorised encoder, [layers, b, s, n, t, t] in the others; in the
dot-product model each holds half of the heads.
"""

import dataclasses

import flax.struct
import jax


class _Output:
    def to_tuple(self) -> tuple:
        """The fields that are not None, in order: HuggingFace's `return_dict=False`."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)


@flax.struct.dataclass
class ModelOutput(_Output):
    """Output of the headless models."""

    last_hidden_state: jax.Array  # [b, l, d]
    pooler_output: jax.Array | None = None  # [b, pooler width]
    hidden_states: jax.Array | None = None  # [layers + 1, b, l, d]
    attentions: jax.Array | None = None  # [layers, b, n, l, l]
    temporal_hidden_states: jax.Array | None = None  # [temporal layers + 1, b, k, d]
    temporal_attentions: jax.Array | None = None


@flax.struct.dataclass
class ClassifierOutput(_Output):
    """Output of the classification models; `loss` is there when labels were given."""

    loss: jax.Array | None = None  # []
    logits: jax.Array | None = None  # [b, classes]
    hidden_states: jax.Array | None = None  # [layers + 1, b, l, d]
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
    hidden_states: jax.Array | None = None  # [layers + 1, b, visible, d]
    attentions: jax.Array | None = None  # [layers, b, n, visible, visible]
    decoder_hidden_states: jax.Array | None = None  # [decoder layers + 1, b, v + k, decoder width]
