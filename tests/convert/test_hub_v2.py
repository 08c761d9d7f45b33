# SPDX-License-Identifier: Apache-2.0
"""VideoMAE V2 as the hub has it: fields under model_config, weights under model., an encoder."""

import json
import math

import jax
import numpy as np
import pytest
from helpers import mostly_slow
from tiny_checkpoints import read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.pretrained import load_report
from checkpoints_convert.source import open_source
from vivit_jax.layers.linear import LayerNorm
from vivit_jax.models import videomae

WIDTH, DEPTH, HEADS, MLP = 24, 2, 3, 96
SECTION = {
    "img_size": 16,
    "patch_size": 8,
    "in_chans": 3,
    "num_classes": 0,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": 4,
    "qkv_bias": True,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "norm_layer": "nn.LayerNorm",
    "layer_norm_eps": 1e-6,
    "init_values": 0.0,
    "use_learnable_pos_emb": False,
    "tubelet_size": 2,
    "use_mean_pooling": True,
    "with_cp": False,
    "num_frames": 4,
    "cos_attn": False,
}
TOP = {
    "model_type": "VideoMAEv2_Base",
    "architectures": ["VideoMAEv2_Base"],
    "auto_map": {
        "AutoModel": "modeling_videomaev2.VideoMAEv2",
        "AutoConfig": "modeling_config.VideoMAEv2Config",
    },
    "torch_dtype": "float32",
    "transformers_version": "4.38.0",
    "use_safetensors": True,
}


def weights(classes=0, mean_pooling=True, biases=True, seed=0) -> dict[str, np.ndarray]:
    norm = "fc_norm" if mean_pooling else "norm"
    shapes = {
        "patch_embed.proj.weight": (WIDTH, 3, 2, 8, 8),
        "patch_embed.proj.bias": (WIDTH,),
        f"{norm}.weight": (WIDTH,),
        f"{norm}.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        block = {
            "norm1.weight": (WIDTH,),
            "norm1.bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "norm2.weight": (WIDTH,),
            "norm2.bias": (WIDTH,),
            "mlp.fc1.weight": (MLP, WIDTH),
            "mlp.fc1.bias": (MLP,),
            "mlp.fc2.weight": (WIDTH, MLP),
            "mlp.fc2.bias": (WIDTH,),
        }
        if biases:
            block |= {"attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    if classes:
        shapes |= {"head.weight": (classes, WIDTH), "head.bias": (classes,)}
    rng = np.random.default_rng(seed)
    return {n: (rng.standard_normal(s) * 0.3 + 0.1).astype(np.float32) for n, s in shapes.items()}


def hub_directory(path, tensors, *, top=(), storage="safetensors", **section):
    """A directory as the hub has it; `section` changes what stands under model_config."""
    import torch
    from safetensors.numpy import save_file

    path.mkdir(parents=True)
    values = TOP | {"model_config": SECTION | section} | dict(top)
    (path / "config.json").write_text(json.dumps(values))
    named = {f"model.{name}": value for name, value in tensors.items()}
    if storage == "safetensors":
        save_file(named, path / "model.safetensors", {"format": "pt"})
    else:
        torch.save({n: torch.from_numpy(v) for n, v in named.items()}, path / "pytorch_model.bin")
    return path


def reference(w, clip, eps=1e-6):
    """Tokens, feature and logits of a clip [t, h, w, c], by the paper's formulas in float64."""
    w = {name: value.astype(np.float64) for name, value in w.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    t, h, v, _ = clip.shape
    cut = clip.astype(np.float64).reshape(t // 2, 2, h // 8, 8, v // 8, 8, 3)
    patches = cut.transpose(0, 2, 4, 6, 1, 3, 5).reshape(-1, 3 * 2 * 64)
    x = patches @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    angle = np.arange(len(x))[:, None] / 10000 ** (2 * (np.arange(WIDTH) // 2) / WIDTH)
    x = x + np.where(np.arange(WIDTH) % 2, np.cos(angle), np.sin(angle))
    for i in range(DEPTH):
        b = f"blocks.{i}."
        qkv = norm(x, f"{b}norm1") @ w[f"{b}attn.qkv.weight"].T
        if f"{b}attn.q_bias" in w:
            zero = np.zeros(WIDTH)
            qkv = qkv + np.concatenate([w[f"{b}attn.q_bias"], zero, w[f"{b}attn.v_bias"]])
        q, k, v = (part.reshape(len(x), HEADS, -1) for part in np.split(qkv, 3, -1))
        scores = np.einsum("qhe,khe->hqk", q, k) / math.sqrt(WIDTH // HEADS)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khe->qhe", scores, v).reshape(len(x), WIDTH)
        x = x + mixed @ w[f"{b}attn.proj.weight"].T + w[f"{b}attn.proj.bias"]
        m = norm(x, f"{b}norm2") @ w[f"{b}mlp.fc1.weight"].T + w[f"{b}mlp.fc1.bias"]
        m = m * 0.5 * (1 + np.vectorize(math.erf)(m / math.sqrt(2)))
        x = x + m @ w[f"{b}mlp.fc2.weight"].T + w[f"{b}mlp.fc2.bias"]
    feature = norm(x.mean(0), "fc_norm") if "fc_norm.weight" in w else norm(x, "norm")[0]
    logits = feature @ w["head.weight"].T + w["head.bias"] if "head.weight" in w else None
    return (x if "fc_norm.weight" in w else norm(x, "norm")), feature, logits


CLIP = np.random.default_rng(1).standard_normal((1, 4, 16, 16, 3)).astype(np.float32)


def close(got, expected):
    """Measured here: 2e-6 of the largest value."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    return True


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return hub_directory(tmp_path_factory.mktemp("hub") / "encoder", weights())


@pytest.mark.parametrize(
    "name", mostly_slow(["Small", "Base", "Large", "Huge", "giant"], "Base", "giant")
)
def test_directory_and_file_give_tokens_and_feature(name, tmp_path, caplog):
    top = {"model_type": f"VideoMAEv2_{name}", "architectures": ["VideoMAEv2"]}
    path = hub_directory(tmp_path / "model", weights(), top=top)
    tokens, feature, _ = reference(weights(), CLIP[0])
    for source in (path, path / "model.safetensors"):
        model, params = vivit_jax.from_pretrained(source)
        assert type(model).__name__ == "VideoMAEModel" and model.add_pooling_layer
        out = model.apply({"params": params}, CLIP)
        close(out.last_hidden_state[0], tokens)
        close(out.pooler_output[0], feature)
    assert not caplog.records


def test_hub_id(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--OpenGVLab--VideoMAEv2-Base", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    hub_directory(repository / "snapshots" / commit, weights())
    model, params = vivit_jax.from_pretrained("OpenGVLab/VideoMAEv2-Base")
    out = model.apply({"params": params}, CLIP)
    close(out.pooler_output[0], reference(weights(), CLIP[0])[1])


@pytest.mark.parametrize(
    "section,make",
    [
        ({"num_classes": 5}, {"classes": 5}),
        ({"num_classes": 5, "use_mean_pooling": False}, {"classes": 5, "mean_pooling": False}),
        ({"use_mean_pooling": False}, {"mean_pooling": False}),
        ({"qkv_bias": False}, {"biases": False}),
        ({"mlp_ratio": 4.0, "img_size": [16, 16], "qk_scale": (WIDTH // HEADS) ** -0.5}, {}),
        ({"layer_norm_eps": 1e-2}, {}),
    ],
)
def test_variants(section, make, tmp_path):
    w = weights(**make)
    path = hub_directory(tmp_path / "model", w, **section, storage="bin")
    model, params = vivit_jax.from_pretrained(path)
    out = model.apply({"params": params}, CLIP)
    tokens, feature, logits = reference(w, CLIP[0], eps=section.get("layer_norm_eps", 1e-6))
    if logits is not None:
        assert model.config.num_labels == 5 and close(out.logits[0], logits)
    else:
        close(out.last_hidden_state[0], tokens)
        pools = section.get("use_mean_pooling", True)
        assert model.add_pooling_layer == pools
        assert close(out.pooler_output[0], feature) if pools else out.pooler_output is None


def test_names_of_classes_and_what_else_the_file_says(tmp_path, caplog):
    top = {"id2label": {str(i): f"class {i}" for i in range(3)}, "mine": 1}
    path = hub_directory(tmp_path / "model", weights(3), top=top, num_classes=3, other=2)
    model, params = vivit_jax.from_pretrained(path)
    assert model.config.labels == ("class 0", "class 1", "class 2")
    assert model.config.extra == {"mine": 1, "model_config": {"other": 2}, "use_safetensors": True}
    (record,) = caplog.records
    assert "mine, model_config" in record.getMessage()
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (written["mine"], written["model_type"]) == (1, "videomae") and "auto_map" not in written


@pytest.mark.parametrize(
    "section,message",
    [
        ({"use_learnable_pos_emb": True}, "model_config.use_learnable_pos_emb=True: VideoMAE"),
        ({"qk_scale": 0.3}, "model_config.qk_scale=0.3: VideoMAE here has no such"),
        ({"norm_layer": "nn.BatchNorm1d"}, "model_config.norm_layer='nn.BatchNorm1d'"),
        ({"num_classes": -1}, "model_config.num_classes is -1, expected 0 or more"),
        ({"embed_dim": "wide"}, "model_config.embed_dim is 'wide'"),
        ({"embed_dim": None}, "model_config.embed_dim is None and mlp_ratio 4"),
        ({"num_heads": 5}, "hidden_size 24 is not divisible by num_attention_heads 5"),
    ],
)
def test_what_computes_something_else_is_refused(section, message, tmp_path):
    path = hub_directory(tmp_path / "model", weights(), **section)
    with pytest.raises(vivit_jax.ConfigError, match=message) as error:
        vivit_jax.from_pretrained(path)
    assert str(path / "config.json") in str(error.value)


def test_sizes_that_the_weights_do_not_have_are_refused(tmp_path):
    path = hub_directory(tmp_path / "model", weights(), depth=3)
    with pytest.raises(vivit_jax.CheckpointError, match="blocks.2.attn.proj.bias"):
        vivit_jax.from_pretrained(path)


def test_convert_and_back_keeps_every_tensor(encoder, tmp_path, run):
    import torch

    status, out, _ = run("convert", encoder, tmp_path / "hf")
    assert status == 0 and f"{4 + 13 * DEPTH} tensors read, 0 of them left out" in out
    assert "transformers' VideoMAEModel computes the tokens but no pooler_output" in out
    written = read_safetensors(tmp_path / "hf")
    assert (written["fc_norm.weight"] == weights()["fc_norm.weight"]).all()
    status, out, _ = run("convert", tmp_path / "hf", tmp_path / "back", "--to", "videomae")
    assert status == 0 and "0 of them left out" in out
    back = torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)["model"]
    assert same_tensors({n: t.numpy() for n, t in back.items()}, weights())
    outputs = []
    for source in (encoder, tmp_path / "hf", tmp_path / "back"):
        model, params = vivit_jax.from_pretrained(source)
        outputs.append(model.apply({"params": params}, CLIP).pooler_output)
    assert (outputs[0] == outputs[1]).all() and (outputs[0] == outputs[2]).all()
    # Saved from memory it is the same directory.
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    assert same_tensors(read_safetensors(tmp_path / "saved"), written)


def test_transformers_opens_what_was_converted(encoder, tmp_path, run):
    import torch
    import transformers

    assert run("convert", encoder, tmp_path / "hf")[0] == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        out = model(torch.from_numpy(np.ascontiguousarray(CLIP.transpose(0, 1, 4, 2, 3))))
    close(out.last_hidden_state[0].numpy(), reference(weights(), CLIP[0])[0])


def test_inspect_and_verify_say_what_it_is_and_what_is_compared(encoder, run):
    status, out, _ = run("inspect", encoder)
    assert status == 0 and "videomae: VideoMAEModel with a pooling layer" in out
    assert "0 of them left out, none missing" in out
    status, out, _ = run("verify", encoder)
    assert status == 0 and "agree: every difference" in out
    assert any(line.split()[:2] == ["pooler", "output"] for line in out.splitlines())
    assert "no code of its authors or of its repository is run" in out
    assert "layer_norm of the mean of transformers' tokens" in out


def test_verify_finds_another_pooler(encoder, run, monkeypatch):
    def first_token(config, x):
        return LayerNorm(config, config.fc_norm_eps, name="fc_norm")(x[:, 0])

    monkeypatch.setattr(videomae, "_mean_pooled", first_token)
    status, out, _ = run("verify", encoder)
    assert status == 1
    (row,) = [line for line in out.splitlines() if line.endswith("DIFFERS")]
    assert row.startswith("pooler output")


def test_a_classifier_on_the_encoder_keeps_its_norm(encoder):
    model, params = vivit_jax.from_pretrained(encoder, "classification", num_labels=7)
    report = load_report(encoder, "classification", num_labels=7)
    assert report.fresh == ("head/kernel", "head/bias") and not report.dropped
    assert (np.asarray(params["fc_norm"]["scale"]) == weights()["fc_norm.weight"]).all()
    assert model.config.fc_norm_eps == 1e-6


def test_settings_and_other_epsilons(encoder, tmp_path):
    path = hub_directory(tmp_path / "model", weights(), layer_norm_eps=1e-5)
    assert open_source(path).config.fc_norm_eps == 1e-5
    assert open_source(encoder, settings=["drop_path_rate=0.1"]).config.drop_path_rate == 0.1


def test_a_pooling_layer_needs_mean_pooling():
    config = vivit_jax.VideoMAEConfig(image_size=16, use_mean_pooling=False)
    model = vivit_jax.VideoMAEModel(config, add_pooling_layer=True)
    with pytest.raises(vivit_jax.UserError, match="add_pooling_layer needs use_mean_pooling=True"):
        model.init(jax.random.key(0), np.zeros((1, 16, 16, 16, 3), np.float32))
