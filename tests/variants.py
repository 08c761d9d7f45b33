# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of every form of ViViT; frames, height, width and counts all differ."""

from numpy_vivit import forward
from tiny import VIVIT

import vivit_jax

SIZES = VIVIT | dict(num_temporal_layers=2)
FE, FSA, FDP = (f"factorised_{kind}" for kind in ("encoder", "self_attention", "dot_product"))
VARIANTS = {
    "joint": dict(attention_type="joint"),
    "joint mean": dict(attention_type="joint", pooling="mean"),
    "joint max": dict(attention_type="joint", pooling="max"),
    "joint sum": dict(attention_type="joint", pooling="sum"),
    "joint sampled": dict(attention_type="joint", num_sampled_frames=4),
    "encoder": dict(attention_type=FE),
    "encoder mean": dict(attention_type=FE, pooling="mean"),
    "encoder max": dict(attention_type=FE, pooling="max"),
    "encoder sum": dict(attention_type=FE, pooling="sum"),
    "encoder spatial only": dict(attention_type=FE, spatial_only=True),
    "encoder spatial only max": dict(attention_type=FE, spatial_only=True, pooling="max"),
    "encoder sampled": dict(attention_type=FE, num_sampled_frames=4),
    "self-attention time first": dict(attention_type=FSA, attention_order="time_space"),
    "self-attention space first": dict(attention_type=FSA, attention_order="space_time"),
    "self-attention sum": dict(attention_type=FSA, pooling="sum"),
    "dot product": dict(attention_type=FDP),
    "dot product max": dict(attention_type=FDP, pooling="max"),
    "dot product sampled": dict(attention_type=FDP, num_sampled_frames=4),
}


def variant_config(case, **changes):
    values = {**SIZES, **VARIANTS[case]}
    if values.get("num_sampled_frames"):
        values["tubelet_size"] = (1, *values["tubelet_size"][1:])
    return vivit_jax.VivitConfig(**{**values, **changes})


def reference(config, params, pixels):
    """What numpy_vivit computes for a configuration, from parameters under scenic's names."""
    return forward(
        params,
        pixels,
        attention_type=config.attention_type,
        attention_order=config.attention_order,
        pooling=config.pooling,
        tubelet=config.tubelet_size,
        sampled_frames=config.num_sampled_frames,
        spatial_only=config.spatial_only,
    )
