# SPDX-License-Identifier: Apache-2.0
"""A clip that raises anything is counted and named, and the others are still read."""

import logging

import numpy as np
import pytest

from vivit_jax.data.datasets import dataset as reading
from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.data.one_clip import UnforeseenError, each_of_clip, one_clip
from vivit_jax.data.pipeline import Batches, ClipShape
from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.errors import ConfigError, UserError, VideoError

BAD = "3.npy"


def test_errors_for_users_pass_as_they_are():
    for error in (VideoError("no video"), ConfigError("a setting"), UserError("an argument")):
        with pytest.raises(type(error)) as raised, one_clip("a.mp4"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_is_no_clips(error):
    with pytest.raises(error), one_clip("a.mp4"):
        raise error


@pytest.mark.parametrize("error", [MemoryError("Unable to\nallocate"), MemoryError()])
def test_too_little_memory_is_told_in_words(error, caplog):
    with pytest.raises(UnforeseenError) as raised, one_clip("a.mp4"):
        raise error
    more = ": Unable to allocate" if error.args else ""
    assert str(raised.value) == f"a.mp4: not enough memory to read it{more}"
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("31 is not a valid Type"), "ValueError: 31 is not a valid Type (unforeseen, "),
        (OSError(5, "Input/output error"), "OSError: [Errno 5] Input/output error (unforeseen, "),
        (RuntimeError("two\n lines"), "RuntimeError: two lines (unforeseen, "),
        (np.linalg.LinAlgError("x"), "numpy.linalg.LinAlgError: x (unforeseen, "),
        (StopIteration(), "StopIteration (unforeseen, "),
    ],
)
def test_everything_else_is_the_clips_with_its_type_and_place(error, told):
    def broken():
        raise error

    with pytest.raises(UnforeseenError) as raised, one_clip(b"a.mp4"):
        broken()
    assert str(raised.value).startswith(f"a.mp4: {told}in test_one_clip.py:")
    assert " broken" in str(raised.value) and "\n" not in str(raised.value)
    assert raised.value.__cause__ is error


def test_the_first_of_each_kind_is_logged_with_its_trace(caplog):
    def fail(error):
        with pytest.raises(UnforeseenError), one_clip("a.mp4"):
            raise error

    with caplog.at_level(logging.WARNING):
        for k in range(3):
            fail(ZeroDivisionError(f"number {k}"))
        fail(BufferError("another"))
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError, BufferError]
    assert (
        "number 0" in caplog.text and "Traceback" in caplog.text and "number 1" not in caplog.text
    )


def test_a_generator_of_one_clip_is_closed_and_its_user_is_not_blamed():
    ended = []

    def items(count):
        try:
            yield from range(count)
            raise LookupError("no more")
        finally:
            ended.append(count)

    with pytest.raises(UnforeseenError, match="a.mp4: LookupError: no more"):
        list(each_of_clip("a.mp4", items(2)))
    with pytest.raises(LookupError):  # raised by the consumer
        for _ in each_of_clip("a.mp4", items(9)):
            raise LookupError
    assert ended[0] == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for k in range(8):
        np.save(path / f"{k}.npy", rng.integers(0, 256, (6, 20, 24, 3), np.uint8))
    return path


@pytest.fixture
def broken(monkeypatch):
    """Opening one of the clips raises an error that no reader foresees."""
    opened = reading.open_array

    def fails(path):
        if path.endswith(BAD):
            raise IndexError("31 is not a valid Type")
        return opened(path)

    monkeypatch.setattr(reading, "open_array", fails)


@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_training_goes_on_without_it(folder, broken, cache):
    settings = DataSettings(stride=1, sampler="loop", max_bad_share=0.5, cache_gib=cache)
    how = dict(shape=ClipShape(4, (16, 16)), batch_size=2, seed=0, labelled=False)
    with Batches(read_dataset(folder), settings, AugmentSettings(), **how) as batches:
        for _ in range(12):
            assert next(batches)["clips"].shape == (2, 4, 16, 16, 3)
        found = batches.state()
    (path,) = found["bad"]
    assert path == str(folder / BAD) and found["left_out"] >= 2
    assert found["read"] == 24 + found["left_out"]
    assert found["bad"][path].startswith(f"{path}: IndexError: 31 is not a valid Type (unforeseen")


def test_an_error_in_augmentation_is_the_clips_too(folder):
    settings = DataSettings(stride=1, sampler="loop", max_bad_share=0.5)
    how = dict(shape=ClipShape(4, (16, 16)), batch_size=2, seed=0, labelled=False)
    with Batches(read_dataset(folder), settings, AugmentSettings(), **how) as batches:
        bad = np.load(folder / BAD)

        def transform(rng, frames):
            assert not any((frame == whole).all() for frame in frames for whole in bad)
            return frames[:, :16, :16]

        object.__setattr__(batches._load_clip, "transform", transform)
        for _ in range(8):
            next(batches)
        assert list(batches.bad) == [str(folder / BAD)]
        assert "AssertionError" in batches.bad[str(folder / BAD)]


def test_a_wrong_setting_still_ends_the_run(folder):
    settings = DataSettings(stride=1, sampler="loop")
    how = dict(shape=ClipShape(4, (16, 16)), batch_size=2, seed=0, labelled=False)
    with Batches(read_dataset(folder), settings, AugmentSettings(), **how) as batches:

        def transform(rng, frames):
            raise UserError("the crop is larger than everything")

        object.__setattr__(batches._load_clip, "transform", transform)
        with pytest.raises(UserError, match="npy: the crop is larger") as raised:
            next(batches)
        assert not isinstance(raised.value, VideoError)
