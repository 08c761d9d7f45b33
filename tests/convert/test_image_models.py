# SPDX-License-Identifier: Apache-2.0
"""Image checkpoints of every kind: what is read from each, and what is not an image ViT."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tiny_image_models import (
    KINDS,
    flax_names,
    save_msgpack,
    save_npz,
    save_timm,
    timm_names,
    torch_vit,
)

import vivit_jax
from checkpoints_convert.layouts.image_vit import open_image_model
from checkpoints_convert.rules import match_import, read_params
from checkpoints_convert.start.from_image import init_from_image_model
from vivit_jax import param_tree
from vivit_jax.models.build import expected_shapes

VIDEO = dict(num_frames=4, num_attention_heads=4)
HEAD = {
    "hf": ["classifier.bias", "classifier.weight"],
    "hf memory": ["classifier.bias", "classifier.weight"],
    "hf base": ["embeddings.mask_token", "pooler.dense.bias", "pooler.dense.weight"],
    "npz": ["head/bias", "head/kernel"],
    "npz old": ["head/bias", "head/kernel", "pre_logits/bias", "pre_logits/kernel"],
    "npz big": ["head/bias", "head/kernel"],
    "msgpack": ["output_projection/bias", "output_projection/kernel"],
    "state": [
        "global_step", "optimizer/state/step", "output_projection/bias", "output_projection/kernel",
    ],
    "timm": ["head.bias", "head.weight"],
}  # fmt: skip


def read(path, **options) -> dict[str, np.ndarray]:
    """The parameters of an image model, as a ViViT of one frame."""
    image = open_image_model(path, **options)
    expected = expected_shapes(image.config, "none", pooler=False)
    rows = match_import(image.tensors, image.rules, expected, image.title)
    return read_params(image.tensors, rows, expected, "float32")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def refused(path, config=VIDEO, error=vivit_jax.CheckpointError) -> str:
    with pytest.raises(error) as caught:
        init_from_image_model(path, config)
    return str(caught.value)


@pytest.fixture(scope="module")
def video(images):
    """Parameters of the joint video model that the HuggingFace directory gives."""
    return param_tree.flatten(init_from_image_model(images.path("hf"), VIDEO, head="none").params)


# --- every kind gives the same numbers -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_video_model(images, video, kind):
    model, params, report = init_from_image_model(images.path(kind), VIDEO, head="none")
    params = param_tree.flatten(params)
    assert params.keys() == video.keys()
    for path, value in params.items():
        assert value.dtype == np.float32 and np.array_equal(value, video[path]), path
    assert report.fresh == () and sorted(report.dropped) == HEAD[kind]
    config = model.config
    assert (config.num_frames, config.tubelet_size, config.image_size) == (4, (2, 8, 8), 24)
    function = (config.hidden_act, config.layer_norm_eps)
    flax = kind.startswith(("npz", "msgpack", "state"))
    # What vision_transformer, timm and the HuggingFace models compute with.
    eps = 1e-12 if kind.startswith("hf") else 1e-6
    assert function == ("gelu_fast" if flax else "gelu", eps)


def test_config_of_transformers_4(images, tmp_path, video):
    """It leaves out what later releases added, and has nulls for other defaults."""

    def config(values):
        for name in ("hidden_act", "num_channels", "layer_norm_eps", "qkv_bias", "encoder_stride"):
            del values[name]
        del values["pooler_act"], values["pooler_output_size"], values["dtype"]
        values |= {"hidden_act": None, "transformers_version": "4.13.0.dev0"}

    path = images.copy(tmp_path, "hf", config=config)
    model, params, _ = init_from_image_model(path, VIDEO, head="none")
    assert same(param_tree.flatten(params), video)
    assert (model.config.hidden_act, model.config.layer_norm_eps) == ("gelu", 1e-12)


def test_other_activation_epsilon_and_patches_of_a_config(tmp_path):
    torch_vit(
        hidden_act="relu", layer_norm_eps=1e-5, qkv_bias=False, patch_size=[8, 4], num_channels=1
    ).vit.save_pretrained(tmp_path)
    config = init_from_image_model(tmp_path, {"num_frames": 4}, head="none").model.config
    assert (config.hidden_act, config.layer_norm_eps, config.qkv_bias) == ("relu", 1e-5, False)
    assert (config.tubelet_size, config.grid, config.num_channels) == ((2, 8, 4), (2, 3, 6), 1)


def test_bfloat16_in_npz(images, tmp_path):
    """numpy stores it as two-byte voids, which is how in-between checkpoints are published."""
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in flax_names(images.vit).items()}
    path = save_npz(tmp_path / "vit.npz", tensors)
    with np.load(path) as stored:
        assert stored["cls"].dtype == np.dtype("V2")
    wanted = read(save_npz(tmp_path / "wide.npz", {n: x.astype("f4") for n, x in tensors.items()}))
    assert same(read(path), wanted)


def test_timm_heads(images, tmp_path, caplog):
    wide = torch_vit(hidden_size=192, num_hidden_layers=1, num_attention_heads=3).vit
    wide.save_pretrained(tmp_path / "hf")
    path = save_timm(tmp_path / "vit.safetensors", timm_names(wide))
    assert open_image_model(path).config.num_attention_heads == 3
    assert same(read(path), read(tmp_path / "hf"))
    usual = init_from_image_model(path, {"num_frames": 2}, head="none")
    assert "timm's plain ViTs" not in str(usual.report)
    other = dict(num_frames=2, num_attention_heads=12)
    model, params, report = init_from_image_model(path, other, head="none")
    assert params["layers_0"]["attention"]["query"]["kernel"].shape == (192, 12, 16)
    assert "num_attention_heads is 12 as given; timm's plain ViTs of this width have 3" in str(
        report
    )
    assert init_from_image_model(path, model.config, head="none").report == report

    unknown = images.path("timm")
    message = refused(unknown, {}, vivit_jax.ConfigError)
    assert "timm has no plain ViT of width 48 (192, 384, " in message
    assert "--config num_attention_heads=" in message
    message = refused(unknown, {"num_attention_heads": 5}, vivit_jax.ConfigError)
    assert "hidden_size 48 is not divisible by num_attention_heads 5" in message


def test_timm_without_biases_of_query_key_and_value(tmp_path):
    model = torch_vit(qkv_bias=False).vit
    model.save_pretrained(tmp_path / "hf")
    path = save_timm(tmp_path / "vit.safetensors", timm_names(model))
    assert open_image_model(path, heads=4).config.qkv_bias is False
    ours = read(path, heads=4)
    assert same(ours, read(tmp_path / "hf")) and "layers_0/attention/key/bias" not in ours


def test_more_than_ten_layers_keep_their_order(tmp_path):
    model = torch_vit(num_hidden_layers=12).vit
    model.save_pretrained(tmp_path / "hf")
    wanted = read(tmp_path / "hf")
    assert same(read(save_npz(tmp_path / "vit.npz", flax_names(model))), wanted)
    assert same(read(save_timm(tmp_path / "vit.safetensors", timm_names(model)), heads=4), wanted)
    for i in range(12):
        bias = model.layers[i].mlp.fc2.bias.detach().numpy()
        assert np.array_equal(wanted[f"layers_{i}/mlp_out/bias"], bias)


def test_image_model_of_a_single_file_and_of_a_directory(images, tmp_path, video):
    shutil.copy(images.path("npz"), tmp_path / "vit.npz")
    params = init_from_image_model(tmp_path, VIDEO, head="none").params
    assert same(param_tree.flatten(params), video)
    params = init_from_image_model(images.path("hf") / "model.safetensors", VIDEO, head="none")[1]
    assert same(param_tree.flatten(params), video)


# --- what is not an image ViT --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["vivit cls", "vivit base", "mae base", "mae pretraining"])
def test_video_checkpoints_say_what_opens_them(checkpoints, case):
    message = refused(checkpoints.path(case))
    assert "is a video model already: its patch embedding has shape (48, 3, 2, 8, 8)" in message
    assert "Load it with vivit_jax.from_pretrained" in message


@pytest.mark.parametrize("name", ["embedding/kernel", "patch_embed.proj.weight"])
def test_video_checkpoints_of_other_names(tmp_path, name):
    path = save_npz(tmp_path / "video.npz", {name: np.zeros((2, 8, 8, 3, 48), "f4")})
    assert "is a video model already" in refused(path)


def test_factorised_encoder_with_an_image_kernel(tmp_path, images):
    tensors = {n.replace("Transf", "SpatialTransf"): x for n, x in flax_names(images.vit).items()}
    path = save_npz(tmp_path / "video.npz", tensors)
    assert "(8, 8, 3, 48) and it has a SpatialTransformer" in refused(path)


@pytest.mark.parametrize("kind", ["hf", "hf memory", "npz old", "state", "timm"])
def test_from_pretrained_says_what_opens_an_image_model(images, kind):
    with pytest.raises(vivit_jax.UserError) as caught:
        vivit_jax.from_pretrained(images.path(kind))
    assert "holds an image model. Start a video model from it with" in str(caught.value)
    assert "vivit_jax.init_from_image_model" in str(caught.value)


def test_something_else(tmp_path):
    path = save_timm(tmp_path / "other.safetensors", {"conv1.weight": np.zeros((8, 3, 7, 7), "f4")})
    message = refused(path)
    assert "is not an image ViT: it has no patch embedding" in message
    assert "embeddings.patch_embeddings.projection.weight, patch_embed.proj.weight" in message
    path = save_timm(path, {"patch_embed.proj.weight": np.zeros((48, 192), "f4")})
    assert "is not an image ViT: it has a kernel of (48, 192)" in refused(path)
    assert "does not exist" in refused(tmp_path / "nowhere")


EXTRA = np.zeros((1, 1, 48), "f4")


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.update({"dist_token": EXTRA}), "dist_token  (1, 1, 48)"),
        (
            lambda t: t.update({f"blocks.{i}.ls1.gamma": EXTRA[0, 0] for i in range(3)}),
            "3 unexpected\n  unexpected (3):\n    blocks.{0-2}.ls1.gamma  (48,)",
        ),
        (lambda t: t.pop("blocks.1.mlp.fc2.bias"), "blocks.1.mlp.fc2.bias  expected (48,)"),
        (
            lambda t: t.update({"blocks.2.attn.qkv.weight": np.zeros((144, 40), "f4")}),
            "blocks.2.attn.qkv.weight  got (144, 40), expected (144, 48)",
        ),
        (
            lambda t: t.update({"norm.weight": np.zeros(48, "i4")}),
            "norm.weight  int32, expected one of float32",
        ),
        (lambda t: t.pop("pos_embed"), "pos_embed is missing, expected 3 axes"),
        (lambda t: t.pop("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.weight is missing"),
        (
            lambda t: t.update({"pos_embed": t["pos_embed"][:, 1:]}),
            "pos_embed holds 8 positions of patches, expected a square image",
        ),
        (lambda t: t.update({"pos_embed": t["pos_embed"][0]}), "pos_embed is (10, 48), expected 3"),
    ],
    ids=[
        "distilled", "layer scale", "missing", "shape", "dtype", "no positions", "no first MLP",
        "not square", "rank",
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(images, tmp_path, edit, expected):
    message = refused(images.copy(tmp_path, "timm", edit))
    assert expected in message, message
    assert str(tmp_path) in message


def test_all_that_is_wrong_is_in_one_error(images, tmp_path):
    def edit(tensors):
        del tensors["vit.layernorm.bias"]
        tensors["distillation_classifier.weight"] = EXTRA
        tensors["vit.embeddings.position_embeddings"] = EXTRA

    message = refused(images.copy(tmp_path, "hf", edit))
    assert (
        "read as an image ViT, does not fit the model: 1 missing, 1 unexpected, 1 wrong" in message
    )


def test_damaged_flax_trees(images, tmp_path):
    tensors = flax_names(images.vit)
    query = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    flat = tensors | {query: tensors[query].reshape(48, 48)}
    message = refused(save_npz(tmp_path / "flat.npz", flat))
    assert f"{query} is (48, 48), expected 3 axes" in message
    extra = {"Transformer/encoderblock_0/Adapter_0/kernel": np.zeros((2, 2), "f4")}
    tree = unflatten_dict(tensors | extra, sep="/")
    message = refused(save_msgpack(tmp_path / "vit.msgpack", {"params": tree}))
    assert "Transformer/encoderblock_0/Adapter_0/kernel  (2, 2)" in message
    assert "1 unexpected" in message and "missing" not in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "deit"}, "model_type is 'deit', expected 'vit'"),
        ({"hidden_act": "geglu"}, "hidden_act must be one of"),
        ({"patch_size": [8, 8, 8]}, "patch_size must be one or two positive integers, got [8, 8"),
        ({"patch_size": "8"}, "tubelet_size must be 3 positive integers"),
        ({"image_size": [24]}, "image_size must be a positive integer or 2 positive integers"),
        ({"image_size": 7}, "image_size 7 is less than one patch height of 8"),
    ],
)
def test_configs_that_are_no_image_vits(images, tmp_path, change, expected):
    path = images.copy(tmp_path, "hf", config=lambda values: values.update(change))
    message = refused(path, error=vivit_jax.ConfigError)
    assert expected in message and "config.json" in message, message


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_config_files_that_cannot_be_read(images, tmp_path, text):
    path = images.copy(tmp_path, "hf") / "config.json"
    path.unlink() if text is None else path.write_text(text)
    message = refused(path.parent, error=vivit_jax.ConfigError)
    found = {None: "does not exist", "{": "is not valid JSON", "[]": "model_type is 'list'"}
    assert found[text] in message and str(path) in message


def test_config_of_another_size_than_the_weights(images, tmp_path):
    config = {"hidden_size": 64}
    path = images.copy(tmp_path, "hf", config=lambda values: values.update(config))
    assert json.loads((path / "config.json").read_text())["hidden_size"] == 64
    assert "wrong shape" in refused(path)
