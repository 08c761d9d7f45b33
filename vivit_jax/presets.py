# SPDX-License-Identifier: Apache-2.0
"""Named configurations of published models, with the parameter count each must have.

`vivit_jax.PRESETS["videomae-base"].config`; change one with `dataclasses.replace`.
"""

import dataclasses
from types import MappingProxyType
from typing import Any

from vivit_jax.config import Config, VideoMAEConfig, VivitConfig


@dataclasses.dataclass(frozen=True)
class Preset:
    """A configuration, the head it is for and where weights of it are published."""

    config: Config
    head: str  # "classification" | "pretraining"
    num_params: int
    source: str | None  # HuggingFace hub id, None where no such weights are published
    note: str
    scenic: bool = False  # whether scenic publishes a checkpoint of it
    dual_masks: bool = False  # whether it is pre-trained with vivit_jax.dual_mask


# Widths, depths and heads, the decoder's as V1 has them.
_VIDEOMAE: dict[str, dict[str, Any]] = {
    "small": dict(
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=6,
        decoder_hidden_size=192,
        decoder_intermediate_size=768,
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
    "giant": dict(
        patch_size=14,
        hidden_size=1408,
        intermediate_size=6144,
        num_hidden_layers=40,
        num_attention_heads=16,
        decoder_hidden_size=512,
        decoder_intermediate_size=2234,  # the encoder's ratio, 48 / 11
        decoder_num_attention_heads=8,
    ),
}
# HuggingFace's small has 16 heads of width 24 where the authors' has 6 of 64: the same shapes, but
# another function. Its decoder is deeper.
_HF: dict[str, dict[str, Any]] = {
    "small": dict(num_attention_heads=16, decoder_num_hidden_layers=12)
}
# The decoder of V2 is 4 layers deep, and 512 wide in the huge model.
_V2: dict[str, dict[str, Any]] = {size: dict(decoder_num_hidden_layers=4) for size in _VIDEOMAE}
_V2["huge"] = _V2["large"] | dict(decoder_hidden_size=512, decoder_intermediate_size=2048)
_AUTHORS: dict[str, Any] = dict(layer_norm_eps=1e-6, fc_norm_eps=1e-6, decoder_norm_eps=1e-6)


def _videomae(
    num_params: int,
    num_labels: int | None,
    note: str,
    *,
    hub_name: str | None = None,
    **values: Any,
) -> Preset:
    if num_labels is None:
        head, values = "pretraining", values | dict(use_mean_pooling=False)
    else:
        head, values = "classification", values | dict(num_labels=num_labels)
    source = hub_name and f"MCG-NJU/{hub_name}"
    return Preset(VideoMAEConfig(**values), head, num_params, source, note)


def _hf(size: str, num_params: int, num_labels: int | None, note: str, hub_name=None) -> Preset:
    values = _VIDEOMAE[size] | _HF.get(size, {})
    return _videomae(num_params, num_labels, note, hub_name=hub_name, **values)


def _v1(size: str, num_params: int, num_labels: int | None = None, data: str = "") -> Preset:
    note = f"the authors' V1, {data or 'masked pre-training'}"
    return _videomae(num_params, num_labels, note, **_VIDEOMAE[size], **_AUTHORS)


def _v2(size: str, num_params: int, num_labels: int | None = None, data: str = "") -> Preset:
    values = _VIDEOMAE[size] | _V2[size] | _AUTHORS
    note = f"the authors' V2, {data or 'pre-training with dual masks'}"
    preset = _videomae(num_params, num_labels, note, **values)
    return dataclasses.replace(preset, dual_masks=num_labels is None)


_LARGE = dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)


def _vivit(
    num_params: int,
    note: str,
    num_labels: int,
    *,
    source: str | None = None,
    scenic=True,
    **values: Any,
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

_K400, _K710, _SSV2 = "Kinetics-400", "Kinetics-710", "Something-Something v2"

PRESETS = MappingProxyType(
    {
        **_VIVIT,
        # As HuggingFace computes them.
        "videomae-small": _hf("small", 27_586_752, None, "masked pre-training"),
        "videomae-base": _hf(
            "base", 94_210_944, None, f"masked pre-training, {_K400}", "videomae-base"
        ),
        "videomae-large": _hf(
            "large", 342_996_992, None, f"masked pre-training, {_K400}", "videomae-large"
        ),
        "videomae-huge": _hf("huge", 692_487_296, None, "masked pre-training"),
        "videomae-small-kinetics400": _hf(
            "small", 22_033_936, 400, _K400, "videomae-small-finetuned-kinetics"
        ),
        "videomae-base-kinetics400": _hf(
            "base", 86_534_800, 400, _K400, "videomae-base-finetuned-kinetics"
        ),
        "videomae-large-kinetics400": _hf(
            "large", 304_270_736, 400, _K400, "videomae-large-finetuned-kinetics"
        ),
        "videomae-huge-kinetics400": _hf(
            "huge", 632_119_440, 400, _K400, "videomae-huge-finetuned-kinetics"
        ),
        "videomae-small-ssv2": _hf(
            "small", 21_946_926, 174, _SSV2, "videomae-small-finetuned-ssv2"
        ),
        "videomae-base-ssv2": _hf("base", 86_361_006, 174, _SSV2, "videomae-base-finetuned-ssv2"),
        "videomae-large-ssv2": _hf("large", 304_039_086, 174, _SSV2),
        "videomae-huge-ssv2": _hf("huge", 631_829_934, 174, _SSV2),
        # As the authors compute them.
        "videomae-v1-small": _v1("small", 24_029_376),
        "videomae-v1-base": _v1("base", 94_210_944),
        "videomae-v1-large": _v1("large", 342_996_992),
        "videomae-v1-huge": _v1("huge", 692_487_296),
        "videomae-v1-small-kinetics400": _v1("small", 22_033_936, 400, _K400),
        "videomae-v1-base-kinetics400": _v1("base", 86_534_800, 400, _K400),
        "videomae-v1-large-kinetics400": _v1("large", 304_270_736, 400, _K400),
        "videomae-v1-huge-kinetics400": _v1("huge", 632_119_440, 400, _K400),
        "videomae-v1-small-ssv2": _v1("small", 21_946_926, 174, _SSV2),
        "videomae-v1-base-ssv2": _v1("base", 86_361_006, 174, _SSV2),
        "videomae-v1-base-ucf101": _v1("base", 86_304_869, 101, "UCF101"),
        "videomae-v2-small": _v2("small", 24_029_376),
        "videomae-v2-base": _v2("base", 94_210_944),
        "videomae-v2-large": _v2("large", 317_782_016),
        "videomae-v2-huge": _v2("huge", 645_659_392),
        "videomae-v2-giant": _v2("giant", 1_026_306_560),
        "videomae-v2-small-kinetics710": _v2("small", 22_153_286, 710, _K710),
        "videomae-v2-base-kinetics710": _v2("base", 86_773_190, 710, _K710),
        "videomae-v2-huge-kinetics710": _v2("huge", 632_516_550, 710, _K710),
        "videomae-v2-giant-kinetics710": _v2("giant", 1_012_611_142, 710, _K710),
        "videomae-v2-small-kinetics400": _v2("small", 22_033_936, 400, _K400),
        "videomae-v2-base-kinetics400": _v2("base", 86_534_800, 400, _K400),
        "videomae-v2-large-kinetics400": _v2("large", 304_270_736, 400, _K400),
        "videomae-v2-huge-kinetics400": _v2("huge", 632_119_440, 400, _K400),
        "videomae-v2-giant-kinetics400": _v2("giant", 1_012_174_352, 400, _K400),
        "videomae-v2-base-ssv2": _v2("base", 86_361_006, 174, _SSV2),
        "videomae-v2-large-ssv2": _v2("large", 304_039_086, 174, _SSV2),
        "videomae-v2-huge-ssv2": _v2("huge", 631_829_934, 174, _SSV2),
        "videomae-v2-giant-ssv2": _v2("giant", 1_011_855_918, 174, _SSV2),
    }
)
