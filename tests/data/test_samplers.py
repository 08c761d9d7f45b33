# SPDX-License-Identifier: Apache-2.0
"""The papers' samplers against enumerations of their definitions and numbers by hand."""

import numpy as np
import pytest

from vivit_jax.data.sampling import SAMPLERS, training_indices, view_indices
from vivit_jax.errors import UserError, VideoError

SIZES = [
    (total, n, stride)
    for total in (1, 2, 3, 5, 8, 9, 13)
    for n in (1, 2, 4, 6)
    for stride in (1, 2, 3)
]


def hold(total, n, stride):
    """All clips that can be drawn."""
    clips = set()
    for first in range(total - n * stride + 1) or [0]:
        clip, frame = [], first
        for _ in range(n):
            clip.append(frame)
            # The authors count frames from 1 and continue while the number is below the total.
            number = frame + 1
            frame += stride if number + stride < total else 0
        clips.add(tuple(clip))
    return clips


def linspace(total, n, stride):
    span = n * stride
    if total <= span:
        count = total // stride
        step = total / (count - 1) if count > 1 else 0
        spread = [min(int(k * step + 1e-9), total - 1) for k in range(count)]
        return {tuple(spread + [total - 1] * (n - count))}
    step = span / (n - 1) if n > 1 else 0
    return {
        tuple(min(int(end - span + k * step + 1e-9), end - 1) for k in range(n))
        for end in range(span, total)
    }


def loop(total, n, stride):
    firsts = [f for f in range(total) if f + (n - 1) * stride < total] or [0]
    tiled = list(range(total)) * (n * stride)
    return {tuple(tiled[first::stride][:n]) for first in firsts}


def segments(total, n, stride):
    if total < n:
        return {tuple([0] * (n - total) + list(range(total)))}
    clips = [()]
    for k in range(n):
        part = range(k * (total // n), (k + 1) * (total // n))
        clips = [clip + (frame,) for clip in clips for frame in part]
    return set(clips)


DEFINITIONS = {"hold": hold, "linspace": linspace, "loop": loop, "segments": segments}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_training_draws_exactly_the_clips_of_the_definition(sampler):
    rng = np.random.default_rng(0)
    for total, n, stride in SIZES:
        expected = DEFINITIONS[sampler](total, n, stride)
        drawn = set()
        for _ in range(15 * len(expected) if len(expected) < 20 else 100):
            clip = training_indices(sampler, total, n, stride, rng)
            assert clip.dtype == np.int64 and clip.shape == (n,)
            assert clip.min() >= 0 and clip.max() < total
            drawn.add(tuple(clip.tolist()))
        assert drawn <= expected, (total, n, stride)
        assert drawn == expected or len(expected) >= 20, (total, n, stride)


@pytest.mark.parametrize(
    "sampler, firsts",
    [("hold", range(0, 13)), ("linspace", range(0, 12)), ("loop", range(0, 16))],
)
def test_every_first_frame_is_equally_likely(sampler, firsts):
    """20 frames, a clip of 2 at stride 4 spans 8: the three rules allow 13, 12 and 16 places."""
    rng, draws = np.random.default_rng(1), 4000
    drawn = [training_indices(sampler, 20, 2, 4, rng)[0] for _ in range(draws)]
    counts = np.bincount(drawn, minlength=len(firsts))
    assert len(counts) == len(firsts)
    expected = draws / len(firsts)
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 38  # exceeded once in a thousand with 15 degrees of freedom


def test_the_frames_of_segments_are_drawn_independently():
    rng = np.random.default_rng(2)
    drawn = np.array([training_indices("segments", 23, 4, 9, rng) for _ in range(4000)])
    places = drawn - [0, 5, 10, 15]
    assert places.min() == 0 and places.max() == 4  # the last 3 frames belong to no part
    pairs = np.bincount(places[:, 0] * 5 + places[:, 1], minlength=25)
    assert ((pairs - 160) ** 2 / 160).sum() < 52  # 24 degrees of freedom


def test_sixteen_frames_of_linspace_are_four_or_five_apart():
    """VideoMAE's fine-tuning clip covers 64 frames, its test clip 61."""
    clip = training_indices("linspace", 300, 16, 4, np.random.default_rng(0))
    steps = np.diff(clip)
    assert clip[-1] - clip[0] == 63
    assert sorted(set(steps.tolist())) == [4, 5] and (steps == 5).sum() == 3


@pytest.mark.parametrize(
    "sampler, total, num_frames, stride, expected",
    [
        ("hold", 64, 16, 4, list(range(0, 64, 4))),
        ("hold", 33, 8, 8, [0, 8, 16, 24, 24, 24, 24, 24]),
        ("hold", 34, 8, 8, [0, 8, 16, 24, 32, 32, 32, 32]),
        ("hold", 2, 3, 1, [0, 0, 0]),
        ("hold", 1, 3, 4, [0, 0, 0]),
        ("hold", 32, 8, 8, [0, 8, 16, 24, 24, 24, 24, 24]),
        ("hold", 16, 16, 1, [*range(15), 14]),
        ("linspace", 64, 16, 4, [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]),
        ("linspace", 20, 8, 4, [0, 5, 10, 15, 19, 19, 19, 19]),
        ("linspace", 3, 4, 4, [2, 2, 2, 2]),
        ("loop", 10, 4, 3, [0, 3, 6, 9]),
        ("loop", 9, 4, 3, [0, 3, 6, 0]),
        ("loop", 3, 8, 2, [0, 2, 1, 0, 2, 1, 0, 2]),
        ("segments", 16, 16, 4, list(range(16))),
        ("segments", 3, 6, 1, [0, 0, 0, 0, 1, 2]),
        ("segments", 31, 16, 4, list(range(16))),
    ],
)
def test_training_clips_that_leave_no_choice(sampler, total, num_frames, stride, expected):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        drawn = training_indices(sampler, total, num_frames, stride, rng)
        assert drawn.tolist() == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_single_frame_is_repeated(sampler):
    assert training_indices(sampler, 1, 5, 3, np.random.default_rng(0)).tolist() == [0] * 5
    assert view_indices(sampler, 1, 5, 3, 3).tolist() == [[0] * 5] * 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_one_clip(sampler):
    a, b = (training_indices(sampler, 400, 16, 4, np.random.default_rng(7)) for _ in range(2))
    other = training_indices(sampler, 400, 16, 4, np.random.default_rng(8))
    assert a.tolist() == b.tolist() != other.tolist()


def thinned_views(total, n, stride, clips):
    """VideoMAE's dense test views, as the authors state them."""
    kept = list(range(0, total, stride))
    kept += [kept[-1]] * (n - len(kept))
    step = (len(kept) - n) / (clips - 1)
    return [kept[int(k * step + 1e-9) :][:n] for k in range(clips)]


def tick_views(total, n, stride, clips):
    tick = total / n
    ticks = sorted(int(k * tick / clips + tick * x + 1e-9) for k in range(clips) for x in range(n))
    return [ticks[k::clips] for k in range(clips)]


def looped_views(total, n, stride, clips):
    firsts = np.linspace(0, max(0, total - n * stride), clips) + 1e-9
    return [[(int(first) + stride * k) % total for k in range(n)] for first in firsts]


VIEWS = {
    "hold": thinned_views,
    "linspace": thinned_views,
    "loop": looped_views,
    "segments": tick_views,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("clips", [2, 3, 5])
def test_views_are_those_of_the_definition(sampler, clips):
    for total, n, stride in [*SIZES, (300, 16, 4), (250, 32, 2), (47, 16, 4), (64, 16, 4)]:
        views = view_indices(sampler, total, n, stride, clips)
        assert views.dtype == np.int64 and views.shape == (clips, n)
        assert views.tolist() == VIEWS[sampler](total, n, stride, clips), (total, n, stride)


def test_views_by_hand():
    # 100 frames at stride 4 are 25, so that 16 of them begin at 0, 2, 4, 6 and 9.
    views = view_indices("linspace", 100, 16, 4, 5)
    assert (views[:, 0] // 4).tolist() == [0, 2, 4, 6, 9] and views[-1, -1] == 96
    assert view_indices("linspace", 100, 16, 4, 1)[0, [0, -1]].tolist() == [16, 76]
    # 250 frames leave 186 beside a clip of 32 at stride 2.
    assert view_indices("loop", 250, 32, 2, 4)[:, 0].tolist() == [0, 62, 124, 186]
    assert view_indices("loop", 250, 32, 2, 1)[0, [0, -1]].tolist() == [93, 155]
    assert view_indices("loop", 5, 4, 2, 1).tolist() == [[0, 2, 4, 1]]
    # 48 frames are 16 parts of 3, whose ticks are at 0, 1.5, 3...
    first, second = view_indices("segments", 48, 16, 4, 2).tolist()
    assert first == list(range(0, 48, 3)) and second == list(range(1, 48, 3))
    assert view_indices("segments", 48, 16, 4, 1)[0].tolist() == second
    assert view_indices("segments", 3, 4, 4, 1).tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_clip_lies_as_far_from_the_start_as_from_the_end(sampler):
    views = view_indices(sampler, 320, 16, 4, 1)
    assert views.shape == (1, 16)
    assert abs(views[0, 0] - (319 - views[0, -1])) <= 4


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (dict(sampler="dense"), UserError, "sampler is 'dense'; expected one of .*'segments'"),
        (dict(total=0), VideoError, "a video of 0 frames"),
        (dict(num_frames=0), UserError, "num_frames is 0; expected an int of at least 1"),
        (dict(stride=1.5), UserError, "stride is 1.5; expected"),
    ],
    ids=str,
)
def test_refused_arguments(changed, error, message):
    arguments = dict(sampler="hold", total=9, num_frames=4, stride=2) | changed
    with pytest.raises(error, match=message):
        training_indices(**arguments, rng=np.random.default_rng(0))
    with pytest.raises(error, match=message):
        view_indices(**arguments, clips=2)
    with pytest.raises(UserError, match="clips is 0; expected an int of at least 1"):
        view_indices("hold", 9, 4, 2, clips=0)
