# SPDX-License-Identifier: Apache-2.0
"""from_pretrained and save_pretrained: heads, reports, strictness, placement."""

import json
import logging
import shlex

import jax
import numpy as np
import pytest
from flax import linen as nn
from tiny import CASES
from tiny_checkpoints import read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.pretrained import load_report
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params

LOGGER = "checkpoints_convert.pretrained"


def refused(call, *args, error=vivit_jax.CheckpointError, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def assert_complete(model, params):
    expected = param_tree.shapes_of(param_tree.flatten(abstract_params(model)))
    assert param_tree.shapes_of(param_tree.flatten(params)) == expected
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


# --- heads ---------------------------------------------------------------------------------------


def test_default_head_is_what_the_checkpoint_holds_and_nothing_is_reported(checkpoints, caplog):
    for case in ("vivit cls", "vivit base", "mae base", "mae cls", "mae pretraining"):
        assert not load_report(checkpoints.path(case))
        vivit_jax.from_pretrained(checkpoints.path(case))
    assert not caplog.records


def test_classifier_on_a_pretraining_checkpoint(checkpoints, caplog):
    path = checkpoints.path("mae pretraining")
    model, params = vivit_jax.from_pretrained(path, "classification", num_labels=7)
    assert_complete(model, params)
    assert model.config.num_labels == 7 and params["head"]["kernel"].shape == (48, 7)
    assert float(np.std(params["head"]["kernel"])) > 0 and not params["head"]["bias"].any()
    report = load_report(path, "classification", num_labels=7)
    assert report.fresh == ("head/kernel", "head/bias")
    assert "use_mean_pooling is false" in str(report)
    assert len(report.dropped) == 2 * 15 + 2 + 4 and "mask_token" in report.dropped
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.WARNING, report.brief)
    # Few names are listed, many counted; the whole list is one command away.
    lines = report.brief.splitlines()
    assert "  freshly initialised, not in the checkpoint (2): head/kernel, head/bias" in lines
    counts = "decoder 34, encoder_to_decoder, mask_token"
    assert f"  in the checkpoint, not in this model (36): {counts}" in lines
    assert lines[-1].endswith(f": vivit-convert inspect {shlex.quote(str(path))}")
    assert "decoder.decoder_layers.{0-1}.attention.output.dense.bias" in str(report)
    held = vivit_jax.from_pretrained(path)[1]
    assert same(params["backbone"], held["backbone"])


def test_fresh_parts_follow_the_seed(checkpoints):
    path = checkpoints.path("mae base")
    heads = [
        vivit_jax.from_pretrained(path, "classification", num_labels=3, seed=seed)[1]["head"]
        for seed in (1, 1, 2)
    ]
    assert same(heads[0], heads[1]) and not same(heads[0], heads[2])


def test_decoder_on_a_classification_checkpoint(checkpoints):
    path = checkpoints.path("mae cls")
    model, params = vivit_jax.from_pretrained(path, "pretraining")
    assert_complete(model, params)
    report = load_report(path, "pretraining")
    assert len(report.fresh) == 2 * 15 + 2 + 4
    assert sorted(report.dropped) == [
        "classifier.bias",
        "classifier.weight",
        "fc_norm.bias",
        "fc_norm.weight",
    ]


def test_headless_from_a_classifier_has_no_pooler_and_says_so(checkpoints, tmp_path):
    model, params = vivit_jax.from_pretrained(checkpoints.path("vivit cls"), "none")
    assert isinstance(model, vivit_jax.VivitModel) and not model.add_pooling_layer
    assert_complete(model, params)
    report = load_report(checkpoints.path("vivit cls"), "none")
    assert report.dropped == ("classifier.bias", "classifier.weight")
    assert "no pooling layer: add_pooling_layer=False" in str(report)
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    again, _ = vivit_jax.from_pretrained(tmp_path / "saved")
    assert not again.add_pooling_layer


def test_classifier_on_a_headless_model_drops_the_pooler(checkpoints):
    report = load_report(checkpoints.path("vivit base"), "classification")
    assert report.dropped == ("pooler.dense.bias", "pooler.dense.weight")
    assert report.fresh == ("head/kernel", "head/bias")


def test_other_number_of_labels_is_a_fresh_head(checkpoints):
    path = checkpoints.path("vivit cls")
    model, params = vivit_jax.from_pretrained(path, id2label={0: "a", 1: "b", 2: "c"})
    assert model.config.labels == ("a", "b", "c") and params["head"]["kernel"].shape == (48, 3)
    report = load_report(path, num_labels=3)
    assert report.fresh == ("head/kernel", "head/bias")
    assert report.dropped == ("classifier.bias", "classifier.weight")
    assert "num_labels is 3, the checkpoint's classifier has 5" in str(report)


def test_same_number_of_labels_keeps_the_head(checkpoints):
    path = checkpoints.path("vivit cls")
    model, params = vivit_jax.from_pretrained(path, num_labels=5, id2label=list("abcde"))
    assert not load_report(path, num_labels=5)
    assert model.config.labels == tuple("abcde")
    assert same(params, vivit_jax.from_pretrained(path)[1])


def test_heads_that_do_not_exist(checkpoints):
    path = checkpoints.path("vivit cls")
    message = refused(vivit_jax.from_pretrained, path, "pretraining", error=vivit_jax.UserError)
    assert "head is 'pretraining', expected one of ['classification', 'none'] for vivit" in message
    message = refused(vivit_jax.from_pretrained, path, "Classifier", error=vivit_jax.UserError)
    assert "head is 'Classifier'" in message
    message = refused(
        vivit_jax.from_pretrained, path, "none", num_labels=3, error=vivit_jax.ConfigError
    )
    assert "need head='classification'" in message


# --- strictness ----------------------------------------------------------------------------------


def test_missing_renamed_extra_and_misshaped_are_listed_at_once(damaged):
    stem = "vivit.encoder.layer.1.attention.attention.query"

    def edit(tensors):
        tensors["vivit.norm.weight"] = tensors.pop("vivit.layernorm.weight")
        del tensors["classifier.bias"]
        tensors["optimizer.step"] = np.zeros((), np.float32)
        tensors[f"{stem}.weight"] = tensors[f"{stem}.weight"][:, :-1].copy()
        for i in range(3):
            del tensors[f"vivit.encoder.layer.{i}.output.dense.bias"]

    message = refused(vivit_jax.from_pretrained, damaged("vivit cls", edit))
    for part in (
        "read as VivitForVideoClassification, does not fit the model: 5 missing, 2 unexpected, "
        "1 wrong shape",
        "vivit.layernorm.weight  expected (48,) [backbone/ln_final/scale (48,)]",
        "vivit.norm.weight  (48,) (perhaps vivit.layernorm.weight, renamed)",
        "classifier.bias  expected (5,) [head/bias (5,)]",
        "optimizer.step  ()",
        f"{stem}.weight  got (48, 47), expected (48, 48) "
        "[backbone/layers_1/attention/query/kernel (48, 4, 12)]",
        "vivit.encoder.layer.{0-2}.output.dense.bias  expected (48,)",
    ):
        assert part in message, message


def test_head_that_config_json_promises_but_the_file_lacks(damaged):
    def edit(tensors):
        del tensors["classifier.weight"], tensors["classifier.bias"]

    path = damaged("vivit cls", edit)
    assert "2 missing" in refused(vivit_jax.from_pretrained, path)
    model, _ = vivit_jax.from_pretrained(path, "none")  # nothing that is used is missing
    assert isinstance(model, vivit_jax.VivitModel)


@pytest.mark.parametrize("architectures", [None, ["MyOwnClass"]])
@pytest.mark.parametrize(
    "case", ["vivit cls", "vivit base", "mae pretraining", "mae cls", "mae base"]
)
def test_without_architectures_the_names_decide(damaged, case, architectures):
    path = damaged(case, config=lambda values: values.update(architectures=architectures))
    model, _ = vivit_jax.from_pretrained(path)
    assert type(model) is CASES[case][0]


def test_layers_that_the_config_does_not_have(damaged):
    path = damaged("mae cls", config=lambda values: values.update(num_hidden_layers=2))
    message = refused(vivit_jax.from_pretrained, path)
    assert "unexpected (15)" in message and "videomae.encoder.layer.2.output.dense.bias" in message


def test_config_of_another_family(damaged, checkpoints):
    values = json.loads((checkpoints.path("mae cls") / "config.json").read_text())
    path = damaged("vivit cls")
    (path / "config.json").write_text(json.dumps(values))
    message = refused(vivit_jax.from_pretrained, path)
    assert "model_type 'videomae' but the tensors are named vivit.*" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "does not exist; a checkpoint needs its config.json"),
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, expected a JSON object"),
        ('{"model_type": "timesformer"}', "model_type is 'timesformer', expected one of"),
        ('{"model_type": "vivit", "is_causal": true}', "does not implement: is_causal=True"),
        ('{"model_type": "vivit", "hidden_size": "big"}', "hidden_size must be"),
    ],
)
def test_wrong_config_json_is_named(damaged, text, expected):
    path = damaged("vivit cls")
    if text is None:
        (path / "config.json").unlink()
    else:
        (path / "config.json").write_text(text)
    message = refused(vivit_jax.from_pretrained, path, error=vivit_jax.ConfigError)
    assert str(path / "config.json") in message and expected in message


def test_save_refuses_params_that_do_not_fit(checkpoints, tmp_path):
    model, params = vivit_jax.from_pretrained(checkpoints.path("vivit cls"))
    params["head"]["extra"] = params["head"].pop("bias")
    params["backbone"]["cls"] = params["backbone"]["cls"][0]
    message = refused(vivit_jax.save_pretrained, tmp_path / "out", model, params)
    for part in (
        "params for VivitForVideoClassification do not fit the model",
        "head/bias  expected (5,)",
        "head/extra  (5,) (perhaps head/bias, renamed)",
        "backbone/cls  got (1, 48), expected (1, 1, 48)",
    ):
        assert part in message, message
    assert not (tmp_path / "out").exists()


def test_saving_midway_through_a_failure_leaves_nothing(checkpoints, tmp_path):
    class Processor:
        def save_pretrained(self, directory):
            raise RuntimeError("disk full")

    model, params = vivit_jax.from_pretrained(checkpoints.path("vivit cls"))
    with pytest.raises(RuntimeError, match="disk full"):
        vivit_jax.save_pretrained(tmp_path / "out", model, params, Processor())
    assert list(tmp_path.iterdir()) == []


# --- what is written and where parameters live ---------------------------------------------------


def test_processor_and_overwrite(checkpoints, tmp_path):
    model, params = vivit_jax.from_pretrained(checkpoints.path("vivit cls"))
    processor = vivit_jax.VideoProcessor.vivit()
    out = tmp_path / "out"
    vivit_jax.save_pretrained(out, model, params, processor, max_shard_size="50KB")
    assert vivit_jax.VideoProcessor.from_pretrained(out) == processor
    assert "is not empty" in refused(vivit_jax.save_pretrained, out, model, params)
    vivit_jax.save_pretrained(out, model, params, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert same_tensors(read_safetensors(out), checkpoints.hub_tensors("vivit cls"))


def test_a_single_file_with_config_json_beside_it(checkpoints):
    directory = checkpoints.path("vivit cls", "hub", "bin")
    assert not load_report(directory / "pytorch_model.bin")
    indexed = checkpoints.path("vivit cls", "hub", "sharded")
    assert not load_report(indexed / "model.safetensors.index.json")
    part = sorted(indexed.glob("*.safetensors"))[0]
    assert "missing" in refused(load_report, part) or "unexpected" in refused(load_report, part)


def test_execution_options_reach_the_model(checkpoints):
    model, params = vivit_jax.from_pretrained(
        checkpoints.path("vivit cls"),
        dtype="bfloat16",
        param_dtype="bfloat16",
        attention="xla",
        scan_layers=False,
        remat="block",
    )
    config = model.config
    assert (config.dtype, config.param_dtype, config.attention) == ("bfloat16", "bfloat16", "xla")
    assert not config.scan_layers and config.remat == "block"
    assert "layers_2" in params["backbone"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_parameters_take_the_read_buffers_over(checkpoints, monkeypatch):
    """On CPU no second copy of the weights is made."""
    import checkpoints_convert.pretrained as pretrained

    kept = {}

    def importing(*args, **kwargs):
        flat = real(*args, **kwargs)
        kept.update(flat)
        return flat

    real = pretrained.read_params
    monkeypatch.setattr(pretrained, "read_params", importing)
    _, params = vivit_jax.from_pretrained(checkpoints.path("vivit cls"))
    for path, leaf in param_tree.flatten(params).items():
        assert leaf.unsafe_buffer_pointer() == kept[path].ctypes.data, path


def test_donated_parameters_do_not_reach_the_buffers_of_another_load(checkpoints):
    path = checkpoints.path("vivit cls")
    _, params = vivit_jax.from_pretrained(path)
    before = jax.tree.map(np.array, params)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)
    after = step(step(params))
    assert same(jax.tree.map(lambda x: x * 4, before), after)


def test_sharded_arrays_are_saved(checkpoints, tmp_path):
    model, params = vivit_jax.from_pretrained(checkpoints.path("vivit cls"))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(leaf):
        axes = [("x" if n % 4 == 0 and leaf.ndim > 1 else None) for n in leaf.shape]
        first = [a if a and i == axes.index("x") else None for i, a in enumerate(axes)]
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*first)))

    spread_params = jax.tree.map(spread, params)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(spread_params))
    vivit_jax.save_pretrained(tmp_path / "out", model, spread_params)
    assert same_tensors(read_safetensors(tmp_path / "out"), checkpoints.hub_tensors("vivit cls"))


def test_boxed_parameters_are_saved(tmp_path, checkpoints):
    model, params = vivit_jax.from_pretrained(checkpoints.path("mae base"))
    boxed = jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, (None,) * leaf.ndim), params)
    vivit_jax.save_pretrained(tmp_path / "out", model, boxed)
    assert same_tensors(read_safetensors(tmp_path / "out"), checkpoints.hub_tensors("mae base"))


def test_own_epsilon_is_written_and_reported(checkpoints, tmp_path, caplog):
    import dataclasses

    model, params = vivit_jax.from_pretrained(checkpoints.path("mae cls"))
    ours = type(model)(dataclasses.replace(model.config, fc_norm_eps=1e-6))
    vivit_jax.save_pretrained(tmp_path / "out", ours, params)
    assert "fc_norm_eps is 1e-06 here; transformers computes with 1e-05" in caplog.text
    assert vivit_jax.from_pretrained(tmp_path / "out")[0].config.fc_norm_eps == 1e-6
