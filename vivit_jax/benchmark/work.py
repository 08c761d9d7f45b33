# SPDX-License-Identifier: Apache-2.0
"""What is measured: a model, what is done with it, and on how many clips."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.masking import Mask, dual_mask, tube_mask
from vivit_jax.models.build import abstract_params, build_model
from vivit_jax.models.flops import forward_flops, step_flops
from vivit_jax.presets import PRESETS, Preset
from vivit_jax.train.step import gradient_step, jit_step

KINDS = ("forward", "finetune", "pretrain")
MASK_RATIO = 0.9
# Of AdamW, the same on every side that is measured.
OPTIMIZER = dict(learning_rate=1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)


@dataclasses.dataclass(frozen=True)
class Work:
    """`batch` clips through a model: "forward", or a whole "finetune" or "pretrain" step.

    A step is loss, gradients and AdamW's update, in the config's dtype with params in
    `param_dtype`. A forward pass and a fine-tuning step have the classifier, pre-training hides
    nine tenths of every clip in tubes.
    """

    name: str
    config: Config
    kind: str = "forward"
    batch: int = 1
    dual_masks: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"work must be one of {list(KINDS)}, got {self.kind!r}")
        if self.batch < 1:
            raise UserError(f"batch must be at least 1, got {self.batch}")
        if self.kind == "pretrain" and not self.config.has_pretraining:
            raise UserError(
                f"work 'pretrain' needs a VideoMAE, got {self.name}, a {self.config.title}, which "
                "has no masked pre-training; use 'forward' or 'finetune'"
            )

    @property
    def head(self) -> str:
        """The head that the work needs."""
        return "pretraining" if self.kind == "pretrain" else "classification"

    def mask(self, seed: int = 0) -> Mask | None:
        """One mask for each clip, None unless the work is pre-training."""
        if self.kind != "pretrain":
            return None
        draw = dual_mask if self.dual_masks else tube_mask
        return draw(np.random.default_rng(seed), self.batch, self.config.grid, MASK_RATIO)

    def flops(self) -> int:
        """Operations of the matrix products of the model for the whole batch, none twice."""
        mask = self.mask()
        tokens = {}
        if mask is not None:
            tokens = dict(visible=mask.visible.shape[1], decoded=mask.predicted.shape[1])
        count = forward_flops if self.kind == "forward" else step_flops
        return self.batch * count(self.config, self.head, **tokens)


def work_of(
    preset: str,
    kind: str = "forward",
    batch: int = 1,
    *,
    frames: int | None = None,
    dtype: str = "float32",
    attention: str = "auto",
    remat: str = "dots",
) -> Work:
    """The work on a preset's model, with the execution asked for and nothing random in it.

    `frames` is the clip's length, the preset's own by default. In a forward pass params have
    `dtype` too, in a step they stay float32. Raises UserError for an unknown preset.
    """
    found = _preset(preset)
    config = found.config
    still = {name: 0.0 for name in config.probabilities}
    config = dataclasses.replace(
        config,
        **still,
        num_frames=config.num_frames if frames is None else frames,
        dtype=dtype,
        param_dtype=dtype if kind == "forward" else "float32",
        attention=attention,
        remat=remat,
    )
    return Work(preset, config, kind, batch, found.dual_masks)


def has_pretraining(preset: str) -> bool:
    """Whether a preset's model is pre-trained by masking; UserError for an unknown preset."""
    return _preset(preset).config.has_pretraining


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"unknown model {name!r}; `vivit-jax presets` lists them")
    return PRESETS[name]


@dataclasses.dataclass(frozen=True)
class Program:
    """A work as functions: `step` is jitted, `state` and `inputs` are trees of shapes for it.

    Forward: `step(params, inputs)` -> logits. Training: `step((params, optimizer state), inputs)`
    -> ((params, optimizer state), loss), with the state donated. `inputs` holds pixel_values and
    labels or mask.
    """

    work: Work
    model: nn.Module
    step: Callable[[Any, Any], Any]
    state: Any
    inputs: dict[str, Any]


def program(work: Work) -> Program:
    """The compiled form's source: nothing is computed or allocated yet."""
    config = work.config
    model = build_model(config, work.head)
    params = abstract_params(model)
    clip = (work.batch, config.num_frames, *config.frame_size, config.num_channels)
    inputs = {"pixel_values": jax.ShapeDtypeStruct(clip, jnp.float32)}
    if work.kind == "finetune":
        inputs["labels"] = jax.ShapeDtypeStruct((work.batch,), jnp.int32)
    if work.kind == "pretrain":
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32)  # noqa: E731
        inputs["mask"] = jax.tree.map(shape, work.mask())
    if work.kind == "forward":
        apply = jax.jit(lambda params, inputs: model.apply({"params": params}, **inputs).logits)
        return Program(work, model, apply, params, inputs)
    optimizer = _optimizer()

    def step(state, inputs):
        loss_of = lambda params: (model.apply({"params": params}, **inputs).loss, None)  # noqa: E731
        params, optimizer_state, loss, _ = gradient_step(optimizer, loss_of, *state)
        return (params, optimizer_state), loss

    state = params, jax.eval_shape(optimizer.init, params)
    return Program(work, model, jit_step(step, pretraining=work.kind == "pretrain"), state, inputs)


def inputs_of(work: Work, seed: int = 0) -> dict[str, Any]:
    """Noise as clips, and labels or masks, as numpy arrays."""
    rng = np.random.default_rng(seed)
    config = work.config
    clip = (work.batch, config.num_frames, *config.frame_size, config.num_channels)
    inputs = {"pixel_values": rng.standard_normal(clip, dtype=np.float32)}
    if work.kind == "finetune":
        inputs["labels"] = rng.integers(0, config.num_labels, work.batch).astype(np.int32)
    if work.kind == "pretrain":
        inputs["mask"] = work.mask(seed)
    return inputs


def initial_state(program: Program, params: Any) -> Any:
    """What the program's step takes first; `params` stay whole, although training donates."""
    if program.work.kind == "forward":
        return params
    params = jax.tree.map(jnp.copy, params)
    return params, _optimizer().init(params)


def _optimizer() -> optax.GradientTransformation:
    return optax.adamw(**OPTIMIZER)
