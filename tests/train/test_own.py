# SPDX-License-Identifier: Apache-2.0
"""A loss, an augmentation and a data source of one's own in a run."""

import inspect
from typing import Unpack, get_type_hints

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_recipes import PRETRAIN, changed
from tiny_runs import assert_same, lines, share_steps, small_recipe

from vivit_jax.data.datasets.dataset import read_whole
from vivit_jax.errors import UserError
from vivit_jax.models.losses import multi_head_loss
from vivit_jax.train import Augment, Profile, prepare, train
from vivit_jax.train.own import Own
from vivit_jax.train.run_options import RunKeywords, RunOptions
from vivit_jax.train.sharding import make_mesh, parse_mesh, whole_mesh

STEPS = 6
ONE = parse_mesh("data=1", 1)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return changed(small_recipe(tmp_path_factory.mktemp("data")), data__validation=None)


def run(recipe, out, **options):
    return train(recipe, out, **{"mesh_sizes": ONE, "say": lambda text: None, **options})


@pytest.fixture(scope="module", autouse=True)
def equal_steps_are_compiled_once():
    with share_steps():
        yield


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    run(recipe, out)
    return out


def recipes_loss(params, outputs, batch):
    loss = multi_head_loss(outputs.logits, batch["targets"], (2,))
    return loss, {"largest": jnp.abs(outputs.logits).max(), "labels": batch["labels"].mean()}


@pytest.mark.slow
def test_the_recipes_loss_written_as_ones_own_gives_the_same_run(recipe, plain, tmp_path):
    run(recipe, tmp_path / "run", loss=recipes_loss)
    ours, theirs = lines(tmp_path / "run"), lines(plain)
    assert {line["labels"] for line in ours} <= {0, 0.25, 0.5, 0.75, 1}
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() - b.keys() == {"largest", "labels"}
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)  # measured: the same bits
    with pytest.raises(UserError, match="loss was test_own.recipes_loss in the run so far"):
        run(changed(recipe, train__epochs=3), tmp_path / "run", resume=True)


def distil(teacher, params, outputs, batch):
    """Hinton's: the KL divergence from the teacher's answers."""
    wanted = jax.nn.softmax(teacher["scale"] * batch["pixel_values"].mean((1, 2, 3))[:, :2])
    found = jax.nn.log_softmax(outputs.logits)
    kl = (wanted * (jnp.log(wanted) - found)).sum(-1).mean()
    return kl, {"wanted": wanted[0, 0], "found": found[0, 0]}


def test_arrays_of_a_loss_are_arguments_of_the_program(recipe):
    """Not constants: another teacher needs no other program."""
    scale = np.array([[1, 2]], "f4")
    traces = []

    def counted(*arguments):
        traces.append(1)
        return distil(*arguments)

    own = Own.checked(jax.tree_util.Partial(counted, {"scale": scale}), None, None)
    data = prepare.listed(recipe)
    setup, batches, start = prepare.prepare(recipe, make_mesh(ONE), None, data, own)
    with batches:
        batch = next(batches)
    traced = setup.step.trace(setup.shapes, setup.batch_shapes, own.loss_arrays)
    assert scale.shape not in [np.shape(each) for each in traced.jaxpr.consts]
    losses = []
    placed = own.placed_arrays(setup.mesh)
    for arrays in (placed, [5 * array for array in placed]):
        state = prepare.first_state(setup, start.params)
        losses.append(setup.step(state, batch, arrays)[1])
        traces.append(len(traces))
    assert traces[-1] == traces[-2] + 1  # nothing was traced in between
    processor = start.preprocessing.processor
    mean, std = (np.asarray(x, "f4") for x in (processor.image_mean, processor.image_std))
    normalised = (batch["clips"] / np.float32(255) - mean) / std
    for each, factor in zip(losses, (1, 5), strict=True):
        wanted = torch.softmax(torch.tensor(factor * scale * normalised.mean((1, 2, 3))[:, :2]), 1)
        np.testing.assert_allclose(each["wanted"], wanted[0, 0], rtol=1e-5)


@pytest.mark.parametrize(
    "loss, message",
    [
        ("mse", "loss is 'mse'; expected a function"),
        (
            lambda params, out, batch: out.logits.mean(),
            r"returned an array alone; expected \(loss, me",
        ),
        (lambda params, out, batch: (out.logits, {}), r"shape \(4, 2\); expected a float scalar"),
        (lambda params, out, batch: (out.logits.sum(), {"lr": 1}), "a metric called 'lr'"),
        (lambda params, out, batch: (out.logits.sum(), {"x": out.logits}), "'x' with shape"),
    ],
)
def test_losses_that_cannot_be_used(recipe, loss, message, tmp_path):
    """They are refused before anything is written."""
    with pytest.raises(UserError, match=message):
        run(recipe, tmp_path / "run", loss=loss)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_of_ones_own_pretrains(recipe, tmp_path):
    """The mean error of the masked tubelets, from the outputs."""

    def loss(params, outputs, batch):
        assert outputs.logits.shape[:2] == batch["mask"].predicted.shape
        return jnp.mean(outputs.logits**2), {"models_own": outputs.loss}

    short = changed(PRETRAIN, data__train=recipe.data.train, train__steps=1, train__batch_size=4)
    run(short, tmp_path / "run", loss=loss)
    (line,) = lines(tmp_path / "run")
    assert line["models_own"] > 0 and line["loss"] != line["models_own"]


def flicker(rng, clip):
    """Each frame gets its own brightness."""
    factors = rng.uniform(0.5, 1, (len(clip), 1, 1, 1))
    return (clip * factors).astype(np.uint8)


def shift(key, clip):
    return clip + jax.random.normal(key, clip.shape[:1])[:, None, None, None]


def test_a_resumed_run_augments_as_one_that_was_not_stopped(recipe, plain, tmp_path):
    own = Augment(clips=flicker, pixels=shift)
    run(recipe, tmp_path / "whole", augment=own)
    run(changed(recipe, train__steps=3), tmp_path / "run", augment=own)
    with pytest.raises(UserError, match="augment.clips was test_own.flicker in the run so far and"):
        run(recipe, tmp_path / "run", augment=Augment(pixels=shift), resume=True)
    others = changed(recipe, data__threads=5)
    run(others, tmp_path / "run", augment=own, resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole", STEPS)
    losses = [[line["loss"] for line in lines(out)] for out in (tmp_path / "run", plain)]
    assert all(a != b for a, b in zip(*losses, strict=True))


@pytest.mark.slow
def test_augmentation_in_the_step_does_not_depend_on_its_parts(recipe, tmp_path):
    seen = []
    for fields in ({}, dict(train__accumulate=2)):
        mesh = parse_mesh("data=2", 2) if fields else ONE
        devices = make_mesh(mesh, jax.devices()[: 2 if fields else 1])
        own = Own.checked(None, Augment(pixels=shift), None)
        data = prepare.listed(recipe)
        at = changed(recipe, **fields)
        setup, batches, start = prepare.prepare(at, devices, None, data, own)
        with batches:
            batch = next(batches)
        state = prepare.first_state(setup, start.params)
        seen.append(float(setup.step(state, batch, [])[1]["loss"]))
    np.testing.assert_allclose(*seen, rtol=1e-5)


@pytest.mark.parametrize(
    "augment, message",
    [
        (3, "augment is 3; expected a function"),
        (
            lambda rng, clip: clip[:2],
            r"array of uint8 with shape .*; expected uint8 \(4",
        ),
        (lambda rng, clip: clip / 2, "returned an array of float64"),
        (lambda rng, clip: clip.colour, "failed: AttributeError: .*'colour'"),
        (
            Augment(pixels=lambda key, clip: (255 * clip).astype("int32")),
            r"returned int32 \(4, .*; expected an array of floats",
        ),
        (
            Augment(pixels=lambda key, clip: clip[0]),
            r"returned float32 \(16, 16, 3\) for a clip of \(4,",
        ),
    ],
)
def test_augmentations_that_cannot_be_used(recipe, augment, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(recipe, tmp_path / "run", augment=augment)
    for arguments in ({}, {"clips": 3}):
        with pytest.raises(UserError, match="Augment"):
            Augment(**arguments)


def test_what_is_no_recipe_and_no_mesh(recipe, tmp_path):
    with pytest.raises(UserError, match="recipe is 'demo-finetune'; expected a Recipe, such as"):
        train("demo-finetune", tmp_path / "run")
    for sizes, message in (
        ({"rows": 2}, "got 'rows=2', expected each of"),
        ({"data": 99}, "99 d"),
        ("data=1", "mesh_sizes is 'data=1'; expected the size of each axis"),
    ):
        with pytest.raises(UserError, match=message):
            train(recipe, tmp_path / "run", mesh_sizes=sizes)
    assert whole_mesh({"fsdp": 2}, 8) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert whole_mesh({}, 8) == whole_mesh(None, 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert not (tmp_path / "run").exists()


def test_arguments_that_there_are_not(recipe, tmp_path):
    for wrong, message in (
        ({"reume": True}, "train takes no argument 'reume'; did you mean resume"),
        ({"callback": []}, "no argument 'callback'; did you mean callbacks"),
        ({"options": {}}, "no argument 'options'; known: recipe, out, callbacks, .*, say$"),
        ({"say": "loud"}, "say is 'loud'; expected a function of a text, or None"),
    ):
        with pytest.raises(UserError, match=message):
            train(recipe, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_editors_see_the_fields_of_run_options():
    assert get_type_hints(RunKeywords) == get_type_hints(RunOptions)
    kind = inspect.signature(train).parameters["options"].annotation
    assert kind == Unpack[RunKeywords] and not RunKeywords.__required_keys__


class Clips(grain.RandomAccessDataSource):
    """A source by grain's protocol alone."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.clips = rng.integers(0, 256, (8, 6, 18, 20, 3), np.uint8)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, record_key):
        return {"video": self.clips[record_key], "label": int(record_key) % 2}


def test_a_source_of_grain_trains_as_it_is(recipe, tmp_path, capfd):
    short = changed(recipe, data__train="", train__steps=2)
    capfd.readouterr()
    run(short, tmp_path / "run", dataset=Clips(), say=None)
    out, err = capfd.readouterr()
    assert out == "" and "step" not in err  # elsewhere a line for the first step, and the last
    assert len(lines(tmp_path / "run")) == 2
    data, validation = prepare.listed(short, grain.MapDataset.source(Clips()), Clips())
    for example, same in zip(data.examples, validation.examples, strict=True):
        assert example.label == same.label
        np.testing.assert_array_equal(read_whole(example), read_whole(same))
    with pytest.raises(UserError, match="dataset is 'clips'; expected a data set: .*read_dataset"):
        run(short, tmp_path / "other", dataset="clips")


@pytest.mark.slow
def test_steps_are_traced(recipe, tmp_path):
    said = []
    short = changed(recipe, train__steps=3)
    profile = Profile(tmp_path / "trace", steps=1, skip=1)
    run(short, tmp_path / "run", profile=profile, say=said.append)
    (trace,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert trace.stat().st_size
    file = recipe.data.train + "/0/0.npy"
    for wrong, message in ((3, "profile is 3; expected a directory"), (file, "is a file")):
        with pytest.raises(UserError, match=message):
            run(short, tmp_path / "other", profile=wrong)
    with pytest.raises(UserError, match="Profile.steps is 0; expected an int from 1 on"):
        Profile(tmp_path, steps=0)
