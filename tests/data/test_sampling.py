# SPDX-License-Identifier: Apache-2.0
"""Index functions against literal values."""

import numpy as np
import pytest

from vivit_jax.data.sampling import clip_indices, pad_indices, sample_frame_indices
from vivit_jax.errors import UserError, VideoError

# Printed by the function of the Hugging Face VideoMAE documentation after np.random.seed(0).
DOCUMENTED = {
    (16, 1, 300): list(range(172, 188)),
    (16, 4, 300): [172, 176, 180, 184, 189, 193, 197, 201]
    + [206, 210, 214, 218, 223, 227, 231, 235],
    (8, 2.5, 60): [0, 2, 5, 8, 11, 14, 17, 19],
    (32, 1, 33): list(range(32)),
    (1, 1, 5): [0],
    (16, 0.5, 20): [5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12],
}


@pytest.mark.parametrize("arguments", DOCUMENTED, ids=str)
def test_sample_frame_indices_gives_the_documented_clips(arguments):
    np.random.seed(0)
    drawn = sample_frame_indices(*arguments)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == DOCUMENTED[arguments]
    own = sample_frame_indices(*arguments, rng=np.random.RandomState(0))
    assert own.tolist() == DOCUMENTED[arguments]


def test_sample_frame_indices_with_a_generator_leaves_the_global_state_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    ends = {
        sample_frame_indices(4, 2, 12, rng=np.random.default_rng(seed))[-1] for seed in range(40)
    }
    assert ends == {7, 8, 9, 10}  # covers 8 frames, so its exclusive end is 8 to 11
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("seg_len", [64, 63, 0])
def test_sample_frame_indices_of_a_short_video(seg_len):
    with pytest.raises(VideoError, match=f"covers 64 frames .* at least 65; seg_len is {seg_len}:"):
        sample_frame_indices(16, 4, seg_len)


@pytest.mark.parametrize("arguments", [(0, 1, 9), (4, 0.1, 9), (-3, 1, 9)])
def test_sample_frame_indices_of_nothing(arguments):
    with pytest.raises(UserError, match="expected at least 1 of each"):
        sample_frame_indices(*arguments)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (dict(total=10, num_frames=4, start="begin"), [0, 1, 2, 3]),
        (dict(total=10, num_frames=4, start="end"), [6, 7, 8, 9]),
        (dict(total=10, num_frames=4), [3, 4, 5, 6]),
        (dict(total=11, num_frames=4), [3, 4, 5, 6]),
        (dict(total=12, num_frames=4), [4, 5, 6, 7]),
        (dict(total=10, num_frames=4, stride=2), [1, 3, 5, 7]),
        (dict(total=10, num_frames=4, stride=2, start="end"), [3, 5, 7, 9]),
        (dict(total=10, num_frames=4, stride=3), [0, 3, 6, 9]),
        (dict(total=10, num_frames=4, stride=2, start=3), [3, 5, 7, 9]),
        (dict(total=1, num_frames=1, stride=7), [0]),
        (dict(total=10, num_frames=6, stride=3, pad="repeat_last"), [0, 3, 6, 9, 9, 9]),
        (dict(total=10, num_frames=6, stride=3, pad="loop"), [0, 3, 6, 9, 2, 5]),
        (dict(total=5, num_frames=4, start=3, pad="repeat_last"), [3, 4, 4, 4]),
        (dict(total=5, num_frames=4, start=3, pad="loop"), [3, 4, 0, 1]),
        (dict(total=3, num_frames=5, start="end", pad="loop"), [0, 1, 2, 0, 1]),
        (dict(total=10, num_frames=4, pad="loop"), [3, 4, 5, 6]),
    ],
    ids=str,
)
def test_clip_indices(arguments, expected):
    drawn = clip_indices(**arguments)
    assert drawn.dtype == np.int64
    assert drawn.tolist() == expected


def test_random_clips_reach_every_place_and_no_other():
    rng = np.random.default_rng(0)
    firsts = {int(clip_indices(10, 3, 3, "random", rng=rng)[0]) for _ in range(100)}
    assert firsts == {0, 1, 2, 3}  # spans 7 of 10 frames
    same = [clip_indices(10, 3, 3, "random", rng=np.random.default_rng(5))[0] for _ in range(3)]
    assert len(set(same)) == 1
    assert clip_indices(2, 3, 1, "random", "loop", rng).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    "error, arguments, message",
    [
        (
            VideoError,
            dict(total=7, num_frames=4, stride=3),
            "end at frame 9 but there are 7",
        ),
        (VideoError, dict(total=7, num_frames=4, start=5), "from frame 5 end at frame 8"),
        (
            VideoError,
            dict(total=7, num_frames=1, start=7),
            "start is frame 7 but there are 7",
        ),
        (VideoError, dict(total=7, num_frames=1, start=8, pad="loop"), "pass a smaller start"),
        (VideoError, dict(total=0, num_frames=2, pad="loop"), "there are 0 frames"),
        (UserError, dict(total=7, num_frames=0), "num_frames is 0"),
        (UserError, dict(total=7, num_frames=2.0), "num_frames is 2.0"),
        (UserError, dict(total=7, num_frames=2, stride=0), "stride is 0"),
        (UserError, dict(total=7, num_frames=2, start=-1), "start is -1"),
        (UserError, dict(total=7, num_frames=2, start="middle"), "start is 'middle'; expected one"),
        (UserError, dict(total=7, num_frames=2, start=1.5), "start is 1.5"),
        (UserError, dict(total=7, num_frames=2, start="random"), "no seed"),
        (UserError, dict(total=7, num_frames=2, pad="black"), "pad is 'black'; expected one of"),
    ],
    ids=str,
)
def test_clip_indices_errors(error, arguments, message):
    with pytest.raises(error, match=message) as raised:
        clip_indices(**arguments)
    assert type(raised.value) is error


def test_pad_indices():
    assert pad_indices([4, 0, 4, 2], 5).tolist() == [4, 0, 4, 2]
    assert pad_indices((4, 5, 12), 5, "repeat_last").tolist() == [4, 4, 4]
    assert pad_indices(np.array([4, 5, 12], np.uint8), 5, "loop").tolist() == [4, 0, 2]


@pytest.mark.parametrize(
    "error, indices, total, message",
    [
        (VideoError, [1, 5, 9], 5, "no such frames: 5, 9; there are 5 frames.*pad='repeat_last'"),
        (VideoError, range(20), 5, "no such frames: 5, 6, 7, 8, 9, 10, 11, 12 and 7 more"),
        (UserError, [3, -1, -2], 5, "negative frame indices: -1, -2"),
        (UserError, [], 5, r"shape \(0,\)"),
        (UserError, [[1]], 5, r"shape \(1, 1\)"),
        (UserError, [1.0], 5, "float64; expected ints"),
        (UserError, [True], 5, "bool; expected ints"),
    ],
)
def test_pad_indices_errors(error, indices, total, message):
    with pytest.raises(error, match=message) as raised:
        pad_indices(indices, total)
    assert type(raised.value) is error
