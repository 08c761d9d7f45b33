# SPDX-License-Identifier: Apache-2.0
"""Video models from an image ViT, with transformers' ViT as the reference of what they compute."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import assert_close, error, mostly_slow
from tiny_image_models import torch_vit

import vivit_jax
from checkpoints_convert.start.from_image import init_from_image_model
from vivit_jax import param_tree

FE, FSA, FDP = (f"factorised_{kind}" for kind in ("encoder", "self_attention", "dot_product"))
# name -> fields beside six frames in tubelets of two
VARIANTS = {
    "joint": dict(attention_type="joint"),
    "joint mean": dict(attention_type="joint", pooling="mean"),
    "encoder": dict(attention_type=FE, num_temporal_layers=2),
    "encoder mean": dict(attention_type=FE, num_temporal_layers=2, pooling="mean"),
    "encoder spatial only": dict(attention_type=FE, spatial_only=True),
    "self-attention": dict(attention_type=FSA),
    "dot product": dict(attention_type=FDP),
}
SIZES = dict(num_frames=6, tubelet_size=(2, 8, 8))
PIXELS = np.random.default_rng(3).standard_normal((24, 24, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def start(images):
    """`init_from_image_model` of a variant without a head, from the HuggingFace directory."""

    @functools.cache
    def make(variant: str, head: str = "none", kind: str = "hf", **options):
        names = {field.name for field in dataclasses.fields(vivit_jax.VivitConfig)}
        fields = {name: options.pop(name) for name in list(options) if name in names}
        config = SIZES | VARIANTS[variant] | fields
        return init_from_image_model(images.path(kind), config, head=head, **options)

    return make


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, pixels):
    return model.apply({"params": params}, pixels, output_hidden_states=True)


def static_clip(frames: int = 6) -> np.ndarray:
    return np.broadcast_to(PIXELS, (1, frames, *PIXELS.shape))


def hidden_states(started, frames: int = 6) -> np.ndarray:
    """Hidden states on a static clip, [layers + 1, time, tokens of a frame, d]."""
    model, params, _ = started
    hidden = np.asarray(forward(model, params, static_clip(frames)).hidden_states)
    return hidden.reshape(len(hidden), model.config.grid[0], -1, hidden.shape[-1])


def self_only(attention, x, heads):
    """transformers' attention with the first heads attending to their own token only."""
    shape = (*x.shape[:-1], attention.num_attention_heads, -1)
    q, k, v = (p(x).view(shape).transpose(1, 2) for p in (
        attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
    weights = (q @ k.transpose(2, 3) * attention.scaling).softmax(-1)
    weights[:, :heads] = torch.eye(x.shape[1])
    return attention.o_proj((weights @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def reference(vit, cls: bool = True, change: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states [layers + 1, tokens, d] and tokens after the norm of transformers' ViT.

    Without the class token it is the model's own layers over the patches. "time": before each
    layer, attention to nothing but the token itself through a fresh norm, which is what temporal
    attention comes to where all frames are alike; "halves": that in the first half of the heads.
    """
    image = torch.from_numpy(PIXELS.transpose(2, 0, 1)[None].copy())
    if cls:
        out = vit(image, output_hidden_states=True)
        return torch.cat(out.hidden_states).numpy(), out.last_hidden_state[0].numpy()
    x = vit.embeddings.patch_embeddings(image) + vit.embeddings.position_embeddings[:, 1:]
    hidden = [x]
    for layer in vit.layers:
        if change == "time":
            fresh_norm = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-12)
            x = x + self_only(layer.attention, fresh_norm, layer.attention.num_attention_heads)
        if change == "halves":
            half = layer.attention.num_attention_heads // 2
            x = x + self_only(layer.attention, layer.layernorm_before(x), half)
            x = x + layer.mlp(layer.layernorm_after(x))
        else:
            x = layer(x, None)
        hidden.append(x)
    return torch.cat(hidden).numpy(), vit.layernorm(x)[0].numpy()


# --- a static clip is the image ------------------------------------------------------------------


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("variant", "kind"),
    mostly_slow(
        itertools.product(
            ["encoder", "encoder mean", "encoder spatial only"], ["hf", "hf memory", "hf base"]
        ),
        *(("encoder", "hf"), ("encoder", "hf memory"), ("encoder mean", "hf base")),
        ("encoder spatial only", "hf"),
    ),
)
def test_spatial_stage_sees_every_frame_as_the_image_model(start, images, variant, kind):
    started = start(variant, kind=kind)
    wanted, normed = reference(images.vit, cls="mean" not in variant)
    got = hidden_states(started)
    assert got.shape == (4, 3, wanted.shape[1], 48)
    for frame in range(3):
        assert_close(got[:, frame], wanted, "hidden_states")
    model, params, _ = started
    if not model.config.spatial_only:
        # What the temporal stage gets is the pooled output of the spatial norm; its own positions
        # and class token are zeros.
        out = forward(model, params, static_clip()).temporal_hidden_states[0][0]
        pooled = normed.mean(0) if "mean" in variant else normed[0]
        for frame in np.asarray(out)[-3:]:
            assert_close(frame, pooled, "last_hidden_state")
    else:
        tokens = forward(model, params, static_clip()).last_hidden_state[0]
        assert_close(tokens, np.broadcast_to(normed[0], (3, 48)), "last_hidden_state")


@pytest.mark.parametrize("inflation", ["central_frame", "average"])
@pytest.mark.parametrize("tubelet", [2, 3])
def test_joint_of_one_temporal_position_is_the_image_model(start, images, inflation, tubelet):
    size = (tubelet, 8, 8)
    started = start("joint", num_frames=tubelet, tubelet_size=size, inflation=inflation)
    model, params, _ = started
    wanted, normed = reference(images.vit)
    assert_close(hidden_states(started, tubelet)[:, 0], wanted, "hidden_states")
    out = forward(model, params, static_clip(tubelet))
    assert_close(out.last_hidden_state[0], normed, "last_hidden_state")


def test_joint_of_several_positions_embeds_every_frame_as_the_image_model(start, images):
    model, params, _ = start("joint")
    hidden = np.asarray(forward(model, params, static_clip()).hidden_states)[:, 0]
    wanted, _ = reference(images.vit)
    assert_close(hidden[0, :1], wanted[0, :1], "hidden_states")
    frames = hidden[:, 1:].reshape(4, 3, 9, 48)
    for frame in range(3):
        assert_close(frames[0, frame], wanted[0, 1:], "hidden_states")
        # One class token beside three times the patches gets another share of the attention.
        assert error(frames[1, frame], wanted[1, 1:]) > 1e-2


@pytest.mark.parametrize(
    ("variant", "options", "change"),
    [
        ("joint mean", {}, None),
        ("self-attention", {"temporal_attention": "zero"}, None),
        ("self-attention", {"temporal_attention": "copy"}, "time"),
        ("dot product", {}, "halves"),
    ],
    ids=["joint mean", "self-attention zero", "self-attention copy", "dot product"],
)
@pytest.mark.parametrize("frames", mostly_slow([2, 6], 2))
def test_variants_without_a_class_token(start, images, variant, options, change, frames):
    got = hidden_states(start(variant, num_frames=frames, **options), frames)
    wanted, _ = reference(images.vit, cls=False, change=change)
    for frame in range(frames // 2):
        assert_close(got[:, frame], wanted, "hidden_states")
    if change:
        # These start elsewhere than the image model, from the first block on.
        plain, _ = reference(images.vit, cls=False)
        assert error(got[1, 0], plain[1]) > 1e-2
    assert error(got[1, 0], reference(images.vit)[0][1, 1:]) > 1e-2


def test_a_moving_clip_starts_as_its_central_frames(start, images):
    model, params, _ = start("encoder")
    still = hidden_states(start("encoder"))
    clip = np.random.default_rng(0).standard_normal((1, 6, 24, 24, 3)).astype(np.float32)
    clip[:, [1, 3, 5]] = PIXELS
    moving = np.asarray(forward(model, params, clip).hidden_states)[:, 0]
    assert_close(moving, still, "hidden_states")


def test_non_square_images(tmp_path):
    """Height and width are not interchanged anywhere between the image and the video model."""
    model = torch_vit(image_size=[24, 16])
    model.save_pretrained(tmp_path / "wide")
    config = dict(num_frames=4, attention_type=FE, spatial_only=True)
    started = init_from_image_model(tmp_path / "wide", config, head="none")
    pixels = PIXELS[:, :16]
    with torch.no_grad():
        image = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
        wanted = torch.cat(model.vit(image, output_hidden_states=True).hidden_states).numpy()
    clip = np.broadcast_to(pixels, (1, 4, *pixels.shape))
    got = forward(started.model, started.params, clip).hidden_states
    for frame in range(2):
        assert_close(got[:, 0, frame], wanted, "hidden_states")


def test_rank_pooling_of_two_frames_sees_nothing_in_a_static_clip(start, images):
    got = hidden_states(start("joint mean", num_frames=2, inflation="rank_pooling"), 2)[0, 0]
    table = images.vit.embeddings.position_embeddings[0, 1:]
    bias = images.vit.embeddings.patch_embeddings.projection.bias
    assert_close(got, (table + bias).detach().numpy(), "hidden_states")


# --- what starts fresh ---------------------------------------------------------------------------

NORMS = [f"{norm}/{leaf}" for norm in ("ln_attention", "ln_mlp") for leaf in ("scale", "bias")]
DENSE = [f"attention/{part}" for part in ("query", "key", "value", "out")] + ["mlp_in", "mlp_out"]
BLOCK = NORMS + [f"{name}/{leaf}" for name in DENSE for leaf in ("kernel", "bias")]
HEAD = {"head/kernel", "head/bias"}
STAGE = {"pos_embed", "ln_final/scale", "ln_final/bias"} | {
    f"layers_{i}/{name}" for i in range(2) for name in BLOCK
}
LN_TIME = {f"layers_{i}/ln_attention_time/{leaf}" for i in range(3) for leaf in ("scale", "bias")}
TIME = {
    f"layers_{i}/{name.replace('attention', 'attention_time', 1)}"
    for i in range(3)
    for name in BLOCK
    if name.startswith("attention/")
}
FRESH = {
    "joint": set(),
    "joint mean": set(),
    "encoder": {f"temporal/{name}" for name in STAGE | {"cls"}},
    "encoder mean": {f"temporal/{name}" for name in STAGE},
    "encoder spatial only": set(),
    "self-attention": LN_TIME,
    "self-attention fresh": LN_TIME | TIME,
    "dot product": set(),
}


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    "variant",
    mostly_slow(FRESH, "joint mean", "encoder", "self-attention fresh", "dot product"),
)
def test_fresh_and_dropped_parts_are_named_exactly(images, variant):
    kind, options = variant, {}
    if variant == "self-attention fresh":
        kind, options = "self-attention", {"temporal_attention": "fresh"}
    config = SIZES | VARIANTS[kind] | dict(num_labels=4)
    runs = [
        init_from_image_model(images.path("hf"), config, seed=seed, **options) for seed in (1, 2)
    ]
    model, _, report = runs[0]
    assert isinstance(model, vivit_jax.VivitForVideoClassification)
    assert set(report.fresh) == {f"backbone/{name}" for name in FRESH[variant]} | HEAD
    assert len(set(report.fresh)) == len(report.fresh)
    has_cls = model.config.pooling == "cls"
    assert report.dropped == ("classifier.bias", "classifier.weight") + (
        () if has_cls else ("vit.embeddings.cls_token",)
    )
    assert f"loaded into {type(model).__name__}" in str(report)

    flats = [param_tree.flatten(run.params) for run in runs]
    slots = param_tree.slots(param_tree.shapes_of(flats[0]))
    fresh_leaves = {slots[path].leaf for path in report.fresh}
    for leaf in flats[0]:
        same = bool((flats[0][leaf] == flats[1][leaf]).all())
        # Fresh biases, norms, class tokens and positions are constants.
        drawn = leaf in fresh_leaves and leaf.endswith("kernel")
        assert same != drawn, leaf


def test_temporal_attention_copy_zero_and_fresh(start):
    params = {
        how: start("self-attention", temporal_attention=how).params["layers"]
        for how in ("copy", "zero", "fresh")
    }
    for how, layers in params.items():
        time, space = layers["attention_time"], layers["attention_space"]
        for part, leaf in itertools.product(("query", "key", "value", "out"), ("kernel", "bias")):
            same = bool((time[part][leaf] == space[part][leaf]).all())
            zeroed = how == "zero" and part == "out"
            assert same == (how != "fresh" and not zeroed), (how, part, leaf)
            assert not zeroed or not time[part][leaf].any()
        norm = layers["ln_attention_time"]
        assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
        assert (layers["ln_attention_space"]["bias"] != 0).all()
    assert "temporal attention: zero" in str(start("self-attention", temporal_attention="zero")[2])


def test_the_config_decides_where_temporal_attention_is_not_named(images):
    for zero, named, expected in (
        (False, None, "copy"),
        (True, None, "zero"),
        (True, "copy", "copy"),
    ):
        config = SIZES | VARIANTS["self-attention"] | dict(zero_init_temporal_attention=zero)
        run = init_from_image_model(
            images.path("hf"), config, head="none", temporal_attention=named
        )
        assert f"temporal attention: {expected}" in run.report.notes
        time = run.params["layers"]["attention_time"]["out"]["kernel"]
        assert bool(time.any()) == (expected == "copy")


# --- the configuration ---------------------------------------------------------------------------


def test_without_a_config_the_image_models_sizes_are_taken(images):
    model, params, report = init_from_image_model(images.path("hf"), head="none")
    config = model.config
    assert (config.num_frames, config.tubelet_size, config.image_size) == (32, (2, 8, 8), 24)
    assert (config.attention_type, config.pooling) == ("joint", "cls")
    assert (config.hidden_act, config.layer_norm_eps) == ("gelu", 1e-12)
    assert params["pos_embed"].shape == (1, 1 + 16 * 9, 48) and report.fresh == ()


def test_config_object_and_mapping_agree(start, images):
    mapped = start("encoder")
    config = vivit_jax.VivitConfig(**dataclasses.asdict(mapped.model.config))
    model, params, report = init_from_image_model(images.path("hf"), config, head="none")
    assert model == mapped.model and report == mapped.report
    assert jax.tree.all(jax.tree.map(np.array_equal, params, mapped.params))


def test_every_size_that_does_not_fit_is_in_one_error(images):
    config = vivit_jax.VivitConfig(image_size=24, tubelet_size=(2, 12, 12), num_channels=1)
    with pytest.raises(vivit_jax.ConfigError) as caught:
        init_from_image_model(images.path("hf"), dataclasses.replace(config, qkv_bias=False))
    for part in (
        "hidden_size is 768, the image model's is 48",
        "num_hidden_layers is 12, the image model's is 3",
        "num_attention_heads is 12, the image model's is 4",
        "intermediate_size is 3072, the image model's is 80",
        "num_channels is 1, the image model's is 3",
        "qkv_bias is False, the image model's is True",
        "tubelet_size is (2, 12, 12), the image model's patches are (8, 8)",
        "Leave these fields out",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({"num_frame": 6}, {}, "VivitConfig has no num_frame; expected some of image_size"),
        (6, {}, "config must be a VivitConfig, a mapping of its fields or None, got int"),
        (vivit_jax.VideoMAEConfig(), {}, "or None, got VideoMAEConfig"),
        ({"pooling": "cls", "attention_type": FSA}, {}, "pooling 'cls' needs a class token"),
        ({"param_dtype": "float64"}, {}, "which jax truncates to float32"),
        ({}, {"inflation": "centre"}, "inflation must be one of ['central_frame', "),
        ({}, {"positions": "zoom"}, "positions must be one of ['tile', "),
        ({}, {"temporal_attention": "none"}, "temporal_attention must be one of ['copy', "),
        ({}, {"head": "pretraining"}, "head is 'pretraining', expected one of"),
    ],
)
def test_wrong_options(images, config, options, expected):
    with pytest.raises(vivit_jax.UserError) as caught:
        init_from_image_model(images.path("hf"), config, **options)
    assert expected in str(caught.value)


def test_differences_of_function_are_noted(images):
    config = SIZES | dict(hidden_act="gelu_fast", layer_norm_eps=1e-6)
    report = str(init_from_image_model(images.path("hf"), config, head="none").report)
    assert "hidden_act is gelu_fast, the image model's is gelu" in report
    assert "layer_norm_eps is 1e-06, the image model's is 1e-12" in report
    assert "patch kernel inflated to 2 frames: central_frame" in report


def test_param_dtype_and_layers_in_a_loop(start):
    reference = param_tree.flatten(start("self-attention").params)
    looped = start("self-attention", scan_layers=False).params
    bfloat16 = param_tree.flatten(start("self-attention", param_dtype="bfloat16").params)
    assert "layers_2" in looped and "layers" not in looped
    slots, looped = param_tree.slots(param_tree.shapes_of(reference)), param_tree.flatten(looped)
    assert looped.keys() == slots.keys()
    for path, slot in slots.items():
        value = reference[slot.leaf] if slot.layer is None else reference[slot.leaf][slot.layer]
        assert (looped[path] == value).all(), path
    assert bfloat16.keys() == reference.keys()
    for path, value in bfloat16.items():
        assert value.dtype == jnp.bfloat16 and (value == reference[path].astype(jnp.bfloat16)).all()


@pytest.mark.slow
def test_positions_resized_in_bfloat16(start):
    fine = start("encoder", image_size=(32, 40)).params["spatial"]["pos_embed"]
    coarse = start("encoder", image_size=(32, 40), param_dtype="bfloat16").params["spatial"]
    assert coarse["pos_embed"].dtype == jnp.bfloat16
    assert np.abs(np.asarray(coarse["pos_embed"], np.float32) - fine).max() < 0.02


@pytest.mark.slow
def test_result_is_saved_loaded_and_trained(images, tmp_path, caplog):
    config = SIZES | VARIANTS["encoder"] | dict(num_labels=4)
    model, params, report = init_from_image_model(images.path("hf"), config)
    assert report.brief in caplog.messages
    vivit_jax.save_pretrained(tmp_path / "saved", model, params)
    again, loaded = vivit_jax.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, loaded))

    @jax.jit
    def gradients(params):
        labels = jnp.array([2])
        loss = lambda p: model.apply({"params": p}, static_clip(), labels=labels).loss  # noqa: E731
        return jax.grad(loss)(params)

    found = param_tree.flatten(gradients(params))
    assert all(np.isfinite(value).all() for value in found.values())
    silent = {path for path, value in found.items() if not np.abs(value).max() > 1e-7}
    # A key bias cannot change a softmax; all else is reached by the gradient.
    assert {path for path in silent if not path.endswith("key/bias")} == set()
