# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is opened once, whatever uses it: its files and its config.json are counted."""

import dataclasses

import pytest
from clips import write_clip
from helpers import random_params
from tiny import VIDEOMAE, VIVIT
from tiny_image_models import ImageModels

import vivit_jax
from checkpoints_convert.files import open as open_files
from checkpoints_convert.source import open_source
from vivit_jax.cli.__main__ import main
from vivit_jax.files import json_files
from vivit_jax.models.build import build_model
from vivit_jax.recipes import recipe_named
from vivit_jax.recipes.recipe import EvalSettings, ModelSettings
from vivit_jax.train.start.initial_model import starting_model


@pytest.fixture
def counted(monkeypatch):
    """Calls a function: how often it opened a checkpoint's weights, and read its config.json."""
    opened, read = [], []
    find, parse = open_files._weight_file, json_files.parse_json

    def parse_json(text, name, *args):
        read.append(name)
        return parse(text, name, *args)

    monkeypatch.setattr(open_files, "_weight_file", lambda path: opened.append(path) or find(path))
    monkeypatch.setattr(json_files, "parse_json", parse_json)

    def count(call):
        opened.clear()
        read.clear()
        call()
        return len(opened), sum(name.endswith("/config.json") for name in read)

    return count


def save(directory, config, head):
    model = build_model(config, head)
    processor = vivit_jax.VideoProcessor.named(
        "videomae-imagenet",
        size={"shortest_edge": min(config.frame_size)},
        crop_size=config.frame_size,
    )
    vivit_jax.save_pretrained(directory, model, random_params(model, 0.1), processor)
    return str(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models by name."""
    folder = tmp_path_factory.mktemp("models")
    mae, vivit = vivit_jax.VideoMAEConfig(**VIDEOMAE), vivit_jax.VivitConfig(**VIVIT)
    flat = dataclasses.replace(mae, use_mean_pooling=False)
    square = VIDEOMAE | dict(image_size=16, num_labels=4)
    start = vivit_jax.VideoMAEConfig(**square)
    made = {
        "vivit": (vivit, "classification"),
        "pretrained": (flat, "pretraining"),
        "start": (start, "classification"),
        "start pretrained": (dataclasses.replace(start, use_mean_pooling=False), "pretraining"),
    }
    return {name: save(folder / name, *each) for name, each in made.items()}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of one class with one clip."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "walk").mkdir()
    write_clip(folder / "walk" / "clip.mp4", frames=30, size=(48, 32))
    return folder


@pytest.fixture(scope="module")
def image_vit(tmp_path_factory):
    return str(ImageModels(tmp_path_factory.mktemp("image")).path("hf"))


@pytest.mark.parametrize(
    "command", ["predict", "evaluate", "extract", "reconstruct", "attention", "export"]
)
def test_commands_open_a_checkpoint_once(command, counted, models, videos, tmp_path):
    clip, out = str(videos / "walk" / "clip.mp4"), str(tmp_path / "out")
    model = models["pretrained" if command == "reconstruct" else "vivit"]
    arguments = {
        "predict": (clip, "--model", model, "--stride", "1"),
        "evaluate": ("--model", model, "--data", f"{videos}/list.txt"),
        "extract": (clip, "--model", model, "--out", f"{out}.npz", "--frame-stride", "1"),
        "reconstruct": (clip, "--model", model, "--out", f"{out}.png", "--stride", "1"),
        "attention": (clip, "--model", model, "--out", f"{out}.png", "--stride", "1"),
        "export": (model, "--out", f"{out}.stablehlo"),
    }
    (videos / "list.txt").write_text("walk/clip.mp4 1\n")

    def run():
        assert main([command, *arguments[command]]) == 0

    assert counted(run) == (1, 1)


MAE = "videomae-v1-base-kinetics400-finetune"
VIVIT_B = "vivit-b-16x2-kinetics400"


def recipe_of(name, start, **config):
    recipe = recipe_named(name)
    model = ModelSettings(preset=recipe.model.preset, config=config, start=start)
    return dataclasses.replace(recipe, model=model, evaluation=EvalSettings(resize=256))


@pytest.mark.parametrize("what", ["same family", "pre-trained", "image ViT", "resized ViViT"])
def test_finetune_opens_its_start_once(what, counted, models, image_vit):
    recipe = {
        "same family": lambda: recipe_of(MAE, models["start"]),
        "pre-trained": lambda: recipe_of(MAE, models["start pretrained"]),
        "image ViT": lambda: recipe_of(VIVIT_B, image_vit, **_fields_of_image(image_vit)),
        "resized ViViT": lambda: recipe_of(VIVIT_B, models["vivit"], num_frames=8),
    }[what]()
    assert counted(lambda: starting_model(recipe, ("a", "b", "c", "d"))) == (1, 1)


def _fields_of_image(image_vit):
    """The image model's sizes, which a recipe has to have, and few frames."""
    found = vivit_jax.init_from_image_model(image_vit, {"num_frames": 4}).model.config
    names = (
        "image_size", "num_frames", "tubelet_size", "hidden_size", "num_hidden_layers",
        "num_attention_heads", "intermediate_size", "qkv_bias", "num_channels",
    )  # fmt: skip
    return {name: getattr(found, name) for name in names}


def test_pretraining_opens_its_start_once(counted, models):
    recipe = recipe_of("videomae-v1-base-kinetics400-pretrain", models["start pretrained"])
    assert counted(lambda: starting_model(recipe)) == (1, 1)


def test_functions_open_a_checkpoint_once(counted, models, image_vit):
    calls = {
        "from_pretrained": lambda: vivit_jax.from_pretrained(models["vivit"]),
        "VideoClassifier": lambda: vivit_jax.VideoClassifier.from_pretrained(models["vivit"]),
        "init_from_pretraining": lambda: vivit_jax.init_from_pretraining(
            models["pretrained"], {"num_labels": 3}
        ),
        "init_from_image_model": lambda: vivit_jax.init_from_image_model(
            image_vit, {"num_frames": 4}
        ),
        "init_from_video_model": lambda: vivit_jax.init_from_video_model(
            models["vivit"], {"num_frames": 8}
        ),
    }
    assert {name: counted(call) for name, call in calls.items()} == dict.fromkeys(calls, (1, 1))


def test_an_opened_checkpoint_is_not_opened_again(counted, models):
    opened = open_source(models["vivit"])
    assert counted(lambda: vivit_jax.from_pretrained(opened, num_labels=3)) == (0, 0)
    assert counted(lambda: opened.changed(["num_frames=6"], dtype="bfloat16")) == (0, 0)


def test_what_is_counted(counted, models):
    """The check can fail: two loads are two opens."""

    def twice():
        for _ in range(2):
            vivit_jax.from_pretrained(models["vivit"])

    assert counted(twice) == (2, 2)
