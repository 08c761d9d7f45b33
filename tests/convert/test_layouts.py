# SPDX-License-Identifier: Apache-2.0
"""A layout is one record: a toy one that this file adds is read, written, shown and verified.

It is HuggingFace's ViViT with the parts of every name in reverse order and "toy" in front.
"""

import dataclasses
import json

import numpy as np
import pytest
from helpers import mostly_slow
from tiny_checkpoints import read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.layouts import registry
from checkpoints_convert.layouts.layout import Layout
from checkpoints_convert.source import open_source
from checkpoints_convert.tables import hf_vivit
from checkpoints_convert.tables.table import Names, Table
from vivit_jax.errors import UserError


def toy_name(name: str) -> str:
    """vivit.encoder.layer.3.output.dense.weight -> toy:weight.dense.output.3.layer.encoder.vivit"""
    return "toy:" + ".".join(reversed(name.split(".")))


def hf_name(name: str) -> str:
    return ".".join(reversed(name.removeprefix("toy:").split(".")))


def toy_rules(config, names):
    rules = hf_vivit.rules(config, names._replace(dialect="hub"))
    return [dataclasses.replace(rule, src=toy_name(rule.src)) for rule in rules]


def toy_names(tensors, head):
    return hf_vivit.names_in([hf_name(name) for name in tensors], head)._replace(dialect="")


PATCHES = "toy:weight.projection.patch_embeddings.embeddings"
TOY = Layout(
    name="toy",
    tables={"vivit": Table(toy_rules, toy_names, hf_vivit.PREFIX, ("classification",))},
    parameters=lambda path, entries: (entries, {}),
    patch_kernels=(PATCHES, f"{PATCHES}.vivit"),
)


@pytest.fixture
def toy(monkeypatch):
    """The toy layout, registered for one test."""
    monkeypatch.setattr(registry, "LAYOUTS", list(registry.LAYOUTS))
    registry.register(TOY)


@pytest.mark.parametrize("case", mostly_slow(["vivit cls", "vivit base"], "vivit cls"))
def test_a_layout_from_outside_there_and_back(run, checkpoints, toy, tmp_path, case):
    source = checkpoints.path(case)
    status, _, err = run("convert", source, tmp_path / "toy", "--to", "toy")
    assert status == 0, err
    stored = read_safetensors(tmp_path / "toy")
    assert stored.keys() == {toy_name(name) for name in read_safetensors(source)}

    opened = open_source(tmp_path / "toy")
    assert opened.layout is TOY and opened.describe().startswith("toy: Vivit")
    headed = case == "vivit cls"
    assert opened.stored.names == Names(opened.head, "vivit." * headed, pooler=not headed)

    status, out, err = run("inspect", tmp_path / "toy")
    assert status == 0, err
    assert "layout      toy: Vivit" in out and f"fits        {len(stored)} tensors" in out

    status, _, err = run("convert", tmp_path / "toy", tmp_path / "back", "--from", "toy")
    assert status == 0, err
    assert same_tensors(read_safetensors(tmp_path / "back"), read_safetensors(source))

    clip = np.random.default_rng(0).standard_normal((1, *_clip_shape(opened.config)), np.float32)
    outputs = []
    for directory in (source, tmp_path / "toy"):
        model, params = vivit_jax.from_pretrained(directory)
        out = model.apply({"params": params}, clip)
        outputs.append(out.logits if headed else out.last_hidden_state)
    assert np.array_equal(*outputs)


def _clip_shape(config):
    return config.num_frames, *config.frame_size, config.num_channels


def test_a_layout_from_outside_is_verified(run, checkpoints, toy, tmp_path):
    assert run("convert", checkpoints.path("vivit cls"), tmp_path / "toy", "--to", "toy")[0] == 0
    status, out, err = run("verify", tmp_path / "toy", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["passed"] and "compared as converted to the hf layout" in result["note"]
    assert {"embeddings", "logits", "loss"} <= {row["name"] for row in result["rows"]}


def test_what_is_wrong_with_a_toy_checkpoint_is_listed(run, checkpoints, toy, tmp_path):
    from safetensors.numpy import save_file

    assert run("convert", checkpoints.path("vivit cls"), tmp_path / "toy", "--to", "toy")[0] == 0
    tensors = read_safetensors(tmp_path / "toy")
    lost = [name for name in tensors if name.startswith("toy:bias.query.")]
    for name in lost:
        del tensors[name]
    save_file(tensors, tmp_path / "toy" / "model.safetensors", {"format": "pt"})
    status, _, err = run("inspect", tmp_path / "toy")
    assert status == 2 and f"{len(lost)} missing" in err and lost[0] in err


def test_the_commands_offer_it(run, toy):
    status, out, _ = run("convert", "--help")
    assert status == 0 and "--to {hf,scenic,videomae,toy}" in out
    assert "--from {vit,hf,scenic,videomae,toy}" in out


def test_without_it(run, checkpoints, tmp_path):
    """What the fixture adds is gone again, and the command refuses a name that no layout has."""
    assert registry.layout_names() == ("vit", "hf", "scenic", "videomae")
    made = tmp_path / "toy"
    assert run("convert", checkpoints.path("vivit cls"), made, "--to", "toy")[0] == 2
    assert not (tmp_path / "toy").exists()


def test_names_are_unique_and_known(toy):
    with pytest.raises(UserError, match="there is a layout 'toy' already"):
        registry.register(TOY)
    with pytest.raises(UserError, match="layout is 'tiy', expected one of vit, hf, .*, toy"):
        registry.layout_named("tiy")


@pytest.mark.parametrize("layout", registry.LAYOUTS, ids=lambda layout: layout.name)
def test_records_are_complete(layout):
    """What one field of a record needs of another."""
    assert layout.writable == (not layout.image) == bool(layout.tables)
    assert layout.detects or layout.patch_kernels
    assert (layout.processor is None) == (layout.normalised == "")
    if layout.file:
        assert layout.infer_config and layout.check_function
        assert layout.file.rivals.fullmatch("checkpoint")


def test_a_layout_that_is_read_only(checkpoints, tmp_path):
    from checkpoints_convert.convert import convert_checkpoint

    with pytest.raises(UserError, match="'vit' is read only, expected one of hf, scenic, videomae"):
        convert_checkpoint(checkpoints.path("vivit cls"), tmp_path / "out", to_layout="vit")
