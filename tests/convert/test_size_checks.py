# SPDX-License-Identifier: Apache-2.0
"""Configs that ask for far more than the files hold are refused before a model is made of them."""

import pytest

import checkpoints_convert.pretrained
import vivit_jax
from vivit_jax.errors import CheckpointError

HUGE = 1_000_000_000


def changed(**fields):
    return lambda values: values.update(fields)


@pytest.mark.parametrize(
    ("case", "fields", "told"),
    [
        ("mae cls", {"hidden_size": HUGE}, "wrong shape: .* hidden_size 1,000,000,000, .* is 80"),
        ("mae cls", {"intermediate_size": HUGE}, "wrong shape: .* intermediate_size 1,000"),
        ("mae cls", {"image_size": 10**6}, "positions of 46,875,000,000 tokens .* 1,073,741,824"),
        ("mae cls", {"num_frames": HUGE}, "positions of 3,000,000,000 tokens of width 48"),
        ("mae cls", {"num_hidden_layers": 10**6}, r"layer\.3\.\S+ is the first that is missing"),
        ("mae cls", {"num_channels": HUGE}, "wrong shape"),
        ("vivit cls", {"num_hidden_layers": HUGE}, r"layer\.3\.\S+ is the first that is missing"),
        ("vivit cls", {"image_size": 10**6}, "wrong shape: .* positions 46,875,000,000"),
        ("vivit cls", {"hidden_size": HUGE}, "wrong shape: .* hidden_size 1,000,000,000"),
        ("vivit cls", {"intermediate_size": 10**6}, "wrong shape: .* intermediate_size 1,000,000"),
        ("vivit cls", {"num_sampled_frames": 2, "num_frames": HUGE, "tubelet_size": [1, 8, 8]},
         "2 of 1,000,000,000 frames: it would take 8,000,000,000"),
        ("mae pretraining", {"decoder_hidden_size": HUGE}, "wrong shape: .* decoder_hidden_size"),
        ("mae pretraining", {"decoder_num_hidden_layers": HUGE}, "is the first that is missing"),
    ],
)  # fmt: skip
def test_a_config_of_another_size(damaged, monkeypatch, case, fields, told):
    if "num_sampled_frames" in fields:
        fields = fields | {"model_type": "vivit_jax"}
    path = damaged(case, config=changed(**fields))
    # What takes the memory and the minutes.
    monkeypatch.setattr(checkpoints_convert.pretrained, "abstract_params", None)
    with pytest.raises(CheckpointError, match=told):
        vivit_jax.from_pretrained(path)


def test_image_statistics_of_very_many_channels(damaged):
    path = damaged("mae cls", config=changed(num_channels=2 * HUGE, image_mean=0.5, image_std=0.5))
    with pytest.raises(vivit_jax.ConfigError, match="image_mean of all channels would take"):
        vivit_jax.from_pretrained(path)


def test_what_the_head_does_not_use_may_be_of_any_size(damaged):
    decoder = {"decoder_num_hidden_layers": HUGE, "decoder_intermediate_size": HUGE}
    path = damaged("mae cls", config=changed(**decoder, decoder_hidden_size=24 * 10**7))
    model, _ = vivit_jax.from_pretrained(path)
    assert model.config.decoder_num_hidden_layers == HUGE


def test_the_limit_can_be_raised(damaged, monkeypatch):
    path = damaged("mae cls", config=changed(image_size=[8 * 2**8, 8 * 2**5]))
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", str(10**6))
    with pytest.raises(CheckpointError, match="VIVIT_JAX_UNPACK_LIMIT=9437184"):
        vivit_jax.from_pretrained(path)
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", "9437184")
    assert vivit_jax.from_pretrained(path)[0].config.num_tokens == 3 * 2**13


def test_an_image_model_of_another_depth(images, tmp_path):
    import json

    source = images.copy(tmp_path, "hf")
    values = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": HUGE}
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="is the first that is missing"):
        vivit_jax.init_from_image_model(source, {"num_frames": 2})
