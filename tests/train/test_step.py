# SPDX-License-Identifier: Apache-2.0
"""One step function: whole or in parts, on one device or on a mesh, and never a step into NaN."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mostly_slow
from tiny import SMALL_VIDEOMAE
from tiny_recipes import CLASSES, FINETUNE, PRETRAIN, changed

import vivit_jax
from vivit_jax import param_tree
from vivit_jax.errors import UserError
from vivit_jax.models.build import abstract_params, fresh_params
from vivit_jax.train import step as step_module
from vivit_jax.train.optim import learning_rate, make_optimizer
from vivit_jax.train.sharding import (
    AXES,
    batch_sharding,
    bytes_on_a_device,
    make_mesh,
    mesh_text,
    parse_mesh,
)
from vivit_jax.train.start.initial_model import starting_model
from vivit_jax.train.state import new_state, state_shapes
from vivit_jax.train.step import make_step

PROCESSOR = vivit_jax.VideoProcessor.named("videomae-imagenet", size=16, crop_size=16)
STEPS = 4
DUAL = changed(
    PRETRAIN, mask__kind="dual", mask__ratio=0.5, model__config=SMALL_VIDEOMAE | {"patch_size": 4}
)

COLOURS_AND_SGD = changed(
    FINETUNE, augment__colour=0.5, optim__algorithm="sgd", optim__schedule="scenic"
)


def name(value):
    return f"{value.task}-{value.mask.kind}" if hasattr(value, "task") else str(value)


def batches(recipe, steps=STEPS, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = recipe.train.batch_size
        batch = {"clips": rng.integers(0, 256, (rows, 4, 16, 16, 3), np.uint8)}
        if recipe.task == "finetune":
            batch["labels"] = rng.integers(0, CLASSES, rows).astype(np.int32)
        yield batch


_BUILT = {}


def built(recipe, mesh):
    """The mesh, model, optimiser, the shapes of the state and the step, compiled once for all."""
    if (repr(recipe), mesh) in _BUILT:
        return _BUILT[repr(recipe), mesh]
    devices = mesh
    if isinstance(mesh, str):
        sizes = parse_mesh(mesh, int(np.prod([int(s.split("=")[1]) for s in mesh.split(",")])))
        devices = make_mesh(sizes)
    model = starting_model(recipe).model
    schedule = learning_rate(recipe.optim, batch_size=16, steps_per_epoch=2, epochs=4)
    optimizer = make_optimizer(recipe.optim, abstract_params(model), schedule)
    shapes = state_shapes(model, optimizer, devices, averaged=recipe.optim.ema is not None)
    step = make_step(model, optimizer, schedule, recipe, PROCESSOR, devices, shapes)
    return _BUILT.setdefault((repr(recipe), mesh), (devices, model, optimizer, shapes, step))


def run(recipe, mesh="data=1", steps=STEPS, change=lambda i, batch: batch):
    """(loss of each step, params and their average by path, the state)."""
    devices, model, optimizer, shapes, step = built(recipe, mesh)
    # Larger than initial values, with a classifier far from zero, so that the loss sees each layer.
    params = jax.tree.map(
        lambda x: 5 * x if x.ndim > 1 else x, fresh_params(model, recipe.train.seed)
    )
    averaged = recipe.optim.ema is not None

    def here(sharding):
        return jax.NamedSharding(devices, sharding.spec)

    place = jax.tree.map(lambda leaf: here(leaf.sharding), shapes)
    state = jax.device_put(new_state(params, optimizer, averaged=averaged), place)
    losses, of_clips = [], here(batch_sharding(devices))
    for i, batch in enumerate(batches(recipe, steps)):
        state, values = step(state, jax.device_put(change(i, batch), of_clips))
        losses.append(float(values["loss"]))
    flat = param_tree.flatten(
        jax.device_get({"params": state.params, "average": state.average or {}})
    )
    return losses, flat, state


def lowered(recipe, mesh):
    """The text of the step's program, before the compiler has it."""
    devices, *_, shapes, step = built(recipe, mesh)

    def here(leaf, spec):
        place = jax.NamedSharding(devices, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    state = jax.tree.map(lambda leaf: here(leaf, leaf.sharding.spec), shapes)
    of_clips = batch_sharding(devices).spec
    batch = {key: here(value, of_clips) for key, value in next(batches(recipe)).items()}
    return step.lower(state, batch).as_text()


@pytest.fixture(scope="module")
def alone():
    """A run on one device, whole batches, of each recipe."""
    found = {}

    def get(recipe):
        if recipe.name + recipe.mask.kind not in found:
            found[recipe.name + recipe.mask.kind] = run(recipe)
        return found[recipe.name + recipe.mask.kind]

    return get


def assert_same(found, expected, tolerance=2e-4):
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
    for path, value in expected[1].items():
        np.testing.assert_allclose(
            found[1][path],
            value,
            rtol=tolerance,
            atol=tolerance * np.abs(value).max(),
            err_msg=path,
        )


@pytest.mark.parametrize(
    ("recipe", "mesh", "parts"),
    mostly_slow(
        [
            (DUAL, "data=1", 2),
            (FINETUNE, "data=2,fsdp=2,tensor=2", 2),
            (PRETRAIN, "data=2,fsdp=4", 1),
        ],
        (FINETUNE, "data=2,fsdp=2,tensor=2", 2),
    ),
    ids=name,
)
def test_parts_and_meshes_give_the_step_of_one_device(recipe, mesh, parts, alone):
    """With dropout, drop path, erasing, mixup and cutmix, and masks."""
    assert_same(run(changed(recipe, train__accumulate=parts), mesh), alone(recipe))


EXPLICIT = [(FINETUNE, (2, 1, 1)), (FINETUNE, (2, 2, 2)), (PRETRAIN, (2, 2, 2))]


@pytest.mark.parametrize(
    ("recipe", "sizes"), mostly_slow(EXPLICIT, (FINETUNE, (2, 2, 2))), ids=name
)
def test_explicit_axes_give_the_program_of_automatic_ones(recipe, sizes):
    """Explicit as `jax.make_mesh` makes them by default, set around and in the types of all."""
    mesh = jax.make_mesh(sizes, AXES)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    automatic = lowered(recipe, mesh_text(mesh.shape))
    with jax.set_mesh(mesh):
        assert lowered(recipe, mesh) == automatic


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "sizes"), EXPLICIT, ids=name)
def test_explicit_axes_give_the_step_of_one_device(recipe, sizes, alone):
    mesh = jax.make_mesh(sizes, AXES)
    with jax.set_mesh(mesh):
        assert_same(run(recipe, mesh), alone(recipe))


@pytest.mark.slow
def test_another_seed_gives_another_run(alone):
    """The comparison above can fail."""
    other = run(changed(FINETUNE, train__seed=1))
    assert np.abs(np.subtract(other[0], alone(FINETUNE)[0])).max() > 1e-3


def test_every_clip_has_its_id_and_every_step_its_draws(monkeypatch):
    """By an objective that returns them instead of the loss."""

    def ids(model, recipe, processor, own):
        return lambda params, key, part, arrays: (jnp.sum(2.0 ** part["clip_ids"]), {})

    def draw(model, recipe, processor, own):
        return lambda params, key, part, arrays: (jax.random.uniform(key), {})

    def losses(objective, **fields):
        monkeypatch.setattr(step_module, "_classify", objective)
        _BUILT.clear()
        return run(changed(FINETUNE, **fields), steps=3)[0]

    rows = FINETUNE.train.batch_size
    for parts in (1, 2):
        assert losses(ids, train__accumulate=parts) == [(2**rows - 1) / parts] * 3
    drawn = [losses(draw, train__seed=seed) for seed in (0, 1)]
    _BUILT.clear()
    assert len(set(np.ravel(drawn))) == 6


def test_the_average_starts_as_the_parameters():
    """And holds them itself: a step donates both."""
    params = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    state = new_state(params, optax.sgd(1.0), averaged=True)
    jax.tree.map(np.testing.assert_array_equal, state.average, params)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, params))]
    assert len(set(places)) == len(places)
    assert new_state(params, optax.sgd(1.0)).average is None


@pytest.mark.parametrize("size", [2, 4, 8])
def test_fsdp_divides_what_a_device_holds(size):
    """All kernels; biases, norms and tokens are small and whole everywhere."""
    mesh = make_mesh(parse_mesh(f"fsdp={size}", size))
    model, params, *_ = starting_model(FINETUNE)
    optimizer = make_optimizer(FINETUNE.optim, params, optax.constant_schedule(1e-3))
    shapes = state_shapes(model, optimizer, mesh)
    for tree, copies in ((shapes.params, 1), (shapes.optimizer, 2)):
        leaves = param_tree.flatten(abstract_params(model))
        split = [leaf for path, leaf in leaves.items() if path.endswith("/kernel")]
        rest = sum(leaf.size for leaf in leaves.values()) - sum(leaf.size for leaf in split)
        expected = copies * 4 * (sum(leaf.size for leaf in split) // size + rest)
        assert bytes_on_a_device(tree) - expected in (0, 4, 8)  # counts of steps


def test_a_step_without_finite_gradients_changes_nothing():

    def huge(i, batch):
        return batch | {"labels": batch["labels"] * 0 - 1} if i == 2 else batch

    losses, flat, state = run(FINETUNE, change=huge)
    assert np.isnan(losses[2]) and np.isfinite(losses[3])
    assert (int(state.step), int(state.skipped), int(state.bad_steps)) == (4, 1, 0)
    assert all(np.isfinite(value).all() for value in flat.values())
    _, before, state = run(FINETUNE, steps=2)
    _, after, bad = run(FINETUNE, steps=3, change=huge)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    assert int(bad.bad_steps) == 1
    for old, new in zip(
        jax.tree.leaves(state.optimizer), jax.tree.leaves(bad.optimizer), strict=True
    ):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("fields", "mesh", "message"),
    [
        ({"train__batch_size": 12}, "data=8", "train.batch_size 12 .* use a multiple of 8"),
        ({"train__accumulate": 3}, "data=1", "use a multiple of 3"),
        ({"augment__mix_group": None, "train__accumulate": 2}, "data=1", "augment.mix_group"),
        ({}, "tensor=8", "does not divide"),
    ],
)
def test_what_does_not_divide_is_told(fields, mesh, message):
    with pytest.raises(UserError, match=message):
        run(changed(FINETUNE, **fields), mesh, steps=0)


@pytest.mark.parametrize(
    "text",
    [
        *("data=3", "data=4,data=2", "model=8", "data=0,fsdp=8", "data", "data=-8", ""),
        *(f"data={'9' * 5000}", "data=\u0668"),
    ],
)
def test_a_mesh_that_is_none_is_told(text):
    with pytest.raises(UserError, match="--mesh") as told:
        parse_mesh(text, 8)
    assert len(str(told.value)) < 600


def test_processes_that_cannot_share_a_batch_are_told(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(UserError, match="2 parts, which 3 processes cannot share; make data x"):
        make_mesh({"data": 1, "fsdp": 2, "tensor": 4})


def test_a_mesh_of_given_devices():
    last = jax.devices()[4:]
    mesh = make_mesh(parse_mesh("data=2,tensor=2", 4), devices=last)
    assert set(mesh.devices.flat) == set(last) and mesh.shape == dict(data=2, fsdp=1, tensor=2)


def test_a_step_is_lowered_from_shapes():
    """As it runs: with the mesh, and with the table for logical axes, which splits the heads."""
    text = lowered(PRETRAIN, "data=2,tensor=2")
    assert '"tensor"' in text and "num_partitions = 4" in text


def test_a_mesh_is_read():
    assert parse_mesh(None, 8) == dict(data=8, fsdp=1, tensor=1)
    assert parse_mesh("data=4, fsdp=2", 8) == dict(data=4, fsdp=2, tensor=1)
    assert make_mesh(parse_mesh("fsdp=2", 2)).axis_names == AXES


@pytest.mark.parametrize("text", ["data=4,fsdp=2", "tensor=8", "data=2,fsdp=2,tensor=2", "data=1"])
def test_the_text_of_a_mesh_is_what_was_read(text):
    count = int(np.prod([int(part.split("=")[1]) for part in text.split(",")]))
    assert mesh_text(parse_mesh(text, count)) == text


@pytest.mark.slow
def test_gradients_are_summed_in_float32_of_a_model_that_computes_in_bfloat16(alone):
    """Params stay float32, and so near the run in float32 that more than noise is left."""
    half = changed(PRETRAIN, model__config=PRETRAIN.model.config | {"dtype": "bfloat16"})
    losses, flat, _ = run(changed(half, train__accumulate=2))
    assert all(value.dtype == jnp.float32 for value in flat.values())
    np.testing.assert_allclose(losses, alone(PRETRAIN)[0], rtol=2e-2)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    mostly_slow(
        itertools.product((FINETUNE, PRETRAIN, DUAL, COLOURS_AND_SGD), ("float32", "bfloat16")),
        (DUAL, "bfloat16"),
    ),
    ids=name,
)
def test_strict_promotion(recipe, dtype):
    """Traced, with all that is drawn, mixed and optimised, in parts and with an average."""
    config = dict(recipe.model.config) | dict(dtype=dtype, drop_path_rate=0.1)
    recipe = changed(recipe, train__accumulate=2, model__config=config)
    with jax.numpy_dtype_promotion("strict"):
        *_, shapes, step = built(recipe, "data=1")
        new, values = step.trace(shapes, next(batches(recipe))).out_info
    assert values["loss"].dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, shapes)
