# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax probe`: the model that it writes, its numbers again elsewhere, and what it refuses."""

import dataclasses
import functools
import json
import os
import shutil

import numpy as np
import pytest
from commands import run_command
from helpers import mostly_slow, random_params
from huggingface_hub import ModelCard
from tiny import SMALL_VIDEOMAE, SMALL_VIVIT

import vivit_jax
from vivit_jax import param_tree
from vivit_jax.data.datasets.dataset import from_objects, read_dataset
from vivit_jax.data.datasets.synthetic import write_dataset
from vivit_jax.inference import probe_features
from vivit_jax.inference.probe import probe
from vivit_jax.inference.probe_data import sides_of
from vivit_jax.inference.probe_record import ProbeSettings
from vivit_jax.recipes.demo import demo_pretrain
from vivit_jax.recipes.recipe import EvalSettings
from vivit_jax.train.evaluation import evaluate
from vivit_jax.train.loop import train
from vivit_jax.train.sharding import make_mesh, parse_mesh

CLASSES = ("blue sky", "green", "red")
ONE = {"size": 16, "crop_size": {"height": 16, "width": 16}}
VIDEOMAE = vivit_jax.VideoProcessor.named("videomae-imagenet", **ONE)
SCENIC = vivit_jax.VideoProcessor.named("vivit-scenic", **ONE)


def save_clip(path, channel, seed, frames=9):
    """A clip with one channel brighter, but not in each clip."""
    rng = np.random.default_rng(seed)
    clip = rng.integers(0, 200, (frames, 20, 24, 3))
    clip[..., channel] += rng.integers(0, 56)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, clip.astype(np.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of classes with 10, 10 and 8 clips, 9 frames each, and a file that is no clip."""
    folder = tmp_path_factory.mktemp("data") / "my clips"
    for label, name in enumerate(CLASSES):
        for i in range(8 if label == 1 else 10):
            save_clip(folder / name / f"clip {i}.npy", 2 - label, 100 * label + i)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pre-trained VideoMAE and a ViViT with a classifier of other classes, both random."""
    folder = tmp_path_factory.mktemp("models")
    config = vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE, use_mean_pooling=False)
    model = vivit_jax.VideoMAEForPreTraining(config)
    vivit_jax.save_pretrained(folder / "videomae", model, random_params(model, 0.2), VIDEOMAE)
    model = vivit_jax.VivitForVideoClassification(
        vivit_jax.VivitConfig(**SMALL_VIVIT, num_labels=7)
    )
    vivit_jax.save_pretrained(folder / "vivit", model, random_params(model, 0.2), SCENIC)
    return folder


def probed(capsys, model, data, out, *args):
    status, printed, errors = run_command(
        capsys, "probe", "--model", model, "--data", data, "--out", out, "--stride", 2, *args
    )
    assert status == 0, errors
    return json.loads((out / "probe.json").read_text()), printed, errors


@pytest.fixture(scope="module")
def linear(models, data, tmp_path_factory):
    """The directory of a linear probe of a model: 2 clips x 2 crops, 6 videos held out."""
    out = tmp_path_factory.mktemp("probes")
    how = {
        "videomae": dict(sampler="linspace", average="softmax"),
        "vivit": dict(sampler="loop", average="logits"),
    }

    @functools.cache
    def of(name):
        views = EvalSettings(clips=2, crops=2, stride=2, resize=18, **how[name])
        probe(models / name, data, out / name, validation=0.25, views=views)
        return out / name

    return of


def held_out(data):
    """The clips that --validation 0.25 holds out."""
    side = sides_of(data, 0.25).held_out
    assert side is not None and len(side) == 6
    return side


def evaluated(directory, dataset):
    """The evaluation of a saved model with the views of its probe."""
    found = json.loads((directory / "probe.json").read_text())
    fields = ("clips", "crops", "stride", "sampler", "resize", "average")
    views = EvalSettings(**{name: found["protocol"][name] for name in fields})
    model, params = vivit_jax.from_pretrained(directory / "model")
    processor = vivit_jax.VideoProcessor.from_pretrained(directory / "model")
    mesh = make_mesh(parse_mesh("data=1", 1))
    return evaluate(model, params, dataset, views, processor, mesh=mesh), found


@pytest.mark.parametrize("name", mostly_slow(["videomae", "vivit"], "videomae"))
def test_the_saved_model_has_the_probes_scores(linear, data, name):
    """Of several views; feature scaling is part of the classifier."""
    dataset = held_out(data)
    result, found = evaluated(linear(name), dataset)
    labels = [example.label for example in dataset.examples]
    scores = np.stack([answer.scores for answer in result.answers])
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    loss = -logs[np.arange(len(labels)), labels].mean()
    assert result.metrics["accuracy"] == pytest.approx(found["held_out"]["accuracy"])
    assert loss == pytest.approx(found["held_out"]["loss"], rel=1e-5)  # measured 4e-7
    assert found["held_out"]["loss"] > 1e-3  # not saturated
    assert found["train"]["clips"] == 22 and found["classes"] == list(CLASSES)
    assert sum(each["clips"] for each in found["per_class"].values()) == 6
    assert len(found["trials"]) == 7 and found["folds"] == 5


def test_the_card_of_the_model_says_what_was_found(linear, data):
    out = linear("videomae")
    found = json.loads((out / "probe.json").read_text())
    card = ModelCard((out / "model" / "README.md").read_text("utf-8"))
    (result,) = card.data.eval_results
    held = found["held_out"]
    assert result.metric_value == round(held["accuracy"], 6)
    assert result.metric_args["standard_error"] == round(held["standard_error"], 6)
    assert result.metric_args["videos"] == held["clips"] == 6
    assert (
        "2 clips x 2 crops of 4 frames, 2 apart (the model's: 4)" in result.metric_args["protocol"]
    )
    assert "probed videomae: its weights are unchanged, and the head (linear" in card.text
    assert "4 frames, every 2nd, from the middle of the video" in card.text
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["frame_stride"] == 2  # the views', as evaluate then takes them
    assert "| held out | my clips | 6 | 3 |" in card.text and str(data.parent) not in card.content


@pytest.mark.parametrize("name", mostly_slow(["videomae", "vivit"], "videomae"))
def test_transformers_has_the_same_logits(linear, data, name):
    import torch
    import transformers

    model, params = vivit_jax.from_pretrained(linear(name) / "model")
    theirs = transformers.AutoModelForVideoClassification.from_pretrained(linear(name) / "model")
    assert [theirs.config.id2label[i] for i in range(3)] == list(CLASSES)
    processor = vivit_jax.VideoProcessor.from_pretrained(linear(name) / "model")
    clip = np.load(data / "red" / "clip 3.npy")[:4]
    pixels = processor(clip, input_data_format="channels_last")
    ours = np.asarray(model.apply({"params": params}, pixels).logits)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(np.moveaxis(pixels, -1, 2))).logits.numpy()
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)  # measured: 3.8e-6
    assert np.abs(expected).max() > 0.5


def test_an_attentive_model_has_the_probes_scores(capsys, models, data, tmp_path, monkeypatch):
    monkeypatch.setattr("vivit_jax.inference.probe_attentive.STEPS", 5)
    monkeypatch.setattr("vivit_jax.inference.probe_attentive.EPOCHS", 1)
    args = ("--head", "attentive", "--weight-decays", 0.1, "--folds", 2, "--validation", 0.25)
    found, printed, _ = probed(capsys, models / "vivit", data, tmp_path / "run", *args)
    assert "attentive head" in printed and "2 folds" in printed
    dataset = held_out(data)
    result, _ = evaluated(tmp_path / "run", dataset)
    assert result.metrics["accuracy"] == pytest.approx(found["held_out"]["accuracy"])
    logs = np.stack([answer.scores for answer in result.answers])
    logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
    labels = [example.label for example in dataset.examples]
    loss = -logs[np.arange(6), labels].mean()
    assert loss == pytest.approx(found["held_out"]["loss"], rel=1e-5)
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["model_type"] == "vivit_jax" and config["attentive_heads"] == 2
    best = vivit_jax.VideoClassifier.from_pretrained(tmp_path / "run/model")(
        np.load(data / "red/clip 0.npy"), stride=2
    )
    assert best[0]["label"] in CLASSES


class Counter:
    """Counts the clips whose features are computed, and may stop after some."""

    def __init__(self, monkeypatch, stop_after=None):
        self.clips, self._write = [], probe_features._write
        self._stop = stop_after
        monkeypatch.setattr(probe_features, "_write", self)

    def __call__(self, path, features, indices, example, settings):
        if len(self.clips) == self._stop:
            raise KeyboardInterrupt
        self.clips.append(
            os.path.relpath(example.path, os.path.dirname(os.path.dirname(example.path)))
        )
        self._write(path, features, indices, example, settings)


def test_an_interrupted_probe_goes_on_and_stale_features_are_not_used(
    capsys, caplog, models, data, tmp_path, monkeypatch
):
    mine, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, mine)
    with monkeypatch.context() as patch:
        counter = Counter(patch, stop_after=5)
        args = ("--model", models / "videomae", "--data", mine, "--out", out, "--stride", 2)
        status, _, errors = run_command(capsys, "probe", *args)
        assert status == 130 and len(counter.clips) == 5 and not (out / "probe.json").exists()
    counter = Counter(monkeypatch)
    found, printed, _ = probed(capsys, models / "videomae", mine, out)
    assert len(counter.clips) == 28 - 5
    whole = probe(
        models / "videomae", data, tmp_path / "whole", views=EvalSettings(stride=2, resize=16)
    )
    assert [t["accuracy"] for t in found["trials"]] == [t.accuracy for t in whole.trials]
    assert found["train"]["loss"] == whole.train.loss

    status, _, errors = run_command(capsys, "probe", *args)
    assert status == 2 and "holds a finished probe; --overwrite probes again" in errors
    counter.clips.clear()
    (mine / "red" / "clip 0.npy").rename(mine / "red" / "renamed.npy")
    state = (mine / "green" / "clip 1.npy").stat()
    save_clip(mine / "green" / "clip 1.npy", 1, 999)
    os.utime(mine / "green" / "clip 1.npy", ns=(state.st_atime_ns, state.st_mtime_ns))
    probed(capsys, models / "videomae", mine, out, "--overwrite")
    assert counter.clips == ["green/clip 1.npy"]  # equal in size and time, other content
    counter.clips.clear()
    damaged = next((out / "features").glob("*/*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    probed(capsys, models / "videomae", mine, out, "--overwrite")
    assert len(counter.clips) == 1 and f"{damaged} is damaged and is computed again" in caplog.text
    counter.clips.clear()
    probed(capsys, models / "videomae", mine, out, "--overwrite", "--clips", 2)
    assert len(counter.clips) == 28  # other views
    counter.clips.clear()
    weights = vivit_jax.from_pretrained(models / "videomae")
    flat = param_tree.flatten(weights[1])
    flat["backbone/patch_embed/bias"] += 1e-3
    other = tmp_path / "other"
    vivit_jax.save_pretrained(other, weights[0], param_tree.unflatten(flat), VIDEOMAE)
    probed(capsys, other, mine, out, "--overwrite")
    assert len(counter.clips) == 28  # other weights


def test_bad_and_short_clips_and_rare_classes_are_named(capsys, models, data, tmp_path):
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    (mine / "red" / "broken.npy").write_bytes(b"no clip")
    save_clip(mine / "red" / "short.npy", 0, 5, frames=3)
    save_clip(mine / "rare" / "only.npy", 0, 6)
    (mine / "empty").mkdir()
    found, printed, _ = probed(
        capsys, models / "videomae", mine, tmp_path / "run", "--validation", "none", "--folds", 12
    )
    assert "left out" in printed and list(found["unreadable"]) == [str(mine / "red" / "broken.npy")]
    # The clips of the median class vote, and those of the largest are in a fold each.
    assert found["held_out"] is None and found["k"] == 9 and found["folds"] == 11
    notes = "\n".join(found["notes"])
    assert "no clip to train on of empty: never predicted" in notes
    assert "1 clip too short for a view, so that frames repeat; a smaller --stride" in notes
    assert "short.npy" in notes
    assert "11 folds, not 12: no class has more than 11 clips to train on" in notes
    assert "one clip only to train on of rare: in no fold, always trained on; add clips" in notes
    assert all(note in printed for note in found["notes"])


def test_an_error_in_the_lists_own_validation_clips_is_told(data, tmp_path):
    rows = ["path,label,split", f"{data}/red/clip 0.npy,red,train"]
    rows += [f"{data}/green/clip 0.npy,green,train", f"{data}/red/clip 1.npy,red,val"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    found = sides_of(tmp_path / "list.csv", None)
    assert found.held_out is not None and len(found.held_out) == 1
    (tmp_path / "list.csv").write_text("\n".join([*rows, f"{data}/red/clip 2.npy,,val"]))
    with pytest.raises(vivit_jax.UserError, match="line 5.*label"):
        sides_of(tmp_path / "list.csv", None)


@pytest.mark.slow
def test_lists_with_splits_and_objects(models, data, tmp_path):
    rows = ["path,label,split"]
    for name in CLASSES:
        for i in range(5):
            rows.append(f"{data}/{name}/clip {i}.npy,{name},{'train' if i < 3 else 'val'}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    views = EvalSettings(stride=2, resize=16)
    found = probe(models / "videomae", tmp_path / "list.csv", tmp_path / "run", views=views)
    assert (found.train.clips, found.held_out.clips, found.folds) == (9, 6, 3)
    read = read_dataset(data)
    clips = [(np.load(example.path), CLASSES[example.label]) for example in read.examples]
    objects = probe(models / "videomae", from_objects(clips), tmp_path / "objects", views=views)
    files = probe(models / "videomae", data, tmp_path / "files", views=views)
    assert objects.train.clips == files.train.clips and objects.classes == files.classes
    # The split is that of an object's places, which are in the same order.
    assert objects.train.loss == files.train.loss


def test_what_python_is_refused(models, data, tmp_path):
    with pytest.raises(vivit_jax.UserError, match="folds must be an int of at least 2"):
        probe(models / "vivit", data, tmp_path / "x", settings=ProbeSettings(folds=1))
    clips = f'"{data}/red/clip 0.npy" 0 1\n"{data}/red/clip 1.npy" 1 0\n'
    (tmp_path / "two.txt").write_text(clips)
    two = read_dataset(tmp_path / "two.txt", labels=2)
    with pytest.raises(vivit_jax.UserError, match="clips have 2 labels, and probing needs one"):
        probe(models / "vivit", two, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, data):
    """Data that cannot be probed, by name."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(data / "red", folder / "flat")
    shutil.copytree(data / "red", folder / "one" / "red")
    clip = f"{data}/red/clip 0.npy"
    other = f"{data}/red/clip 1.npy"
    (folder / "far.txt").write_text(f'"{clip}" 0\n"{other}" 99999999\n')
    (folder / "gone.txt").write_text("gone.npy 0\nneither.npy 1\n")
    (folder / "kept").mkdir()
    (folder / "kept" / "notes.txt").write_text("mine")
    (folder / "val.txt").write_text(f'"{clip}" 7\n')
    return folder


@pytest.mark.parametrize(
    "args, message",
    [
        (("--data", "{wrong}/flat"), "clips have no labels, and probing needs one each"),
        (("--data", "{wrong}/one"), "all 10 clips are of one class, and there is nothing to"),
        (("--data", "{wrong}/far.txt"), "its labels go up to 99999999"),
        (("--data", "{wrong}/gone.txt"), "none of the 2 clips of"),
        (("--data", "{wrong}/nowhere"), "nowhere"),
        (("--validation", "1.5"), "expected a share of each class, at least 0 and less than"),
        (("--validation", "{wrong}/nowhere"), "nowhere"),
        (("--validation", "{wrong}/val.txt"), "has labels 7 to 7, the model has classes 0 to 2"),
        (("--folds", "1"), "folds must be an int of at least 2 (--folds), got 1"),
        (("--weight-decays", "0"), "weight decays must be above 0 (--weight-decays), got 0"),
        (("--clips", "0"), "--clips must be at least 1, got 0"),
        (("--attentive-heads", "2"), "is for the attentive head (--head attentive)"),
        (("--head", "attentive", "--attentive-heads", "3"), "attentive_heads must be null or a"),
        (("--out", "{wrong}/kept"), "is not empty (notes.txt); choose a new directory"),
        (("--out", "{wrong}/kept/notes.txt"), "notes.txt is a file; expected a directory"),
        (("--model", "{wrong}/kept"), "kept"),
    ],
)
def test_what_is_refused(capsys, models, data, wrong, tmp_path, args, message):
    given = {"--model": models / "vivit", "--data": data, "--out": tmp_path / "run"}
    args = [arg.format(wrong=wrong) for arg in args]
    given |= dict(zip(args[::2], args[1::2], strict=True))
    status, printed, errors = run_command(capsys, "probe", *sum(given.items(), ()))
    assert status == 2 and message in errors and errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()
    assert os.listdir(wrong / "kept") == ["notes.txt"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The demo's model after a short pre-training on clips without labels."""
    folder = tmp_path_factory.mktemp("pretrained")
    write_dataset(folder / "data", {"train": 40}, seed=9)
    recipe = demo_pretrain()
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, train=str(folder / "data" / "train")),
        train=dataclasses.replace(recipe.train, epochs=30),
    )
    return train(
        recipe, folder / "run", mesh_sizes=parse_mesh("data=1", 1), say=lambda line: None
    ).model


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_pre_trained_model_beats_chance(pretrained, tmp_path, seed):
    """On moving shapes, whose class no frame tells, by 3 standard errors, with either head."""
    write_dataset(tmp_path / "data", {"train": 8, "test": 20}, seed=seed)
    views = EvalSettings(sampler="loop", stride=1, resize=48)
    for head in ("linear", "attentive"):
        found = probe(
            pretrained,
            tmp_path / "data" / "train",
            tmp_path / head,
            validation=tmp_path / "data" / "test",
            views=views,
            settings=ProbeSettings(head=head, seed=seed),
        )
        assert (found.chance, found.held_out.clips) == (0.125, 160)
        score = found.held_out
        print(head, seed, score, [dataclasses.astuple(trial) for trial in found.trials])
        assert score.accuracy - found.chance > 3 * score.standard_error, score
