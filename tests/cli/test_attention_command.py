# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax attention`: the pictures it draws, what they say, and what it refuses."""

import json

import numpy as np
import pytest
from clips import write_clip
from commands import run_command
from helpers import mostly_slow, random_params
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image
from tiny import VIDEOMAE
from variants import variant_config

import vivit_jax
from vivit_jax.cli import attention_picture, lettering, panels
from vivit_jax.cli.lettering import FONT, drawable, families, one_font, text_width, wrapped
from vivit_jax.data.video.decode import frame_times
from vivit_jax.data.video.frame_stream import FrameStream
from vivit_jax.models.build import build_model

MODELS = {
    "joint": ("joint", "classification", {}),
    "joint mean": ("joint mean", "none", {}),
    "joint sampled": ("joint sampled", "classification", {}),
    "encoder": ("encoder", "classification", {}),
    "encoder spatial only": ("encoder spatial only", "classification", {}),
    "self-attention": ("self-attention time first", "classification", {}),
    "dot product": ("dot product", "none", {}),
    "mae": (None, "none", {}),
    "mae classifier": (None, "classification", {}),
    "mae pretraining": (None, "pretraining", dict(use_mean_pooling=False)),
}
# What the notes have to say of how a block's attention became one map.
COMBINED = {
    "encoder": "map of a time step times the weight of the time step",
    "encoder spatial only": "all time steps weigh the same",
    "self-attention": "product of each block's attention over time and over space",
    "dot product": "Half of the heads look over time",
}


def save_model(directory, name, **changes):
    case, head, values = MODELS[name]
    if case is None:
        config = vivit_jax.VideoMAEConfig(**VIDEOMAE | values | changes)
    else:
        config = variant_config(case, **changes)
    model = build_model(config, head)
    size = dict(size={"height": 24, "width": 16}, crop_size=(24, 16))
    if config.num_channels != 3:
        size |= dict(image_mean=0.4, image_std=0.3)
    processor = vivit_jax.VideoProcessor.videomae(**size)
    vivit_jax.save_pretrained(directory, model, random_params(model, 0.3), processor)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else save_model(root / name, name)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=40, size=(64, 96))


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


@pytest.mark.parametrize("name", mostly_slow(MODELS, "mae pretraining"))
def test_every_model(models, clip, capsys, drawn, tmp_path, name):
    """Both kinds; the numbers are those of the library on the same pixels."""
    directory = models(name)
    model, params = vivit_jax.from_pretrained(directory)
    processor = vivit_jax.VideoProcessor.from_pretrained(directory)
    for kind in ("map", "rollout"):
        numbers, picture = tmp_path / f"{kind}.npz", tmp_path / f"{kind}.png"
        args = ("--kind", kind, "--out", picture, "--save", numbers, "--json")
        status, out, err = run_command(capsys, "attention", clip, "--model", directory, *args)
        assert status == 0 and err == ""
        summary, saved, shown = json.loads(out), np.load(numbers), drawn[-1]
        with Image.open(picture) as image:
            page = np.asarray(image)

        # The clip as `predict` takes it; a sampling model sees some of its frames.
        stride = 2 if model.config.model_type == "vivit" else 4
        indices = np.arange(6) * stride + (40 - 5 * stride - 1) // 2
        frames = vivit_jax.read_video(clip, indices=indices)
        found = vivit_jax.map_attention(model, params, processor(frames), kind=kind)
        np.testing.assert_allclose(saved["maps"], found.maps[0], rtol=1e-6)
        np.testing.assert_allclose(saved["time_weights"], found.time_weights[0], rtol=1e-6)
        np.testing.assert_allclose(saved["maps"].sum(), 1, rtol=1e-12)
        np.testing.assert_array_equal(saved["frames"].reshape(-1), indices[found.frames])
        np.testing.assert_allclose(saved["seconds"], saved["frames"] / 25)
        t, h, w = found.maps.shape[1:]
        assert summary["grid"] == [t, h, w] and summary["kind"] == kind
        np.testing.assert_allclose(summary["time_weights"], t * found.time_weights[0], rtol=1e-5)
        np.testing.assert_allclose(summary["class_token_share"], found.class_share[0], rtol=1e-5)
        most = summary["largest"]
        assert np.isclose(most["relative"], found.relative.max(), rtol=1e-5)
        assert np.isclose(found.relative[0][tuple(most["token"])], most["relative"], rtol=1e-5)
        assert most["frames"] == saved["frames"][most["token"][0]].tolist()

        # The picture: frames as the model saw them, maps in the bar's colours, what it all is.
        assert shown.times == [f"frame {i}\n{i / 25:.2f} s" for i in indices[found.frames]]
        assert shown.labels == ["the model's input", "attention on it", "attention"]
        plain = processor(frames, do_rescale=False, do_normalize=False)[0, found.frames]
        np.testing.assert_array_equal(shown.clips[0], plain)
        top, length = shown.footer.top, found.tubelet[0]
        expected = attention_picture.colours(found.relative[0].repeat(length, 0) / top)
        np.testing.assert_allclose(
            shown.clips[2][:, 4::8, 4::8].astype(int), expected, atol=3, err_msg="colours"
        )
        for frames_drawn in shown.clips:
            tile = np.kron(frames_drawn[-1], np.ones((6, 6, 1), np.uint8))
            assert contains(page, tile)
        np.testing.assert_allclose(shown.footer.weights, t * found.time_weights[0], rtol=1e-5)
        assert len(shown.footer.ticks) == t * length
        last = model.config.num_hidden_layers - 1
        where = {"map": f"in layer {last} of 0", "rollout": f"rollout from layer {last} down to 0"}
        assert shown.title.startswith("clip.mp4: attention") and where[kind] in shown.title
        cls = getattr(model.config, "pooling", None) == "cls"
        query = "class token" if cls else "mean of all tubelets"
        assert shown.title.endswith(f"mean of 4 heads; query: {query}")
        notes = " ".join(shown.notes)
        assert f"{t}x{h}x{w} tokens" in notes and COMBINED.get(name, "") in notes
        assert ("share a map" in notes) == (length > 1)
        assert (f"to the class token, {100 * found.class_share[0]:.2g} %" in notes) == cls


def test_options_choose_what_is_shown(models, clip, capsys, drawn, tmp_path):
    directory = models("joint")
    model, params = vivit_jax.from_pretrained(directory)
    processor = vivit_jax.VideoProcessor.from_pretrained(directory)
    args = ("--query", "2,1,0", "--head", "3", "--layer", "-2", "--start", "begin", "--stride", "1")
    paths = ("--out", tmp_path / "a.png", "--save", tmp_path / "a.npz")
    status, out, _ = run_command(capsys, "attention", clip, "--model", directory, *args, *paths)
    assert status == 0
    assert "6 frames from 0 to 5" in out and "written to" in out
    assert "attention in layer 1 of 0 to 2, head 3 of 0 to 3; query: tubelet 2,1,0 (t,y,x)" in out
    pixels = processor(vivit_jax.read_video(clip, indices=range(6)))
    found = vivit_jax.map_attention(model, params, pixels, query=(2, 1, 0), head=3, layer=1)
    np.testing.assert_allclose(np.load(tmp_path / "a.npz")["maps"], found.maps[0], rtol=1e-6)
    (shown,) = drawn
    assert any("outlined" in note for note in shown.notes)
    # The outline is that of row 1, column 0 of the last two frames.
    outlined = (shown.clips[0] == attention_picture.MARK).all(-1)
    expected = np.zeros((6, 24, 16), bool)
    expected[4:, 8:16, 0:8] = True
    expected[4:, 9:15, 1:7] = False
    np.testing.assert_array_equal(outlined, expected)


def test_the_temporal_layer_is_named(models, clip, capsys, drawn, tmp_path):
    args = ("--model", models("encoder"), "--temporal-layer", "0", "--out", tmp_path / "a.png")
    assert run_command(capsys, "attention", clip, *args)[0] == 0
    assert "layer 2 of 0 to 2, over time in layer 0 of 0 to 1," in drawn[0].title


def test_a_tubelet_of_a_factorised_encoder_sees_its_frame(models, clip, capsys, drawn, tmp_path):
    args = ("--model", models("encoder"), "--query", "1,0,0", "--out", tmp_path / "a.png")
    status, out, _ = run_command(capsys, "attention", clip, *args, "--json")
    np.testing.assert_allclose(json.loads(out)["time_weights"], [0, 3, 0], atol=1e-12)
    assert status == 0 and any("sees its own time step only" in note for note in drawn[0].notes)
    assert "over time" not in drawn[0].title


def test_movies_have_a_frame_for_each_of_the_clip(models, clip, capsys, drawn, tmp_path):
    for name in ("a.mp4", "a.GIF"):
        args = ("--model", models("mae"), "--stride", "5", "--out", tmp_path / name)
        assert run_command(capsys, "attention", clip, *args)[0] == 0
    shown = drawn[0]
    pages = shown._moving()
    assert len(pages) == 6 and len({page.shape for page in pages}) == 1
    info = vivit_jax.probe_video(tmp_path / "a.mp4")
    video = vivit_jax.read_video(tmp_path / "a.mp4")
    np.testing.assert_allclose(info.fps, 5, rtol=1e-3)
    assert len(video) == 6
    with Image.open(tmp_path / "a.GIF") as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 200
        for i, page in enumerate(pages):
            gif.seek(i)
            seen = np.asarray(gif.convert("RGB")).astype(int)
            height, width = page.shape[:2]
            assert abs(seen - page).mean() < 4 and abs(video[i, :height, :width] - seen).mean() < 8
    # The plot says which frame is shown: the pages differ below the frames too.
    below = [page[-shown.footer.height :] for page in pages]
    assert all((a != b).any() for a, b in zip(below, below[1:], strict=False))


def test_arrays_have_no_seconds(capsys, drawn, tmp_path):
    model = save_model(tmp_path / "m", "mae", num_channels=1)
    np.save(tmp_path / "c.npy", np.random.default_rng(0).random((6, 24, 16, 1), np.float32))
    paths = ("--out", tmp_path / "a.png", "--save", tmp_path / "a.npz")
    status, _, err = run_command(capsys, "attention", tmp_path / "c.npy", "--model", model, *paths)
    assert status == 0, err
    assert drawn[0].times[0] == "frame 0" and drawn[0].footer.ticks == list("012345")
    assert np.isnan(np.load(tmp_path / "a.npz")["seconds"]).all()
    assert "1 channel: the first is shown." in drawn[0].notes
    expected = panels.as_frames(np.load(tmp_path / "c.npy"))
    assert abs(drawn[0].clips[0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("name", "codec", "step"),
    [("a.mp4", "libx264", 0.5), ("a.webm", "libvpx", 0.5), ("a.avi", "mpeg4", None)],
)
def test_seconds_follow_a_variable_rate(models, capsys, drawn, tmp_path, name, codec, step):
    """Also where all is decoded from the start; avi has no times, so its rate is taken."""
    times = None if step is None else [3 + 0.04 * k + step * max(0, k - 10) for k in range(40)]
    video = write_clip(tmp_path / name, frames=40, size=(64, 96), codec=codec, times=times)
    args = ("--model", models("mae"), "--stride", "4", "--start", "4", "--out", tmp_path / "a.png")
    assert run_command(capsys, "attention", video, *args, "--save", tmp_path / "a.npz")[0] == 0
    frames = np.arange(4, 28, 4)
    expected = 0.04 * frames + (step or 0) * np.maximum(0, frames - 10)
    seconds = np.load(tmp_path / "a.npz")["seconds"].reshape(-1)
    np.testing.assert_allclose(seconds, expected, atol=1e-6)  # measured 0
    streamed = {frame.index: frame.seconds for frame in FrameStream(video)}
    np.testing.assert_allclose(seconds, [streamed[k] for k in frames])
    assert drawn[0].times[-1] == f"frame 24\n{expected[-1]:.2f} s"


def test_movies_play_as_fast_as_a_file_of_variable_rate(models, capsys, tmp_path):
    times = np.array([3 + 0.04 * k + 0.5 * max(0, k - 10) for k in range(40)])
    video = write_clip(tmp_path / "a.mp4", frames=40, size=(64, 96), times=times)
    args = ("--model", models("mae"), "--stride", "4", "--start", "4")
    for name in ("b.mp4", "b.gif"):
        assert run_command(capsys, "attention", video, *args, "--out", tmp_path / name)[0] == 0
    shown = times[4:28:4] - times[4]
    np.testing.assert_allclose(frame_times(tmp_path / "b.mp4", range(6)), shown, atol=1e-3)
    holds = [*np.diff(shown), np.median(np.diff(shown))]
    duration = vivit_jax.probe_video(tmp_path / "b.mp4").duration
    np.testing.assert_allclose(duration, sum(holds), atol=2e-3)
    with Image.open(tmp_path / "b.gif") as gif:
        shown_at = 0.0
        for i in range(6):
            gif.seek(i)
            np.testing.assert_allclose(shown_at, sum(holds[:i]), atol=5.1e-3)
            shown_at += gif.info["duration"] / 1000


@pytest.mark.parametrize("hold", [1 / 30, 1 / 60, 1 / 4000, 900.0])
def test_movies_of_frames_of_any_rate(tmp_path, hold):
    """An mp4 counts milliseconds; a gif hundredths from 2 on, which it adds up right, to 655 s."""
    frames = [np.full((8, 8, 3), 10 * k, np.uint8) for k in range(7)]
    shown = small_panels(clips=[np.stack(frames)], times=[str(k) for k in range(7)])
    seconds = np.arange(7) * hold
    for name in ("a.mp4", "a.gif"):
        shown.save(tmp_path / name, panels.real_time(seconds, 7))
    played = frame_times(tmp_path / "a.mp4", range(7))
    np.testing.assert_allclose(played, np.arange(7) * max(hold, 1e-3), atol=5.1e-4)
    with Image.open(tmp_path / "a.gif") as gif:
        holds = []
        for i in range(7):
            gif.seek(i)
            holds.append(gif.info["duration"] / 1000)
    if hold == 1 / 30:
        np.testing.assert_allclose(sum(holds), 7 * hold, atol=5.1e-3)
    else:
        np.testing.assert_allclose(holds, 655.35 if hold == 900 else 0.02)


def test_close_frames_and_equal_pages_of_a_movie(tmp_path):
    """Starts that rounding would put on one millisecond, and pages that a gif makes one."""
    clip = np.stack([np.full((8, 8, 3), 10 * k, np.uint8) for k in range(5)])
    shown = small_panels(clips=[clip], times=["0"] * 5)
    shown.save(tmp_path / "a.mp4", [0.0095, 0.001, 0.001, 0.001, 0.5])
    assert (np.diff(frame_times(tmp_path / "a.mp4", range(5))) > 0.9e-3).all()
    still = small_panels(clips=[np.zeros_like(clip)], times=["0"] * 5)
    still.save(tmp_path / "a.gif", [400.0] * 5)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 1 and gif.info["duration"] == 655350


@pytest.mark.parametrize(
    ("seconds", "holds"),
    [
        (None, [0.1, 0.1, 0.1, 0.1]),
        ([0, 0.2, 0.3, 0.7], [0.2, 0.1, 0.4, 0.2]),
        ([0, 0.2, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]),  # the last one stands in for a missing one
        ([0, np.nan, 0.4, 0.5], [0.1, 0.1, 0.1, 0.1]),
    ],
)
def test_how_long_frames_stay(seconds, holds):
    seconds = None if seconds is None else np.array(seconds)
    np.testing.assert_allclose(panels.real_time(seconds, 4), holds)


def test_files_are_not_overwritten_unless_asked(models, clip, capsys, tmp_path):
    args = (clip, "--model", models("mae"), "--out", tmp_path / "a.png")
    for name, flag in (("a.png", "--out"), ("a.npz", "--save")):
        (tmp_path / name).write_bytes(b"mine")
        status, _, err = run_command(capsys, "attention", *args, "--save", tmp_path / "a.npz")
        assert status == 2 and f"{flag} {tmp_path / name} exists" in err
        assert (tmp_path / name).read_bytes() == b"mine"
        if flag == "--out":
            (tmp_path / name).unlink()
    assert (
        run_command(capsys, "attention", *args, "--save", tmp_path / "a.npz", "--overwrite")[0] == 0
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--out": "{tmp}/a.jpg"}, "--out {tmp}/a.jpg ends in '.jpg'; expected one of .png, .mp4"),
        ({"--out": "/proc/a.png"}, "--out /proc/a.png: no file can be made in /proc"),
        ({"--save": "/proc/a.npz"}, "--save /proc/a.npz: no file can be made in /proc"),
        ({"--save": "{tmp}/a.npy"}, "--save {tmp}/a.npy ends in '.npy'; expected one of .npz"),
        ({"--query": "all"}, "--query must be cls, mean, or a tubelet as three numbers T,Y,X"),
        ({"--query": "0,1"}, "got '0,1'"),
        ({"--query": "3,0,0"}, "from (0, 0, 0) to (2, 2, 1)"),
        ({"--query": "cls"}, "needs a class token, which this model does not have"),
        ({"--layer": "3"}, "layer must be from 0 to 2"),
        ({"--temporal-layer": "0"}, "needs a factorised encoder"),
        ({"--head": "best"}, "--head must be mean or the number of a head from 0, got 'best'"),
        ({"--head": "4"}, "head must be from 0 to 3, got 4"),
        ({"--head": "1", "--kind": "rollout"}, "a rollout takes the mean of all heads"),
        ({"--start": "middle"}, "begin, center, end or a frame"),
        ({"--stride": "20"}, "6 frames at stride 20"),
        ({"--model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"clip": "{tmp}/none.mp4"}, "none.mp4"),
    ],
)
def test_wrong_input_is_one_line(models, clip, capsys, tmp_path, changes, told):
    values = {"clip": clip, "--model": models("mae"), "--out": tmp_path / "a.png"}
    values |= {key: text.format(tmp=tmp_path) for key, text in changes.items()}
    args = [values.pop("clip"), *(part for pair in values.items() for part in pair)]
    status, out, err = run_command(capsys, "attention", *args)
    assert status == 2 and told.format(tmp=tmp_path) in err, err
    assert err.count("\n") == 1 and not out
    assert not list(tmp_path.iterdir())


def test_suffixes_in_capitals(models, clip, capsys, tmp_path):
    paths = ("--out", tmp_path / "a.PNG", "--save", tmp_path / "a.NPZ")
    status, _, err = run_command(capsys, "attention", clip, "--model", models("mae"), *paths)
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.NPZ", "a.PNG"]
    np.testing.assert_allclose(np.load(tmp_path / "a.NPZ")["maps"].sum(), 1, rtol=1e-12)


def small_panels(**changes):
    clip = np.zeros((1, 8, 8, 3), np.uint8)
    about = dict(title="a", notes=[], warning=None, labels=["b"], clips=[clip], times=["0"])
    return panels.Panels(**about | changes)


def drawn_as(path, **changes):
    small_panels(**changes).save(path, [1.0])
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def one_font_only(monkeypatch):
    """A machine without other fonts than matplotlib's own."""
    for cached in (lettering._font_of, lettering._others):
        cached.cache_clear()
    monkeypatch.setattr(lettering, "_others", lambda: ())
    yield
    lettering._font_of.cache_clear()


@pytest.mark.usefixtures("one_font_only")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("K\u4e00ln \u89c6.mp4", r"K\u4e00ln \u89c6.mp4"),
        ("a\udcff\x07.mp4", r"a\udcff\x07.mp4"),
    ],
)
def test_letters_that_the_font_lacks_are_escaped(tmp_path, name, told):
    page = drawn_as(tmp_path / "a.png", title=name, notes=[name])
    np.testing.assert_array_equal(page, drawn_as(tmp_path / "b.png", title=told, notes=[told]))


@pytest.mark.usefixtures("one_font_only")
@pytest.mark.parametrize("kind", [".png", ".gif"])
def test_labels_times_and_answers_are_escaped_as_titles_are(tmp_path, kind):
    def changes(*words):
        name, time, answer, remark = words
        answers = [(answer, "#000000", remark)] if kind == ".png" else []
        return dict(labels=[name], times=[f"{time}\n0.1 s"], answers=answers)

    # A dollar is a letter like any other.
    raw = changes("$a_1$ \u89c6", "K\u4e00ln", "\udcff\t", "\x07\r")
    told = changes(r"$a_1$ \u89c6", r"K\u4e00ln", r"\udcff\t", r"\x07\r")
    page = drawn_as(tmp_path / f"a{kind}", **raw)
    np.testing.assert_array_equal(page, drawn_as(tmp_path / f"b{kind}", **told))
    other = drawn_as(tmp_path / f"c{kind}", **(told | {"labels": [r"a_1 \u89c6"]}))
    assert other.shape != page.shape or (other != page).any()


def test_letters_that_the_font_has_are_drawn(one_font_only):
    assert drawable("K\xf6ln \u2026 \u0416\n\u89c6") == "K\xf6ln \u2026 \u0416\n\\u89c6"
    assert families("K\xf6ln\n") == [FONT]


def test_letters_of_other_fonts_are_drawn_by_these(tmp_path):
    """One that matplotlib brings along has letters that its usual one lacks."""
    usual, other = lettering._letters(lettering._main()[1]), "STIXGeneral"
    path = findfont(FontProperties(family=other))
    letter = chr(min(n for n in lettering._letters(path) - usual if chr(n).isalnum()))
    name = f"a{letter}"
    assert drawable(name) == name and families(name)[0] == FONT and len(families(name)) == 2
    drawn = drawn_as(tmp_path / "a.png", title=name, notes=[name])  # a box would warn
    escaped = letter.encode("unicode_escape").decode()
    assert (drawn != drawn_as(tmp_path / "b.png", title=escaped, notes=[escaped])).any()
    text, file = one_font(name)
    assert text == name and {*map(ord, name)} <= lettering._letters(file)
    assert one_font("a") == ("a", lettering._main()[1])
    lacked = chr(min(n for n in usual - lettering._letters(file) if chr(n).isalnum()))
    assert one_font(f"{name}{lacked}") == (f"a{escaped}{lacked}", lettering._main()[1])


def test_lines_fit_their_width_and_lose_no_letter():
    word = "".join(map(str, range(200)))
    lines = wrapped(f"one two {word} three", panels.PLAIN, 300)
    assert "".join(lines).replace(" ", "") == f"onetwo{word}three" and len(lines) > 5
    assert max(text_width(panels.PLAIN, line) for line in lines) <= 300
    assert wrapped("one two", panels.PLAIN, 45) == ["one", "two"]
    assert wrapped("", panels.PLAIN, 300) == [""]


def test_an_interrupted_run_leaves_the_old_file(models, clip, capsys, tmp_path, monkeypatch):
    out_file = tmp_path / "a.mp4"
    out_file.write_bytes(b"mine")

    def fail(self, path, *args):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(panels.Panels, "save_mp4", fail)
    args = (clip, "--model", models("mae"), "--out", out_file, "--overwrite")
    status, _, err = run_command(capsys, "attention", *args)
    assert status == 2 and "disk full" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert out_file.read_bytes() == b"mine"


def test_colours_get_lighter_evenly():
    """Perceived lightness, CIE L*, rises with the value by about as much everywhere."""
    table = attention_picture.colours(np.linspace(0, 1, 33)) / 255
    linear = np.where(table <= 0.04045, table / 12.92, ((table + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    light = 116 * np.cbrt(luminance) - 16
    steps = np.diff(light)
    assert steps.min() > 1 and steps.max() < 5 and light[0] < 20 and light[-1] > 88
    np.testing.assert_array_equal(
        attention_picture.colours(np.array([-1.0, 2.0])),
        attention_picture.colours(np.array([0.0, 1.0])),
    )


def test_the_overlay_covers_by_strength():
    frames = np.full((1, 8, 8, 3), 200, np.uint8)
    none, full = (attention_picture.overlay(frames, np.full((1, 2, 2), s)) for s in (0.0, 1.0))
    least, most = attention_picture.LEAST_COVER, attention_picture.MOST_COVER
    grey = 200 * attention_picture.DARKENED
    for made, value, cover in ((none, 0.0, least), (full, 1.0, most)):
        expected = (1 - cover) * grey + cover * attention_picture.colours(np.array(value))
        np.testing.assert_allclose(made, np.broadcast_to(expected, made.shape), atol=1)
    # Between two tokens it is interpolated; on black, so that only the colours count.
    ramp = attention_picture.overlay(np.zeros_like(frames), np.array([[[0.0, 1.0]]]))[0, 0]
    across = ramp.astype(int).sum(-1)
    assert (np.diff(across) >= 0).all() and len(set(across)) > 3


@pytest.mark.parametrize(
    ("values", "top"),
    [
        (np.ones(18), 2.0),  # nearly uniform attention looks it
        (np.array([1.0] * 17 + [11.7]), 12.0),  # few tokens: none is cut off
        (np.r_[np.ones(996), np.full(4, 300.0)], 2.0),  # four of a thousand are
        (np.r_[np.ones(990), np.full(10, 33.2)], 34.0),
    ],
)
def test_where_the_colours_end(values, top):
    assert attention_picture.scale_top(values) == pytest.approx(top)


@pytest.mark.parametrize(("frames", "cut"), [(6, False), (64, True)])
def test_the_footer_fits_its_width(tmp_path, frames, cut):
    clip = np.zeros((frames, 8, 8, 3), np.uint8)
    footer = attention_picture.AttentionFooter(
        top=9.0,
        cut=cut,
        weights=np.linspace(0, 2, frames // 2),
        tubelet=2,
        ticks=[f"{1000 * i}\n{40 * i:.2f} s" for i in range(frames)],
        axis="frame of the file, and its time",
    )
    page = drawn_as(tmp_path / "a.png", footer=footer, times=["0"] * frames, clips=[clip])
    page = page[-footer.height :]
    assert page.shape[1] >= panels.LEAST_WIDTH
    assert (page[:, :8] == 255).all() and (page[:, -8:] == 255).all(), "nothing runs off the page"
    assert (page[-8:] == 255).all()
    for value in (0.02, 0.5, 0.98):  # the bar's
        apart = np.abs(page.astype(int) - attention_picture.colours(np.array(value)))
        assert apart.max(-1).min() <= 4, value
