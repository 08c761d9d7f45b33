# SPDX-License-Identifier: Apache-2.0
"""transformers' outputs on seven tiny models, as literals: parity that needs no PyTorch.

Computed once with transformers 5.23.0 and 4.57.6, float32, eager attention; both gave the same
bits. Weights are drawn in sorted order of the published tensor names, so no file is needed.
"""

import jax
import numpy as np
import pytest

import vivit_jax
from checkpoints_convert.layouts.registry import published
from checkpoints_convert.rules import export_params, import_params
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params, build_model

TINY = dict(
    image_size=12,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    num_labels=5,
)
VIVIT = vivit_jax.VivitConfig(**TINY, num_frames=6, tubelet_size=(2, 4, 4))
VIDEOMAE = dict(
    **TINY,
    num_frames=4,
    patch_size=4,
    decoder_hidden_size=16,
    decoder_intermediate_size=24,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
)
MEAN = vivit_jax.VideoMAEConfig(**VIDEOMAE)
FIRST = vivit_jax.VideoMAEConfig(**VIDEOMAE, use_mean_pooling=False)
RAW = vivit_jax.VideoMAEConfig(**VIDEOMAE, use_mean_pooling=False, norm_pix_loss=False)
MASK = np.array(
    [
        [1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1, 1],
        [1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 1],
    ],
    bool,
)
# config, head, tensors, {output: (shape, first five values, sum of absolute values)}, loss,
# first three weights of the first layer, sum of the embeddings; None where none was recorded.
GOLDEN = {
    "vivit": (
        VIVIT,
        "none",
        40,
        {
            "last_hidden_state": (
                (2, 28, 32),
                [-0.080815, 2.478959, 1.359292, -1.359652, -0.529770],
                1548.98968,
            ),
            "pooler_output": (
                (2, 32),
                [0.956281, -0.758728, 0.718803, -0.541876, -0.835982],
                40.84240,
            ),
        },
        None,
        [0.048570, 0.023588, 0.044078],
        -76.94303,
    ),
    "vivit classifier": (
        VIVIT,
        "classification",
        40,
        {"logits": ((2, 5), [1.397926, 1.075348, 1.536912, -0.509411, 0.847247], 8.97467)},
        1.849217,
        None,
        118.48957,
    ),
    "videomae with final norm": (
        FIRST,
        "none",
        34,
        {
            "last_hidden_state": (
                (2, 18, 32),
                [0.165553, 0.533450, -0.104889, 0.688717, 0.549712],
                955.61913,
            )
        },
        None,
        None,
        602.01079,
    ),
    "videomae pre-training": (
        FIRST,
        "pretraining",
        70,
        {
            "logits": (
                (2, 14, 96),
                [0.090033, 0.828204, -0.773141, -0.932433, -0.924084],
                1941.45772,
            )
        },
        1.811654,
        [0.032363, 0.920184, 0.026012],
        129.45661,
    ),
    "videomae pre-training, raw pixels": (RAW, "pretraining", 70, {}, 1.221304, None, 129.45661),
    "videomae classifier": (
        MEAN,
        "classification",
        36,
        {"logits": ((2, 5), [0.672651, 1.379665, 0.145306, -0.532329, 0.233601], 6.13093)},
        1.681348,
        [0.120365, 0.036514, 0.038859],
        626.19254,
    ),
    "videomae classifier on token 0": (
        FIRST,
        "classification",
        36,
        {"logits": ((2, 5), [1.065270, 0.630514, 1.054966, -0.692882, -1.235964], 9.51980)},
        2.400856,
        None,
        557.86113,
    ),
}


def draw_weights(model, config, head):
    """The recorded recipe: one draw per tensor in sorted order, norm weights shifted to 1."""
    shapes = param_tree.shapes_of(param_tree.flatten(abstract_params(model)))
    pooler = head == "none" and config.model_type == "vivit"
    rules = published(config.model_type, head, pooler=pooler).rules(config)
    zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    rng, tensors = np.random.RandomState(0), {}
    for name, tensor in sorted(export_params(zeros, rules).items()):
        value = rng.standard_normal(tensor.shape) * 0.2
        shift = 1.0 if "norm" in name and name.endswith(".weight") else 0.0
        tensors[name] = (value + shift).astype(np.float32)
    return tensors, param_tree.unflatten(import_params(tensors, rules, shapes))


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case):
    config, head, count, outputs, loss, attention, embedding = GOLDEN[case]
    model = build_model(config, head)
    tensors, params = draw_weights(model, config, head)
    assert len(tensors) == count
    seed = 1 if config.model_type == "vivit" else 2
    pixels = np.random.RandomState(seed).standard_normal((2, config.num_frames, 3, 12, 12))
    pixels = pixels.astype(np.float32).transpose(0, 1, 3, 4, 2)
    inputs = {}
    if head == "pretraining":
        inputs["mask"] = vivit_jax.Mask.from_bool(MASK)
    elif head == "classification":
        inputs["labels"] = np.array([1, 3])
    apply = jax.jit(model.apply, static_argnames=("output_hidden_states", "output_attentions"))
    out = apply(
        {"params": params}, pixels, output_hidden_states=True, output_attentions=True, **inputs
    )
    for field, (shape, first, total) in outputs.items():
        value = np.asarray(getattr(out, field))
        assert value.shape == shape
        np.testing.assert_allclose(value.ravel()[:5], first, atol=3e-6)  # literals have 6 digits
        np.testing.assert_allclose(np.abs(value).sum(), total, rtol=2e-6)
    if loss is not None:
        np.testing.assert_allclose(out.loss, loss, atol=3e-6)
    if attention is not None:
        np.testing.assert_allclose(out.attentions[0, 0, 0, 0, :3], attention, atol=3e-6)
    total = np.asarray(out.hidden_states[0], np.float64).sum()
    np.testing.assert_allclose(total, embedding, atol=2e-4)
