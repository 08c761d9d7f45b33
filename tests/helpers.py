# SPDX-License-Identifier: Apache-2.0
"""PyTorch references with large weights, inputs, and comparisons."""

import functools

import jax
import numpy as np
import pytest
from tiny import CASES, config_of

from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params


def mostly_slow(cases, *quick):
    """For `parametrize`: the cases in `quick` run always, the others with -m slow."""
    cases = list(cases)
    assert all(case in cases for case in quick), quick
    values = lambda case: case if isinstance(case, tuple) else (case,)  # noqa: E731
    slow = lambda case: pytest.param(*values(case), marks=pytest.mark.slow)  # noqa: E731
    return [case if case in quick else slow(case) for case in cases]


# Largest absolute difference allowed, after scaling by the reference's RMS where that exceeds 1.
# Largest of tests/parity/test_models.py::test_outputs on a 2-core x86 CPU beside each:
TOLERANCE = {
    "hidden_states": 2e-5,  # measured 9.1e-6
    "attentions": 2e-5,  # measured 4.9e-6
    "last_hidden_state": 2e-5,  # measured 6.4e-6
    "pooler_output": 2e-5,  # measured 3.5e-6
    "logits": 2e-5,  # measured 4.1e-6
    "loss": 2e-5,  # measured 5.1e-7
    "gradient": 2e-5,
    "full size": 1e-4,  # measured 5.1e-6
}


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("output_hidden_states", "output_attentions", "interpolate_pos_encoding"),
)
def forward(model, params, pixel_values, **inputs):
    """A model's outputs, compiled once for all tests of equal models and options."""
    return model.apply({"params": params}, pixel_values, **inputs)


def random_params(model, scale: float = 0.3, seed: int = 0):
    """Plain parameters drawn from a normal distribution, in the model's running layout.

    Much faster than compiling `model.init`, and nothing is at 0 or 1.
    """
    rng = np.random.default_rng(seed)
    flat = param_tree.flatten(abstract_params(model))
    return param_tree.unflatten(
        {k: (rng.standard_normal(v.shape) * scale).astype(np.float32) for k, v in flat.items()}
    )


def clip(config, batch: int = 2, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    shape = (batch, config.num_frames, *config.frame_size, config.num_channels)
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def bool_mask(config, batch: int = 2, ratio: float = 0.7, seed: int = 0) -> np.ndarray:
    """Random masks that differ between rows and between times, equal counts per row."""
    rng, tokens = np.random.default_rng(seed), config.num_tokens
    rows = [rng.permutation(tokens) < int(ratio * tokens) for _ in range(batch)]
    return np.stack(rows)


def torch_model(case: str, seed: int = 0, **changes):
    """transformers' model of a case in eager attention, weights large, nothing at 0 or 1.

    Its default initialisation (std 0.02, biases 0) moves tiny models' logits by 1e-6 for a wrong
    GELU; this one by 1e-4.
    """
    import torch
    import transformers

    config = config_of(case, **changes).to_dict()
    family = getattr(transformers, "VivitConfig" if "vivit" in case else "VideoMAEConfig")
    hf_config = family(**config, attn_implementation="eager")
    model = getattr(transformers, CASES[case][1])(hf_config).eval()
    randomise(model, seed)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return model


def randomise(model, seed: int = 0) -> None:
    """Kernels at about the scale of trained ones times three, vectors around 0.3."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.3
            torch.nn.init.normal_(p, mean, 0.3, generator=generator)
        else:
            fan_in = p[0].numel() if p.ndim == 5 else p.shape[-1]
            torch.nn.init.normal_(p, 0.0, min(0.5, 2.0 * fan_in**-0.5), generator=generator)


def to_torch(pixel_values: np.ndarray):
    """[b, t, h, w, c] -> PyTorch's [b, t, c, h, w]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixel_values.transpose(0, 1, 4, 2, 3)))


def error(ours, reference) -> float:
    """Largest absolute difference, scaled by the reference's RMS where that exceeds 1."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    assert np.isfinite(ours).all() and np.isfinite(reference).all()
    return float(np.abs(ours - reference).max() / max(1.0, np.sqrt(np.mean(reference**2))))


def assert_close(ours, reference, what: str, tolerance: str | None = None) -> float:
    measured, allowed = error(ours, reference), TOLERANCE[tolerance or what]
    assert measured <= allowed, f"{what}: measured {measured:.1e}, allowed {allowed:.0e}"
    return measured
