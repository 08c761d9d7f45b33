# SPDX-License-Identifier: Apache-2.0
"""The optimiser of a recipe: schedules, factors per parameter, freezing, and the moving average.

Parameters are named by their per-layer path, "backbone/layers_3/mlp_in/kernel", even if a scanned
model keeps all layers in one leaf. A rule is a regular expression that matches a whole path, with a
value; the first match counts. `vivit_jax.recipes.checks` checks the ranges of numbers.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from checkpoints_convert.problems import collapse
from vivit_jax import param_tree
from vivit_jax.errors import UserError, counted, quoted
from vivit_jax.recipes.recipe import OptimSettings, Rules

_MOST_STEPS = np.iinfo(np.int32).max  # a state counts them in int32
_EVERYTHING: Rules = ((".*", 1.0),)
# By name, not by rank: biases of queries, keys and values are [heads, kv], and a scan adds an axis
# to every parameter.
_DECAYED: Rules = (
    (r"(.*/)?kernel", 1.0),
    (r"(.*/)?(bias|scale(_\w+)?|cls|query|mask_token|pos_embed)", 0.0),
)
_BLOCK = re.compile(r"((?:backbone/)?(?:spatial/|temporal/)?)layers_(\d+)/.*")
_TOKENS = r"(.*/)?(patch_embed/.*|cls|mask_token|pos_embed)"


def learning_rate(
    settings: OptimSettings, *, batch_size: int, steps_per_epoch: int, epochs: int
) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0; float32 inside and outside jit.

    `batch_size` counts the videos of a step, not their repeats: with `lr_batch` both `lr` and
    `min_lr` are scaled by batch_size / lr_batch. Of `epochs * steps_per_epoch` steps the first
    w = int(warmup_epochs * steps_per_epoch) warm up; n follow, counted by i from 0:

    * "videomae": lr k / (w - 1) for k < w, so that the warm-up's last step already has lr,
      then min_lr + (lr - min_lr) (1 + cos(pi i / n)) / 2;
    * "scenic": lr k / w for k < w, then lr (1 + cos(pi i / n)) / 2; there is no floor;
    * "constant": lr k / w for k < w, then lr.

    After the last step it stays constant. Raises UserError if no step is left to decay, and for
    more steps than a state counts.
    Sources: the authors' VideoMAE and scenic's ViViT trainers.
    """
    if settings.schedule not in ("videomae", "scenic", "constant"):
        raise UserError(
            f"optim.schedule is {settings.schedule!r}, expected 'videomae', 'scenic' or 'constant'"
        )
    total, warm = epochs * steps_per_epoch, int(settings.warmup_epochs * steps_per_epoch)
    left = total - warm
    if total < 1 or (left < 1 and settings.schedule != "constant"):
        raise UserError(
            f"optim.warmup_epochs={settings.warmup_epochs:g} is {counted(warm, 'step')} and "
            f"train.epochs={epochs} of {counted(steps_per_epoch, 'step')} is {total}; the "
            f"{settings.schedule!r} schedule needs steps after its warm-up: lower "
            "optim.warmup_epochs or raise train.epochs"
        )
    if total > _MOST_STEPS:
        raise UserError(
            f"train.epochs={epochs} of {counted(steps_per_epoch, 'step')} is {quoted(total)}, and "
            f"a run has at most {_MOST_STEPS} steps: lower train.epochs"
        )
    grown = batch_size / settings.lr_batch if settings.lr_batch else 1.0
    lr, floor = settings.lr * grown, settings.min_lr * grown
    if settings.schedule != "videomae":
        floor = 0.0
    # np.linspace over one step is its start, and so are the authors' warm-ups.
    last = max(warm - 1, 1) if settings.schedule == "videomae" else max(warm, 1)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        rest = jnp.clip((total - step) / max(left, 1), 0, 1)
        # (1 + cos(pi i / n)) / 2, which would round to nothing near the end of a long run.
        shape = 1.0 if settings.schedule == "constant" else jnp.sin(jnp.pi / 2 * rest) ** 2
        return jnp.where(step < warm, lr * step / last, floor + (lr - floor) * shape)

    return schedule


def parameter_values(
    params_or_shapes: Mapping[str, Any], rules: Rules, what: str, defaults: Rules = ()
) -> dict[str, Any]:
    """The value of the first rule that matches each parameter, as a tree like the params.

    A leaf is a float, or a float64 array [layers, 1, ...] of the leaf's rank if the layers of a
    scanned leaf differ. `defaults` follow `rules` and, unlike those, need not match anything.
    Raises UserError, naming `what`, for an invalid expression, for a rule that matches no parameter
    and for parameters that no rule matches.
    """
    shapes = param_tree.shapes_of(param_tree.flatten(meta.unbox(params_or_shapes)))
    slots = param_tree.slots(shapes)
    compiled = [(_compiled(rule, what), float(value)) for rule, value in (*rules, *defaults)]
    unmatched = [
        rule.pattern
        for rule, _ in compiled[: len(rules)]
        if not any(rule.fullmatch(path) for path in slots)
    ]
    if unmatched:
        raise UserError(
            f"{what}: no parameter matches {', '.join(map(repr, unmatched))}; an expression must "
            f"match the whole of a path such as {', '.join(map(repr, _examples(slots)))}"
        )
    found: dict[str, list[float]] = {}
    uncovered = []
    for path, slot in slots.items():
        values = [value for rule, value in compiled if rule.fullmatch(path)]
        if values:
            found.setdefault(slot.leaf, []).append(values[0])
        else:
            uncovered.append(path)
    if uncovered:
        raise UserError(
            f"{what}: no rule matches {', '.join(collapse(uncovered))}; add rules for them, or a "
            "last one for '.*'"
        )
    return param_tree.unflatten({leaf: _stacked(found[leaf], shapes[leaf]) for leaf in shapes})


def layer_decay_rules(params_or_shapes: Mapping[str, Any], decay: float) -> Rules:
    """Factors of the learning rate that shrink towards the input, decay ** (L + 1 - id).

    L is the number of blocks. As in the authors' VideoMAE the id is 0 for the patch embedding, the
    class and mask tokens and the positions, k + 1 for block k, and L + 1 for everything else:
    norms outside blocks, head and decoder.

    The authors have no factorised encoder. In ours the temporal blocks follow the spatial ones, so
    that block j has id L_spatial + j + 1; the spatial stage's last norm and the temporal stage's
    class token and positions go with the last spatial block. Raises UserError for parameters
    without blocks.
    """
    paths = param_tree.slots(param_tree.shapes_of(param_tree.flatten(meta.unbox(params_or_shapes))))
    blocks: dict[str, set[int]] = {}
    for match in filter(None, map(_BLOCK.fullmatch, paths)):
        blocks.setdefault(match[1], set()).add(int(match[2]))
    if not blocks:
        raise UserError(
            "optim.layer_decay needs the blocks of an encoder, paths such as "
            f"'backbone/layers_0/...', got {', '.join(map(repr, _examples(paths)))}; use lr_rules"
        )
    top = sum(map(len, blocks.values())) + 1

    def factor(number: int) -> float:
        return decay ** (top - number)

    rules, below = [], 0
    for stage in sorted(blocks):  # "spatial" before "temporal"
        if stage.endswith("temporal/"):
            top_of_spatial = stage.removesuffix("temporal/") + "spatial/ln_final/.*"
            between = f"{stage}(cls|pos_embed)|{top_of_spatial}"
            rules.append((between, factor(below)))
        rules += [(f"{stage}layers_{k}/.*", factor(below + k + 1)) for k in sorted(blocks[stage])]
        below += len(blocks[stage])
    return (*rules, (_TOKENS, factor(0)), *_EVERYTHING)


def lr_factors(settings: OptimSettings, params_or_shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Factors of the learning rate: `lr_rules`, then those of `layer_decay`, then 1."""
    defaults = _EVERYTHING
    if settings.layer_decay is not None:
        defaults = layer_decay_rules(params_or_shapes, settings.layer_decay)
    return parameter_values(params_or_shapes, settings.lr_rules, "optim.lr_rules", defaults)


def decay_factors(settings: OptimSettings, params_or_shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Factors of the weight decay: `decay_rules`, then 1 for kernels and 0 for everything else.

    Everything else: biases, scales of norms, branches and cosine attention, tokens and positions.
    """
    return parameter_values(params_or_shapes, settings.decay_rules, "optim.decay_rules", _DECAYED)


def trained(settings: OptimSettings, params_or_shapes: Mapping[str, Any]) -> dict[str, Any]:
    """1 for trained parameters and 0 for those that `freeze` names, as by `parameter_values`."""
    rules = tuple((pattern, 0.0) for pattern in settings.freeze)
    return parameter_values(params_or_shapes, rules, "optim.freeze", _EVERYTHING)


def make_optimizer(
    settings: OptimSettings, params_or_shapes: Mapping[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD with momentum; `schedule` is that of `learning_rate`.

    Gradients are clipped by the global norm of the trained parameters; then comes Adam, or momentum
    (no Nesterov, no dampening); then weight decay, decoupled for both. A parameter's factor scales
    the whole step, decay included. Step k, by the optimiser's own count, uses schedule(k). The
    state has trees like the params, without frozen parameters; a scanned leaf that is frozen in
    part is there with all layers, of which the frozen ones neither move nor count in the norm.
    `update` takes the gradients' norm as `norm` if it is known, with frozen gradients as zeros.
    Raises UserError for settings that do not fit.
    """
    learning = trained(settings, params_or_shapes)
    labels = jax.tree.map(lambda value: "train" if np.any(value) else "freeze", learning)
    if "train" not in jax.tree.leaves(labels):
        raise UserError(f"optim.freeze={settings.freeze!r} leaves no parameter to train")

    def of_trained(tree):
        """The tree without frozen leaves, as `optax.partition` passes it to its parts."""
        return jax.tree.map(lambda x, at: x if at == "train" else optax.MaskedNode(), tree, labels)

    lr = jax.tree.map(np.multiply, lr_factors(settings, params_or_shapes), learning)
    decay = decay_factors(settings, params_or_shapes)
    parts = [_scaled(of_trained(learning))]
    if settings.clip is not None:
        parts.append(_clipped(settings.clip))
    if settings.algorithm == "adamw":
        parts.append(optax.scale_by_adam(settings.b1, settings.b2, settings.eps))
    elif settings.algorithm == "sgd":
        parts.append(optax.trace(settings.momentum))
    else:
        raise UserError(f"optim.algorithm is {settings.algorithm!r}, expected 'adamw' or 'sgd'")
    parts += [
        _decayed(settings.weight_decay, of_trained(decay)),
        _scaled(of_trained(lr)),
        optax.scale_by_learning_rate(schedule),
    ]
    whole = optax.partition({"train": optax.chain(*parts), "freeze": optax.set_to_zero()}, labels)

    in_part = any(np.ndim(value) for value in jax.tree.leaves(learning))

    def update(updates, state, params=None, *, norm=None, **_):
        # optax's Adam raises under jax_numpy_dtype_promotion="strict".
        with jax.numpy_dtype_promotion("standard"):
            return whole.update(updates, state, params, norm=None if in_part else norm)

    return optax.GradientTransformationExtraArgs(whole.init, update)


def update_average(average: Any, params: Any, decay: float) -> Any:
    """The exponential moving average after a step: decay * average + (1 - decay) * params."""
    return optax.incremental_update(params, average, 1 - decay)


def _scaled(factors) -> optax.GradientTransformation:
    """Updates times factors; a factor of 1 leaves them untouched."""

    def scale(update, factor):
        return update if np.all(factor == 1) else update * _like(factor, update)

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, factors))


def _clipped(most: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` with a norm that may be known already."""

    def update(updates, state, params=None, *, norm=None, **_):
        del params
        norm = optax.tree.norm(updates) if norm is None else norm

        def clip(update):
            of_type = norm.astype(update.dtype)
            return jnp.where(norm < most, update, update / of_type * most)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _decayed(rate: float, factors) -> optax.GradientTransformation:
    """Updates plus rate * factor * parameter: `optax.add_decayed_weights` with factors."""

    def add(update, param, factor):
        return update + _like(rate * factor, param) * param if np.any(factor) and rate else update

    return optax.stateless(lambda updates, params: jax.tree.map(add, updates, params, factors))


def _like(factor, x):
    return jnp.asarray(factor, x.dtype)


def _stacked(values: list[float], shape: tuple[int, ...]):
    """One float if all are equal, else a row for each layer of a leaf with that shape."""
    if len(set(values)) == 1:
        return values[0]
    return np.asarray(values).reshape(-1, *(1,) * (len(shape) - 1))


def _compiled(pattern: str, what: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{what}: {pattern!r} is not a regular expression: {error}") from None


def _examples(paths) -> list[str]:
    """Up to three of the paths: the first, the middle one and the last."""
    paths = sorted(paths)
    return list(dict.fromkeys(paths[i] for i in (0, len(paths) // 2, -1)))
