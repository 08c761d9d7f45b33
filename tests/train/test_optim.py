# SPDX-License-Identifier: Apache-2.0
"""The optimiser against PyTorch's, its schedules and factors against definitions."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import clip, to_torch, torch_model
from tiny import SMALL, config_of

import vivit_jax
from vivit_jax import UserError, param_tree
from vivit_jax.recipes.recipe import OptimSettings
from vivit_jax.train.optim import (
    decay_factors,
    layer_decay_rules,
    learning_rate,
    lr_factors,
    make_optimizer,
    parameter_values,
    update_average,
)

GOLDENS = sorted((Path(__file__).parent.parent / "goldens").glob("*.json"))


def golden(name):
    """The shapes of a model's parameters, as a tree."""
    path = next(path for path in GOLDENS if path.stem == name)
    rows = json.loads(path.read_text())
    sizes = {k: tuple(int(axis.split("=")[1]) for axis in row[1:]) for k, row in rows.items()}
    return of_shapes(sizes)


def of_shapes(sizes):
    return param_tree.unflatten({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in sizes.items()})


def per_layer(values):
    """{path in the per-layer form: number}, whatever the layout."""
    found = {}
    for path, value in param_tree.flatten(values).items():
        if re.search(r"(^|/)layers/", path) and np.ndim(value):
            found |= {
                param_tree.layer_path(path, i): float(v) for i, v in enumerate(np.ravel(value))
            }
        else:
            found[path] = float(value)
    return found


# ---- schedules


def by_definition(settings, batch, per_epoch, epochs):
    """The rate of every step, from the recipes of the papers."""
    scale = batch / settings.lr_batch if settings.lr_batch else 1
    lr, floor = settings.lr * scale, settings.min_lr * scale
    total, warm = epochs * per_epoch, int(settings.warmup_epochs * per_epoch)
    n = total - warm
    if settings.schedule == "videomae":
        cosine = [floor + 0.5 * (lr - floor) * (1 + np.cos(np.pi * i / n)) for i in range(n)]
        return np.concatenate([np.linspace(0, lr, warm), cosine])
    rates = []
    for step in range(total):
        rate = lr * (min(1, step / warm) if warm else 1)
        if settings.schedule == "scenic":
            rate *= 0.5 * (1 + np.cos(np.pi * max(step - warm, 0) / n))
        rates.append(rate)
    return np.array(rates)


@pytest.mark.parametrize("schedule", ["videomae", "scenic", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.25, 2.5, 5])
def test_every_step_has_the_rate_of_the_papers(schedule, warmup):
    settings = OptimSettings(lr=1e-3, min_lr=1e-5, schedule=schedule, warmup_epochs=warmup)
    size = dict(batch_size=1024, steps_per_epoch=4, epochs=20)
    schedule = learning_rate(settings, **size)
    expected = by_definition(settings, 1024, 4, 20)
    rates = np.asarray(schedule(np.arange(80)))
    np.testing.assert_allclose(rates, expected, rtol=1e-5, atol=1e-12)
    assert rates.max() == pytest.approx(4e-3)  # lr of a batch of 256
    edges = [0, int(warmup * 4), 79]
    np.testing.assert_allclose([schedule(i) for i in edges], expected[edges], rtol=1e-5)
    after = {"videomae": 4e-5, "scenic": 0.0, "constant": 4e-3}[settings.schedule]
    assert float(schedule(99)) == pytest.approx(after)


def test_only_videomae_reaches_the_full_rate_within_the_warm_up():
    rates = {}
    for name in ("videomae", "scenic"):
        settings = OptimSettings(lr=1.0, lr_batch=None, schedule=name, warmup_epochs=1)
        schedule = learning_rate(settings, batch_size=64, steps_per_epoch=5, epochs=3)
        rates[name] = [float(schedule(step)) for step in range(6)]
    np.testing.assert_allclose(rates["videomae"], [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-7)
    np.testing.assert_allclose(rates["scenic"], [0, 0.2, 0.4, 0.6, 0.8, 1], atol=1e-7)


def test_the_rate_near_the_end_of_a_long_run_keeps_its_digits():
    settings = OptimSettings(lr=0.1, lr_batch=None, schedule="scenic", warmup_epochs=2.5)
    schedule = learning_rate(settings, batch_size=64, steps_per_epoch=3356, epochs=30)
    assert float(schedule(100_679)) == pytest.approx(0.1 * (np.pi / 2 / 92_290) ** 2, rel=1e-4)


def test_a_warm_up_longer_than_the_run_is_refused():
    settings = OptimSettings(lr=1e-3, warmup_epochs=5)
    size = dict(batch_size=8, steps_per_epoch=4, epochs=5)
    with pytest.raises(UserError, match="optim.schedule is 'linear', expected 'videomae'"):
        learning_rate(dataclasses.replace(settings, schedule="linear"), **size)
    with pytest.raises(UserError, match=r"is 20 steps and train\.epochs=5 of 4 steps is 20"):
        learning_rate(settings, **size)
    with pytest.raises(UserError, match=r"a run has at most 2147483647 steps: lower train\.epochs"):
        learning_rate(settings, batch_size=8, steps_per_epoch=2**20, epochs=2**11)


# ---- factors


@pytest.mark.parametrize(
    ("depth", "decay", "factor"),
    [  # of the patch embedding; B twice, L, H twice, g, and UCF101's B
        (12, 0.75, 0.0238),
        (12, 0.65, 0.0037),
        (24, 0.75, 7.5e-4),
        (32, 0.75, 7.5e-5),
        (32, 0.8, 6.3e-4),
        (40, 0.9, 0.0133),
        (12, 0.7, 0.0097),
    ],
)
def test_the_patch_embedding_learns_as_slowly_as_in_the_papers(depth, decay, factor):
    shapes = of_shapes({"patch_embed/kernel": (2, 3), "layers/mlp_in/kernel": (depth, 2, 2)})
    factors = lr_factors(OptimSettings(lr=1, layer_decay=decay), shapes)
    assert factors["patch_embed"]["kernel"] == pytest.approx(factor, rel=0.02)
    kernel = factors["layers"]["mlp_in"]["kernel"]
    assert kernel.shape == (depth, 1, 1)
    np.testing.assert_allclose(kernel[[0, -1], 0, 0], [decay**depth, decay])


def test_layer_decay_by_hand():
    sizes = {
        "backbone/patch_embed/bias": (4,),
        "backbone/layers_0/attention/query/bias": (2, 2),
        "backbone/layers_1/mlp_in/kernel": (4, 4),
        "backbone/ln_final/scale": (4,),
        "decoder/layers_0/mlp_in/kernel": (4, 4),
        "mask_token": (1, 1, 4),
        "fc_norm/bias": (4,),
        "head/kernel": (4, 3),
    }
    factors = lr_factors(OptimSettings(lr=1, layer_decay=0.5), of_shapes(sizes))
    by_hand = [1 / 8, 1 / 4, 1 / 2, 1, 1, 1 / 8, 1, 1]
    assert param_tree.flatten(factors) == dict(zip(sizes, by_hand, strict=True))


def test_layer_decay_of_a_factorised_encoder():
    factors = per_layer(
        lr_factors(OptimSettings(lr=1, layer_decay=0.5), golden("vivit_factorised_encoder"))
    )
    halvings = {  # 3 spatial blocks, 2 temporal ones
        "backbone/patch_embed/kernel": 6,
        "backbone/spatial/cls": 6,
        "backbone/spatial/pos_embed": 6,
        "backbone/spatial/layers_0/mlp_in/bias": 5,
        "backbone/spatial/layers_2/mlp_in/bias": 3,
        "backbone/spatial/ln_final/scale": 3,
        "backbone/temporal/cls": 3,
        "backbone/temporal/pos_embed": 3,
        "backbone/temporal/layers/mlp_in/bias": 2,  # alone in its scan
        "backbone/temporal/layers_1/mlp_in/bias": 1,
        "backbone/temporal/ln_final/scale": 0,
        "head/kernel": 0,
    }
    assert {path: factors[path] for path in halvings} == {k: 0.5**v for k, v in halvings.items()}


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_kernels_decay_and_nothing_else_does_in_every_model(path):
    shapes = golden(path.stem)
    factors = param_tree.flatten(decay_factors(OptimSettings(lr=1), shapes))
    assert factors.keys() == param_tree.flatten(shapes).keys()
    assert {k for k, v in factors.items() if v} == {k for k in factors if k.endswith("/kernel")}
    assert set(factors.values()) == {0.0, 1.0}


def test_a_scanned_model_has_the_factors_of_a_looped_one():
    settings = OptimSettings(lr=1, layer_decay=0.7, lr_rules=((r".*layers_1/.*bias", 3.0),))
    scanned, looped = (golden(f"vivit_classifier{kind}") for kind in ("", "_loop"))
    factors = param_tree.flatten(lr_factors(settings, scanned))
    leaf = factors["backbone/layers/attention/query/bias"]
    assert leaf.shape == (2, 1, 1) and leaf[1] == 3  # the last of 3 layers is unscanned
    expected = param_tree.flatten(lr_factors(settings, looped))
    found = {}
    for name, slot in param_tree.slots(param_tree.shapes_of(param_tree.flatten(scanned))).items():
        value = np.asarray(factors[slot.leaf])
        found[name] = float(np.ravel(value)[slot.layer if value.ndim else 0])
    assert found == expected


FEW = of_shapes({"layers/mlp_in/kernel": (3, 2, 2), "layers/mlp_in/bias": (3, 2), "cls": (2,)})


def test_the_first_rule_that_matches_counts():
    rules = ((r".*/bias", 2.0), (r"layers_[12]/.*", 3.0), (r"layers_1/.*", 4.0), (".*", 5.0))
    values = param_tree.flatten(parameter_values(FEW, rules, "test"))
    assert values["layers/mlp_in/bias"] == 2.0 and values["cls"] == 5.0
    np.testing.assert_array_equal(values["layers/mlp_in/kernel"][:, 0, 0], [5, 3, 3])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((r"layers_0/.*", 1.0),), r"no rule matches cls, layers_\{1-2\}/mlp_in/bias, .*"),
        (((r"layer_0/.*", 1.0), (".*", 1.0)), r"no parameter matches 'layer_0/\.\*'"),
        (((r"mlp_in", 1.0), (".*", 1.0)), r"no parameter matches 'mlp_in'; .* whole of a path"),
        ((("(", 1.0),), r"'\(' is not a regular expression"),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    with pytest.raises(UserError, match=f"optim.lr_rules: {message}"):
        parameter_values(FEW, rules, "optim.lr_rules")


def test_defaults_need_not_match():
    defaults = ((r"decoder/.*", 0.0), (".*", 1.0))
    values = parameter_values(FEW, (), "test", defaults)
    assert set(param_tree.flatten(values).values()) == {1.0}


def test_layer_decay_needs_blocks():
    with pytest.raises(UserError, match="optim.layer_decay needs the blocks of an encoder"):
        layer_decay_rules(of_shapes({"head/kernel": (2, 2)}), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(algorithm="lamb"), "optim.algorithm is 'lamb', expected 'adamw' or 'sgd'"),
        (dict(freeze=(".*",)), "leaves no parameter to train"),
        (dict(freeze=("head/.*",)), "optim.freeze: no parameter matches 'head/"),
    ],
)
def test_settings_that_make_no_optimiser(change, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(OptimSettings(**{"lr": 1.0, **change}), FEW, optax.constant_schedule(1.0))


# ---- steps


def tiny_params():
    rng = np.random.default_rng(0)
    shapes = {
        "backbone/patch_embed/kernel": (3, 2),
        "backbone/layers/mlp_in/kernel": (3, 2, 2),
        "backbone/layers/mlp_in/bias": (3, 2),
        "head/kernel": (2, 2),
        "head/bias": (2,),
    }

    def draw(shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return param_tree.unflatten({path: draw(shape) for path, shape in shapes.items()})


def moved(settings, params, gradients, steps=1):
    """How far each parameter moves in so many steps at a rate of 1, and the optimiser's state."""
    optimizer = make_optimizer(settings, params, optax.constant_schedule(1.0))
    state, new = optimizer.init(params), params
    for _ in range(steps):
        updates, state = optimizer.update(gradients, state, new)
        new = optax.apply_updates(new, updates)
    return param_tree.flatten(jax.tree.map(np.subtract, new, params)), state


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_without_gradients_kernels_shrink_by_their_factors(algorithm):
    settings = OptimSettings(
        lr=1, algorithm=algorithm, weight_decay=0.1, layer_decay=0.5, decay_rules=(("head/.*", 2),)
    )
    params = tiny_params()
    step, _ = moved(settings, params, jax.tree.map(jnp.zeros_like, params))
    flat = param_tree.flatten(params)
    halves = np.array([1 / 8, 1 / 4, 1 / 2]).reshape(3, 1, 1)
    shrunk = {
        "backbone/patch_embed/kernel": 0.1 / 16,
        "backbone/layers/mlp_in/kernel": 0.1 * halves,
        "backbone/layers/mlp_in/bias": 0,
        "head/kernel": 0.2,
        "head/bias": 0.2,
    }
    for path, share in shrunk.items():
        np.testing.assert_allclose(step[path], -share * flat[path], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("algorithm", ["adamw", "sgd"])
def test_what_is_frozen_does_not_move_and_has_no_state(algorithm):
    params = tiny_params()
    gradients = jax.tree.map(jnp.ones_like, params)
    settings = OptimSettings(
        lr=1, algorithm=algorithm, weight_decay=0.1, clip=0.5,
        freeze=("backbone/patch_embed/.*", r"backbone/layers_[01]/.*", "head/bias"),
    )  # fmt: skip
    step, state = moved(settings, params, gradients, steps=3)
    assert not step["backbone/patch_embed/kernel"].any() and not step["head/bias"].any()
    for name in ("kernel", "bias"):
        rows = step[f"backbone/layers/mlp_in/{name}"]
        assert not rows[:2].any() and rows[2].all()
    assert step["head/kernel"].all()
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == [4, 6, 12] if algorithm == "sgd" else [4, 4, 6, 6, 12, 12]
    # Their gradients do not count in the norm: any others give the same steps.
    huge = jax.tree.map(jnp.copy, gradients)
    huge["backbone"]["patch_embed"]["kernel"] *= 1e6
    huge["backbone"]["layers"]["mlp_in"]["kernel"] *= jnp.array([1e6, 1e6, 1]).reshape(3, 1, 1)
    again, _ = moved(settings, params, huge, steps=3)
    for path in step:
        np.testing.assert_array_equal(step[path], again[path])
    # By hand: ones in 4 + 2 + 4 trained places, cut from a norm of sqrt(10) to 0.5.
    if algorithm == "sgd":
        flat = param_tree.flatten(params)["head/kernel"]
        first, _ = moved(settings, params, gradients)
        np.testing.assert_allclose(first["head/kernel"], -0.5 / 10**0.5 - 0.1 * flat, rtol=1e-5)


@pytest.mark.parametrize(
    ("freeze", "factor"), [((), 0.5), (("head/bias",), 0.5), ((r"backbone/layers_[01]/.*",), 1)]
)
def test_a_known_norm_is_taken_but_where_a_leaf_is_frozen_in_part(freeze, factor):
    """Twice the norm halves the step; the norm of frozen layers must not count."""
    params = tiny_params()
    settings = OptimSettings(lr=1, algorithm="sgd", weight_decay=0, clip=0.5, freeze=freeze)
    optimizer = make_optimizer(settings, params, optax.constant_schedule(1.0))
    gradients = jax.tree.map(jnp.ones_like, params)
    if freeze == ("head/bias",):
        gradients["head"]["bias"] *= 0
    state, norm = optimizer.init(params), optax.tree.norm(gradients)
    own, _ = optimizer.update(gradients, state, params)
    for known, share in ((norm, 1), (2 * norm, factor)):
        found, _ = optimizer.update(gradients, state, params, norm=known)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, share * b, rtol=1e-6)  # measured: equal


def test_the_average_is_exponential():
    params = [{"w": jnp.full(2, float(i))} for i in range(4)]
    average = params[0]
    for new in params[1:]:
        average = update_average(average, new, 0.9)
    expected = 0.1 * 3 + 0.9 * (0.1 * 2 + 0.9 * (0.1 * 1 + 0.9 * 0))
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


# ---- PyTorch's steps

STEPS, BATCH = 20, 2
CHANGES = SMALL | dict(image_size=(16, 8), intermediate_size=24, num_labels=3)
ADAMW = OptimSettings(
    lr=1.28, min_lr=0.128, warmup_epochs=1, b2=0.95, weight_decay=0.3, layer_decay=0.6
)
SGD = OptimSettings(
    algorithm="sgd", lr=0.05, lr_batch=None, schedule="scenic", warmup_epochs=1, clip=0.3
)
# The largest difference of any parameter over how far it moved at most; measured 1.3e-7 and 2.3e-7.
ALLOWED = 2e-6


def batches():
    config = config_of("mae cls", **CHANGES)
    rng = np.random.default_rng(1)
    return [
        (clip(config, BATCH, seed=i).astype(np.float64), rng.integers(3, size=BATCH))
        for i in range(STEPS)
    ]


def torch_steps(directory, settings, rates):
    """Train transformers' classifier with torch.optim from the definition; save it there."""
    import torch

    model = torch_model("mae cls", **CHANGES).double()
    groups = []
    for name, p in model.named_parameters():
        block = re.search(r"layers?\.(\d+)\.", name)
        number = int(block[1]) + 1 if block else 0 if "embeddings" in name else 3
        decay = settings.layer_decay or 1
        wd = 0 if p.ndim == 1 or name.endswith(".bias") else settings.weight_decay
        groups.append(dict(params=[p], scale=decay ** (3 - number), weight_decay=wd))
    assert {round(g["scale"], 3) for g in groups} == (
        {1, 0.6, 0.36, 0.216} if settings.layer_decay else {1}
    )
    if settings.algorithm == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1, betas=(settings.b1, settings.b2))
    else:
        optimizer = torch.optim.SGD(groups, lr=1, momentum=settings.momentum)
    for rate, (pixels, labels) in zip(rates, batches(), strict=True):
        optimizer.zero_grad()
        logits = model(to_torch(pixels)).logits
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        if settings.clip:
            norm = sum(float((p.grad**2).sum()) for p in model.parameters()) ** 0.5
            for p in model.parameters():
                p.grad *= min(1, settings.clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def one_thread():
    """For a model this small PyTorch's threads wait for each other, twenty times as long."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(one_thread, tmp_path_factory):
    """The model before its first step and the gradients of its loss, in float64."""
    directory = tmp_path_factory.mktemp("tiny")
    torch_model("mae cls", **CHANGES).double().save_pretrained(directory)
    model, params = load(directory)

    @jax.jit
    def gradients(params, pixels, labels):
        return jax.grad(lambda p: model.apply({"params": p}, pixels, labels=labels).loss)(params)

    return params, gradients


def load(directory):
    with jax.enable_x64(True):
        return vivit_jax.from_pretrained(directory, dtype="float64", param_dtype="float64")


def our_steps(tiny, settings):
    params, gradients = tiny
    with jax.enable_x64(True):
        schedule = learning_rate(settings, batch_size=BATCH, steps_per_epoch=5, epochs=4)
        optimizer = make_optimizer(settings, params, schedule)
        state = optimizer.init(params)

        @functools.partial(jax.jit, donate_argnums=1)
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for pixels, labels in batches():
            params, state = step(params, state, gradients(params, pixels, labels))
    return param_tree.flatten(params)


def difference(ours, theirs, start):
    """The largest difference of a parameter, relative to how far it moved at most."""
    ours, theirs, start = (jax.tree.map(np.asarray, flat) for flat in (ours, theirs, start))
    assert ours.keys() == theirs.keys() == start.keys()
    return max(np.abs(ours[k] - theirs[k]).max() / np.abs(theirs[k] - start[k]).max() for k in ours)


@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_twenty_steps_equal_pytorchs(tiny, tmp_path, settings):
    rates = by_definition(settings, BATCH, 5, 4)
    assert rates.max() == pytest.approx(0.01 if settings is ADAMW else 0.05)
    torch_steps(tmp_path, settings, rates)
    theirs, start = param_tree.flatten(load(tmp_path)[1]), param_tree.flatten(tiny[0])
    measured = difference(our_steps(tiny, settings), theirs, start)
    assert measured < ALLOWED, f"measured {measured:.1e}"
    if settings is ADAMW:  # negative control
        without = dataclasses.replace(settings, layer_decay=None)
        assert difference(our_steps(tiny, without), theirs, start) > 0.1
