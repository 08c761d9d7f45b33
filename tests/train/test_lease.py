# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a place of a store without locks."""

import contextlib
import json
import subprocess
import sys
import threading
import time

import pytest

from vivit_jax.errors import StorageError, UserError
from vivit_jax.files import storage
from vivit_jax.files.addresses import Address
from vivit_jax.train.storage import lease
from vivit_jax.train.storage.run_store import run_store

PLACE = "memory://bucket/run"
OWNER = f"{PLACE}/owner.json"


@pytest.fixture(autouse=True)
def quick(fresh_stores, monkeypatch):
    """Parts of a second instead of a minute."""
    for name, seconds in (("_EVERY", 0.05), ("_FOR", 0.5), ("_SETTLED", 0.2)):
        monkeypatch.setattr(lease, name, seconds)


def elsewhere(monkeypatch, host: str) -> None:
    """From now on this is another machine."""
    monkeypatch.setattr(lease, "_machine", lambda: host)
    monkeypatch.setattr(lease.platform, "node", lambda: host)


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def write_owner(**changes) -> None:
    owner = {"id": "1", "host": "node7", "machine": "node7", "process": 12, "renewed": 1}
    storage.write(json.dumps(owner | changes).encode(), OWNER)


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_run_elsewhere_that_gives_signs_of_life_keeps_its_place(monkeypatch):
    monkeypatch.setattr(lease, "_FOR", 60)  # it does not take them
    with run_store(PLACE, resume=False) as store:
        (store.path / "recipe.json").write_text("{}")
        store.finish()
        before = json.loads(storage.read(OWNER))
        elsewhere(monkeypatch, "node2")
        with (
            pytest.raises(UserError, match=f"^--out {PLACE}: process {before['process']} on .* is"),
            lease.leased(Address(PLACE)),
        ):
            pass
        after = json.loads(storage.read(OWNER))
        assert after["id"] == before["id"] and after["renewed"] > before["renewed"]
        assert not [path for path in store.path.rglob("*") if path.name == "owner.json"]
    assert sorted(storage.sizes_below(PLACE)) == ["recipe.json"]


def test_the_place_of_a_dead_run_is_taken_after_a_while(caplog):
    write_owner()
    begun = time.monotonic()
    with run_store(PLACE, resume=False) as store:  # a place that holds nothing else is new
        waited = time.monotonic() - begun
        assert waited >= 0.5 and "process 12 on node7 was training into it; waiting" in caplog.text
        (store.path / "recipe.json").write_text("{}")
        store.finish()
        assert json.loads(storage.read(OWNER))["host"] != "node7"
    write_owner()
    with run_store(PLACE, resume=True) as store:
        assert [path.name for path in store.path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("owner", [b"", b"[1]", b"\xff{", b'{"process": "x", "machine": 3}'])
def test_an_object_that_no_run_wrote_is_waited_for_too(caplog, owner):
    storage.write(owner, OWNER)
    with run_store(PLACE, resume=False):
        assert "waiting up to 0.5 s" in caplog.text


def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(caplog):
    write_owner(machine=lease._machine(), process=ended_process())
    with run_store(PLACE, resume=False):
        pass
    assert "waiting" not in caplog.text
    write_owner(machine="another", process=ended_process())
    with run_store(PLACE, resume=False):
        assert "waiting" in caplog.text


def test_of_two_that_begin_at_once_one_goes_on():
    begun, kept = [], []
    ready = threading.Barrier(2)

    def run(name):
        ready.wait()
        try:
            with lease.leased(Address(PLACE)) as held:
                begun.append(name)
                until(lambda: len(begun) == 2)
                held.check()
                kept.append(name)
                until(lambda: ended.is_set())
        except UserError:
            begun.append(name)

    ended = threading.Event()
    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    until(lambda: len(begun) == 2 and kept)
    ended.set()
    for thread in threads:
        thread.join()
    assert len(kept) == 1
    assert not storage.exists(OWNER)


def test_a_run_whose_place_was_taken_copies_nothing_more(caplog):
    with pytest.raises(UserError) as error, run_store(PLACE, resume=False) as store:
        (store.path / "recipe.json").write_text("first")
        store.publish()
        store.settle()
        while "node9 has begun" not in caplog.text:  # said before the next checkpoint
            write_owner(host="node9", process=4)
            time.sleep(0.01)
        (store.path / "recipe.json").write_text("second")
        store.publish()
        store.settle()
    assert str(error.value).startswith(f"--out {PLACE}: process 4 on node9 has begun to train")
    assert storage.read(f"{PLACE}/recipe.json") == b"first"
    assert json.loads(storage.read(OWNER))["host"] == "node9"  # it is not ours to remove


def test_a_new_run_does_not_begin_in_a_place_whose_dead_owner_left_a_run(caplog):
    write_owner()
    written = threading.Thread(
        target=lambda: (
            until(lambda: "waiting" in caplog.text),
            storage.write(b"{}", f"{PLACE}/recipe.json"),
        )
    )
    written.start()
    with (
        pytest.raises(UserError, match=f"^--out {PLACE} holds a run; continue it with --resume"),
        run_store(PLACE, resume=False),
    ):
        pass
    written.join()


def test_after_an_error_of_the_store_nothing_is_asked_of_it(monkeypatch):
    asked, gone = threading.Event(), threading.Event()

    def hang(address):  # as a request that is tried again and again
        asked.set()
        gone.wait(60)
        return b"{}"

    with contextlib.suppress(StorageError), lease.leased(Address(PLACE)) as held:
        monkeypatch.setattr(lease.storage, "remove", lambda address: pytest.fail("asked"))
        monkeypatch.setattr(lease.storage, "read", hang)
        assert asked.wait(60)
        raise StorageError("it is gone")
    assert held._thread.is_alive() and storage.exists(OWNER)
    gone.set()
    held._thread.join()
