# SPDX-License-Identifier: Apache-2.0
"""Attention maps and rollout against whole matrices in float64, PyTorch and known attention."""

import jax
import numpy as np
import pytest
from helpers import clip, forward, mostly_slow, random_params, torch_model
from tiny import VIDEOMAE, config_of
from variants import variant_config

import vivit_jax
from vivit_jax import param_tree
from vivit_jax.inference.attention_maps import AttentionMaps, choose
from vivit_jax.layers.embed import uniform_frames
from vivit_jax.models.build import build_model

GRID = (3, 3, 2)
VIVIT_CASES = (
    "joint", "joint mean", "joint sampled", "encoder", "encoder mean", "encoder spatial only",
    "self-attention time first", "self-attention space first", "dot product",
)  # fmt: skip
MAE_CASES = {
    "mae": ("none", {}),
    "mae pretraining": ("pretraining", dict(use_mean_pooling=False)),
    "mae cosine": ("none", dict(cosine_attention=True, layer_scale_init=0.5)),
    "mae loop": ("none", dict(scan_layers=False)),
}


def made(case):
    """A model with attention far from uniform, its parameters, and clips."""
    if case in MAE_CASES:
        head, changes = MAE_CASES[case]
        model = build_model(vivit_jax.VideoMAEConfig(**VIDEOMAE | changes), head)
    else:
        model = vivit_jax.VivitForVideoClassification(variant_config(case))
    return model, random_params(model, 0.3), clip(model.config)


def attentions(model, params, pixel_values):
    """The attention weights that the whole model reports, in float64: over space, over time."""
    if isinstance(model, vivit_jax.VideoMAEForPreTraining):
        model, params = vivit_jax.VideoMAEModel(model.config), params["backbone"]
    out = forward(model, params, pixel_values, output_attentions=True)
    found = (out.attentions, getattr(out, "temporal_attentions", None))
    return tuple(None if a is None else np.asarray(a, np.float64) for a in found)


def halves(a):
    """(A + I) / 2, rows normalised."""
    a = (a + np.eye(a.shape[-1])) / 2
    return a / a.sum(-1, keepdims=True)


def block_matrices(config, space, time, layer, head=None):
    """The attentions of a block in the order they act, each [tokens, tokens], for one clip."""
    of = (lambda a: a.mean(-3)) if head is None else (lambda a: a[..., head, :, :])
    if config.model_type == "videomae" or config.attention_type == "joint":
        return [of(space[layer, 0])]
    t, h, w = config.grid
    over_space, over_time = np.zeros((2, t, h * w, t, h * w))

    def fill(of_space, of_time):
        for i in range(t):
            over_space[i, :, i, :] = of_space(space[layer, 0])[i]
        for j in range(h * w):
            over_time[:, j, :, j] = of_time(time[layer, 0])[j]

    if config.attention_type == "factorised_dot_product" and head is not None:
        half = config.num_attention_heads // 2

        def pick(a):
            return a[:, head % half]

        fill(pick, pick)
    else:
        fill(of, of)
    over_space, over_time = (a.reshape(t * h * w, -1) for a in (over_space, over_time))
    if config.attention_type == "factorised_dot_product":
        if head is None:
            return [(over_space + over_time) / 2]
        return [over_time if head < half else over_space]
    first = [over_time, over_space]
    return first if config.attention_order == "time_space" else first[::-1]


def matrix(config, space, time, kind, layer, head=None):
    """The transition T [tokens, tokens] of a map or a rollout, by products of whole matrices."""
    total = None
    for i in range(0 if kind == "rollout" else layer, layer + 1):
        for a in block_matrices(config, space, time, i, head):
            a = halves(a) if kind == "rollout" else a
            total = a if total is None else a @ total
    return total


def stage(attention, kind, layer, head=None):
    """The same for a stage of a factorised encoder: attention [layers, n, s, s]."""
    mean = attention.mean(-3) if head is None else attention[:, head]
    if kind == "map":
        return mean[layer]
    total = np.eye(mean.shape[-1])
    for a in mean[: layer + 1]:
        total = halves(a) @ total
    return total


def naive(model, params, pixels, kind, query=None, layer=None, head=None, temporal_layer=None):
    """(maps [t, h, w], share of class tokens) of the first clip."""
    config = model.config
    space, time = attentions(model, params, pixels)
    t, h, w = config.grid
    with_cls = getattr(config, "pooling", None) == "cls"
    query = query or ("cls" if with_cls else "mean")
    layer = config.num_hidden_layers - 1 if layer is None else layer

    def row(total, count, place):
        return {"cls": total[0], "mean": total[with_cls:].mean(0)}.get(
            query, total[with_cls + place] if place is not None else None
        )

    if getattr(config, "attention_type", "joint") == "factorised_encoder":
        shares = np.zeros((t, h * w))
        if isinstance(query, str):
            weights = np.full(t, 1 / t)
            if not config.spatial_only:
                last = config.num_temporal_layers - 1 if temporal_layer is None else temporal_layer
                weights = row(stage(time[:, 0], kind, last, head), t, None)[with_cls:]
            for i in range(t):
                total = stage(space[:, 0, i], kind, layer, head)
                shares[i] = weights[i] * row(total, h * w, None)[with_cls:]
        else:
            i, y, x = query
            total = stage(space[:, 0, i], kind, layer, head)
            shares[i] = total[with_cls + y * w + x][with_cls:]
    else:
        total = matrix(config, space, time, kind, layer, head)
        place = None if isinstance(query, str) else np.ravel_multi_index(query, config.grid)
        shares = row(total, t * h * w, place)[with_cls:]
    total = shares.sum()
    return shares.reshape(t, h, w) / total, 1 - total


def check(model, params, pixels, **options):
    found = vivit_jax.map_attention(model, params, pixels, **options)
    maps, class_share = naive(model, params, pixels, **{"kind": "map"} | options)
    assert found.maps.shape == (2, *model.config.grid) and found.maps.dtype == np.float64
    np.testing.assert_allclose(found.maps.sum((1, 2, 3)), 1, rtol=1e-12)
    np.testing.assert_allclose(found.maps[0], maps, rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(found.class_share[0], class_share, atol=2e-6)
    np.testing.assert_allclose(found.time_weights[0], maps.sum((1, 2)), rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(found.relative.mean((1, 2, 3)), 1, rtol=1e-12)
    return found


@pytest.mark.parametrize("kind", ["map", "rollout"])
@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [*VIVIT_CASES, "mae cosine", "mae pretraining", "mae loop"],
        *("joint", "encoder", "self-attention time first", "mae pretraining"),
    ),
)
def test_against_whole_matrices(case, kind):
    model, params, pixels = made(case)
    check(model, params, pixels, kind=kind)
    check(model, params, pixels, kind=kind, query="mean", layer=1)
    place = tuple(n - 1 for n in model.config.grid)
    found = check(model, params, pixels, kind=kind, query=place)
    if "encoder" in case:  # a tubelet sees its own frame
        assert (found.maps[:, :-1] == 0).all()
    if kind == "map":
        check(model, params, pixels, head=0)
        check(model, params, pixels, head=3, layer=0)
    assert np.abs(found.maps[0] - found.maps[1]).max() > 1e-3


def test_a_clip_of_a_batch_is_mapped_as_alone():
    model, params, pixels = made("joint")
    both = vivit_jax.map_attention(model, params, pixels).maps
    alone = vivit_jax.map_attention(model, params, pixels[1:]).maps
    np.testing.assert_allclose(alone[0], both[1], rtol=1e-4, atol=1e-6)


def test_the_temporal_layer_of_a_factorised_encoder():
    model, params, pixels = made("encoder")
    last = check(model, params, pixels)
    first = check(model, params, pixels, temporal_layer=0)
    check(model, params, pixels, kind="rollout", temporal_layer=0, layer=0)
    assert last.choice.temporal_layer == 1 and first.choice.temporal_layer == 0
    assert np.abs(first.time_weights - last.time_weights).max() > 1e-3


def test_a_layer_counts_from_either_end():
    model, params, pixels = made("joint")
    maps = [
        vivit_jax.map_attention(model, params, pixels, layer=layer).maps
        for layer in (0, -3, -1, None)
    ]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[2], maps[3])
    assert np.abs(maps[0] - maps[2]).max() > 1e-3


@pytest.mark.parametrize("case", ["vivit cls", "mae cls", "mae pretraining"])
def test_the_last_layer_against_transformers(case, tmp_path):
    import torch

    reference = torch_model(case)
    reference.save_pretrained(tmp_path)
    model, params = vivit_jax.from_pretrained(tmp_path)
    pixels = clip(model.config)
    torch_pixels = torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).copy())
    encoder = getattr(reference, reference.base_model_prefix)
    with torch.no_grad():
        seen = encoder(torch_pixels, output_attentions=True).attentions[-1].double().numpy()
    found = vivit_jax.map_attention(model, params, pixels)
    if case == "vivit cls":
        expected = seen.mean(1)[:, 0, 1:]
        np.testing.assert_allclose(found.class_share, seen.mean(1)[:, 0, 0], atol=2e-6)
    else:
        expected = seen.mean(1).mean(1)
        np.testing.assert_array_equal(found.class_share, 0)
    expected = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(found.maps.reshape(2, -1), expected, rtol=1e-4, atol=1e-6)
    one = vivit_jax.map_attention(model, params, pixels, query=(2, 1, 0), head=2).maps
    expected = seen[:, 2, -found.maps[0].size :, -found.maps[0].size :][:, 2 * 6 + 2]
    expected = expected / expected.sum(1, keepdims=True)
    np.testing.assert_allclose(one.reshape(2, -1), expected, rtol=1e-4, atol=1e-6)


def changed(params, ending, value):
    """Parameters with the leaves of some names set to a value."""
    flat = param_tree.flatten(params)
    names = [name for name in flat if name.endswith(ending)]
    assert names
    return param_tree.unflatten(flat | {name: np.full_like(flat[name], value) for name in names})


@pytest.mark.parametrize("kind", ["map", "rollout"])
@pytest.mark.parametrize("case", ["joint", "encoder", "encoder mean", "dot product", "mae"])
def test_uniform_attention_is_exactly_one(case, kind):
    """Without queries every token attends to all equally."""
    model, params, pixels = made(case)
    params = changed(changed(params, "query/kernel", 0), "query/bias", 0)
    found = vivit_jax.map_attention(model, params, pixels, kind=kind)
    np.testing.assert_allclose(found.relative, 1, rtol=1e-6)
    with_cls = model.config.model_type == "vivit" and model.config.pooling == "cls"
    if case == "joint" and kind == "map":
        np.testing.assert_allclose(found.class_share, 1 / 19, rtol=1e-6)
    assert (found.class_share > 0).all() == with_cls


def test_a_head_that_looks_at_a_bright_patch():
    """Its keys are the patch's brightness, its queries the same for all; the others look anywhere.

    So head 1 attends to the bright tubelet only, which adds a quarter to the tubelet's share in the
    mean of four heads.
    """
    config = vivit_jax.VideoMAEConfig(**VIDEOMAE | dict(num_hidden_layers=1))
    model = vivit_jax.VideoMAEModel(config)
    flat = {k: np.zeros_like(v) for k, v in param_tree.flatten(random_params(model)).items()}
    flat["patch_embed/kernel"][..., 0] = 1.0
    flat["layers/ln_attention/scale"][:] = 1.0
    flat["layers/attention/query/bias"][0, 1, 0] = 100.0  # [layers, heads, width]
    flat["layers/attention/key/kernel"][0, 0, 1, 0] = 10.0  # [layers, d, heads, width]
    pixels = np.zeros((1, 6, 24, 16, 3), np.float32)
    pixels[0, 2:4, 8:16, 8:16] = 10.0
    params = param_tree.unflatten(flat)
    bright = np.zeros(GRID)
    bright[1, 1, 1] = 1
    one = vivit_jax.map_attention(model, params, pixels, head=1)
    np.testing.assert_allclose(one.maps[0], bright, atol=1e-12)
    np.testing.assert_allclose(one.time_weights[0], [0, 1, 0], atol=1e-12)
    other = vivit_jax.map_attention(model, params, pixels, head=0)
    np.testing.assert_allclose(other.relative, 1, rtol=1e-6)
    mean = vivit_jax.map_attention(model, params, pixels)
    np.testing.assert_allclose(mean.maps[0], bright / 4 + 0.75 / 18, rtol=1e-6)
    # One block of rollout: half of it stays with the query.
    rolled = vivit_jax.map_attention(model, params, pixels, kind="rollout", query=(0, 0, 0))
    own = np.zeros(GRID)
    own[0, 0, 0] = 1
    np.testing.assert_allclose(rolled.maps[0], own / 2 + mean.maps[0] / 2, rtol=1e-6)


def test_the_frames_of_a_model_that_samples_them():
    model, params, pixels = made("joint sampled")
    found = vivit_jax.map_attention(model, params, pixels)
    assert found.tubelet[0] == 1 and found.maps.shape[1] == 4
    np.testing.assert_array_equal(found.frames, uniform_frames(6, 4))
    model, params, pixels = made("joint")
    np.testing.assert_array_equal(
        vivit_jax.map_attention(model, params, pixels).frames, np.arange(6)
    )


def test_another_clip_size():
    model, params, _ = made("mae")
    pixels = np.random.default_rng(0).standard_normal((1, 4, 32, 16, 3)).astype(np.float32)
    with pytest.raises(vivit_jax.UserError, match="interpolate_pos_encoding"):
        vivit_jax.map_attention(model, params, pixels)
    found = vivit_jax.map_attention(
        model, params, pixels, query=(1, 3, 1), interpolate_pos_encoding=True
    )
    assert found.maps.shape == (1, 2, 4, 2)


def test_half_precision_is_close():
    model, params, pixels = made("joint")
    config = variant_config("joint", dtype="bfloat16")
    half = vivit_jax.map_attention(
        vivit_jax.VivitForVideoClassification(config), params, pixels, layer=0
    )
    full = vivit_jax.map_attention(model, params, pixels, layer=0)
    assert isinstance(half, AttentionMaps)
    np.testing.assert_allclose(half.maps, full.maps, atol=0.03)
    np.testing.assert_allclose(half.maps.sum((1, 2, 3)), 1, rtol=1e-12)


def test_no_more_than_one_blocks_attention_is_held():
    """The compiled step of a block needs memory for its own attention only, not for all layers."""
    from vivit_jax.inference.attention_maps import _through
    from vivit_jax.layers.encoder import Block, StackSpec

    config = config_of("mae base", num_hidden_layers=12)
    params = random_params(vivit_jax.VideoMAEModel(config))
    one = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    length = 512
    x = jax.ShapeDtypeStruct((1, length, config.hidden_size), np.float32)
    row = jax.ShapeDtypeStruct((1, length), np.float32)
    block = Block(config, StackSpec(12))
    heads = jax.ShapeDtypeStruct((config.num_attention_heads,), np.float32)
    compiled = _through.lower(block, one, x, row, heads, np.float32(0.5)).compile()
    attention = config.num_attention_heads * length**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * attention


@pytest.mark.parametrize(
    ("case", "options", "told"),
    [
        ("joint", dict(kind="flow"), r"kind must be one of \['map', 'rollout'\], got 'flow'"),
        ("joint mean", dict(query="cls"), "needs a class token"),
        ("mae", dict(query="cls"), "needs a class token"),
        ("joint", dict(query="all"), "must be 'cls', 'mean' or a place"),
        ("joint", dict(query=(0, 3, 0)), r"from \(0, 0, 0\) to \(2, 2, 1\)"),
        ("joint", dict(query=(0, -1, 0)), "not on the token grid"),
        ("joint", dict(query=(0, 1)), "not on the token grid"),
        ("joint", dict(layer=3), "layer must be from 0 to 2, or from -3 to -1"),
        ("joint", dict(layer=-4), "got -4"),
        ("joint", dict(head=4), "head must be from 0 to 3, got 4"),
        ("joint", dict(head=-1), "got -1"),
        ("joint", dict(head=0, kind="rollout"), "rollout takes the mean of all heads"),
        ("joint", dict(temporal_layer=0), "needs a factorised encoder"),
        ("encoder spatial only", dict(temporal_layer=0), "needs a factorised encoder"),
        ("encoder", dict(temporal_layer=2), "temporal_layer must be from 0 to 1"),
        ("encoder", dict(temporal_layer=0, query=(0, 0, 0)), "has no effect on query"),
    ],
)
def test_wrong_arguments(case, options, told):
    config = vivit_jax.VideoMAEConfig(**VIDEOMAE) if case == "mae" else variant_config(case)
    with pytest.raises(vivit_jax.UserError, match=told):
        choose(config, **options)


def test_wrong_clips_and_weights():
    model, params, pixels = made("joint")
    with pytest.raises(vivit_jax.UserError, match="channels last"):
        vivit_jax.map_attention(model, params, pixels.transpose(0, 1, 4, 2, 3))
    with pytest.raises(vivit_jax.UserError, match="not finite"):
        vivit_jax.map_attention(model, params, pixels * np.nan)
