# SPDX-License-Identifier: Apache-2.0
"""Pre-training embeds visible tubelets only and makes targets of predicted ones only.

Computing everything and dropping is the same function; here it stands beside ours.
"""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler_flags import AS_USERS
from helpers import clip, mostly_slow, random_params
from tiny import VIDEOMAE

import vivit_jax
from vivit_jax.layers.embed import TubeletEmbed
from vivit_jax.layers.tubelets import take_tokens
from vivit_jax.models import videomae

EXACT = dict(dtype="float64", param_dtype="float64")
ROUNDS = 2
SIZES = VIDEOMAE | dict(image_size=(32, 16), use_mean_pooling=False)


class EmbedAll(TubeletEmbed):
    """Embeds every tubelet, then drops those that are not visible."""

    def __call__(self, pixel_values, visible=None):
        return take_tokens(TubeletEmbed.__call__(self, pixel_values), visible)


def all_targets(pixel_values, mask, config, *order, targets=videomae.reconstruction_targets):
    """Makes the target of every tubelet, then drops those that are not predicted."""
    tokens = jnp.broadcast_to(jnp.arange(mask.num_tokens), (len(mask.visible), mask.num_tokens))
    everything = vivit_jax.Mask(visible=mask.visible[:, :0], masked=tokens, decoded=None)
    return take_tokens(targets(pixel_values, everything, config, *order), mask.predicted)


@pytest.fixture
def compute_all(monkeypatch):
    """Call it to have the models that are traced from then on compute everything."""

    def patch():
        monkeypatch.setattr(videomae, "TubeletEmbed", EmbedAll)
        monkeypatch.setattr(videomae, "reconstruction_targets", all_targets)

    return patch


def exact_inputs(size, batch, make=vivit_jax.tube_mask, ratio=0.9):
    """(configuration in float64, mask, pixels), what is drawn being the same every time."""
    config = vivit_jax.VideoMAEConfig(**size, **EXACT)
    mask = make(np.random.default_rng(0), batch, config.grid, ratio)
    return config, mask, clip(config, batch=batch).astype(np.float64)


def assert_same_bits(ours, everything):
    ours, everything = np.asarray(ours), np.asarray(everything)
    assert ours.dtype == everything.dtype == np.float64 and ours.shape == everything.shape
    different = ours.view(np.uint64) != everything.view(np.uint64)
    assert not different.any(), f"{different.sum()} of {different.size} numbers differ"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "make"),
    mostly_slow(
        itertools.product(
            [{}, dict(norm_pix_loss=False, patch_size=4)],
            [vivit_jax.tube_mask, vivit_jax.dual_mask],
        ),
        ({}, vivit_jax.dual_mask),
    ),
)
def test_the_model_computes_the_same_bits(changes, make, compute_all):
    with jax.enable_x64(True):
        config, mask, pixels = exact_inputs(SIZES | changes, 2, make, ratio=0.75)
        model = vivit_jax.VideoMAEForPreTraining(config)
        variables = {
            "params": jax.tree.map(lambda leaf: leaf.astype(np.float64), random_params(model))
        }

        def run():
            apply = lambda v, x, m: model.apply(v, x, m, output_hidden_states=True)  # noqa: E731
            lowered = jax.jit(apply).lower(variables, pixels, mask)
            compiled = lowered.compile(AS_USERS)
            return lowered.cost_analysis()["flops"], compiled(variables, pixels, mask)

        fewer, ours = run()
        compute_all()
        more, everything = run()
        hidden = mask.num_tokens - mask.visible.shape[1]
        assert more - fewer > 2 * hidden * config.patch_values * config.hidden_size
        for field in ("hidden_states", "decoder_hidden_states", "logits", "loss"):
            assert_same_bits(getattr(ours, field), getattr(everything, field))


@pytest.mark.parametrize(
    ("batch", "ratio"), [(1, 0.75), pytest.param(2, 0.9, marks=pytest.mark.slow)]
)
def test_real_sizes_compute_the_same_bits(batch, ratio):
    """1568 tokens of 1536 values, 768 wide: no product of matrices rounds by the count of rows."""
    with jax.enable_x64(True):
        config, mask, pixels = exact_inputs(dict(use_mean_pooling=False), batch, ratio=ratio)
        rng = np.random.default_rng(1)
        shape = (*config.tubelet, config.num_channels, config.hidden_size)
        kernel, bias = rng.standard_normal(shape), rng.standard_normal(shape[-1:])
        variables = {"params": {"kernel": kernel, "bias": bias}}
        ours, everything = (
            jax.jit(embed(config).apply, compiler_options=AS_USERS)(variables, pixels, mask.visible)
            for embed in (TubeletEmbed, EmbedAll)
        )
        assert ours.shape == (batch, mask.visible.shape[1], config.hidden_size)
        assert_same_bits(ours, everything)
        ours, everything = (
            jax.jit(targets, static_argnums=2, compiler_options=AS_USERS)(pixels, mask, config)
            for targets in (videomae.reconstruction_targets, all_targets)
        )
        assert_same_bits(ours, everything)


@pytest.mark.alone
@pytest.mark.parametrize("make", [vivit_jax.tube_mask, vivit_jax.dual_mask])
def test_the_base_model_computes_the_same_bits(make, compute_all):
    """VideoMAE-B as users compile it: all that the forward pass returns, and targets alone."""
    with jax.enable_x64(True):
        config, mask, pixels = exact_inputs(dict(use_mean_pooling=False), 1, make, ratio=0.75)
        model = vivit_jax.VideoMAEForPreTraining(config)
        params = jax.tree.map(lambda x: x.astype(np.float64), random_params(model, scale=0.02))

        def run():
            apply = lambda p, x, m: model.apply({"params": p}, x, m, output_hidden_states=True)  # noqa: E731
            out = jax.jit(apply)(params, pixels, mask)
            targets = jax.jit(lambda x, m: videomae.reconstruction_targets(x, m, config))
            states = (out.hidden_states, out.decoder_hidden_states)
            return *states, out.logits, out.loss, targets(pixels, mask)

        ours = run()
        compute_all()
        for one, other in zip(ours, run(), strict=True):
            assert_same_bits(one, other)


@pytest.mark.alone
def test_step_time(compute_all):
    """VideoMAE-B, loss and gradients of two clips at mask 0.9, as users run it; in turns."""
    config = vivit_jax.PRESETS["videomae-base"].config
    model = vivit_jax.VideoMAEForPreTraining(config)
    params = jax.device_put(random_params(model, scale=0.02))
    pixels = jnp.asarray(clip(config))
    mask = vivit_jax.tube_mask(np.random.default_rng(0), 2, config.grid, 0.9)

    def compiled():
        loss = lambda p, x, m: model.apply({"params": p}, x, m).loss  # noqa: E731
        with jax.default_matmul_precision(None):  # not the "highest" of the parity tests
            return jax.jit(jax.value_and_grad(loss)).lower(params, pixels, mask).compile()

    steps = {"visible only": compiled()}
    compute_all()
    steps["all, then drop"] = compiled()
    seconds, losses = {name: [] for name in steps}, {}
    for name, step in steps.items():
        losses[name] = float(step(params, pixels, mask)[0])
    for _ in range(ROUNDS):  # in turns, so that a slow moment of the machine is shared
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(step(params, pixels, mask))
            end = time.perf_counter(), time.process_time()
            seconds[name].append(np.subtract(end, start))
    median = {name: np.median(values, axis=0) for name, values in seconds.items()}
    # Blocks run in a loop whose body is counted once, so only the difference means something.
    work = {name: step.cost_analysis()["flops"] for name, step in steps.items()}
    ours, everything = steps
    print()
    for name, values in seconds.items():
        wall = np.array(values)[:, 0]
        memory = steps[name].memory_analysis().temp_size_in_bytes / 2**20
        print(
            f"{name:15} {median[name][0]:.2f} s a step ({wall.min():.2f} to {wall.max():.2f}), "
            f"{median[name][1]:.2f} s of processors, {memory:.0f} MiB, loss {losses[name]:.7f}"
        )
    wall, processors = median[everything] / median[ours]
    print(f"computing all takes {wall:.3f} times as long, {processors:.3f} of processor time")
    # The encoder's blocks see visible tokens either way: what is saved is the embedding of nine
    # tenths of the tokens and its gradient to the kernel, a few per cent of a step. A timer hardly
    # tells (0.99 to 1.04 of processor time), so the times are printed and the work is compared.
    hidden = config.num_tokens - mask.visible.shape[1]
    saved = 2 * 2 * 2 * hidden * config.patch_values * config.hidden_size
    assert work[everything] - work[ours] == pytest.approx(saved, rel=0.01)
    assert abs(losses[ours] - losses[everything]) < 1e-6
