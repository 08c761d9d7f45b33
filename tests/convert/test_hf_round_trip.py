# SPDX-License-Identifier: Apache-2.0
"""Every model class in every spelling and kind of file, to JAX and back, bit for bit."""

import itertools

import jax
import numpy as np
import pytest
from helpers import assert_close, bool_mask, clip, mostly_slow, to_torch, torch_model
from tiny import CASES, config_of
from tiny_checkpoints import DIALECTS, STORAGE, read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.pretrained import load_report
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params

SPELLINGS = [
    pytest.param(case, dialect, storage, id=f"{case}-{dialect}-{storage}")
    for case in CASES
    for dialect in DIALECTS[case.split()[0]]
    for storage in (STORAGE if case in ("vivit cls", "mae pretraining") else STORAGE[:1])
]


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(rng.standard_normal(leaf.shape), leaf.dtype),
        abstract_params(model),
    )


def assert_same_tree(a, b):
    a, b = param_tree.flatten(a), param_tree.flatten(b)
    assert same_tensors({k: np.asarray(v) for k, v in a.items()}, jax.tree.map(np.asarray, b))


@pytest.mark.parametrize(("case", "dialect", "storage"), SPELLINGS)
def test_hf_to_jax_to_hf_is_bit_exact(checkpoints, tmp_path, case, dialect, storage):
    source = checkpoints.path(case, dialect, storage)
    model, params = vivit_jax.from_pretrained(source)
    assert isinstance(model, CASES[case][0])
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    assert same_tensors(read_safetensors(tmp_path / "saved"), checkpoints.hub_tensors(case))


@pytest.mark.parametrize(
    ("case", "scan_layers"),
    mostly_slow(
        itertools.product(CASES, [True, False]),
        *zip(CASES, itertools.cycle([True, False]), strict=False),
    ),
)
def test_jax_to_hf_to_jax_is_bit_exact(tmp_path, case, scan_layers):
    model = CASES[case][0](config_of(case, scan_layers=scan_layers))
    params = random_params(model)
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    again, loaded = vivit_jax.from_pretrained(tmp_path / "saved", scan_layers=scan_layers)
    assert again.config == model.config and type(again) is type(model)
    assert_same_tree(loaded, params)


COMPUTED = ("vivit cls", "mae pretraining")  # the parity tests compute every case


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_what_is_written_and_computes_the_same(tmp_path, case):
    import torch
    import transformers

    cls, hf_name, _ = CASES[case]
    model = cls(config_of(case))
    # Kernels near 1/sqrt(width): deeper layers then do not amplify rounding past the tolerance.
    params = jax.tree.map(lambda leaf: leaf * 0.3, random_params(model))
    vivit_jax.save_pretrained(tmp_path / "saved", model, params, max_shard_size="100KB")
    hf, info = getattr(transformers, hf_name).from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in info), info
    if case not in COMPUTED:
        return
    pixels = clip(model.config)
    inputs, masks = {}, {}
    if "pretraining" in case:
        positions = bool_mask(model.config)
        inputs["mask"] = vivit_jax.Mask.from_bool(positions)
        masks["bool_masked_pos"] = torch.from_numpy(positions)
    out = jax.jit(model.apply)({"params": params}, pixels, **inputs)
    with torch.inference_mode():
        reference = hf.eval()(to_torch(pixels), **masks)
    name = "last_hidden_state" if "base" in case else "logits"
    assert_close(getattr(out, name), reference[name].numpy(), name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("storage", ["single", "bin"])
def test_stored_dtype_is_kept(tmp_path, dtype, storage):
    import torch
    from safetensors.torch import load_file

    torch_model("vivit cls").to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    before = read_safetensors(tmp_path / "hf")
    if storage == "bin":
        tensors = load_file(tmp_path / "hf/model.safetensors")
        torch.save(tensors, tmp_path / "hf/pytorch_model.bin")
        (tmp_path / "hf/model.safetensors").unlink()
    with jax.enable_x64(dtype == "float64"):
        model, params = vivit_jax.from_pretrained(tmp_path / "hf", param_dtype=None)
        assert model.config.param_dtype == dtype
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
        vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    assert same_tensors(read_safetensors(tmp_path / "saved"), before)
    assert f'"dtype": "{dtype}"' in (tmp_path / "saved/config.json").read_text()


def test_float64_needs_x64(tmp_path):
    import torch

    torch_model("vivit cls").to(torch.float64).save_pretrained(tmp_path / "hf")
    with pytest.raises(vivit_jax.ConfigError, match="jax_enable_x64"):
        vivit_jax.from_pretrained(tmp_path / "hf", param_dtype=None)
    _, params = vivit_jax.from_pretrained(tmp_path / "hf")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}


def test_key_biases_are_left_out_and_reported(checkpoints):
    report = load_report(checkpoints.path("mae pretraining", "key_bias"))
    assert len(report.ignored) == 3 + 2 and not report.dropped and not report.fresh
    assert report.ignored[0] == "videomae.encoder.layer.0.attention.attention.key.bias"
    assert "cannot change the softmax" in str(report)
    assert "videomae.encoder.layer.{0-2}.attention.attention.key.bias" in str(report)
    assert not load_report(checkpoints.path("mae pretraining", "memory"))


def test_tied_and_strided_tensors_in_a_pickle(checkpoints, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file

    shutil.copytree(checkpoints.path("vivit cls"), tmp_path / "bin")
    tensors = load_file(tmp_path / "bin/model.safetensors")
    (tmp_path / "bin/model.safetensors").unlink()
    first, second = (f"vivit.encoder.layer.{i}.layernorm_before.weight" for i in (0, 1))
    tensors[second] = tensors[first]
    wide = "vivit.encoder.layer.0.intermediate.dense.weight"
    tensors[wide] = tensors[wide].t().contiguous().t()
    torch.save(tensors, tmp_path / "bin/pytorch_model.bin")
    model, params = vivit_jax.from_pretrained(tmp_path / "bin")
    scales = params["backbone"]["layers"]["ln_attention"]["scale"]
    assert np.array_equal(scales[1], tensors[first].numpy()) and np.array_equal(
        scales[0], scales[1]
    )
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    assert np.array_equal(read_safetensors(tmp_path / "saved")[wide], tensors[wide].numpy())
