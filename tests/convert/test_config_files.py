# SPDX-License-Identifier: Apache-2.0
"""config.json as people have it: keys of their own, of other releases, of other programs."""

import json
import logging

import pytest
from helpers import clip, forward
from tiny_checkpoints import read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.pretrained import load_report

OWN = {
    "auto_map": {"AutoModel": "my.Model"},
    "loss_type": "ForVideoClassification",
    "quantization_config": None,
    "my_notes": ["a", {"b": 1.5}],
    "max_length": 20,
    "do_sample": False,
}


@pytest.mark.parametrize("case", ["vivit cls", "mae pretraining"])
def test_keys_of_others_are_named_once_and_written_back(case, damaged, tmp_path, caplog, run):
    import transformers

    path = damaged(case, config=lambda values: values.update(OWN))
    model, params = vivit_jax.from_pretrained(path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert all(record.getMessage().count(name) == 1 for name in OWN)
    assert record.getMessage() == str(load_report(path))
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    status, out, _ = run("convert", path, tmp_path / "converted")
    assert status == 0 and out.count("auto_map") == 1
    status, out, _ = run("inspect", path)
    assert status == 0 and out.count("written back on save: auto_map, do_sample") == 1
    for name in ("saved", "converted"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: written[key] for key in OWN} == OWN
        assert same_tensors(read_safetensors(tmp_path / name), read_safetensors(path))
        read = transformers.AutoConfig.from_pretrained(tmp_path / name, trust_remote_code=False)
        assert read.my_notes == OWN["my_notes"]


def test_what_transformers_computes_with_is_refused_by_name(damaged):
    values = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path = damaged("vivit cls", config=lambda held: held.update(values | {"mine": 1}))
    with pytest.raises(vivit_jax.ConfigError, match="not implement: quantization_config=") as error:
        vivit_jax.from_pretrained(path)
    assert str(path / "config.json") in str(error.value) and "mine" not in str(error.value)


def test_the_class_that_a_config_names_says_the_family(damaged, checkpoints):
    import transformers

    path = damaged("mae cls", config=lambda values: values.pop("model_type"))
    assert transformers.VideoMAEForVideoClassification.from_pretrained(path)
    assert (
        vivit_jax.from_pretrained(path)[0]
        == vivit_jax.from_pretrained(checkpoints.path("mae cls"))[0]
    )
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | {"model_type": None}))
    assert transformers.VideoMAEForVideoClassification.from_pretrained(path)
    assert vivit_jax.from_pretrained(path)
    (path / "config.json").write_text(json.dumps(values | {"architectures": ["Other"]}))
    with pytest.raises(vivit_jax.ConfigError, match="model_type is None, expected one of"):
        vivit_jax.from_pretrained(path)


def test_unknown_keys_change_no_number(checkpoints, damaged):
    path = damaged("vivit cls", config=lambda values: values.update(OWN))
    a, b = (vivit_jax.from_pretrained(p) for p in (path, checkpoints.path("vivit cls")))
    pixels = clip(a[0].config)
    with_keys, without = (forward(model, params, pixels) for model, params in (a, b))
    assert (with_keys.logits == without.logits).all()
