# SPDX-License-Identifier: Apache-2.0
"""Families are records: one defined here, outside the packages, is used like those inside."""

import dataclasses
import json
from collections.abc import Mapping
from typing import ClassVar

import jax
import numpy as np
import pytest
from commands import run_command
from flax import linen as nn
from helpers import forward, random_params
from safetensors.numpy import load_file

import vivit_jax
from checkpoints_convert.__main__ import main as convert_main
from checkpoints_convert.layouts import registry
from checkpoints_convert.tables.hf_block import HUB, blocks, dense, identify, norm, patch_embed
from checkpoints_convert.tables.table import Table
from vivit_jax import config, param_tree
from vivit_jax.layers.embed import TubeletEmbed, check_clip, sincos_positions
from vivit_jax.layers.encoder import StackSpec, run_blocks
from vivit_jax.layers.linear import LayerNorm
from vivit_jax.models import products
from vivit_jax.models import registry as families
from vivit_jax.models.build import build_model, fresh_params
from vivit_jax.models.family import Family
from vivit_jax.models.flops import forward_flops
from vivit_jax.models.head import classify
from vivit_jax.outputs import ClassifierOutput, ModelOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(config.TransformerConfig):
    """A video transformer without masks and with computed positions."""

    model_type: ClassVar[str] = "toy"
    own_model_type: ClassVar[str] = "toy_jax"
    title: ClassVar[str] = "Toy"
    heads: ClassVar[Mapping[str, str]] = {
        "none": "ToyModel",
        "classification": "ToyForVideoClassification",
    }

    num_frames: int = 4
    tubelet_size: int = 2
    patch_size: int = 8
    image_size: int | tuple[int, int] = 16
    hidden_size: int = 24
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 40
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    frame_stride: int = 3

    @property
    def tubelet(self):
        return (self.tubelet_size, self.patch_size, self.patch_size)

    @property
    def key_bias(self):
        return self.qkv_bias

    @property
    def in_transformers(self):
        return False


class ToyModel(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, pixel_values, *, deterministic=True, output_hidden_states=False, **_):
        config = self.config
        check_clip(config, pixel_values.shape, any_size=False)
        x = TubeletEmbed(config, name="patch_embed")(pixel_values)
        x = (x + sincos_positions(*x.shape[1:]).astype("f4")[None]).astype(config.dtype)
        stack = StackSpec(config.num_hidden_layers)
        x, layers = run_blocks(config, stack, x, output_hidden_states=bool(output_hidden_states))
        x = LayerNorm(config, config.layer_norm_eps, name="ln_final")(x)
        return ModelOutput(x, hidden_states=layers.hidden)


class ToyForVideoClassification(nn.Module):
    config: ToyConfig

    @nn.compact
    def __call__(self, pixel_values, *, labels=None, **options):
        x = ToyModel(self.config, name="backbone")(pixel_values, **options).last_hidden_state
        return ClassifierOutput(*classify(self.config, x.mean(1), labels))


def stacks(config):
    return (StackSpec(config.num_hidden_layers),)


def flops(config, head, visible, decoded, all_tokens):
    tokens = config.num_tokens
    return products.Flops(
        products.embedding(config, tokens),
        products.joint_blocks(config, config.num_hidden_layers, tokens),
        products.classifier(config, head),
    )


TOY = Family(
    config=ToyConfig,
    models={"none": ToyModel, "classification": ToyForVideoClassification},
    stacks=stacks,
    flops=flops,
)


def rules(config, names):
    dst = "" if names.head == "none" else "backbone/"
    biases = {name: f"{HUB[name]}.bias" for name in ("query", "key", "value")}
    table = patch_embed(names.prefix, dst) + blocks(
        f"{names.prefix}encoder.layer.{{i}}.",
        dst + "layers_{i}/",
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        names=HUB,
        biases=biases if config.qkv_bias else {},
    )
    table += norm(f"{names.prefix}layernorm", f"{dst}ln_final")
    return table + (dense("classifier", "head") if names.head == "classification" else [])


def names_in(tensors, head):
    return identify(tensors, head, "toy.", "pooler.", "")


TABLE = Table(rules, names_in, "toy.", ("classification",))


@pytest.fixture
def toy(monkeypatch):
    """The toy family, registered for one test."""
    monkeypatch.setattr(config, "FAMILIES", list(config.FAMILIES))
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    before = dict(config.ARCHITECTURES)
    families.register_family(TOY)
    registry.register_table("hf", "toy", TABLE)
    yield ToyConfig(num_labels=5)
    config.ARCHITECTURES.clear()
    config.ARCHITECTURES.update(before)
    del registry.layout_named("hf").tables["toy"]


@pytest.fixture
def directory(toy, tmp_path):
    """A saved toy classifier."""
    model = build_model(toy, "classification")
    processor = vivit_jax.VideoProcessor.videomae(size=20, crop_size=(16, 16))
    vivit_jax.save_pretrained(tmp_path / "toy", model, random_params(model), processor)
    return tmp_path / "toy"


def test_a_family_from_outside_is_built_and_measured(toy):
    model = build_model(toy, "classification")
    assert type(model) is ToyForVideoClassification
    flat = param_tree.flatten(fresh_params(model, seed=0))
    assert flat["backbone/layers/mlp_in/kernel"].shape == (2, 24, 40)
    assert forward_flops(toy) > forward_flops(toy, "none") > 0
    with pytest.raises(vivit_jax.UserError, match="Toy has no masked pre-training"):
        forward_flops(toy, "pretraining")


def test_a_family_from_outside_is_saved_loaded_and_converted(toy, directory, tmp_path):
    stored = json.loads((directory / "config.json").read_text())
    assert stored["model_type"] == "toy_jax"
    assert stored["architectures"] == ["ToyForVideoClassification"]
    assert "toy.layernorm.weight" in load_file(directory / "model.safetensors")
    model, params = vivit_jax.from_pretrained(directory)
    assert model == build_model(toy, "classification")
    expected = param_tree.flatten(random_params(model))
    for path, value in param_tree.flatten(params).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert convert_main(["convert", str(directory), str(tmp_path / "again")]) == 0
    held = "model.safetensors"
    assert (tmp_path / "again" / held).read_bytes() == (directory / held).read_bytes()


def test_a_family_from_outside_needs_no_pooling_layer(toy, directory, tmp_path):
    model, params = vivit_jax.from_pretrained(directory)
    pixels = np.random.default_rng(0).normal(size=(1, 4, 16, 16, 3)).astype("f4")
    found = vivit_jax.map_attention(model, params, pixels)
    np.testing.assert_allclose(found.maps.sum(), 1, rtol=1e-5)
    backbone, of_backbone = vivit_jax.from_pretrained(directory, head="none")
    assert backbone == build_model(toy, "none", add_pooling_layer=False)
    vivit_jax.save_pretrained(tmp_path / "backbone", backbone, of_backbone)
    assert vivit_jax.from_pretrained(tmp_path / "backbone")[0] == backbone
    with pytest.raises(vivit_jax.ConfigError, match="ToyModel has no pooling layer"):
        build_model(toy, "none", add_pooling_layer=True)


def test_a_family_from_outside_classifies_videos(toy, directory):
    classifier = vivit_jax.VideoClassifier.from_pretrained(directory)
    frames = np.random.default_rng(0).integers(0, 256, (30, 24, 20, 3), np.uint8)
    (first, *_) = classifier(frames, top_k=5)
    pixels = classifier.processor(frames[[10, 13, 16, 19]])  # every third, as the config says
    model, params = vivit_jax.from_pretrained(directory)
    logits = forward(model, params, pixels).logits[0]
    np.testing.assert_allclose(first["score"], jax.nn.softmax(logits).max(), rtol=1e-5)


def test_a_family_from_outside_has_no_reference(directory, capsys):
    status, _, err = run_command(capsys, "verify", directory)
    assert status == 2 and "is a Toy, which transformers does not have" in err


def test_a_config_that_extends_another_family_s_has_a_family_of_its_own(toy):
    """The nearest record counts, not the first whose config is a base class."""
    names: dict = {"model_type": "other", "own_model_type": "other_jax"}
    names["heads"] = {"none": "OtherModel"}
    extended = dataclasses.dataclass(frozen=True, kw_only=True)(type("Other", (ToyConfig,), names))
    model = type("OtherModel", (ToyModel,), {})
    other = dataclasses.replace(TOY, config=extended, models={"none": model})
    families.register_family(other)
    assert families.family_of(extended()) is other and families.family_of(toy) is TOY


def test_names_that_are_taken(toy):
    with pytest.raises(vivit_jax.UserError, match="ToyForVideoClassification, .*toy.* is taken"):
        families.register_family(TOY)
    other = dataclasses.replace(TOY, models={"none": ToyModel})
    with pytest.raises(vivit_jax.UserError, match="make them equal"):
        families.register_family(other)
