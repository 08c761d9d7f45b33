# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert` from the outside."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from tiny_checkpoints import DIALECTS, read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.inspect import content_hash
from vivit_jax.data.transforms.processor_files import CONFIG_FILES
from vivit_jax.hub import PROCESSOR_FILES
from vivit_jax.typed import override, parse_settings

CONVERSIONS = [
    (case, dialect, storage)
    for case in ("vivit base", "vivit cls", "mae pretraining", "mae cls token 0")
    for dialect in DIALECTS[case.split()[0]]
    for storage in ("single", "sharded bin")
]


@pytest.mark.parametrize(("case", "dialect", "storage"), CONVERSIONS)
def test_convert_normalises_every_spelling(run, checkpoints, tmp_path, case, dialect, storage):
    source = checkpoints.path(case, dialect, storage)
    status, out, err = run("convert", source, tmp_path / "out")
    assert (status, err) == (0, "")
    expected = checkpoints.hub_tensors(case)
    assert same_tensors(read_safetensors(tmp_path / "out"), expected)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    left_out = 0 if dialect != "key_bias" else 5 if "pretraining" in case else 3
    assert (
        f"{len(expected) + left_out} tensors read, {left_out} of them left out, "
        f"{len(expected)} written" in out
    )
    assert ("cannot change the softmax" in out) == bool(left_out)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after["architectures"] == before["architectures"]
    family = {"vivit": vivit_jax.VivitConfig, "videomae": vivit_jax.VideoMAEConfig}
    read = family[after["model_type"]].from_dict
    assert read(after) == read(before)


def test_what_convert_writes_opens_in_transformers(run, checkpoints, tmp_path):
    import transformers

    source = checkpoints.path("mae pretraining", "key_bias", "bin")
    run("convert", source, tmp_path / "out", "--max-shard-size", "30KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    _, info = transformers.VideoMAEForPreTraining.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in info), info


def test_every_tensor_is_in_the_report(run, checkpoints, tmp_path):
    _, out, _ = run("convert", checkpoints.path("mae cls", "memory"), tmp_path / "out")
    stem = "videomae.encoder.layer.{0-2}.attention.attention"
    assert f"{stem}.query.bias  (48,) float32 -> {stem}.q_bias" in out
    assert f"{stem}.key.weight  (48, 48) float32\n" in out
    assert "fc_norm.weight  (48,) float32\n" in out


def test_dtype_and_processor(run, checkpoints, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkpoints.path("vivit cls"), source)
    vivit_jax.VideoProcessor.vivit().save_pretrained(source)
    status, out, _ = run("convert", source, tmp_path / "out", "--dtype", "bfloat16")
    assert status == 0 and re.search(r"\d+ written as bfloat16, [\d,]+ parameters\n", out)
    assert {str(t.dtype) for t in read_safetensors(tmp_path / "out").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    name = "preprocessor_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("name", PROCESSOR_FILES)
def test_a_processor_goes_along_whatever_its_file_is_called(run, checkpoints, tmp_path, name):
    source = tmp_path / "source"
    shutil.copytree(checkpoints.path("vivit cls"), source)
    processor = vivit_jax.VideoProcessor.vivit(size=40, crop_size=32)
    usual = processor.save_pretrained(source)
    values = json.loads(usual.read_text())
    usual.unlink()
    nested = {"video_processor": values} if name == "processor_config.json" else values
    (source / name).write_text(json.dumps(nested))
    status, out, _ = run("convert", source, tmp_path / "out")
    assert status == 0 and f"{name}, README.md, config.json to" in out
    assert vivit_jax.VideoProcessor.from_pretrained(tmp_path / "out") == processor


@pytest.mark.parametrize("way", ["convert", "save_pretrained"])
def test_another_model_s_processor_does_not_stay(run, checkpoints, tmp_path, way):
    """processor_config.json would be read before the new preprocessor_config.json."""
    out = tmp_path / "out"
    shutil.copytree(checkpoints.path("vivit cls"), out)
    old = vivit_jax.VideoProcessor.vivit(size=40, crop_size=32).to_dict()
    (out / "processor_config.json").write_text(json.dumps({"image_processor": old}))
    new = vivit_jax.VideoProcessor.vivit(size=50, crop_size=32)
    if way == "convert":
        source = tmp_path / "source"
        shutil.copytree(checkpoints.path("vivit cls"), source)
        new.save_pretrained(source)
        assert run("convert", source, out, "--overwrite")[0] == 0
    else:
        vivit_jax.save_pretrained(out, *vivit_jax.from_pretrained(out), new, overwrite=True)
    assert vivit_jax.VideoProcessor.from_pretrained(out) == new
    assert not (out / "processor_config.json").exists()


def test_processors_are_looked_for_in_the_files_that_are_copied():
    assert {name for name, _ in CONFIG_FILES} == set(PROCESSOR_FILES)


def test_destination_rules(run, checkpoints, tmp_path):
    source = checkpoints.path("vivit cls")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    status, out, err = run("convert", source, tmp_path / "out")
    assert status == 2 and "is not empty" in err and err.count("\n") == 1 and out == ""
    assert run("convert", source, tmp_path / "out", "--overwrite")[0] == 0
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    in_place = run("convert", tmp_path / "out", tmp_path / "out", "--overwrite")
    assert in_place[0] == 0
    assert same_tensors(read_safetensors(tmp_path / "out"), checkpoints.hub_tensors("vivit cls"))


def test_a_checkpoint_that_does_not_fit_leaves_no_directory(run, damaged, tmp_path):
    path = damaged("vivit cls", lambda tensors: tensors.pop("vivit.layernorm.bias"))
    status, _, err = run("convert", path, tmp_path / "out")
    assert status == 2 and "1 missing" in err and "vivit.layernorm.bias" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged"]


def test_failure_while_writing_leaves_no_directory(run, checkpoints, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints_convert.convert.write_config", full)
    status, _, err = run("convert", checkpoints.path("vivit cls"), tmp_path / "out")
    assert status == 2 and "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_config_settings(run, checkpoints, tmp_path):
    source = checkpoints.path("vivit cls")
    settings = ("--config", "layer_norm_eps=1e-5", "hidden_act=gelu")
    assert run("convert", source, tmp_path / "out", *settings)[0] == 0
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["layer_norm_eps"], values["hidden_act"]) == (1e-5, "gelu")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("num_hidden_layer=3", "has no field 'num_hidden_layer'; did you mean num_hidden_layers?"),
        ("scan_layers=true", "has no field 'scan_layers'"),
        ("qkv_bias", "--config takes KEY=VALUE, got 'qkv_bias'; put positional arguments"),
        ("layer_norm_eps=small", "layer_norm_eps must be a number, got 'small'"),
        ("hidden_size=48.5", "hidden_size must be a whole number, got '48.5'"),
        ("hidden_size=true", "hidden_size must be a whole number, got 'true'"),
        ("qkv_bias=1", "qkv_bias must be true or false, got '1'"),
        (
            "tubelet_size=2,8",
            "tubelet_size must be [a whole number, a whole number, a whole number], got '2,8'",
        ),
        ("num_labels=3", "classifier.weight  got (5, 48), expected (3, 48)"),
    ],
)
def test_wrong_settings(run, checkpoints, tmp_path, setting, expected):
    status, _, err = run(
        "convert", checkpoints.path("vivit cls"), tmp_path / "out", "--config", setting
    )
    assert status == 2 and expected in err, err


def test_settings_are_typed():
    config = vivit_jax.VivitConfig()
    changed = override(
        config,
        ["tubelet_size=4,16,16", "image_size=[112,224]", "qkv_bias=False", "problem_type=None"],
    )
    assert changed.tubelet_size == (4, 16, 16) and changed.image_size == (112, 224)
    assert changed.qkv_bias is False and changed.problem_type is None
    labels = override(config, ['id2label={"0": "a", "1": "b", "2": "c"}'])
    assert labels.labels == ("a", "b", "c")
    assert override(labels, ["num_labels=4"]).id2label is None
    with pytest.raises(vivit_jax.ConfigError, match="set twice"):
        override(config, ["qkv_bias=true", "qkv_bias=false"])


@pytest.mark.parametrize("name", ["class_splits", "split_names", "image_mean", "id2label"])
def test_a_list_can_be_taken_away(name):
    for settings in ([f"{name}=null"], {name: None}):
        assert parse_settings(vivit_jax.VideoMAEConfig, settings) == {name: None}


def test_errors_name_where_the_setting_was_given():
    given = {
        "--config: videomae has no field 'x'": ["x=1"],
        "--config: hidden_size must be a whole number, got 'a'": ["hidden_size=a"],
        "config: VideoMAEConfig has no field 'x'": {"x": 1},
        "config: hidden_size must be a whole number, got 'a'": {"hidden_size": "a"},
    }
    for expected, settings in given.items():
        with pytest.raises(vivit_jax.ConfigError, match=f"^{expected}"):
            parse_settings(vivit_jax.VideoMAEConfig, settings)


def test_inspect(run, checkpoints):
    status, out, err = run("inspect", checkpoints.path("mae pretraining", "key_bias", "sharded"))
    assert (status, err) == (0, "")
    for part in (
        "hf: VideoMAEForPreTraining, dialect 'key_bias', prefix 'videomae.'",
        "  decoder_hidden_size: 24\n",
        "  videomae.encoder.layer.{0-2}.attention.attention.query.weight  (48, 48) float32\n",
        "5 of them left out, none missing",
    ):
        assert part in out, out


def test_hash_is_of_the_content(run, checkpoints):
    def line(storage):
        out = run("inspect", checkpoints.path("vivit cls", "hub", storage))[1]
        return next(line for line in out.splitlines() if line.startswith("sha256"))

    assert line("single") == line("sharded") == line("bin") == line("sharded bin")
    from checkpoints_convert.files.open import open_checkpoint

    tensors = dict(open_checkpoint(checkpoints.path("vivit cls")).tensors)
    whole = content_hash(tensors)
    assert whole in line("single")
    tensors["classifier.biaz"] = tensors.pop("classifier.bias")
    assert content_hash(tensors) != whole


def test_inspect_shows_the_tensors_and_then_what_is_wrong(run, damaged):
    path = damaged("vivit cls", lambda tensors: tensors.pop("vivit.layernorm.bias"))
    status, out, err = run("inspect", path)
    assert status == 2 and "vivit.layernorm.weight  (48,)" in out and "1 missing" in err
    (path / "config.json").unlink()
    status, out, err = run("inspect", path)
    assert status == 2 and "vivit.layernorm.weight  (48,)" in out and "config.json" in err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_bad_sources(run, tmp_path, command):
    rest = [tmp_path / "out"] if command == "convert" else []
    for source, expected in (
        (tmp_path / "missing", "does not exist, and is not a hub id"),
        (tmp_path, "holds no weights"),
    ):
        status, _, err = run(command, source, *rest)
        assert status == 2 and expected in err and "Traceback" not in err
        assert err.count("\n") == 1


def test_layouts_offered_are_the_ones_implemented(run, checkpoints, tmp_path):
    source = checkpoints.path("vivit cls")
    for layout in ("hf", "scenic"):
        out = tmp_path / layout
        assert run("convert", source, out, "--from", "hf", "--to", layout)[0] == 0
        assert run("convert", out, tmp_path / f"from {layout}", "--from", layout)[0] == 0
    # Image models are only read, and what is written nowhere is not offered.
    for flags in (["--to", "vit"], ["--to", "timm"], ["--from", "timm"]):
        status, _, err = run("convert", source, tmp_path / "other", *flags)
        assert status == 2 and f"convert: {flags[0]} is '{flags[1]}'; " in err
    assert not (tmp_path / "other").exists()


def test_as_a_program(checkpoints, tmp_path):
    def program(*args):
        return subprocess.run(
            [sys.executable, "-m", "checkpoints_convert", *map(str, args)],
            capture_output=True,
            text=True,
            check=False,
        )

    done = program("--help")
    assert done.returncode == 0 and "inspect" in done.stdout and "convert" in done.stdout
    done = program("inspect", tmp_path / "missing")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr


def test_core_imports_neither_jax_nor_torch():
    code = (
        "from checkpoints_convert import rules, problems, source, size_checks, __main__; "
        "from checkpoints_convert.files import flax_files, open, save, torch_files; "
        "from checkpoints_convert.layouts import hf, image_vit, infer, registry, scenic; "
        "from checkpoints_convert.layouts import videomae_authors; import sys; "
        "assert not {'jax', 'torch', 'flax', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
