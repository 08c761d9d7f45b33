# SPDX-License-Identifier: Apache-2.0
"""`VideoClassifier` against transformers' pipeline, and its views against their definition."""

import copy
import dataclasses
import http.server
import io
import itertools
import os
import re
import threading

import jax
import numpy as np
import pytest
from clips import write_clip
from helpers import forward, random_params
from PIL import Image
from tiny import VIDEOMAE, VIVIT

import vivit_jax
from vivit_jax import UserError, VideoClassifier, VideoError
from vivit_jax.data.datasets.dataset import read_dataset, read_frames
from vivit_jax.data.read_clip import read_clips
from vivit_jax.data.sampling import view_indices
from vivit_jax.files import ranges, storage

LABELS = ("walk", "run", "jump", "fly", "sleep")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A saved VideoMAE whose frame size makes every clip here be resized and cropped."""
    config = vivit_jax.VideoMAEConfig(**VIDEOMAE, id2label=LABELS)
    module = vivit_jax.VideoMAEForVideoClassification(config)
    height, width = config.frame_size
    processor = vivit_jax.VideoProcessor.videomae(
        size=max(height, width) + 6, crop_size=(height, width)
    )
    path = tmp_path_factory.mktemp("classifier") / "model"
    vivit_jax.save_pretrained(path, module, random_params(module), processor)
    return path


@pytest.fixture(scope="module")
def classifier(directory):
    return VideoClassifier.from_pretrained(directory)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    where = tmp_path_factory.mktemp("videos")
    return [
        write_clip(where / f"{n}.mp4", frames=n, size=size)
        for n, size in ((40, (96, 64)), (9, (64, 64)), (70, (64, 80)))
    ]


def scores(predictions):
    return {p["label"]: p["score"] for p in predictions}


def assert_alike(found, expected, tolerance=1e-6):
    assert [p["label"] for p in found] == [p["label"] for p in expected]
    for a, b in zip(found, expected, strict=True):
        assert abs(a["score"] - b["score"]) < tolerance


def test_transformers_pipeline_gives_the_same(directory, classifier, videos):
    from transformers import pipeline

    theirs = pipeline("video-classification", model=str(directory), top_k=4)
    paths = [str(video) for video in videos]
    ours = classifier(paths, stride=1, start="begin", top_k=4)
    for expected, found in zip(theirs(paths), ours, strict=True):
        assert_alike(found, expected, 1e-5)
    assert_alike(
        classifier(paths[0], stride=1, start="begin", function_to_apply="none"),
        theirs(paths[0], function_to_apply="none", top_k=5),
        1e-4,
    )
    assert len({found[0]["score"] for found in ours}) == 3


def test_paths_arrays_lists_and_generators(classifier, videos):
    expected = classifier([str(video) for video in videos])
    assert [len(p) for p in expected] == [5, 5, 5]
    for video, predictions in zip(videos, expected, strict=True):
        assert classifier(video) == classifier(str(video)) == predictions
        assert_alike(classifier(vivit_jax.read_video(video)), predictions)
    assert list(classifier(video for video in videos)) == expected
    assert classifier(()) == [] and list(classifier(iter([]))) == []


def test_a_generator_is_read_as_it_is_asked(classifier, videos):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield videos[1]

    answers = classifier(endless(), threads=2, batch_size=2)
    first = [next(answers) for _ in range(3)]
    assert first[0] == first[1] == first[2] and len(taken) <= 8
    answers.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read clips")]


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_views_are_the_papers_and_are_averaged(directory, classifier, videos, average):
    """Two clips of the papers' places by three crops of the resized frames, each by itself."""
    net, params = vivit_jax.from_pretrained(directory)
    processor, config = classifier.processor, net.config
    (height, width), total = config.frame_size, 70
    indices = view_indices("linspace", total, config.num_frames, 4, 2)
    logits = []
    for places in indices:
        frames = vivit_jax.read_video(videos[2], indices=places)
        resized = processor(
            frames, do_center_crop=False, do_rescale=False, do_normalize=False
        ).astype(np.uint8)[0]
        tall, wide = resized.shape[1:3]
        assert tall > wide  # so crops go from the top to the bottom
        left = (wide - width) // 2
        for top in (0, (tall - height) // 2, tall - height):
            crop = resized[:, top : top + height, left : left + width]
            pixels = processor(crop, do_resize=False, do_center_crop=False)
            logits.append(np.asarray(forward(net, params, pixels).logits[0], np.float64))
    assert np.ptp(logits, axis=0).max() > 1e-2  # views differ
    if average == "logits":
        expected = jax.nn.softmax(np.mean(logits, 0))
    else:
        expected = np.mean([jax.nn.softmax(x) for x in logits], 0)
    options = dict(num_clips=2, num_crops=3, average=average, stride=4)
    (result,) = classifier.classify([videos[2]], **options)
    np.testing.assert_array_equal(result.frames, indices)
    for label, score in scores(result.predictions).items():
        assert abs(score - expected[LABELS.index(label)]) < 1e-5
    for rows in (2, 4, 7):
        several = classifier([videos[2], videos[0]], batch_size=rows, **options)
        assert_alike(several[0], result.predictions, 1e-5)


def test_what_is_averaged_by_default_is_the_familys(videos):
    found = {}
    for kind, sizes in (("Vivit", VIVIT), ("VideoMAE", VIDEOMAE)):
        config = getattr(vivit_jax, f"{kind}Config")(**sizes, id2label=LABELS)
        module = getattr(vivit_jax, f"{kind}ForVideoClassification")(config)
        params = random_params(module)
        processor = vivit_jax.VideoProcessor.videomae(size=32, crop_size=config.frame_size)
        classifier = VideoClassifier(module, params, processor)
        views = dict(num_clips=3)
        found[kind] = {
            average: classifier(videos[0], average=average, **views)
            for average in (None, "softmax", "logits")
        }
    assert found["Vivit"][None] == found["Vivit"]["logits"] != found["Vivit"]["softmax"]
    assert found["VideoMAE"][None] == found["VideoMAE"]["softmax"] != found["VideoMAE"]["logits"]


def test_a_video_whose_error_is_not_foreseen(classifier, videos, monkeypatch):
    from vivit_jax.inference import classifier as module

    def fails(video, config, **options):
        if video == videos[1]:
            raise ValueError("31 is not a valid Type")
        return read_clips(video, config, **options)

    monkeypatch.setattr(module, "read_clips", fails)
    first, bad, last = classifier.classify([videos[0], videos[1], videos[0]], threads=1)
    assert first.error is last.error is None and first.predictions == last.predictions
    told = f"{videos[1]}: ValueError: 31 is not a valid Type (unforeseen, in test_classifier.py:"
    assert str(bad.error).startswith(told)


def test_a_video_that_cannot_be_read(classifier, videos, tmp_path, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    mixed = [videos[0], broken, videos[1]]
    with pytest.raises(VideoError, match="broken.mp4"):
        classifier(broken)
    for many in (mixed, iter(mixed)):
        caplog.clear()
        first, error, last = classifier(many, batch_size=4)
        assert isinstance(error, VideoError) and f"left out: {error}" in caplog.text
        assert_alike(first, classifier(videos[0]))
        assert_alike(last, classifier(videos[1]))
    results = list(classifier.classify(mixed, batch_size=4))
    assert [result.error is None for result in results] == [True, False, True]
    assert "broken.mp4" in str(results[1].error) and results[1].predictions is None
    assert_alike(results[2].predictions, classifier(videos[1]))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_video_of_another_size_is_named(classifier, rows):
    """The processor leaves sizes alone, so whether frames fit is up to each video."""
    processor = dataclasses.replace(classifier.processor, do_resize=False, do_center_crop=False)
    strict = _with(classifier, processor)
    (height, width), total = classifier.config.frame_size, classifier.config.num_frames
    fits = np.full((total, height, width, 3), 90, np.uint8)
    mixed = [fits, np.pad(fits, ((0, 0), (0, 3), (0, 0), (0, 0))), fits]
    first, wrong, last = strict.classify(mixed, batch_size=rows)
    assert first.predictions and last.predictions
    size = f"frames of {height + 3} x {width} pixels (h x w), the model takes {height} x {width}"
    assert str(wrong.error).startswith(f"array 1: {size}: set the processor's do_center_crop")


def test_frames_too_small_for_crops_are_named(classifier):
    processor = dataclasses.replace(classifier.processor, do_resize=False)
    (height, width), total = classifier.config.frame_size, classifier.config.num_frames
    small = np.full((total, height - 2, width, 3), 90, np.uint8)
    (found,) = _with(classifier, processor).classify([small], num_crops=3)
    told = str(found.error)
    assert told.startswith(f"array 0: frames of {height - 2} x {width} pixels (h x w) are smaller")
    assert "smaller than the 3 crops of" in told and "augment" not in told


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ({"shortest_edge": 16, "longest_edge": 32}, "0x32 by .*: no pixel would be left"),
        ({"shortest_edge": 800}, "800x16000000 by .*, which would take 102,400,000,000 bytes of"),
    ],
)
def test_a_video_that_cannot_be_resized_is_not_the_end_of_a_list(classifier, size, told):
    """One line of pixels, which resizing would turn into nothing or into gigabytes."""
    total = classifier.config.num_frames
    other = _with(classifier, dataclasses.replace(classifier.processor, size=size))
    square, line = (np.zeros((total, *each, 3), np.uint8) for each in ((20, 20), (1, 20000)))
    first, second, third = other.classify([square, line, square])
    assert first.error is None and third.error is None
    assert re.search(f"a frame of 1x20000 would be resized to {told}", str(second.error))


def test_a_processor_that_fits_no_video_is_no_videos_fault(classifier):
    height, width = classifier.config.frame_size
    processor = dataclasses.replace(classifier.processor, crop_size=(height + 8, width))
    total = classifier.config.num_frames
    with pytest.raises(UserError) as raised:
        _with(classifier, processor)(np.zeros((total, height, width, 3), np.uint8))
    assert not isinstance(raised.value, VideoError)


@pytest.fixture(scope="module")
def site(videos, tmp_path_factory):
    """The address of a server on this machine; "moved" leads to another protocol, "huge" is so."""

    class Answers(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(videos[0].parent))

        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", videos[0].as_uri())
            elif self.path == "/huge":
                self.send_response(200)
                self.send_header("Content-Length", str(2**40))
            else:
                return super().do_GET()
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


def test_bytes_open_files_links_and_pictures_are_videos(classifier, videos, site):
    import fsspec

    video, content = videos[0], videos[0].read_bytes()
    fsspec.filesystem("memory").pipe("/clip.mp4", content)
    expected = classifier(video)
    with open(video, "rb") as file:
        same = [content, bytearray(content), io.BytesIO(content), file]
        same += [video.as_uri(), "memory://clip.mp4", f"{site}/{video.name}?token=secret"]
        assert classifier(same) == [expected] * len(same)
        assert [x.clip for x in classifier.classify(same[:2])] == ["bytes 0", "bytes 1"]
    assert classifier(content) == expected
    frames = vivit_jax.read_video(content)
    np.testing.assert_array_equal(frames, vivit_jax.read_video(os.fsencode(video)))
    assert vivit_jax.probe_video(site + "/40.mp4") == vivit_jax.probe_video(video)
    pictures = [Image.fromarray(frame) for frame in frames]
    for one in (pictures, tuple(pictures), list(frames)):
        assert classifier(one) == classifier(frames)

    class Tensor:  # as PyTorch's
        ndim = 4

        def __array__(self, dtype=None, copy=None):
            return frames

        def __iter__(self):
            return iter(frames)

    assert classifier(Tensor()) == classifier(frames)
    assert classifier([Tensor()]) == [classifier(frames)]
    with_alpha = [picture.convert("RGBA") for picture in pictures]
    assert classifier([with_alpha, frames]) == [classifier(frames)] * 2
    array = io.BytesIO()
    np.save(array, frames)
    assert classifier(array.getvalue()) == classifier(frames)


def test_sources_that_cannot_be_read(classifier, videos, site, monkeypatch):
    monkeypatch.setenv("VIVIT_JAX_STORAGE_TIMEOUT", "0")
    content = videos[0].read_bytes()
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    broken = io.BytesIO(content)
    broken.close()
    for video, told in (
        (content[:50], "^bytes 0: no readable video"),
        (
            b"/a/b.mp4",
            "^bytes 0: '/a/b.mp4' is no video: bytes are the content of a file here; .*fsd",
        ),
        (io.StringIO("clip"), "reading it gives str; expected bytes: open it in binary mode"),
        (broken, "a BytesIO: reading it failed: I/O operation on closed file"),
        (f"{site}/none.mp4?key=secret", r"/none.mp4: the server answers 404 .*; check the link$"),
        (f"{site}/moved", "/moved: the server answers 302 .*file:.* is not allowed"),
        (f"{site}/huge", "/huge: 1,099,511,627,776 bytes or more; expected at most 1,073,741,824"),
        ("http://user:secret@localhost:1/a.mp4", "^http://localhost:1/a.mp4: asking for"),
        ("memory://nothing.mp4", "^memory:///?nothing.mp4: no such file"),
        ("teleport://x/a.mp4", "teleport is no protocol that is known"),
        ("zip://a.mp4::memory://b.zip", "a chain of protocols"),
        (
            [picture, picture.resize((4, 4))],
            r"frames 0: frames of different kinds: uint8 \(4, 4, 3",
        ),
    ):
        with pytest.raises(VideoError, match=told) as raised:
            classifier(video)
        assert "secret" not in str(raised.value)
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", "1000")
    ranges.forget()
    for video in (content, io.BytesIO(content), f"{site}/40.mp4"):
        with pytest.raises(VideoError, match="bytes or more; expected at most 1,000: save it as a"):
            classifier(video)


def test_a_protocol_whose_package_lacks_is_named(classifier, monkeypatch):
    import fsspec

    def lacks(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", lacks)
    storage._file_system.cache_clear()
    with pytest.raises(VideoError, match="^s3:// needs the package 's3fs', .*pip install .*s3"):
        classifier("s3://bucket/a.mp4")


def test_links_in_lists_of_clips_are_opened(videos, site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text(f"{site}/40.mp4 0\n")
    (example,) = read_dataset("list.txt").examples
    expected = vivit_jax.read_video(videos[0], indices=[3, 0])
    np.testing.assert_array_equal(read_frames(example, [3, 0]), expected)


def test_probabilities_are_in_the_order_of_the_labels(classifier, videos, tmp_path, caplog):
    found = classifier.predict_proba(iter([*videos, tmp_path / "none.mp4"]), batch_size=2)
    assert found.shape == (4, 5) and found.dtype == np.float32
    assert np.isnan(found[3]).all() and "a row of NaN: " in caplog.text
    for row, predictions in zip(found, classifier([*videos], batch_size=2), strict=False):
        expected = scores(predictions)
        np.testing.assert_array_equal(row, [np.float32(expected[name]) for name in LABELS])
    np.testing.assert_allclose(found[:3].sum(1), 1, rtol=1e-5)
    assert classifier.predict_proba(videos[0]).shape == (1, 5)
    assert classifier.predict_proba([]).shape == (0, 5)
    with pytest.raises(VideoError, match="none.mp4: no such file"):
        classifier.predict_proba(tmp_path / "none.mp4")
    with pytest.raises(UserError, match="function_to_apply='softmax' or 'sigmoid'"):
        classifier.predict_proba(videos[0], function_to_apply="none")


def test_a_classifier_says_what_it_is(classifier):
    assert repr(classifier) == (
        "VideoClassifier(VideoMAEForVideoClassification: 5 classes (walk, run, jump, fly, ...); "
        "clips of 6 frames of 24 x 16 pixels, stride 4; float32)"
    )


@pytest.mark.parametrize("views", [1, 2])
def test_a_generator_is_never_read_further_than_a_batch_and_what_is_read_ahead(
    classifier, videos, views
):
    """Memory is bounded by videos that are read ahead of those whose views fill a batch."""
    taken, rows, threads = [], 4, 3
    endless = ((taken.append(k), videos[0])[1] for k in itertools.count())
    options = dict(batch_size=rows, threads=threads, num_clips=views)
    for given, _ in enumerate(classifier(endless, **options)):
        assert len(taken) - given <= rows + threads + 1
        if given == 12:
            break


def _with(classifier, processor):
    """The same classifier and its compiled function."""
    other = copy.copy(classifier)
    other.processor = processor
    return other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0, expected an int of at least 1"),
        ({"num_clips": 1.5}, "num_clips is 1.5"),
        ({"num_crops": -1}, "num_crops is -1"),
        ({"batch_size": True}, "batch_size is True"),
        ({"threads": 0}, "threads is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"average": "mean"}, "average is 'mean', expected one of softmax, logits"),
        ({"function_to_apply": "relu"}, "function_to_apply is 'relu', expected one of softmax"),
        ({"start": "begin", "num_clips": 2}, "several clips are spread over the whole video"),
        ({"start": "middle"}, "start is 'middle'"),
        ({"pad": "zeros"}, "pad is 'zeros'"),
    ],
    ids=str,
)
def test_wrong_options_are_told(classifier, videos, options, message):
    """At the call, not only when the first answer is asked for."""

    def untouched():
        raise AssertionError("a video was asked for")
        yield

    for ask in (classifier.classify, classifier):
        for inputs in (untouched(), []):
            with pytest.raises(UserError, match=message):
                ask(inputs, **options)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (7, "inputs is int, expected a path"),
        (None, "inputs is NoneType"),
        ({"clip.mp4": 1}, "inputs is dict"),
        ([7], "video 0 is int, expected a path"),
        ([["clip.mp4"]], "video 0 is list"),
        ([["clip.mp4"], []], "video 0 is list"),
    ],
    ids=str,
)
def test_what_is_no_video_is_told(classifier, inputs, message):
    with pytest.raises(UserError, match=message):
        classifier(inputs)


def test_arrays_of_jax_are_videos(classifier, videos):
    frames = vivit_jax.read_video(videos[0], num_frames=6, stride=4)
    assert_alike(classifier(jax.numpy.asarray(frames)), classifier(frames))


@pytest.mark.parametrize("rows", [1, 4])
def test_what_a_generator_raises_comes_after_its_videos(classifier, videos, rows):
    def five():
        yield from [videos[1]] * 5
        raise RuntimeError("the disk is gone")

    answers, found = classifier(five(), batch_size=rows), []
    with pytest.raises(RuntimeError, match="the disk is gone"):
        for answer in answers:
            found.append(answer)
    assert len(found) == 5


def test_the_middle_crop_of_a_vivit_is_scenics(videos):
    """Where the room is odd the second of two places, as evaluation cuts them."""
    config = vivit_jax.VivitConfig(**VIVIT, id2label=LABELS)
    module = vivit_jax.VivitForVideoClassification(config)
    (height, width), params = config.frame_size, random_params(module)
    processor = vivit_jax.VideoProcessor.videomae(size=width + 9, crop_size=config.frame_size)
    frames = vivit_jax.read_video(videos[2], num_frames=config.num_frames)  # 64 x 80
    resized = processor(frames, do_center_crop=False, do_rescale=False, do_normalize=False)
    resized = resized[0].astype(np.uint8)
    tall, wide = resized.shape[1:3]
    assert tall > wide and (tall - height) % 2 and (wide - width) % 2
    crops = [
        resized[:, top : top + height, (wide - width + 1) // 2 :][:, :, :width]
        for top in (0, (tall - height + 1) // 2, tall - height)
    ]
    pixels = processor(np.stack(crops), do_resize=False, do_center_crop=False)
    expected = jax.nn.softmax(forward(module, params, pixels).logits.mean(0))
    found = VideoClassifier(module, params, processor)(frames, num_crops=3, stride=1)
    for label, score in scores(found).items():
        assert abs(score - expected[LABELS.index(label)]) < 1e-5


def test_too_few_frames_for_several_clips(classifier, videos):
    with pytest.raises(VideoError, match="9 frames, too few for 2 clips .* at stride 9"):
        classifier(videos[1], stride=9, num_clips=2)


@pytest.mark.parametrize("shape", [(4, 5), (0, 8, 8, 3)])
def test_an_array_that_is_no_video(classifier, shape):
    with pytest.raises(VideoError, match="expected frames"):
        classifier(np.zeros(shape, np.uint8))


def test_a_model_without_classifier_is_refused(directory):
    config = vivit_jax.VideoMAEConfig(**VIDEOMAE)
    module = vivit_jax.VideoMAEModel(config)
    with pytest.raises(UserError, match="VideoClassifier takes a classifier .* VideoMAEModel"):
        VideoClassifier(module, random_params(module), vivit_jax.VideoProcessor.videomae())
