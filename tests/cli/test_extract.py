# SPDX-License-Identifier: Apache-2.0
import contextlib
import itertools
import json
import os
import re
import sys
import threading
import types
import zipfile
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from clips import write_clip
from commands import run_command
from helpers import forward, mostly_slow, random_params
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny import VIDEOMAE, VIVIT

import vivit_jax
from vivit_jax import progress as progress_module
from vivit_jax.cli.__main__ import main
from vivit_jax.cli.extract import _outputs
from vivit_jax.data.sliding_window import Windows, slide
from vivit_jax.data.video.frame_stream import FrameStream
from vivit_jax.inference import features
from vivit_jax.inference.feature_file import RowWriter, changed, read_metadata
from vivit_jax.inference.features import _model_for, _program, extract_features
from vivit_jax.progress import LiveLine

# The package has the command's function under the module's name.
extract_module = sys.modules["vivit_jax.cli.extract"]
FRAMES = 90
STAGED = VIVIT | dict(attention_type="factorised_encoder", num_temporal_layers=2)
CLASSES = {
    "vivit": (vivit_jax.VivitForVideoClassification, vivit_jax.VivitConfig, VIVIT),
    "staged": (vivit_jax.VivitModel, vivit_jax.VivitConfig, STAGED),
    "mean": (
        vivit_jax.VivitForVideoClassification,
        vivit_jax.VivitConfig,
        VIVIT | dict(attention_type="factorised_dot_product", pooling="mean"),
    ),
    "mae": (vivit_jax.VideoMAEForVideoClassification, vivit_jax.VideoMAEConfig, VIDEOMAE),
    "pretraining": (
        vivit_jax.VideoMAEForPreTraining,
        vivit_jax.VideoMAEConfig,
        VIDEOMAE | dict(use_mean_pooling=False),
    ),
}


def processor_of(name):
    family = "videomae" if name in ("mae", "pretraining") else "vivit"
    return getattr(vivit_jax.VideoProcessor, family)(size=28, crop_size=(24, 16))


@pytest.fixture(scope="module")
def models():
    """name -> (model, params, processor); drawn once."""
    made = {}

    def get(name):
        if name not in made:
            cls, config, values = CLASSES[name]
            model = cls(config(**values))
            made[name] = model, random_params(model), processor_of(name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def model(models, tmp_path_factory):
    directory = tmp_path_factory.mktemp("extract") / "model"
    vivit_jax.save_pretrained(directory, *models("mae"))
    return directory


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("videos") / "a.mp4", frames=FRAMES, size=(96, 64))


def load(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def loop(model, params, processor, video, starts, stride, of):
    """The naive way: read, prepare and compute each window by itself."""
    rows = []
    for start in starts:
        indices = [start + stride * j for j in range(model.config.num_frames)]
        pixels = processor(vivit_jax.read_video(video, indices=indices))
        rows.append(np.asarray(of(forward(model, params, pixels, output_hidden_states=True))[0]))
    return np.stack(rows)


def assert_rows(found, expected):
    found = np.stack([row.features for row in found])
    assert found.shape == expected.shape and expected.std() > 0.01
    scale = max(1.0, float(np.sqrt(np.mean(expected**2))))
    assert np.abs(found - expected).max() <= 2e-5 * scale  # measured 2e-6
    return found


def test_command_equals_a_naive_loop(models, model, video, capsys, tmp_path):
    out = tmp_path / "a.safetensors"
    status, told, _ = run_command(
        capsys, "extract", video, "--model", model, "--out", out, "--window-stride", 7
    )
    assert status == 0 and "10x48 features of 90 frames" in told and str(out) in told
    arrays = load(out)
    # Six frames, four apart: 21 from the first to the last.
    starts = range(0, FRAMES - 20, 7)
    indices = np.array([[s + 4 * j for j in range(6)] for s in starts])
    np.testing.assert_array_equal(arrays["frame_indices"], indices)
    np.testing.assert_allclose(arrays["frame_seconds"], indices / 25, atol=1e-9)
    classifier, params, processor = models("mae")
    encoder = vivit_jax.VideoMAEModel(classifier.config)
    expected = loop(
        *(encoder, params["backbone"], processor, video, starts, 4),
        lambda out: out.last_hidden_state.mean(1),
    )
    np.testing.assert_allclose(arrays["features"], expected, atol=2e-5)
    assert abs(arrays["features"].sum(dtype=np.float64) - expected.sum(dtype=np.float64)) < 1e-4
    assert not [p for p in tmp_path.iterdir() if p != out]


def test_videos_of_folders_keep_their_folders(model, video, capsys, tmp_path, monkeypatch):
    """A directory of classes, several directories, and files of one name."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/a b/0.mp4", "data/c/0.mp4", "data/c/1.mp4", "other/0.mp4"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(video)

    def places(*given):
        return sorted(
            str(path) for _, path in _outputs([Path(each) for each in given], Path("f"), "npz")
        )

    classes = ["f/a b/0.npz", "f/c/0.npz", "f/c/1.npz"]
    assert places("data") == places(tmp_path / "data") == classes
    assert places("data/a b", "data/c") == classes
    assert places("data/a b/0.mp4", "data/c/0.mp4", "data/c/1.mp4") == classes
    assert places("data/a b", "other") == ["f/data/a b/0.npz", "f/other/0.npz"]
    # As before: one file of each name.
    assert places("data/a b/0.mp4", "data/c/1.mp4") == ["f/0.npz", "f/1.npz"]
    args = ("data", "--model", model, "--out", "f", "--frame-stride", 8)
    status, told, _ = run_command(capsys, "extract", *args)
    assert status == 0 and told.count("features of 90 frames") == 3
    made = sorted(str(p) for p in Path("f").rglob("*") if p.is_file())
    assert made == [name.replace("npz", "safetensors") for name in classes]
    assert run_command(capsys, "extract", *args)[1].count("already in") == 3
    Path("broken/d").mkdir(parents=True)
    Path("broken/d/0.mp4").write_bytes(b"no video")
    status, _, err = run_command(capsys, "extract", "broken", *args[1:4], "g")
    assert status == 1 and err.count("\n") == 1 and not Path("g").exists()


PARTS = {
    # name of the model, layer, pool -> what of the naive loop's output it is
    ("mae", 0, "mean"): lambda out: out.hidden_states[0].mean(1),
    ("mae", 2, "tokens"): lambda out: out.hidden_states[2],
    ("vivit", "last", "mean"): lambda out: out.last_hidden_state[:, 1:].mean(1),
    ("vivit", 3, "cls"): lambda out: out.hidden_states[3][:, 0],
    ("mean", "last", "mean"): lambda out: out.last_hidden_state.mean(1),
    ("staged", "last", "cls"): lambda out: out.last_hidden_state[:, 0],
    ("staged", 2, "mean"): lambda out: out.hidden_states[2][:, :, 1:].mean((1, 2)),
    ("staged", 1, "cls"): lambda out: out.hidden_states[1][:, :, 0],
    ("staged", "temporal:2", "tokens"): lambda out: out.temporal_hidden_states[2],
}


@pytest.mark.parametrize(
    ("name", "layer", "pool"),
    mostly_slow(
        PARTS,
        *(("mae", 2, "tokens"), ("vivit", "last", "mean"), ("vivit", 3, "cls")),
        ("staged", "temporal:2", "tokens"),
    ),
)
def test_layers_and_pools(models, video, name, layer, pool):
    model, params, processor = models(name)
    how = dict(layer=layer, pool=pool, frame_stride=3, window_stride=30)
    found = list(extract_features(model, params, processor, video, **how))
    cls = vivit_jax.VideoMAEModel if name == "mae" else vivit_jax.VivitModel
    options = {} if name == "mae" else {"add_pooling_layer": False}
    backbone = cls(model.config, **options)
    params = params.get("backbone", params)
    assert_rows(
        found, loop(backbone, params, processor, video, [0, 30, 60], 3, PARTS[name, layer, pool])
    )


def test_the_encoder_of_a_pretrained_model_sees_everything(models, video):
    model, params, processor = models("pretraining")
    encoder = vivit_jax.VideoMAEModel(model.config)
    for layer, of in {
        "last": lambda out: out.last_hidden_state.mean(1),  # after its final norm
        "3": lambda out: out.hidden_states[3].mean(1),
    }.items():
        found = list(extract_features(model, params, processor, video, layer=layer))
        expected = loop(encoder, params["backbone"], processor, video, [0, 24, 48], 4, of)
        assert_rows(found, expected)


@pytest.mark.parametrize("name", ["mae", "vivit"])
def test_what_the_head_reads(models, video, name):
    """Through the classifier's own kernel and bias it gives the classifier's logits."""
    model, params, processor = models(name)
    how = dict(pool="head", frame_stride=3, window_stride=30)
    found = np.stack([r.features for r in extract_features(model, params, processor, video, **how)])
    head = params["head"]
    logits = loop(model, params, processor, video, [0, 30, 60], 3, lambda out: out.logits)
    np.testing.assert_allclose(found @ head["kernel"] + head["bias"], logits, atol=5e-5)


def test_blocks_after_the_layer_are_not_computed(models):
    model, params, processor = models("mae")
    clips = np.zeros((1, 6, 24, 16, 3), np.uint8)

    def flops(layer):
        part, weights = _model_for(model, params, layer, "mean")
        program = _program(part, layer, "mean", ((1.0,), (0.0,)))
        return program.lower(weights, clips).compile().cost_analysis()["flops"]

    one, two, three = (flops(layer) for layer in (1, 2, 3))
    assert two > 1.4 * one and abs((three - two) - (two - one)) < 0.05 * (two - one)


def test_bits_do_not_depend_on_the_batch_or_on_other_windows(models, video):
    model, params, processor = models("vivit")

    def rows(stride, **how):
        found = extract_features(
            model, params, processor, video, frame_stride=1, window_stride=stride, **how
        )
        return {int(row.frame_indices[0]): row.features for row in found}

    one = rows(5, batch_size=1)
    assert len(one) == 17
    for other in (rows(5, batch_size=3), rows(5, batch_size=8), rows(5, batch_size=64)):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[k], other[k]) for k in one)
    coarse = rows(20, batch_size=2)
    assert coarse.keys() == {0, 20, 40, 60, 80}
    assert all(np.array_equal(one[k], coarse[k]) for k in coarse)


def test_a_batch_at_once_is_equal_to_rounding_and_drops_what_fills_it(models, video):
    model, params, processor = models("mae")
    how = dict(window_stride=10)
    one = list(extract_features(model, params, processor, video, **how))
    together = list(
        extract_features(model, params, processor, video, **how, batch_size=4, exact=False)
    )
    assert len(together) == 7
    assert_rows(together, np.stack([row.features for row in one]))


@pytest.mark.parametrize(
    ("total", "windows", "expected"),
    [
        # num_frames, frame_stride, stride, pad
        (10, (3, 2, 5, "drop"), [[0, 2, 4], [5, 7, 9]]),
        (9, (3, 2, 5, "drop"), [[0, 2, 4]]),
        (9, (3, 2, 5, "repeat_last"), [[0, 2, 4], [5, 7, 8]]),
        (10, (3, 2, 5, "repeat_last"), [[0, 2, 4], [5, 7, 9]]),
        (7, (3, 1, 1, "repeat_last"), [[k, k + 1, k + 2] for k in range(5)]),
        (3, (3, 2, 5, "repeat_last"), [[0, 2, 2]]),
        (1, (3, 2, 5, "repeat_last"), [[0, 0, 0]]),
        (12, (3, 1, 10, "drop"), [[0, 1, 2]]),
        (12, (3, 1, 10, "repeat_last"), [[0, 1, 2], [10, 11, 11]]),
        (9, (3, 1, 10, "repeat_last"), [[0, 1, 2]]),  # the next window would begin past the end
    ],
)
def test_which_windows_there_are(models, tmp_path, total, windows, expected):
    path = write_clip(tmp_path / "a.mp4", frames=total)
    prepared = []

    def prepare(image):
        prepared.append(1)
        return image

    stream = FrameStream(path)
    found = list(slide(stream, Windows(*windows), prepare))
    assert [w.indices.tolist() for w in found] == expected
    for window in found:
        np.testing.assert_array_equal(
            window.clip, vivit_jax.read_video(path, indices=window.indices)
        )
        np.testing.assert_allclose(window.seconds, window.indices / 25, atol=1e-9)
    # Shared frames are prepared once, and frames of no kept window never.
    num_frames, frame_stride, stride, _ = windows
    offsets = range(0, num_frames * frame_stride, frame_stride)
    wanted = {start + k for start in range(0, total, stride) for k in offsets}
    wanted |= {k for row in expected for k in row}
    assert len(prepared) == len(wanted & set(range(total)))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_windows_by_the_second_follow_the_times_of_the_file(tmp_path, suffix):
    """25 frames a second, a gap of a second after frame 9, then a frame every 0.3 s."""
    times = [*(k / 25 for k in range(10)), *(1.36 + 0.3 * k for k in range(5))]
    path = write_clip(tmp_path / f"a{suffix}", frames=len(times), times=times)
    windows = Windows(2, 1, 0.2, "repeat_last", in_seconds=True)
    found = list(slide(FrameStream(path), windows, lambda image: image))
    # Of 0.4 to 1.2 s the first frame is the same. The one from frame 14 on would show nothing new.
    assert [w.indices.tolist() for w in found] == [[k, k + 1] for k in (0, 5, 10, 11, 12, 13)]
    for window in found:
        np.testing.assert_allclose(window.seconds, np.array(times)[window.indices], atol=6e-4)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("stride", [0.1, 0.2, 0.3])
def test_times_rounded_to_milliseconds_give_no_window_twice(tmp_path, stride):
    """As NTSC's in Matroska: 31.999 s is the frame of 32 s, and the next one is not."""
    times = [k * 1001 / 30000 for k in range(1000)]
    path = write_clip(tmp_path / "a.mkv", frames=1000, size=(16, 16), times=times)
    windows = Windows(1, 1, stride, in_seconds=True)
    begun = [window.seconds[0] for window in slide(FrameStream(path), windows, lambda image: image)]
    count = int((times[-1] + 1e-3) / stride) + 1
    wanted = np.arange(count) * stride
    assert len(begun) == count
    assert stride == 0.3 or np.isclose(begun, 31.999).any()
    assert (begun >= wanted - 1.5e-3).all() and (begun <= wanted + 1001 / 30000 + 1e-3).all()


def test_the_encoder_with_a_pooling_layer_gives_what_a_head_would_read(video, capsys, tmp_path):
    encoder = vivit_jax.VideoMAEModel(vivit_jax.VideoMAEConfig(**VIDEOMAE), add_pooling_layer=True)
    params, processor = random_params(encoder), processor_of("mae")
    vivit_jax.save_pretrained(tmp_path / "encoder", encoder, params, processor)
    how = ("--pool", "head", "--window-stride", 30)
    out = tmp_path / "a.npz"
    status, *_ = run_command(
        capsys, "extract", video, "--model", tmp_path / "encoder", "--out", out, *how
    )
    assert status == 0
    expected = loop(
        *(encoder, params, processor, video, [0, 30, 60], 4), lambda out: out.pooler_output
    )
    np.testing.assert_allclose(np.load(out)["features"], expected, atol=2e-5)
    status, _, err = run_command(
        capsys, "extract", video, "--model", tmp_path / "encoder", "--out", out, *how, "--layer", 1
    )
    assert status == 2 and "got --layer 1: use --pool mean" in err


def test_progress_is_of_rows_and_not_of_what_is_read_ahead(models, video, monkeypatch):
    calls, computed = [], []
    fetch = features._fetch

    def counted(batch, outputs):
        computed.append(int(batch[-1].indices[-1]) + 1)
        return fetch(batch, outputs)

    monkeypatch.setattr(features, "_fetch", counted)
    rows = extract_features(
        *models("mae"),
        video,
        window_stride=4,
        batch_size=2,
        progress=lambda done, announced: calls.append((done, computed[-1])),
    )
    assert len(list(rows)) > 12
    assert all(done == last for done, last in calls[:-1]) and len(calls) == len(computed)
    assert calls[-1][0] == FRAMES


def test_damage_counts_where_a_window_has_the_frame(models, tmp_path):
    import av

    path = write_clip(tmp_path / "a.mp4", b_frames=0, options={"preset": "medium"}, size=(128, 96))
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][13]
        place = slice(packet.pos + packet.size // 2, packet.pos + packet.size - 4)
    data = bytearray(path.read_bytes())
    data[place] = bytes(byte ^ 255 for byte in data[place])
    path.write_bytes(data)
    model, params, processor = models("mae")
    how = dict(frame_stride=2)
    rows = extract_features(model, params, processor, path, **how, window_stride=12)
    assert [int(row.frame_indices[0]) for row in rows] == [0, 12]
    rows = extract_features(model, params, processor, path, **how, window_stride=3, batch_size=1)
    with pytest.raises(vivit_jax.VideoError, match="damage in frame 13"):
        list(rows)


def test_stopping_early_leaves_no_thread(models, video):
    before = threading.active_count()
    rows = extract_features(*models("mae"), video, window_stride=1, batch_size=1)
    next(rows)
    rows.close()
    assert threading.active_count() == before


def test_seconds_progress_and_padding(model, video, capsys, tmp_path):
    out = tmp_path / "a.safetensors"
    args = ("--model", model, "--out", out, "--window-stride", "0.5s", "--pad", "repeat_last")
    status, _, _ = run_command(capsys, "extract", video, *args, "--frame-stride", 5)
    assert status == 0
    # Half a second is 12.5 frames; 26 frames from a window's first to its last.
    starts = [0, 13, 25, 38, 50, 63, 75]
    indices = [[min(s + 5 * j, FRAMES - 1) for j in range(6)] for s in starts]
    np.testing.assert_array_equal(load(out)["frame_indices"], indices)
    assert read_metadata(out)["settings"]["window_stride"] == "0.5s"


def test_progress_counts_frames(models, video):
    calls = []
    rows = extract_features(*models("mae"), video, progress=lambda *args: calls.append(args))
    assert len(list(rows)) == 3
    assert calls[-1] == (FRAMES, FRAMES) and calls == sorted(calls)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_half_precision(models, model, video, capsys, tmp_path, dtype, suffix):
    out = tmp_path / f"a.{suffix}"
    args = ("--model", model, "--pool", "tokens")
    assert run_command(capsys, "extract", video, *args, "--out", out, "--dtype", dtype)[0] == 0
    found = load(out) if suffix == "safetensors" else np.load(out)
    features = found["features"]
    stored = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    in_npz = suffix == "npz" and dtype == "bfloat16"
    assert features.dtype == (np.float32 if in_npz else stored)
    assert np.array_equal(features, features.astype(stored).astype(features.dtype))
    full = np.stack([r.features for r in extract_features(*models("mae"), video, pool="tokens")])
    error = np.abs(features.astype(np.float32) - full).max() / full.std()
    assert 1e-4 < error < 0.1
    assert read_metadata(out)["settings"]["dtype"] == dtype


def test_npz_and_safetensors_hold_the_same(model, video, capsys, tmp_path):
    for name in ("a.npz", "a.safetensors"):
        args = ("--model", model, "--out", tmp_path / name, "--pool", "tokens", "--layer", 1)
        assert run_command(capsys, "extract", video, *args)[0] == 0
    with np.load(tmp_path / "a.npz") as arrays:
        first = {name: arrays[name] for name in arrays}
    text = json.loads(first.pop("metadata").item())
    second = load(tmp_path / "a.safetensors")
    assert first.keys() == second.keys() == {"features", "frame_indices", "frame_seconds"}
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
        assert first[name].dtype == second[name].dtype
    assert text == read_metadata(tmp_path / "a.safetensors")
    assert text["model"] == str(model) and text["settings"]["layer"] == "1"
    assert text["video"]["path"] == str(video) and text["video"]["frames"] == FRAMES
    assert text["video"]["file"]["bytes"] == video.stat().st_size


def test_torch_reads_what_is_not_aligned(tmp_path):
    """Three rows of bfloat16 that end between the eight bytes of the other arrays."""
    from safetensors.torch import load_file

    path = tmp_path / "a.safetensors"
    rows = np.arange(9, dtype=np.float32).reshape(3, 3).astype(ml_dtypes.bfloat16)
    with RowWriter(path) as writer:
        for k, row in enumerate(rows):
            writer.add(features=row, frame_indices=np.array([k]))
        writer.finish({"a": 'quotes " and ü'})
    found = load_file(path)
    assert found["features"].float().tolist() == rows.astype(np.float32).tolist()
    assert found["frame_indices"].tolist() == [[0], [1], [2]]
    assert read_metadata(path) == {"a": 'quotes " and ü'}
    with RowWriter(path) as writer:
        writer.add(features=rows[0])
        with pytest.raises(ValueError, match="row 1"):
            writer.add(features=rows[0, :2])


@pytest.fixture(scope="module")
def feature_files(model, video, tmp_path_factory):
    directory = tmp_path_factory.mktemp("features")
    for suffix in ("npz", "safetensors"):
        path = directory / f"a.{suffix}"
        assert main(["extract", str(video), "--model", str(model), "--out", str(path)]) == 0
    return directory


def npz_with(path, change):
    """The file with other arrays, as numpy writes them: a zip has checksums of its own."""
    with np.load(path) as arrays:
        values = {name: arrays[name] for name in arrays}
        comment = arrays.zip.comment
    change(values)
    np.savez(path, **values)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment


def safetensors_with(path, change):
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    values = load(path)
    change(values)
    save_file(values, path, metadata)


def one_bit(arrays):
    arrays["features"] = arrays["features"].copy()
    arrays["features"].view(np.uint8).reshape(-1)[17] ^= 1


def other_shape(arrays):
    arrays["features"] = arrays["features"].reshape(arrays["features"].shape[::-1])


def other_type(arrays):
    arrays["frame_seconds"] = arrays["frame_seconds"].view(np.int64)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (one_bit, "features"),
        (other_shape, "features"),
        (other_type, "frame_seconds"),
        (lambda arrays: arrays.pop("frame_indices"), "frame_indices"),
        (lambda arrays: arrays.update(more=np.zeros(2)), "more"),
    ],
    ids=["a bit", "another shape", "another type", "an array less", "an array more"],
)
def test_arrays_that_were_changed_are_not_taken_for_done(
    model, video, feature_files, capsys, tmp_path, suffix, change, named
):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((feature_files / path.name).read_bytes())
    args = (video, "--model", model, "--out", path)
    assert changed(path) == []
    {"npz": npz_with, "safetensors": safetensors_with}[suffix](path, change)
    assert changed(path) == [named]
    if change is not one_bit:
        return
    status, told, errors = run_command(capsys, "extract", *args)
    assert status == 2 and f"{path} is damaged: {named} not as it was written" in errors
    assert errors.count("\n") == 1 and "--overwrite" in errors
    assert run_command(capsys, "extract", *args, "--overwrite")[0] == 0
    assert path.read_bytes() == (feature_files / path.name).read_bytes()


def test_a_zip_that_is_damaged_itself_is_one_line(model, video, feature_files, capsys, tmp_path):
    data = bytearray((feature_files / "a.npz").read_bytes())
    data[200] ^= 1  # of the first array, whose CRC no longer fits
    (tmp_path / "a.npz").write_bytes(data)
    status, _, errors = run_command(
        capsys, "extract", video, "--model", model, "--out", tmp_path / "a.npz"
    )
    assert status == 2 and "is not a feature file: Bad CRC-32" in errors
    assert "; pass --overwrite" in errors and errors.count("\n") == 1


def test_a_feature_file_of_an_earlier_version_has_no_checksums(
    model, video, feature_files, capsys, tmp_path
):
    path = tmp_path / "a.npz"
    path.write_bytes((feature_files / path.name).read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b""
    status, told, errors = run_command(capsys, "extract", video, "--model", model, "--out", path)
    assert status == 0 and "already in" in told
    assert errors == f"{path} has no checksums; damage in it goes unnoticed\n"


@pytest.fixture
def videos(video, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (folder / name).write_bytes(video.read_bytes())
    return [folder / name for name in ("a.mp4", "b.mp4", "c.mp4")]


def test_a_list_goes_on_where_it_stopped(model, videos, capsys, tmp_path, monkeypatch):
    out = tmp_path / "features"
    args = ("--model", model, "--out", out)
    whole = videos[1].read_bytes()
    videos[1].write_bytes(b"not a video")
    status, told, errors = run_command(capsys, "extract", *videos, *args)
    assert status == 1 and "b.mp4: no readable video" in errors and errors.count("\n") == 1
    assert sorted(p.name for p in out.iterdir()) == ["a.safetensors", "c.safetensors"]

    # An unforeseen error, in any thread, concerns one video only.
    def opened(path):
        if Path(path).name == "b.mp4":
            raise ValueError("31 is not a valid Type")
        return FrameStream(path)

    def slid(stream, *args):
        yield from itertools.islice(slide(stream, *args), 2)
        if stream.name.endswith("b.mp4"):
            raise ValueError("31 is not a valid Type")

    videos[1].write_bytes(whole)
    for place, fails in (("open_stream", opened), ("slide", slid)):
        (out / "a.safetensors").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(features, place, fails)
            status, told, errors = run_command(capsys, "extract", *videos, *args)
        assert status == 1 and told.count("written to") == 1
        assert f"{videos[1]}: ValueError: 31 is not a valid Type (unforeseen, in test_" in errors
        assert sorted(p.name for p in out.iterdir()) == ["a.safetensors", "c.safetensors"]
    (out / "a.safetensors").unlink()
    assert run_command(capsys, "extract", videos[0], *args)[0] == 0
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    # No number depends on the batch or on the place of the model.
    status, told, errors = run_command(capsys, "extract", *videos, *args, "--batch-size", 2)
    assert status == 0 and not errors
    assert told.count("already in") == 2 and told.count("written to") == 1
    for path, (time, content) in before.items():
        assert path.stat().st_mtime_ns == time and path.read_bytes() == content
    a, b = load(out / "a.safetensors"), load(out / "b.safetensors")
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--layer", "1"], "layer (last, now 1)"),
        (["--pad", "repeat_last"], "pad (drop, now repeat_last)"),
        (["--window-stride", "5"], "window_stride (24, now 5)"),
        (["--dtype", "bfloat16"], "dtype (float32, now bfloat16)"),
        ("video", "video"),
        ("weights", "params_sha256"),
        ("processor", "processor"),
        ("file", "not a feature file"),
    ],
    ids=str,
)
def test_a_file_with_other_settings_is_refused(
    models, model, videos, capsys, tmp_path, change, message
):
    out, args = tmp_path / "features", ["--model", model]
    assert run_command(capsys, "extract", videos[0], *args, "--out", out)[0] == 0
    made = out / "a.safetensors"
    net, params, processor = models("mae")
    if change == "video":
        os.utime(videos[0], ns=(1, 1))
    elif change == "file":
        made.write_bytes(b"something else")
    elif change == "weights":
        vivit_jax.save_pretrained(tmp_path / "m", net, random_params(net, seed=1), processor)
        args = ["--model", tmp_path / "m"]
    elif change == "processor":
        other = vivit_jax.VideoProcessor.videomae(size=32, crop_size=(24, 16))
        vivit_jax.save_pretrained(tmp_path / "m", net, params, other)
        args = ["--model", tmp_path / "m"]
    else:
        args += change
    before = made.read_bytes()
    status, told, errors = run_command(capsys, "extract", *videos, *args, "--out", out)
    assert status == 2 and message in errors and "--overwrite" in errors and not told
    assert made.read_bytes() == before and len(list(out.iterdir())) == 1
    status, told, _ = run_command(capsys, "extract", videos[0], *args, "--out", out, "--overwrite")
    assert status == 0 and "written to" in told and made.read_bytes() != before


def test_equal_settings_are_recognised(model, video, capsys, tmp_path, monkeypatch):
    import jax

    args = (video, "--model", model, "--out", tmp_path / "a.safetensors", "--window-stride")
    assert run_command(capsys, "extract", *args, ".5s")[0] == 0
    settings = read_metadata(tmp_path / "a.safetensors")["settings"]
    assert settings["window_stride"] == "0.5s" and settings["exact"] is True
    for same in (["0.50s"], ["00.5s", "--exact"]):  # on a CPU, --exact changes nothing
        status, told, err = run_command(capsys, "extract", *args, *same)
        assert status == 0 and "already in" in told, err
    status, _, err = run_command(capsys, "extract", *args, "5s")
    assert status == 2 and "window_stride (0.5s, now 5s)" in err
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    status, _, err = run_command(capsys, "extract", *args, "0.5s")
    assert status == 2 and "another exact (True, now False)" in err
    status, told, err = run_command(capsys, "extract", *args, "0.5s", "--exact")
    assert status == 0 and "already in" in told, err


def test_a_video_of_the_longest_name(model, video, capsys, tmp_path):
    long = tmp_path / f"{'a' * 243}.mp4"
    long.write_bytes(video.read_bytes())
    status, _, err = run_command(capsys, "extract", long, "--model", model, "--out", tmp_path / "f")
    assert status == 0, err
    assert [p.name for p in (tmp_path / "f").iterdir()] == [f"{'a' * 243}.safetensors"]


def test_a_video_shorter_than_a_window(model, capsys, tmp_path):
    short = write_clip(tmp_path / "short.mp4", frames=20)
    args = (short, "--model", model, "--out", tmp_path / "f.npz")
    status, told, errors = run_command(capsys, "extract", *args)
    assert status == 1 and not told and not (tmp_path / "f.npz").exists()
    assert "short.mp4: 20 frames, fewer than the 21 of a window" in errors
    assert "--pad repeat_last" in errors and errors.count("\n") == 1
    assert run_command(capsys, "extract", *args, "--pad", "repeat_last")[0] == 0
    with np.load(tmp_path / "f.npz") as arrays:
        assert arrays["frame_indices"].tolist() == [[0, 4, 8, 12, 16, 19]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{video}", "--out", "{tmp}/f.mp4"], "is a file"),
        (["{video}", "--out", "{tmp}/no/f.npz"], "there is no directory"),
        (["{video}", "--out", "{tmp}/f.mp4/sub/f"], "f.mp4 is a file; expected a directory"),
        (["{video}", "--out", "{tmp}/f.mp4/f.npz"], "f.mp4 is a file; expected a directory"),
        (["{video}", "--out", "/proc"], "--out /proc: no file can be made in /proc"),
        (["{video}", "--out", "/proc/no/f"], "--out /proc/no/f: no file can be made in /proc"),
        (["{video}", "--out", "{tmp}/{long}"], "File name too long"),
        (["{video}", "--out", "{tmp}/no/{long}"], "File name too long"),
        (["{video}", "--out", "{tmp}/{long}.npz"], "File name too long"),
        (["{tmp}/{long}.mp4", "--out", "{tmp}/f"], "File name too long"),
        (["{video}", "--out", "{tmp}/x.npy"], "ends in '.npy'; expected .safetensors or .npz"),
        (["{video}", "--out", "{tmp}/x.H5"], "a directory (create one of this name first)"),
        (["{video}", "{video}", "--out", "{tmp}/f.npz"], "one file, for 2 videos"),
        (["{video}", "{tmp}/a.mkv", "--out", "{tmp}/f"], "would both be written to"),
        (["{video}", "--out", "{tmp}/f.npz", "--format", "safetensors"], "contradict"),
        (["--out", "{tmp}/f.npz"], "at least one video file"),
        (["{video}", "--out", "{tmp}/f.npz", "--layer", "4"], "0 (the embedding) to 3"),
        (["{video}", "--out", "{tmp}/f.npz", "--layer", "-1"], "0 (the embedding) to 3"),
        (["{video}", "--out", "{tmp}/f.npz", "--layer", "temporal:1"], "0 (the embedding) to 3"),
        (["{video}", "--out", "{tmp}/f.npz", "--layer", "²"], "0 (the embedding) to 3"),
        (["{video}", "--out", "{tmp}/f.npz", "--pool", "cls"], "no class token"),
        (
            ["{video}", "--out", "{tmp}/f.npz", "--pool", "head", "--layer", "2"],
            "input of a classifier after the last layer; got --layer 2",
        ),
        (["{video}", "--out", "{tmp}/f.npz", "--batch-size", "0"], "--batch-size must be"),
        (["{video}", "--out", "{tmp}/f.npz", "--frame-stride", "0"], "--frame-stride"),
        (["{video}", "--out", "{tmp}/f.npz", "--window-stride", "0"], "--window-stride"),
        (["{video}", "--out", "{tmp}/f.npz", "--window-stride", "0.0s"], "--window-stride"),
        (["{video}", "--out", "{tmp}/f.npz", "--window-stride", "1.5"], "seconds such as 0.5s"),
        (["{video}", "--out", "{tmp}/f.npz", "--window-stride", "-2"], "--window-stride"),
        (["{video}", "--out", "{tmp}/f.npz", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_line(model, video, capsys, tmp_path, args, message):
    (tmp_path / "f.mp4").write_bytes(b"")
    filled = [arg.format(video=video, tmp=tmp_path, long="a" * 256) for arg in args]
    if "--model" not in filled:
        filled += ["--model", str(model)]
    status, out, err = run_command(capsys, "extract", *filled)
    assert status == 2 and message in err and err.count("\n") == 1 and not out
    assert [p.name for p in tmp_path.iterdir()] == ["f.mp4"]


def test_outputs_are_checked_before_the_model(video, capsys, tmp_path):
    """The model is not opened; --overwrite does not replace a directory."""
    (tmp_path / "f" / "a.safetensors").mkdir(parents=True)
    args = (video, "--model", "/nowhere", "--overwrite", "--out")
    for out, message in {
        tmp_path / "f": f"{tmp_path}/f/a.safetensors is a directory; expected a file name",
        "/proc": "no file can be made in /proc",
        "/proc/f.npz": "no file can be made in /proc",
        video / "f": "is a file; expected a directory",
    }.items():
        status, _, err = run_command(capsys, "extract", *args, out)
        assert status == 2 and message in err, err


def test_names_that_are_directories(video, tmp_path):
    (tmp_path / "x.npy").mkdir()
    for name in ("x.npy", "run.v1", "features"):
        (job,) = _outputs([video], tmp_path / name, None)
        assert job == (video, tmp_path / name / "a.safetensors")


def test_a_link_of_no_protocol(models):
    link = "teleport://x.org/a.mp4"
    for given in (link, Path(link)):  # the second has one slash
        told = "^teleport is no protocol that is known; expected gs, s3, hf, https or another"
        with pytest.raises(vivit_jax.UserError, match=told):
            next(extract_features(*models("mae"), given))


def test_models_that_do_not_fit(models, video):
    model, params, processor = models("mae")
    other = vivit_jax.VideoProcessor.videomae(size=32, crop_size=32)
    with pytest.raises(vivit_jax.UserError, match=r"crops frames to \(32, 32\)"):
        extract_features(model, params, other, video)
    staged = models("staged")
    with pytest.raises(vivit_jax.UserError, match="temporal:0 to temporal:2.*got 'temporal:3'"):
        extract_features(*staged, video, layer="temporal:3")
    with pytest.raises(vivit_jax.UserError, match="the model has none: use --pool mean"):
        extract_features(*staged, video, pool="head")


def test_a_list_says_how_much_of_it_is_left(model, video, monkeypatch, capsys, tmp_path):
    """At intervals, for the video and for all; a missing video takes no time."""
    monkeypatch.setattr(extract_module, "LiveLine", partial(LiveLine, every_seconds=0.0))
    videos = [tmp_path / f"{k}.mp4" for k in range(3)]
    for path in (videos[0], videos[2]):
        path.write_bytes(video.read_bytes())
    args = ("--model", model, "--out", tmp_path / "out", "--window-stride", 4, "--batch-size", 2)
    status, out, err = run_command(capsys, "extract", *videos, *args)
    assert status == 1 and "1.mp4" in err
    said = out.splitlines()
    assert len(said) == 2 and re.search(r"; 2 more, 0:00:0\d left$", said[0])
    assert said[1].endswith("2.safetensors")
    live = [line for line in err.splitlines() if line.startswith("[")]
    form = r"\[{n}/3\] {k}.mp4, frame \d+/90  \d+ frames/s  \S+ left  all videos: \S+ left"
    for k in (0, 2):
        mine = [line for line in live if line.startswith(f"[{k + 1}/3]")]
        assert re.fullmatch(form.format(n=k + 1, k=k), mine[-1]), mine
        assert f"frame {FRAMES}/{FRAMES}" in mine[-1]
    assert "frames/s  0:00:00 left  all videos: 0:00:00 left" in live[-1]


def test_a_video_that_fails_in_its_middle_counts_as_far_as_it_came(monkeypatch, tmp_path):
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    for module in (progress_module, extract_module):
        monkeypatch.setattr(module, "time", clock)
    videos = [tmp_path / f"{k}.mp4" for k in range(3)]
    for path in videos:
        path.write_bytes(bytes(1000))
    listing = extract_module._Listing(videos)
    for k in range(2):
        with contextlib.suppress(vivit_jax.VideoError), listing.of(videos[k]) as progress:
            for done in range(10, 101, 10):  # a frame a second
                clock.now += 10
                progress(done, 100)
                if k == 0 and done == 60:
                    raise vivit_jax.VideoError("damaged")
    assert listing.rest() == "; 1 more, 0:01:40 left"


def test_videos_and_features_in_a_store(model, video, capsys, tmp_path, monkeypatch):
    """They are those of local files, and are not made again."""
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.pipe("/x/videos/run/a.mp4", video.read_bytes())
    memory.put(f"{model}/", "/x/model/", recursive=True)
    args = ("memory://x/videos", "--model", "memory://x/model", "--out", "memory://x/out")
    status, told, _ = run_command(capsys, "extract", *args)
    assert status == 0 and "written to memory://x/out/run/a.safetensors" in told
    memory.get("/x/out/run/a.safetensors", str(tmp_path / "there.safetensors"))
    assert (
        run_command(capsys, "extract", video, "--model", model, "--out", tmp_path / "here")[0] == 0
    )
    here, there = load(tmp_path / "here" / "a.safetensors"), load(tmp_path / "there.safetensors")
    for name, value in here.items():
        np.testing.assert_array_equal(there[name], value)
    status, told, _ = run_command(capsys, "extract", *args)
    assert (status, told) == (0, f"{args[0]}/run/a.mp4: already in {args[-1]}/run/a.safetensors\n")
