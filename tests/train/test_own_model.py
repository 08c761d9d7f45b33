# SPDX-License-Identifier: Apache-2.0
"""A model of one's own in a run: a class of no family, and params that are given."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from huggingface_hub import ModelCard
from tiny_recipes import PRETRAIN, changed
from tiny_runs import assert_same, share_steps, small_recipe

import vivit_jax
from vivit_jax import param_tree
from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.data.sampling import view_indices
from vivit_jax.errors import UserError
from vivit_jax.models.build import abstract_params
from vivit_jax.outputs import ClassifierOutput
from vivit_jax.train import ClipConfig, read_params, train
from vivit_jax.train.sharding import parse_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidthConfig(ClipConfig):
    width: int = 6


class Means(nn.Module):
    """A classifier of the mean colour of each frame."""

    config: ClipConfig

    @nn.compact
    def __call__(self, pixel_values, *, deterministic=True, **_):
        x = nn.relu(nn.Dense(self.config.width)(pixel_values.mean((2, 3))))
        x = nn.Dropout(0.2, deterministic=deterministic)(x)
        return ClassifierOutput(logits=nn.Dense(self.config.num_labels)(x.mean(1)))


CONFIG = WidthConfig(num_frames=4, image_size=(16, 12), num_labels=2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_recipe(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def equal_steps_are_compiled_once():
    with share_steps():
        yield


def run(recipe, out, **options):
    quiet = dict(mesh_sizes=parse_mesh("data=1", 1), say=lambda text: None)
    return train(recipe, out, **quiet, **options)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return run(recipe, out, model=Means(CONFIG))


def test_a_model_of_no_family_is_trained_and_its_params_are_read_back(recipe, whole):
    """The accuracy of the run is that of the model that it saved, on the held-out clips."""
    params = read_params(whole.model)
    flat = param_tree.flatten(params)
    assert {path: x.shape for path, x in flat.items()} == {
        path: x.shape for path, x in param_tree.flatten(abstract_params(Means(CONFIG))).items()
    }
    processor = vivit_jax.VideoProcessor.from_pretrained(whole.model)
    dataset = read_dataset(recipe.data.validation)
    indices = view_indices("loop", 6, 4, 1, 1)[0]
    clips = processor([np.load(example.path)[indices] for example in dataset.examples])
    logits = Means(CONFIG).apply({"params": params}, clips).logits
    right = logits.argmax(-1) == jnp.array([example.label for example in dataset.examples])
    classifier = vivit_jax.VideoClassifier(Means(CONFIG), params, processor)
    example = np.load(dataset.examples[0].path)
    row = classifier.predict_proba(example[indices], stride=1)[0]
    np.testing.assert_allclose(row, np.exp(logits[0]) / np.exp(logits[0]).sum(), rtol=1e-5)
    step = int(whole.model.name)
    assert step <= whole.step == 6
    _check_card(whole.model, params)
    if step == whole.step:
        assert float(right.mean()) == whole.metrics["accuracy"]
    else:
        assert float(right.mean()) >= whole.metrics["accuracy"]


def _check_card(directory, params):
    """The card of a class of one's own: its code runs, and nothing says that others open it."""
    text = (directory / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict = {}
    with contextlib.chdir(directory):
        exec(code, found)
    assert jax.tree.all(jax.tree.map(np.array_equal, found["params"], params))
    assert found["processor"] == vivit_jax.VideoProcessor.from_pretrained(directory)
    metadata = ModelCard.load(directory / "README.md").data
    assert (metadata.library_name, metadata.pipeline_tag) == ("vivit_jax", "video-classification")
    assert metadata.eval_results[0].metric_name == "Accuracy"
    assert "# Means: video classification, 2 classes" in text and "not for transformers" in text
    assert "`Means`, 38 parameters, float32" in text
    assert "### transformers" not in text and 'from_pretrained(".")' not in text.replace(code, "")


def test_its_run_is_resumed_with_it_alone(recipe, whole, tmp_path):
    model = Means(CONFIG)
    run(changed(recipe, train__steps=3), tmp_path / "run", model=model)
    wider = Means(dataclasses.replace(CONFIG, width=7))
    for other, message in (
        (None, "model was test_own_model.Means in the run so far and is now the recipe's own"),
        (wider, "model differs from that of the run in .*run: config.width 6 there, 7 now"),
    ):
        with pytest.raises(UserError, match=message):
            run(recipe, tmp_path / "run", model=other, resume=True)
    run(recipe, tmp_path / "run", model=model, resume=True)
    assert_same(tmp_path / "run", whole.model.parents[1], 6)


def test_a_model_and_its_params_are_trained_on(recipe, whole, tmp_path):
    """Also those of a family, in place of the recipe's preset and start."""
    fixed = changed(recipe, optim__lr=0.0001, train__steps=1, data__validation=None)
    params = read_params(whole.model)
    found = read_params(run(fixed, tmp_path / "own", model=(Means(CONFIG), params)).model)
    for path, value in param_tree.flatten(found).items():
        np.testing.assert_allclose(value, param_tree.flatten(params)[path], atol=1e-5)  # 1.2e-7
    wrong = {"Dense_0": params["Dense_0"]}
    with pytest.raises(UserError, match="not those of this Means: Dense_1/.* has shape none"):
        run(fixed, tmp_path / "other", model=(Means(CONFIG), wrong))
    assert not (tmp_path / "other").exists()


class Bare(nn.Module):
    def __call__(self, pixel_values):
        return pixel_values


class Logits(nn.Module):
    """A model that gives something else than training takes."""

    config: ClipConfig
    given: str

    @nn.compact
    def __call__(self, pixel_values, *, deterministic=True, **_):
        x = pixel_values.mean((1, 2, 3))
        if self.given == "batch norm":
            x = nn.BatchNorm(use_running_average=deterministic)(x)
        x = nn.Dense(7 if self.given == "wide" else 2)(x)
        return x if self.given == "bare" else ClassifierOutput(logits=x)


class Strict(nn.Module):
    """A model that takes clips alone."""

    config: ClipConfig

    @nn.compact
    def __call__(self, pixel_values):
        return ClassifierOutput(logits=nn.Dense(2)(pixel_values.mean((1, 2, 3))))


@pytest.mark.parametrize(
    "model, message",
    [
        ("vit", "model is str; expected a flax.linen module"),
        (
            Bare(),
            "whose config is NoneType; expected a field `config` with a vivit_jax.train.ClipC",
        ),
        (
            Means(dataclasses.replace(CONFIG, num_labels=1)),
            "names 2 classes, the model has 1 without names",
        ),
        (Logits(CONFIG, given="bare"), "Logits.__call__ gives no .logits for two clips; expected"),
        (Logits(CONFIG, given="wide"), r"gives logits of shape \(2, 7\) for two clips; expected"),
        (Logits(CONFIG, given="batch norm"), "has variables of batch_stats, which are neither tra"),
        (Strict(CONFIG), r"Strict.__call__ got an unexpected keyword .*; expected \(self, pixel_v"),
        (
            vivit_jax.VideoMAEForPreTraining(vivit_jax.VideoMAEConfig()),
            "the recipe's task is 'finetune'; expected a model for classification",
        ),
    ],
)
def test_models_that_cannot_be_trained(recipe, model, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(recipe, tmp_path / "run", model=model)
    pretrain = changed(PRETRAIN, data__train=recipe.data.train, train__batch_size=4)
    with pytest.raises(UserError, match="of no family, which can be fine-tuned only"):
        run(pretrain, tmp_path / "run", model=Means(CONFIG))
    with pytest.raises(UserError, match="model.safetensors: no such file; expected a directory"):
        read_params(tmp_path)
    assert not (tmp_path / "run").exists()
