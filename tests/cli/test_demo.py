# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax demo` and its data."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import vivit_jax
from vivit_jax.cli import demo as demo_module
from vivit_jax.cli import demo_stages
from vivit_jax.cli.__main__ import main
from vivit_jax.cli.reconstruct import draw_mask
from vivit_jax.data.datasets import synthetic
from vivit_jax.data.datasets.synthetic import CLASSES, MIRRORED, REVERSED
from vivit_jax.inference.reconstruction import COLUMNS, ROWS, to_patches
from vivit_jax.recipes.demo import demo_pretrain
from vivit_jax.train.log import read_metrics
from vivit_jax.train.normalise import normaliser


def scenes(count: int, side: int = 48) -> list[synthetic.Scene]:
    return [synthetic.draw_scene(np.random.default_rng((7, i)), side) for i in range(count)]


def measure(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre [t, 2] (x, y) in pixels on the torus and area [t] of the bright shape of a clip."""
    inside = clip.astype(float).mean(-1) > 134
    turn = np.exp(2j * np.pi * np.arange(clip.shape[1]) / clip.shape[1])
    x = np.angle((inside.sum(1) * turn).sum(-1))
    y = np.angle((inside.sum(2) * turn).sum(-1))
    return np.stack([x, y], -1) * clip.shape[1] / (2 * np.pi), inside.sum((1, 2))


def motion(clip: np.ndarray) -> str:
    """The class of a clip, from the measured path and area of its shape."""
    centre, area = measure(clip)
    growth = np.median(np.diff(np.log(area)))
    side = clip.shape[1]
    step = (np.diff(centre, axis=0) + side / 2) % side - side / 2
    length = np.hypot(*step.T)
    if np.median(length) < 1:
        return "grow" if growth > 0 else "shrink"
    mean = (step / length[:, None]).mean(0)
    if np.hypot(*mean) < 0.9:
        (x0, y0), (x1, y1) = step[:-1].T, step[1:].T
        # y points down, so a turn from right to down is clockwise.
        return "circle-clockwise" if (x0 * y1 - y0 * x1).sum() > 0 else "circle-counterclockwise"
    if abs(mean[0]) > abs(mean[1]):
        return "move-right" if mean[0] > 0 else "move-left"
    return "move-down" if mean[1] > 0 else "move-up"


@pytest.mark.parametrize("kind", CLASSES)
def test_a_clip_shows_the_motion_it_is_named_after(kind):
    for i in range(20):
        clip = synthetic.make_clip(kind, np.random.default_rng((1, i)))
        assert clip.shape == (8, 48, 48, 3) and clip.dtype == np.uint8
        assert motion(clip) == kind


@pytest.mark.parametrize("kind", CLASSES)
def test_a_reversed_clip_is_the_same_scene_in_the_reversed_class(kind):
    assert REVERSED[REVERSED[kind]] == kind != REVERSED[kind]
    for scene in scenes(10):
        forward = synthetic.render(scene, kind, 8)
        backward = synthetic.render(scene, REVERSED[kind], 8)
        np.testing.assert_allclose(forward[::-1], backward, atol=0.01)
        assert abs(forward - backward).max() > 50


def test_augmented_clips_show_the_motion_of_their_new_label():
    labels = np.repeat(np.arange(len(CLASSES)), 12)
    clips = np.stack(
        [
            synthetic.make_clip(CLASSES[k], np.random.default_rng((2, i)))
            for i, k in enumerate(labels)
        ]
    )
    before = clips.copy()
    new_clips, new_labels = synthetic.augment(np.random.default_rng(0), clips, labels)
    assert [motion(clip) for clip in new_clips] == [CLASSES[k] for k in new_labels]
    np.testing.assert_array_equal(clips, before)
    changes = {(CLASSES[a], CLASSES[b]) for a, b in zip(labels, new_labels, strict=True)}
    for kind in CLASSES:
        assert {(kind, REVERSED[kind]), (kind, kind)} <= changes
        assert (kind, MIRRORED[kind]) in changes


def test_frames_have_the_same_distribution_in_every_class():
    # Kolmogorov-Smirnov distance between a class and all others, per frame and statistic.
    per_class, num_frames = 400, 4
    statistics = []
    for k, kind in enumerate(CLASSES):
        clips = (
            synthetic.render(
                synthetic.draw_scene(np.random.default_rng((k, i)), 24), kind, num_frames
            )
            for i in range(per_class)
        )
        rows = []
        for clip in clips:
            centre, area = measure(clip)
            rows.append([*centre.T, area, clip.mean((1, 2, 3)), clip.std((1, 2, 3))])
        statistics.append(rows)
    values = np.moveaxis(np.array(statistics), 1, -1)  # [class, statistic, frame, clip]
    distances = np.zeros(values.shape[:3])
    for k in range(len(CLASSES)):
        others = np.delete(values, k, axis=0)
        for at in np.ndindex(values.shape[1:3]):
            ours, theirs = np.sort(values[k][at]), np.sort(others[(slice(None), *at)].ravel())
            both = np.concatenate([ours, theirs])
            cdfs = (np.searchsorted(x, both, side="right") / len(x) for x in (ours, theirs))
            distances[(k, *at)] = abs(np.subtract(*cdfs)).max()
    # Samples of one distribution exceed c * sqrt(1/n + 1/m) with probability 2 exp(-2 c^2): 1e-5
    # for each of the 160 distances at c = 2.47.
    limit = 2.47 * np.sqrt(1 / per_class + 1 / (per_class * (len(CLASSES) - 1)))
    assert distances.max() < limit, (distances.max(), limit)


def test_mp4_files_read_back_as_written(tmp_path):
    clip = synthetic.make_clip("grow", np.random.default_rng(3))
    synthetic.write_mp4(tmp_path / "clip.mp4", clip, fps=10)
    info = vivit_jax.probe_video(tmp_path / "clip.mp4")
    assert (info.num_frames, info.height, info.width) == (8, 48, 48)
    assert (info.codec, info.fps, info.duration) == ("h264", 10.0, 0.8)
    read = vivit_jax.read_video(tmp_path / "clip.mp4")
    assert abs(read.astype(int) - clip).mean() < 6  # measured 3.4, most of it noise and chroma


def test_a_data_set_is_a_function_of_its_seed(tmp_path):
    def written(name, clips, **options):
        data = synthetic.write_dataset(tmp_path / name, clips, **options)
        root = tmp_path / name
        return data, {
            str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.mp4"))
        }

    data, files = written("a", {"train": 2, "test": 1})
    assert list(data) == ["train", "test"] and len(data["train"]) == 16 and len(data["test"]) == 8
    for split, clips in data.items():
        for path, label in clips:
            assert path.parent == tmp_path / "a" / split / CLASSES[label]
            assert motion(vivit_jax.read_video(path)) == CLASSES[label]
    assert len(set(files.values())) == 24
    assert written("b", {"train": 2, "test": 1})[1] == files
    fewer = written("c", {"train": 1})[1]
    assert len(fewer) == 8 and fewer.items() <= files.items()
    assert not set(written("d", {"train": 2}, seed=1)[1].values()) & set(files.values())


def test_a_clip_is_encoded_alike_beside_other_threads(tmp_path):
    clip = synthetic.make_clip("circle-clockwise", np.random.default_rng(5))

    def encoded(number):
        synthetic.write_mp4(tmp_path / f"{number}.mp4", clip)
        return (tmp_path / f"{number}.mp4").read_bytes()

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(encoded, range(120)))) == 1


@pytest.mark.parametrize(
    "processor",
    [
        vivit_jax.VideoProcessor.vivit(size=48, crop_size=48),
        vivit_jax.VideoProcessor.named("vivit-scenic", size=48, crop_size=48),
        vivit_jax.VideoProcessor.named("videomae-imagenet", size=48, crop_size=48),
        vivit_jax.VideoProcessor.videomae(do_rescale=False, do_normalize=False, size=48),
    ],
    ids=["vivit", "scenic", "imagenet", "bytes"],
)
def test_normaliser_is_the_processors_arithmetic(processor):
    clip = synthetic.make_clip("shrink", np.random.default_rng(4))
    processor = vivit_jax.VideoProcessor.from_dict(processor.to_dict(), do_center_crop=False)
    np.testing.assert_allclose(
        normaliser(processor)(clip[None]), processor(clip), rtol=1e-6, atol=1e-6
    )


RUN = {"recipe.json", "model.json", "metrics.jsonl", "checkpoints", "models", "report.html"}


def test_demo_writes_what_it_says(finished):
    out, printed, progress = finished
    steps = [line for line in progress.splitlines() if line.startswith("step ")]
    assert len(steps) == 6 and "Traceback" not in progress and "WARNING:" not in progress
    # What pre-training does not hand over is counted, and listed by name in the run's log.
    left = "in the checkpoint, not in this model (23): decoder"
    assert f"{left} 19, encoder_to_decoder, mask_token, videomae 2\n" in progress
    begun = json.loads((out / "finetuning" / "metrics.jsonl").read_text().splitlines()[0])
    assert f"{left}.decoder_layers.0." in begun["text"]
    runs = {"pretraining", "finetuning", "scratch"}
    pictures = {"predictions.png", "reconstructions.png", "reconstruction.gif"}
    found = {path.name for path in out.iterdir()}
    assert found == {"data", "model", "pretrained", "vivit-demo.json"} | runs | pictures
    assert all(name in printed for name in runs | pictures)
    for split, clips in (("train", 24), ("labelled", 16), ("test", 16)):
        assert len(list(out.glob(f"data/{split}/*/*.mp4"))) == clips
        assert f"{clips} in {split}" in printed
    for name in runs:
        validation = set() if name == "pretraining" else {"validation.json"}
        assert {path.name for path in (out / name).iterdir()} == RUN | validation
    assert {path.name for path in (out / "model").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert str(out) in printed and "the same accuracy" in printed
    assert "agree: every difference is within" in printed and "DIFFERS" not in printed
    summary = json.loads((out / "vivit-demo.json").read_text())
    assert f"{summary['accuracy']:.1%} after pre-training" in printed
    assert f"{summary['accuracy_from_scratch']:.1%} from scratch" in printed
    config = json.loads((out / "model/config.json").read_text())
    assert tuple(config["id2label"].values()) == CLASSES


def test_fine_tuning_starts_from_the_pre_training(finished):
    """It differs from the run from scratch in nothing else."""
    out, printed, _ = finished
    recipes = {
        name: json.loads((out / name / "recipe.json").read_text())
        for name in ("finetuning", "scratch")
    }
    start = recipes["finetuning"]["model"].pop("start")
    assert start == str(out / "pretrained") and start in printed
    assert recipes["scratch"]["model"].pop("start") is None
    assert recipes["finetuning"] == recipes["scratch"]
    assert recipes["scratch"]["data"]["train"] == str(out / "data/labelled")


def test_predict_agrees_with_the_demo(finished, capsys):
    out, printed, _ = finished
    expected = json.loads((out / "vivit-demo.json").read_text())["predictions"]
    assert list(expected) == [f"data/test/{kind}/0000.mp4" for kind in CLASSES]
    files = [str(out / name) for name in expected]
    assert main(["predict", *files, "--model", str(out / "model"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    best = [result["predictions"][0] for result in results]
    assert [prediction["label"] for prediction in best] == list(expected.values())
    assert f"{best[0]['score']:8.4f}  {best[0]['label']}" in printed


def test_the_picture_shows_the_clips(finished):
    from PIL import Image

    out, _, _ = finished
    with Image.open(out / "predictions.png") as image:
        page = np.asarray(image.convert("RGB"))
    assert 900 < page.shape[1] < 1600 and 900 < page.shape[0] < 1200
    for kind in CLASSES:
        clip = vivit_jax.read_video(out / "data/test" / kind / "0000.mp4")
        for frame in (clip[0], clip[-1]):
            tile = np.kron(frame, np.ones((2, 2, 1), np.uint8))
            corners = np.argwhere((page == tile[0, 0]).all(-1))
            assert any(np.array_equal(page[y : y + 96, x : x + 96], tile) for y, x in corners), kind


def test_overwrite_replaces_a_demo_and_keeps_other_files(finished, tmp_path):
    out = tmp_path / "demo"
    demo_module._prepare(out, overwrite=False)
    for name in ("data/train", "model", "finetuning/models"):
        (out / name).mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(vivit_jax.UserError, match="not empty.*--overwrite"):
        demo_module._prepare(out, overwrite=False)
    demo_module._prepare(out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"vivit-demo.json", "notes.txt"}


def refuse(args, capsys) -> str:
    """The one line on stderr of a refused demo."""
    assert main(["demo", *map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("vivit-jax: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
        (("--clips-per-class", "-3"), "--clips-per-class must be at least 1, got -3"),
        (("--test-clips-per-class", "0"), "--test-clips-per-class must be at least 1"),
        (("--labelled-clips-per-class", "0"), "--labelled-clips-per-class must be at least 1"),
        (("--seed", "-1"), "--seed must not be negative"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(args, told, capsys, tmp_path):
    assert told in refuse((*args, "--out", tmp_path / "new"), capsys)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "times", "epochs"),
    [((), 1, 44), (("--quick",), 1, 14), (("--quick",), 20, 7), (("--quick",), 80, 1)],
)
def test_quick_takes_half_of_the_clips_and_a_sixth_of_the_steps(
    monkeypatch, tmp_path, flags, times, epochs
):
    """With the usual number of clips, and with `times` as many."""

    class Begun(Exception):
        """Stands in for the first training, with its recipe."""

    def begin(recipe, out, say):
        raise Begun(recipe)

    def write(directory, counts, **how):
        asked.update(counts)
        return written(directory, dict.fromkeys(counts, 1), **how)

    asked, written = {}, synthetic.write_dataset
    read = demo_stages.read_dataset
    monkeypatch.setattr("vivit_jax.cli.demo.write_dataset", write)
    monkeypatch.setattr(demo_stages, "train", begin)
    monkeypatch.setattr(
        demo_stages, "read_dataset", lambda *a, **k: range(8 * times * len(read(*a, **k)))
    )
    with pytest.raises(Begun) as begun:
        main(["demo", "--out", str(tmp_path / "demo"), *flags])
    half = 2 if flags else 1
    assert asked == {"train": 160 // half, "test": 40 // half, "labelled": 4}
    (recipe,) = begun.value.args
    assert demo_pretrain().train.epochs == 44 and recipe.train.epochs == epochs


def test_directories_of_others_are_left_alone(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/data").write_text("mine")
    assert "is a file" in refuse(("--out", tmp_path / "file"), capsys)
    assert "is not empty" in refuse(("--out", tmp_path / "full"), capsys)
    told = refuse(("--out", tmp_path / "full", "--overwrite"), capsys)
    assert "was not written by vivit-jax demo" in told
    assert (tmp_path / "full/data").read_text() == "mine"


def test_help_loads_no_optional_package():
    code = (
        "import sys; from vivit_jax.cli.__main__ import main\n"
        "assert main(['demo', '--help']) == 0\n"
        "assert not {'av', 'torch', 'transformers', 'PIL'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--out", "--model", "--seed", "--quick", "--epochs", "--overwrite"):
        assert flag in done.stdout


def test_without_pytorch_the_comparison_is_skipped(finished, monkeypatch, capsys):
    out, _, _ = finished

    class NoTorch:
        def find_spec(self, name, *_):
            if name == "torch":
                raise ModuleNotFoundError("No module named 'torch'", name=name)

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoTorch(), *sys.meta_path])
    assert demo_stages.agrees_with_pytorch(out / "model", out / "data/test/grow/0000.mp4")
    assert "[torch]'" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_directory_can_be_overwritten(tmp_path):
    # Set back first: children of a background job start with SIGINT ignored.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from vivit_jax.cli.__main__ import main; sys.exit(main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "demo", "--out", str(tmp_path / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    for line in process.stdout:
        if line.startswith("data:"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT  # which a shell calls 130
    lines = [line for line in err.splitlines() if not line.startswith(("step ", "SIGINT: "))]
    assert lines == ["vivit-jax: interrupted"]
    demo_module._prepare(tmp_path / "demo", overwrite=True)


def test_the_reconstructions_show_the_clips_beside_errors_of_baselines(finished):
    from PIL import Image

    out, printed, _ = finished
    with Image.open(out / "reconstructions.png") as image:
        page = np.asarray(image)
    clip = vivit_jax.read_video(out / "data/test/grow/0000.mp4")
    tile = np.kron(clip[3], np.ones((2, 2, 1), np.uint8))
    corners = np.argwhere((page == tile[0, 0]).all(-1))
    assert any(np.array_equal(page[y : y + 96, x : x + 96], tile) for y, x in corners)
    ((name, table),) = json.loads((out / "vivit-demo.json").read_text())["rmse"].items()
    kind, ratio = name.split()
    assert f"{kind} masks of {ratio}" in printed and list(table) == list(ROWS)
    assert all(f"{row[COLUMNS[0]]:.4f}" in printed for row in table.values())
    # Flat patches, computed here from the files and the mask that the demo drew.
    files = sorted(out.glob("data/test/*/*.mp4"), key=lambda path: (path.name, path.parent))
    clips = np.stack([vivit_jax.read_video(path) for path in files]) / 255
    config = vivit_jax.from_pretrained(out / "pretrained")[0].config
    hidden = np.asarray(draw_mask(kind, 0, len(clips), config.grid, float(ratio)).to_bool())
    patches = to_patches(clips, config.tubelet)[hidden]
    flat = np.sqrt(np.mean((patches - patches.mean(1, keepdims=True)) ** 2))
    np.testing.assert_allclose(table["patch mean"][COLUMNS[1]], flat, rtol=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_pre_training_helps_in_the_demo(tmp_path):
    out, start = tmp_path / "demo", time.perf_counter()
    command = [sys.executable, "-m", "vivit_jax.cli", "demo", "--out", str(out)]
    subprocess.run(command, check=True)
    summary = json.loads((out / "vivit-demo.json").read_text())
    after, scratch = summary["accuracy"], summary["accuracy_from_scratch"]
    seconds = time.perf_counter() - start
    print(f"{after:.1%} after pre-training, {scratch:.1%} from scratch, {seconds:.0f} s")
    assert after > scratch + 0.03
    assert seconds < 480  # of a machine that does other things as well


@pytest.mark.long
@pytest.mark.slow
def test_the_vivit_demo_is_accurate_and_sees_motion(tmp_path):
    """Trained on clips that repeat one frame, it learns nothing."""
    out, control = tmp_path / "demo", tmp_path / "control"
    # In processes of their own, which see one device each.
    program = [sys.executable, "-m", "vivit_jax.cli"]
    subprocess.run([*program, "demo", "--model", "vivit", "--out", str(out)], check=True)
    accuracy = json.loads((out / "vivit-demo.json").read_text())["accuracy"]
    rng, still = np.random.default_rng(0), tmp_path / "still"
    for path in sorted(out.glob("data/t*/*/*.mp4")):
        frames = vivit_jax.read_video(path)
        copy = still / path.relative_to(out / "data").with_suffix(".npy")
        copy.parent.mkdir(parents=True, exist_ok=True)
        np.save(copy, np.repeat(frames[rng.integers(8)][None], 8, axis=0))
    command = [*program, "finetune", "--recipe", "demo-vivit", "--out", str(control)]
    command += ["--data", str(still / "train"), "--set", f"data.validation={still / 'test'}"]
    command += ["train.evaluate_every=12", "train.checkpoint_every=960"]
    subprocess.run(command, check=True)
    chance = read_metrics(control / "metrics.jsonl")[-1]["accuracy"]
    print(f"accuracy {accuracy:.1%}, on still clips {chance:.1%}, chance 12.5%")
    # Five standard deviations of guessing on 320 clips are 9%.
    assert accuracy >= 0.9 and chance < 0.22
