# SPDX-License-Identifier: Apache-2.0
"""Evaluation of several views against a loop over videos and views, on any mesh."""

import contextlib
import dataclasses
import json
import os
from types import SimpleNamespace

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow, random_params
from tiny import config_of

import vivit_jax
import vivit_jax.train
from vivit_jax import param_tree
from vivit_jax.data.datasets.dataset import Dataset, Example, from_objects, read_views
from vivit_jax.data.transforms.augment import resize_shortest
from vivit_jax.errors import UserError
from vivit_jax.models.build import abstract_params
from vivit_jax.recipes.recipe import EvalSettings, MaskSettings
from vivit_jax.train import eval_views, evaluation
from vivit_jax.train.evaluation import (
    Answer,
    _gathered,
    best_classes,
    conditions,
    evaluate,
    evaluate_reconstruction,
    model_labels,
    outcomes_of,
    unreadable_clips,
)
from vivit_jax.train.sharding import make_mesh, param_shardings, parse_mesh

ONE, EIGHT = "data=1", "data=2,fsdp=4"
EXPLICIT = "data=4,fsdp=2"  # of explicit axes, which are taken as automatic
VIDEOMAE = vivit_jax.VideoProcessor.named("videomae-imagenet", size=16, crop_size=16)
SCENIC = vivit_jax.VideoProcessor.named("vivit-scenic", size=16, crop_size=16)
SIX = EvalSettings(clips=2, crops=3, sampler="linspace", stride=2, resize=26)
LABELS = (3, 0, 3, 1, 4, 3)
BAD = 2  # the number of the video that cannot be read


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five arrays of several lengths and shapes, wide and tall, and a file that is not an array."""
    folder, examples = tmp_path_factory.mktemp("videos"), []
    rng = np.random.default_rng(1)
    shapes = [(30, 28, 40), (7, 40, 28), None, (19, 26, 33), (16, 64, 30), (12, 28, 28)]
    for i, (shape, label) in enumerate(zip(shapes, LABELS, strict=True)):
        path = folder / f"{i}.npy"
        if shape is None:
            path.write_bytes(b"no video")
        else:
            t, h, w = shape
            coarse = rng.integers(0, 256, (t, h // 7 + 1, w // 7 + 1, 3))
            frames = coarse.repeat(7, 1).repeat(7, 2)[:, :h, :w] * 0.8
            frames = (frames + rng.integers(0, 50, frames.shape)).astype(np.uint8)
            np.save(path, frames)
        examples.append(Example(str(path), label))
    return Dataset(tuple(examples), None, "list.txt")


@pytest.fixture(scope="module")
def classifier():
    model = vivit_jax.VideoMAEForVideoClassification(config_of("mae cls"))
    return model, jax.tree.map(jnp.asarray, random_params(model, 0.5))


def run(classifier, dataset, settings=SIX, processor=VIDEOMAE, mesh=ONE, **options):
    model, params = classifier
    devices = make_mesh(parse_mesh(mesh, 1 if mesh == ONE else 8))
    place = param_shardings(model, devices)
    if mesh == EXPLICIT:
        devices = jax.make_mesh(devices.axis_sizes, devices.axis_names)
        place = jax.tree.map(lambda leaf: jax.NamedSharding(devices, leaf.spec), place)
    params = jax.device_put(params, place)
    return evaluate(model, params, dataset, settings, processor, mesh=devices, **options)


def views(example, settings, rounding=np.floor):
    """uint8 [t, 24, 16, 3] for each clip and, in it, each crop; and the frames of the clips."""
    clips, indices = read_views(
        example,
        num_frames=6,
        stride=settings.stride,
        sampler=settings.sampler,
        clips=settings.clips,
    )
    found = []
    for clip in clips:
        whole = resize_shortest(clip, settings.resize)
        down, across = whole.shape[1] - 24, whole.shape[2] - 16
        for j in range(settings.crops):
            share = j / (settings.crops - 1) if settings.crops > 1 else 0.5
            tall = whole.shape[1] > whole.shape[2]
            top, left = (share * down, across / 2) if tall else (down / 2, share * across)
            top, left = int(rounding(top)), int(rounding(left))
            found.append(whole[:, top : top + 24, left : left + 16])
    return found, indices


def imagenet(frames):
    return (frames / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]


def naive(classifier, dataset, settings, normalise=imagenet, rounding=np.floor):
    """(average over the views, frames) of each video, one view at a time."""
    model, params = classifier
    logits_of = jax.jit(lambda pixels: model.apply({"params": params}, pixels).logits[0])
    answers = []
    for i, example in enumerate(dataset.examples):
        if i == BAD:
            continue
        found, indices = views(example, settings, rounding)
        total = 0
        for view in found:
            logits = np.asarray(logits_of(normalise(view)[None].astype(np.float32)), np.float64)
            if settings.average == "softmax":
                logits = np.exp(logits - logits.max())
                logits /= logits.sum()
            total = total + logits / len(found)
        answers.append((total, indices))
    return answers


def scores(result, settings):
    kept = np.stack([answer.scores for answer in result.answers if answer.error is None])
    return np.exp(kept) if settings.average == "softmax" else kept


@pytest.fixture(scope="module")
def expected(classifier, dataset):
    return naive(classifier, dataset, SIX)


@pytest.fixture(scope="module")
def result(classifier, dataset):
    return run(classifier, dataset)


def test_the_public_function_takes_all_devices_and_says_how_far_it_is(
    classifier, dataset, result, monkeypatch
):
    told = []

    @contextlib.contextmanager
    def live_line(name):
        yield lambda *counts: told.append((name, *counts))

    monkeypatch.setattr(evaluation, "live_line", live_line)
    found = vivit_jax.train.evaluate(*classifier, dataset, SIX, VIDEOMAE)
    assert found.metrics == pytest.approx(result.metrics)
    assert told == [("videos", 6, 6)]  # 64 views at once on 8 devices, 36 in all


def test_softmax_averaged_over_the_views_is_that_of_a_loop(result, expected, dataset):
    found = scores(result, SIX)
    np.testing.assert_allclose(found, np.stack([s for s, _ in expected]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    kept = [answer for answer in result.answers if answer.error is None]
    for answer, (_, indices) in zip(kept, expected, strict=True):
        np.testing.assert_array_equal(answer.indices, indices)
    labels = [label for i, label in enumerate(LABELS) if i != BAD]
    right = [int(s.argmax()) == label for (s, _), label in zip(expected, labels, strict=True)]
    # Of 5 classes there is no top 5.
    assert result.metrics == {
        "accuracy": pytest.approx(np.mean(right)),
        "videos": 5,
        "unreadable": 1,
    }
    assert 0 < sum(right) < 5  # or it would say little
    (found,) = outcomes_of(config_of("mae cls"), dataset, result)
    assert found.right.tolist() == right
    assert found.accuracy == pytest.approx(result.metrics["accuracy"], abs=1e-6)
    assert [(each.label, each.clips) for each in found.per_class() if each.clips] == [
        (0, 1), (1, 1), (3, 2), (4, 1),
    ]  # fmt: skip
    assert list(found.clips) == [f"{i}.npy" for i in range(6) if i != BAD]
    np.testing.assert_allclose(found.confidences, [s.max() for s, _ in expected], rtol=1e-4)


def test_each_view_has_its_own_answer(result, classifier, dataset):
    """In the order of clips and, in them, crops."""
    model, params = classifier
    found = [answer.views for answer in result.answers if answer.error is None]
    for i, answers in zip((0, 1, 3, 4, 5), found, strict=True):
        pixels = [imagenet(view) for view in views(dataset.examples[i], SIX)[0]]
        logits = jax.vmap(lambda x: model.apply({"params": params}, x[None]).logits[0])(
            np.stack(pixels).astype(np.float32)
        )
        assert answers.tolist() == [[int(best)] for best in logits.argmax(-1)]
    assert len({int(answer) for each in found for answer in each[:, 0]}) > 1


def test_a_data_set_object_is_evaluated_like_a_list(result, classifier, dataset):
    pairs = [(example.path, example.label) for example in dataset.examples]
    found = run(classifier, from_objects(pairs))
    assert found.metrics == result.metrics
    assert "2.npy" in str(found.answers[BAD].error) and BAD == 2


def test_the_average_is_over_all_views(result, expected, classifier, dataset):
    """The comparison above sees a view more or less, and softmax instead of logits."""
    fewer = naive(classifier, dataset, dataclasses.replace(SIX, crops=1))
    assert (
        np.abs(np.subtract(*(np.stack([s for s, _ in x]) for x in (fewer, expected)))).max() > 0.01
    )
    logits = dataclasses.replace(SIX, average="logits")
    other = np.stack([s for s, _ in naive(classifier, dataset, logits)])
    other = np.exp(other) / np.exp(other).sum(-1, keepdims=True)
    assert np.abs(other - scores(result, SIX)).max() > 0.01


def test_logits_averaged_as_scenic_does_are_those_of_a_loop(classifier, dataset):
    """Whose middle crop is rounded up, and whose pixels lie in [-1, 1]."""
    settings = EvalSettings(clips=3, crops=3, sampler="loop", stride=2, resize=27, average="logits")
    found = scores(run(classifier, dataset, settings, SCENIC), settings)

    def normalise(frames):
        return frames / 127.5 - 1

    for rounding, near in ((np.ceil, True), (np.floor, False)):
        other = np.stack([s for s, _ in naive(classifier, dataset, settings, normalise, rounding)])
        assert np.allclose(found, other, rtol=1e-4, atol=1e-4) == near


@pytest.mark.parametrize(
    ("mesh", "at_once"),
    mostly_slow(
        [(ONE, 1), (ONE, 5), (EIGHT, None), (EIGHT, 1), (EXPLICIT, 5)],
        *((ONE, 1), (EIGHT, None), (EXPLICIT, 5)),
    ),
)
def test_neither_views_at_once_nor_a_mesh_changes_the_result(
    classifier, dataset, result, mesh, at_once
):
    other = run(classifier, dataset, mesh=mesh, views_at_once=at_once, threads=1)
    np.testing.assert_allclose(scores(other, SIX), scores(result, SIX), rtol=1e-4, atol=1e-6)
    assert other.metrics == result.metrics


def test_a_video_that_cannot_be_read_is_named(result, dataset):
    errors = [answer.error for answer in result.answers]
    assert [i for i, error in enumerate(errors) if error] == [BAD]
    assert errors[BAD].startswith(f"{dataset.examples[BAD].path}: not an array")
    assert result.answers[BAD].scores is None and result.answers[BAD].indices is None


def test_a_video_of_other_channels_is_named(classifier, dataset, tmp_path):
    np.save(tmp_path / "4.npy", np.zeros((8, 30, 30, 4), np.uint8))
    examples = (Example(str(tmp_path / "4.npy"), 0), dataset.examples[0])
    found = run(classifier, Dataset(examples, None, "x"), views_at_once=8)
    assert found.answers[0].error == f"{tmp_path}/4.npy has 4 channels, the model takes 3"
    assert found.metrics["videos"] == 1


HEADS = dict(num_labels=7, class_splits=(3, 4), split_names=("noun", "verb"))


def test_several_heads_are_averaged_by_their_logits(dataset):
    model = vivit_jax.VideoMAEForVideoClassification(config_of("mae cls", **HEADS))
    params = random_params(model, 0.5)
    pairs = [(0, 3), (2, 1), (0, 0), (1, 1), (2, 2), (2, 0)]
    examples = zip(dataset.examples, pairs, strict=True)
    labelled = Dataset(
        tuple(dataclasses.replace(e, label=pair) for e, pair in examples), None, "list.txt"
    )
    settings = dataclasses.replace(SIX, average="logits", clips=1)
    loop = np.stack([s for s, _ in naive((model, params), labelled, settings)])
    # So that some are right: the verb of every second video and the noun of every third.
    kept = [example for i, example in enumerate(labelled.examples) if i != BAD]
    nouns, verbs = loop[:, :3].argmax(-1), loop[:, 3:].argmax(-1)
    told = {
        example.path: (
            int(nouns[i] + (i % 3 != 0)) % 3,
            int(verbs[i] + i % 2) % 4,
        )
        for i, example in enumerate(kept)
    }
    labelled = Dataset(
        tuple(dataclasses.replace(e, label=told.get(e.path, e.label)) for e in labelled.examples),
        None,
        "list.txt",
    )
    found = run((model, params), labelled, settings)
    np.testing.assert_allclose(scores(found, settings), loop, rtol=1e-4, atol=1e-4)
    among_five = []
    for row, example in zip(loop, kept, strict=True):
        noun, verb = told[example.path]
        joint = np.add.outer(*(x - np.log(np.exp(x).sum()) for x in (row[:3], row[3:])))
        among_five.append((joint > joint[noun, verb]).sum() < 5)
    assert found.metrics == {
        "noun_accuracy": pytest.approx(2 / 5),
        "verb_accuracy": pytest.approx(3 / 5),
        "noun-verb_accuracy": pytest.approx(1 / 5),
        "noun-verb_accuracy_top_5": pytest.approx(np.mean(among_five)),
        "videos": 5,
        "unreadable": 1,
    }
    assert best_classes(model.config, found.answers[0].scores) == [nouns[0], verbs[0]]
    with pytest.raises(UserError, match="'softmax' is for one head; .*--average logits"):
        run((model, params), labelled, SIX)
    with pytest.raises(UserError, match="1 label for each clip, the model has 2 heads"):
        run((model, params), dataset, settings)


def folders(names, labels):
    examples = tuple(Example(f"{i}.npy", label) for i, label in enumerate(labels))
    return Dataset(examples, names, "videos/")


def test_folders_are_numbered_as_the_model_numbers_its_classes(caplog):
    config = config_of("mae cls", id2label=("walk", "run", "jump", "fly", "sleep"))
    some = model_labels(folders(("fly", "run", "walk"), (0, 0, 2, 1)), config)
    assert [example.label for example in some.examples] == [3, 3, 0, 1]
    assert some.classes == config.labels and model_labels(some, config) == some
    with pytest.raises(UserError, match="1 of 3 names not among the model's classes: swim; "):
        model_labels(folders(("fly", "swim", "walk"), (0, 0, 2, 1)), config)
    # A model that does not name its classes, or a list of numbers, is taken by number.
    unnamed, names = config_of("mae cls"), ("e", "d", "c", "b", "a")
    caplog.clear()
    by_order = model_labels(folders(names, (4, 1)), unnamed)
    assert [example.label for example in by_order.examples] == [4, 1]
    assert model_labels(by_order, unnamed) == by_order
    assert [line.message for line in caplog.records] == [
        "the model does not name its classes: those of videos/ are taken for them in their order, "
        "e for 0 and so on"
    ]
    with pytest.raises(UserError, match="names 2 classes, the model has 5 without names, so that"):
        model_labels(folders(names[:2], (0, 1)), unnamed)
    numbers = folders(None, (4, 0))
    assert model_labels(numbers, config) == numbers


def test_what_processes_say_of_videos_they_cannot_read_comes_together(monkeypatch):
    """Also of a path that is no UTF-8."""
    from jax.experimental import multihost_utils

    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: x[None])
    views = SimpleNamespace(videos=2, dataset=range(2), count=1, settings=SIX)
    error = os.fsdecode(b"caf\xff\xc3\xa9.npy: no such file")
    scores, indices = np.arange(5, dtype=np.float32), np.zeros((2, 6), np.int32)
    best = np.arange(6, dtype=np.int32)[:, None]
    both = _gathered(
        [Answer(None, None, error), Answer(scores, indices, None, best)],
        views,
        config_of("mae cls"),
    )
    assert both[0].error == error and both[1].error is None
    np.testing.assert_array_equal(both[1].scores, scores)
    np.testing.assert_array_equal(both[1].views, best)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ((0, 5), "has labels 0 to 5, the model has classes 0 to 4"),
        ((-1, 2), "has labels -1 to 2"),
        ((None, None), "has no labels for each clip"),
    ],
)
def test_labels_that_the_model_has_not_are_told(classifier, labels, words):
    with pytest.raises(UserError, match=words):
        run(classifier, folders(None, labels))


def test_what_cannot_be_evaluated_is_told(classifier, dataset):
    only_bad = Dataset(dataset.examples[BAD : BAD + 1], None, "list.txt")
    with pytest.raises(UserError, match="none of the 1 video of list.txt could be read: .*2.npy"):
        run(classifier, only_bad, views_at_once=8)
    with pytest.raises(UserError, match="views_at_once is 0, expected at least 1"):
        run(classifier, dataset, views_at_once=0)
    small = dataclasses.replace(SIX, resize=20)
    found = run(classifier, dataset, small)
    told = [answer.error for answer in found.answers if answer.error]
    assert found.metrics["unreadable"] == len(told) > 1
    assert any("smaller than the crop" in text and "evaluation.resize" in text for text in told)


def test_an_error_that_is_not_foreseen_is_one_videos(classifier, dataset, monkeypatch):
    whole, path = run(classifier, dataset), dataset.examples[0].path

    def fails(example, **how):
        if example.path == path:
            raise ValueError("31 is not a valid Type")
        return read_views(example, **how)

    monkeypatch.setattr(eval_views, "read_views", fails)
    found = run(classifier, dataset)
    assert found.metrics["unreadable"] == 2 and found.metrics["videos"] == 4
    told = unreadable_clips(dataset, found)
    assert list(told) == [path, dataset.examples[BAD].path]
    assert told[path].startswith(f"{path}: ValueError: 31 is not a valid Type (unforeseen, in ")
    for i in range(1, 6):
        if i != BAD:
            np.testing.assert_array_equal(found.answers[i].scores, whole.answers[i].scores)


def test_pixels_are_those_of_the_processor():
    from vivit_jax.train.normalise import normaliser

    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    plain = dict(do_resize=False, do_center_crop=False)
    for name in ("videomae-imagenet", "vivit-scenic"):
        processor = vivit_jax.VideoProcessor.named(name, **plain)
        np.testing.assert_allclose(
            normaliser(processor)(frames[None]), processor(frames), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    ("kind", "mesh"), mostly_slow([("tube", EIGHT), ("dual", ONE)], ("tube", EIGHT))
)
def test_reconstruction_is_the_model_s_own_loss_of_one_video_at_a_time(dataset, kind, mesh):
    """Whatever the mesh: what hides a video depends on its number only."""
    model = vivit_jax.VideoMAEForPreTraining(
        config_of("mae pretraining", image_size=(16, 16), patch_size=4)
    )
    params = random_params(model, 0.3)
    settings = dataclasses.replace(SIX, resize=20)
    draw = {"tube": vivit_jax.tube_mask, "dual": vivit_jax.dual_mask}[kind]
    loss_of = jax.jit(lambda pixels, mask: model.apply({"params": params}, pixels, mask).loss)
    losses = []
    for i, example in enumerate(dataset.examples):
        if i == BAD:
            continue
        clips, _ = read_views(example, num_frames=6, stride=2, sampler="linspace", clips=1)
        whole = resize_shortest(clips[0], 20)
        top, left = ((side - 16) // 2 for side in whole.shape[1:3])
        pixels = imagenet(whole[:, top : top + 16, left : left + 16])
        key = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), i)
        mask = draw(key, 1, model.config.grid, 0.5)
        losses.append(float(loss_of(pixels[None].astype(np.float32), mask)))
    devices = make_mesh(parse_mesh(mesh, 8 if mesh == EIGHT else 1))
    placed = jax.device_put(params, param_shardings(model, devices))
    masks = MaskSettings(kind=kind, ratio=0.5)
    found = evaluate_reconstruction(model, placed, dataset, settings, masks, VIDEOMAE, mesh=devices)
    loss = pytest.approx(np.mean(losses), rel=1e-5)
    assert found.metrics == {"loss": loss, "videos": 5, "unreadable": 1}
    (told,) = unreadable_clips(dataset, found).items()
    assert told[0] == dataset.examples[BAD].path and told[0] in told[1]
    assert np.ptp(losses) > 1e-3


def test_the_hash_is_of_the_weights_and_not_of_their_layout(classifier):
    model, params = classifier
    flat = {path: np.asarray(leaf) for path, leaf in param_tree.flatten(params).items()}
    assert any(leaf.shape[0] == 3 for path, leaf in flat.items() if "/layers/" in path)
    looped = {}
    for path, leaf in flat.items():
        before, inside, after = path.partition("/layers/")
        for i in range(3 if inside else 0):
            looped[f"{before}/layers_{i}/{after}"] = leaf[i]
        if not inside:
            looped[path] = leaf
    config = dataclasses.replace(model.config, scan_layers=False)
    shapes = param_tree.flatten(abstract_params(vivit_jax.VideoMAEForVideoClassification(config)))
    assert {p: s.shape for p, s in shapes.items()} == {p: v.shape for p, v in looped.items()}
    digest = param_tree.params_hash(params)
    assert len(digest) == 64 and param_tree.params_hash(param_tree.unflatten(looped)) == digest
    path = "backbone/layers_1/mlp_in/bias"
    nudged = looped | {path: np.nextafter(looped[path], np.inf, dtype=np.float32)}
    cast = looped | {path: looped[path].astype(jnp.bfloat16)}
    swapped = looped | {path: looped["backbone/layers_2/mlp_in/bias"]}
    swapped["backbone/layers_2/mlp_in/bias"] = looped[path]
    digests = {
        param_tree.params_hash(param_tree.unflatten(other)) for other in (nudged, cast, swapped)
    }
    assert len(digests | {digest}) == 4


def test_conditions_are_all_that_moves_the_number(classifier):
    values = conditions(*classifier, SIX, VIDEOMAE)
    assert json.loads(json.dumps(values)) == values
    assert values["views"] == dataclasses.asdict(SIX)
    assert values["views"]["resize"] == 26 and values["views"]["average"] == "softmax"
    assert (values["frames"], values["size"]) == (6, [24, 16])
    assert (values["dtype"], values["param_dtype"]) == ("float32", "float32")
    assert values["matmul_precision"] == "highest" and values["attention"] == "auto"
    assert values["attention_chosen"] == "chunked"
    assert values["params_sha256"] == param_tree.params_hash(classifier[1])
    assert values["decoder"]["av"] == av.__version__
    assert values["decoder"]["libavcodec"] == list(av.library_versions["libavcodec"])
    assert values["processor"]["image_mean"] == [0.485, 0.456, 0.406]
    assert values["resize"].startswith("bilinear") and values["jax"] == jax.__version__
    assert values["vivit_jax"] == vivit_jax.__version__ and values["device"].startswith("8 x ")
