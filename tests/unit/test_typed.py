# SPDX-License-Identifier: Apache-2.0
"""One grammar of values for `--config` and `--set`."""

import pytest

import vivit_jax
from vivit_jax.config import VideoMAEConfig, VivitConfig
from vivit_jax.errors import UserError
from vivit_jax.recipes import apply_settings, recipe_named
from vivit_jax.typed import parse_settings

RECIPES = {
    VivitConfig: "vivit-b-16x2-kinetics400",
    VideoMAEConfig: "videomae-v1-base-kinetics400-finetune",
}


def by_config(config, name, text):
    return parse_settings(config, [f"{name}={text}"])[name]


def by_set(config, name, text):
    recipe = recipe_named(RECIPES[config])
    return apply_settings(recipe, [f"model.config.{name}={text}"]).model.config[name]


ENTRANCES = pytest.mark.parametrize("read", [by_config, by_set])
NAMES = ("cat", "dog")


@ENTRANCES
@pytest.mark.parametrize(
    ("config", "name", "text", "value"),
    [
        (VivitConfig, "num_hidden_layers", "12", 12),
        (VivitConfig, "num_hidden_layers", "1e1", 10),
        (VivitConfig, "num_hidden_layers", " 8.0 ", 8),
        (VivitConfig, "layer_norm_eps", "1e-5", 1e-5),
        (VivitConfig, "layer_norm_eps", "1", 1.0),
        (VivitConfig, "qkv_bias", "true", True),
        (VivitConfig, "qkv_bias", "TRUE", True),
        (VivitConfig, "qkv_bias", "False", False),
        (VivitConfig, "head_dim", "none", None),
        (VivitConfig, "head_dim", "None", None),
        (VivitConfig, "head_dim", "null", None),
        (VivitConfig, "pooling", "none", None),
        (VivitConfig, "hidden_act", "relu", "relu"),
        (VivitConfig, "hidden_act", "'relu'", "relu"),
        (VivitConfig, "hidden_act", '"relu"', "relu"),
        (VivitConfig, "tubelet_size", "2,16,16", (2, 16, 16)),
        (VivitConfig, "tubelet_size", "(2,16,16)", (2, 16, 16)),
        (VivitConfig, "tubelet_size", "[2, 16, 16]", (2, 16, 16)),
        (VivitConfig, "tubelet_size", "2e0, 16, 16,", (2, 16, 16)),
        (VivitConfig, "image_size", "224", 224),
        (VivitConfig, "image_size", "(224,224)", (224, 224)),
        (VideoMAEConfig, "image_mean", "NONE", None),
        (VivitConfig, "id2label", "cat,dog", NAMES),
        (VivitConfig, "id2label", '["cat", "dog"]', NAMES),
        (VivitConfig, "id2label", "['cat', 'dog, small']", ("cat", "dog, small")),
        (VivitConfig, "id2label", "cat,dog's", ("cat", "dog's")),
        (VivitConfig, "id2label", r"['a\b', 'c']", (r"a\b", "c")),
        (VivitConfig, "id2label", '{"0": "cat", "1": "dog"}', ((0, "cat"), (1, "dog"))),
        (VivitConfig, "id2label", '{"3": 7, "1": "dog"}', ((3, "7"), (1, "dog"))),
        (VivitConfig, "id2label", "null", None),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(read, config, name, text, value):
    if read is by_set and name == "id2label" and value:
        # A recipe's num_labels does not follow the names.
        recipe = recipe_named(RECIPES[config])
        settings = [f"model.config.num_labels={len(value)}", f"model.config.id2label={text}"]
        found = apply_settings(recipe, settings).model.config["id2label"]
    else:
        found = read(config, name, text)
    assert found == value and type(found) is type(value)


@ENTRANCES
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("num_hidden_layers", "1.5", "a whole number"),
        ("num_hidden_layers", "true", "a whole number"),
        ("num_hidden_layers", "none", "a whole number"),
        ("num_hidden_layers", "'3'", "a whole number"),
        ("num_hidden_layers", "", "a whole number"),
        ("layer_norm_eps", "small", "a number"),
        ("layer_norm_eps", "nan", "a number"),
        ("layer_norm_eps", "Infinity", "a number"),
        ("qkv_bias", "1", "true or false"),
        ("head_dim", "x", "a whole number or none"),
        ("tubelet_size", "2,16", "[a whole number, a whole number, a whole number]"),
        ("tubelet_size", "(2,16,16", "[a whole number, a whole number, a whole number]"),
        ("tubelet_size", "{}", "[a whole number, a whole number, a whole number]"),
        ("image_size", "224,224,3", "a whole number or [a whole number, a whole number]"),
        ("id2label", "{'0': 'cat'}", "a list, each entry a text"),
        ("id2label", '{"zero": "cat"}', "a list, each entry a text"),
        ("id2label", "['cat", "a list, each entry a text"),
    ],
)
def test_what_is_refused(read, name, text, expected):
    with pytest.raises(UserError) as error:
        read(VivitConfig, name, text)
    assert name in str(error.value) and expected in str(error.value)


def test_values_by_name_are_read_as_json():
    """What a Python caller gives in place of texts."""
    given = {
        "id2label": {1: "dog", 0: 5},
        "tubelet_size": [2, 16, 16],
        "layer_norm_eps": 1,
        "head_dim": None,
    }
    assert parse_settings(VivitConfig, given) == {
        "id2label": ((1, "dog"), (0, "5")),
        "tubelet_size": (2, 16, 16),
        "layer_norm_eps": 1.0,
        "head_dim": None,
        "num_labels": 2,
    }
    for name, value in (("hidden_size", "64"), ("qkv_bias", 1), ("hidden_size", True)):
        with pytest.raises(vivit_jax.ConfigError, match=f"^config: {name} must be "):
            parse_settings(VivitConfig, {name: value})


def test_names_of_settings_may_have_spaces_around_them():
    assert parse_settings(VivitConfig, [" num_frames = 8"]) == {"num_frames": 8}
