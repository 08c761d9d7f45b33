# SPDX-License-Identifier: Apache-2.0
"""`vivit-convert verify` agrees where it should, and can disagree."""

import json

import numpy as np
import pytest
from commands import run_command
from helpers import torch_model
from safetensors.numpy import load_file, save_file
from tiny import CASES


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories that transformers wrote, by case, made when first asked for."""
    made = {}

    def directory(case):
        if case not in made:
            made[case] = tmp_path_factory.mktemp("verify")
            torch_model(case).save_pretrained(made[case])
        return made[case]

    return directory


def with_config(source, directory, **changes):
    directory.mkdir()
    (directory / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    "case", ["vivit base", "vivit cls", "mae base norm", "mae cls", "mae pretraining"]
)
def test_agreement(saved, case, capsys):
    status, out, err = run_command(capsys, "verify", saved(case), "--json", "--batch", "2")
    result = json.loads(out)
    assert status == 0 and result["passed"] and result["model"] == CASES[case][1], err
    names = [row["name"] for row in result["rows"]]
    assert names[:4] == ["embeddings", "block 0", "block 1", "block 2"]
    last = {"base": "pooler output", "base norm": "last hidden state"}
    assert names[-1] == last.get(case.partition(" ")[2], "loss")
    assert ("decoder block 1" in names) == ("pretraining" in case)
    for row in result["rows"]:
        assert 0 <= row["difference"] < 2e-5 * max(1, row["scale"])
        assert row["jax_error"] < 2e-5 * max(1, row["scale"]) and row["torch_error"] > 0


def test_disagreement_is_status_1_and_says_where(saved, tmp_path, capsys):
    # transformers norms with its own epsilon whatever config.json says.
    directory = with_config(saved("mae cls"), tmp_path / "eps", fc_norm_eps=0.5)
    status, out, _ = run_command(capsys, "verify", directory)
    assert status == 1 and "fc_norm_eps is 0.5 here; transformers computes with 1e-05" in out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert lines["block 2"].endswith("ok") and lines["logits"].endswith("DIFFERS")
    assert "DIFFER: 2 of 6 rows" in out


def test_tolerance(saved, capsys):
    assert run_command(capsys, "verify", saved("vivit cls"), "--tolerance", "1e-12")[0] == 1


def test_a_weight_file(saved, capsys):
    status, out, _ = run_command(capsys, "verify", saved("vivit cls") / "model.safetensors")
    assert status == 0 and "agree" in out


def test_an_index_beside_another_model(saved, tmp_path, capsys):
    from checkpoints_convert.convert import convert_checkpoint

    convert_checkpoint(saved("vivit cls"), tmp_path / "m", max_shard_size="60KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    (tmp_path / "m" / "model.safetensors").write_bytes(b"another model")
    status, out, err = run_command(
        capsys, "verify", tmp_path / "m" / "model.safetensors.index.json"
    )
    assert status == 0 and "agree" in out, err


@pytest.mark.parametrize("change", [{"return_dict": False}, {"output_attentions": True}])
def test_output_options_of_the_config_do_not_matter(saved, tmp_path, capsys, change):
    assert (
        run_command(capsys, "verify", with_config(saved("vivit cls"), tmp_path / "m", **change))[0]
        == 0
    )


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification"])
def test_labels_of_every_problem_type(saved, tmp_path, capsys, problem_type):
    directory = with_config(saved("vivit cls"), tmp_path / "m", problem_type=problem_type)
    status, out, _ = run_command(capsys, "verify", directory)
    assert status == 0 and "loss" in out


def test_damage_is_listed_by_us_before_transformers_sees_it(saved, tmp_path, capsys):
    directory = with_config(saved("vivit cls"), tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.weight"] = np.zeros((5, 7), np.float32)
    tensors["extra"] = tensors.pop("vivit.layernorm.bias")
    save_file(tensors, directory / "model.safetensors")
    status, out, err = run_command(capsys, "verify", directory)
    assert status == 2 and not out and "Traceback" not in err
    for name in ("classifier.weight", "vivit.layernorm.bias", "extra"):
        assert name in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", "-1"], "seed -1"),
        (["--tolerance", "nan"], "tolerance nan"),
        (["--tolerance", "inf"], "tolerance inf"),
        (["--batch", "0"], "batch 0"),
        (["--clip", "/nowhere.mp4"], "preprocessor_config.json"),
    ],
)
def test_wrong_arguments(saved, capsys, args, message):
    status, _, err = run_command(capsys, "verify", saved("vivit cls"), *args)
    assert status == 2 and message in err and err.count("\n") == 1
