# SPDX-License-Identifier: Apache-2.0
"""Which process of how many this is, by flags and by the environments of clusters."""

import pytest

from vivit_jax.cli.options import ProcessOptions
from vivit_jax.errors import UserError
from vivit_jax.train.processes.join import chosen, connected, detected
from vivit_jax.train.processes.peers import Patience, Place

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_NODELIST": "node[007-009],other",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """The environment of no cluster."""
    for name in (*SLURM, *OPEN_MPI, "KUBERNETES_SERVICE_HOST", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")


def set_all(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_slurm(monkeypatch):
    set_all(monkeypatch, SLURM)
    found = detected(300)
    assert found.place == Place("node007:61444", 3, 4) and found.devices == (1,)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert detected(300).place.address == "node007:1234"
    set_all(monkeypatch, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert detected(300) is None


def test_open_mpi(monkeypatch):
    set_all(monkeypatch, OPEN_MPI)
    found = detected(300)
    assert found.place.process == 5 and found.place.processes == 8 and found.devices == (1,)
    assert found.place.address.startswith("10.96.0.1:")


def test_no_cluster(monkeypatch):
    with pytest.raises(
        UserError, match="finds no cluster here, that is a TPU pod, SLURM, Open MPI"
    ):
        detected(300)
    set_all(monkeypatch, SLURM | {"SLURM_NTASKS": "several"})
    with pytest.raises(UserError, match="the cluster does not say which process .* 'several'"):
        detected(300)


def test_flags():
    assert chosen(None, 1, 0) is None
    assert chosen("h:1", 2, 1).place == Place("h:1", 1, 2)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(processes=2), "need --coordinator host:port"),
        (dict(coordinator="h:1", processes=2, process=2), "must be from 0 to 1"),
        (dict(coordinator="h", processes=2), "expected host:port"),
        (dict(coordinator="h:1", processes="auto"), "leave out --coordinator and --process"),
        (dict(processes="auto", process=1), "leave out --coordinator and --process"),
        (dict(coordinator_timeout=0.0), "--coordinator-timeout is 0; expected seconds"),
        (dict(hang_timeout=float("nan")), "--hang-timeout is nan; expected seconds"),
    ],
)
def test_wrong_flags(given, message):
    with pytest.raises(UserError, match=message):
        ProcessOptions(**given).connected()


def test_alone_nothing_is_connected():
    with connected(None, Patience()):
        pass
