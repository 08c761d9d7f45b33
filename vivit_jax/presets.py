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
    scenic: bool = False  # whether scenic publishes a checkpoint of it


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


_LARGE = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


def _vivit(
    num_params: int, note: str, num_labels: int, *, source: str | None = None, scenic=True, **values
) -> Preset:
    config = VivitConfig(num_labels=num_labels, **values)
    return Preset(config, "classification", num_params, source, note, scenic)


def _factorised_encoder(*args, num_temporal_layers: int, **values) -> Preset:
    values |= dict(attention_type="factorised_encoder", num_temporal_layers=num_temporal_layers)
    return _vivit(*args, **values)


# The model zoo of scenic, and the two variants of the paper that it has no weights of. The depth of
# the temporal stage differs between the large models.
_VIVIT = {
    "vivit-b-16x2-kinetics400": _vivit(
        88_954_000,
        "joint space-time attention, 32 frames",
        400,
        source="google/vivit-b-16x2-kinetics400",
    ),
    "vivit-b-16x2-fe-kinetics400": _factorised_encoder(
        115_062_928, "factorised encoder, 12 + 4 layers", 400, num_temporal_layers=4
    ),
    "vivit-b-16x2-fsa-kinetics400": _vivit(
        117_319_312,
        "factorised self-attention, time then space",
        400,
        scenic=False,
        attention_type="factorised_self_attention",
    ),
    "vivit-b-16x2-fdp-kinetics400": _vivit(
        88_952_464,
        "factorised dot-product attention",
        400,
        scenic=False,
        attention_type="factorised_dot_product",
    ),
    "vivit-l-16x2-fe-kinetics400": _factorised_encoder(
        606_827_920, "factorised encoder, 24 + 24 layers", 400, num_temporal_layers=24, **_LARGE
    ),
    "vivit-l-16x2-fe-kinetics600": _factorised_encoder(
        607_032_920, "factorised encoder, 24 + 24 layers", 600, num_temporal_layers=24, **_LARGE
    ),
    "vivit-l-16x2-fe-ssv2": _factorised_encoder(
        354_733_230,
        "factorised encoder, 24 + 4 layers, 256 pixels, Something-Something v2",
        174,
        num_temporal_layers=4,
        image_size=256,
        drop_path_rate=0.3,
        **_LARGE,
    ),
    "vivit-l-16x2-fe-epic-kitchens": _factorised_encoder(
        354_900_365,
        "factorised encoder, 24 + 4 layers, Epic-Kitchens nouns and verbs",
        397,
        num_temporal_layers=4,
        class_splits=(300, 97),
        split_names=("noun", "verb"),
        drop_path_rate=0.2,
        **_LARGE,
    ),
}

PRESETS = MappingProxyType(
    {
        **_VIVIT,
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
