# SPDX-License-Identifier: Apache-2.0
"""Initial parameters as the papers' code draws them; the models' own are HuggingFace's.

ViViT, from scenic: attention and MLP kernels are Glorot-uniform, MLP biases normal(1e-6), positions
normal(0.02); class tokens, the classifier and other biases are 0. The patch kernel is LeCun-normal
over the whole tubelet, scenic's default. scenic's public configurations name
"central_frame_initializer", which is not used here: it mistakes width for time and zeroes all
columns of the patch except one. No published run sees that, since all start from an image model
that overwrites the kernel. "average_frame_initializer" repeats one frame of the same distribution.

VideoMAE (and V2), masked pre-training: kernels are Glorot-uniform, those of queries, keys and
values as one kernel of three times the width; biases are 0; the mask token is normal(0.02),
truncated at one standard deviation. The projection into the decoder and the patch embedding with
its bias keep PyTorch's default, uniform up to 1 / sqrt(inputs). Fine-tuning from scratch: kernels
are normal(0.02), truncated by the authors at 100 standard deviations, biases 0, the classifier a
thousandth of that, the patch embedding as in pre-training.

normal(0.02) stands for `initializer_range` of the configuration, whose default is 0.02. Norms start
with scale 1 and bias 0.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vivit_jax import param_tree
from vivit_jax.config import VivitConfig
from vivit_jax.models.registry import head_of

# (generator, shape of one layer's parameter) -> float32
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
# Patterns of whole per-layer names; the first match counts.
Rules = tuple[tuple[str, Draw], ...]

_ATTENTION, _LAYER = r"(.*/)?attention(_time|_space)?", r"(.*/)?"


def papers_params(
    model: nn.Module,
    params: Mapping[str, Any],
    seed: int,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """The initial parameters of a model, drawn as its paper's code does.

    Each is drawn from (seed, per-layer name), so that a scanned and a looped model start alike.

    Args:
        model: a classifier, or a VideoMAE for pre-training.
        params: its parameters, or their shapes if all are drawn.
        seed: of the draw.
        only: per-layer names (`layers_3/mlp_in/kernel`) to draw; the others keep their values in
            `params`. None: all.

    Raises:
        ValueError: there is no rule for a name.
    """
    rules, flat = _rules(model), param_tree.flatten(params)
    chosen: dict[str, list[tuple[str, param_tree.Slot]]] = {}
    for name, slot in param_tree.slots(param_tree.shapes_of(flat)).items():
        if only is None or name in only:
            chosen.setdefault(slot.leaf, []).append((name, slot))
    for path, places in chosen.items():
        leaf, stacked = flat[path], places[0][1].layer is not None
        whole = not stacked or len(places) == leaf.shape[0]
        values = np.empty(leaf.shape, leaf.dtype) if whole else np.array(leaf)
        for name, slot in places:
            values[... if slot.layer is None else slot.layer] = _draw(rules, name, slot.shape, seed)
        flat[path] = jax.device_put(values, may_alias=True)
    return param_tree.unflatten(flat)


def _draw(rules: Rules, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    for pattern, draw in rules:
        if re.fullmatch(pattern, name):
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            return draw(np.random.default_rng((seed, number)), shape)
    raise ValueError(f"no initial values are known for {name} {shape}")


def _rules(model: nn.Module) -> Rules:
    config = model.config
    constants: Rules = (
        (rf"{_LAYER}(ln_\w+|fc_norm)/scale", _constant(1.0)),
        (rf"{_LAYER}(ln_\w+|fc_norm)/bias", _constant(0.0)),
        (rf"{_LAYER}scale_\w+", _constant(config.layer_scale_init)),
        (rf"{_ATTENTION}/scale", _constant(math.log(10))),
        (rf"{_ATTENTION}/\w+/bias", _constant(0.0)),
        (r"attentive/(query|(key|value)/kernel)", _normal(config.initializer_range)),
    )
    if config.initial_values == "scenic":
        return constants + _scenic(config)
    values = math.prod(config.tubelet) * config.num_channels
    torch_default: Rules = (
        (rf"{_LAYER}patch_embed/(kernel|bias)", _uniform(values**-0.5)),
        (rf"{_LAYER}(mlp_in|mlp_out|head)/bias", _constant(0.0)),
    )
    if head_of(model) == "pretraining":
        return constants + torch_default + _pretraining(config.initializer_range)
    return constants + torch_default + _fine_tuning(config.initializer_range)


def _scenic(config: VivitConfig) -> Rules:
    # scenic zeroes all four projections, which no gradient ever changes; the model's own
    # initialisation zeroes the last one.
    zero: Rules = ((r".*/attention_time/out/kernel", _constant(0.0)),)
    return (
        *(zero if config.zero_init_temporal_attention else ()),
        (rf"{_ATTENTION}/\w+/kernel", _glorot()),
        (rf"{_LAYER}mlp_(in|out)/kernel", _glorot()),
        (rf"{_LAYER}mlp_(in|out)/bias", _normal(1e-6)),
        (rf"{_LAYER}pos_embed", _normal(config.initializer_range)),
        (rf"{_LAYER}cls", _constant(0.0)),
        (r"head/(kernel|bias)", _constant(0.0)),
        (rf"{_LAYER}patch_embed/kernel", _lecun),
        (rf"{_LAYER}patch_embed/bias", _constant(0.0)),
    )


def _pretraining(std: float) -> Rules:
    return (
        (rf"{_ATTENTION}/(query|key|value)/kernel", _glorot(3)),
        (rf"{_ATTENTION}/out/kernel", _glorot()),
        (rf"{_LAYER}mlp_(in|out)/kernel", _glorot()),
        (r"decoder/head/kernel", _glorot()),
        (r"to_decoder/kernel", lambda rng, shape: _uniform(shape[0] ** -0.5)(rng, shape)),
        (r"mask_token", _normal(std, cut=1)),
    )


def _fine_tuning(std: float) -> Rules:
    return (
        (r"head/kernel", _normal(std * 0.001)),
        (rf"{_LAYER}\w+/kernel", _normal(std)),
    )


def _constant(value: float | None) -> Draw:
    return lambda rng, shape: np.full(shape, value, np.float32)


def _normal(std: float, cut: float = math.inf) -> Draw:
    """Truncated at `cut` standard deviations, which narrows the distribution."""

    def draw(rng, shape):
        values = rng.standard_normal(shape, np.float32)
        while (beyond := np.abs(values) > cut).any():
            values[beyond] = rng.standard_normal(int(beyond.sum()), np.float32)
        return values * np.float32(std)

    return draw


def _uniform(bound: float) -> Draw:
    return lambda rng, shape: (2 * rng.random(shape, np.float32) - 1) * np.float32(bound)


def _glorot(times: int = 1) -> Draw:
    """Uniform up to sqrt(6 / (inputs + outputs)), for a kernel `times` as wide."""

    def draw(rng, shape):
        inputs, outputs = _fans(shape)
        return _uniform(math.sqrt(6 / (inputs + times * outputs)))(rng, shape)

    return draw


def _lecun(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal, truncated at two standard deviations, with variance 1 / inputs after that."""
    inputs, _ = _fans(shape)
    return _normal(inputs**-0.5 / 0.87962566103423978, cut=2)(rng, shape)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """The inputs and outputs of a kernel [..., d], or [d, n, e] into heads."""
    if len(shape) == 3 and shape[0] == shape[1] * shape[2]:
        return shape[0], shape[1] * shape[2]
    return math.prod(shape[:-1]), shape[-1]
