# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a place of an object store, which has no locks.

The first process of a run keeps an object there, owner.json, that says who it is, and writes it
anew every quarter of a minute. Another run waits for a minute: where the object has changed it is
refused, else its owner is dead, and it takes the place. A run whose place was taken, since its
machine stood still for longer, copies nothing more and ends.
"""

import contextlib
import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vivit_jax.errors import StorageError, UserError
from vivit_jax.files import storage
from vivit_jax.files.addresses import Address
from vivit_jax.files.json_files import parse_json

logger = logging.getLogger(__name__)

OWNER = "owner.json"
_EVERY, _FOR = 15.0, 60.0  # seconds: between two signs of life; without one until another may come
_SETTLED = 1.0  # seconds in which two that begin at once have both written


class Lease:
    """The right to write a run to a place, from `leased`."""

    def __init__(self, where: Address):
        self._where, self._address = where, str(where / OWNER)
        self._own = {"id": uuid.uuid4().hex, **_this_process(), "renewed": 0}
        self._await_former()
        self._renew()
        time.sleep(_SETTLED)
        self.check()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """UserError if another run has taken the place."""
        now = _parsed(self._read())
        if now.get("id") != self._own["id"]:
            raise UserError(
                f"--out {self._where}: {_name(now)} has begun to train into it; this run copies "
                "nothing more there: let one of them go on with --resume"
            )

    def close(self, *, remove: bool) -> None:
        """Give no more signs of life, and `remove` the object.

        Without `remove` nothing is waited for: a sign may be on its way to a store that is gone.
        """
        self._ended.set()
        if remove:
            self._thread.join()
            if _parsed(self._read()).get("id") == self._own["id"]:
                storage.remove(self._address)

    def _await_former(self) -> None:
        """Return once it is known that no other process is training there."""
        former = self._read()
        if former is None or _is_dead(_parsed(former)):
            return
        logger.warning(
            "%s: %s was training into it; waiting up to %g s for a sign of life from it",
            self._where,
            _name(_parsed(former)),
            _FOR,
        )
        until = time.monotonic() + _FOR
        while time.monotonic() < until:
            time.sleep(min(1.0, _EVERY))
            now = self._read()
            if now is None:
                return
            if now != former:
                raise UserError(
                    f"--out {self._where}: {_name(_parsed(now))} is training into it; wait for "
                    "its end, or choose another place"
                )

    def _keep(self) -> None:
        while not self._ended.wait(_EVERY):
            try:
                self.check()
                self._renew()
            except StorageError as error:
                logger.warning("%s", error)
            except UserError as error:  # the next checkpoint raises it
                logger.warning("%s", error)
                return

    def _renew(self) -> None:
        self._own["renewed"] += 1
        storage.write((json.dumps(self._own) + "\n").encode(), self._address)

    def _read(self) -> bytes | None:
        try:
            return storage.read(self._address)
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def leased(where: Address) -> Iterator[Lease]:
    """The lease of a place while the block runs. UserError if another run has it.

    After an error of the store the object stays, and ends by itself.
    """
    lease, reachable = Lease(where), True
    try:
        yield lease
    except StorageError:
        reachable = False
        raise
    finally:
        lease.close(remove=reachable)


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "machine": _machine(), "process": os.getpid()}


def _machine() -> str:
    """What processes have in common that know each other's numbers; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether an owner was a process of this machine that has ended; False if not known."""
    number = owner.get("process")
    if not isinstance(number, int) or not owner.get("machine") == _machine() != "":
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _parsed(data: bytes | None) -> dict[str, Any]:
    """What an owner wrote; {} for anything else."""
    try:
        found = parse_json(data or b"", OWNER)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    if not owner:
        return "another run"
    return f"process {owner.get('process')} on {owner.get('host')}"
