# SPDX-License-Identifier: Apache-2.0
"""300 random configurations that transformers runs: opened here, and saved here for transformers.

Nothing is refused, and outputs differ from float64 by at most 2e-5 of the RMS or 4 times what
transformers' own float32 differs.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
import random_configs
from random_configs import random_case, torch_model, torch_outputs

import vivit_jax
from vivit_jax.config_base import HIDDEN_ACTS

ACTIVATIONS = tuple(name for name in HIDDEN_ACTS if name != "selu")  # transformers has none
ALWAYS, SLOW, ALL = 3, 40, 300
FIELDS = ("loss", "logits", "last_hidden_state", "pooler_output")


def run(case, model, params):
    inputs = {}
    if case.name == "VideoMAEForPreTraining":
        inputs["mask"] = vivit_jax.Mask.from_bool(case.mask(model.config.num_tokens))
    elif "Classification" in case.name:
        inputs["labels"] = case.labels()
    flags = dict(output_hidden_states=True, output_attentions=True)
    # One program takes a seventh of the time of compiling its operations one by one.
    apply = jax.jit(model.apply, static_argnames=tuple(flags))
    return apply({"params": params}, case.clip(), **inputs, **flags)


def assert_agree(ours, theirs, exact):
    """`ours` against float64, `theirs` being transformers' float32."""

    def compare(field, ours, theirs, exact):
        ours, theirs, exact = (np.asarray(x, np.float64) for x in (ours, theirs, exact))
        assert ours.shape == exact.shape, (field, ours.shape, exact.shape)
        measured, own = np.abs(ours - exact).max(), np.abs(theirs - exact).max()
        allowed = max(2e-5 * max(1.0, np.sqrt(np.mean(exact**2))), 4 * own)
        assert measured <= allowed, f"{field}: {measured:.2e}, allowed {allowed:.2e}"

    for field in FIELDS:
        if getattr(exact, field, None) is not None:
            values = (getattr(out, field) for out in (ours, theirs, exact))
            compare(field, *values)
        else:
            assert getattr(ours, field, None) is None, field
    for field in ("hidden_states", "attentions"):
        # Without blocks transformers captures nothing; here the embedding is a hidden state.
        for i, wanted in enumerate(getattr(exact, field)):
            compare(field, getattr(ours, field)[i], getattr(theirs, field)[i], wanted)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n >= ALWAYS) + [pytest.mark.long] * (n >= SLOW))
        for n in range(ALL)
    ],
)
def test_both_directions(number, tmp_path):
    case = random_case(number, ACTIVATIONS)
    reference = random_configs.write(case, torch_model(case), tmp_path / "theirs")
    theirs = torch_outputs(case, reference)
    model, params = vivit_jax.from_pretrained(tmp_path / "theirs")
    assert type(model).__name__ == case.name
    assert model.config.num_labels == reference.config.num_labels
    labels = {i: n for i, n in reference.config.id2label.items() if i < model.config.num_labels}
    assert labels.items() <= dict(enumerate(model.config.labels)).items()
    ours = run(case, model, params)

    _, stored = vivit_jax.from_pretrained(tmp_path / "theirs", param_dtype=None)
    shards = {"max_shard_size": "1KB"} if case.form.startswith("sharded") else {}
    vivit_jax.save_pretrained(tmp_path / "ours", model, stored, **shards)
    again = opened_in_transformers(case, tmp_path, reference)
    exact = torch_outputs(case, reference, double=True)  # last, it turns the reference to float64
    assert_agree(ours, theirs, exact)
    assert_agree(again, theirs, exact)


def opened_in_transformers(case, directory, reference):
    """transformers' outputs of what is saved here: of the same config, with the same weights."""
    import torch
    import transformers

    opened, info = getattr(transformers, case.name).from_pretrained(
        directory / "ours",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(info.values()), info
    before, after = (
        json.loads((directory / side / "config.json").read_text()) for side in ("theirs", "ours")
    )
    for field in ("architectures", "dtype", "id2label", "problem_type"):
        assert before.get(field) == after.get(field), field
    for field in (name for name in case.values if name in before):
        assert before[field] == after[field], field
    wanted, found = reference.state_dict(), opened.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    return torch_outputs(case, opened.eval())


def test_the_comparison_sees_another_function(tmp_path):
    """The tanh approximation in the place of the exact GELU."""
    case = dataclasses.replace(random_case(0, ("gelu",)), form="safetensors")
    case = dataclasses.replace(case, values=case.values | {"num_hidden_layers": 2})
    reference = random_configs.write(case, torch_model(case), tmp_path)
    theirs = torch_outputs(case, reference)
    model, params = vivit_jax.from_pretrained(tmp_path)
    exact = torch_outputs(case, reference, double=True)
    assert_agree(run(case, model, params), theirs, exact)
    tanh = model.clone(config=dataclasses.replace(model.config, hidden_act="gelu_fast"))
    with pytest.raises(AssertionError, match="allowed"):
        assert_agree(run(case, tanh, params), theirs, exact)


def test_the_cases_cover_what_they_say():
    cases = [random_case(number, ACTIVATIONS) for number in range(ALL)]
    assert {case.form for case in cases} == set(random_configs.FORMS)
    assert {case.name for case in cases} == {n for ns in random_configs.HEADS.values() for n in ns}
    drawn = {
        name
        for case in cases
        for name in (case.values["hidden_act"], case.values.get("pooler_act"))
    }
    assert set(ACTIVATIONS) <= drawn
    values = [case.values for case in cases]
    assert {v["num_hidden_layers"] for v in values} == {0, 1, 2}
    assert {v["problem_type"] for v in values} >= {None, "regression"}
    assert any("head_dim" in v for v in values) and any(
        "1" in v.get("id2label", {}) for v in values
    )
    assert any(v["hidden_size"] % v["num_attention_heads"] for v in values)
    assert any(case.frames != case.values["num_frames"] for case in cases)
