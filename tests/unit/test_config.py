# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math

import jax
import pytest
from helpers import mostly_slow
from variants import FDP, FSA, VARIANTS, variant_config

from vivit_jax import PRESETS, ConfigError, VideoMAEConfig, VivitConfig
from vivit_jax.config import config_from_dict
from vivit_jax.config_base import HIDDEN_ACTS
from vivit_jax.layers.linear import ACTIVATIONS
from vivit_jax.models.build import abstract_params, build_model


# One in six of the list, which goes from model to model and from size to size.
@pytest.mark.parametrize("name", mostly_slow(PRESETS, *[*PRESETS][::6]))
def test_preset_has_the_published_parameter_count(name):
    preset = PRESETS[name]
    model = build_model(preset.config, preset.head)
    leaves = jax.tree.leaves(abstract_params(model))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == preset.num_params


@pytest.mark.parametrize(
    "config",
    [
        VivitConfig(),
        VideoMAEConfig(),
        PRESETS["videomae-small"].config,
        *(variant_config(case) for case in VARIANTS),
        PRESETS["vivit-l-16x2-fe-epic-kitchens"].config,
        VivitConfig(drop_path_rate=0.3, drop_path_rescale=True),
        VideoMAEConfig(drop_path_rate=0.3, drop_path_rescale=False),
        PRESETS["videomae-v2-giant"].config,
        VideoMAEConfig(cosine_attention=True, layer_scale_init=1e-4, head_dropout=0.5),
        VideoMAEConfig(num_channels=2, image_mean=(0.1, -2.0), image_std=(3, 0.5)),
    ],
)
def test_dict_round_trip(config):
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize("case", VARIANTS)
def test_model_type_says_who_computes_it(case):
    config = variant_config(case)
    plain = case == "joint"
    assert config.in_transformers is plain
    values = config.to_dict()
    assert values["model_type"] == ("vivit" if plain else "vivit_jax")
    assert ("pooling" in values and "attention_type" in values) is not plain
    json.dumps(values)


# Parameters of the authors' models: V1 and V2, pre-training and fine-tuned, as the reference notes
# give them.
AUTHORS = {
    "v1-small": 24_029_376,
    "v1-base": 94_210_944,
    "v1-large": 342_996_992,
    "v1-huge": 692_487_296,
    "v1-small-kinetics400": 22_033_936,
    "v1-base-kinetics400": 86_534_800,
    "v1-large-kinetics400": 304_270_736,
    "v1-huge-kinetics400": 632_119_440,
    "v2-small": 24_029_376,
    "v2-base": 94_210_944,
    "v2-large": 317_782_016,
    "v2-huge": 645_659_392,
    "v2-giant": 1_026_306_560,
    "v2-giant-kinetics710": 1_012_611_142,
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_models(name):
    preset = PRESETS[f"videomae-{name}"]
    config, version = preset.config, name[:2]
    assert preset.num_params == AUTHORS[name]
    assert (config.layer_norm_eps, config.fc_norm_eps, config.decoder_norm_eps) == (1e-6,) * 3
    large = version == "v1" and ("large" in name or "huge" in name)
    assert config.decoder_num_hidden_layers == (12 if large else 4)
    wide = {"small": 64, "base": 64, "large": 64, "huge": 80, "giant": 88}
    size = name.split("-")[1]
    assert config.hidden_size // config.num_attention_heads == wide[size]
    assert config.decoder_hidden_size // config.decoder_num_attention_heads == (
        80 if name.startswith("v1-huge") else 64
    )
    assert preset.dual_masks is (version == "v2" and preset.head == "pretraining")


def test_giant():
    config = PRESETS["videomae-v2-giant"].config
    assert (config.tubelet, config.num_tokens, config.patch_values) == ((2, 14, 14), 2048, 1176)
    assert (config.intermediate_size, config.decoder_intermediate_size) == (6144, 2234)


@pytest.mark.parametrize("values", [dict(cosine_attention=True), dict(layer_scale_init=0.1)])
def test_transformers_refuses_what_only_the_authors_have(values):
    assert VideoMAEConfig().in_transformers
    config = VideoMAEConfig(**values)
    assert not config.in_transformers and config.to_dict()["model_type"] == "videomae_jax"
    assert config.decoder().to_dict().items() >= values.items()


def test_statistics_of_pixels():
    one = VideoMAEConfig(num_channels=4, image_mean=0.5, image_std=0.25)
    assert one.image_mean == (0.5,) * 4 and one.image_std == (0.25,) * 4
    for values, message in (
        (dict(image_mean=0.5), "image_mean is 0.5 and image_std None; give both"),
        (
            dict(image_mean=(0.5,), image_std=1.0),
            "image_mean must be a number for each of 3 channe",
        ),
        (dict(image_mean=0.5, image_std=(1, 0, 1)), "image_std must be a number above 0 for each"),
        (dict(image_mean="imagenet", image_std=1.0), "image_mean must be a number for each of 3"),
        (dict(head_dropout=1.1), r"head_dropout must be a probability in \[0, 1\]"),
        (dict(layer_scale_init=-1.0), "layer_scale_init must be a number, 0 or more"),
        (dict(cosine_attention=1), "cosine_attention must be true or false"),
    ):
        with pytest.raises(ConfigError, match=message):
            VideoMAEConfig(**values)


def test_what_training_alone_sees_keeps_the_model_type():
    values = VivitConfig(drop_path_rate=0.2, num_labels=5, class_splits=(3, 2)).to_dict()
    assert values["model_type"] == "vivit"
    assert (values["drop_path_rate"], values["class_splits"]) == (0.2, [3, 2])
    assert values["split_names"] == ["1", "2"]


def test_pooling_follows_the_attention_type():
    assert VivitConfig().pooling == "cls"
    assert VivitConfig(attention_type="factorised_encoder").pooling == "cls"
    assert VivitConfig(attention_type="factorised_self_attention").pooling == "mean"
    assert VivitConfig(attention_type="factorised_dot_product").pooling == "mean"


def test_defaults_are_transformers_defaults():
    import transformers

    for ours, theirs in ((VivitConfig, "VivitConfig"), (VideoMAEConfig, "VideoMAEConfig")):
        reference = getattr(transformers, theirs)().to_dict()
        values = ours().to_dict()
        values.pop("qkv_bias" if ours is VideoMAEConfig else "pooler_output_size")
        for key, value in values.items():
            assert reference[key] == (tuple(value) if isinstance(reference[key], tuple) else value)


def test_transformers_reads_what_we_write(tmp_path):
    import json

    import transformers

    config = VideoMAEConfig(qkv_bias=False, num_labels=3, id2label=("a", "b", "c"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    read = transformers.VideoMAEConfig.from_pretrained(tmp_path)
    assert (read.qv_bias, read.num_labels, read.id2label[2]) == (False, 3, "c")
    assert config_from_dict(read.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"qkv_bias": False}, False),
        ({"qv_bias": False}, False),
        ({"qkv_bias": True, "qv_bias": False}, True),
    ],
)
def test_both_spellings_of_the_videomae_bias(values, expected):
    import transformers

    assert VideoMAEConfig.from_dict(values).qkv_bias is expected
    assert transformers.VideoMAEConfig(**values).qv_bias is expected


def test_legacy_keys_are_tolerated():
    legacy = {"model_type": "vivit", "video_size": [32, 224, 224], "torch_dtype": "float32"}
    assert config_from_dict(legacy | {"is_decoder": False, "pruned_heads": {}}) == VivitConfig()


# What transformers 4 wrote of every model, with the defaults of text generation.
FULL_DUMP = {
    "return_dict": True, "output_hidden_states": False, "torchscript": False, "torch_dtype": None,
    "use_bfloat16": False, "pruned_heads": {}, "tie_word_embeddings": True, "max_length": 20,
    "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False, "top_k": 50,
    "cross_attention_hidden_size": None, "add_cross_attention": False, "num_beams": 1,
    "tie_encoder_decoder": False, "do_sample": False, "early_stopping": False, "temperature": 1.0,
    "bad_words_ids": None, "architectures": ["VivitModel"], "finetuning_task": None,
    "tokenizer_class": None, "pad_token_id": None, "_name_or_path": "", "label2id": {"LABEL_0": 0},
    "transformers_version": "4.30.2",
}  # fmt: skip


@pytest.mark.parametrize("family", [VivitConfig, VideoMAEConfig])
def test_keys_that_are_not_known_are_named_once_and_written_back(family, caplog):
    own = {
        "auto_map": {"AutoModel": "my.Model"},
        "loss_type": "ForVideoClassification",
        "my_notes": ["a", 1],
        "quantization_config": None,
    }
    config = family.from_dict({"model_type": family.model_type} | FULL_DUMP | own)
    assert config == family() and hash(config) == hash(family())
    (record,) = caplog.records
    for name in [*own, "max_length", "top_k", "pad_token_id"]:
        assert name in record.message
    assert "torchscript" not in record.message and "_name_or_path" not in record.message
    again = dataclasses.replace(config, num_labels=7).to_dict()
    for name, value in (FULL_DUMP | own).items():
        if name not in ("architectures", "torch_dtype", "transformers_version", "_name_or_path"):
            # What a model reports is written where it is not the default.
            default = name in ("output_hidden_states", "output_attentions") and not value
            assert name == "label2id" or default or again[name] == value
    assert not again.keys() & {"architectures", "torch_dtype", "transformers_version"}
    assert len(again["label2id"]) == 7


@pytest.mark.parametrize("family", [VivitConfig, VideoMAEConfig])
def test_null_of_a_field_that_transformers_does_not_have_says_nothing(family):
    own = [f.name for f in dataclasses.fields(family) if f.metadata.get("only_if_set")]
    assert {"drop_path_rate", "class_splits"} <= set(own)
    null = dict.fromkeys(own)
    assert family.from_dict({"model_type": family.model_type} | null) == family()
    with pytest.raises(ConfigError, match="got None"):
        family.from_dict({"model_type": family.own_model_type} | null)


def test_common_keys_are_kept_without_a_word(caplog):
    config = VivitConfig.from_dict({"video_size": [32, 224, 224], "use_cache": True})
    assert not caplog.records
    assert config.to_dict()["video_size"] == [32, 224, 224]
    assert config_from_dict(config.to_dict() | {"mine": 1}, warn=False).extra["mine"] == 1
    assert not caplog.records


@pytest.mark.parametrize("family", ["Vivit", "VideoMAE"])
def test_what_is_refused_is_what_transformers_computes_with(family):
    """Of the keys that no field has: those refused change its outputs, those kept do not."""
    import torch
    import transformers

    small = dict(image_size=16, num_frames=2, hidden_size=8, num_hidden_layers=1)
    small |= dict(num_attention_heads=2, intermediate_size=16)
    if family == "Vivit":
        small["tubelet_size"] = [1, 8, 8]
    else:
        small |= dict(tubelet_size=1, patch_size=8, use_mean_pooling=False)
    make = getattr(transformers, f"{family}Model")
    ours = {"Vivit": VivitConfig, "VideoMAE": VideoMAEConfig}[family]
    torch.manual_seed(0)
    weights = make(getattr(transformers, f"{family}Config")(**small)).state_dict()
    clip = torch.randn(1, 2, 3, 16, 16)

    def computed(**extra):
        model = make(getattr(transformers, f"{family}Config")(**small, **extra)).eval()
        model.load_state_dict(weights)
        with torch.no_grad():
            return model(clip, output_hidden_states=True).hidden_states[-1]

    plain = computed()
    for extra in [
        {"is_decoder": True}, {"add_cross_attention": True}, {"is_encoder_decoder": True},
        {"chunk_size_feed_forward": 1}, {"pruned_heads": {"0": [0]}}, {"sliding_window": 1},
        {"position_embedding_type": "relative_key"}, {"attention_dropout": 0.5}, {"vocab_size": 9},
        {"loss_type": "ForSegmentation"}, {"per_layer_config": {}}, {"quantization_config": None},
        {"tie_last_hidden_states": False}, {"is_causal": False}, {"my_own": "x"},
    ]:  # fmt: skip
        assert torch.equal(computed(**extra), plain), extra
        assert ours.from_dict(small | extra).extra == extra
    for extra in [{"tie_last_hidden_states": True}, {"is_causal": True}]:
        changes = not torch.equal(computed(**extra), plain)
        assert changes == (family == "Vivit" or "is_causal" not in extra)
        if changes:
            with pytest.raises(ConfigError, match=f"does not implement: {[*extra][0]}=True"):
                ours.from_dict(small | extra)
    for extra in [{"quantization_config": {"bits": 4}}, {"per_layer_config": {"0": {"a": 1}}}]:
        with pytest.raises(ConfigError, match=f"does not implement: {[*extra][0]}="):
            ours.from_dict(small | extra)


def test_labels():
    config = VivitConfig.from_dict({"id2label": {"1": "b", "0": "a", "2": "c"}})
    assert config.num_labels == 3 and config.labels == ("a", "b", "c")
    assert VivitConfig(num_labels=2).labels == ("LABEL_0", "LABEL_1")
    placeholders = VivitConfig.from_dict({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    assert placeholders.id2label is None


def test_activations_are_complete():
    assert set(ACTIVATIONS) == set(HIDDEN_ACTS)


def test_execution_fields_are_not_written():
    config = VivitConfig(dtype="bfloat16", attention="xla", remat="block", scan_layers=False)
    assert config.to_dict() == VivitConfig().to_dict()
    assert hash(config) != hash(VivitConfig())


def test_extra_epsilons_are_written_only_where_they_differ_from_huggingface():
    assert "fc_norm_eps" not in VideoMAEConfig().to_dict()
    assert VideoMAEConfig(fc_norm_eps=1e-6).to_dict()["fc_norm_eps"] == 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VivitConfig(image_size=(16, 15)), r"image_size \(16, 15\) .* patch width of 16"),
        (lambda: VivitConfig(num_frames=1), "num_frames 1 is less than one tubelet length of 2"),
        (lambda: VivitConfig(tubelet_size=(2, 16)), "tubelet_size must be 3 positive integers"),
        (lambda: VivitConfig(hidden_act="geglu"), "hidden_act must be one of .* got 'geglu'"),
        (lambda: VivitConfig(hidden_act="prelu"), "hidden_act is 'prelu', .* trained parameters"),
        (lambda: VivitConfig(pooler_act="xielu"), "pooler_act is 'xielu', .* trained parameters"),
        (lambda: VivitConfig(head_dim=0), "head_dim must be a positive integer or null, got 0"),
        (
            lambda: VivitConfig(num_hidden_layers=0, attention_type=FSA),
            "num_hidden_layers must be a positive integer for attention_type 'fact.* got 0",
        ),
        (lambda: VivitConfig(hidden_size=100), "hidden_size 100 .* num_attention_heads 12"),
        (lambda: VivitConfig(num_labels=3, id2label=("a",)), "num_labels is 3 .* names 1"),
        (lambda: VivitConfig(hidden_dropout_prob=1.5), "probability"),
        (lambda: VivitConfig(qkv_bias=1), "qkv_bias must be true or false, got 1"),
        (lambda: VivitConfig(hidden_size=12 * 10**30), "hidden_size must be a positive integer"),
        (lambda: VivitConfig(layer_norm_eps="1e-6"), "layer_norm_eps must be a number, 0 or more"),
        (lambda: VivitConfig(layer_norm_eps=-1.0), "layer_norm_eps must be a number, 0 or more"),
        (lambda: VivitConfig(initializer_range=None), "initializer_range must be a number"),
        (lambda: VivitConfig(pooler_output_size="a"), "pooler_output_size must be a positive"),
        (lambda: VivitConfig.from_dict({"id2label": "abc"}), "id2label must map .* got 'abc'"),
        (lambda: VivitConfig(attention="flash"), "attention must be one of"),
        (lambda: VivitConfig(remat=True), "remat must be one of"),
        (lambda: VivitConfig(attention_type="factorized_encoder"), "attention_type must be one of"),
        (lambda: VivitConfig(attention_order="space"), "attention_order must be one of"),
        (lambda: VivitConfig(pooling="gap"), "pooling must be one of .* got 'gap'"),
        (lambda: VivitConfig(attention_type=FSA, pooling="cls"), "use pooling 'mean', 'max'"),
        (
            lambda: VivitConfig(attention_type=FDP, num_attention_heads=3),
            "num_attention_heads 3 must be even",
        ),
        (lambda: VivitConfig(num_temporal_layers=0), "num_temporal_layers must be a positive"),
        (lambda: VivitConfig(spatial_only=True), "spatial_only needs .*factorised_encoder"),
        (lambda: VivitConfig(zero_init_temporal_attention=True), "needs .*self_attention"),
        (lambda: VivitConfig(num_sampled_frames=8), r"use tubelet_size=\(1, 16, 16\)"),
        (
            lambda: VivitConfig(num_sampled_frames=64, tubelet_size=(1, 16, 16)),
            "64 exceeds num_frames 32",
        ),
        (lambda: VivitConfig(num_sampled_frames=0), "num_sampled_frames must be a positive"),
        (lambda: VivitConfig(drop_path_rate=1.0), "drop_path_rate must be a probability"),
        (lambda: VivitConfig(class_splits=(300, 97)), "sum to 397 but num_labels is 2"),
        (lambda: VivitConfig(num_labels=3, class_splits=(3,)), "two or more positive"),
        (lambda: VivitConfig(split_names=("a", "b")), "split_names must be null"),
        (
            lambda: VivitConfig(num_labels=3, class_splits=(2, 1), split_names=("a", "a")),
            "split_names must be 2 different names",
        ),
        (
            lambda: VivitConfig(
                num_labels=3, class_splits=(2, 1), problem_type="multi_label_classification"
            ),
            "class_splits needs problem_type",
        ),
        (
            lambda: VideoMAEConfig(decoder_num_attention_heads=5).decoder(),
            "decoder_hidden_size 384",
        ),
        (lambda: VideoMAEConfig(num_hidden_layers=-1), "num_hidden_layers must be an integer, 0"),
        (
            lambda: VivitConfig(num_labels=1, problem_type="single_label_classification"),
            "regression",
        ),
        (lambda: VivitConfig.from_dict({"model_type": "videomae"}), "expected 'vivit'"),
        (
            lambda: VivitConfig.from_dict({"is_causal": True, "quantization_config": {"bits": 4}}),
            "does not implement: is_causal=True, quantization_config={'bits': 4}",
        ),
        (lambda: VivitConfig.from_dict({"id2label": {"zero": "a"}}), "class indices"),
        (lambda: config_from_dict({"model_type": "bert"}), "'bert', expected one of"),
        (lambda: config_from_dict({}), "model_type is None"),
    ],
)
def test_errors_name_the_field_and_the_values(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_integers_in_float_fields_are_written_as_floats():
    values = VivitConfig(initializer_range=1, layer_norm_eps=0).to_dict()
    assert isinstance(values["initializer_range"], float)
    assert isinstance(values["layer_norm_eps"], float)


def test_dtypes_may_be_objects():
    import jax.numpy as jnp

    config = VivitConfig(dtype=jnp.bfloat16, param_dtype=jnp.dtype("float32"))
    assert (config.dtype, config.param_dtype) == ("bfloat16", "float32")


def test_decoder_view():
    decoder = VideoMAEConfig().decoder()
    assert (decoder.hidden_size, decoder.num_hidden_layers, decoder.num_attention_heads) == (
        384,
        4,
        6,
    )
    assert (
        dataclasses.replace(VivitConfig(), hidden_size=64, num_attention_heads=4).hidden_size == 64
    )


@pytest.mark.parametrize("value", [0.0, 1e-400, False, -1, 2.0])
def test_a_depth_is_a_whole_number(value):
    with pytest.raises(ConfigError, match="num_hidden_layers must be an integer, 0 or more"):
        VideoMAEConfig(num_hidden_layers=value)
