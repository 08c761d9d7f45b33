# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax reconstruct`: the files it writes, what they say, and what it refuses."""

import json
import re

import numpy as np
import pytest
from clips import write_clip
from commands import run_command
from helpers import random_params
from PIL import Image
from tiny import VIDEOMAE

import vivit_jax
from vivit_jax.cli import panels
from vivit_jax.inference.reconstruction import COLUMNS, ROWS

SIZES = VIDEOMAE | dict(
    image_size=(16, 32), num_hidden_layers=1, decoder_num_hidden_layers=1, use_mean_pooling=False
)  # a grid of 3x2x4 tokens


def save_model(directory, processor=None, **values):
    model = vivit_jax.VideoMAEForPreTraining(vivit_jax.VideoMAEConfig(**SIZES | values))
    if processor is None:
        processor = vivit_jax.VideoProcessor.named(
            "videomae-imagenet", size={"height": 16, "width": 32}, crop_size=(16, 32)
        )
    # Small weights, so that predictions differ from patch to patch but stay in range.
    vivit_jax.save_pretrained(directory, model, random_params(model, 0.1), processor)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("reconstruct") / "model")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=40, size=(64, 32))


@pytest.fixture
def drawn(monkeypatch):
    """The panels that a run drew."""
    seen, save = [], panels.Panels.save

    def record(self, *args):
        seen.append(self)
        return save(self, *args)

    monkeypatch.setattr(panels.Panels, "save", record)
    return seen


def contains(page, tile) -> bool:
    height, width = tile.shape[:2]
    corners = np.argwhere((page == tile[0, 0]).all(-1))
    return any(np.array_equal(page[y : y + height, x : x + width], tile) for y, x in corners)


def test_png_shows_frames_masks_and_predictions(model, clip, capsys, drawn, tmp_path):
    args = (clip, "--model", model, "--mask-ratio", "0.75", "--out", tmp_path / "a.png")
    status, out, err = run_command(capsys, "reconstruct", *args)
    assert status == 0 and err == ""
    assert "6 frames from 9 to 29" in out and "18 of 24 patches hidden" in out
    assert all(name in out for name in (*ROWS, *COLUMNS, "patch mean, estimated or true"))
    (shown,) = drawn
    assert shown.title == "clip.mp4, reconstructed from 25% of it" and shown.warning is None
    assert "tube mask of ratio 0.75, seed 0" in shown.notes[0]
    assert any("estimated from visible patches" in note for note in shown.notes)
    assert shown.labels == ["original", "masked", "reconstruction"]
    assert shown.times == [f"frame {i}" for i in range(9, 30, 4)]
    with Image.open(tmp_path / "a.png") as image:
        page = np.asarray(image)
    for frames in shown.clips:
        assert frames.shape == (6, 16, 32, 3)
        for frame in (frames[0], frames[-1]):
            assert contains(page, np.kron(frame, np.ones((3, 3, 1), np.uint8)))
    original, masked, made = (frames.reshape(6, 2, 8, 4, 8, 3) for frames in shown.clips)
    blank = (masked == round(255 * panels.HIDDEN)).all((2, 4, 5))  # [t, 2, 4]
    assert blank.sum() == 6 * 6 and (blank == blank[0]).all()
    same = (made == original).all((2, 4, 5))
    np.testing.assert_array_equal(same, ~blank)


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (["--stride", "1", "--start", "begin"], [0, 1, 2, 3, 4, 5]),
        (["--start", "36", "--stride", "2", "--pad", "repeat_last"], [36, 38, 39, 39, 39, 39]),
    ],
)
def test_json_and_which_frames(model, clip, capsys, tmp_path, options, frames):
    out_file = tmp_path / "a.png"
    args = (clip, "--model", model, "--mask-ratio", "0.5", "--out", out_file, "--json", *options)
    status, out, _ = run_command(capsys, "reconstruct", *args)
    result = json.loads(out)
    assert status == 0 and result["frames"] == frames and result["out"] == str(out_file)
    assert (result["patches"], result["hidden"], result["predicted"]) == (24, 12, 12)
    assert result["statistics"] == "estimated"
    assert list(result["rmse"]) == list(ROWS)
    for values in result["rmse"].values():
        assert list(values) == list(COLUMNS) and all(0 < value < 1 for value in values.values())


def test_true_statistics_are_told_on_the_picture(model, clip, capsys, drawn, tmp_path):
    args = (clip, "--model", model, "--mask-ratio", "0.75", "--json")
    _, honest, _ = run_command(capsys, "reconstruct", *args, "--out", tmp_path / "a.png")
    _, leaky, _ = run_command(
        capsys, "reconstruct", *args, "--out", tmp_path / "b.png", "--true-statistics"
    )
    first, second = drawn
    assert "TRUE mean and variance" in second.warning and first.warning is None
    assert not np.array_equal(first.clips[2], second.clips[2])
    honest, leaky = json.loads(honest), json.loads(leaky)
    assert leaky["statistics"] == "true" and leaky["rmse"] == honest["rmse"]
    # The picture states the errors of what it shows, and which mean is meant.
    names = (
        ("reconstruction", "patch mean, estimated", "nearest visible patch"),
        ("reconstruction", "true patch mean", "nearest visible patch with true mean and variance"),
    )
    for shown, column in ((first, 0), (second, 1)):
        values = [row[COLUMNS[column]] for row in honest["rmse"].values()]
        told = zip(names[column], values, strict=True)
        assert "; ".join(f"{name} {value:.3f}" for name, value in told) in shown.notes[1]


def test_the_mask_is_a_function_of_its_seed(model, clip, capsys, drawn, tmp_path):
    for i, seed in enumerate((3, 3, 4)):
        args = ("--mask", "random", "--seed", seed, "--mask-ratio", "0.5")
        run_command(
            capsys, "reconstruct", clip, "--model", model, "--out", tmp_path / f"{i}.png", *args
        )
    masked = [shown.clips[1] for shown in drawn]
    np.testing.assert_array_equal(masked[0], masked[1])
    assert not np.array_equal(masked[0], masked[2])
    blank = (masked[0].reshape(3, 2, 2, 8, 4, 8, 3) == round(255 * panels.HIDDEN)).all((1, 3, 5, 6))
    assert blank.sum() == 12 and not (blank == blank[0]).all()


def test_a_dual_mask_says_what_was_not_predicted(model, clip, capsys, drawn, tmp_path):
    args = ("--mask", "dual", "--mask-ratio", "0.75", "--out", tmp_path / "a.png")
    status, out, _ = run_command(capsys, "reconstruct", clip, "--model", model, *args)
    assert status == 0
    assert any("hidden and not predicted" in note for note in drawn[0].notes)
    hatch = round(255 * panels.HATCH)
    assert (drawn[0].clips[2] == hatch).all(-1).any()
    assert not (drawn[0].clips[1] == hatch).all(-1).any()
    (predicted,) = map(int, re.findall(r"18 of 24 patches hidden, (\d+) of them predicted", out))
    assert 0 < predicted < 18


def test_mp4_and_gif_show_the_panels_side_by_side(model, clip, capsys, drawn, tmp_path):
    for name in ("a.mp4", "a.GIF"):
        args = ("--mask-ratio", "0.75", "--stride", "5", "--out", tmp_path / name)
        assert run_command(capsys, "reconstruct", clip, "--model", model, *args)[0] == 0
    shown = drawn[0]
    pages = shown._moving()
    assert all((a != b).any() for a, b in zip(pages, pages[1:], strict=False))
    info = vivit_jax.probe_video(tmp_path / "a.mp4")
    video = vivit_jax.read_video(tmp_path / "a.mp4")
    source = vivit_jax.probe_video(clip)
    np.testing.assert_allclose(info.fps, source.fps / 5, rtol=1e-3)
    assert (info.num_frames, info.height % 2, info.width % 2) == (6, 0, 0)
    with Image.open(tmp_path / "a.GIF") as gif:
        assert gif.n_frames == 6 and gif.info["loop"] == 0
        assert gif.info["duration"] == 10 * round(100 * 5 / source.fps)
        for i, page in enumerate(pages):
            gif.seek(i)
            height, width = page.shape[:2]
            seen = np.asarray(gif.convert("RGB")).astype(int)
            assert abs(seen - page).mean() < 4 and abs(video[i, :height, :width] - seen).mean() < 8


@pytest.mark.parametrize(
    ("channels", "dtype", "told"),
    [
        (1, np.uint8, "1 channel: the first is shown."),
        (5, np.float32, "5 channels: the first three are shown as colours."),
    ],
)
def test_arrays_of_other_channels(capsys, drawn, tmp_path, channels, dtype, told):
    """They come from .npy files, floats in [0, 1]."""
    processor = vivit_jax.VideoProcessor.videomae(
        size={"height": 16, "width": 32}, crop_size=(16, 32), image_mean=0.4, image_std=0.3
    )
    statistics = dict(image_mean=0.4, image_std=0.3)
    model = save_model(tmp_path / "m", processor, num_channels=channels, **statistics)
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 32, channels)).astype(np.uint8)
    np.save(tmp_path / "clip.npy", frames if dtype == np.uint8 else (frames / 255).astype(dtype))
    args = ("--mask-ratio", "0.5", "--out", tmp_path / "a.png")
    status, out, err = run_command(
        capsys, "reconstruct", tmp_path / "clip.npy", "--model", model, *args
    )
    assert status == 0, err
    assert told in out and told in drawn[0].notes
    expected = frames[1:7, ..., :1].repeat(3, -1) if channels == 1 else frames[1:7, ..., :3]
    np.testing.assert_array_equal(drawn[0].clips[0], expected)


@pytest.mark.parametrize(
    ("channels", "options", "side", "told"),
    [
        (2, {}, 20, True),
        (4, {}, 20, True),
        (4, {}, 16, False),  # the size that the processor resizes to
        (4, {"independent_channels": True}, 20, False),
        (4, {"resample": 0}, 20, False),  # nearest
        (4, {"do_resize": False}, 20, False),
        (3, {}, 20, False),
    ],
)
def test_a_resize_that_mixes_channels_is_told(
    capsys, caplog, tmp_path, channels, options, side, told
):
    statistics = dict(image_mean=0.4, image_std=0.3)
    size = dict(size={"height": 16, "width": 32}, crop_size=(16, 32))
    processor = vivit_jax.VideoProcessor.videomae(**size, **statistics, **options)
    model = save_model(tmp_path / "m", processor, num_channels=channels, **statistics)
    # A last channel that decides how the others are weighted.
    frames = np.random.default_rng(0).integers(0, 256, (6, side, 32, channels)).astype(np.uint8)
    np.save(tmp_path / "clip.npy", frames)
    args = (tmp_path / "clip.npy", "--model", model, "--mask-ratio", "0.5")
    caplog.clear()
    status, _, err = run_command(capsys, "reconstruct", *args, "--out", tmp_path / "a.png")
    assert status == 0 and not err
    told_of = [text for text in caplog.messages if "taken for alpha" in text]
    assert len(told_of) == told and all("independent_channels" in text for text in told_of)
    assert all(f"the last of {channels} channels" in text for text in told_of)
    plain = dict(do_rescale=False, do_normalize=False, input_data_format="channels_last")
    first, alone = (processor(x, **plain)[..., 0] for x in (frames, frames[..., :1]))
    assert np.array_equal(first, alone) == (not told)


def test_a_model_of_pixels_needs_no_statistics(clip, capsys, drawn, tmp_path):
    model = save_model(tmp_path / "m", norm_pix_loss=False)
    args = (clip, "--model", model, "--mask-ratio", "0.75", "--out", tmp_path / "a.png")
    status, out, _ = run_command(capsys, "reconstruct", *args, "--json")
    result = json.loads(out)
    assert status == 0 and result["statistics"] == "none"
    assert result["rmse"]["reconstruction"][COLUMNS[1]] is None
    assert any("predicts pixels" in note for note in drawn[0].notes)
    status, out, err = run_command(capsys, "reconstruct", *args, "--overwrite", "--true-statistics")
    assert status == 2 and "norm_pix_loss=False" in err and err.count("\n") == 1 and not out


def test_files_are_not_overwritten_unless_asked(model, clip, capsys, tmp_path):
    out_file = tmp_path / "a.png"
    out_file.write_bytes(b"mine")
    args = (clip, "--model", model, "--mask-ratio", "0.5", "--out", out_file)
    status, _, err = run_command(capsys, "reconstruct", *args)
    assert status == 2 and "exists" in err and "--overwrite" in err
    assert out_file.read_bytes() == b"mine"
    assert run_command(capsys, "reconstruct", *args, "--overwrite")[0] == 0
    assert out_file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("suffix", ["png", "mp4", "gif"])
def test_an_interrupted_run_leaves_the_old_file(model, clip, capsys, tmp_path, monkeypatch, suffix):
    out_file = tmp_path / f"a.{suffix}"
    out_file.write_bytes(b"mine")

    def fail(self, path, *args, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(panels.Panels, f"save_{suffix}", fail)
    args = (clip, "--model", model, "--mask-ratio", "0.5", "--out", out_file, "--overwrite")
    status, _, err = run_command(capsys, "reconstruct", *args)
    assert status == 2 and "disk full" in err
    assert [path.name for path in tmp_path.iterdir()] == [out_file.name]
    assert out_file.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--out": "{tmp}/a.jpg"}, "ends in '.jpg'; expected one of .png, .mp4, .gif"),
        ({"--out": "{tmp}/a"}, "ends in ''"),
        ({"--out": "{tmp}/none/a.png"}, "there is no directory"),
        ({"--out": "{tmp}/folder.png"}, "is a directory"),
        ({"--mask-ratio": "1.5"}, "--mask-ratio must be between 0 and 1, got 1.5"),
        ({"--mask-ratio": "0.01"}, "mask ratio 0.01 masks 0 of 8 positions per frame"),
        ({"--seed": "-1"}, "--seed must not be negative"),
        ({"--start": "middle"}, "begin, center, end or a frame"),
        ({"--stride": "0"}, "stride"),
        ({"--stride": "20"}, "6 frames at stride 20"),
        ({"--start": "99"}, "(--start center)"),
        ({"--model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"clip": "{tmp}/none.mp4"}, "none.mp4"),
        ({"clip": "{tmp}/text.npy"}, "not an array in numpy's .npy format"),
        ({"clip": "{tmp}/flat.npy"}, "shape (3, 4)"),
        ({"clip": "{tmp}/ints.npy"}, "an array of int64"),
        ({"clip": "{tmp}/nan.npy"}, "floats from nan to nan"),
        ({"clip": "{tmp}/big.npy"}, "floats from 0 to 255"),
        ({"clip": "{tmp}/short.npy"}, "there are 2 frames"),
        ({"clip": "{tmp}/short.npy"}, "(--pad repeat_last)"),
        ({"clip": "{tmp}/grey.npy"}, "grey.npy has 1 channel, the model takes 3"),
    ],
)
def test_wrong_input_is_one_line(model, clip, capsys, tmp_path, changes, told):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "text.npy").write_text("not an array")
    arrays = {
        "flat": np.zeros((3, 4), np.uint8),
        "ints": np.zeros((8, 16, 32, 3), np.int64),
        "nan": np.full((8, 16, 32, 3), np.nan),
        "big": np.linspace(0, 255, 8)[:, None, None, None] * np.ones((1, 16, 32, 3)),
        "short": np.zeros((2, 16, 32, 3), np.uint8),
        "grey": np.zeros((8, 16, 32, 1), np.uint8),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    before = sorted(path.name for path in tmp_path.iterdir())
    values = {"clip": clip, "--model": model, "--mask-ratio": "0.5", "--out": tmp_path / "a.png"}
    values |= {key: text.format(tmp=tmp_path) for key, text in changes.items()}
    args = [values.pop("clip"), *(part for pair in values.items() for part in pair)]
    status, out, err = run_command(capsys, "reconstruct", *args)
    assert status == 2 and told in err, err
    assert err.count("\n") == 1 and not out
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_model_without_decoder_is_refused(clip, capsys, tmp_path):
    module = vivit_jax.VideoMAEForVideoClassification(vivit_jax.VideoMAEConfig(**SIZES))
    vivit_jax.save_pretrained(
        tmp_path / "m", module, random_params(module), vivit_jax.VideoProcessor.videomae()
    )
    status, out, err = run_command(
        capsys, "reconstruct", clip, "--model", tmp_path / "m", "--out", tmp_path / "a.png"
    )
    assert status == 2 and "holds VideoMAEForVideoClassification" in err and not out
    assert "needs a pre-trained VideoMAE with its decoder" in err


def test_the_suffix_is_checked_before_the_model(clip, capsys, tmp_path):
    status, _, err = run_command(
        capsys, "reconstruct", clip, "--model", "/nowhere", "--out", tmp_path / "a.webp"
    )
    assert status == 2 and ".webp" in err and "/nowhere" not in err


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (1, [0]),
        (8, range(8)),
        (9, [0, 1, 2, 3, 5, 6, 7, 8]),
        (16, [0, 2, 4, 6, 9, 11, 13, 15]),  # one of each tubelet of two
        (64, range(0, 64, 9)),
    ],
)
def test_a_png_of_many_frames_shows_evenly_spaced_ones(tmp_path, count, shown):
    times = [f"frame {i}" for i in range(count)]
    clip = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(224, 2).repeat(3, 3)
    drawn = []

    class Recorder(panels.Panels):
        def _page(self, *args):
            drawn.append((list(self.notes), *args))
            return super()._page(*args)

    Recorder("t", ("n",), None, ["a"], [clip], times).save_png(tmp_path / "a.png")
    ((notes, rows, _, columns, *_),) = drawn
    assert columns == [times[i] for i in shown]
    assert [int(frame[0, 0, 0]) for frame in rows[0]] == list(shown)
    told = [f"8 of {count} frames are drawn, evenly spaced from first to last."]
    assert notes == (["n", *told] if count > 8 else ["n"])
    with Image.open(tmp_path / "a.png") as image:
        assert image.width < 2000
