# SPDX-License-Identifier: Apache-2.0
"""Object stores on this machine, each a server in a thread: S3 by moto, GCS by an emulator."""

import collections
import contextlib
import http.client
import http.server
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
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
ADDRESSES = {
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
        for name in ADDRESSES[protocol]:
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


class Proxy:
    """A server before another one, which answers as `fault(number, method)` says.

    That is of the requests from 0 on: "500" or "503" instead of an answer, "short" for half of one,
    "slow" for one of a megabyte a second, "gone" for a closed connection, None for the answer.
    """

    def __init__(self, address: str):
        self.fault: Callable[[int, str], str | None] = lambda number, method: None
        self.counts: collections.Counter[str] = collections.Counter()  # by fault
        self._target, self._numbers = address.removeprefix("http://"), itertools.count()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                proxy.answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

            def log_message(self, format, *args):
                """Nothing is printed."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        fault = self.fault(next(self._numbers), request.command)
        length = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(length)
        if fault == "gone":
            self.counts[fault] += 1
            request.close_connection = True
            return
        if fault in ("500", "503"):
            self.counts[fault] += 1
            request.send_response(int(fault))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        with contextlib.closing(http.client.HTTPConnection(self._target)) as behind:
            passed = {k: v for k, v in request.headers.items() if k.lower() != "expect"}
            behind.request(request.command, request.path, body, passed)
            answer = behind.getresponse()
            data = answer.read()
        request.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                request.send_header(name, value)
        size = answer.getheader("Content-Length") if request.command == "HEAD" else len(data)
        request.send_header("Content-Length", str(size or 0))
        request.end_headers()
        if fault == "slow":
            self.counts[fault] += 1
            time.sleep((len(data) + len(body)) / 1e6)
        if fault == "short" and len(data) > 1:
            self.counts[fault] += 1
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return
        request.wfile.write(data)


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
