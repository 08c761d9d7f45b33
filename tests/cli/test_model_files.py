# SPDX-License-Identifier: Apache-2.0
"""`--model` of both commands as one file: its processor is that of its conversion."""

import argparse
import json
import shutil

import numpy as np
import pytest
from clips import write_clip
from commands import run_command
from helpers import mostly_slow, random_params
from tiny import VIDEOMAE, VIVIT

import checkpoints_convert.__main__
import vivit_jax
from vivit_jax.cli.__main__ import main
from vivit_jax.models.build import build_model

# Widths and eps of the authors' smallest models, whose files need no config.json.
AUTHORS = VIDEOMAE | dict(
    image_size=16,
    hidden_size=384,
    num_hidden_layers=1,
    num_attention_heads=6,
    decoder_hidden_size=192,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=3,
    layer_norm_eps=1e-6,
    fc_norm_eps=1e-6,
    decoder_norm_eps=1e-6,
)
PROCESSOR = vivit_jax.VideoProcessor.videomae(size=28, crop_size=(24, 16))
HEADS = ("classification", "pretraining")
TOLD = "cropped to 16x16 and normalised by ImageNet's mean and std, as VideoMAE's authors do"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=30, size=(48, 32))


def convert(*args):
    assert checkpoints_convert.__main__.main(["convert", *map(str, args)]) == 0


def save(directory, head, values, family=vivit_jax.VideoMAEConfig, processor=None):
    """A HuggingFace directory of a tiny model."""
    model = build_model(family(**values), head)
    vivit_jax.save_pretrained(directory, model, random_params(model, 0.1), processor)
    return directory


def authors_file(directory, head):
    """A .pth of VideoMAE's authors with the script's arguments, alone in its directory."""
    import torch

    pooling = dict(use_mean_pooling=head == "classification")
    convert(save(directory / "hf", head, AUTHORS | pooling), directory / "pth", "--to", "videomae")
    state = torch.load(directory / "pth/checkpoint.pth", weights_only=True)
    state["args"] = argparse.Namespace(num_frames=6, input_size=16)
    (directory / "alone").mkdir()
    torch.save(state, directory / "alone/x.pth")
    return directory / "alone/x.pth"


def run_json(capsys, *args):
    return run_command(capsys, *args, "--json")


def command(head, clip, directory):
    if head == "classification":
        return ("predict", clip)
    return ("reconstruct", clip, "--mask-ratio", "0.5", "--out", directory / "a.png", "--overwrite")


@pytest.mark.parametrize("head", mostly_slow(HEADS, "pretraining"))
def test_an_authors_file_alone_is_read_as_its_conversion(clip, capsys, caplog, tmp_path, head):
    file = authors_file(tmp_path, head)
    convert(file, tmp_path / "converted")
    args = command(head, clip, tmp_path)
    status, converted, err = run_json(capsys, *args, "--model", tmp_path / "converted")
    assert status == 0 and not err
    for model in (file, file.parent):
        caplog.clear()
        status, alone, err = run_json(capsys, *args, "--model", model)
        assert status == 0 and alone == converted and not err
        (told,) = [text for text in caplog.messages if "no preprocessor_config.json" in text]
        assert f"beside {file}" in told and TOLD in told


@pytest.mark.parametrize("head", mostly_slow(HEADS, "classification"))
def test_a_processor_beside_a_file_is_used(clip, capsys, tmp_path, head):
    file = authors_file(tmp_path, head)
    args = command(head, clip, tmp_path)
    _, default, _ = run_json(capsys, *args, "--model", file)
    vivit_jax.VideoProcessor.videomae(size=16, crop_size=16).save_pretrained(file.parent)
    status, own, err = run_json(capsys, *args, "--model", file)
    assert status == 0 and not err and own != default
    shutil.copytree(tmp_path / "hf", tmp_path / "beside")
    shutil.copy(file.parent / "preprocessor_config.json", tmp_path / "beside")
    results = [
        run_json(capsys, *args, "--model", tmp_path / "beside" / n)
        for n in ("", "model.safetensors")
    ]
    assert results[0] == results[1] and results[0][0] == 0


def test_a_scenic_file_is_read_as_its_conversion(clip, capsys, caplog, tmp_path):
    hf = save(tmp_path / "hf", "classification", VIVIT, vivit_jax.VivitConfig)
    convert(hf, tmp_path / "scenic", "--to", "scenic")
    (tmp_path / "scenic/preprocessor_config.json").unlink(missing_ok=True)
    shutil.copy(hf / "config.json", tmp_path / "scenic")
    convert(tmp_path / "scenic", tmp_path / "converted")
    file = next((tmp_path / "scenic").glob("checkpoint*"))
    results = {}
    for model in (tmp_path / "converted", file):
        status, out, _ = run_json(capsys, "predict", clip, "--model", model)
        assert status == 0
        results[model] = np.array([p["score"] for p in json.loads(out)[0]["predictions"]])
    told = "to a shortest edge of 48, cropped to 24x16 and normalised to [-1, 1], as scenic"
    assert told in caplog.text
    np.testing.assert_array_equal(*results.values())


def test_what_a_file_does_not_say_is_given_to_any_command(clip, capsys, tmp_path):
    """A scenic file alone: the error names the option, with which it works as with config.json."""
    hf = save(tmp_path / "hf", "classification", VIVIT, vivit_jax.VivitConfig)
    convert(hf, tmp_path / "scenic", "--to", "scenic")
    sizes = ("num_frames=6", "image_size=24,16")
    convert(tmp_path / "scenic/checkpoint_0", tmp_path / "converted", "--config", *sizes)
    alone = tmp_path / "alone" / "checkpoint_0"
    alone.parent.mkdir()
    shutil.copy(tmp_path / "scenic/checkpoint_0", alone)
    data = tmp_path / "list.txt"
    data.write_text(f"{clip} 1\n")

    def outputs(model, out, *config):
        """What each command prints or writes, by its name."""
        out.mkdir()
        given = ("--model", model, *(("--config", *config) if config else ()))
        files = {name: out / name for name in ("a.png", "a.npz", "a.json", "a.stablehlo")}
        for args in (
            ("predict", clip, *given, "--json"),
            ("extract", clip, *given, "--frame-stride", 2, "--out", files["a.npz"]),
            ("attention", clip, *given, "--out", files["a.png"], "--save", out / "maps.npz"),
            ("evaluate", *given, "--data", data, "--out", files["a.json"]),
            ("export", model, *given[2:], "--out", files["a.stablehlo"]),
        ):
            capsys.readouterr()
            yield args[0], main([*map(str, args)]), capsys.readouterr(), files

    for name, status, (_, err), files in outputs(alone, tmp_path / "refused"):
        assert status == 2 and "the weights do not say image_size" in err, name
        assert "--config image_size=224 num_frames=32\n" in err
        assert not any(path.exists() for path in files.values())
    found = {}
    for model, config in ((tmp_path / "converted", ()), (alone, sizes)):
        for name, status, (out, err), files in outputs(
            model, tmp_path / f"of-{model.name}", *config
        ):
            assert status == 0, (name, err)
            if name == "predict":
                value = json.loads(out)[0]["predictions"]
            elif name == "extract":
                value = np.load(files["a.npz"])["features"].tolist()
            elif name == "attention":
                value = np.load(files["a.png"].with_name("maps.npz"))["maps"].tolist()
            elif name == "evaluate":
                value = json.loads(files["a.json"].read_text())["videos"]
            else:
                value = json.loads(files["a.stablehlo"].with_suffix(".stablehlo.json").read_text())
                value = value["params"]["sha256"], value["config"]
            found.setdefault(name, []).append(value)
    assert list(found) == ["predict", "extract", "attention", "evaluate", "export"]
    for name, (one, other) in found.items():
        assert one == other, name
    assert (
        vivit_jax.VideoClassifier.from_pretrained(
            alone, config=dict(num_frames=6, image_size=(24, 16))
        )(clip)
        == found["predict"][0]
    )


def test_settings_against_a_config_are_reported_and_recorded(clip, capsys, caplog, tmp_path):
    hf = save(tmp_path / "hf", "pretraining", VIDEOMAE, processor=PROCESSOR)
    args = (clip, "--model", hf, "--out", tmp_path / "a.png", "--overwrite", "--config")
    for heads, told in ((4, None), (2, "num_attention_heads=2 (it says 4)")):
        caplog.clear()
        assert main(["reconstruct", *map(str, args), f"num_attention_heads={heads}"]) == 0
        found = [
            text for text in caplog.messages if "--config changes what the model computes" in text
        ]
        assert len(found) == (told is not None) and all(told in text for text in found)
    hf = save(tmp_path / "cls", "classification", VIDEOMAE, processor=PROCESSOR)
    (tmp_path / "list.txt").write_text(f"{clip} 1\n")
    args = ("--model", hf, "--data", tmp_path / "list.txt", "--out", tmp_path / "e.json")
    assert main(["evaluate", *map(str, args), "--config", "num_attention_heads=2"]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["config"] == ["num_attention_heads=2"]
    capsys.readouterr()
    for command in (["predict"], ["extract", "--out", tmp_path / "f.npz"]):
        given = [*command, "--model", hf, "--config", "num_attention_heads=4", clip]
        assert main([*map(str, given)]) == 2
        told = f"--config takes KEY=VALUE, got {str(clip)!r}; put positional arguments before it"
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("of", ["finetune", "probe"])
def test_a_run_stands_for_its_best_model(of, clip, capsys, caplog, tmp_path):
    run = tmp_path / "run"
    models = [run / "model"] if of == "probe" else [run / "models/9", run / "models/10"]
    for number, directory in enumerate(models):
        label = {i: f"{number} {i}" for i in range(5)}
        values = VIDEOMAE | dict(id2label=tuple(label.items()))
        save(directory, "classification", values, processor=PROCESSOR)
    status, text, _ = run_json(capsys, "predict", clip, "--model", run)
    assert status == 0 and json.loads(text)[0]["predictions"][0]["label"][0] == f"{len(models) - 1}"
    assert f"--model {run} is a run; its best model is {models[-1]}" in caplog.text


@pytest.mark.parametrize(
    "config", ["num_frames=6", 5, {3: 4}, [3], [("num_frames", 6)]], ids=lambda value: repr(value)
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path, config):
    hf = save(tmp_path / "hf", "classification", VIDEOMAE, processor=PROCESSOR)
    for load in (vivit_jax.from_pretrained, vivit_jax.VideoClassifier.from_pretrained):
        with pytest.raises(vivit_jax.ConfigError, match="config must be fields by name or a list"):
            load(hf, config=config)
    assert vivit_jax.VideoClassifier.from_pretrained(hf, config=None).config.num_frames == 6


@pytest.mark.parametrize("head", mostly_slow(HEADS, "pretraining"))
def test_without_any_processor_the_error_says_what_to_do(clip, capsys, tmp_path, head):
    hf = save(tmp_path / "hf", head, AUTHORS | dict(use_mean_pooling=False))
    grey = save(tmp_path / "grey", head, AUTHORS | dict(use_mean_pooling=False, num_channels=1))
    convert(grey, tmp_path / "pth", "--to", "videomae")
    for model in (hf, hf / "model.safetensors", tmp_path / "pth/checkpoint.pth"):
        args = command(head, clip, tmp_path)
        status, out, err = run_json(capsys, *args, "--model", model)
        assert status == 2 and not out and err.count("\n") == 1
        directory = model if model.is_dir() else model.parent
        assert (
            f"{directory} holds no processor file, expected preprocessor_config.json: copy" in err
        )
        assert "VideoProcessor.vivit() or .videomae()" in err and "JSON" not in err
    with pytest.raises(
        vivit_jax.ConfigError, match="is not valid JSON.*or the directory that holds one"
    ):
        vivit_jax.VideoProcessor.from_pretrained(model)
