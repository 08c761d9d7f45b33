# SPDX-License-Identifier: Apache-2.0
"""What is measured: a model, a kind of work, and a number of clips."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vivit_jax.config import Config
from vivit_jax.errors import UserError, closest
from vivit_jax.masking import Mask, dual_mask, tube_mask
from vivit_jax.models.build import abstract_params, build_model
from vivit_jax.models.flops import forward_flops, step_flops
from vivit_jax.presets import PRESETS, Preset
from vivit_jax.train.step import gradient_step, jit_step

KINDS = ("forward", "finetune", "pretrain")
MASK_RATIO = 0.9
# Of AdamW, on every side.
OPTIMIZER = dict(learning_rate=1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)


@dataclasses.dataclass(frozen=True)
class Work:
    """A "forward" pass, or a whole "finetune" or "pretrain" step, on `batch` clips.

    A step is loss, gradients and AdamW's update, in the config's dtype with params in
    `param_dtype`. A forward pass and a fine-tuning step have the classifier; pre-training hides
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
        """A mask for each clip; None unless the work is pre-training."""
        if self.kind != "pretrain":
            return None
        draw = dual_mask if self.dual_masks else tube_mask
        return draw(np.random.default_rng(seed), self.batch, self.config.grid, MASK_RATIO)

    def flops(self) -> int:
        """Operations of the model's matrix products for the batch, without recomputation."""
        mask = self.mask()
        visible, decoded = None, None
        if mask is not None:
            visible, decoded = mask.visible.shape[1], mask.predicted.shape[1]
        count = forward_flops if self.kind == "forward" else step_flops
        return self.batch * count(self.config, self.head, visible=visible, decoded=decoded)


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
    """The work on a preset's model, without dropout and the like.

    `frames` is the clip's length, by default the preset's own. Params have `dtype` too in a forward
    pass and stay float32 in a step. Raises UserError for an unknown preset.
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
    """Whether a preset's model is pre-trained by masking. Raises UserError if it is unknown."""
    return _preset(preset).config.has_pretraining


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}{closest(name, PRESETS, short=True)}")
    return PRESETS[name]


@dataclasses.dataclass(frozen=True)
class Program:
    """A work as a jitted `step`, with `state` and `inputs` as trees of shapes for it.

    Forward: `step(params, inputs)` -> logits. Training: `step((params, optimizer state), inputs)`
    -> ((params, optimizer state), loss), with the state donated. `inputs` holds pixel_values and
    labels or mask.
    """

    work: Work
    model: nn.Module
    step: jax.stages.Wrapped
    state: Any
    inputs: dict[str, Any]


def program(work: Work) -> Program:
    """The work's program; nothing is computed or allocated yet."""
    config = work.config
    model = build_model(config, work.head)
    params = abstract_params(model)
    clip = (work.batch, config.num_frames, *config.frame_size, config.num_channels)
    inputs: dict[str, Any] = {"pixel_values": jax.ShapeDtypeStruct(clip, jnp.float32)}
    if work.kind == "finetune":
        inputs["labels"] = jax.ShapeDtypeStruct((work.batch,), jnp.int32)
    if work.kind == "pretrain":
        inputs["mask"] = jax.eval_shape(lambda: work.mask())

    def output(params: Any, inputs: dict[str, Any]) -> Any:
        return model.apply({"params": params}, **inputs)

    if work.kind == "forward":
        forward = jax.jit(lambda params, inputs: output(params, inputs).logits)
        return Program(work, model, forward, params, inputs)
    optimizer = _optimizer()

    def step(state: Any, inputs: dict[str, Any]) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, None]:
            return output(params, inputs).loss, None

        params, optimizer_state, loss, _ = gradient_step(optimizer, loss_of, *state)
        return (params, optimizer_state), loss

    state = params, jax.eval_shape(optimizer.init, params)
    jitted: Any = jit_step(step, pretraining=work.kind == "pretrain")
    return Program(work, model, jitted, state, inputs)


def inputs_of(work: Work, seed: int = 0) -> dict[str, Any]:
    """Clips of noise, and labels or masks, as numpy arrays."""
    rng = np.random.default_rng(seed)
    config = work.config
    clip = (work.batch, config.num_frames, *config.frame_size, config.num_channels)
    inputs: dict[str, Any] = {"pixel_values": rng.standard_normal(clip, dtype=np.float32)}
    if work.kind == "finetune":
        inputs["labels"] = rng.integers(0, config.num_labels, work.batch).astype(np.int32)
    if work.kind == "pretrain":
        inputs["mask"] = work.mask(seed)
    return inputs


def initial_state(program: Program, params: Any) -> Any:
    """The first argument of the program's step; `params` survive, although training donates."""
    if program.work.kind == "forward":
        return params
    params = jax.tree.map(jnp.copy, params)
    return params, _optimizer().init(params)


def _optimizer() -> optax.GradientTransformation:
    settings = OPTIMIZER
    return optax.adamw(
        settings["learning_rate"],
        settings["b1"],
        settings["b2"],
        settings["eps"],
        weight_decay=settings["weight_decay"],
    )
