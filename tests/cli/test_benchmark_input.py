# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark-input`: what it prints and writes, and what it refuses."""

import json
import os

import av
import numpy as np
import pytest
from clips import every_frame, write_clip
from commands import run_command

from vivit_jax.benchmark import input as reading
from vivit_jax.benchmark import loader_table, lock
from vivit_jax.benchmark.made_video import Video, write_video
from vivit_jax.errors import UserError, VideoError

DEFAULT = "videomae-v1-base-kinetics400-finetune"
SHORT = ("--frames", "4", "--stride", "3", "--repeats", "2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a b.mp4", frames=40, gop=20, b_frames=3)


def positive(value) -> bool:
    return isinstance(value, float | int) and value > 0


def test_rows_and_file(clip, capsys, tmp_path):
    path = tmp_path / "figures.json"
    status, out, err = run_command(capsys, "benchmark-input", clip, *SHORT, "--json", path)
    assert status == 0 and err == ""
    for line in ("dense clips of 4 frames", "sparse clips of 4 frames"):
        assert line in out
    for start in ("vivit_jax ", "read loop "):
        assert out.count(f"\n  {start}") == 2, start
    assert out.count("time of vivit_jax / read loop: ") == out.count("frames bit-equal") == 2
    figures = json.loads(path.read_text())
    assert figures["versions"]["av"] == av.__version__
    assert figures["cpu"] and figures["date"] and figures["command"] and figures["made"] is None
    assert figures["videos"] == [str(clip)]
    assert [result["sampling"] for result in figures["reading"]] == ["dense", "sparse"]
    for result in figures["reading"]:
        assert result["agrees"] and positive(result["ratio"])
        for side in ("ours", "loop"):
            assert len(result[side]["seconds"]) == 2 and positive(result[side]["median"])


def test_a_video_is_made_where_none_is_given(capsys):
    made = ("--minutes", "0.05", "--fps", "20", "--gop", "12", "--scene-seconds", "1.5")
    status, out, err = run_command(
        capsys, "benchmark-input", *made, *SHORT, "--width", 64, "--height", 48
    )
    assert status == 0 and err == "making 60 frames of video ...\n"
    assert out.count("made.mp4, 60 frames 64x48 h264") == 2
    assert out.count("frames bit-equal") == 2


def test_a_made_video_is_a_function_of_its_arguments(tmp_path):
    def keys(path):
        with av.open(str(path)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
        times = sorted(p.pts for p in packets)
        return [times.index(p.pts) for p in packets if p.is_keyframe]

    uncut = Video(minutes=0.1, fps=10, gop=25, width=64, height=64)
    first, second, cut = (tmp_path / name for name in ("1.mp4", "2.mp4", "3.mp4"))
    write_video(first, uncut)
    write_video(second, uncut)
    np.testing.assert_array_equal(every_frame(first), every_frame(second))
    assert keys(first) == [0, 25, 50]
    write_video(cut, Video(minutes=0.2, fps=30, width=64, height=64, scene_seconds=4))
    assert keys(cut) == [0, 120, 240]


def test_sparse_clips_have_one_frame_in_each_part():
    middle = reading.sample("sparse", 103, 16, 4)
    assert middle[0] == 3 and middle[-1] == 99 and set(np.diff(middle)) <= {6, 7}
    np.testing.assert_array_equal(reading.sample("sparse", 16, 16, 4), np.arange(16))
    np.testing.assert_array_equal(reading.sample("dense", 40, 4, 3), [15, 18, 21, 24])


def test_frames_that_differ_give_no_ratio(clip, capsys, monkeypatch, tmp_path):
    def wrong(path, indices):
        frames = reading.read_loop(path, indices).copy()
        frames[-1, 0, 0, 0] ^= 1
        return frames

    monkeypatch.setattr(reading, "read_ours", wrong)
    path = tmp_path / "wrong.json"
    status, out, _ = run_command(capsys, "benchmark-input", clip, *SHORT, "--json", path)
    assert status == 1
    assert out.count("frames of vivit_jax and of the read loop differ: no ratio") == 2
    assert "time of" not in out and "bit-equal" not in out
    results = json.loads(path.read_text())["reading"]
    assert all(result["ratio"] is None and not result["agrees"] for result in results)


def test_other_shapes_differ(clip, capsys, monkeypatch):
    monkeypatch.setattr(reading, "read_ours", lambda path, k: reading.read_loop(path, k)[1:])
    assert run_command(capsys, "benchmark-input", clip, *SHORT)[0] == 1


def test_a_loop_that_fails_is_one_line(tmp_path, clip):
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(clip.read_bytes()[:1000])
    with pytest.raises(VideoError, match="damaged.mp4: the read loop fails: .*undamaged video$"):
        reading.read_loop(damaged, [0])


def test_the_loader_s_clips_per_second(clip, capsys, tmp_path):
    """A batch of a recipe's clips, repeats counted; of one video as of many."""
    path = tmp_path / "loader.json"
    flags = ("--loader", "--batch", "2", "--threads", "1", "--repeats", "2", "--json", path)
    status, out, err = run_command(capsys, "benchmark-input", clip, *flags)
    assert status == 0 and err == ""
    figures = json.loads(path.read_text())
    rate = figures["loader"]
    assert (rate["recipe"], rate["clip"]) == (DEFAULT, [16, 224, 224, 3])
    assert (rate["batch"], rate["repeats"], rate["threads"], rate["workers"]) == (2, 2, 1, 0)
    seconds = rate["rounds"]["seconds"]
    assert len(seconds) == 2 and all(map(positive, seconds)) and positive(rate["start_seconds"])
    assert rate["videos_per_second"] == pytest.approx(2 * 2 / sum(seconds))
    assert rate["clips_per_second"] == pytest.approx(2 * rate["videos_per_second"])
    assert rate["cpu_per_clip"] == pytest.approx(rate["cpu_seconds"] / 8)
    assert figures["made"] is None and figures["videos"] == [str(clip)] and figures["command"]
    assert f"loader of {DEFAULT}: 16 frames 224x224 of videos of 40 frames 64x48\n" in out
    assert "\n  --threads 1 --workers 0 --batch 2 x 2 repeats; 2 batches timed\n" in out
    assert f"\n  {rate['clips_per_second']:.2f} clips/s, " in out and "ms of CPU a clip" in out


def test_the_loader_reads_a_made_video_by_many_names(capsys):
    recipe = ("--recipe", "videomae-v1-base-ssv2-pretrain", "--batch", "1", "--repeats", "1")
    made = ("--minutes", "0.05", "--fps", "10", "--width", "64", "--height", "48")
    status, out, err = run_command(capsys, "benchmark-input", "--loader", *recipe, *made)
    assert status == 0 and err == "making 30 frames of video ...\n"
    assert "\n  --threads 2 --workers 0 --batch 1; 1 batches timed\n" in out and " clips/s, " in out


def test_rates_by_threads_and_the_cores_that_a_plan_s_hosts_need(
    clip, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(loader_table, "measure_reading", lambda *_: lock.Held(0.05, 2, 1.6, 0.5))
    plan, path = tmp_path / "plan.json", tmp_path / "loader.json"
    hosts = {"topology": "v5e:8x8", "hosts": 16, "host_videos_per_second": 12.5}
    plan.write_text(json.dumps(hosts | {"recipe": DEFAULT}))
    flags = ("--loader", "--batch", "1", "--threads", "1,2", "--repeats", "1", "--plan", plan)
    status, out, err = run_command(capsys, "benchmark-input", clip, *flags, "--json", path)
    assert status == 0 and err == ""
    assert "\n  --threads  --workers  clips/s " in out
    assert "50 ms of CPU; 2 threads keep 1.60 cores busy, as if 50% of the time held" in out
    assert "Python's lock, so at most 2.0 cores in a process\n" in out
    assert "v5e:8x8: each of 16 hosts reads 12.5 videos/s: 0.6 cores like this one at 50 ms" in out
    figures = json.loads(path.read_text())
    assert [rate["threads"] for rate in figures["loaders"]] == [1, 2]
    assert figures["loader"] == figures["loaders"][0] and figures["reading"]["share"] == 0.5
    assert figures["needed"]["cores"] == pytest.approx(0.625)


def test_the_share_that_holds_a_lock_by_the_cores_that_are_busy():
    for share in (0.1, 0.4, 0.8):
        # Two threads, one of which waits for share**2 of the time.
        assert lock.busy_cores(share, 2) == pytest.approx(2 / (1 + share**2))
        for threads in (2, 3, 8):
            assert lock.held_share(lock.busy_cores(share, threads), threads) == pytest.approx(share)
    assert lock.busy_cores(0, 5) == 5 and lock.busy_cores(1, 5) == pytest.approx(1)


def test_a_video_s_cost_is_measured_on_one_core_and_on_several(monkeypatch):
    read = []
    monkeypatch.setattr(lock, "usable_cores", lambda: 1)
    held = lock.measure_lock(read.append, 3)
    assert read == [0, 0, 1, 2] and held.threads == 1 and held.busy is held.share is None
    read.clear()
    monkeypatch.setattr(lock, "usable_cores", lambda: 2)
    held = lock.measure_lock(lambda number: read.append(number) or sum(range(9999)), 3)
    assert sorted(read) == [0, *range(30)] and held.threads == 2 and positive(held.cpu_seconds)
    assert 0 < held.busy <= 2 and 0 <= held.share <= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no such call")
def test_one_core_is_given_back():
    before = os.sched_getaffinity(0)
    with reading.one_core() as pinned:
        assert pinned and len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    "args, words",
    [
        (("missing.mp4",), "missing.mp4: no such file"),
        (("clip.mp4", "missing.mp4", *SHORT), "missing.mp4: no such file"),
        (("text.mp4",), "text.mp4: no readable video"),
        (("turned.mp4", *SHORT), "turned.mp4 is to be displayed turned"),
        (("clip.mp4",), "clip.mp4: 40 frames; a dense clip of 16 frames at stride 4 needs 61"),
        (
            ("clip.mp4", "--frames", "41", "--stride", "1"),
            "40 frames; a dense clip of 41 frames at stride 1 needs 41: pass a longer video",
        ),
        (("--repeats", "0"), "--repeats must be at least 1, got 0"),
        (("--frames", "0"), "--frames must be at least 1, got 0"),
        (("--stride", "-1"), "--stride must be at least 1, got -1"),
        (("--minutes", "0"), "minutes must hold at least one frame, got 0.0"),
        (("--gop", "0"), "gop must be at least 1, got 0"),
        (("--width", "33"), "width and height must be even and at least 32, got 33x180"),
        (("--scene-seconds", "-1"), "scene_seconds must be at least 0, got -1.0"),
        (("--loader", "missing.mp4"), "missing.mp4: no such file"),
        (("--loader", "--frames", "8"), "--frames, --stride and --cores are not for"),
        (("--loader", "--threads", "0"), "--threads must be at least 1, got 0"),
        (("--loader", "--workers", "-1"), "--workers must be at least 0, got -1"),
        (("--loader", "--threads", "1,x"), "--threads is '1,x'; expected a number, or several as"),
        (("--loader", "--workers", "0,-2"), "--workers must be at least 0, got -2"),
        (
            ("--loader", "--plan", "none.json"),
            "--plan none.json: No such file or directory; pass a",
        ),
        (("--loader", "--threads", "1,1000000"), "--threads must be at most 1024, got 1000000"),
        (("--loader", "--workers", "5000"), "--workers must be at most 1024, got 5000"),
        (("--loader", "--plan", "there.json"), "--plan there.json is no plan: expected a file of"),
        (("--loader", "--plan", "other.json"), "other.json is of recipe y, not videomae-v1-base"),
        (("--plan", "other.json"), "--workers and --plan are only for --loader"),
        (("s3://bucket/a.mp4",), "s3://bucket/a.mp4 is an address, which only --loader reads"),
        (("--loader", "--recipe", "x"), "there is no recipe 'x'"),
        (("--workers", "2", "--batch", "4"), "--threads, --workers and --plan are only for"),
        (("--json", "figures.txt"), "--json figures.txt ends in '.txt'; expected one of .json"),
        (("--json", "there.json"), "--json there.json exists; choose another name"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(clip, capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "there.json").write_text("{}")
    hosts = {"topology": "h100:8", "hosts": 1, "host_videos_per_second": 9, "recipe": "y"}
    (tmp_path / "other.json").write_text(json.dumps(hosts))
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    write_clip(tmp_path / "turned.mp4", frames=20, display=(90, False))
    status, _, err = run_command(capsys, "benchmark-input", *args)
    assert status == 2 and words in err and err.count("\n") == 1


def test_errors_of_the_library():
    with pytest.raises(VideoError, match="15 frames; a sparse clip of 16 frames needs 16"):
        reading.sample("sparse", 15, 16, 4)
    with pytest.raises(UserError, match="minutes must hold at least one frame"):
        Video(minutes=float("-inf")).check()


@pytest.mark.alone
# Without cuts, 125 frames on average lie between a wanted one and the keyframe before it. The ratio
# measured 0.10 to 0.13 with a cut every 6 s, and 0.14 to 0.16 without.
@pytest.mark.parametrize("scene_seconds, time", [(6, 0.2), (0, 0.25)])
def test_sixteen_frames_of_ten_minutes(tmp_path, scene_seconds, time):
    path = tmp_path / "made.mp4"
    write_video(path, Video(minutes=10, scene_seconds=scene_seconds))
    with reading.one_core():
        result = reading.compare_readers(path, "sparse", repeats=3)
    print(f"scenes of {scene_seconds} s: ratio {result.ratio:.3f}")
    assert result.agrees and result.ratio <= time
