# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and float16 against float64: our error beside PyTorch's, outputs and gradients.

The reference is transformers on CPU with PyTorch's scaled_dot_product_attention, the more precise
of its two: in eager attention it rounds scores and softmax too. Both sides hold the same weights
and pixels, which half precision represents exactly, so that all error is of the arithmetic.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import bool_mask, clip, mostly_slow, to_torch, torch_model
from safetensors.numpy import load_file
from tiny import CASES

import vivit_jax
from checkpoints_convert.layouts.registry import detect
from checkpoints_convert.rules import import_params
from vivit_jax import param_tree
from vivit_jax.layers import linear

ALLOWED = 1.1  # times PyTorch's error
# Ours over PyTorch's on a 2-core x86 CPU, over 4 draws of weights and 2 batches of 8 clips, and of
# the middle size over 2 draws:
#                           logits: bfloat16, float16    gradients: bfloat16, float16
#   vivit cls                         0.85      0.83                  0.89      0.95
#   mae cls                           0.82      0.89                  0.93      0.92
#   mae pretraining                   0.84      0.82                  0.80      0.96
#   vivit cls, middle                 0.91      0.96                  0.87      0.89
#   mae cls, middle                   0.88      0.95                  0.82      0.87
#   mae pretraining, middle           0.85      0.86                  0.78      0.63
# and, where each operation is rounded, from 1.10 to 1.78.
MIDDLE = dict(
    image_size=64,
    num_frames=8,
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=3,
    intermediate_size=768,
    num_labels=20,
)
MIDDLE_DECODER = dict(
    decoder_hidden_size=96,
    decoder_intermediate_size=384,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=3,
)


def sizes_of(case, size):
    if size == "tiny":
        return {}
    if "vivit" in case:
        return MIDDLE | dict(tubelet_size=(2, 16, 16))
    return MIDDLE | MIDDLE_DECODER | dict(patch_size=16)


def relative_squares(ours, theirs, exact):
    """Mean squared errors of both sides over the exact values' mean square."""
    exact = np.asarray(exact, np.float64)
    errors = (np.asarray(side, np.float64) - exact for side in (ours, theirs))
    return np.array([np.mean(error**2) for error in errors]) / np.mean(exact**2)


def error_ratios(case, dtype, directory, size="tiny", draws=2, batches=2) -> dict[str, float]:
    """Our error over PyTorch's, root mean squares over weights, clips and tensors."""
    import torch

    half, squares = getattr(torch, dtype), {"logits": [], "gradients": []}
    for draw in range(draws):
        exact = torch_model(case, seed=draw, **sizes_of(case, size))
        with torch.no_grad():
            for p in exact.parameters():
                p.copy_(p.to(half))
        exact.save_pretrained(directory / f"{draw}")
        model, params = vivit_jax.from_pretrained(
            directory / f"{draw}", dtype=dtype, param_dtype=dtype
        )
        exact.set_attn_implementation("sdpa")
        exact, theirs = exact.double(), copy.deepcopy(exact).to(half)

        @jax.jit
        def ours_of(params, x, inputs, model=model):
            def loss(params):
                out = model.apply({"params": params}, x, **inputs)
                return out.loss, out.logits

            (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
            return logits, gradients

        for seed in range(batches):
            x = torch.from_numpy(clip(model.config, batch=8, seed=seed)).to(half).float().numpy()
            if "pretraining" in case:
                mask = bool_mask(model.config, batch=8, seed=seed)
                inputs = {"mask": vivit_jax.Mask.from_bool(mask)}
                torch_inputs = {"bool_masked_pos": torch.from_numpy(mask)}
            else:
                labels = np.random.default_rng(seed).integers(0, model.config.num_labels, 8)
                inputs, torch_inputs = {"labels": labels}, {"labels": torch.from_numpy(labels)}
            logits, gradients = ours_of(params, jnp.asarray(x), inputs)
            assert logits.dtype == dtype
            gradients, sides = param_tree.flatten(gradients), []
            for reference in (theirs, exact):
                reference.zero_grad()
                out = reference(to_torch(x).to(reference.dtype), **torch_inputs)
                out.loss.backward()
                path = directory / f"{draw} {seed} {len(sides)}"
                found = named_gradients(exact, reference, path, model.config, gradients)
                sides.append((out.logits.detach().double().numpy(), found))
            (their_logits, their_gradients), (exact_logits, exact_gradients) = sides
            squares["logits"].append(relative_squares(logits, their_logits, exact_logits))
            for name, value in exact_gradients.items():
                if np.abs(value).max() > 1e-12:  # a key's bias changes nothing: all is rounding
                    squares["gradients"].append(
                        relative_squares(gradients[name], their_gradients[name], value)
                    )
    ratios = {name: np.sqrt(np.divide(*np.sum(found, 0))) for name, found in squares.items()}
    print(f"\n{case} {dtype} {size}:", *(f"{name} {x:.2f}" for name, x in ratios.items()))
    return ratios


def named_gradients(exact, reference, path, config, ours):
    """PyTorch's gradients under our names: they take the way of weights through a file."""
    import torch

    twin = copy.deepcopy(exact)
    with torch.no_grad():
        for p, q in zip(twin.parameters(), reference.parameters(), strict=True):
            p.copy_(torch.zeros_like(p) if q.grad is None else q.grad)
    twin.save_pretrained(path)
    source = load_file(path / "model.safetensors")
    rules = detect(source, config).rules(config)
    return import_params(source, rules, param_tree.shapes_of(ours), "float64")


PAIRS = [
    (case, dtype)
    for case in ("vivit cls", "mae cls", "mae pretraining")
    for dtype in ("bfloat16", "float16")
]
assert {case for case, _ in PAIRS} <= CASES.keys()


@pytest.mark.parametrize(("case", "dtype"), mostly_slow(PAIRS, ("mae cls", "bfloat16")))
def test_error_is_pytorchs_at_most(case, dtype, tmp_path):
    few = (case, dtype) == ("mae cls", "bfloat16")  # which runs always
    for name, ratio in error_ratios(case, dtype, tmp_path, draws=2 if few else 4).items():
        assert ratio <= ALLOWED, f"error of {name} is {ratio:.2f} times PyTorch's"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_error_of_a_middle_size(case, dtype, tmp_path):
    for name, ratio in error_ratios(case, dtype, tmp_path, "middle").items():
        assert ratio <= ALLOWED, f"error of {name} is {ratio:.2f} times PyTorch's"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_error_as_a_gpu_computes(case, dtype, tmp_path, monkeypatch):
    """There products are rounded before their biases, see `linear.product`; PyTorch's after.

    Queries, keys and values are so rounded twice. Measured 0.95 to 1.09 at this size; of the tiny
    models' gradients up to 1.19.
    """
    monkeypatch.setattr(linear, "platform", lambda: "gpu")
    for name, ratio in error_ratios(case, dtype, tmp_path, "middle").items():
        assert ratio <= 1.15, f"error of {name} is {ratio:.2f} times PyTorch's"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_rounding_each_operation_is_seen(case, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "wide_type", lambda dtype: dtype)
    assert max(error_ratios(case, dtype, tmp_path, draws=4).values()) > ALLOWED
