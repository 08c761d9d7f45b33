# SPDX-License-Identifier: Apache-2.0
"""Settings of recipes as text and as JSON."""

import copy
import dataclasses
import json

import pytest

from vivit_jax.errors import UserError
from vivit_jax.recipes import (
    RECIPES,
    apply_settings,
    check,
    from_dict,
    model_config,
    recipe_named,
    to_dict,
)

FINETUNE = "videomae-v1-base-kinetics400-finetune"  # 384 videos x 2 repeats, groups of 12
PRETRAIN = "videomae-v1-base-kinetics400-pretrain"
VIVIT = "vivit-b-16x2-kinetics400"


def applied(*assignments, recipe=FINETUNE):
    return apply_settings(recipe_named(recipe), assignments)


def value_at(recipe, path):
    for name in path.split("."):
        recipe = recipe[name] if isinstance(recipe, dict) else getattr(recipe, name)
    return recipe


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optim.lr=1e-4", 1e-4),
        ("optim.lr=1", 1.0),
        ("optim.layer_decay=none", None),
        ("optim.layer_decay=0.9", 0.9),
        ("optim.lr_batch=None", None),
        ("optim.schedule=constant", "constant"),
        ("train.epochs=30", 30),
        ("train.epochs=1e3", 1000),
        ("train.steps = 5", 5),
        ("data.train=lists/a=b.txt", "lists/a=b.txt"),
        ("data.train='with space.txt'", "with space.txt"),
        ("data.train=", ""),
        ("data.root=/videos", "/videos"),
        ("model.start=MCG-NJU/videomae-base", "MCG-NJU/videomae-base"),
        ("name=mine", "mine"),
        ("augment.crop_scale=0.5,1", (0.5, 1.0)),
        ("augment.crop_scale=(0.5, 1.0)", (0.5, 1.0)),
        ("augment.jitter_scale=[0.9,1.33]", (0.9, 1.33)),
        ("optim.freeze=['backbone/patch_embed/.*']", ("backbone/patch_embed/.*",)),
        ("optim.freeze=backbone/patch_embed/.*,head/.*", ("backbone/patch_embed/.*", "head/.*")),
        (r"optim.freeze=['layers_\d{1,2}/.*', '\bx']", (r"layers_\d{1,2}/.*", r"\bx")),
        ("optim.freeze='head/.*'", ("head/.*",)),
        ("optim.freeze=[]", ()),
        ("optim.freeze=", ()),
        ("optim.lr_rules=[['head/.*', 10], ('.*', .5)]", (("head/.*", 10.0), (".*", 0.5))),
        ("model.config.drop_path_rate=0.2", 0.2),
        ("model.config.num_labels=10", 10),
        ("model.config.dtype=bfloat16", "bfloat16"),
        ("model.config.norm_pix_loss=False", False),
        ("model.config.image_size=224,224", (224, 224)),
        ("model.config.patch_size=14", 14),
        ("model.config.image_mean=none", None),
    ],
)
def test_a_value_is_read_by_the_type_of_its_field(assignment, value):
    path = assignment.partition("=")[0].strip()
    found = value_at(applied(assignment), path)
    assert found == value and type(found) is type(value)


def test_settings_change_what_they_name_and_nothing_else():
    before, after = recipe_named(FINETUNE), applied("optim.lr=1e-4", "model.config.num_labels=7")
    assert to_dict(before) == to_dict(recipe_named(FINETUNE))
    changed = to_dict(after)
    assert changed["optim"].pop("lr") == 1e-4
    assert changed["model"]["config"].pop("num_labels") == 7
    expected = to_dict(before)
    del expected["optim"]["lr"]
    assert changed == expected


def test_a_model_s_fields_are_those_of_a_preset_that_is_set_with_them():
    settings = ["model.preset=vivit-b-16x2-fe-kinetics400", "model.config.num_temporal_layers=2"]
    recipe = applied(*settings[::-1], recipe=VIVIT)
    assert model_config(recipe).temporal_layers == 2
    with pytest.raises(UserError, match="model.config of videomae-v1-base-ssv2 has no field 'num_"):
        applied("model.preset=videomae-v1-base-ssv2", settings[1], recipe=VIVIT)


def test_another_number_of_classes_drops_the_preset_s_heads():
    recipe = applied("model.config.num_labels=5", recipe="vivit-l-16x2-fe-epic-kitchens")
    assert (model_config(recipe).num_labels, model_config(recipe).class_splits) == (5, None)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["optim.lr"], "'optim.lr' is not a setting, expected section.field=value"),
        (["=3"], "is not a setting"),
        (["optim.lr=1", "optim.lr=2"], "optim.lr is set twice, to '1' and to '2'"),
        (["optim.lrr=1"], r"optim has no field 'lrr'; did you mean lr\?.* known: algorithm, lr,"),
        (["lr=1"], r"there is no field 'lr'; did you mean optim\.lr\?"),
        (["optimm.lr=1"], r"no field 'optimm.lr'; did you mean optim\.lr\?"),
        (["optimm.x=1"], "no field 'optimm.x'; did you mean optim"),
        (["optim=1"], "optim is a section; known: algorithm"),
        (["optim.lr.x=1"], "optim has no field 'lr.x'"),
        (["name.x=1"], "there is no field 'name.x'"),
        (["model.config=1"], r"set field by field, as in model\.config\.drop_path_rate"),
        (["model.config.drop_path=1"], "has no field 'drop_path'; did you mean drop_path_rate"),
        (
            ["model.preset=videomae-v1-bas"],
            r"'videomae-v1-bas', which is not a preset; did you mean",
        ),
        (["optim.lr=fast"], "optim.lr is 'fast', expected a number"),
        (["optim.lr=nan"], "optim.lr is 'nan', expected a number"),
        (["optim.lr=inf"], "optim.lr is 'inf', expected a number"),
        (["optim.lr=none"], "optim.lr is 'none', expected a number"),
        (["train.epochs=2.5"], "train.epochs is '2.5', expected a whole number"),
        (["train.epochs=true"], "train.epochs is 'true', expected a whole number"),
        (["train.steps=x"], "train.steps is 'x', expected a whole number or none"),
        (["optim.algorithm=adam"], "is 'adam', expected one of 'adamw', 'sgd'"),
        (["augment.crop_scale=1"], r"is '1', expected \[a number, a number\]"),
        (["augment.crop_scale=a,b"], "augment.crop_scale is 'a,b'"),
        (["optim.lr_rules=head:3"], r"is 'head:3', expected a list, each entry \[a text, a number"),
        (["optim.freeze=['a', 3]"], "expected a list, each entry a text"),
        (["optim.freeze=['a"], "expected a list, each entry a text"),
        (["model.config.qkv_bias=1"], "model.config.qkv_bias is '1', expected true or false"),
        (["model.config.hidden_size=7"], "model.config: hidden_size 7 is not divisible"),
        (["model.config.dtype=int8"], "model.config: dtype must be one of"),
    ],
)
def test_what_is_wrong_with_a_setting(assignments, message):
    with pytest.raises(UserError, match=message):
        applied(*assignments)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["optim.lr=0"], "optim.lr is 0.0, expected above 0"),
        (["optim.clip=-1"], "optim.clip is -1.0, expected above 0"),
        (["optim.weight_decay=-1"], "optim.weight_decay is -1.0, expected 0 or more"),
        (["optim.layer_decay=1.1"], "optim.layer_decay is 1.1, expected above 0 and at most 1"),
        (["optim.b2=1"], "optim.b2 is 1.0, expected in 0 to below 1"),
        (["optim.ema=1"], "optim.ema is 1.0, expected above 0 and below 1"),
        (["optim.min_lr=1"], "optim.min_lr 1 is above optim.lr 0.0005: set optim.min_lr too"),
        (["optim.freeze=(x"], r"optim.freeze: '\(x' is not a regular expression"),
        (["optim.lr_rules=[['x', -1]]"], "optim.lr_rules: the factor of 'x' is -1.0"),
        (["train.epochs=0"], "train.epochs is 0, expected 1 or more"),
        (["train.epochs=5"], "warmup_epochs 5 leaves nothing of train.epochs 5: set optim.warmup"),
        (
            ["augment.mix_group=none", "train.batch_size=5", "data.repeats=1"],
            "5 clips are not whole",
        ),
        (["train.accumulate=192"], "768 clips, 4 in each of train.accumulate 192, are not whole"),
        (["train.accumulate=5"], "384 does not divide into train.accumulate 5"),
        (["train.keep=0"], "train.keep is 0"),
        (["train.batch_size=5"], "5 x data.repeats 2 = 10 clips .* set augment.mix_group too"),
        (["augment.mix_group=3"], "augment.mix_group is 3, expected even"),
        (["augment.flip=1.5"], "augment.flip is 1.5, expected in 0 to 1"),
        (["augment.smoothing=1"], "augment.smoothing is 1.0, expected in 0 to below 1"),
        (["augment.crop_scale=1,0.5"], r"\(1.0, 0.5\), expected two areas"),
        (["augment.crop_ratio=0,1"], "expected two factors above 0, in order"),
        (["augment.rand_augment=m7"], "augment.rand_augment is 'm7', expected"),
        (["augment.rand_augment=rand-m7"], "augment.rand_augment is 'rand-m7' without"),
        (
            ["augment.resize=200", "augment.crop=random"],
            "leaves 200 pixels to crop the model's 224",
        ),
        (["model.config.image_size=320"], "set evaluation.resize=320 or more too"),
        (["data.max_bad_share=2"], "data.max_bad_share is 2.0"),
        (["processor=imagenet"], "processor: .*imagenet"),
        (["task=pretrain"], "task is 'pretrain' but model.preset .* is for classification"),
        (["model.preset=videomae-v1-base"], "task is 'finetune' but .* is for pretraining"),
    ],
)
def test_values_that_make_no_sense_name_their_field(assignments, message):
    with pytest.raises(UserError, match=message):
        applied(*assignments)


def test_a_batch_that_does_not_fit_is_mended_as_the_message_says():
    applied("train.batch_size=5", "augment.mix_group=2")
    applied("train.batch_size=5", "augment.mix_group=none")
    applied("train.batch_size=5", "augment.mixup=0", "augment.cutmix=0")
    applied("train.accumulate=64")  # 12 clips in each part


def test_scenic_s_smallest_scale_leaves_enough_to_crop_from():
    applied("augment.resize=249", recipe=VIVIT)  # x 0.9 = 224.1
    with pytest.raises(UserError, match="augment.resize 248 .* leaves 223 pixels"):
        applied("augment.resize=248", recipe=VIVIT)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "smoothing"])
def test_pretraining_has_no_labels_to_mix_or_smooth(name):
    with pytest.raises(UserError, match=f"augment.{name} is 0.5, .* set augment.{name}=0"):
        applied(f"augment.{name}=0.5", recipe=PRETRAIN)


def test_check_looks_at_the_types_of_a_recipe_made_in_python():
    recipe = recipe_named(FINETUNE)
    assert check(recipe) is recipe
    for section, name, value, message in (
        ("train", "epochs", 1.5, "train.epochs is 1.5, expected a whole number"),
        ("augment", "flip", True, "augment.flip is True, expected a number"),
        ("model", "config", {"drop_path_rate": "a"}, "model.config.drop_path_rate is 'a'"),
        ("model", "config", {"droppath": 0.1}, "model.config has no field 'droppath'"),
        ("model", "config", None, "model.config is None, expected an object of fields"),
    ):
        part = dataclasses.replace(getattr(recipe, section), **{name: value})
        with pytest.raises(UserError, match=message):
            check(dataclasses.replace(recipe, **{section: part}))
    with pytest.raises(UserError, match="optim is None, expected OptimSettings"):
        check(dataclasses.replace(recipe, optim=None))


@pytest.mark.parametrize("name", RECIPES)
def test_json_brings_a_recipe_back_exactly(name):
    recipe = recipe_named(name)
    assert from_dict(json.loads(json.dumps(to_dict(recipe), allow_nan=False))) == recipe


def test_json_brings_back_what_was_set():
    recipe = applied(
        "optim.lr_rules=[['head/.*', 10]]",
        "optim.freeze=a,b",
        "model.config.image_size=224,224",
        "augment.jitter_scale=0.9,1.33",
        "optim.lr=0.1",
        "optim.min_lr=0",
    )
    again = from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe and again.optim.lr_rules == (("head/.*", 10.0),)
    assert again.model.config["image_size"] == (224, 224)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.lr", "1e-4", "optim.lr is '1e-4', expected a number"),
        ("optim.freeze", "a", "optim.freeze is 'a', expected a list, each entry a text"),
        ("optim.lr_rules", [["a", 1, 2]], "optim.lr_rules is "),
        ("train.epochs", 3.0, "train.epochs is 3.0, expected a whole number"),
        ("train.epochs", 0, "train.epochs is 0, expected 1 or more"),
        ("train.epoch", 3, "train.epoch: there is no such field; did you mean epochs"),
        ("task", "train", "task is 'train', expected one of 'pretrain', 'finetune'"),
        ("optim", 3, "optim is 3, expected an object of fields"),
        ("model.config", [], r"model.config is \[\], expected an object of fields"),
        ("model.config.mlp_dim", 3, "model.config.mlp_dim: there is no such field"),
        ("model.config.num_labels", "3", "model.config.num_labels is '3', expected a whole number"),
        ("model.preset", None, "model.preset is None, expected a text"),
        ("model.preset", "x", "model.preset is 'x', which is not a preset"),
        ("version", 1, "version: there is no such field"),
    ],
)
def test_json_that_is_wrong_names_the_field(path, value, message):
    values = copy.deepcopy(to_dict(recipe_named(FINETUNE)))
    *parents, name = path.split(".")
    value_at_parent = value_at(values, ".".join(parents)) if parents else values
    value_at_parent[name] = value
    with pytest.raises(UserError, match=message):
        from_dict(values)


@pytest.mark.parametrize("path", ["name", "optim", "optim.lr", "model.preset", "model.config"])
def test_json_that_lacks_a_field_names_it(path):
    values = to_dict(recipe_named(FINETUNE))
    *parents, name = path.split(".")
    del (values[parents[0]] if parents else values)[name]
    with pytest.raises(UserError, match=f"^{path}: missing"):
        from_dict(values)
    with pytest.raises(UserError, match=r"a recipe is \[\], expected an object"):
        from_dict([])
