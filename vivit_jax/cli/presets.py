# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax presets`: the named configurations."""

import json as json_module

import numpy as np

from vivit_jax.masking import dual_mask, tube_mask
from vivit_jax.models.flops import forward_flops
from vivit_jax.presets import PRESETS
from vivit_jax.progress import format_table


def presets(*, json: bool = False) -> None:
    """List the named models, their sizes, and where weights are.

    Args:
        json: Print one JSON object, name to config.json content and parameter count.
    """
    if json:
        listing = {
            name: {
                "head": preset.head,
                "parameters": preset.num_params,
                "source": preset.source,
                "scenic": preset.scenic,
                "config": preset.config.to_dict(),
            }
            for name, preset in PRESETS.items()
        }
        print(json_module.dumps(listing, indent=2))
        return
    rows = [
        ("name", "parameters", "GFLOP", "input", "tokens", "layers", "width", "heads", "published")
    ]
    for name, preset in PRESETS.items():
        config = preset.config
        temporal = config.temporal_layers
        visible, decoded = None, None
        if preset.head == "pretraining":
            make = dual_mask if preset.dual_masks else tube_mask
            mask = make(np.random.default_rng(0), 1, config.grid)
            visible, decoded = mask.visible.shape[1], mask.predicted.shape[1]
        flops = forward_flops(config, preset.head, visible=visible, decoded=decoded)
        rows.append(
            (
                name,
                f"{preset.num_params:,}",
                f"{flops / 1e9:.0f}",
                "x".join(map(str, (config.num_frames, *config.frame_size))),
                str(config.num_tokens),
                f"{config.num_hidden_layers}+{temporal}"
                if temporal
                else str(config.num_hidden_layers),
                str(config.hidden_size),
                str(config.num_attention_heads),
                preset.source or ("scenic" if preset.scenic else "-"),
            )
        )
    print("\n".join(format_table(rows, align="left")))
    print("GFLOP: matrix products of one clip's forward pass, 2 per multiply-add")
