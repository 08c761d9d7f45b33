# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a ViViT of another size, a checkpoint's preprocessing, its classes."""

import dataclasses
import json
import re

import flax.serialization
import fsspec
import jax
import numpy as np
import pytest
import scipy.ndimage
from helpers import mostly_slow, random_params
from tiny import SMALL_VIDEOMAE, SMALL_VIVIT
from tiny_recipes import FINETUNE, PRETRAIN, VIEWS, changed

import vivit_jax
from checkpoints_convert.__main__ import main as convert
from checkpoints_convert.card import Base
from checkpoints_convert.start.from_video import init_from_video_model
from vivit_jax import param_tree
from vivit_jax.config import VideoMAEConfig, VivitConfig
from vivit_jax.config_base import READING
from vivit_jax.errors import UserError
from vivit_jax.files import block_cache
from vivit_jax.recipes import RECIPES, apply_settings, from_dict, recipe_named, to_dict
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import EvalSettings, ModelSettings
from vivit_jax.train import loop
from vivit_jax.train.prepare import listed, prepare
from vivit_jax.train.sharding import make_mesh, parse_mesh
from vivit_jax.train.start.initial_model import (
    _FIXED,
    described_base,
    description,
    of_the_function,
    starting_model,
)
from vivit_jax.train.start.preprocessing import described_preprocessing
from vivit_jax.train.storage.run_directory import RunDirectory, saved_recipe

NAMES = ("blue", "green", "red", "white")
FIRST_TOKEN = VideoMAEConfig(**SMALL_VIDEOMAE, use_mean_pooling=False)
LARGE = SMALL_VIVIT | dict(image_size=48, num_frames=8)
FACTORISED = LARGE | dict(attention_type="factorised_encoder", num_temporal_layers=5)


def saved(directory, config, processor=None):
    """A classifier's directory and its params by per-layer path."""
    kinds = {
        VivitConfig: vivit_jax.VivitForVideoClassification,
        VideoMAEConfig: vivit_jax.VideoMAEForVideoClassification,
    }
    model = kinds[type(config)](config)
    params = random_params(model)
    vivit_jax.save_pretrained(directory, model, params, processor)
    return str(directory), by_layer(params)


def by_layer(params):
    flat = {path: np.asarray(value) for path, value in param_tree.flatten(params).items()}
    return {
        path: flat[slot.leaf] if slot.layer is None else flat[slot.leaf][slot.layer]
        for path, slot in param_tree.slots(param_tree.shapes_of(flat)).items()
    }


@pytest.fixture(scope="module")
def kinetics(tmp_path_factory):
    """A factorised encoder with 5 temporal layers and 6 x 6 tokens of each of 4 frames."""
    directory = tmp_path_factory.mktemp("start") / "kinetics"
    return saved(directory, VivitConfig(**FACTORISED, num_labels=7))


def vivit_recipe(start, **config):
    model = ModelSettings(preset="vivit-b-16x2-fe-kinetics400", config=config, start=start)
    views = dataclasses.replace(VIEWS, resize=64)
    return dataclasses.replace(FINETUNE, processor="vivit-scenic", model=model, evaluation=views)


def zoomed(table, old, new):
    """Scenic's resize of the positions after the class token's; table [1, 1 + tokens, d]."""
    grid = table[0, 1:].reshape(*old, -1)
    factors = [b / a for a, b in zip(old, new, strict=True)] + [1]
    patches = scipy.ndimage.zoom(grid.astype(np.float64), factors, order=1)
    return np.concatenate([table[0, :1], patches.reshape(-1, table.shape[-1])])[None]


def test_a_vivit_of_another_size_starts_a_run(kinetics, caplog):
    """As Something-Something's from Kinetics: larger frames, fewer temporal layers."""
    directory, theirs = kinetics
    wanted = dict(image_size=64, num_temporal_layers=2, drop_path_rate=0.3)
    found = starting_model(vivit_recipe(directory, **wanted), NAMES)
    config, ours = found.model.config, by_layer(found.params)
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.grid, config.num_labels) == ((4, 8, 8), 4)
    moved = {"backbone/spatial/pos_embed", "head/kernel", "head/bias"}
    for path in ours.keys() - moved:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
    left_out = {path for path in theirs if re.match(r"backbone/temporal/layers_[234]/", path)}
    assert len(left_out) == 3 * 16 and theirs.keys() - ours.keys() == left_out
    table = theirs["backbone/spatial/pos_embed"]
    np.testing.assert_allclose(
        ours["backbone/spatial/pos_embed"], zoomed(table, (6, 6), (8, 8)), rtol=1e-6, atol=1e-6
    )
    line = (
        "image_size 64 (there 48), num_temporal_layers 2 (there 5): positions of 4x6x6 tokens "
        "(t x h x w) resized to 4x8x8, linearly; temporal layers 0 to 1 of 5 taken"
    )
    assert found.report.count(line) == 1 and "head/kernel" in found.report
    assert sum(line in text for text in caplog.messages) == 1
    assert "temporal_transformer" not in found.report.split("freshly")[0]


def test_longer_clips_and_a_deeper_stage(kinetics):
    """Positions of time are resized; blocks that the checkpoint lacks are drawn, and named."""
    directory, theirs = kinetics
    found = starting_model(vivit_recipe(directory, num_frames=14, num_temporal_layers=7), NAMES)
    ours = by_layer(found.params)
    for path, value in theirs.items():
        if path not in ("backbone/temporal/pos_embed", "head/kernel", "head/bias"):
            np.testing.assert_array_equal(ours[path], value, err_msg=path)
    table = theirs["backbone/temporal/pos_embed"]
    np.testing.assert_allclose(
        ours["backbone/temporal/pos_embed"], zoomed(table, (4,), (7,)), rtol=1e-6, atol=1e-6
    )
    drawn = [ours[f"backbone/temporal/layers_{i}/mlp_in/kernel"] for i in (5, 6)]
    limit = np.sqrt(6 / (16 + 32))  # Glorot's, as the paper's code draws them
    assert all(limit * 0.8 < np.abs(kernel).max() <= limit for kernel in drawn)
    assert (drawn[0] != drawn[1]).any()
    assert "temporal layers 0 to 4 taken, 5 to 6 drawn" in found.report
    named = next(line for line in found.report.splitlines() if "freshly initialised" in line)
    assert "backbone/temporal/layers_{5-6}/mlp_in/kernel" in named


@pytest.mark.parametrize("attention", mostly_slow(["joint", "factorised_self_attention"], "joint"))
def test_a_joint_table_is_resized_in_time_and_space(attention, tmp_path):
    config = VivitConfig(**LARGE, attention_type=attention, num_labels=4, id2label=NAMES)
    directory, theirs = saved(tmp_path / "model", config)
    model, params, report = init_from_video_model(directory, dict(image_size=24, num_frames=12))
    ours, path = by_layer(params), "backbone/pos_embed"
    first = int(attention == "joint")
    grid = theirs[path][0, first:].reshape(4, 6, 6, 16)
    patches = scipy.ndimage.zoom(grid.astype(np.float64), (6 / 4, 0.5, 0.5, 1), order=1)
    np.testing.assert_array_equal(ours[path][0, :first], theirs[path][0, :first])
    np.testing.assert_allclose(ours[path][0, first:], patches.reshape(-1, 16), rtol=1e-6, atol=1e-6)
    for other in ours.keys() - {path}:  # the classifier too: its classes are the same
        np.testing.assert_array_equal(ours[other], theirs[other], err_msg=other)
    assert model.config.labels == NAMES and not report.fresh and not report.dropped
    shape = (1, 12, 24, 24, 3)
    out = jax.eval_shape(lambda x: model.apply({"params": params}, x).logits, np.zeros(shape))
    assert out.shape == (1, 4)


@pytest.mark.parametrize("attention", mostly_slow(["joint", "factorised_encoder"], "joint"))
def test_a_file_of_scenic_starts_a_run_of_another_size(attention, tmp_path):
    """It says neither the size of frames nor, of joint attention, how many there are."""
    sizes = dict(LARGE, attention_type=attention, num_labels=7)
    directory, theirs = saved(tmp_path / "model", VivitConfig(**sizes))
    assert convert(["convert", directory, str(tmp_path / "scenic"), "--to", "scenic"]) == 0
    (file,) = (path for path in (tmp_path / "scenic").iterdir() if path.suffix != ".json")
    alone = file.rename(tmp_path / "alone")
    recipe = vivit_recipe(str(alone), image_size=64, num_frames=8)
    if attention == "joint":
        model = dataclasses.replace(recipe.model, preset="vivit-b-16x2-kinetics400")
        recipe = dataclasses.replace(recipe, model=model)
    found = starting_model(recipe, NAMES)
    assert found.model.config.grid == (4, 8, 8)
    ours, path = by_layer(found.params), "backbone/patch_embed/kernel"
    np.testing.assert_array_equal(ours[path], theirs[path])
    assert "image_size 48" in found.report and "taken of square frames" in found.report
    assert "positions of 4x6x6 tokens (t x h x w) resized to 4x8x8" in found.report
    # At its own size too.
    same = starting_model(changed(recipe, model__config=dict(num_frames=8)), NAMES)
    assert same.model.config.grid == (4, 6, 6) and "resized to" not in same.report


def test_a_damaged_file_of_scenic_is_told_as_one(tmp_path):
    directory, _ = saved(tmp_path / "model", VivitConfig(**LARGE, num_labels=7))
    assert convert(["convert", directory, str(tmp_path / "scenic"), "--to", "scenic"]) == 0
    (file,) = (path for path in (tmp_path / "scenic").iterdir() if path.suffix != ".json")
    state = flax.serialization.msgpack_restore(file.read_bytes())
    nested = state
    while "embedding" not in nested:
        (nested,) = (v for v in nested.values() if isinstance(v, dict) and v)
    del nested["embedding"]
    (tmp_path / "alone").write_bytes(flax.serialization.msgpack_serialize(state))
    with pytest.raises(UserError, match="embedding/kernel"):
        starting_model(vivit_recipe(str(tmp_path / "alone")), NAMES)


def test_another_depth_in_space_is_refused(kinetics):
    recipe = vivit_recipe(kinetics[0], num_hidden_layers=1)
    with pytest.raises(UserError, match=r"num_hidden_layers 1 \(there 2\).*num_hidden_layers=2$"):
        starting_model(recipe, NAMES)


def test_equal_sizes_start_as_they_are(kinetics):
    found = starting_model(vivit_recipe(kinetics[0], image_size=48), NAMES)
    assert "resized to" not in found.report and "taken" not in found.report


@pytest.mark.parametrize("name", [n for n in RECIPES if not n.startswith("demo-")])
def test_every_recipe_can_start_from_what_it_says(name):
    """That the stated start has the widths and heads of the recipe, and what else has to fit."""
    text = " ".join(RECIPES[name].__doc__.split()).partition("Starts from: ")[2]
    text = text.partition(" Source: ")[0]
    recipe = recipe_named(name)
    config = model_config(recipe)
    starts = re.findall(r"videomae-v\d-[\w-]+", text)
    if text == "nothing.":
        assert recipe.task == "pretrain"
        return
    if starts:
        other = recipe_named(starts[0])
        theirs = model_config(other)
        decoder = [field for field in _FIXED if field.startswith("decoder_")]
        same = [f for f in of_the_function(config, "classification") if f not in decoder]
        handed_over = other.task == "pretrain"
        same = [f for f in same if not (handed_over and f == "use_mean_pooling")]
        assert [f for f in same if getattr(config, f) != getattr(theirs, f)] == []
        if "cut to" in text:
            assert f"cut to {config.num_labels} classes" in text
        return
    # A ViViT: from an image model of its width, or from the large ones of Kinetics.
    sizes = {"ViT-B/16": (768, 12, 12, 3072), "ViT-L/16": (1024, 24, 16, 4096)}
    (image,) = {size for size in sizes if f" {size}, ImageNet-21k" in f" {text}"}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    assert tuple(getattr(config, n) for n in names) == sizes[image]
    assert config.tubelet_size == (2, 16, 16) and config.num_channels == 3
    if "of Kinetics" in text:
        theirs = model_config(recipe_named("vivit-l-16x2-fe-kinetics400"))
        free = ("image_size", "num_temporal_layers")
        same = [f for f in of_the_function(config, "classification") if f not in free]
        assert [f for f in same if getattr(config, f) != getattr(theirs, f)] == []
        # A recipe has to set the fields in which it differs: the start's own configuration applies.
        differs = {f: getattr(config, f) for f in (*free, "drop_path_rate")}
        differs = {f: v for f, v in differs.items() if v != getattr(theirs, f)}
        assert dict(recipe.model.config) == differs and "num_temporal_layers" in differs


def square(side, resize=None, **fields):
    return vivit_jax.VideoProcessor.named(
        "videomae-imagenet", size=resize or side, crop_size=side, **fields
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Directories of a VideoMAE for frames of 16 pixels, by the processor that is beside it."""
    root, made = tmp_path_factory.mktemp("small"), {}

    def directory(processor):
        key = json.dumps(processor.to_dict(), sort_keys=True)
        if key not in made:
            config = VideoMAEConfig(**SMALL_VIDEOMAE, num_labels=4, id2label=NAMES)
            made[key] = saved(root / str(len(made)), config, processor)[0]
        return made[key]

    return directory


# As the published recipe of 224 pixels, of a model that takes its sizes from the checkpoint.
PUBLISHED = dataclasses.replace(
    FINETUNE, model=ModelSettings(preset="videomae-base-kinetics400"), evaluation=EvalSettings()
)


def processor_notes(found):
    words = ("pixels", "resize", "crop", "processor")
    lines = found.report.splitlines()[1:]
    return [line.strip() for line in lines if any(word in line for word in words)]


@pytest.mark.parametrize(
    ("beside", "settings", "resize", "told"),
    [
        (square(16), [], 16, ["resize the shorter side to 16, as by the checkpoint's processor"]),
        (square(16, 20), [], 20, ["to 20, as by the checkpoint's processor, not to the recipe's"]),
        (square(16, 16), ["evaluation.resize=16"], 16, []),
        (square(16), ["evaluation.resize=18"], 18, ["resize 18 (there 16)"]),
        (
            square(16),
            ["evaluation.resize=224"],
            224,
            ["resize 224 (there 16)", "the middle 7% of a frame's shorter side"],
        ),
        (
            square(16, 18),
            ["model.config.image_size=32"],
            36,
            ["resize 36 (there 18), crop 32x32 (there 16x16)", "to 36, in proportion"],
        ),
        (square(16, 18), ["model.config.image_size=224"], 224, ["resize 224 (there 18)"]),
        (square(16, {"height": 16, "width": 20}), [], 16, ["(there 16x20)", "to 16, as by"]),
        (square(16, do_resize=False), [], 16, ["(there none)", "in proportion"]),
        (
            square(16, {"shortest_edge": 18, "longest_edge": 40}),
            [],
            18,
            ["(there longest_edge=40 shortest_edge=18)", "to 18, as by"],
        ),
        (
            square(16, {"max_height": 20, "max_width": 30}),
            [],
            20,
            ["(there max_height=20 max_width=30)", "to 20, as by"],
        ),
    ],
    ids=[
        "own",
        "margin",
        "same",
        "set",
        "little",
        "scaled",
        "preset",
        "squashed",
        "unresized",
        "bounded",
        "box",
    ],
)
def test_the_checkpoints_preprocessing_is_the_runs(beside, settings, resize, told, small):
    recipe = dataclasses.replace(PUBLISHED, model=dataclasses.replace(PUBLISHED.model, config={}))
    directory = small(beside)
    found = starting_model(apply_settings(recipe, [f"model.start={directory}", *settings]), NAMES)
    frames, side = found.preprocessing, found.model.config.image_size
    wanted = dict(size=resize, crop_size=side, do_resize=True)
    assert frames.processor == dataclasses.replace(beside, **wanted)
    assert frames.recipe.evaluation.resize == resize
    notes = processor_notes(found)
    assert len(notes) == len(told)
    for note, words in zip(notes, told, strict=True):
        assert words in note


def test_pixels_are_the_checkpoints_unless_the_processor_is_set(small):
    beside = square(16, image_mean=(0.4, 0.5, 0.6), resample=3)
    recipe = changed(PUBLISHED, model__start=small(beside), evaluation__resize=16)
    found = starting_model(recipe, NAMES)
    assert found.preprocessing.processor == beside
    note, of_filter = processor_notes(found)
    assert "image_mean (0.4, 0.5, 0.6) (there (0.485, 0.456, 0.406))" in note
    assert "resized bilinearly" in of_filter and "resample 3 (bicubic)" in of_filter
    kept = starting_model(apply_settings(recipe, ["processor=videomae-imagenet"]), NAMES)
    assert kept.preprocessing.processor == square(16)
    note, _ = processor_notes(kept)
    assert "image_mean (0.485, 0.456, 0.406) (there (0.4, 0.5, 0.6))" in note
    assert note.endswith("the recipe's processor=videomae-imagenet decides")


def test_a_checkpoint_of_another_model_than_the_presets_is_told(tmp_path, kinetics):
    """Its configuration counts, even where the recipe is of another kind of ViViT."""
    joint, _ = saved(tmp_path / "joint", VivitConfig(**LARGE, num_labels=4))
    found = starting_model(vivit_recipe(joint, num_hidden_layers=2), NAMES)
    assert found.model.config.attention_type == "joint"
    (line,) = (line for line in found.report.splitlines() if "not that of model.preset" in line)
    assert "vivit-b-16x2-fe-kinetics400: " in line
    for words in (
        "attention_type 'joint' (there 'factorised_encoder')",
        "hidden_size 16 (there 768)",
        "image_size 48 (there 224)",
    ):
        assert words in line
    assert "num_hidden_layers" not in line  # the recipe's own, compared with the checkpoint's
    assert "attention_type" not in starting_model(vivit_recipe(kinetics[0]), NAMES).report


def test_published_processors_that_agree_are_not_told(tmp_path):
    """Of the recipe's own sizes: 224 for VideoMAE, 256 and 224 for ViViT."""
    tiny = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    for name, config in (
        ("videomae-imagenet", VideoMAEConfig(**tiny, num_labels=4)),
        ("vivit-scenic", VivitConfig(**tiny, num_frames=2, num_labels=4)),
    ):
        processor = vivit_jax.VideoProcessor.named(name)
        directory, _ = saved(tmp_path / name, config, processor)
        published = {
            "videomae-imagenet": "videomae-v1-base-kinetics400-finetune",
            "vivit-scenic": "vivit-b-16x2-kinetics400",
        }
        found = starting_model(
            apply_settings(recipe_named(published[name]), [f"model.start={directory}"]), NAMES
        )
        assert processor_notes(found) == []
        assert found.preprocessing.processor == processor
        assert found.preprocessing.recipe == apply_settings(
            recipe_named(published[name]), [f"model.start={directory}"]
        )


def test_training_crops_follow_the_frames_of_the_model(tmp_path):
    """A ViViT recipe's 256 pixels for a crop of 224 are 74 for one of 64, scale jitter and all."""
    config = VivitConfig(**LARGE | dict(image_size=64), num_labels=4)
    processor = vivit_jax.VideoProcessor.named("vivit-scenic", size=64, crop_size=64)
    directory, _ = saved(tmp_path / "model", config, processor)
    recipe = apply_settings(recipe_named("vivit-b-16x2-kinetics400"), [f"model.start={directory}"])
    found = starting_model(recipe, NAMES)
    counting = found.preprocessing.recipe
    assert (counting.augment.resize, counting.evaluation.resize) == (74, 64)
    assert "augment.resize is 74 for frames of 64 pixels" in found.report
    by_hand = starting_model(apply_settings(recipe, ["augment.resize=80"]), NAMES)
    assert by_hand.preprocessing.recipe.augment.resize == 80
    with pytest.raises(UserError, match=r"augment.resize 70 .* leaves 63 pixels"):
        starting_model(apply_settings(recipe, ["augment.resize=70"]), NAMES)


def test_a_fresh_model_that_sees_little_is_told(caplog):
    recipe = changed(FINETUNE, evaluation__resize=40)
    assert "show the middle 40% of a frame's shorter side" in starting_model(recipe, NAMES).report
    assert len(caplog.messages) == 1
    caplog.clear()
    assert starting_model(FINETUNE, NAMES).report.count("\n") == 0 and not caplog.messages


def test_pretraining_goes_on_with_the_checkpoints_pixels(tmp_path):
    model = vivit_jax.VideoMAEForPreTraining(FIRST_TOKEN)
    beside = square(16, image_mean=(0.4, 0.5, 0.6))
    vivit_jax.save_pretrained(tmp_path / "model", model, random_params(model), beside)
    found = starting_model(changed(PRETRAIN, model__start=str(tmp_path / "model")))
    assert found.preprocessing.processor == beside


def test_a_run_goes_on_with_the_preprocessing_that_it_began_with(small, tmp_path):
    beside = square(16, 20, image_mean=(0.4, 0.5, 0.6))
    recipe = changed(PUBLISHED, model__start=small(beside))
    start = starting_model(recipe, NAMES)
    path = tmp_path / "model.json"
    path.write_text(json.dumps(description(start, "finetune")))
    found = described_preprocessing(path, recipe, start.model.config)
    assert found[:2] == start.preprocessing[:2] and found.processor == beside
    # Of a version before: as the recipe says, whatever is beside the start.
    values = json.loads(path.read_text())
    del values["preprocessing"]
    path.write_text(json.dumps(values))
    found = described_preprocessing(path, recipe, start.model.config)
    assert found.processor == square(16, 224) and found.recipe == recipe


def test_what_is_given_is_written_down_with_a_run(tmp_path):
    recipe = apply_settings(FINETUNE, ["evaluation.resize=16", "optim.lr=0.1"])
    assert recipe.given == ("evaluation.resize",) and "given" not in to_dict(recipe)
    run = RunDirectory(tmp_path / "run", recipe, resume=False)
    run.begin(None)
    run.close()
    assert saved_recipe(tmp_path / "run").given == ("evaluation.resize",)
    # A recipe that says nothing of it is the same one.
    RunDirectory(tmp_path / "run", FINETUNE_WITH_LR, resume=True).close()
    values = to_dict(recipe)
    del values["model"]["classes"]  # as versions before wrote it
    assert from_dict(values) == recipe
    with pytest.raises(UserError, match="given is .*expected a list, each entry one of"):
        apply_settings(FINETUNE, ["given=optim.lr"])


FINETUNE_WITH_LR = changed(FINETUNE, optim__lr=0.1)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Folders of four classes, and a list of the same clips with numbers up to 2."""
    root, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    lines = []
    for i, name in enumerate(NAMES):
        (root / "folders" / name).mkdir(parents=True)
        path = root / "folders" / name / "0.npy"
        np.save(path, rng.integers(0, 255, (6, 40, 64, 3), np.uint8))
        lines.append(f"folders/{name}/0.npy {min(i, 2)}")
    (root / "list.txt").write_text("\n".join(lines))
    return root


def prepared(recipe, *settings):
    """The setup of a run, before its first step, and what it starts from."""
    mesh = make_mesh(parse_mesh("data=1", 1))
    recipe = apply_settings(recipe, settings)
    setup, batches, start = prepare(recipe, mesh, None, listed(recipe))
    batches.close()
    return setup, start


def test_lists_are_read_through_the_cache_too(tmp_path, monkeypatch):
    """And what is found in tar files of others, which are looked through once."""
    for name in (block_cache.DIRECTORY, block_cache.GIB):
        monkeypatch.setenv(name, "")  # and what the recipe sets is undone
    fsspec.filesystem("memory").pipe("/b/data/list.txt", b"a.mp4 0\nb.mp4 1\n")
    data = dataclasses.replace(
        FINETUNE.data, train="memory://b/data/list.txt", cache_dir=str(tmp_path), validation=None
    )
    listed(dataclasses.replace(FINETUNE, data=data))
    assert len([*tmp_path.glob("*/*")]) == 1


def data_recipe(clips, which, start=None):
    plain = dataclasses.replace(FINETUNE.augment, mixup=0.0, cutmix=0.0, mix_group=None)
    recipe = dataclasses.replace(FINETUNE, augment=plain)
    return changed(recipe, data__train=str(clips / which), model__start=start, train__batch_size=4)


def test_how_clips_are_read_is_of_the_model(clips, tmp_path, caplog):
    """The recipe's, whatever the checkpoint's; a run of a version without it goes on as it was."""
    config = VideoMAEConfig(**SMALL_VIDEOMAE, frame_stride=3, view_sampler="loop")
    start, _ = saved(tmp_path / "start", config)
    for sampler, kept, written, stride in (
        ("loop", "loop", {"view_sampler": "loop", "frame_stride": 1}, 1),
        ("hold", "linspace", {"frame_stride": 1}, 1),
        ("segments", "segments", {"view_sampler": "segments", "frame_stride": 3}, 3),
    ):
        recipe = data_recipe(clips, "folders", start)
        setup, found = prepared(recipe, f"data.sampler={sampler}")
        for config in (setup.model.config, found.model.config):
            assert (config.view_sampler, config.frame_stride) == (kept, stride)
        told = "--set data.stride=3 evaluation.stride=3 takes those" in found.report
        assert told == (sampler != "segments")
        values = description(found, "finetune")
        said = values["config"]
        assert {k: v for k, v in said.items() if k in READING} == written
        for name in written:  # as versions before wrote it
            del said[name]
        (tmp_path / "model.json").write_text(json.dumps(values))
        mesh = make_mesh(parse_mesh("data=1", 1))
        again, batches, _ = prepare(
            setup.recipe, mesh, tmp_path / "model.json", listed(setup.recipe)
        )
        batches.close()
        assert again.model.config.view_sampler == kept
        assert again.model.config.frame_stride == (4 if sampler == "segments" else stride)
    usual, found = prepared(recipe, "data.sampler=linspace", "data.stride=4")
    assert not usual.model.config.to_dict().keys() & set(READING)
    with pytest.raises(UserError, match="a run saves what data.stride is: set data.stride=2 inst"):
        prepared(recipe, "model.config.frame_stride=2")


def test_a_number_of_classes_that_folders_contradict_is_an_error(clips, small):
    for start in (None, small(square(16))):
        recipe = data_recipe(clips, "folders", start)
        with pytest.raises(UserError) as caught:
            prepared(recipe, "model.config.num_labels=3")
        message = str(caught.value)
        assert "model.config.num_labels is 3" in message and str(clips / "folders") in message
        assert "4 classes (blue, green, red, white)" in message and "\n" not in message
        setup, _ = prepared(recipe, "model.config.num_labels=4")
        assert setup.model.config.labels == NAMES
        # What a recipe says by itself of its data set is no such claim.
        three = changed(recipe, model__config=recipe.model.config | dict(num_labels=3))
        assert prepared(three)[0].model.config.labels == NAMES


def test_names_that_folders_contradict_are_an_error(clips):
    recipe = data_recipe(clips, "folders")
    with pytest.raises(UserError, match="not among the model's classes: white"):
        prepared(recipe, "model.config.id2label=red,blue,green,black")
    setup, _ = prepared(recipe, "model.config.id2label=red,blue,green,white")
    assert setup.model.config.labels == ("red", "blue", "green", "white")


def test_numbers_make_as_many_classes_as_they_go_up_to(clips, small):
    for start in (None, small(square(16))):
        recipe = data_recipe(clips, "list.txt", start)
        setup, found = prepared(recipe)
        assert setup.model.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        assert found.params["head"]["kernel"].shape == (16, 3)
        assert ("--set model.classes=checkpoint" in found.report) == (start is not None)
        more, _ = prepared(recipe, "model.config.num_labels=9")
        assert more.model.config.num_labels == 9
        with pytest.raises(UserError, match="has labels 0 to 2, the model has classes 0 to 1"):
            prepared(recipe, "model.config.num_labels=2")
    # No word of how many there are.
    (clips / "one.txt").write_text("folders/red/0.npy 2")
    assert (
        prepared(data_recipe(clips, "one.txt"), "train.batch_size=1")[0].model.config.num_labels
        == 4
    )
    held_out = changed(recipe, data__validation=str(clips / "more.txt"))
    (clips / "more.txt").write_text("folders/red/0.npy 5")
    assert prepared(held_out)[0].model.config.num_labels == 6


def test_a_number_far_beyond_is_an_error(clips):
    (clips / "typo.txt").write_text("folders/red/0.npy 0\nfolders/blue/0.npy 20230817")
    with pytest.raises(UserError, match="typo.txt: its labels go up to 20230817.*num_labels="):
        prepared(data_recipe(clips, "typo.txt"))


def test_the_checkpoints_classes_are_kept_by_choice(clips, small):
    directory = small(square(16))
    _, theirs = vivit_jax.from_pretrained(directory)
    for which in ("list.txt", "folders"):
        setup, found = prepared(data_recipe(clips, which, directory), "model.classes=checkpoint")
        assert setup.model.config.labels == NAMES
        np.testing.assert_array_equal(found.params["head"]["kernel"], theirs["head"]["kernel"])
    for settings, message in (
        (["model.config.num_labels=3"], "num_labels is 3, but model.classes 'checkpoint' keeps"),
        (["model.start=none"], "but there is no model.start; set model.classes=data"),
    ):
        with pytest.raises(UserError, match=message):
            prepared(
                data_recipe(clips, "list.txt", directory), "model.classes=checkpoint", *settings
            )


def test_a_start_without_a_classifier_keeps_no_classes(clips, tmp_path):
    model = vivit_jax.VideoMAEForPreTraining(FIRST_TOKEN)
    vivit_jax.save_pretrained(tmp_path / "model", model, random_params(model))
    recipe = data_recipe(clips, "list.txt", str(tmp_path / "model"))
    with pytest.raises(UserError, match="holds no classifier; set model.classes=data"):
        prepared(recipe, "model.classes=checkpoint")


def test_as_many_classes_of_other_names_are_others(small):
    """Folders make a fresh classifier, numbers keep it without its names."""
    directory = small(square(16))
    recipe = changed(FINETUNE, model__start=directory)
    _, theirs = vivit_jax.from_pretrained(directory)
    kernel = theirs["head"]["kernel"]
    same = starting_model(recipe, NAMES)
    np.testing.assert_array_equal(same.params["head"]["kernel"], kernel)
    assert "model.classes" not in same.report
    other = starting_model(recipe, ("a", "b", "c", "d"))
    assert other.model.config.labels == ("a", "b", "c", "d")
    assert not np.allclose(other.params["head"]["kernel"], kernel)
    assert "head/kernel" in other.report and "model.classes=checkpoint" in other.report
    numbers = starting_model(recipe, None, 4)
    assert numbers.model.config.labels == tuple(f"LABEL_{i}" for i in range(4))
    np.testing.assert_array_equal(numbers.params["head"]["kernel"], kernel)
    assert "names of as many classes are left out" in numbers.report


@pytest.mark.slow
def test_a_run_validates_and_saves_what_the_checkpoint_sees(clips, small, tmp_path):
    """From 224 pixels of the recipe it would show a small part of each frame."""
    directory = small(square(16))
    recipe = changed(
        PUBLISHED,
        model__start=directory,
        model__config={},
        data__train=str(clips / "folders"),
        data__validation=str(clips / "folders"),
        train__batch_size=4,
        train__steps=1,
        augment__mix_group=4,
    )
    mesh = parse_mesh("data=1", 1)
    outcome = loop.train(recipe, tmp_path / "run", mesh_sizes=mesh, say=lambda text: None)
    assert vivit_jax.VideoProcessor.from_pretrained(outcome.model) == square(16)
    again = changed(recipe, train__steps=2)
    outcome = loop.train(again, tmp_path / "run", resume=True, mesh_sizes=mesh, say=lambda _: None)
    assert vivit_jax.VideoProcessor.from_pretrained(outcome.model) == square(16)
    assert saved_recipe(tmp_path / "run").evaluation.resize == 224


def test_what_the_weights_come_from_is_kept_for_a_resumed_runs_cards(tmp_path):
    """With the licence of their card, which a fine-tuned model keeps."""
    directory, _ = saved(tmp_path / "start", VivitConfig(**SMALL_VIVIT))
    (tmp_path / "start/README.md").write_text("---\nlicense: cc-by-nc-4.0\nbase_model: a/b\n---\n")
    start = starting_model(vivit_recipe(directory, **SMALL_VIVIT))
    assert start.base == Base(name="start", hub_id="a/b", licence={"license": "cc-by-nc-4.0"})
    held = description(start, "finetune")
    file = tmp_path / "model.json"
    file.write_text(json.dumps(held))
    assert described_base(file) == start.base
    file.write_text(json.dumps({k: v for k, v in held.items() if k != "base"}))
    assert described_base(file) is None  # as of older versions
    for wrong in ("b", {"name": 1}, {"name": "x", "licence": []}, {"hub": "a/b"}):
        file.write_text(json.dumps(held | {"base": wrong}))
        with pytest.raises(UserError, match="base is .*, expected name, hub_id and licence"):
            described_base(file)
