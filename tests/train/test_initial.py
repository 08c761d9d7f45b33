# SPDX-License-Identifier: Apache-2.0
"""First values of parameters against PyTorch's and flax's own, as the papers' code calls them."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from compiler_flags import AS_USERS
from flax import linen as nn
from tiny_recipes import FINETUNE, PRETRAIN, changed

import vivit_jax
from vivit_jax import param_tree
from vivit_jax.models import build
from vivit_jax.models.build import DRAW_OPTIONS, abstract_params, fresh_params
from vivit_jax.train.start.initial_model import starting_model
from vivit_jax.train.start.initial_params import papers_params

D, MLP, TUBELET = 96, 160, (2, 8, 8)
SIZES = dict(
    image_size=32,
    num_frames=8,
    hidden_size=D,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=MLP,
    num_labels=50,
)
DECODER = dict(
    decoder_hidden_size=48,
    decoder_intermediate_size=80,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
)
FSA = dict(attention_type="factorised_self_attention", pooling="mean")
VIVIT = vivit_jax.VivitConfig(
    **SIZES, tubelet_size=TUBELET, attention_type="factorised_encoder", num_temporal_layers=2
)
VIDEOMAE = vivit_jax.VideoMAEConfig(**SIZES, **DECODER, tubelet_size=2, patch_size=8)
CLASSIFIER = vivit_jax.VideoMAEForVideoClassification(VIDEOMAE)
PRETRAINING = vivit_jax.VideoMAEForPreTraining(VIDEOMAE)
SCENIC = vivit_jax.VivitForVideoClassification(VIVIT)


def drawn(model, seed=0):
    """Per-layer name -> array."""
    flat = param_tree.flatten(papers_params(model, abstract_params(model), seed))
    found = {}
    for name, slot in param_tree.slots(param_tree.shapes_of(flat)).items():
        found[name] = np.asarray(
            flat[slot.leaf] if slot.layer is None else flat[slot.leaf][slot.layer]
        )
    return found


@pytest.fixture(scope="module")
def params():
    return {model: drawn(model) for model in (CLASSIFIER, PRETRAINING, SCENIC)}


def assert_drawn_as(values, reference):
    """The same distribution, by its spread, its quantiles and its ends."""
    values, reference = (np.asarray(x, np.float64).ravel() for x in (values, reference))
    scale, at = reference.std(), np.linspace(0.02, 0.98, 13)
    noise = 4 * math.sqrt(1 / len(values) + 1 / len(reference))
    assert abs(values.mean()) < noise * scale
    assert abs(values.std() / scale - 1) < noise
    gaps = np.quantile(values, at) - np.quantile(reference, at)
    assert np.abs(gaps).max() < 2.5 * noise * scale
    ends = np.abs(values).max() / np.abs(reference).max()
    assert 0.6 < ends < 1.6 and np.unique(values).size > 0.9 * len(values)


def torch_drawn(initialise, *shape):
    torch.manual_seed(0)
    return initialise(torch.empty(*shape)).numpy()


def cut(std, bound):
    return lambda x: torch.nn.init.trunc_normal_(x, std=std, a=-bound, b=bound)


def flax_drawn(initialiser, *shape):
    return np.asarray(initialiser(jax.random.key(0), shape))


def kernels(values, part):
    return {name: value for name, value in values.items() if name.endswith(f"/{part}/kernel")}


def assert_norms_and(values, zero_biases):
    for name, value in values.items():
        if name.rpartition("/")[0].rpartition("/")[2].startswith(("ln_", "fc_norm")):
            assert (value == (1 if name.endswith("scale") else 0)).all(), name
        elif name.endswith(zero_biases):
            assert (value == 0).all(), name


@pytest.mark.slow
def test_scenic_s_vivit_from_scratch(params):
    values = params[SCENIC]
    assert_norms_and(values, ("/query/bias", "/key/bias", "/value/bias", "/out/bias"))
    glorot = nn.initializers.xavier_uniform()
    square, wide = flax_drawn(glorot, D, D), flax_drawn(glorot, D, MLP)
    for part in ("query", "key", "value", "out"):
        found = kernels(values, part)
        assert len(found) == 5
        for value in found.values():
            assert_drawn_as(value, square)
            assert np.abs(value).max() <= math.sqrt(6 / (2 * D))
    for part in ("mlp_in", "mlp_out"):
        assert len(kernels(values, part)) == 5
        for value in kernels(values, part).values():
            assert_drawn_as(value, wide)
        biases = [values[name.replace("kernel", "bias")] for name in kernels(values, part)]
        normal = np.random.default_rng(0).standard_normal(10_000)
        assert_drawn_as(np.concatenate(biases), 1e-6 * normal)
    for stage in ("spatial", "temporal"):
        assert (values[f"backbone/{stage}/cls"] == 0).all()
        positions = values[f"backbone/{stage}/pos_embed"]
        assert_drawn_as(positions, 0.02 * np.random.default_rng(0).standard_normal(10_000))
    assert (values["head/kernel"] == 0).all() and (values["head/bias"] == 0).all()
    # The whole tubelet counts as inputs: 2 * 8 * 8 * 3.
    lecun = flax_drawn(nn.initializers.lecun_normal(), *TUBELET, 3, D)
    kernel = values["backbone/patch_embed/kernel"]
    assert_drawn_as(kernel, lecun)
    assert np.abs(kernel).max() <= 2 * (384**-0.5) / 0.8796 and kernel.std() > 0.9 * 384**-0.5
    assert (values["backbone/patch_embed/bias"] == 0).all()


def test_videomae_s_pretraining(params):
    values = params[PRETRAINING]
    assert_norms_and(
        values, ("/query/bias", "/value/bias", "/out/bias", "/mlp_in/bias", "/mlp_out/bias")
    )
    assert (values["decoder/head/bias"] == 0).all()
    glorot = torch.nn.init.xavier_uniform_
    for prefix, width, inner in (("backbone/layers_", D, MLP), ("decoder/layers_", 48, 80)):
        fused, square = torch_drawn(glorot, 3 * width, width), torch_drawn(glorot, width, width)
        wide = torch_drawn(glorot, inner, width)
        layers = {name: value for name, value in values.items() if name.startswith(prefix)}
        for part in ("query", "key", "value"):
            for value in kernels(layers, part).values():
                assert_drawn_as(value, fused)
                assert np.abs(value).max() <= math.sqrt(6 / (4 * width))
        for value in kernels(layers, "out").values():
            assert_drawn_as(value, square)
        for part in ("mlp_in", "mlp_out"):
            for value in kernels(layers, part).values():
                assert_drawn_as(value, wide)
    assert_drawn_as(values["decoder/head/kernel"], torch_drawn(glorot, 384, 48))
    torch.manual_seed(0)
    assert_drawn_as(values["to_decoder/kernel"], torch.nn.Linear(D, 48).weight.detach().numpy())
    token = values["mask_token"]
    assert_drawn_as(token, torch_drawn(cut(0.02, 0.02), 10_000))
    assert np.abs(token).max() <= 0.02
    assert "to_decoder/bias" not in values and not any("/key/bias" in name for name in values)


@pytest.mark.parametrize("model", [PRETRAINING, CLASSIFIER], ids=lambda model: type(model).__name__)
def test_videomae_s_patch_embedding_is_a_convolution_as_pytorch_makes_it(params, model):
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(3, D, TUBELET)
    values = params[model]
    assert_drawn_as(values["backbone/patch_embed/kernel"], layer.weight.detach().numpy())
    assert_drawn_as(values["backbone/patch_embed/bias"], layer.bias.detach().numpy())
    assert np.abs(values["backbone/patch_embed/bias"]).max() <= 384**-0.5


def test_videomae_s_fine_tuning_from_scratch(params):
    values = params[CLASSIFIER]
    assert_norms_and(
        values, ("/query/bias", "/value/bias", "/out/bias", "/mlp_in/bias", "/mlp_out/bias")
    )
    linear = torch_drawn(cut(0.02, 2.0), 20_000)
    for part in ("query", "key", "value", "out", "mlp_in", "mlp_out"):
        found = kernels(values, part)
        assert len(found) == 3
        for value in found.values():
            assert_drawn_as(value, linear)
    assert_drawn_as(values["head/kernel"], linear * 0.001)
    assert (values["head/bias"] == 0).all()


def test_what_is_compared_tells_one_distribution_from_another():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(9216)
    for other in (normal * 1.1, rng.uniform(-(3**0.5), 3**0.5, 9216), normal + 0.1):
        with pytest.raises(AssertionError):
            assert_drawn_as(other, rng.standard_normal(9216))
    assert_drawn_as(normal, rng.standard_normal(9216))


@pytest.mark.parametrize("model", [SCENIC, PRETRAINING], ids=lambda model: type(model).__name__)
def test_a_scanned_and_a_looped_model_start_alike(params, model):
    looped = model.clone(config=dataclasses.replace(model.config, scan_layers=False))
    assert (
        param_tree.flatten(abstract_params(looped)).keys()
        != param_tree.flatten(abstract_params(model)).keys()
    )
    found = drawn(looped)
    assert found.keys() == params[model].keys()
    for name, value in params[model].items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_seed_gives_its_own_values_and_every_parameter_differs(params):
    again, other = drawn(PRETRAINING), drawn(PRETRAINING, seed=1)
    matrices = []
    for name, value in params[PRETRAINING].items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
        constant = value.std() == 0
        assert np.array_equal(other[name], value) == constant, name
        matrices += [] if constant else [value.ravel()[:48].tobytes()]
    assert len(set(matrices)) == len(matrices)


@pytest.mark.parametrize(
    "fields",
    [
        FSA | {"zero_init_temporal_attention": True},
        {"attention_type": "factorised_dot_product", "pooling": "mean"},
        {"attention_type": "joint"},
        {"attention_type": "factorised_encoder", "spatial_only": True},
    ],
    ids=lambda fields: fields["attention_type"],
)
def test_every_parameter_of_every_vivit_has_its_values(fields):
    config = vivit_jax.VivitConfig(**SIZES | fields, tubelet_size=TUBELET)
    values = drawn(vivit_jax.VivitForVideoClassification(config))
    zero = [
        name for name, value in kernels(values, "attention_time/out").items() if not value.any()
    ]
    assert len(zero) == (3 if "zero_init_temporal_attention" in fields else 0)
    assert all(value.any() for value in kernels(values, "query").values())
    assert all(np.isfinite(value).all() for value in values.values())


def test_scales_of_videomae_v2_and_of_layers_start_as_the_model_s(params):
    config = dataclasses.replace(VIDEOMAE, cosine_attention=True, layer_scale_init=0.1)
    values = drawn(vivit_jax.VideoMAEForVideoClassification(config))
    for i in range(3):
        layer = f"backbone/layers_{i}"
        np.testing.assert_allclose(values[f"{layer}/attention/scale"], math.log(10), rtol=1e-6)
        for branch in ("attention", "mlp"):
            np.testing.assert_allclose(values[f"{layer}/scale_{branch}"], 0.1, rtol=1e-6)


def test_another_initializer_range_takes_the_place_of_the_papers():
    wide = dict(initializer_range=0.06)
    reference = torch_drawn(cut(0.06, 2.0), 20_000)
    values = drawn(CLASSIFIER.clone(config=dataclasses.replace(VIDEOMAE, **wide)))
    assert_drawn_as(values["backbone/layers_2/mlp_in/kernel"], reference)
    values = drawn(SCENIC.clone(config=dataclasses.replace(VIVIT, **wide)))
    assert_drawn_as(values["backbone/spatial/pos_embed"], reference)


def test_only_what_is_named_is_drawn(params):
    """A layer of a scanned model, too; in the dtype of the params."""
    start = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, np.float16), abstract_params(SCENIC))
    before = jax.tree.map(np.copy, start)
    only = ("head/kernel", "backbone/spatial/layers_1/mlp_in/kernel", "backbone/temporal/pos_embed")
    found = param_tree.flatten(papers_params(SCENIC, start, 0, only))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, start, before)))
    assert {leaf.dtype for leaf in found.values()} == {np.dtype(np.float16)}
    for name, slot in param_tree.slots(param_tree.shapes_of(found)).items():
        value = np.asarray(found[slot.leaf] if slot.layer is None else found[slot.leaf][slot.layer])
        if name in only:
            np.testing.assert_array_equal(value, params[SCENIC][name].astype(np.float16))
        else:
            assert (value == 7).all(), name


def test_a_name_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no initial values are known for backbone/new/table"):
        papers_params(SCENIC, {"backbone": {"new": {"table": np.zeros(3)}}}, 0)


def test_a_run_starts_with_them():
    start = starting_model(changed(PRETRAIN, train__seed=3))
    expected = papers_params(start.model, abstract_params(start.model), 3)
    assert jax.tree.all(jax.tree.map(np.array_equal, start.params, expected))


def test_a_recipe_may_ask_for_huggingface_s_values():
    config = FINETUNE.model.config | {"initializer_range": 0.06}
    start = starting_model(changed(FINETUNE, model__config=config, model__initial="huggingface"))
    expected = fresh_params(start.model, 0)
    assert jax.tree.all(jax.tree.map(np.array_equal, start.params, expected))
    kernel = start.params["backbone"]["layers"]["mlp_in"]["kernel"]
    assert_drawn_as(kernel, torch_drawn(cut(0.06, 2.0), 20_000))


def test_a_run_from_a_file_draws_what_the_file_has_not(tmp_path):
    """A classifier of other classes: its head, and nothing else."""
    first = starting_model(FINETUNE)
    kept = jax.tree.map(lambda x: x + 1, first.params)
    processor = vivit_jax.VideoProcessor.named("videomae-imagenet", size=16, crop_size=16)
    vivit_jax.save_pretrained(tmp_path / "model", first.model, kept, processor)
    more = FINETUNE.model.config | {"num_labels": 9}
    recipe = changed(FINETUNE, model__start=str(tmp_path / "model"), model__config=more)
    start = starting_model(recipe)
    fresh = param_tree.flatten(papers_params(start.model, abstract_params(start.model), 0))
    for name, value in param_tree.flatten(start.params).items():
        expected = fresh[name] if name.startswith("head/") else param_tree.flatten(kept)[name]
        np.testing.assert_array_equal(value, expected, err_msg=name)
    assert start.params["head"]["kernel"].shape == (16, 9)


@pytest.mark.slow
@pytest.mark.parametrize("scan_layers", [True, False])
def test_the_compiler_s_lower_level_draws_the_same_bits(scan_layers):
    """As its usual one, 3; as a part of another program it takes no options of its own."""
    config = dataclasses.replace(VIDEOMAE, scan_layers=scan_layers)
    model = vivit_jax.VideoMAEForPreTraining(config)
    leaves, key = tuple(sorted(param_tree.flatten(abstract_params(model)))), jax.random.key(3)
    levels = ({"xla_backend_optimization_level": 3}, DRAW_OPTIONS)
    draws = (
        jax.jit(build._drawn, static_argnums=(0, 1, 2), compiler_options={**level, **AS_USERS})
        for level in levels
    )
    usual, lower = (draw(model, leaves, "float32", key) for draw in draws)
    inside = param_tree.flatten(jax.jit(lambda: fresh_params(model, 3))())
    for path in leaves:
        np.testing.assert_array_equal(lower[path], usual[path])
        np.testing.assert_allclose(inside[path], usual[path], rtol=1e-5, atol=1e-7)
    jax.eval_shape(lambda: fresh_params(model, 3))
