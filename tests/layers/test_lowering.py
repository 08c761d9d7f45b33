# SPDX-License-Identifier: Apache-2.0
"""Programs lowered for platforms that are not here: what they would run, not how fast."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import mostly_slow

from vivit_jax import VideoMAEConfig, VivitConfig
from vivit_jax.benchmark.work import Work, program
from vivit_jax.layers import attention as attention_module
from vivit_jax.layers import linear
from vivit_jax.layers.placed import placed_attention

SIZES = dict(
    image_size=32,
    num_frames=4,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    num_labels=5,
    attention="chunked",
    scan_layers=False,  # so that a loop in the program is attention's
)
DECODER = dict(
    decoder_hidden_size=32,
    decoder_intermediate_size=48,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
)
VIVIT = SIZES | dict(tubelet_size=(1, 2, 2))
FACTORISED = dict(attention_type="factorised_encoder", num_temporal_layers=2)
# Configuration, the work with gradients, and the shapes of a tile of scores: on accelerators all
# heads at once, on CPU half of one head's 1024 queries, or 8 of the 16 heads of the frames.
MODELS = {
    "VideoMAE": (
        VideoMAEConfig(**SIZES, **DECODER, patch_size=2, tubelet_size=1),
        "pretrain",
        "4x1024x1024",
        "512x1024",
    ),
    "ViViT": (VivitConfig(**VIVIT), "finetune", "4x1025x1025", "513x1025"),
    "factorised encoder": (
        VivitConfig(**VIVIT, **FACTORISED),
        "finetune",
        "16x257x257",
        "8x257x257",
    ),
}


def traced(model, kind, **execution):
    made = program(Work(model, dataclasses.replace(MODELS[model][0], **execution), kind))
    return made.step.trace(made.state, made.inputs)


def lowered(traced, *platforms) -> str:
    return traced.lower(lowering_platforms=platforms).as_text()


def products(text) -> set[str]:
    """Shapes of what a lowered program's matrix products return."""
    return set(re.findall(r"stablehlo\.dot_general.*-> tensor<([\dx]*)x\w+>", text))


def loops(text) -> int:
    return text.count("stablehlo.while")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16"], "bfloat16"))
@pytest.mark.parametrize("training", mostly_slow([False, True], True))
@pytest.mark.parametrize("model", mostly_slow(MODELS, "VideoMAE"))
def test_accelerators_get_their_own_tile(model, training, dtype):
    _, step, accelerators, cpus = MODELS[model]
    source = traced(model, step if training else "forward", dtype=dtype)
    for platform in ("tpu", "cuda"):
        text = lowered(source, platform)
        assert accelerators in products(text) and cpus not in products(text)
        assert loops(text) == 0
    # What distinguishes the two is there.
    text = lowered(source, "cpu")
    assert cpus in products(text) and accelerators not in products(text)
    assert loops(text) > 0


@pytest.mark.parametrize(
    ("model", "place"),
    mostly_slow(
        itertools.product(MODELS, ["tpu", "gpu"]), *zip(MODELS, ("tpu", "gpu", "tpu"), strict=True)
    ),
)
def test_as_an_accelerator_traces_it(model, place, monkeypatch):
    """`auto` and the projections ask where they are; float32, for which no GPU asks cuDNN.

    A TPU gets kernels, of which none of this length returns its scores.
    """
    for module in (linear, attention_module):
        monkeypatch.setattr(module, "platform", lambda: place)
    _, step, accelerators, cpus = MODELS[model]
    text = lowered(traced(model, step, attention="auto"), {"tpu": "tpu", "gpu": "cuda"}[place])
    assert (accelerators in products(text)) == (place == "gpu") and cpus not in products(text)
    assert ("tpu_custom_call" in text) == (place == "tpu")
    assert loops(text) == 0
    # Queries, keys and values by one product or by three.
    assert any(shape.endswith("x3x4x8") for shape in products(text)) == (place == "gpu")


@pytest.mark.parametrize("training", [False, True])
def test_one_program_for_all_platforms(training):
    """As `jax.export` would write; it carries both tiles and chooses where it runs."""
    _, step, accelerators, cpus = MODELS["VideoMAE"]
    source = traced("VideoMAE", step if training else "forward")
    assert {accelerators, cpus} <= products(lowered(source, "cpu", "cuda", "tpu"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_and_softmax_stay_in_float32_on_every_platform(dtype):
    x = jax.ShapeDtypeStruct((1, 700, 2, 64), dtype)
    loss = lambda q, k, v: placed_attention(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    source = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(x, x, x)
    for platform in ("cpu", "cuda", "tpu"):
        text = lowered(source, platform)
        exponentials = re.findall(r"stablehlo\.exponential.* : tensor<([\dx]*)x(\w+)>", text)
        assert {name for _, name in exponentials} == {"f32"}
        # On CPU bfloat16 has keys in rows in the backward pass.
        on_cpu = ["350x700", "350x700" if dtype == jnp.float32 else "700x350"]
        expected = on_cpu if platform == "cpu" else ["2x700x700"] * 2
        assert sorted(shape for shape, _ in exponentials) == expected
