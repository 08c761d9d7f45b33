# SPDX-License-Identifier: Apache-2.0
"""How much arithmetic the parts of a transformer take: the terms that families add up.

Counted are matrix products, two operations per multiply-add.
"""

import dataclasses
import math

from vivit_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one clip's forward pass: tubelet embedding, blocks, and what reads the blocks.

    The parts differ in training: pixels get no gradient, and only blocks are ever recomputed.
    """

    embedding: int
    blocks: int
    heads: int = 0


def product(rows: int, inputs: int, outputs: int) -> int:
    """[rows, inputs] times [inputs, outputs]."""
    return 2 * rows * inputs * outputs


def embedding(config: Config, tokens: int) -> int:
    """The projection of so many tubelets."""
    return product(tokens, math.prod(config.tubelet) * config.num_channels, config.hidden_size)


def classifier(config: Config, head: str, tokens: int = 0) -> int:
    """The classifier of one clip, and the attentive pool of its tokens; 0 for another head."""
    if head != "classification":
        return 0
    d, found = config.hidden_size, product(1, config.hidden_size, config.num_labels)
    if config.attentive_heads is not None:
        # The query and the keys' kernel; scores and weighted sums of tokens; the values' kernel.
        found += 2 * product(1, d, d) + 2 * product(tokens, d, config.attentive_heads)
    return found


def attended_width(config: Config) -> int:
    """Width of all heads together: hidden_size, unless heads have a width of their own."""
    return config.num_attention_heads * config.head_width


def block(config: Config, tokens: int, attended: int, attention_layers: int = 1) -> int:
    """One block. `attended` is keys times width: what a query reads of keys, and again of values.

    Query, key, value and output projections for each attention layer, then one MLP.
    """
    d, f = config.hidden_size, config.intermediate_size
    projections = attention_layers * 4 * product(tokens, d, attended_width(config))
    return projections + 2 * (2 * tokens * attended) + 2 * product(tokens, d, f)


def joint_blocks(config: Config, layers: int, tokens: int, num_queries: int | None = None) -> int:
    """Blocks in which all tokens attend to all; the last one for `num_queries` tokens only."""
    d, a, f = config.hidden_size, attended_width(config), config.intermediate_size
    one = block(config, tokens, tokens * a)
    if num_queries is None or not layers:
        return layers * one
    # Keys and values of all tokens; queries, output projection and MLP of those that are read.
    last = 2 * product(tokens, d, a)
    last += 2 * product(num_queries, d, a) + 2 * product(num_queries, d, f)
    return (layers - 1) * one + last + 2 * (2 * num_queries * tokens * a)
