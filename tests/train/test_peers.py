# SPDX-License-Identifier: Apache-2.0
"""Processes of one run, as threads here: how they meet, and what they learn of each other."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from vivit_jax.errors import UserError
from vivit_jax.train.processes.peers import Patience, Place, meet

QUICK = Patience(meeting=10, reminder=0.1, beat=0.05, silence=5, hang=5, ending=0.1)


def free_address():
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def until(condition):
    """Wait for what another thread does."""
    last = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < last, "it did not happen"
        time.sleep(0.01)


class Ends:
    """What would end a process, recorded."""

    def __init__(self):
        self.why, self._event = None, threading.Event()

    def __call__(self, why):
        self.why = why
        self._event.set()

    def wait(self):
        assert self._event.wait(10), "nothing ended the process"
        return self.why


@contextlib.contextmanager
def together(processes, patience=QUICK, others=None):
    """The peers of all processes, and what ends each."""
    address, ends = free_address(), [Ends() for _ in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        found = pool.map(
            lambda k: meet(
                Place(address, k, processes),
                patience if k == 0 or others is None else others,
                say=print,
                end=ends[k],
            ),
            range(processes),
        )
        peers = list(found)
    try:
        yield peers, ends
    finally:
        for each in peers:
            each.close()


def test_those_who_are_done_leave_in_peace():
    with together(3) as (peers, ends):
        peers[1].close()
        peers[0].close()
        time.sleep(0.2)  # some beats
        assert [each.lost for each in peers] == [None] * 3
    assert [end.why for end in ends] == [None] * 3


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_process_that_dies_is_named_by_all_others(gone):
    with together(3) as (peers, ends):
        for line in peers[gone]._lines.values():
            line.send = lambda message: None  # the dead do not talk
        for line in peers[gone]._lines.values():  # what the system does when a process dies
            line.socket.shutdown(socket.SHUT_RDWR)
        others = [k for k in range(3) if k != gone]
        for k in others:
            assert ends[k].wait().startswith(f"process {gone}")
            assert "ended without a word" in peers[k].wait_for_news()


def test_a_failure_comes_with_its_message():
    with together(3) as (peers, ends):
        peers[2].close("no space left on /data")
        for k in (0, 1):
            assert "process 2 on " in ends[k].wait()
            assert ends[k].why.endswith("failed: no space left on /data")


def test_process_0_leaves_last_so_that_others_can_say_why():
    patient = Patience(10, 9, 0.2, 5, 5, ending=0.4)
    with together(2, patient) as (peers, ends):
        start = time.monotonic()
        peers[0].close("no space left on /data")
        assert ends[1].why.endswith("failed: no space left on /data")  # said before that returns
        assert time.monotonic() - start > 0.3


def test_one_that_ends_by_itself_is_not_ended():
    patient = Patience(10, 0.2, 0.05, 5, 5, ending=10)
    with together(2, patient) as (peers, ends):
        peers[1].close("bad data")
        assert "bad data" in peers[0].wait_for_news()
    assert ends[0].why is None


def test_a_frozen_process_is_silent():
    mute = Patience(meeting=10, reminder=9, beat=30, silence=60, hang=60, ending=0.1)
    listening = Patience(10, 9, 0.05, silence=0.2, hang=60, ending=0.1)
    with together(2, listening, others=mute) as (_, ends):
        assert ends[0].wait().endswith("has sent no sign of life for 0.2 s")
        assert "process 1 on " in ends[0].why
        assert "no sign of life" in ends[1].wait()  # if it wakes up it learns so


def test_a_process_that_does_not_move_on_is_named_and_slow_ones_are_not():
    watched = Patience(10, 9, 0.05, 5, hang=0.6, ending=0.1)
    with together(3, watched) as (peers, ends):
        for step in range(1, 9):  # 0.8 s, in which nobody is level with the others
            for k, each in enumerate(peers):
                each.reach(3 * step - k)
            time.sleep(0.1)
        assert [each.lost for each in peers] == [None] * 3
        for k in (0, 2):
            peers[k].reach(30)
        for k in range(3):
            assert ends[k].wait().startswith("process 1 on ")
            assert ends[k].why.endswith("hangs: others have waited at step 30 for 0.6 s")


def test_who_is_waited_for_is_said_until_all_have_come():
    address, said = free_address(), {0: [], 1: []}
    with ThreadPoolExecutor(3) as pool:
        first = [
            pool.submit(meet, Place(address, k, 3), QUICK, say=said[k].append, end=print)
            for k in (0, 1)
        ]
        until(lambda: any("waiting for process 2 of 3" in text for text in said[1]))
        last = pool.submit(meet, Place(address, 2, 3), QUICK, say=print, end=print)
        for each in [*first, last]:
            each.result().close()
    # On a busy machine process 1 may come late, wait for process 0 first and miss a line.
    heard = [text for text in said[1] if not text.startswith("waiting for process 0 at")]
    assert heard and heard == said[0][-len(heard) :]
    late = [text for text in said[0] if "waiting for processes 1, 2 of 3" not in text]
    assert late and all(f"waiting for process 2 of 3 at {address}" in text for text in late)


def test_nobody_comes():
    address, said = free_address(), []
    short = Patience(meeting=0.3, reminder=0.1)
    with pytest.raises(UserError, match="processes 1, 2, 3 of 4 did not come to .* in 0.3 s"):
        meet(Place(address, 0, 4), short, say=said.append)
    assert len(said) >= 2
    with pytest.raises(UserError, match="process 0 did not answer at .* in 0.3 s .Connection ref"):
        meet(Place(address, 1, 4), short, say=said.append)
    assert "waiting for process 0" in said[-1]


def test_one_that_waits_and_dies_is_waited_for_again():
    address = free_address()
    hello = {"greeting": "vivit_jax processes, 1", "process": 1, "processes": 3, "host": "gone"}
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(meet, Place(address, 0, 3), QUICK, say=print, end=print)
        assert b"waiting for process 2 of 3" in connect(address, hello)
        # Without the end of the dead one this would be a second process 1, and refused.
        others = [
            pool.submit(meet, Place(address, k, 3), QUICK, say=print, end=print) for k in (1, 2)
        ]
        for each in (first, *others):
            each.result().close()


def test_a_stranger_is_left_out_and_one_of_another_size_is_named():
    address, said = free_address(), []
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, Place(address, 0, 2), QUICK, say=said.append, end=print)
        connect(address, {"greeting": "vivit_jax processes, 1", "process": 1, "processes": 3})
        connect(address, {"GET": "/"})
        second = pool.submit(meet, Place(address, 1, 2), QUICK, say=said.append, end=print)
        for each in (first, second):
            each.result().close()
    assert any("expects 3 processes, process 0 expects 2" in text for text in said)


def connect(address, message):
    """What process 0 first answers to a message, once it listens."""
    host, port = address.split(":")
    found = []

    def reach():
        with contextlib.suppress(ConnectionRefusedError):
            found.append(socket.create_connection((host, int(port)), 5))
        return found

    until(reach)
    with found[0] as connection:
        connection.sendall(json.dumps(message).encode() + b"\n")
        return connection.recv(1000)


@pytest.mark.parametrize(
    "process, processes, message",
    [
        (1, 4, "expects 4 processes, process 0 expects 3"),
        (3, 3, "a number from 1 to 2"),
        (1, 3, "already"),
    ],
)
def test_one_of_another_run_is_refused(process, processes, message):
    address, said = free_address(), []
    with ThreadPoolExecutor(3) as pool:
        first = [
            pool.submit(meet, Place(address, k, 3), QUICK, say=said.append, end=print)
            for k in (0, 1)
        ]
        until(lambda: any("waiting for process 2 of 3" in text for text in said))
        with pytest.raises(UserError, match=message):
            meet(Place(address, process, processes), QUICK, say=print, end=print)
        last = pool.submit(meet, Place(address, 2, 3), QUICK, say=print, end=print)
        for each in [*first, last]:
            each.result().close()


def test_a_port_that_is_taken():
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot listen at port .*; choose another port"):
            meet(Place(address, 0, 2), QUICK)


@pytest.mark.parametrize("address", ["host", "host:", ":12", "host:x", "host:70000"])
def test_addresses(address):
    with pytest.raises(UserError, match="expected host:port"):
        meet(Place(address, 1, 2), QUICK)
