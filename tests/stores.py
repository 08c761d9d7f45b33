# SPDX-License-Identifier: Apache-2.0
"""Object stores on this machine, each a server in a thread: S3 by moto, GCS by an emulator."""

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vivit_jax.files import ranges, storage

_VARIABLES = {
    "s3": {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    },
    # Its extended file system asks services that the emulator does not have.
    "gs": {"GOOGLE_CLOUD_PROJECT": "project", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
}
# What tells the libraries where the server is: botocore, gcsfs, and TensorStore.
_ADDRESSES = {
    "s3": ("AWS_ENDPOINT_URL",),
    "gs": ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"),
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def store(protocol: str, port: int | None = None) -> Iterator[str]:
    """A server of `gs` or `s3` with a bucket; its address, and the environment that leads to it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    port = free_port() if port is None else port
    with pytest.MonkeyPatch.context() as patch, _running(protocol, port):
        for name, value in _VARIABLES[protocol].items():
            patch.setenv(name, value)
        for name in _ADDRESSES[protocol]:
            patch.setenv(name, f"http://127.0.0.1:{port}")
        forget()
        if not storage.exists(f"{protocol}://bucket"):
            storage._file_system(protocol).mkdir("bucket")
        storage.remove(f"{protocol}://bucket/*")  # moto keeps its objects in this process
        try:
            yield f"{protocol}://bucket"
        finally:
            forget()


def forget() -> None:
    """Forget what was read and which servers there were."""
    import fsspec

    ranges.forget()
    storage._file_system.cache_clear()
    storage._reached.clear()
    for protocol in ("gs", "s3"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


_servers: dict[int, Any] = {}  # by port


@contextlib.contextmanager
def gone(port: int, seconds: float) -> Iterator[None]:
    """The server of a port is stopped, and comes back after a while, in the block or at its end.

    That of S3, whose objects stay in this process.
    """
    _servers.pop(port).stop()
    timer = threading.Timer(seconds, _start, ("s3", port))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def _start(protocol: str, port: int) -> None:
    if protocol == "s3":
        from moto.server import ThreadedMotoServer

        server: Any = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    else:
        from gcp_storage_emulator.server import create_server

        server = create_server("127.0.0.1", port, in_memory=True)
    server.start()
    _servers[port] = server


@contextlib.contextmanager
def _running(protocol: str, port: int) -> Iterator[None]:
    _start(protocol, port)
    try:
        yield
    finally:
        _servers.pop(port).stop()
