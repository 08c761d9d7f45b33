# SPDX-License-Identifier: Apache-2.0
"""Named configurations of published models, with the parameter count each must have.

`vivit_jax.PRESETS["videomae-base"].config`; change one with `dataclasses.replace`.
"""

import dataclasses
from types import MappingProxyType

from vivit_jax.config import VideoMAEConfig, VivitConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A configuration, the head it is for and where weights of it are published."""

    config: VivitConfig | VideoMAEConfig
    head: str  # "classification" | "pretraining"
    num_params: int
    source: str | None  # HuggingFace hub id, None where no such weights are published
    note: str


# Widths, depths and heads as in the published config.json files. HuggingFace's small has 16 heads
# of width 24 where the authors' has 6 of 64: same shapes, another function.
_VIDEOMAE = {
    "small": dict(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=16,
        decoder_hidden_size=192,
        decoder_intermediate_size=768,
        decoder_num_hidden_layers=12,
        decoder_num_attention_heads=3,
    ),
    "base": {},
    "large": dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        decoder_hidden_size=512,
        decoder_intermediate_size=2048,
        decoder_num_hidden_layers=12,
        decoder_num_attention_heads=8,
    ),
    "huge": dict(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        decoder_hidden_size=640,
        decoder_intermediate_size=2560,
        decoder_num_hidden_layers=12,
        decoder_num_attention_heads=8,
    ),
}


def _videomae(size: str, num_params: int, hub_name: str | None, num_labels: int | None, note: str):
    if num_labels is None:
        head, values = "pretraining", dict(use_mean_pooling=False)
    else:
        head, values = "classification", dict(num_labels=num_labels)
    config = VideoMAEConfig(**_VIDEOMAE[size], **values)
    return Preset(config, head, num_params, hub_name and f"MCG-NJU/{hub_name}", note)


PRESETS = MappingProxyType(
    {
        "vivit-b-16x2-kinetics400": Preset(
            VivitConfig(num_labels=400),
            "classification",
            88_954_000,
            "google/vivit-b-16x2-kinetics400",
            "joint space-time attention, 32 frames",
        ),
        "videomae-small": _videomae("small", 27_586_752, None, None, "masked pre-training"),
        "videomae-base": _videomae(
            "base", 94_210_944, "videomae-base", None, "masked pre-training, Kinetics-400"
        ),
        "videomae-large": _videomae(
            "large", 342_996_992, "videomae-large", None, "masked pre-training, Kinetics-400"
        ),
        "videomae-huge": _videomae("huge", 692_487_296, None, None, "masked pre-training"),
        "videomae-small-kinetics400": _videomae(
            "small", 22_033_936, "videomae-small-finetuned-kinetics", 400, "Kinetics-400"
        ),
        "videomae-base-kinetics400": _videomae(
            "base", 86_534_800, "videomae-base-finetuned-kinetics", 400, "Kinetics-400"
        ),
        "videomae-large-kinetics400": _videomae(
            "large", 304_270_736, "videomae-large-finetuned-kinetics", 400, "Kinetics-400"
        ),
        "videomae-huge-kinetics400": _videomae(
            "huge", 632_119_440, "videomae-huge-finetuned-kinetics", 400, "Kinetics-400"
        ),
        "videomae-small-ssv2": _videomae(
            "small", 21_946_926, "videomae-small-finetuned-ssv2", 174, "Something-Something v2"
        ),
        "videomae-base-ssv2": _videomae(
            "base", 86_361_006, "videomae-base-finetuned-ssv2", 174, "Something-Something v2"
        ),
        "videomae-large-ssv2": _videomae("large", 304_039_086, None, 174, "Something-Something v2"),
        "videomae-huge-ssv2": _videomae("huge", 631_829_934, None, 174, "Something-Something v2"),
    }
)
