# SPDX-License-Identifier: Apache-2.0
"""The output of a training run: metrics.jsonl, TensorBoard files and a live line."""

import collections
import json
import math
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from vivit_jax.errors import MissingExtra, UserError
from vivit_jax.files.atomic import whole_file, writing
from vivit_jax.files.inputs import check_file
from vivit_jax.files.json_files import parse_json
from vivit_jax.progress import LiveLine, left

METRICS = "metrics.jsonl"
Kind = Literal["train", "evaluate", "event"]
KINDS = ("train", "evaluate", "event")
_OWN = ("kind", "step", "time", "not_finite")
_LAST_TIME = 2**37  # seconds; no calendar has later ones


class MetricLog:
    """metrics.jsonl in a run's directory: a line for each report, evaluation and event.

    A line is strict JSON: "kind", "step", "time" (Unix, seconds) and the values by name. A value
    that is not finite is null, and "not_finite" names it as NaN, Infinity or -Infinity;
    `read_metrics` undoes that. Each line is on disk when `write` returns.
    `vivit_jax.train.pages.report` draws them and says where a new metric goes.

    A new run's file must not exist yet. `resume_at` drops the lines of later steps and a truncated
    last line, so that a killed and resumed run has each step once. `tensorboard` also writes the
    finite values to files in directory/tensorboard. With `enabled=False`, for all processes of a
    run except the first, nothing is read or written. Raises UserError for a file that exists or is
    damaged, MissingExtra without tensorboardX.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_at: int | None = None,
        tensorboard: bool = False,
        enabled: bool = True,
    ):
        self._lock = threading.Lock()  # a stall is written from a thread of its own
        self._file: _Appended | None = None
        self._board: _Board | None = None
        self.earlier: list[dict[str, Any]] = []  # what the file holds of earlier steps
        if not enabled:
            return
        directory = Path(directory)
        board = _tensorboard() if tensorboard else None
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS
        had_file = path.exists()
        if resume_at is None and had_file:
            raise UserError(
                f"{path} exists, from an earlier run; resume that run, or give the new one another "
                "directory"
            )
        if had_file:
            found = [(text, line) for text, line in _read(path) if line["step"] <= resume_at]
            self.earlier = [line for _, line in found]
            with whole_file(path) as partial:
                partial.write_text("".join(f"{text}\n" for text, _ in found), encoding="utf-8")
        self._file = _Appended(path)
        if board is not None:
            self._board = _Board(board, directory / "tensorboard", resume_at)
        if resume_at is not None and not had_file:
            self.write("event", resume_at, {"text": f"there was no {METRICS} of earlier steps"})

    def write(self, kind: Kind, step: int, values: Mapping[str, float | str]) -> None:
        """Append a line. UserError for values that are neither numbers, scalars nor strings."""
        if self._file is None:
            return
        if kind not in KINDS:
            raise UserError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
        line: dict[str, Any] = {"kind": kind, "step": int(step), "time": round(time.time(), 3)}
        not_finite = {}
        for name, value in values.items():
            if name in _OWN:
                raise UserError(f"a metric is named {name!r}, which each line uses for itself")
            line[name] = value = _plain(name, value)
            if isinstance(value, float) and not math.isfinite(value):
                line[name], not_finite[name] = None, json.dumps(value)
        if not_finite:
            line["not_finite"] = not_finite
        with self._lock:
            self._file.append((json.dumps(line, allow_nan=False) + "\n").encode())
            if self._board is not None:
                finite = {f"{kind}/{name}": line[name] for name in values if line[name] is not None}
                self._board.write(finite, line["step"], line["time"])

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()


class _Appended:
    """A file of records, each written whole or not at all."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._file = path.open("ab", buffering=0)

    def append(self, data: bytes) -> None:
        """WriteError if the disk is full; the file then stays as it was."""
        end = os.fstat(self._file.fileno()).st_size
        try:
            with writing(self._path):
                while data:  # an almost full disk takes only a part
                    data = data[self._file.write(data) :]
        except BaseException:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


class _Board(_Appended):
    """A file of TensorBoard events as TFRecords: length, checksum, event, checksum.

    tensorboardX's own writer uses a thread, which dies on a full disk; later writes then block for
    ever.
    """

    def __init__(self, tensorboard: Any, directory: Path, resume_at: int | None):
        self._tensorboard = tensorboard
        with writing(directory):
            directory.mkdir(exist_ok=True)
        # Without the last number a run resumed within a second would append to its previous file.
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        super().__init__(directory / f"events.out.tfevents.{name}")
        start = self._record(time.time(), file_version="brain.Event:2")
        if resume_at is not None:  # hides later steps
            log = tensorboard.proto.event_pb2.SessionLog
            start += self._record(*(time.time(), resume_at + 1), session_log=log(status=log.START))
        self.append(start)

    def write(self, values: Mapping[str, float | str], step: int, seconds: float) -> None:
        """Add numbers or texts by tag. WriteError if the disk is full."""
        made = self._tensorboard.summary
        summaries = [
            made.text(tag, value) if isinstance(value, str) else made.scalar(tag, value)
            for tag, value in values.items()
        ]
        self.append(b"".join(self._record(seconds, step, summary=each) for each in summaries))

    def _record(self, seconds: float, step: int = 0, **content: Any) -> bytes:
        event = self._tensorboard.proto.event_pb2.Event(wall_time=seconds, step=step, **content)
        data = event.SerializeToString()
        length, checksum = (
            struct.pack("<Q", len(data)),
            self._tensorboard.record_writer.masked_crc32c,
        )
        return b"".join(
            (length, struct.pack("<I", checksum(length)), data, struct.pack("<I", checksum(data)))
        )


def _tensorboard() -> Any:
    try:
        import tensorboardX.proto.event_pb2
        import tensorboardX.record_writer
        import tensorboardX.summary
    except ModuleNotFoundError as error:
        raise MissingExtra("tensorboardX", "tensorboard", "writing TensorBoard files") from error
    return tensorboardX


def _plain(name: str, value: Any) -> int | float | str:
    value = value.item() if hasattr(value, "item") and not getattr(value, "ndim", 1) else value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(
            f"metric {name!r} is {value!r}, {type(value).__name__}; expected a number or a string"
        )
    return value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dicts, with NaN and infinities as floats again.

    Ignores a truncated last line, which a kill leaves. UserError for a file that is missing or
    damaged in any other way.
    """
    return [line for _, line in _read(Path(path))]


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line as text and as its values."""
    check_file(path)
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text, f"{path}: line {number}")
            not_finite = line.pop("not_finite", {})
            sound = line["kind"] in KINDS and type(line["step"]) is int and line["step"] >= 0
            if not sound or not 0 <= line["time"] < _LAST_TIME:
                raise ValueError
            if not all(isinstance(v, int | float | str | None) for v in line.values()):
                raise ValueError
            for name, value in not_finite.items():
                line[name] = float(value)
        except (ValueError, KeyError, TypeError, AttributeError):
            # A whole line ends in a newline, so that an empty text follows it.
            if number == len(texts):
                break
            raise UserError(
                f"{path}: line {number} is not a line of metrics: {text[:60]!r}; remove it"
            ) from None
        lines.append((text, line))
    return lines


class Progress:
    """The progress of training: a live line on a terminal, a line now and then elsewhere.

    Shows the step, loss, learning rate, clips per second, the share of time spent waiting for data,
    MFU where it is known and the remaining time. Rates are those of the last 50 updates, without
    the first, which compiles. Other streams than a terminal get a line every `every_seconds`, and
    one for the first and the last step. With `enabled=False` nothing is shown.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int,
        clips_per_step: int,
        stream: TextIO | None = None,  # None: standard error
        every_seconds: float = 30.0,
        enabled: bool = True,
    ):
        self._total, self._step, self._clips = total_steps, first_step, clips_per_step
        self._recent: collections.deque = collections.deque(maxlen=50)
        self._updates = 0
        self._line = None
        if enabled:
            self._line = LiveLine(
                "step", total_steps, first_step, stream=stream, every_seconds=every_seconds
            )

    def update(self, step: int, *, loss: float, lr: float, measured: Mapping[str, float]) -> None:
        """Show `step` as done; `measured` is a `vivit_jax.train.clock.Clock.lap`."""
        if self._line is None:
            return
        self._updates += 1
        if self._updates == 2:
            self._recent.clear()
        seconds = measured["step_seconds"]
        shares = (measured["wait_share"], measured.get("mfu", 0.0))
        self._recent.append((step - self._step, seconds, *(seconds * each for each in shares)))
        self._step = step
        steps, total, wait, used = (sum(column) for column in zip(*self._recent, strict=True))
        parts = [f"loss {loss:.4f}", f"lr {lr:.2e}"]
        if self._updates == 1:
            parts.append(f"{total:.1f} s, with compilation")
        elif total > 0 and steps > 0:
            parts += [f"{steps * self._clips / total:.1f} clips/s", f"{wait / total:.0%} waiting"]
            parts += [f"{used / total:.0%} MFU"] if "mfu" in measured else []
            parts.append(left((self._total - step) * total / steps))
        self._line.update(step, "  ".join(parts))

    def say(self, text: str) -> None:
        """Print a line of its own, above the live line."""
        if self._line is not None:
            self._line.say(text)

    def close(self) -> None:
        """Leave the last state of the live line and end it."""
        if self._line is not None:
            self._line.close()
