# SPDX-License-Identifier: Apache-2.0
"""Processes of one run meet, and each learns when another one ends or hangs.

Process 0 listens at the coordinator's address until all have come, then leaves the port to
`jax.distributed`. The connections stay open beside it: a process that dies closes its own, one that
is frozen sends nothing, and one that hangs does not move on with the others.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from vivit_jax.errors import UserError, printable

_GREETING = "vivit_jax processes, 1"
_LONGEST = 1 << 16  # bytes of a line
_HEARING = 5.0  # seconds that a connection may take to introduce itself


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among others.

    Attributes:
        address: host:port of process 0.
        process: this process's number, from 0.
        processes: how many there are.
    """

    address: str
    process: int
    processes: int

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The parts of the address. Raises UserError if it has no port."""
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UserError(
                f"the coordinator's address is {self.address!r}; expected host:port, such as "
                "10.0.0.1:1234, the address of process 0"
            )
        return host.removeprefix("[").removesuffix("]"), int(port)


@dataclasses.dataclass(frozen=True)
class Patience:
    """For how many seconds processes wait for each other.

    Attributes:
        meeting: until all have come.
        reminder: between two lines that name those who have not come.
        beat: between two signs of life.
        silence: without a sign of life.
        hang: while others are ahead.
        ending: for the process's own message, once another process is lost.
    """

    meeting: float = 300.0
    reminder: float = 30.0
    beat: float = 5.0
    silence: float = 60.0
    hang: float = 900.0
    ending: float = 10.0


class Peers:
    """The other processes of a run, watched from a thread until `close`.

    Once one is lost, this process ends: by `end`, which by default prints why and exits with
    status 1, `Patience.ending` seconds later, unless it has closed before.
    """

    def __init__(
        self,
        place: Place,
        lines: dict[int, "_Line"],
        patience: Patience,
        say: Callable[[str], None],
        end: Callable[[str], None] | None = None,
    ):
        self._place, self._lines, self._patience = place, lines, patience
        self._say, self._end = say, _exit if end is None else end
        self._names = {number: line.name for number, line in lines.items()}
        self._steps = dict.fromkeys(lines, 0)
        self._reached, self._lost, self._goodbye = 0, None, None
        self._closed, self._known = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str | None:
        """Which process is lost and why, or None."""
        return self._lost

    def reach(self, step: int) -> None:
        """Note that this process waits for the others at a step."""
        self._reached = step

    def wait_for_news(self) -> str | None:
        """What an error here may come from: the loss of another process, known within a beat."""
        self._known.wait(2 * self._patience.beat)
        return self._lost

    def close(self, failure: str | None = None) -> None:
        """Leave: as one that is done, or with the message of a failure, which ends the others."""
        self._goodbye = {"done": True} if failure is None else {"failed": failure}
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        beat, sent = self._patience.beat, 0.0
        heard = dict.fromkeys(self._lines, time.monotonic())
        moved = {}  # process -> its step, and since when it is there
        with selectors.DefaultSelector() as selector:
            for number, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, number)
            while not self._closed.is_set() and self._lost is None:
                now = time.monotonic()
                if now - sent >= beat:
                    _tell(self._lines, {"step": self._reached})
                    sent = now
                for key, _ in selector.select(min(beat, 0.2)):
                    heard[key.data] = time.monotonic()
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                        heard.pop(key.data)
                self._find_silent(heard)
                if self._place.process == 0:  # which hears all
                    steps = {0: self._reached} | {number: self._steps[number] for number in heard}
                    moved = {
                        n: old if (old := moved.get(n, (-1, 0.0)))[0] == step else (step, now)
                        for n, step in steps.items()
                    }
                    self._find_hanging(moved)
        if self._lost is not None:
            _tell(self._lines, {"lost": self._lost})
            self._known.set()
            if not self._closed.wait(self._patience.ending):
                self._end(self._lost)
        if self._goodbye is not None:
            _tell(self._lines, self._goodbye)
            if "failed" in self._goodbye and self._place.process == 0:
                self._wait_for_ends()
        for line in self._lines.values():
            line.close()

    def _hear(self, number: int) -> bool:
        """Take what a process sent; False once it has left."""
        messages = self._lines[number].read()
        for message in messages or ():
            self._steps[number] = message.get("step", self._steps[number])
            if "lost" in message:
                self._lose(message["lost"])
            if "failed" in message:
                self._lose(f"{self._names[number]} failed: {message['failed']}")
            if "done" in message:
                return False
        if messages is None:
            self._lose(f"{self._names[number]} ended without a word")
            if number == 0 and self._lost is not None:
                self._say(self._lost)  # at once: without process 0 jax soon aborts
        return messages is not None

    def _wait_for_ends(self) -> None:
        """Leave last: once process 0 is gone, jax aborts the others in the middle of a word."""
        until = time.monotonic() + self._patience.ending + 2 * self._patience.beat
        for line in self._lines.values():
            line.socket.settimeout(max(until - time.monotonic(), 0.1))
            while line.read() is not None:
                pass

    def _find_silent(self, heard: dict[int, float]) -> None:
        for number, last in heard.items():
            if time.monotonic() - last > self._patience.silence:
                self._lose(
                    f"{self._names[number]} has sent no sign of life for "
                    f"{self._patience.silence:g} s"
                )

    def _find_hanging(self, moved: dict[int, tuple[int, float]]) -> None:
        """Lose the process that stays at its step while others wait for it at a later one."""
        names, most = {0: "process 0"} | self._names, max(step for step, _ in moved.values())
        least = min(step for step, _ in moved.values())
        late = [number for number, (step, _) in moved.items() if step == least]
        since = max(moved[number][1] for number in late)
        if least < most and time.monotonic() - since > self._patience.hang:
            self._lose(
                f"{', '.join(names[number] for number in late)} hangs: others have waited at step "
                f"{most} for {self._patience.hang:g} s"
            )

    def _lose(self, why: str) -> None:
        self._lost = self._lost or why


def meet(
    place: Place,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    *,
    say: Callable[[str], None] | None = None,
    end: Callable[[str], None] | None = None,
) -> Peers:
    """Wait until all processes have come, then watch them.

    Lines of `say` (by default on standard error) name those who are missing.

    Raises UserError if some have not come in `patience.meeting` seconds, a process of another run
    or with another number of processes has, or process 0 cannot listen at the address.
    """
    say = _print if say is None else say
    meeting = _gather if place.process == 0 else _come
    return Peers(place, meeting(place, patience, say), patience, say, end)


class _Line:
    """A connection that carries a JSON object in each line."""

    def __init__(self, connection: socket.socket, name: str):
        self.socket, self.name, self._rest = connection, name, b""
        connection.settimeout(_HEARING)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, message: dict[str, Any]) -> None:
        # A connection that is broken shows in `read`.
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[dict[str, Any]] | None:
        """The objects that have come, None at the end. Call it when there is something to read."""
        try:
            received = self.socket.recv(_LONGEST)
        except OSError:
            return None
        *lines, self._rest = (self._rest + received).split(b"\n")
        if not received or len(self._rest) > _LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.socket.close()


def _gather(place: Place, patience: Patience, say: Callable[[str], None]) -> dict[int, _Line]:
    """Process 0's connections to all others."""
    lines: dict[int, _Line] = {}
    clock = _Reminders(patience)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listening(place))
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        while len(lines) < place.processes - 1:
            for key, _ in selector.select(0.2):
                if key.fileobj is not server:  # one that waits here has ended, or talks too early
                    selector.unregister(key.fileobj)
                    lines.pop(key.data).close()
                    continue
                connection, _ = server.accept()
                number, line = _introduced(connection, place, lines, say)
                if line is not None:
                    lines[number] = line
                    selector.register(connection, selectors.EVENT_READ, number)
            missing = [n for n in range(1, place.processes) if n not in lines]
            if missing and clock.due():
                text = f"waiting for {_numbers(missing)} of {place.processes} at {place.address}"
                _tell(lines, {"waiting": f"{text} ({clock.text})"})
                say(f"{text} ({clock.text})")
            if missing and clock.over():
                text = (
                    f"{_numbers(missing)} of {place.processes} did not come to {place.address} in "
                    f"{patience.meeting:g} s; start all of them, or wait longer with "
                    "--coordinator-timeout"
                )
                _tell(lines, {"refused": text})
                raise UserError(text)
    _tell(lines, {"go": True})
    return lines


def _introduced(
    connection: socket.socket, place: Place, known: dict[int, _Line], say: Callable[[str], None]
) -> tuple[int, _Line | None]:
    """The number of a process that connects, and its line; None in its place if it is refused."""
    line = _Line(connection, "")
    (hello, *_) = line.read() or [{}]
    number, processes = hello.get("process"), hello.get("processes")
    if hello.get("greeting") != _GREETING or not isinstance(number, int):
        line.close()  # a stranger: a port scan, or jax.distributed without this
        return -1, None
    line.name = f"process {number} on {printable(str(hello.get('host')))}"
    if processes != place.processes:
        why = f"{line.name} expects {processes} processes, process 0 expects {place.processes}"
    elif not 0 < number < place.processes:
        why = f"{line.name}: expected a number from 1 to {place.processes - 1}"
    elif number in known:
        why = f"{line.name}: there is a {known[number].name} already; number each one differently"
    else:
        return number, line
    say(f"refused {why}")
    line.send({"refused": why})
    line.close()
    return -1, None


def _come(place: Place, patience: Patience, say: Callable[[str], None]) -> dict[int, _Line]:
    """The connection of a process other than 0."""
    host, port = place.host_and_port
    clock = _Reminders(patience)
    why = "nobody listens there yet"
    while not clock.over():
        try:
            line = _Line(socket.create_connection((host, port), _HEARING), "process 0")
        except OSError as error:
            why = str(error.strerror or error)
            time.sleep(min(0.3, patience.reminder))
        else:
            line.send(
                {
                    "greeting": _GREETING,
                    "process": place.process,
                    "processes": place.processes,
                    "host": socket.gethostname(),
                }
            )
            if _admitted(line, clock, say):
                return {0: line}
            line.close()
            why = "the process there ended"
            time.sleep(min(0.3, patience.reminder))
        if clock.due():
            say(f"waiting for process 0 at {place.address} ({clock.text}): {why}")
    raise UserError(
        f"process 0 did not answer at {place.address} in {patience.meeting:g} s ({why}); start it, "
        "check --coordinator, or wait longer with --coordinator-timeout"
    )


def _admitted(line: _Line, clock: "_Reminders", say: Callable[[str], None]) -> bool:
    """Whether process 0 says that all have come; False if the connection ends before."""
    line.socket.settimeout(clock.left() + 2 * _HEARING)  # process 0 says so if some never come
    while messages := line.read():
        for message in messages:
            if "refused" in message:
                line.close()
                raise UserError(str(message["refused"]))
            if "waiting" in message:
                say(str(message["waiting"]))
            if "go" in message:
                line.socket.settimeout(_HEARING)
                return True
    return False


class _Reminders:
    """The time of a meeting."""

    def __init__(self, patience: Patience):
        self._patience, self._start = patience, time.monotonic()
        self._next = patience.reminder

    @property
    def text(self) -> str:
        return f"{self._spent():.0f} of {self._patience.meeting:g} s"

    def due(self) -> bool:
        """Whether it is time for a line, once each."""
        if self._spent() < self._next:
            return False
        self._next += self._patience.reminder
        return True

    def over(self) -> bool:
        return self.left() <= 0

    def left(self) -> float:
        return self._patience.meeting - self._spent()

    def _spent(self) -> float:
        return time.monotonic() - self._start


@contextlib.contextmanager
def _listening(place: Place) -> Iterator[socket.socket]:
    """A socket at the coordinator's port, on all of this machine's addresses."""
    _, port = place.host_and_port
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(
            ("", port), family=family, dualstack_ipv6=both, backlog=max(128, place.processes)
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {port} of --coordinator {place.address}: "
            f"{error.strerror}; choose another port, the same for all processes"
        ) from None
    with server:
        yield server


def _tell(lines: dict[int, _Line], message: dict[str, Any]) -> None:
    for line in lines.values():
        line.send(message)


def _numbers(missing: list[int]) -> str:
    """Processes in words: "process 3", "processes 1, 2 and 5 more"."""
    shown, more = missing[:8], len(missing) - 8
    text = ", ".join(map(str, shown)) + (f" and {more} more" if more > 0 else "")
    return f"process{'es' if len(missing) > 1 else ''} {text}"


def _print(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _exit(why: str) -> None:
    """End this process, whose main thread may wait for the lost one for ever."""
    _print(f"error: {why}; this process ends too, and --resume goes on from the last checkpoint")
    os._exit(1)
