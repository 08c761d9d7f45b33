# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax export --format onnx`: onnxruntime gives the model's numbers."""

import json
import sys

import numpy as np
import pytest
from commands import run_command
from helpers import clip, error, forward, random_params
from tiny import CASES, SMALL_VIDEOMAE, SMALL_VIVIT, config_of

import vivit_jax
from vivit_jax.errors import UserError
from vivit_jax.inference import export_onnx

ALLOWED = 1e-5  # measured 3.0e-7 with jax2onnx 0.13.0 and onnxruntime 1.32.0


def saved(directory, family):
    """A tiny classifier in a directory."""
    if family == "vivit":
        config = vivit_jax.VivitConfig(**SMALL_VIVIT, num_labels=4)
        model = vivit_jax.VivitForVideoClassification(config)
    else:
        own = {"attentive_heads": 4} if family == "attentive" else {}
        config = vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE | own, num_labels=4)
        model = vivit_jax.VideoMAEForVideoClassification(config)
    vivit_jax.save_pretrained(directory, model, random_params(model))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["videomae", "vivit", "attentive"])
def test_onnxruntime_gives_the_models_numbers(family, capsys, tmp_path):
    import onnxruntime  # here, as this and jax2onnx take seconds

    saved(tmp_path / "model", family)
    out = tmp_path / "model.onnx"
    status, printed, err = run_command(
        capsys, "export", tmp_path / "model", "--out", out, "--format", "onnx", "--json"
    )
    assert status == 0, err
    about = json.loads(printed)
    session = onnxruntime.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["pixel_values"]
    assert [each.name for each in session.get_outputs()] == ["logits"] == [*about["outputs"]]
    model, params = vivit_jax.from_pretrained(tmp_path / "model")
    for batch in (1, 3):
        pixels = clip(model.config, batch, seed=batch)
        (theirs,) = session.run(None, {"pixel_values": pixels})
        assert error(theirs, forward(model, params, pixels).logits) <= ALLOWED
    assert about["differences"]["logits"] <= ALLOWED
    assert json.loads((tmp_path / "model.onnx.json").read_text())["format"] == "onnx"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "self_attention", "dot_product"])
def test_factorised_models_take_a_fixed_number_of_clips(kind):
    import onnxruntime

    own = {"num_temporal_layers": 1} if kind == "encoder" else {}
    config = vivit_jax.VivitConfig(
        **SMALL_VIVIT, **own, attention_type=f"factorised_{kind}", **export_onnx.EXECUTION
    )
    model = vivit_jax.VivitForVideoClassification(config)
    params = random_params(model)
    with pytest.raises(UserError, match=r"a fixed number of clips only: give one \(--batch 1\)"):
        export_onnx.export_onnx(model, params)
    content = export_onnx.export_onnx(model, params, batch=2).program
    session = onnxruntime.InferenceSession(bytes(content), providers=["CPUExecutionProvider"])
    pixels = clip(model.config, 2, seed=2)
    (theirs,) = session.run(["logits"], {"pixel_values": pixels})
    assert error(theirs, forward(model, params, pixels).logits) <= ALLOWED


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_written(capsys, tmp_path, monkeypatch):
    import jax2onnx

    saved(tmp_path / "model", "videomae")
    translate = jax2onnx.to_onnx

    def scaled(function, *args, **options):
        return translate(lambda x: tuple(1.001 * y for y in function(x)), *args, **options)

    monkeypatch.setattr(jax2onnx, "to_onnx", scaled)
    status, _, err = run_command(
        capsys, "export", tmp_path / "model", "--out", tmp_path / "a.onnx", "--format", "onnx"
    )
    assert status == 2 and "the ONNX file computes something else than the model" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--out", "a.stablehlo"), "ends in '.stablehlo'; expected one of .onnx"),
        (("--out", "a.onnx", "--preprocess"), "--preprocess is for --format stablehlo"),
        (("--out", "a.onnx", "--params", "beside"), "--params is for --format stablehlo"),
        (("--out", "a.onnx", "--dtype", "bfloat16"), "--dtype is for --format stablehlo"),
        (("--out", "a.onnx", "--batch", "0"), "--batch must be at least 1"),
        (("--out", "a.onnx"), "exporting to ONNX needs the package 'jax2onnx'"),
    ],
)
def test_what_onnx_does_not_take(flags, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    status, _, err = run_command(capsys, "export", "model", "--format", "onnx", *flags)
    assert status == 2 and told in err and err.count("\n") == 1 and not [*tmp_path.iterdir()]


def test_a_model_of_another_form_is_refused(monkeypatch):
    monkeypatch.setattr(export_onnx, "check_onnx_extra", lambda: None)
    model = CASES["mae cls"][0](config_of("mae cls"))
    with pytest.raises(
        vivit_jax.UserError, match="the model has scan_layers=True, attention='auto"
    ):
        export_onnx.export_onnx(model, random_params(model))
    with pytest.raises(vivit_jax.UserError, match="batch is 0"):
        export_onnx.export_onnx(model, {}, batch=0)


def test_differences_of_nan_are_refused(monkeypatch):
    class Session:
        def __init__(self, *_, **__):
            pass

        def run(self, names, inputs):
            return [np.full((1, 5), np.nan)]

    fake = type(sys)("onnxruntime")
    fake.InferenceSession, fake.SessionOptions = Session, type("Options", (), {})
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    with pytest.raises(vivit_jax.UserError, match="computes something else"):
        export_onnx._differences(bytearray(), ["logits"], np.zeros(1), {"logits": np.ones((1, 5))})
