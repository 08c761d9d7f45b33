# SPDX-License-Identifier: Apache-2.0
"""VideoMAE V1 and V2 against numpy_videomae.py, float64 and written from the papers.

Parameters come under the authors' names from the reference and reach the model through the weight
table, so that these tests also pin what the names mean. Largest differences of all cases on a
2-core x86 CPU, where 2e-5 is allowed: encoder 8.5e-6, decoder 1.1e-5, logits 8.0e-6, loss 1.9e-7,
logits of classifiers 3.8e-6, gradients 6.3e-7; in float64 5e-15.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import numpy_videomae as reference
import pytest
from helpers import assert_close, bool_mask, clip, error, forward, mostly_slow
from tiny import VIDEOMAE

import vivit_jax
from checkpoints_convert.layouts.registry import published
from checkpoints_convert.rules import export_params, import_params
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params

EPS = ("layer_norm_eps", "fc_norm_eps", "decoder_norm_eps")
SIZES = (
    VIDEOMAE
    | dict(image_size=(32, 16), use_mean_pooling=False)  # a running cell needs an even grid
    | dict.fromkeys(EPS, 1e-6)
)
COSINE, LAYER_SCALE = dict(cosine_attention=True), dict(layer_scale_init=0.1)
BOTH = COSINE | LAYER_SCALE
# As V2's giant model: an odd number of pixels, an MLP of 48/11 of the width, heads of 11.
GIANT = dict(
    image_size=(28, 14),
    patch_size=7,
    hidden_size=44,
    intermediate_size=192,
    decoder_hidden_size=22,
    decoder_intermediate_size=96,
)


def channels(count, **changes):
    """Statistics that differ between channels, and so do their images."""
    mean = tuple(0.2 + 0.05 * i for i in range(count))
    std = tuple(0.5 - 0.03 * i for i in range(count))
    return dict(num_channels=count, image_mean=mean, image_std=std) | changes


# The decoder reconstructs what was hidden (V1) or what a running cell keeps ("dual", V2).
CASES = {
    "V1": {},
    "V1 both": BOTH,
    "dual": {},
    "dual cosine": COSINE,
    "dual layer scale": LAYER_SCALE,
    "dual both": BOTH,
    "dual giant both": GIANT | BOTH,
    "dual no bias": dict(qkv_bias=False),
    "dual raw pixels": dict(norm_pix_loss=False),
    "dual own statistics": channels(3, norm_pix_loss=False),
    "dual 1 channel": channels(1, norm_pix_loss=False),
    "dual 2 channels": channels(2),
    "dual 4 channels": dict(num_channels=4),
    "dual 13 channels": channels(13, norm_pix_loss=False),
}
UNROLLED = ("V1", "dual both")


def config_of(case, **changes):
    return vivit_jax.VideoMAEConfig(**{**SIZES, **CASES[case], **changes})


@functools.cache
def params_of(case, head="pretraining"):
    return reference.random_params(config_of(case), head, np.random.default_rng(0))


def masks_of(case):
    """bool [b, n]: hidden from the encoder, and dropped from the decoder or None."""
    config = config_of(case)
    if case.startswith("V1"):
        return bool_mask(config), None
    hidden = reference.tube(np.random.default_rng(0), 2, config.grid, 0.75)
    return hidden, reference.running_cell([1, 2], config.grid, 0.5)


def expected(case, params, pixels, hidden, dropped):
    config = config_of(case)
    statistics = {}
    if config.image_mean is not None:
        statistics = dict(mean=config.image_mean, std=config.image_std)
    elif config.num_channels != 3:
        statistics = dict(mean=0.0, std=1.0)
    return reference.pretrain(
        params,
        pixels,
        hidden,
        dropped,
        tubelet=config.tubelet,
        heads=config.num_attention_heads,
        decoder_heads=config.decoder_num_attention_heads,
        normalise=config.norm_pix_loss,
        **statistics,
    )


def rules_of(config, head):
    return published("videomae", head, layout="videomae").rules(config)


def load(config, params, head="pretraining"):
    """A model with parameters under the authors' names."""
    name = {"pretraining": "ForPreTraining", "classification": "ForVideoClassification"}[head]
    model = getattr(vivit_jax, f"VideoMAE{name}")(config)
    shapes = param_tree.shapes_of(param_tree.flatten(abstract_params(model)))
    return model, param_tree.unflatten(import_params(params, rules_of(config, head), shapes))


def run(config, params, pixels, hidden, dropped, **flags):
    """Our pre-training outputs from parameters under the authors' names."""
    model, ours = load(config, params)
    mask = vivit_jax.Mask.from_bool(hidden, dropped)
    return forward(model, ours, pixels, mask=mask, **flags)


@functools.cache
def dual_run():
    """(parameters, pixels, masks, our outputs) of "dual both"."""
    case = "dual both"
    params, pixels, masks = params_of(case), clip(config_of(case)), masks_of(case)
    out = run(config_of(case), params, pixels, *masks, output_hidden_states=True)
    return params, pixels, masks, out


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("case", "scan_layers"),
    mostly_slow(
        [*((case, True) for case in CASES), *((case, False) for case in UNROLLED)],
        *((case, True) for case in ("dual", "dual both", "dual 13 channels")),
    ),
)
def test_pretraining(case, scan_layers):
    params, config = params_of(case), config_of(case, scan_layers=scan_layers)
    pixels, masks = clip(config), masks_of(case)
    wanted = expected(case, params, pixels, *masks)
    out = run(config, params, pixels, *masks, output_hidden_states=True)
    hidden = np.stack([wanted["embedded"], *wanted["layers"]])
    decoder = np.stack([wanted["decoder_embedded"], *wanted["decoder_layers"]])
    measured = {
        "encoder": assert_close(out.hidden_states, hidden, "hidden_states"),
        "decoder": assert_close(out.decoder_hidden_states, decoder, "hidden_states"),
        "logits": assert_close(out.logits, wanted["logits"], "logits"),
        "loss": assert_close(out.loss, wanted["loss"], "loss"),
    }
    print(f"\n{case}:", *(f"{what} {value:.1e}" for what, value in measured.items()))


@pytest.mark.parametrize(
    ("case", "pooled"),
    mostly_slow(
        [("V1", True), ("V1", False), ("dual both", True), ("dual giant both", True)],
        *(("V1", False), ("dual both", True)),
    ),
)
def test_classification(case, pooled):
    config = config_of(case, use_mean_pooling=pooled)
    params = reference.random_params(config, "classification", np.random.default_rng(0))
    pixels = clip(config)
    wanted = reference.classify(
        params, pixels, tubelet=config.tubelet, heads=config.num_attention_heads
    )
    model, ours = load(config, params, "classification")
    out = forward(model, ours, pixels, output_hidden_states=True)
    assert_close(out.hidden_states, np.stack([wanted["embedded"], *wanted["layers"]]), "logits")
    measured = assert_close(out.logits, wanted["logits"], "logits")
    print(f"\n{case} {'mean' if pooled else 'token 0'}: logits {measured:.1e}")


def test_gradients_equal_finite_differences():
    """In every kind of tensor, central differences of the reference at the steepest entry."""
    case = "dual both"
    params, config = params_of(case), config_of(case)
    pixels, masks = clip(config), masks_of(case)
    model, ours = load(config, params)
    mask = vivit_jax.Mask.from_bool(*masks)

    @jax.jit
    @jax.grad
    def gradient(params):
        return model.apply({"params": params}, pixels, mask).loss

    grads = param_tree.flatten(gradient(ours))
    named = export_params(grads, rules_of(config, "pretraining"))
    assert named.keys() == params.keys()
    params = {name: value.astype(np.float64) for name, value in params.items()}
    worst = 0.0
    for name in params:
        if "blocks." in name and "blocks.1." not in name:
            continue
        grad = named[name].read()
        # Queries, keys and values share a tensor.
        parts = np.split(grad, 3) if name.endswith("qkv.weight") else [grad]
        for start, part in zip(range(0, len(grad), len(parts[0])), parts, strict=True):
            place = np.unravel_index(np.abs(part).argmax(), part.shape)
            place = (place[0] + start, *place[1:])
            step, values = 1e-5, []
            for sign in (1, -1):
                moved = params | {name: params[name].copy()}
                moved[name][place] += sign * step
                values.append(expected(case, moved, pixels, *masks)["loss"])
            difference = (values[0] - values[1]) / (2 * step)
            measured = abs(grad[place] - difference) / max(1, abs(difference))
            worst = max(worst, measured)
            assert measured <= 2e-5, (name, place, measured)
            assert abs(difference) > 1e-6, f"{name}: nothing to compare"
    print(f"\ngradient {worst:.1e}")


def test_the_cosine_factor_has_a_bound():
    """V2's code rounds log(100) to 4.6052, and float64 tells the two apart."""
    case = "dual cosine"
    pixels, masks = clip(config_of(case)).astype(np.float64), masks_of(case)
    params = {
        name: value + 4 * (np.arange(len(value)) == 0)[:, None, None]  # the first head exceeds it
        if name.endswith("attn.scale")
        else value
        for name, value in params_of(case).items()
    }
    wanted = expected(case, params, pixels, *masks)
    with jax.enable_x64(True):
        out = exact_run(case, params, pixels, masks)
    assert error(out.logits, wanted["logits"]) < 1e-11
    hundred = {
        name: np.minimum(value, math.log(100)) if name.endswith("attn.scale") else value
        for name, value in params.items()
    }
    assert error(out.logits, expected(case, hundred, pixels, *masks)["logits"]) > 1e-6


def test_another_loss_is_told_apart():
    """Tokens that the encoder saw do not count, and the variance is the unbiased one."""
    params, pixels, masks, out = dual_run()
    wanted = expected("dual both", params, pixels, *masks)
    assert_close(out.loss, wanted["loss"], "loss")
    logits, targets, counted = wanted["logits"], wanted["targets"], wanted["counted"]
    counts = counted.sum(axis=1)
    assert counts[0] != counts[1], "the mean over clips would be the mean over tokens"
    by_clip = [
        reference.squared_error(logits[i], targets[i], counted[i]) for i in range(len(counted))
    ]
    colours = pixels * reference.IMAGENET_STD + reference.IMAGENET_MEAN
    biased = reference.all_targets(colours, config_of("dual both").tubelet, ddof=0)
    biased = np.stack([rows[keep] for rows, keep in zip(biased, ~masks[1], strict=True)])
    for wrong in (
        reference.squared_error(logits, targets, np.ones_like(counted)),
        np.mean(by_clip),
        reference.squared_error(logits, biased, counted),
    ):
        assert error(out.loss, wrong) > 1e-4


def test_another_decoder_is_told_apart():
    """A decoder that gets no mask token where the encoder saw something has other outputs."""
    params, pixels, (hidden, dropped), out = dual_run()
    wanted = expected("dual both", params, pixels, hidden, dropped)
    for row in range(len(hidden)):  # one clip at a time: without them the lengths differ
        one, both = slice(row, row + 1), wanted["counted"][row]
        wrong = expected("dual both", params, pixels[one], hidden[one], dropped[one] | ~hidden[one])
        ours = np.asarray(out.logits[row])[both]
        assert_close(ours, wanted["logits"][row][both], "logits")
        assert error(ours, wrong["logits"][0]) > 1e-2


def test_another_attention_is_told_apart():
    """1/sqrt(head width) beside the cosine factor is a smaller factor."""
    params, pixels, masks, out = dual_run()
    config = config_of("dual both")
    widths = {"encoder": config.hidden_size / 4, "decoder": config.decoder_hidden_size / 2}
    divided = {
        name: value - math.log(widths[name[:7]]) / 2 if name.endswith("attn.scale") else value
        for name, value in params.items()
    }
    wanted = expected("dual both", params, pixels, *masks)
    assert_close(out.logits, wanted["logits"], "logits")
    assert error(out.logits, expected("dual both", divided, pixels, *masks)["logits"]) > 1e-2


def exact_run(case, params, pixels, masks, **changes):
    """Ours in float64; call it with 64 bits enabled."""
    # XLA's own attention takes the softmax in float32 even of float64 scores.
    exact = dict(dtype="float64", param_dtype="float64")
    params = {name: value.astype(np.float64) for name, value in params.items()}
    out = run(config_of(case, **exact, **changes), params, pixels, *masks)
    assert out.logits.dtype == out.loss.dtype == np.float64
    return out


def test_float64_shows_the_epsilon_of_the_decoder():
    """HuggingFace's 1e-5 and the authors' 1e-6 differ by less than float32 rounds."""
    case = "dual both"
    params, masks = params_of(case), masks_of(case)
    pixels = clip(config_of(case)).astype(np.float64)
    wanted = expected(case, params, pixels, *masks)
    with jax.enable_x64(True):
        out = exact_run(case, params, pixels, masks)
        measured = error(out.logits, wanted["logits"]), error(out.loss, wanted["loss"])
        print("\nfloat64: logits {:.1e}, loss {:.1e}".format(*measured))
        assert max(measured) < 1e-11
        other = exact_run(case, params, pixels, masks, decoder_norm_eps=1e-5)
        assert error(other.logits, wanted["logits"]) > 1e-8


def test_low_contrast_shows_the_epsilon_of_targets():
    """1e-6 is added to the standard deviation; it is not the root's, and it is not nothing."""
    case = "V1"
    masks, config = masks_of(case), config_of(case)
    pixels = 1e-4 * clip(config).astype(np.float64)
    wanted = expected(case, params_of(case), pixels, *masks)
    with jax.enable_x64(True):
        out = exact_run(case, params_of(case), pixels, masks)
    assert error(out.loss, wanted["loss"]) < 1e-11
    colours = reference.patches(pixels * reference.IMAGENET_STD, config.tubelet)
    colours -= colours.mean(axis=(2, 3, 4), keepdims=True)
    variance = colours.var(axis=(2, 3, 4), keepdims=True, ddof=1)
    for std in (np.sqrt(variance), np.sqrt(variance + 1e-6)):
        targets = (colours / std).reshape(*colours.shape[:2], -1)
        targets = np.stack([rows[keep] for rows, keep in zip(targets, masks[0], strict=True)])
        wrong = reference.squared_error(wanted["logits"], targets, wanted["counted"])
        assert error(out.loss, wrong) > 1e-3


def test_float64_shows_the_epsilons_of_a_classifier():
    exact = dict(dtype="float64", param_dtype="float64")
    config = config_of("V1", use_mean_pooling=True, **exact)
    params = reference.random_params(config, "classification", np.random.default_rng(0))
    params = {name: value.astype(np.float64) for name, value in params.items()}
    pixels = clip(config).astype(np.float64)
    wanted = reference.classify(params, pixels, tubelet=config.tubelet, heads=4)["logits"]
    with jax.enable_x64(True):

        def measured(**changes):
            changed = dataclasses.replace(config, **changes)
            model, ours = load(changed, params, "classification")
            return error(forward(model, ours, pixels).logits, wanted)

        assert measured() < 1e-11
        assert measured(layer_norm_eps=1e-12) > 1e-8
        assert measured(fc_norm_eps=1e-5) > 1e-8


GRIDS = [(3, 4, 2), (8, 14, 14), (5, 6, 10)]


def random_sources(grid):
    """A numpy generator and, compiling once, a jax key."""
    return [np.random.default_rng(0)] + [jax.random.key(0)] * (grid == GRIDS[0])


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("grid", GRIDS)
def test_running_cells(grid, ratio):
    patterns = [np.flatnonzero(~row) for row in reference.running_cell(range(4), grid, ratio)]
    for source in random_sources(grid):
        kept = np.asarray(vivit_jax.running_cell(source, 40, grid, ratio))
        found = {next(i for i in range(4) if (patterns[i] == row).all()) for row in kept}
        assert found == {0, 1, 2, 3}, "a clip starts anywhere in the cell"


@pytest.mark.parametrize("make", [vivit_jax.tube_mask, vivit_jax.dual_mask])
@pytest.mark.parametrize("grid", GRIDS)
def test_tubes(grid, make):
    area, kept = grid[1] * grid[2], reference.running_cell(range(4), grid, 0.5)
    count = reference.tube(np.random.default_rng(0), 1, grid, 0.75).sum()
    for source in random_sources(grid):
        mask = make(source, 6, grid, 0.75)
        hidden = np.asarray(mask.to_bool())
        assert (hidden.sum(axis=1) == count).all()
        frames = hidden.reshape(6, grid[0], area)
        assert (frames == frames[:, :1]).all() and len(np.unique(hidden, axis=0)) > 1
        if make is vivit_jax.dual_mask:
            for row in np.asarray(mask.decoded):
                assert any((np.flatnonzero(~dropped) == row).all() for dropped in kept)
