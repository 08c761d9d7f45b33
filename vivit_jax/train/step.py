# SPDX-License-Identifier: Apache-2.0
"""The training step: one function for a device and for a mesh, with or without accumulation."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import UserError, counted
from vivit_jax.layers.explicit_axes import without_types
from vivit_jax.layers.linear import projections_in
from vivit_jax.layers.platform import platform
from vivit_jax.layers.tubelets import ByteClips
from vivit_jax.masking import MASKS, Grid, Mask
from vivit_jax.models.losses import multi_head_loss
from vivit_jax.outputs import RESULTS_ONLY
from vivit_jax.recipes.checks import mixing_of
from vivit_jax.recipes.recipe import MaskSettings, Recipe
from vivit_jax.recipes.refusals import Refusal
from vivit_jax.train.augment_on_device import mix, soft_targets, training_pixels
from vivit_jax.train.metrics import leading_accuracy
from vivit_jax.train.optim import trained, update_average
from vivit_jax.train.own import NOTHING, Own
from vivit_jax.train.sharding import BATCH, RULES, automatic, batch_shards, replicated
from vivit_jax.train.state import TrainState

_SMALL = 2**16  # elements: biases and norms, stacked over layers, are smaller; kernels larger
_LEAST_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def jit_step(
    step: Callable, *, pretraining: bool, devices: int = 1, out_shardings: Any = None
) -> jax.stages.Wrapped:
    """`jax.jit` of a training step, for the current platform.

    The first argument of `step` is the whole state; it is donated, so that the new state takes its
    place in memory.

    On a CPU XLA schedules for concurrency: operations without operands, such as the zeros in which
    a loop sums gradients, run first and stay in memory. That is costly where a decoder's loop
    precedes the encoder's: a pre-training step of VideoMAE-B on 2 clips takes 773 MiB of
    temporaries, against 519 MiB when XLA schedules for memory, which takes 4 % longer. Fine-tuning
    would save 3 % of its temporaries and take 7 % longer.

    Several CPU devices keep XLA's default: scheduled for memory they deadlock at collectives along
    different axes (pre-training on data=2,fsdp=2,tensor=2).
    """
    least = pretraining and devices == 1 and platform() == "cpu"
    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    options["compiler_options"] = _LEAST_MEMORY if least else None
    return jax.jit(step, donate_argnums=0, **options)


def gradient_step(
    optimizer: optax.GradientTransformation,
    loss_of: Callable[[Any], tuple[jax.Array, Any]],
    params: Any,
    optimizer_state: Any,
) -> tuple[Any, Any, jax.Array, Any]:
    """(new params, new optimizer state, loss, aux): one plain step, to be called inside `jit_step`.

    `loss_of` takes the params and returns (loss, aux).
    """
    (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, updates), optimizer_state, loss, aux


def gradient_norm(gradients: Any, *, together: bool = False) -> Float[Array, ""]:
    """The global norm of all leaves; `together` concatenates the small ones first.

    That is for one CPU device, where XLA compiles three kernels for the sum of each small leaf: 76
    of 531 in the demo's pre-training step. On a mesh it would move leaves that are sharded
    differently, and concatenating large leaves takes longer than summing them.
    """
    leaves = jax.tree.leaves(gradients)
    small = [x.ravel() for x in leaves if together and x.size <= _SMALL]
    if small:
        leaves = [x for x in leaves if x.size > _SMALL] + [jnp.concatenate(small)]
    return optax.tree.norm(leaves)


def draw_mask(settings: MaskSettings, key: jax.Array, batch: int, grid: Grid) -> Mask:
    """A mask for each clip."""
    dual = {"decoder_ratio": settings.decoder_ratio} if settings.kind == "dual" else {}
    return MASKS[settings.kind](key, batch, grid, settings.ratio, **dual)


def make_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    recipe: Recipe,
    processor: VideoProcessor,
    mesh: Mesh,
    shapes: TrainState,
    own: Own = NOTHING,
) -> "OnMesh":
    """The jitted step of a recipe: (state, batch) -> (new state, metrics: scalars by name).

    A batch holds "clips", uint8 [b, t, h, w, c], and for fine-tuning "labels", int [b] or
    [b, heads]; shapes with shardings will do to trace or lower the step. The old state is donated.
    `shapes` is `state_shapes` of the same model, optimiser and mesh. With a loss of `own` that has
    arrays, these are a third argument, `own.loss_arrays`. Explicit axes of the mesh, and
    arrays placed along them, are treated as automatic.

    Masks, dropout and augmentation are drawn for each clip from (seed, step, clip id), so that
    neither the mesh nor `train.accumulate` changes the result beyond rounding: the loss of an
    accumulated batch is the mean over all its clips, or over all its tokens for masks that leave
    tokens out of the loss. A step whose loss or gradients are not finite changes only the counts
    of steps. Raises UserError where the batch does not divide, and for colour augmentation of clips
    that are not RGB.
    """
    mesh = automatic(mesh)
    check_division(recipe, mesh.shape)
    _check_colours(recipe, model.config.num_channels)
    pretraining = recipe.task == "pretrain"
    if pretraining:  # an impossible mask is refused before a step is traced
        grid = model.config.grid
        jax.eval_shape(lambda: draw_mask(recipe.mask, jax.random.key(0), 1, grid))
    objective = (_reconstruct if pretraining else _classify)(model, recipe, processor, own)
    gradients_of = _accumulated(model, recipe, objective, mesh, shapes.params)
    update = _guarded_update(optimizer, recipe.optim.ema, mesh)

    def step(state: TrainState, batch: dict[str, jax.Array], arrays: Sequence[jax.Array] = ()):
        state, batch, arrays = without_types((state, batch, arrays))
        # This generator's numbers do not depend on how an array is split over devices.
        seed = jax.random.key(recipe.train.seed, impl="threefry2x32")
        (loss, aux), gradients = gradients_of(
            state.params, jax.random.fold_in(seed, state.step), batch, arrays
        )
        new, norm = update(state, loss, gradients)
        rate = schedule(state.step - state.skipped)
        return new, dict(aux, loss=loss, gradient_norm=norm, lr=rate, bad_steps=new.bad_steps)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    out = (shardings, replicated(mesh))
    with _platform_of(mesh):
        jitted = jit_step(
            step, pretraining=pretraining, devices=mesh.devices.size, out_shardings=out
        )
    return OnMesh(jitted, mesh)


def _accumulated(
    model: nn.Module, recipe: Recipe, objective: Callable, mesh: Mesh, shapes: Any
) -> Callable:
    """(params, key, batch, arrays) -> ((loss, aux), gradients), over `train.accumulate` parts.

    `objective` is (params, key, part of the batch, arrays) -> (loss, aux), and `shapes` are those
    of the params.
    """
    pretraining, parts = recipe.task == "pretrain", recipe.train.accumulate
    clips = recipe.train.batch_size * recipe.data.repeats
    learns = trained(recipe.optim, shapes)
    shards, constraint = batch_shards(mesh.shape), NamedSharding(mesh, PartitionSpec(None, BATCH))

    def split(x):
        """[b, ...] -> [parts, b / parts, ...]; every device keeps its own clips."""
        x = x.reshape(shards, parts, -1, *x.shape[1:]).swapaxes(0, 1)
        x = x.reshape(parts, -1, *x.shape[3:])
        return jax.lax.with_sharding_constraint(x, constraint)

    def gradients_of(params, key, batch, arrays):
        whole: dict[str, Any] = dict(batch, clip_ids=jnp.arange(clips, dtype=jnp.int32))
        weights = jnp.full(parts, 1 / parts)
        if pretraining:
            drawn = jax.random.fold_in(key, 0)
            whole["mask"] = draw_mask(recipe.mask, drawn, clips, model.config.grid)

        def loss_of(params, part, weight):
            # Frozen parameters get no gradient, so that none is computed.
            params = jax.tree.map(
                lambda p, learn: p if np.any(learn) else jax.lax.stop_gradient(p), params, learns
            )
            loss, aux = objective(params, jax.random.fold_in(key, 1), part, arrays)
            return loss * weight, aux

        # Rounded here, what the layers multiply with is rounded once, and its gradients, which are
        # rounded too, are stacked at half the size.
        rounded = projections_in(params, model.config.dtype)

        def gradient(part, weight):
            """((loss, aux), gradients), these in the params' types."""
            out, gradients = jax.value_and_grad(loss_of, has_aux=True)(rounded, part, weight)
            return out, jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, params)

        if parts == 1:
            return gradient(whole, 1.0)
        divided = jax.tree.map(split, whole)
        if pretraining and divided["mask"].decoded is not None:
            counted = jax.vmap(lambda mask: mask.counted.sum())(divided["mask"])
            weights = counted / counted.sum()

        def add(total, part):
            (loss, aux), gradients = gradient(*part)
            both = (loss, jax.tree.map(lambda x: x / parts, aux)), gradients
            return jax.tree.map(jnp.add, total, both), None

        first = jax.tree.map(lambda x: x[0], (divided, weights))
        sums = jax.eval_shape(gradient, *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
        return jax.lax.scan(add, zeros, (divided, weights))[0]

    return gradients_of


def _guarded_update(
    optimizer: optax.GradientTransformation, ema: float | None, mesh: Mesh
) -> Callable:
    """(state, loss, gradients) -> (new state, norm); what is not finite changes counts alone."""
    update = optax.with_extra_args_support(optimizer).update
    on_one_cpu = mesh.devices.size == 1 and mesh.devices.flat[0].platform == "cpu"

    def guarded(state: TrainState, loss, gradients) -> tuple[TrainState, jax.Array]:
        norm = gradient_norm(gradients, together=on_one_cpu)
        fine = jnp.isfinite(loss) & jnp.isfinite(norm)

        def changed(gradients, params, optimizer_state, average):
            updates, optimizer_state = update(gradients, optimizer_state, params, norm=norm)
            params = optax.apply_updates(params, updates)
            if average is not None:
                assert ema is not None  # a state has an average where the recipe has this
                average = update_average(average, params, ema)
            return params, optimizer_state, average

        old = state.params, state.optimizer, state.average
        # XLA for CPU has no fusion of several results. Where `where` is around them it computes the
        # new moments for themselves and again for the params, from copies of the old ones; in a
        # branch the params are made of what was stored, everything in place.
        if on_one_cpu:
            found = jax.lax.cond(fine, changed, lambda _, *old: old, gradients, *old)
        else:
            found = jax.tree.map(
                lambda new, old: jnp.where(fine, new, old), changed(gradients, *old), old
            )
        params, optimizer_state, average = found
        new = TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            average=average,
            bad_steps=jnp.where(fine, 0, state.bad_steps + 1),
            skipped=state.skipped + (~fine).astype(state.skipped.dtype),
        )
        return new, norm

    return guarded


class OnMesh:
    """A jitted function, called with the mesh and our table of logical axes in scope.

    Explicit axes of the mesh are treated as automatic; the function does that for its arguments.
    """

    def __init__(self, function: Any, mesh: Mesh):  # what jax.jit returns
        self._function, self.mesh = function, automatic(mesh)

    def __call__(self, *args):
        with self.here():
            return self._function(*args)

    def trace(self, *args) -> jax.stages.Traced:
        """The function's own `trace`; the mesh's devices need not exist here."""
        with self.here(), _platform_of(self.mesh):
            return self._function.trace(*args)

    def lower(self, *args) -> jax.stages.Lowered:
        """The function's own `lower`; the mesh's devices need not exist here."""
        with self.here(), _platform_of(self.mesh):
            return self._function.lower(*args)

    @property
    def function(self) -> Callable:
        """The function that was jitted, for use inside another program traced `here`."""
        return self._function.__wrapped__

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Puts the mesh and the table in scope."""
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(RULES):
            yield


@contextlib.contextmanager
def _platform_of(mesh: Mesh) -> Iterator[None]:
    """Makes `platform()` that of the mesh, even if its devices do not exist here."""
    place = mesh.devices.flat[0].platform
    with contextlib.nullcontext() if place == platform() else jax.default_device(place):
        yield


def _reconstruct(model, recipe: Recipe, processor, own: Own) -> Callable:
    """Loss of masked pre-training: (params, key, part of a batch, arrays) -> (loss, {})."""
    pixels = training_pixels(processor, recipe.augment, own.pixels, own.takes_floats)

    def objective(params, key, part, arrays):
        augment, dropout = jax.random.split(key)
        clips = pixels(augment, part["clip_ids"], part["clips"])
        out = model.apply(
            {"params": params},
            clips,
            part["mask"],
            deterministic=False,
            clip_ids=part["clip_ids"],
            rngs={"dropout": dropout},
            **RESULTS_ONLY,
        )
        if (loss := own.loss_with(arrays)) is not None:
            batch = {"pixel_values": clips, "mask": part["mask"], "clip_ids": part["clip_ids"]}
            return loss(params, out, batch)
        return out.loss, {}

    return objective


def _classify(model, recipe: Recipe, processor, own: Own) -> Callable:
    """Soft cross entropy: (params, key, part, arrays) -> (loss, {"accuracy"} if unmixed)."""
    config, settings = model.config, recipe.augment
    pixels = training_pixels(processor, settings, own.pixels, own.takes_floats)
    splits = config.split_sizes

    def objective(params, key, part, arrays):
        augment, mixing, dropout = jax.random.split(key, 3)
        clip_ids, clips = part["clip_ids"], pixels(augment, part["clip_ids"], part["clips"])
        targets = soft_targets(
            part["labels"], config.num_labels, settings.smoothing, config.class_splits
        )
        if settings.mixes:
            assert not isinstance(clips, ByteClips)  # see training_pixels
            clips, targets = mix(mixing, clips, targets, settings, clip_ids)
        out = model.apply(
            {"params": params},
            clips,
            deterministic=False,
            clip_ids=clip_ids,
            rngs={"dropout": dropout},
            **RESULTS_ONLY,
        )
        aux = {}
        if not settings.mixes:
            aux["accuracy"] = leading_accuracy(config, out.logits, part["labels"])
        if (loss := own.loss_with(arrays)) is not None:
            batch = dict(pixel_values=clips, clip_ids=clip_ids, labels=part["labels"])
            value, metrics = loss(params, out, batch | {"targets": targets})
            return value, aux | metrics
        return multi_head_loss(out.logits, targets, splits), aux

    return objective


def check_division(recipe: Recipe, sizes: Mapping[str, int]) -> None:
    """Raises UserError if a mesh of these sizes does not divide the recipe's batch."""
    for refusal in undivided(recipe, sizes):
        raise UserError(refusal.text)


def undivided(recipe: Recipe, sizes: Mapping[str, int]) -> Iterator[Refusal]:
    """Why a mesh of these sizes does not divide the recipe's batch, and what it divides."""
    train, repeats = recipe.train, recipe.data.repeats
    shards, parts = batch_shards(sizes), train.accumulate
    clips = train.batch_size * repeats
    if clips % (shards * parts):
        unit = shards * parts // math.gcd(shards * parts, repeats)
        fewer = train.batch_size // unit * unit
        text = (
            f"train.batch_size {train.batch_size} x data.repeats {repeats} is "
            f"{counted(clips, 'clip')}, which {counted(shards, 'device')} in "
            f"{counted(parts, 'part')} (train.accumulate) cannot divide; use a multiple of "
            f"{shards * parts}"
        )
        yield Refusal(text, {"train.batch_size": fewer or unit})
        return
    augment, part = recipe.augment, clips // (shards * parts)
    group = augment.mix_group or clips
    # A group may span devices but not parts, since a part does not see the clips of another.
    if recipe.task == "finetune" and augment.mixes and parts > 1 and part % group:
        text = (
            f"augment.mix_group {group} does not divide the {part} clips of a part on a device; "
            "set augment.mix_group, or train.batch_size and train.accumulate"
        )
        yield Refusal(text, mixing_of(part, group))


def _check_colours(recipe: Recipe, channels: int) -> None:
    for name, off in (("colour", 0), ("rand_augment", None)):
        value = getattr(recipe.augment, name)
        if value != off and channels != 3:
            raise UserError(
                f"augment.{name} is {value}, which changes colours of RGB clips, and the model "
                f"takes {channels} channels: set augment.{name}={'none' if off is None else off}"
            )
