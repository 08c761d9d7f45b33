# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax presets`: the named configurations."""

import json as json_module


def presets(*, json: bool = False) -> None:
    """List the named model configurations with their sizes and where weights are published.

    Args:
        json: Print one JSON object, name to config.json content and parameter count.
    """
    from vivit_jax.presets import PRESETS

    if json:
        listing = {
            name: {
                "head": preset.head,
                "parameters": preset.num_params,
                "source": preset.source,
                "config": preset.config.to_dict(),
            }
            for name, preset in PRESETS.items()
        }
        print(json_module.dumps(listing, indent=2))
        return
    head = ("name", "parameters", "input (t, h, w)", "tokens", "layers", "width", "heads")
    rows = [(*head, "published as")]
    for name, preset in PRESETS.items():
        config = preset.config
        rows.append(
            (
                name,
                f"{preset.num_params:,}",
                "x".join(map(str, (config.num_frames, *config.frame_size))),
                str(config.num_tokens),
                str(config.num_hidden_layers),
                str(config.hidden_size),
                str(config.num_attention_heads),
                preset.source or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
