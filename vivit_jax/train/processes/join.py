# SPDX-License-Identifier: Apache-2.0
"""Connects a process with the others of its run, by its flags or by the cluster it runs in."""

import atexit
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator

import jax

# Public `jax.distributed.initialize` finds the same, but connects at once: without a word on who is
# missing, and it aborts with a stack trace if one does not come.
from jax._src.clusters import ClusterEnv

from vivit_jax.errors import UserError
from vivit_jax.train.processes.peers import Patience, Peers, Place, meet

_CLUSTERS = "a TPU pod, SLURM, Open MPI or Kubernetes (the latter with the package kubernetes)"
_peers: Peers | None = None


@dataclasses.dataclass(frozen=True)
class Membership:
    """A place among other processes, and the devices it may use.

    Attributes:
        place: where this process stands.
        devices: numbers of its local devices; None: all.
    """

    place: Place
    devices: tuple[int, ...] | None = None


def chosen(coordinator: str | None, processes: int, process: int) -> Membership | None:
    """The membership that flags give, None for a process alone. Raises UserError."""
    if coordinator is None:
        if processes != 1 or process != 0:
            raise UserError(
                f"--processes {processes} --process {process} need --coordinator host:port, the "
                "address of process 0; --processes auto asks the cluster"
            )
        return None
    if not 0 <= process < processes:
        raise UserError(f"--process {process} must be from 0 to {processes - 1} (--processes)")
    place = Place(coordinator, process, processes)
    _ = place.host_and_port  # checked now
    return Membership(place)


def detected(timeout: float) -> Membership | None:
    """The membership by the cluster's environment, None for a job of one process.

    Raises UserError if there is no cluster, or it does not answer.
    """
    try:
        address, processes, process, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except Exception as error:  # whatever the cluster's own package raises
        raise UserError(
            f"--processes auto: the cluster does not say which process this is: "
            f"{type(error).__name__}: {error}; give --coordinator, --processes and --process"
        ) from error
    if address is None or processes is None or process is None:
        raise UserError(
            f"--processes auto finds no cluster here, that is {_CLUSTERS}; give --coordinator, "
            "--processes and --process"
        )
    if processes == 1:
        return None
    own = None if devices is None else tuple(devices)
    return Membership(Place(address, process, processes), own)


@contextlib.contextmanager
def connected(member: Membership | None, patience: Patience) -> Iterator[None]:
    """Work together with the other processes in the block; alone if `member` is None.

    An error in the block ends the other processes too, with its message, and an error that follows
    from the loss of another process is reported as that.

    Raises UserError if not all processes come, and in place of an error after a loss.
    """
    global _peers
    if member is None:
        yield
        return
    place = member.place
    peers = _peers = meet(place, patience)
    failure = None
    try:
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            local_device_ids=member.devices,
            cluster_detection_method="deactivate",
        )
        yield
        # Now: at exit, a process that dies of a signal would not.
        jax.distributed.shutdown()
    except UserError as error:
        failure = str(error)
        _leave_at_exit(2)
        raise
    except Exception as error:
        # A broken connection is an error of its own here, of whatever was under way.
        lost = peers.wait_for_news()
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        _leave_at_exit(1 if lost is None else 2)
        if lost is None:
            raise
        raise UserError(f"{lost}; --resume goes on from the last checkpoint") from error
    except BaseException as error:
        failure = f"ended by {type(error).__name__}"
        raise
    finally:
        _peers = None
        peers.close(failure)


def _leave_at_exit(status: int) -> None:
    """End without JAX's own farewell, which waits for lost processes and then aborts."""

    def leave():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # runs before those that were registered earlier


def reached(step: int) -> None:
    """Note that this process waits for the others at a step, if there are others."""
    if _peers is not None:
        _peers.reach(step)
