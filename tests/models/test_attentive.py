# SPDX-License-Identifier: Apache-2.0
"""The attentive head: PyTorch's attention on the same tokens, and its files."""

import dataclasses
import json

import numpy as np
import pytest
from helpers import clip, forward, mostly_slow, random_params
from safetensors.numpy import load_file, save_file
from test_flops import EXECUTION, counted
from tiny import SMALL_VIDEOMAE, SMALL_VIVIT

import vivit_jax
from checkpoints_convert.convert import convert
from vivit_jax import param_tree
from vivit_jax.errors import CheckpointError, ConfigError
from vivit_jax.models.build import headless
from vivit_jax.models.flops import forward_flops
from vivit_jax.models.registry import family_of
from vivit_jax.recipes.recipe import OptimSettings
from vivit_jax.train.optim import decay_factors
from vivit_jax.train.start.initial_params import papers_params

HEADS = dict(attentive_heads=4, num_labels=3)
ENCODER = dict(attention_type="factorised_encoder", num_temporal_layers=1)
CONFIGS = {
    "videomae": lambda: vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE | HEADS),
    "videomae, norm": lambda: vivit_jax.VideoMAEConfig(
        **SMALL_VIDEOMAE | HEADS, use_mean_pooling=False
    ),
    "vivit": lambda: vivit_jax.VivitConfig(**SMALL_VIVIT | HEADS),
    "vivit, encoder": lambda: vivit_jax.VivitConfig(**SMALL_VIVIT | HEADS | ENCODER),
}


def classifier(name, scale=0.5):
    config = CONFIGS[name]()
    model = family_of(config).models["classification"](config)
    return model, random_params(model, scale)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with an attentive VideoMAE, its model and its parameters."""
    path = tmp_path_factory.mktemp("attentive") / "model"
    model, params = classifier("videomae, norm")
    vivit_jax.save_pretrained(path, model, params)
    return path, model, params


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "videomae, norm", "vivit"))
def test_the_head_is_pytorchs_attention_with_one_query(tmp_path, name):
    """From the tensors of the file, in the order of the published attentive probes."""
    import torch

    model, params = classifier(name)
    config = model.config
    vivit_jax.save_pretrained(tmp_path / "model", model, params)
    stored = {
        k: torch.tensor(v) for k, v in load_file(tmp_path / "model/model.safetensors").items()
    }
    pixels = clip(config)
    tokens = torch.tensor(np.asarray(forward(*headless(model, params), pixels).last_hidden_state))

    def heads(x):
        return x.unflatten(-1, (config.attentive_heads, -1)).transpose(-2, -3)

    query = stored["attentive_pooler.query"].expand(len(tokens), 1, -1)
    key, value = (tokens @ stored[f"attentive_pooler.{n}.weight"].T for n in ("key", "value"))
    read = torch.nn.functional.scaled_dot_product_attention(*map(heads, (query, key, value)))
    x = read.transpose(-2, -3).flatten(-2)[:, 0]
    expected = x @ stored["classifier.weight"].T + stored["classifier.bias"]
    logits = np.asarray(forward(model, params, pixels).logits)
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(logits, expected.numpy(), atol=2e-5)  # measured 4.8e-6
    # Not the mean of the tokens' values, which a wrong scale would approach.
    mean = value.mean(1) @ stored["classifier.weight"].T + stored["classifier.bias"]
    assert np.abs(logits - mean.numpy()).max() > 0.05


def test_a_saved_model_is_read_again_and_transformers_refuses_it(saved):
    import transformers

    path, model, params = saved
    again, read = vivit_jax.from_pretrained(path)
    assert again.config == model.config and type(again) is type(model)
    ours = param_tree.flatten(params)
    for name, value in param_tree.flatten(read).items():
        np.testing.assert_array_equal(value, ours[name])
    with pytest.raises(ValueError, match="videomae_jax"):
        transformers.AutoConfig.from_pretrained(path)


def test_without_the_head_the_backbone_is_an_ordinary_model(saved, tmp_path):
    model, params = vivit_jax.from_pretrained(saved[0], head="none")
    vivit_jax.save_pretrained(tmp_path / "backbone", model, params)
    values = json.loads((tmp_path / "backbone/config.json").read_text())
    assert values["model_type"] == "videomae" and "attentive_heads" not in values


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_files_are_read_strictly(saved, tmp_path, change):
    tensors = load_file(saved[0] / "model.safetensors")
    if change == "missing":
        del tensors["attentive_pooler.query"]
    elif change == "unexpected":
        tensors["attentive_pooler.key.bias"] = np.zeros(16, np.float32)
    else:
        tensors["attentive_pooler.value.weight"] = np.zeros((16, 8), np.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved[0] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"attentive_pooler\.(query|key\.bias|value)"):
        vivit_jax.from_pretrained(tmp_path)


def test_other_layouts_refuse_the_head(saved, tmp_path):
    with pytest.raises(ConfigError, match="--to hf"):
        convert(saved[0], tmp_path / "authors", to_layout="videomae")
    assert not (tmp_path / "authors").exists()


def test_heads_must_divide_the_width():
    with pytest.raises(
        ConfigError, match="attentive_heads must be null or a divisor of hidden_siz"
    ):
        vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, attentive_heads=3)


@pytest.mark.parametrize("name", CONFIGS)
def test_its_products_are_counted(name):
    config = dataclasses.replace(CONFIGS[name](), **EXECUTION)
    model = family_of(config).models["classification"](config)
    assert forward_flops(config) == counted(model)


@pytest.mark.parametrize("name", ["videomae", "vivit"])
def test_it_can_be_trained(name):
    """Initial values and weight decay have rules for its parameters."""
    model, params = classifier(name)
    drawn = param_tree.flatten(papers_params(model, params, 0))
    assert 0.01 < np.std(drawn["attentive/query"]) < 0.04
    decays = param_tree.flatten(decay_factors(OptimSettings(lr=1.0), params))
    assert not decays["attentive/query"] and decays["attentive/key/kernel"] == 1
