# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax export`: a process without this library runs the files, with the live model's outputs.

Differences are those of `helpers.error`, the largest one over the RMS of the live model's output
where that exceeds 1; allowed 1e-6.
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import run_command
from helpers import clip, error, forward, mostly_slow, random_params
from tiny import CASES, config_of
from variants import variant_config

import vivit_jax
from vivit_jax.cli.__main__ import main
from vivit_jax.data.transforms.processor_in_jax import pixels_inside

ALLOWED = 1e-6
SIZE = (24, 16)

# What a user runs for each directory: the file and jax, with nothing of ours.
RUN = """
import json, sys
import numpy as np
import jax
from jax import export
from safetensors.numpy import load_file
for place in sys.argv[1:]:
    about = json.load(open(place + "/model.stablehlo.json"))
    program = export.deserialize(bytearray(open(place + "/model.stablehlo", "rb").read()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}, program.platforms
    before = ()
    if about["params"]["at"] == "beside":
        before = (load_file(place + "/model.stablehlo.safetensors"),)
    inputs = np.load(place + "/in.npz")
    results = {}
    for name in inputs:
        for output, value in jax.jit(program.call)(*before, inputs[name]).items():
            results[f"{name}.{output}"] = value
    np.savez(place + "/out.npz", **results)
for module in ("vivit_jax", "checkpoints_convert", "flax"):
    assert module not in sys.modules, module
"""
MODELS = {
    "mae cls": ((), {"logits"}),
    "vivit cls": (("--params", "beside"), {"logits"}),
    "encoder": ((), {"logits"}),
    "vivit base": ((), {"last_hidden_state", "pooler_output"}),
    "mae pretraining": ((), {"last_hidden_state"}),
    "attentive": ((), {"logits"}),
}
ALWAYS = ("mae cls", "vivit cls", "mae pretraining", "attentive")
FRAMES = {"cropped": SIZE, "wide": (27, 61)}
HIGHEST = ("--precision", "highest", "--json")


def processor(**changes):
    named = {"size": {"shortest_edge": 26}, "crop_size": SIZE} | changes
    return vivit_jax.VideoProcessor.named("videomae-imagenet", **named)


def saved(directory, case, **changes):
    """A tiny model in a directory: of `tiny.CASES`, with an attentive head, or a form of ViViT."""
    if case == "attentive":
        config = config_of("mae cls", attentive_heads=4, **changes)
        model = vivit_jax.VideoMAEForVideoClassification(config)
    elif case in CASES:
        model = CASES[case][0](config_of(case, **changes))
    else:
        model = vivit_jax.VivitForVideoClassification(variant_config(case, **changes))
    # An attentive head of large weights turns rounding into 1.6e-6.
    params = random_params(model, 0.1 if case == "attentive" else 0.3)
    vivit_jax.save_pretrained(directory, model, params, processor())
    return model, params


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    return directory, *saved(directory, "mae cls")


def command(*args) -> str:
    """The output of the command, which must succeed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["export", *map(str, args)]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    return exports((*ALWAYS, *FRAMES), tiny, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def exported_too(tiny, tmp_path_factory):
    return exports(set(MODELS) - set(ALWAYS), tiny, tmp_path_factory.mktemp("exported too"))


def exports(names, tiny, root):
    """By name: directory, what was printed, model, parameters, inputs.

    In the directories are the outputs of one fresh process.
    """
    found = {}
    for name in names:
        place = root / name
        if name in MODELS:
            model, params = saved(place, name)
            inputs = {f"batch {b}": clip(model.config, b, seed=b) for b in (1, 5)}
            options = MODELS[name][0]
        else:
            place.mkdir()
            _, model, params = tiny
            rng, size = np.random.default_rng(0), FRAMES[name]
            inputs = {
                f"batch {b}": rng.integers(0, 256, (b, 6, *size, 3), dtype=np.uint8) for b in (1, 5)
            }
            options = ("--preprocess",)
            if name != "cropped":
                options = (*options, "--input-size", "x".join(map(str, size)))
        source = place if name in MODELS else tiny[0]
        printed = command(source, "--out", place / "model.stablehlo", *options, *HIGHEST)
        np.savez(place / "in.npz", **inputs)
        if name == "mae pretraining":  # the encoder, all patches visible
            model, params = vivit_jax.from_pretrained(place, "none")
        found[name] = place, json.loads(printed), model, params, inputs
    done = subprocess.run(
        [sys.executable, "-c", RUN, *(str(place) for place, *_ in found.values())],
        cwd=root,
        env={**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "default"},  # the file says otherwise
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize("case", mostly_slow(MODELS, *ALWAYS))
def test_equal_to_the_live_model_at_batch_1_and_5(case, request):
    found = request.getfixturevalue("exported" if case in ALWAYS else "exported_too")
    place, about, model, params, inputs = found[case]
    results, outputs = np.load(place / "out.npz"), MODELS[case][1]
    assert {name.partition(".")[2] for name in results} == set(about["outputs"]) == outputs
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    for name, value in results.items():
        given, _, output = name.partition(".")
        expected = getattr(forward(model, params, inputs[given]), output)
        assert value.shape == expected.shape and np.std(value) > 0.01
        assert error(value, expected) <= ALLOWED, name
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert about["params"]["count"] == count
    size = (place / "model.stablehlo").stat().st_size
    assert about["bytes"] == size and (size > 4 * count) == (about["params"]["at"] == "inside")
    # Python's stack would name files of the exporting machine.
    assert b".py" not in (place / "model.stablehlo").read_bytes()


@pytest.mark.parametrize("name", FRAMES)
def test_preprocessing_inside(name, exported):
    place, about, model, params, frames = exported[name]
    assert about["inputs"] == {"frames": {"dtype": "uint8", "shape": ["b", 6, *FRAMES[name], 3]}}
    results, cropped = np.load(place / "out.npz"), name == "cropped"
    outside = processor(do_resize=False, do_center_crop=False) if cropped else processor()
    for given, clips in frames.items():
        expected = forward(model, params, outside(clips)).logits
        assert error(results[f"{given}.logits"], expected) <= ALLOWED
    assert about["preprocessing"]["processor"] == processor().to_dict()
    assert ("resize" in about["preprocessing"]["inside"]) != cropped


def test_other_parameters_give_other_outputs(tiny, tmp_path):
    """The comparison can fail: it sees a difference in one bias."""
    _, model, params = tiny
    pixels = clip(model.config, 1)
    exported = vivit_jax.export_model(model, params, precision="highest")
    call = jax.export.deserialize(exported.program).call
    assert error(call(pixels)["logits"], forward(model, params, pixels).logits) <= ALLOWED
    head = {**params["head"], "bias": params["head"]["bias"] + np.float32(1e-4)}
    other = forward(model, {**params, "head": head}, pixels).logits
    assert error(call(pixels)["logits"], other) > ALLOWED


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize(
    ("kind", "resample"),
    [("videomae-imagenet", resample) for resample in range(6)]
    + [("vivit-kinetics400", 2), ("vivit-scenic", 3)],
)
@pytest.mark.parametrize(
    ("size", "given"),
    [
        ({"shortest_edge": 40}, (64, 90)),  # smaller
        ({"shortest_edge": 40}, (33, 47)),  # larger
        ({"height": 48, "width": 36}, (120, 61)),  # one axis much more than the other
        ({"shortest_edge": 20}, (17, 50)),  # and the crop pads
    ],
)
def test_the_bits_of_the_processor(size, given, kind, resample):
    outside = vivit_jax.VideoProcessor.named(kind, size=size, crop_size=(32, 28), resample=resample)
    clips = np.random.default_rng(1).integers(0, 256, (1, 2, *given, 3), dtype=np.uint8)
    pixels = pixels_inside(outside, (32, 28), 3, given)(clips)
    np.testing.assert_array_equal(pixels, outside(clips))


def test_independent_channels_inside():
    kept = processor(image_mean=0.4, image_std=0.3, independent_channels=True)
    clips = np.random.default_rng(1).integers(0, 256, (1, 2, 30, 40, 4), dtype=np.uint8)
    pixels = pixels_inside(kept, SIZE, 4, (30, 40))(clips)
    np.testing.assert_array_equal(pixels, kept(clips))
    with pytest.raises(vivit_jax.UserError, match="independent_channels"):
        pixels_inside(dataclasses.replace(kept, independent_channels=False), SIZE, 4, (30, 40))


def test_what_the_json_says(tiny, tmp_path, capsys):
    directory, model, _ = tiny
    file = tmp_path / "model.stablehlo"
    status, out, _ = run_command(
        capsys, "export", directory, "--out", file, "--batch", "2", "--dtype", "bfloat16"
    )
    about = json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert status == 0 and about["config"] == model.config.to_dict()
    assert about["labels"] == list(model.config.labels) and about["dtype"] == "bfloat16"
    assert about["inputs"]["pixel_values"]["shape"] == [2, 6, 24, 16, 3]
    assert about["outputs"]["logits"]["shape"] == [2, 5]
    assert about["versions"]["jax"] == jax.__version__ and about["matmul_precision"] == "default"
    done = subprocess.run(
        [sys.executable, "-c", about["example"]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "logits" in done.stdout, done.stderr
    assert about["example"].splitlines()[-1] in out


def test_traced_as_for_cpu_whatever_the_machine_has(tiny, monkeypatch):
    """The program does not depend on where it is exported."""
    _, model, params = tiny
    here = vivit_jax.export_model(model, params).about["sha256"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert vivit_jax.export_model(model, params).about["sha256"] == here
    monkeypatch.setattr("vivit_jax.inference.export.traced_for", lambda _: contextlib.nullcontext())
    assert vivit_jax.export_model(model, params).about["sha256"] != here


def test_files_in_the_way_and_overwrite(tiny, tmp_path, capsys):
    directory, *_ = tiny
    file = tmp_path / "model.stablehlo"
    (tmp_path / "model.stablehlo.json").write_text("mine")
    status, _, err = run_command(capsys, "export", directory, "--out", file)
    assert status == 2 and "model.stablehlo.json exists" in err and not file.exists()
    status, *_ = run_command(capsys, "export", directory, "--out", file, "--overwrite")
    assert status == 0 and json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.stablehlo",
        "model.stablehlo.json",
    ]


def test_old_parameters_do_not_stay_beside_a_new_program(tiny, tmp_path, capsys):
    directory, *_ = tiny
    file, old = tmp_path / "model.stablehlo", tmp_path / "model.stablehlo.safetensors"
    assert run_command(capsys, "export", directory, "--out", file, "--params", "beside")[0] == 0
    file.unlink()
    (tmp_path / "model.stablehlo.json").unlink()
    status, _, err = run_command(capsys, "export", directory, "--out", file)
    assert status == 2 and f"{old} exists" in err
    status, out, err = run_command(
        capsys, "export", directory, "--out", file, "--overwrite", "--json"
    )
    assert status == 0 and f"removed {old}" in err and json.loads(out)["params"]["at"] == "inside"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.stablehlo",
        "model.stablehlo.json",
    ]


def test_a_part_that_cannot_be_written_leaves_the_old_files(tiny, tmp_path, capsys, monkeypatch):
    directory, *_ = tiny
    names = [f"model.stablehlo{end}" for end in ("", ".json", ".safetensors")]
    for name in names:
        (tmp_path / name).write_text("mine")

    def fail(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vivit_jax.cli.export.write_safetensors", fail)
    args = ("--out", tmp_path / names[0], "--params", "beside", "--overwrite")
    status, _, err = run_command(capsys, "export", directory, *args)
    assert status == 2 and len(err.splitlines()) == 1
    assert f"{tmp_path / names[0]} cannot be written: No space left on device; make room" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert all((tmp_path / name).read_text() == "mine" for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "model.pb"], "ends in '.pb'; expected one of .stablehlo"),
        (["--out", "no/model.stablehlo"], "there is no directory"),
        (["--out", "/proc/a.stablehlo"], "no file can be made in /proc"),
        # The program's own name is legal; that of a file beside it is too long.
        (["--out", f"{'a' * 240}.stablehlo"], "File name too long"),
        (["--input-size", "40x30"], "--input-size 40x30 needs --preprocess"),
        (["--preprocess", "--input-size", "40"], "'40', expected HxW"),
        (["--preprocess", "--input-size", "0x3"], "'0x3', expected HxW"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_wrong_options_before_anything_is_read(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = () if "--out" in options else ("--out", "model.stablehlo")
    status, _, err = run_command(capsys, "export", "no-such-model", *out, *options)
    assert status == 2 and message in err and len(err.splitlines()) == 1


def test_models_that_do_not_fit(tiny, tmp_path, capsys):
    directory, *_ = tiny
    args = ("--out", tmp_path / "a.stablehlo")
    status, _, err = run_command(capsys, "export", tmp_path / "missing", *args)
    assert status == 2 and "does not exist" in err
    wrong = tmp_path / "wrong"
    model, _ = saved(wrong, "mae pretraining")
    status, _, err = run_command(capsys, "export", wrong, *args, "--head", "classification")
    assert status == 2 and "VideoMAEForPreTraining, which has no classifier" in err
    processor(crop_size=(16, 16)).save_pretrained(wrong)
    status, _, err = run_command(
        capsys, "export", wrong, *args, "--preprocess", "--input-size", "40x40"
    )
    assert status == 2 and "into 16x16, the model takes 24x16" in err
    (wrong / "preprocessor_config.json").unlink()
    capsys.readouterr()
    status, _, err = run_command(capsys, "export", wrong, *args, "--preprocess")
    assert status == 2 and "holds no processor file" in err
    with pytest.raises(vivit_jax.UserError, match="needs a mask for each clip"):
        vivit_jax.export_model(model, {})
    assert not list(tmp_path.glob("a.*"))


def test_parameters_that_do_not_fit_in_one_file(tiny, monkeypatch):
    import vivit_jax.inference.export

    _, model, params = tiny
    monkeypatch.setattr(vivit_jax.inference.export, "LARGEST", 1000)
    with pytest.raises(vivit_jax.UserError, match="--params beside"):
        vivit_jax.export_model(model, params)
    assert vivit_jax.export_model(model, params, params_at="beside").params


def test_without_flatbuffers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    status, _, err = run_command(
        capsys, "export", "no-such-model", "--out", tmp_path / "model.stablehlo"
    )
    assert status == 2 and len(err.splitlines()) == 1
    assert "[export]'" in err and "flatbuffers" in err
