# SPDX-License-Identifier: Apache-2.0
"""The four ViViT models against numpy_vivit.py, float64 and written from the paper.

Parameters come under scenic's names from the reference and reach the model through the weight
table, so that these tests also pin what the names mean.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, error, forward, mostly_slow
from numpy_vivit import random_params
from variants import FDP, FE, FSA, VARIANTS, reference, variant_config

import vivit_jax
from checkpoints_convert.rules import export_params, import_params
from checkpoints_convert.tables import scenic_vivit
from checkpoints_convert.tables.table import Names
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params

LABELS = np.array([1, 3])


def scenic_params(case):
    config = variant_config(case)
    return random_params(
        config.attention_type,
        tubelet=config.tubelet_size,
        grid=config.grid,
        class_token=config.pooling == "cls",
        spatial_only=config.spatial_only,
        sampled_frames=config.num_sampled_frames,
    )


def pixels_of(config, **size):
    shape = {"t": config.num_frames, "h": config.frame_size[0], "w": config.frame_size[1]} | size
    return np.random.default_rng(1).standard_normal((2, *shape.values(), 3)).astype(np.float32)


def load(config, params):
    """The classifier of a config with parameters under scenic's names."""
    model = vivit_jax.VivitForVideoClassification(config)
    shapes = param_tree.shapes_of(param_tree.flatten(abstract_params(model)))
    table = scenic_vivit.rules(config, Names("classification"))
    return model, param_tree.unflatten(import_params(params, table, shapes))


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("case", "scan_layers"),
    mostly_slow(
        [*((case, True) for case in VARIANTS), ("joint", False), ("encoder", False)],
        *((case, True) for case in ("joint", "encoder")),
        *((case, True) for case in ("self-attention time first", "dot product")),
    ),
)
def test_outputs(case, scan_layers):
    params = scenic_params(case)
    config = variant_config(case, scan_layers=scan_layers)
    pixels = pixels_of(config)
    expected = reference(variant_config(case), params, pixels)
    model, ours = load(config, params)
    out = forward(model, ours, pixels, output_hidden_states=True, output_attentions=True)
    assert_close(out.logits, expected["logits"], "logits")
    hidden = np.stack([expected["embedded"], *expected["layers"]])
    assert_close(out.hidden_states, hidden, "hidden_states")
    if expected.get("temporal_layers"):
        assert_close(
            out.temporal_hidden_states[1:], np.stack(expected["temporal_layers"]), "hidden_states"
        )
    # The fused path, which runs where nobody asks for weights, must be the same function.
    assert_close(forward(model, ours, pixels).logits, expected["logits"], "logits")
    if not scan_layers:
        return
    backbone = vivit_jax.VivitModel(config, add_pooling_layer=False)
    tokens = forward(backbone, ours["backbone"], pixels).last_hidden_state
    wanted = expected["frames" if config.spatial_only else "tokens"]
    assert_close(tokens, wanted, "last_hidden_state")


@pytest.mark.parametrize("case", ["encoder", "self-attention time first", "dot product"])
def test_attention_weights_are_softmaxes_over_their_axis(case):
    config = variant_config(case)
    t, h, w = config.grid
    cls = config.pooling == "cls"
    model, ours = load(config, scenic_params(case))
    out = forward(model, ours, pixels_of(config), output_attentions=True)
    heads, s, k = config.num_attention_heads, cls + h * w, t + cls
    shapes = {
        FE: ((3, 2, t, heads, s, s), (2, 2, heads, k, k)),
        FSA: ((3, 2, t, heads, s, s), (3, 2, s, heads, t, t)),
        FDP: ((3, 2, t, heads // 2, s, s), (3, 2, s, heads // 2, t, t)),
    }[config.attention_type]
    for weights, shape in zip((out.attentions, out.temporal_attentions), shapes, strict=True):
        assert weights.shape == shape
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def _loss(logits):
    """Cross entropy in float64, written out."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -np.mean(log_probabilities[np.arange(len(LABELS)), LABELS])


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        ["joint", "encoder", "self-attention space first", "dot product max"],
        "dot product max",
    ),
)
def test_gradients_equal_finite_differences(case):
    """In every kind of tensor, central differences of the reference at the steepest entry."""
    params, config = scenic_params(case), variant_config(case)
    pixels = pixels_of(config)
    model, ours = load(config, params)

    @jax.jit
    @jax.grad
    def gradient(params):
        return model.apply({"params": params}, pixels, labels=jnp.asarray(LABELS)).loss

    grads = param_tree.flatten(gradient(ours))
    named = export_params(grads, scenic_vivit.rules(config, Names("classification")))
    first = [name for name in params if "encoderblock_" not in name or "encoderblock_1/" in name]
    params = {name: value.astype(np.float64) for name, value in params.items()}
    for name in first:
        grad = named[name].read()
        place = np.unravel_index(np.abs(grad).argmax(), grad.shape)
        step, values = 1e-5, []
        for sign in (1, -1):
            moved = params | {name: params[name].copy()}
            moved[name][place] += sign * step
            values.append(_loss(reference(variant_config(case), moved, pixels)["logits"]))
        difference = (values[0] - values[1]) / (2 * step)
        # A key bias moves all scores of a query alike: its gradient is rounding.
        assert abs(grad[place] - difference) <= 2e-5 * max(1, abs(difference)), (name, place)
        if not name.endswith("/key/bias"):
            assert abs(difference) > 1e-6, f"{name}: nothing to compare"


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("self-attention time first", dict(attention_order="space_time")),
        ("dot product", dict(attention_type="joint", pooling="mean")),
        ("encoder", dict(hidden_act="gelu")),
        ("joint mean", dict(pooling="max")),
    ],
)
def test_another_function_is_told_apart(case, changes):
    params, config = scenic_params(case), variant_config(case, **changes)
    model, ours = load(config, params)
    pixels = pixels_of(config)
    logits = forward(model, ours, pixels).logits
    assert error(logits, reference(variant_config(case), params, pixels)["logits"]) > 1e-4


def test_halves_of_the_heads_are_told_apart():
    """Time comes first: with the halves of every attention swapped the logits must differ."""
    params = scenic_params("dot product")
    for name, value in params.items():
        if "MultiHeadDotProductAttention" in name and not name.endswith("out/bias"):
            axis = 0 if name.endswith(("out/kernel", "/bias")) else 1
            params[name] = np.roll(value, value.shape[axis] // 2, axis)
    config = variant_config("dot product")
    model, ours = load(config, params)
    pixels = pixels_of(config)
    logits = forward(model, ours, pixels).logits
    original = reference(variant_config("dot product"), scenic_params("dot product"), pixels)[
        "logits"
    ]
    assert error(logits, original) > 1e-2


@pytest.mark.parametrize(
    ("case", "flags"),
    mostly_slow(
        [
            ("encoder", dict(remat="block")),
            ("self-attention time first", dict(remat="block", scan_layers=False)),
            ("dot product", dict(remat="dots", attention="chunked")),
        ],
        ("dot product", dict(remat="dots", attention="chunked")),
    ),
)
def test_execution_flags_keep_the_gradient(case, flags):
    params = scenic_params(case)
    pixels = pixels_of(variant_config(case))

    def gradient(**flags):
        model, ours = load(variant_config(case, **flags), params)
        loss = lambda p: model.apply({"params": p}, pixels, labels=jnp.asarray(LABELS)).loss  # noqa: E731
        grads = param_tree.flatten(jax.jit(jax.grad(loss))(ours))
        table = scenic_vivit.rules(model.config, Names("classification"))
        return {name: tensor.read() for name, tensor in export_params(grads, table).items()}

    plain, other = gradient(), gradient(**flags)
    for name, value in plain.items():
        assert_close(other[name], value, "gradient")


@pytest.mark.parametrize(
    ("case", "attention"),
    mostly_slow(
        itertools.product(
            ["encoder", "self-attention time first", "dot product"], ["xla", "chunked"]
        ),
        *(("encoder", "chunked"), ("self-attention time first", "xla"), ("dot product", "chunked")),
    ),
)
def test_attention_backends(case, attention):
    params, config = scenic_params(case), variant_config(case, attention=attention)
    model, ours = load(config, params)
    pixels = pixels_of(config)
    logits = forward(model, ours, pixels).logits
    assert_close(logits, reference(variant_config(case), params, pixels)["logits"], "logits")


@pytest.mark.parametrize(
    "case", mostly_slow(["encoder", "self-attention time first", "dot product"], "dot product")
)
def test_bfloat16_is_near(case):
    params = scenic_params(case)
    pixels = pixels_of(variant_config(case))
    wanted = reference(variant_config(case), params, pixels)["logits"]
    model, ours = load(variant_config(case, dtype="bfloat16"), params)
    logits = forward(model, ours, pixels).logits
    assert logits.dtype == jnp.bfloat16
    assert 1e-4 < error(logits.astype(np.float32), wanted) < 0.1


def _resized(table, cls, old, new):
    """Positions [1, cls + t*h*w, d] on a new grid by PyTorch: linear in time, bicubic in space."""
    import torch

    grid = torch.from_numpy(table[0, cls:].reshape(*old, -1))
    grid = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2), new[1:], mode="bicubic", align_corners=False
    )  # [t, d, h, w]
    t, d, h, w = grid.shape
    grid = grid.permute(1, 2, 3, 0).reshape(1, d * h * w, t)
    grid = torch.nn.functional.interpolate(grid, new[0], mode="linear", align_corners=False)
    grid = grid.reshape(d, h, w, new[0]).permute(3, 1, 2, 0).reshape(1, -1, d)
    return np.concatenate([table[:, :cls], grid.numpy()], axis=1)


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        [
            "joint",
            "joint mean",
            "encoder",
            "encoder mean",
            "self-attention time first",
            "dot product",
        ],
        *("joint mean", "encoder", "self-attention time first"),
    ),
)
def test_any_size(case):
    """A longer, larger and differently shaped clip, positions resized in time and in space."""
    params, config = scenic_params(case), variant_config(case)
    pixels = pixels_of(config, t=10, h=32, w=40)
    model, ours = load(config, params)
    out = forward(model, ours, pixels, interpolate_pos_encoding=True)
    (t, h, w), new, cls = config.grid, (5, 4, 5), int(config.pooling == "cls")
    name = "Transformer/posembed_input/pos_embedding"
    tables = {name: ((t, h, w), new)}
    if config.attention_type == FE:
        tables = {f"Spatial{name}": ((1, h, w), (1, *new[1:]))}
        tables |= {f"Temporal{name}": ((t, 1, 1), (new[0], 1, 1))}
    resized = {key: _resized(params[key], cls, *grids) for key, grids in tables.items()}
    assert_close(
        out.logits, reference(variant_config(case), params | resized, pixels)["logits"], "logits"
    )
    with pytest.raises(vivit_jax.UserError, match="interpolate_pos_encoding=True"):
        model.apply({"params": ours}, pixels)


def test_uniform_frames():
    from vivit_jax.layers.embed import uniform_frames

    # The index rule of the original code, which ran for this (8 of 32).
    assert uniform_frames(32, 8).tolist() == [4, 7, 11, 14, 18, 21, 25, 28]
    assert uniform_frames(5, 8).tolist() == [0, 1, 2, 3, 4]
    for total in range(1, 65):
        for count in range(1, total + 1):
            chosen = uniform_frames(total, count)
            assert len(set(chosen)) == count and set(chosen) <= set(range(total))


def test_a_clip_shorter_than_the_sample_is_refused():
    config = variant_config("joint sampled")
    model, ours = load(config, scenic_params("joint sampled"))
    with pytest.raises(vivit_jax.UserError, match="3 frames, the model picks num_sampled_frames=4"):
        model.apply({"params": ours}, pixels_of(config, t=3), interpolate_pos_encoding=True)
