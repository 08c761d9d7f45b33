# SPDX-License-Identifier: Apache-2.0
"""All reasons against a run in one message, with settings that fit."""

import dataclasses
import re
import shlex

import numpy as np
import pytest
from tiny_recipes import FINETUNE, changed

from vivit_jax.data.datasets.dataset import from_objects
from vivit_jax.errors import UserError
from vivit_jax.recipes import apply_settings, check, recipe_named, to_dict
from vivit_jax.recipes.refusals import Refusal, refuse, set_text, value_of
from vivit_jax.train.agreement import checked_clips
from vivit_jax.train.sharding import parse_mesh
from vivit_jax.train.step import check_division

K400 = "videomae-v1-base-kinetics400-finetune"  # 384 videos x 2 repeats, groups of 12
FRAMES = np.zeros((2, 4, 4, 3), np.uint8)
ONE, EIGHT = parse_mesh("data=1", 1), parse_mesh("data=8", 8)


def clips(count):
    return from_objects([(FRAMES, i % 4) for i in range(count)])


def reasons(recipe, data, sizes=ONE, **options):
    """The reasons against a run, and the settings that fit as a shell splits them."""
    with pytest.raises(UserError) as caught:
        checked_clips(recipe, sizes, data, **options)
    text, _, fitting = str(caught.value).partition("what fits: --set ")
    lines = [line.removeprefix("  - ") for line in text.strip().splitlines()]
    return lines[1:] if len(lines) > 1 else lines, shlex.split(fitting)


def unchecked(name, *assignments):
    return apply_settings(recipe_named(name), assignments, agree=False)


def test_the_forty_clips_of_the_issue():
    """Batch 384, groups of 12 that the smaller batch would break, and a warm-up of all epochs."""
    recipe = unchecked(K400, "train.epochs=5")
    found, fitting = reasons(recipe, clips(40))
    assert len(found) == 3
    for words in (
        "has 40 clips, train.batch_size is 384",
        "optim.warmup_epochs 5 leaves nothing of train.epochs 5",
        "are not whole groups of augment.mix_group 12",
    ):
        assert any(words in reason for reason in found), words
    fits = apply_settings(recipe, fitting)  # checks it
    train, _ = checked_clips(fits, ONE, clips(40))
    assert len(train) == 40
    check_division(fits, ONE)
    assert fits.train.batch_size == 8 and fits.augment.mix_group in (2, 4, 8)
    # Not 384 times 5e-4 / 256 scaled down in proportion, at which nothing is learned.
    assert fits.optim.lr_batch is None and 5e-5 < fits.optim.lr < 5e-4


def test_one_reason_is_one_line():
    recipe = unchecked(K400, "train.batch_size=30", "augment.mixup=0", "augment.cutmix=0")
    with pytest.raises(UserError) as caught:
        checked_clips(recipe, ONE, clips(20))
    text = str(caught.value)
    assert "\n" not in text and text.count("what fits: --set train.batch_size=4 ") == 1


@pytest.mark.parametrize("devices", [ONE, EIGHT], ids=["one", "eight"])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 40, 500])
@pytest.mark.parametrize(
    "settings",
    [
        ("train.accumulate=4",),
        ("train.accumulate=5", "optim.min_lr=1"),
        ("train.batch_size=7", "data.repeats=1"),
        ("train.batch_size=12", "train.accumulate=3", "augment.mix_group=6"),
    ],
)
def test_what_fits_fits(devices, count, settings):
    """Or nothing does: fewer clips than devices."""
    recipe, data = unchecked(K400, "train.epochs=4", *settings), clips(count)
    found, fitting = reasons(recipe, data, devices)
    if not fitting:
        assert count < 8 and devices is EIGHT
        return
    fits = apply_settings(recipe, fitting)
    checked_clips(fits, devices, data)
    check_division(fits, devices)
    assert fits.train.batch_size <= count
    named = re.findall(r"[a-z]+\.[a-z_]+", " ".join(found))
    assert {text.partition("=")[0] for text in fitting} <= {*named, "optim.lr", "optim.min_lr",
        "optim.lr_batch", "augment.mixup", "augment.cutmix", "train.accumulate"}  # fmt: skip


def test_data_and_start_that_are_missing_are_told_together(tmp_path):
    recipe = changed(
        FINETUNE,
        data__train=str(tmp_path / "no clips"),
        model__start=str(tmp_path / "no model"),
        optim__warmup_epochs=9,
    )
    found, fitting = reasons(recipe, None)
    assert fitting == ["optim.warmup_epochs=0.4"]
    assert sorted(bool(re.search("no (clips|model)", line)) for line in found) == [
        False,
        True,
        True,
    ]


def test_early_stop_needs_held_out_clips():
    recipe = changed(FINETUNE, train__patience=3, train__batch_size=8)
    found, fitting = reasons(recipe, clips(16))
    assert "train.patience 3 ends a run by its scores on held-out clips" in found[0]
    train, held = checked_clips(apply_settings(recipe, fitting), ONE, clips(16))
    assert (len(train), len(held)) == (12, 4)
    checked_clips(recipe, ONE, clips(16), clips(4))


def test_held_out_clips_are_drawn_or_named_not_both():
    with pytest.raises(UserError, match="data.hold_out 0.2 holds clips of data.train out"):
        check(changed(FINETUNE, data__hold_out=0.2, data__validation="test"))
    for value in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match="data.hold_out is .*, expected above 0 and below 1"):
            check(changed(FINETUNE, data__hold_out=value))


def test_every_value_out_of_range_is_told():
    with pytest.raises(UserError) as caught:
        check(changed(FINETUNE, optim__lr=0.0, train__epochs=0, augment__flip=2.0))
    text = str(caught.value)
    assert text.startswith("3 reasons against this run:\n")
    assert all(name in text for name in ("optim.lr", "train.epochs", "augment.flip"))


def test_reasons_without_a_way_out_promise_none():
    def rules(recipe):
        yield Refusal("never", {"train.epochs": recipe.train.epochs + 1})

    with pytest.raises(UserError) as caught:
        refuse(FINETUNE, [rules], [Refusal("no file")])
    assert str(caught.value).splitlines() == [
        "2 reasons against this run:",
        "  - no file",
        "  - never",
    ]


@pytest.mark.parametrize("name", [K400, "vivit-l-16x2-fe-ssv2", "demo-finetune"])
def test_settings_as_text_read_back(name):
    """Every value that --set may be asked for."""
    recipe = recipe_named(name)
    paths = [
        f"{section}.{field}"
        for section, fields in to_dict(recipe).items()
        if isinstance(fields, dict)
        for field in fields
        if field not in ("config", "root", "start")
    ]
    values = {path: value_of(recipe, path) for path in paths}
    values |= {"optim.freeze": (r"layers_\d{1,2}/.*", "head/.*"), "data.train": "a b's.csv"}
    assignments = shlex.split(set_text(values))
    other = dataclasses.replace(recipe_named("demo-vivit"), model=recipe.model)
    read = apply_settings(other, assignments, agree=False)
    for path, value in values.items():
        assert value_of(read, path) == value, path
