# SPDX-License-Identifier: Apache-2.0
import csv
import json
import shutil
from fractions import Fraction

import fsspec
import jax
import numpy as np
import pytest
from clips import write_clip
from commands import run_command
from helpers import forward, random_params
from PIL import Image
from tiny import VIVIT

import vivit_jax
from vivit_jax.cli.__main__ import main
from vivit_jax.inference.timeline import score_over_time

LABELS = ("walk", "run", "jump", "fly", "sleep")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved tiny classifier of 24x16 frames with visible preferences."""
    config = vivit_jax.VivitConfig(**VIVIT, id2label=LABELS)
    module = vivit_jax.VivitForVideoClassification(config)
    processor = vivit_jax.VideoProcessor.vivit(size=28, crop_size=(24, 16))
    directory = tmp_path_factory.mktemp("predict") / "model"
    vivit_jax.save_pretrained(directory, module, random_params(module), processor)
    return directory


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    (directory / "broken.mp4").write_bytes(b"not a video")
    return {
        "long": write_clip(directory / "long.mp4", frames=40, size=(96, 64)),
        "short": write_clip(directory / "short.mp4", frames=8, size=(96, 64)),
        "tiny": write_clip(directory / "tiny.mp4", frames=3, size=(96, 64)),
        "broken": directory / "broken.mp4",
    }


def test_json_holds_frames_and_scores_that_the_model_gives(model, clips, capsys):
    status, out, _ = run_command(
        capsys, "predict", clips["long"], "--model", model, "--json", "--top-k", "3"
    )
    (result,) = json.loads(out)
    assert status == 0 and result["clip"] == str(clips["long"])
    assert result["frames"] == [14, 16, 18, 20, 22, 24]  # stride 2, centred in 40 frames
    net, params = vivit_jax.from_pretrained(model)
    processor = vivit_jax.VideoProcessor.from_pretrained(model)
    pixels = processor(vivit_jax.read_video(clips["long"], indices=result["frames"]))
    scores = np.asarray(jax.nn.softmax(forward(net, params, pixels).logits[0]))
    assert [p["index"] for p in result["predictions"]] == np.argsort(-scores)[:3].tolist()
    for prediction in result["predictions"]:
        assert prediction["label"] == LABELS[prediction["index"]]
        assert abs(prediction["score"] - scores[prediction["index"]]) < 1e-6


def test_a_clip_of_other_channels_is_reported_and_the_rest_classified(
    model, clips, capsys, tmp_path
):
    np.save(tmp_path / "grey.npy", np.zeros((40, 24, 16, 1), np.uint8))
    files = (tmp_path / "grey.npy", clips["long"])
    status, out, err = run_command(capsys, "predict", *files, "--model", model, "--json")
    grey, long = json.loads(out)
    assert status == 1 and "predictions" in long and "predictions" not in grey
    assert "grey.npy has 1 channel, the model takes 3" in grey["error"] and grey["error"] in err


@pytest.mark.parametrize(
    ("name", "options", "frames"),
    [
        ("long", ["--stride", "1", "--start", "begin"], [0, 1, 2, 3, 4, 5]),
        ("long", ["--start", "end"], [29, 31, 33, 35, 37, 39]),
        ("long", ["--start", "3", "--stride", "7"], [3, 10, 17, 24, 31, 38]),
        ("short", [], [1, 2, 3, 4, 5, 6]),  # too short for the recipe's stride 2
        ("tiny", ["--pad", "repeat_last"], [0, 1, 2, 2, 2, 2]),
        ("tiny", ["--pad", "loop"], [0, 1, 2, 0, 1, 2]),
    ],
)
def test_which_frames(model, clips, capsys, name, options, frames):
    status, out, _ = run_command(
        capsys, "predict", clips[name], "--model", model, "--json", *options
    )
    assert status == 0 and json.loads(out)[0]["frames"] == frames


def test_text_lists_labels(model, clips, capsys):
    status, out, _ = run_command(
        capsys, "predict", clips["long"], clips["short"], "--model", model, "--top-k", "9"
    )
    assert status == 0 and out.count("frames from") == 2
    assert all(out.count(f"  {label}\n") == 2 for label in LABELS)


@pytest.mark.parametrize("scale", [1, 255], ids=["uint8", "float"])
def test_an_array_is_read_as_the_video_it_was(model, clips, capsys, tmp_path, scale):
    frames = vivit_jax.read_video(clips["long"])
    np.save(tmp_path / "long.npy", frames if scale == 1 else frames / scale)
    np.savez(tmp_path / "long.npz", frames=np.load(tmp_path / "long.npy"))
    files = (clips["long"], tmp_path / "long.npy", tmp_path / "long.npz")
    status, out, _ = run_command(capsys, "predict", *files, "--model", model, "--json")
    video, array, packed = json.loads(out)
    assert status == 0 and video["frames"] == array["frames"]
    assert packed["predictions"] == array["predictions"]
    for ours, theirs in zip(array["predictions"], video["predictions"], strict=True):
        assert ours["label"] == theirs["label"]
        np.testing.assert_allclose(ours["score"], theirs["score"], rtol=1e-5)


def test_folders_of_images_are_videos(model, clips, capsys, tmp_path):
    """As in training; one with a single picture, as of a cover, is none."""
    frames = vivit_jax.read_video(clips["long"])
    for k, frame in enumerate(frames):
        path = tmp_path / "clips/a/long" / f"img_{k}.png"  # 10 after 9
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(path)
    shutil.copy(path, tmp_path / "clips/cover.png")
    (tmp_path / "clips/covers").mkdir()
    shutil.copy(path, tmp_path / "clips/covers")
    np.save(tmp_path / "long.npy", frames)
    places = (tmp_path / "clips", tmp_path / "clips/a/long", tmp_path / "long.npy")
    status, out, _ = run_command(capsys, "predict", *places, "--model", model, "--json")
    found = json.loads(out)
    assert status == 0 and len(found) == 3
    assert found[0]["clip"] == found[1]["clip"] == str(path.parent)
    for each in found[:2]:
        assert each["predictions"] == found[2]["predictions"]
    flags = ("--model", model, "--draw", tmp_path / "a.png")
    status, out, err = run_command(capsys, "predict", path.parent, *flags)
    assert status == 2 and "a/long; it has no times" in err


def test_square_pixels_are_those_that_a_player_shows(model, capsys, tmp_path):
    wide = write_clip(tmp_path / "wide.mp4", frames=8, size=(64, 64), aspect=Fraction(2, 1))
    stretched = tmp_path / "stretched.npy"
    np.save(stretched, vivit_jax.read_video(wide, square_pixels=True))

    def scores(*args):
        status, out, _ = run_command(capsys, "predict", *args, "--model", model, "--json")
        assert status == 0
        return {p["label"]: p["score"] for p in json.loads(out)[0]["predictions"]}

    assert scores(wide, "--square-pixels") == scores(stretched) != scores(wide)


def test_a_broken_clip_does_not_stop_the_others(model, clips, capsys):
    files = [clips["broken"], clips["long"], clips["tiny"]]
    status, out, err = run_command(capsys, "predict", *files, "--model", model, "--json")
    results = json.loads(out)
    assert status == 1 and "predictions" in results[1]
    assert "error" in results[0] and "error" in results[2]
    assert "broken.mp4" in err and "6 frames" in err and "Traceback" not in err


def test_an_error_names_the_file_once(model, clips, capsys, tmp_path):
    np.save(tmp_path / "grey.npy", np.zeros((40, 24, 16, 1), np.uint8))
    files = [clips["broken"], clips["tiny"], tmp_path / "grey.npy", "no.mp4", "no.npy"]
    status, _, err = run_command(capsys, "predict", *files, "--model", model)
    assert status == 1 and err.count("\n") == len(files)
    for file, line in zip(files, err.splitlines(), strict=True):
        assert line.startswith(str(file)) and line.count(str(file)) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{long}", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["{long}", "--model", "{model}", "--top-k", "0"], "--top-k must be at least 1"),
        (["{long}", "--model", "{model}", "--start", "middle"], "begin, center, end or a frame"),
        (["{long}", "--model", "{model}", "--start", "²"], "begin, center, end or a frame"),
        (["{long}", "--model", "{model}", "--stride", "0"], "stride"),
    ],
)
def test_wrong_input_is_one_line(model, clips, capsys, args, message):
    filled = [arg.format(model=model, **clips) for arg in args]
    status, out, err = run_command(capsys, "predict", *filled)
    assert status == 2 and message in err and err.count("\n") == 1 and not out


def test_a_model_without_processor_says_what_is_missing(model, clips, capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    status, _, err = run_command(capsys, "predict", clips["long"], "--model", tmp_path)
    assert status == 2 and "preprocessor_config.json" in err


def test_a_clip_of_another_size_than_the_model_takes(model, clips, capsys, tmp_path):
    vivit_jax.save_pretrained(
        tmp_path / "m",
        *vivit_jax.from_pretrained(model),
        vivit_jax.VideoProcessor.vivit(size=64, crop_size=64),
    )
    status, _, err = run_command(capsys, "predict", clips["long"], "--model", tmp_path / "m")
    assert status == 2 and "configured for (6, 24, 16)" in err


def test_a_model_without_classifier_is_refused(clips, capsys, tmp_path):
    config = vivit_jax.VivitConfig(**VIVIT)
    module = vivit_jax.VivitModel(config)
    processor = vivit_jax.VideoProcessor.vivit(size=28, crop_size=(24, 16))
    vivit_jax.save_pretrained(tmp_path / "m", module, random_params(module), processor)
    status, out, err = run_command(capsys, "predict", clips["long"], "--model", tmp_path / "m")
    assert status == 2 and "holds VivitModel, which has no classifier" in err and not out


def test_multi_label_scores_are_independent(model, clips, capsys, tmp_path):
    for name in ("model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, out, _ = run_command(capsys, "predict", clips["long"], "--model", tmp_path, "--json")
    scores = [p["score"] for p in json.loads(out)[0]["predictions"]]
    assert abs(sum(scores) - 1) > 1e-3 and all(0 <= s <= 1 for s in scores)


def test_several_heads(clips, capsys, tmp_path):
    """Nouns and verbs: each head is a distribution, and the action is the product of both."""
    labels = ("cup", "knife", "door", "take", "open")
    config = vivit_jax.VivitConfig(
        **VIVIT, id2label=labels, class_splits=(3, 2), split_names=("noun", "verb")
    )
    module = vivit_jax.VivitForVideoClassification(config)
    processor = vivit_jax.VideoProcessor.vivit(size=28, crop_size=(24, 16))
    vivit_jax.save_pretrained(tmp_path / "model", module, random_params(module), processor)
    args = (clips["long"], "--model", tmp_path / "model", "--top-k", "6")
    status, out, _ = run_command(capsys, "predict", *args, "--json")
    (result,) = json.loads(out)
    assert status == 0
    heads = {
        name: {p["label"]: p["score"] for p in predictions}
        for name, predictions in result["heads"].items()
    }
    assert set(heads["noun"]) == set(labels[:3]) and set(heads["verb"]) == set(labels[3:])
    for scores in heads.values():
        assert abs(sum(scores.values()) - 1) < 1e-5
    assert len(result["predictions"]) == 6
    for prediction in result["predictions"]:
        noun, verb = prediction["label"].split(", ")
        assert abs(prediction["score"] - heads["noun"][noun] * heads["verb"][verb]) < 1e-6
        n, v = prediction["index"]
        assert (labels[n], labels[3 + v]) == (noun, verb)
    best = [p["score"] for p in result["predictions"]]
    assert best == sorted(best, reverse=True)
    status, out, _ = run_command(capsys, "predict", *args)
    assert "  noun:\n" in out and "  verb:\n" in out


def test_a_directory_is_classified_with_its_folders(model, clips, capsys, tmp_path):
    """Files that cannot be read are named at the end, and the table has all of them."""
    (tmp_path / "my clips" / "b").mkdir(parents=True)
    for name, source in (("b/1 long.mp4", "long"), ("a.mp4", "broken"), (".hidden.mp4", "long")):
        shutil.copy(clips[source], tmp_path / "my clips" / name)
    (tmp_path / "my clips" / "notes.txt").write_text("no clip")
    flags = ("--model", model, "--csv", tmp_path / "out.csv", "--top-k", 2)
    status, out, err = run_command(capsys, "predict", tmp_path / "my clips", *flags)
    lines = out.splitlines()
    assert status == 1 and lines[0].startswith(f"{tmp_path}/my clips/b/1 long.mp4 (6 frames")
    assert len(lines) == 4 and lines[-1] == f"written to {tmp_path}/out.csv"
    told = err.splitlines()
    assert told[-2] == "1 of 2 videos could not be read:"
    assert told[-1].startswith(f"{tmp_path}/my clips/a.mp4: ")
    head, *rows = csv.reader((tmp_path / "out.csv").read_text().splitlines())
    assert head == ["path", "label_1", "score_1", "label_2", "score_2", "error"]
    assert rows[0][:5] == [f"{tmp_path}/my clips/a.mp4", "", "", "", ""] and rows[0][5]
    best, second = (line.split() for line in lines[1:3])
    assert rows[1][1::2] == [best[1], second[1], ""]
    assert float(rows[1][2]) == pytest.approx(float(best[0]), abs=1e-4)


def test_videos_at_addresses(model, clips, capsys, tmp_path):
    """A file, a folder, and a picture of one; results are those of the local files."""
    files = fsspec.filesystem("memory")
    files.put(str(clips["long"]), "/bucket/in/a b/long.mp4")
    files.put(str(clips["short"]), "/bucket/in/short.mp4")
    at = "memory://bucket/in"
    here = json.loads(
        run_command(capsys, "predict", clips["short"], clips["long"], "--model", model, "--json")[1]
    )
    flags = ("--model", model, "--json", "--csv", "memory://bucket/out.csv")
    status, out, err = run_command(capsys, "predict", at, *flags)
    there = json.loads(out)
    assert status == 0 and [each["clip"] for each in there] == [
        f"{at}/short.mp4", f"{at}/a b/long.mp4"
    ]  # fmt: skip
    assert [each["predictions"] for each in there] == [each["predictions"] for each in here]
    assert files.cat("/bucket/out.csv").decode().count(at) == 2
    one, picture = f"{at}/a b/long.mp4", tmp_path / "x.png"
    status, out, _ = run_command(capsys, "predict", one, *flags[:2], "--draw", picture)
    assert status == 0 and picture.exists() and out.endswith(f"written to {picture}\n")
    status, _, err = run_command(capsys, "predict", f"{at}/no.mp4", *flags[:2])
    assert (status, err.splitlines()[0]) == (1, f"{at}/no.mp4: no such file")
    status, _, err = run_command(capsys, "predict", one, *flags[:2], "--draw", f"{at}/x.png")
    assert status == 2 and "x.png is not on this machine, and predict takes a local path" in err


def test_a_video_is_drawn_with_its_labels_over_time(model, clips, capsys, tmp_path):
    flags = ("--model", model, "--window-stride", 6, "--stride", 1)
    for kind in ("mp4", "png"):
        path = tmp_path / f"drawn.{kind}"
        status, out, err = run_command(capsys, "predict", clips["long"], *flags, "--draw", path)
        assert (status, err) == (0, "") and out.endswith(f"written to {path}\n")
    video, drawn = vivit_jax.read_video(clips["long"]), vivit_jax.read_video(tmp_path / "drawn.mp4")
    assert len(drawn) == len(video) == 40
    scale = drawn.shape[2] // video.shape[2]
    large = video.repeat(scale, 1).repeat(scale, 2)
    left = (drawn.shape[2] - large.shape[2]) // 2
    top = drawn[:, : large.shape[1], left : left + large.shape[2]]
    assert np.abs(top.astype(int) - large).mean() < 6
    found = score_over_time(
        vivit_jax.VideoClassifier.from_pretrained(model), clips["long"], stride=1, window_stride=6
    )
    scores = found.over_frames()
    blue = np.array([0x1F, 0x6F, 0xC4])
    for i in (0, 20, 39):  # the bar of the best label has the dark colour and the score's length
        foot = drawn[i, large.shape[1] + 4 :].astype(int)
        dark = (np.abs(foot - blue).max(-1) < 40).sum(1).max()
        track = (np.ptp(foot, axis=-1) < 12) & (np.abs(foot.mean(-1) - 0xE8) < 8)
        light = track[np.abs(foot - blue).max(-1).min(1) < 40].sum(1).max()
        assert dark / (dark + light) == pytest.approx(scores[i].max(), abs=0.05)
    with Image.open(tmp_path / "drawn.png") as image:
        assert image.width >= 640 and image.height > 300


def test_what_cannot_be_drawn_is_told_before_anything_is_read(model, clips, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "a.npy", np.zeros((8, 24, 16, 3), np.uint8))
    copy = shutil.copy(clips["long"], tmp_path / "copy.mp4")
    before = sorted(tmp_path.iterdir())
    for given, words in (
        ((tmp_path / "empty",), "no clips (.3g2"),
        ((clips["long"], clips["short"], "--draw", tmp_path / "x.mp4"), "draws one video, got 2"),
        ((tmp_path / "a.npy", "--draw", tmp_path / "x.mp4"), "needs a video file"),
        ((clips["long"], "--draw", tmp_path / "x.gif"), "ends in '.gif'"),
        ((copy, "--draw", copy), "exists; choose another name"),
        ((copy, "--draw", copy, "--overwrite"), "is the video itself"),
        ((clips["long"], "--window-stride", 3), "--window-stride is for the windows of --draw"),
        ((clips["long"], "--csv", tmp_path / "x.txt"), "--csv"),
        ((clips["long"], "--csv", tmp_path / "no" / "x.csv"), "there is no directory"),
        (
            (clips["long"], "--draw", tmp_path / "x.png", "--window-stride", "0.5"),
            "seconds such as 0.5s",
        ),
    ):
        status, out, err = run_command(capsys, "predict", *given, "--model", model)
        assert status == 2 and words in err and err.count("\n") == 1 and not out, given
    assert sorted(tmp_path.iterdir()) == before


def test_presets(capsys):
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in vivit_jax.PRESETS) and "86,534,800" in text
    assert main(["presets", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    config = vivit_jax.VideoMAEConfig.from_dict(listing["videomae-large"]["config"])
    assert config == vivit_jax.PRESETS["videomae-large"].config
