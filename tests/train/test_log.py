# SPDX-License-Identifier: Apache-2.0
"""Metrics are strict JSON with each step once, and progress reads well on terminal and pipe."""

import io
import json
import math
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import file_size

from vivit_jax.errors import MissingExtra, UserError, WriteError
from vivit_jax.train.log import METRICS, MetricLog, Progress, read_metrics


def strict(text):
    """JSON as the standard has it: Python's own reader also takes NaN."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def write_steps(directory, steps, **options):
    log = MetricLog(directory, **options)
    for step in steps:
        log.write("train", step, {"loss": 1 / step})
    log.close()


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    log = MetricLog(tmp_path / "new" / "run")
    values = {"loss": np.float32(0.5), "lr": jnp.float32(0.25), "clips": 3, "note": 'a "clip"\n'}
    log.write("train", 7, values)
    (line,) = (tmp_path / "new" / "run" / METRICS).read_text().splitlines()
    line = strict(line)
    assert line.pop("time") > 1e9
    assert line == {
        **{"kind": "train", "step": 7, "loss": 0.5, "lr": 0.25},
        **{"clips": 3, "note": 'a "clip"\n'},
    }
    log.close()


def test_what_is_not_finite_is_strict_json_and_comes_back(tmp_path):
    log = MetricLog(tmp_path)
    log.write("train", 1, {"loss": math.nan, "norm": np.float32(np.inf), "x": -math.inf, "lr": 0.1})
    log.close()
    line = strict((tmp_path / METRICS).read_text())
    assert line["loss"] is line["norm"] is line["x"] is None and line["lr"] == 0.1
    assert line["not_finite"] == {"loss": "NaN", "norm": "Infinity", "x": "-Infinity"}
    (read,) = read_metrics(tmp_path / METRICS)
    assert math.isnan(read["loss"]) and read["norm"] == math.inf and read["x"] == -math.inf
    assert read["lr"] == 0.1 and "not_finite" not in read


def test_a_new_run_does_not_write_over_another(tmp_path):
    write_steps(tmp_path, [1])
    with pytest.raises(UserError, match=r"metrics\.jsonl exists, from an earlier run; resume"):
        MetricLog(tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1]


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "step": 6, "lo', '{"kind"', "\n", "\x00"])
def test_a_killed_and_resumed_run_has_each_step_once(tmp_path, torn):
    write_steps(tmp_path, [1, 2, 3, 4, 5])
    path = tmp_path / METRICS
    kept = path.read_text().splitlines()[:3]
    with path.open("a") as file:
        file.write(torn.strip("\n"))
    assert len(read_metrics(path)) == 5
    write_steps(tmp_path, [4, 5, 6], resume_at=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().splitlines()[:3] == kept and path.read_text().endswith("}\n")
    assert [other.name for other in tmp_path.iterdir()] == [METRICS]


def test_resuming_at_step_0_starts_again(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1], resume_at=0)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [1]


def test_a_resumed_run_says_that_its_earlier_metrics_are_gone(tmp_path):
    write_steps(tmp_path, [4], resume_at=3)
    first, second = read_metrics(tmp_path / METRICS)
    assert (first["kind"], first["step"], second["step"]) == ("event", 3, 4)
    assert "no metrics.jsonl of earlier steps" in first["text"]


@pytest.mark.parametrize("bad", ["{", "[]", "3", '{"kind": "train"}', '{"kind": "x", "step": 1}'])
def test_a_bad_line_that_is_not_the_last_is_an_error(tmp_path, bad):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / METRICS
    before = path.read_text().replace("\n", f"\n{bad}\n", 1)
    path.write_text(before)
    with pytest.raises(UserError, match=r"line 2 is not a line of metrics: '[^']+'; remove it"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 2"):
        MetricLog(tmp_path, resume_at=1)
    assert path.read_text() == before
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_metrics(tmp_path / "other")


def test_a_log_that_is_not_enabled_touches_nothing(tmp_path):
    write_steps(tmp_path / "run", [1, 2], enabled=False, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("test", {}, "kind is 'test'; expected one of train, evaluate, event"),
        ("train", {"step": 3.0}, "named 'step', which each line uses for itself"),
        ("train", {"loss": None}, "'loss' is None, NoneType; expected a number or a string"),
        ("train", {"loss": np.ones(1)}, "'loss' is array"),
        ("train", {"done": True}, "'done' is True, bool"),
    ],
)
def test_what_is_no_metric(tmp_path, kind, values, message):
    log = MetricLog(tmp_path)
    with pytest.raises(UserError, match=message):
        log.write(kind, 1, values)
    log.close()
    assert (tmp_path / METRICS).read_text() == ""


def events(path):
    """The protocol buffers of a TensorBoard file: length, checksum, bytes, checksum, again."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_has_the_same_numbers_and_forgets_the_steps_of_a_killed_run(
    tmp_path, monkeypatch
):
    # tensorboardX loads torch where it can, which takes seconds.
    monkeypatch.setitem(sys.modules, "torch", None)
    from tensorboardX.record_writer import RecordWriter

    write_steps(tmp_path, [1, 2, 3], tensorboard=True)
    log = MetricLog(tmp_path, resume_at=1, tensorboard=True)
    log.write("evaluate", 2, {"accuracy": 0.25, "loss": math.nan})
    log.write("event", 2, {"text": "hello"})
    log.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    first, second = (list(events(path)) for path in files)
    theirs = RecordWriter(str(tmp_path / "theirs"))
    for event in first:
        theirs.write(event.SerializeToString())
    theirs.close()
    assert (tmp_path / "theirs").read_bytes() == files[0].read_bytes()
    scalars = [(e.step, v.tag, v.simple_value) for e in first for v in e.summary.value]
    assert scalars == [(s, "train/loss", pytest.approx(1 / s)) for s in (1, 2, 3)]
    # TensorBoard drops what earlier files have from the step of a START on.
    starts = [e.step for e in second if e.session_log.status == e.session_log.START]
    assert starts == [2]
    tags = {v.tag: (e.step, v.simple_value) for e in second for v in e.summary.value}
    assert tags.pop("evaluate/accuracy") == (2, 0.25)
    assert len(tags) == 1 and next(iter(tags)).startswith("event/text")


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_disk_that_is_full_leaves_whole_lines_and_one_error(tmp_path, monkeypatch, tensorboard):
    monkeypatch.setitem(sys.modules, "torch", None)
    log = MetricLog(tmp_path, tensorboard=tensorboard)
    # A line has fewer bytes than an event, so that either file is the first to be full.
    numbers = {f"n{i}": 0.1 for i in range(1 + 9 * tensorboard)}
    written = 0
    with file_size(1000), pytest.raises(WriteError) as told:
        for step in range(1, 100):
            log.write("train", step, numbers)
            written = step
    log.close()
    name = "tensorboard/events.out.tfevents" if tensorboard else METRICS
    assert str(told.value).startswith(f"{tmp_path}/{name}")
    assert str(told.value).endswith(
        "cannot be written: File too large; make room, or choose another place"
    )
    lines = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in lines] == list(range(1, written + 1 + tensorboard))
    assert (tmp_path / METRICS).read_text().endswith("\n")
    if tensorboard:
        (file,) = (tmp_path / "tensorboard").iterdir()
        tags = [value.tag for event in events(file) for value in event.summary.value]
        assert tags == [f"train/{name}" for name in numbers] * written
        return
    # Once there is room the run continues in the same file.
    log = MetricLog(tmp_path, resume_at=written)
    log.write("train", written + 1, numbers)
    log.close()
    assert len(read_metrics(tmp_path / METRICS)) == written + 1


def test_tensorboard_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingExtra, match=r"pip install .*\[tensorboard\]"):
        MetricLog(tmp_path / "run", tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def lap(seconds, waited, **more):
    return dict(step_seconds=seconds, wait_share=waited / seconds, **more)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_pipe_is_plain_lines_at_intervals():
    stream = io.StringIO()
    progress = Progress(100, 10, 8, stream, every_seconds=3600)
    for step in range(11, 100):
        progress.update(step, loss=2.0, lr=1e-3, measured=lap(0.4, 0.1))
    progress.say("checkpoint 99")
    progress.update(100, loss=math.nan, lr=0.0, measured=lap(0.4, 0.1))
    progress.close()
    first, said, last = stream.getvalue().splitlines()
    assert first == ("step 11/100  loss 2.0000  lr 1.00e-03  0.4 s, with compilation")
    assert said == "checkpoint 99"
    assert last == ("step 100/100  loss nan  lr 0.00e+00  20.0 clips/s  25% waiting  0:00:00 left")
    assert "\r" not in stream.getvalue()


def test_progress_that_is_not_enabled_shows_nothing():
    for stream in (io.StringIO(), Terminal()):
        progress = Progress(4, 0, 2, stream, enabled=False)
        progress.update(1, loss=0.5, lr=1e-4, measured=lap(0.5, 0.0))
        progress.say("hello")
        progress.close()
        assert stream.getvalue() == ""


def test_rates_leave_out_the_first_update_which_compiles():
    stream = io.StringIO()
    progress = Progress(1000, 0, 4, stream, every_seconds=0)
    progress.update(1, loss=1.0, lr=0.1, measured=lap(100.0, 0.0))
    progress.update(11, loss=1.0, lr=0.1, measured=lap(2.0, 1.0))
    progress.update(21, loss=1.0, lr=0.1, measured=lap(6.0, 0.0))
    progress.update(31, loss=1.0, lr=0.1, measured=lap(2.0, 0.0, mfu=0.5))
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("lr 1.00e-01  100.0 s, with compilation")
    assert "20.0 clips/s  50% waiting  0:03:18 left" in lines[1]
    assert "10.0 clips/s  12% waiting  0:06:32 left" in lines[2]
    assert "12.0 clips/s  10% waiting  10% MFU  0:05:23 left" in lines[3]


def test_progress_on_a_terminal_is_one_live_line():
    stream = Terminal()
    progress = Progress(4, 0, 2, stream)
    for step in range(1, 5):
        progress.update(step, loss=0.5, lr=1e-4, measured=lap(0.5, 0.0))
        if step == 2:
            progress.say("evaluated")
    progress.close()
    text = stream.getvalue()
    assert "evaluated\n" in text
    last = text.splitlines()[-1].split("\x1b[2K")[-1]  # after the live line is removed
    assert last.startswith("step 4/4 ") and "loss 0.5000" in last and "4.0 clips/s" in last


def test_writing_metrics_loads_neither_torch_nor_tensorboard():
    code = "import sys, vivit_jax.train.log as log; log.Progress(1, 0, 1, open('/dev/null', 'w'));"
    code += "assert not {'torch', 'tensorboardX', 'orbax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "changed",
    [
        '"time": null', '"time": "x"', '"time": 1e300', '"time": -1', '"step": true',
        '"step": -1', '"step": 1.5', '"loss": [1]', '"loss": {"a": 1}', '"not_finite": {"a": []}',
        '"kind": []', '"loss": ' + "[" * 5000,
    ],
)  # fmt: skip
def test_a_line_that_was_changed(tmp_path, changed):
    line = '{"kind": "train", "step": 1, "time": 1.0, "loss": 2.0}'
    path = tmp_path / METRICS
    path.write_text(f"{line}\n{line[:-1]}, {changed}}}\n{line}\n")
    with pytest.raises(UserError, match="line 2 is not a line of metrics") as raised:
        read_metrics(path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_pipe_in_the_place_of_metrics_is_not_opened(tmp_path):
    """Which would wait for ever for somebody who writes to it."""
    os.mkfifo(tmp_path / METRICS)
    for read in (
        lambda: MetricLog(tmp_path, resume_at=1),
        lambda: read_metrics(tmp_path / METRICS),
    ):
        with pytest.raises(UserError, match=r"metrics.jsonl: a FIFO \(named pipe\), which is not"):
            read()
