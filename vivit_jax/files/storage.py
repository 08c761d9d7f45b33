# SPDX-License-Identifier: Apache-2.0
"""What object stores and web servers do for this package: state, list, read, write and remove.

Every function takes an address as a text: gs://, s3://, hf:// and any other protocol of fsspec, by
fsspec; http:// and https://, which are only read, by Python itself. What may pass (no connection,
an answer of 500, fewer bytes than asked) is tried again for `patience()` seconds, and said in the
log; then, and for what does not pass, StorageError is raised, or FileNotFoundError where there is
no such object. All bytes are counted in `TRAFFIC`.
"""

import dataclasses
import errno
import functools
import http.client
import inspect
import io
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from vivit_jax.errors import MissingExtra, StorageError, UserError, counted, first_line
from vivit_jax.files.limits import VARIABLE
from vivit_jax.version import __version__

logger = logging.getLogger(__name__)

PATIENCE = "VIVIT_JAX_STORAGE_TIMEOUT"
_PATIENCE = 120  # seconds
_FIRST = 10  # seconds, where no request to the same bucket or server has been answered yet
_SILENCE = 60  # seconds without a byte from a web server
_PIECE, _PART = 2**20, 2**24  # bytes of an answer in memory, and of a request of a large file
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between trials; the last again and again
_EXTRAS = {"gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
_EXTRAS |= {"s3a": ("s3fs", "s3"), "hf": ("huggingface_hub", "hub")}
# Others may write at the same time, so that no listing is kept; and failures are said from the
# first on, so that the libraries themselves try once.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "s3": {
        "use_listings_cache": False,
        "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10},
    },
    "gs": {"use_listings_cache": False},
}
_PROTOCOLS = {"gcs": "gs", "s3a": "s3"}
# By the texts of errors, for which each library has classes of its own.
_NOT_PERMITTED = re.compile(
    r"(?i)credential|forbidden|unauthori[sz]ed|access ?denied|not authorized|anonymous caller|"
    r"invalid_?access_?key|signature ?does ?not ?match|permission|\b40[13]\b"
)
_NO_BUCKET = re.compile(r"(?i)bucket does not exist|no ?such ?bucket")
_LIBRARIES = (
    "aiohttp", "aiobotocore", "botocore", "gcsfs", "requests", "urllib3", "httpx", "httpcore",
)  # fmt: skip
_TAGS = ("ETag", "etag", "generation", "blob_id", "LastModified", "mtime", "created")
_WEB = ("http", "https")
T = TypeVar("T")


_reached: set[str] = set()


class NoRanges(Exception):
    """A web server that gives whole files only."""


class _NoSuchRange(Exception):
    """Bytes past the end of a file on the web, such as the first of an empty one."""


@dataclasses.dataclass
class Traffic:
    """What went to and from storage in this process."""

    bytes_read: int = 0
    requests: int = 0  # that read
    bytes_written: int = 0
    bytes_cached: int = 0  # that were read from the cache on this machine instead
    retries: int = 0

    def __post_init__(self):
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def __str__(self) -> str:
        parts = [f"read {self.bytes_read / 1e6:.1f} MB in {counted(self.requests, 'request')}"]
        parts += [f"{self.bytes_cached / 1e6:.1f} MB from the cache"] if self.bytes_cached else []
        parts += [f"wrote {self.bytes_written / 1e6:.1f} MB"] if self.bytes_written else []
        parts += [f"{self.retries} retries"] if self.retries else []
        return ", ".join(parts)


TRAFFIC = Traffic()


class State(NamedTuple):
    """An object's size in bytes, and a text that changes when its content does."""

    size: int
    tag: str


class Entry(NamedTuple):
    """A name in a directory."""

    name: str
    is_directory: bool


def protocol_of(address: str) -> str:
    """The protocol of an address. UserError for a chain of protocols, and for an unknown one."""
    if "::" in address:
        raise UserError(f"{shown(address)}: a chain of protocols; expected one address")
    name = address.partition("://")[0].lower()
    return _PROTOCOLS.get(name, name)


def shown(address: str) -> str:
    """An address as messages have it: without its password and query, which may be secret."""
    if protocol_of_web(address) is None:
        return address
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:
        return "a malformed link"
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def protocol_of_web(address: str) -> str | None:
    """http or https; None for another protocol."""
    name = address.partition("://")[0].lower()
    return name if name in _WEB else None


def patience() -> float:
    """Seconds for which a failing request is tried again."""
    text = os.environ.get(PATIENCE)
    if text is None:
        return _PATIENCE
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UserError(f"{PATIENCE} is {text!r}, expected a number of seconds")
    return seconds


def state(address: str) -> State:
    """The size and tag of an object.

    FileNotFoundError if there is none; NoRanges if a web server gives whole files only.
    """
    if protocol_of_web(address):
        return _tried(address, "asking for it", lambda: _web_state(address))
    info = _tried(address, "asking for it", lambda: _files(address).info(address))
    if info["type"] != "file":
        raise IsADirectoryError(errno.EISDIR, "a directory", address)
    return State(int(info["size"]), str(next((info[k] for k in _TAGS if info.get(k)), "")))


def is_file(address: str) -> bool:
    """Whether there is an object of this name."""
    try:
        state(address)
    except NoRanges:
        return True
    except (FileNotFoundError, IsADirectoryError):
        return False
    return True


def is_directory(address: str) -> bool:
    """Whether objects lie below this name."""
    if protocol_of_web(address):
        return False
    return _tried(address, "asking for it", lambda: _files(address).isdir(address))


def exists(address: str) -> bool:
    """Whether there is an object of this name, or objects below it."""
    if protocol_of_web(address):
        return is_file(address)

    def found() -> bool:
        files = _files(address)
        # s3fs takes any error of a bucket, such as missing credentials, for a bucket that is not
        # there; `isdir` raises it.
        return files.exists(address) or files.isdir(address)

    return _tried(address, "asking for it", found)


def entries(address: str) -> list[Entry]:
    """The names in a directory, sorted. FileNotFoundError if there is none."""
    _not_web(address, "listed", "write a list file of its clips")

    def listed() -> list[Entry]:
        files = _files(address)
        own = files._strip_protocol(address).rstrip("/")
        found = []
        for info in files.ls(address, detail=True, refresh=True):
            name = info["name"].rstrip("/")
            if name != own:
                found.append(Entry(name.rpartition("/")[2], info["type"] == "directory"))
        return found

    return sorted(_tried(address, "listing it", listed))


def sizes_below(address: str) -> dict[str, int]:
    """The size of each object below a directory by its name from there; {} if there is none."""
    _not_web(address, "listed", "name single files")

    def found() -> dict[str, int]:
        files = _files(address)
        own = files._strip_protocol(address).rstrip("/")
        try:
            infos = files.find(address, detail=True, refresh=True)
        except FileNotFoundError:
            return {}
        return {
            name[len(own) + 1 :]: int(info["size"]) for name, info in infos.items() if name != own
        }

    return _tried(address, "listing it", found)


def read_range(address: str, start: int, end: int) -> bytes:
    """The bytes from `start` up to `end`, all of them."""

    def got() -> bytes:
        if protocol_of_web(address):
            data = _web_range(address, start, end)
        else:
            data = _files(address).cat_file(address, start=start, end=end)
        TRAFFIC.add(bytes_read=len(data), requests=1)
        if len(data) != end - start:
            raise ConnectionError(f"{len(data):,} of {end - start:,} bytes came")
        return data

    return _tried(address, "reading", got)


def read(address: str) -> bytes:
    """The whole content of an object, for small ones."""
    if not protocol_of_web(address):
        size = state(address).size
        return read_range(address, 0, size) if size else b""

    file = io.BytesIO()
    copy_whole(address, file)
    return file.getvalue()


def copy_whole(address: str, file: BinaryIO, most: int | None = None) -> None:
    """Copy a file of the web in one answer. UserError for more than `most` bytes."""

    def copied() -> None:
        file.seek(0)
        file.truncate()
        with _web_answer(address) as answer:
            TRAFFIC.add(requests=1)
            announced = answer.headers.get("Content-Length", "")
            wanted = int(announced) if announced.isdigit() else None
            done = 0
            while True:
                if most is not None and max(done, wanted or 0) > most:
                    raise UserError(
                        f"{shown(address)}: {max(done, wanted or 0):,} bytes or more; expected at "
                        f"most {most:,}: save it as a file, or raise the environment's {VARIABLE}"
                    )
                piece = answer.read(_PIECE)
                if not piece:
                    break
                file.write(piece)
                done += len(piece)
                TRAFFIC.add(bytes_read=len(piece))
            if wanted is not None and done < wanted:
                raise ConnectionError(f"{done:,} of {wanted:,} bytes came")

    _tried(address, "reading", copied)


def download(address: str, path: Path) -> None:
    """Copy an object into a local file."""
    with path.open("wb") as file:
        try:
            size = state(address).size
        except NoRanges:
            copy_whole(address, file)
            return
        for start in range(0, size, _PART):
            file.write(read_range(address, start, min(size, start + _PART)))


def upload(path: Path, address: str) -> None:
    """Copy a local file to an address, where it appears whole or not at all."""
    _not_web(address, "written to", "write to gs://, s3:// or a local path")
    size = path.stat().st_size

    def put() -> None:
        _files(address).put_file(os.fspath(path), address)

    _tried(address, "writing", put)
    TRAFFIC.add(bytes_written=size)


def write(data: bytes, address: str) -> None:
    """Write an object."""
    _not_web(address, "written to", "write to gs://, s3:// or a local path")
    _tried(address, "writing", lambda: _files(address).pipe_file(address, data))
    TRAFFIC.add(bytes_written=len(data))


def remove(address: str) -> None:
    """Remove an object, or all below a directory; nothing if there is none."""

    def removed() -> None:
        try:
            _files(address).rm(address, recursive=True)
        except FileNotFoundError:
            return

    _tried(address, "removing it", removed)


def check_writable(address: str, flag: str) -> None:
    """UserError unless objects can be written below an address: writes and removes a small one."""
    _not_web(address, "written to", "name a place in gs://, s3:// or on this machine", flag)
    probe = f"{address.rstrip('/')}/.vivit-jax-{os.getpid()}"
    try:
        write(b"\n", probe)
        remove(probe)
    except FileNotFoundError as error:
        raise StorageError(
            f"{flag} {address}: cannot be written: {error.strerror}; check the name of the "
            "bucket, or make it first"
        ) from None
    except StorageError as error:
        raise StorageError(f"{flag} {str(error).replace(probe, address)}") from None


def _not_web(address: str, what: str, way_out: str, flag: str = "") -> None:
    if protocol_of_web(address):
        raise UserError(
            f"{f'{flag} ' if flag else ''}{shown(address)}: web servers cannot be {what}; {way_out}"
        )


def _files(address: str) -> Any:
    """fsspec's file system for an address."""
    return _file_system(protocol_of(address))


@functools.cache
def _file_system(protocol: str) -> Any:
    import fsspec

    if protocol not in fsspec.available_protocols():
        raise UserError(
            f"{protocol} is no protocol that is known; expected gs, s3, hf, https or another of "
            "fsspec.available_protocols()"
        )
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # stack traces of what is raised anyway
    try:
        kind = fsspec.get_filesystem_class(protocol)
        _check_no_settings(protocol, kind)
        files = kind(**_OPTIONS.get(protocol, {}))
        # gcsfs has no setting for this: each request would be tried six times in silence.
        if protocol == "gs" and (once := getattr(type(files)._request, "__wrapped__", None)):
            files._request = functools.partial(once, files)
        return files
    except ImportError as error:
        if protocol in _EXTRAS:
            package, extra = _EXTRAS[protocol]
            raise MissingExtra(package, extra, f"{protocol}://") from None
        raise UserError(f"{protocol}:// needs another package: {first_line(error)}") from None
    except UserError:
        raise
    except Exception as error:  # each protocol raises errors of its own
        raise StorageError(f"{protocol}://: {_reason(error)}") from error


def _check_no_settings(protocol: str, kind: type) -> None:
    """UserError for a kind of file system that needs more than addresses, such as a host."""
    given = list(inspect.signature(kind.__init__).parameters.values())[1:]
    needed = [each.name for each in given if each.default is each.empty and each.kind < 2]
    if needed:
        raise UserError(
            f"{protocol}:// needs {', '.join(needed)} besides an address, which there is no way to "
            "give here; expected gs, s3, hf or https, or a copy on this machine"
        )


def _tried(address: str, what: str, call: Callable[[], T]) -> T:
    """The result of a call, tried again while its error may pass and patience lasts."""
    place = "/".join(address.split("/", 3)[:3])  # the bucket, or the server
    wait = patience() if place in _reached else min(patience(), _FIRST)
    end, trial = time.monotonic() + wait, 0
    while True:
        try:
            result = call()
            _reached.add(place)
            return result
        except FileNotFoundError as error:
            known = error.strerror or (first_line(error) if _NO_BUCKET.search(str(error)) else "")
            why = known or "no such file"
            raise FileNotFoundError(errno.ENOENT, why, shown(address)) from None
        except IsADirectoryError:
            raise IsADirectoryError(errno.EISDIR, "a directory", shown(address)) from None
        except (NoRanges, _NoSuchRange, UserError):
            raise
        except Exception as error:  # each protocol raises errors of its own
            reason = _reason(error)
            # A clip may be called 403.mp4.
            words = reason.replace("/".join(address.split("/")[3:]), "")
            if isinstance(error, PermissionError) or _NOT_PERMITTED.search(words):
                raise StorageError(
                    f"{shown(address)}: {what} is not permitted: {reason}; check the credentials "
                    "of this machine and their rights"
                ) from error
            if not _may_pass(error):
                raise StorageError(f"{shown(address)}: {what} failed: {reason}") from error
            left = end - time.monotonic()
            pause = _PAUSES[min(trial, len(_PAUSES) - 1)]
            if left <= 0:
                raise StorageError(
                    f"{shown(address)}: {what} failed for {wait:g} s: {reason}; check the "
                    f"network and the service, or wait longer: {PATIENCE} (seconds)"
                ) from error
        trial += 1
        TRAFFIC.add(retries=1)
        logger.warning(
            "%s: %s failed (%s); trying again for %.0f s", shown(address), what, reason, left
        )
        time.sleep(min(pause, left))


def _may_pass(error: Exception) -> bool:
    """Whether an error may be gone after a while."""
    passing = (OSError, EOFError, http.client.HTTPException)
    library = type(error).__module__.partition(".")[0]
    status = getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return False
    return isinstance(error, passing) or library in _LIBRARIES


def _reason(error: Exception) -> str:
    return first_line(error) or type(error).__name__


def _web_answer(address: str, range_: str | None = None) -> Any:
    """The open answer of a web server. FileNotFoundError for 404 and 410."""
    headers = {"User-Agent": f"vivit_jax/{__version__}"}
    if range_ is not None:
        headers |= {"Range": f"bytes={range_}", "Accept-Encoding": "identity"}
    try:
        request = urllib.request.Request(address, headers=headers)
        return urllib.request.urlopen(request, timeout=_SILENCE)
    except urllib.error.HTTPError as error:
        error.close()
        said = f"the server answers {error.code} {error.reason}"
        if error.code == 416 and range_ is not None:
            raise _NoSuchRange(address) from None
        if error.code in (404, 410):
            raise FileNotFoundError(errno.ENOENT, f"{said}; check the link") from None
        if error.code < 500 and error.code not in (408, 429):
            raise StorageError(f"{shown(address)}: {said}; check the link") from None
        raise ConnectionError(said) from None
    except urllib.error.URLError as error:
        raise ConnectionError(first_line(error.reason)) from None
    except ValueError as error:
        raise StorageError(f"{shown(address)}: {first_line(error)}; check the link") from None


def _web_state(address: str) -> State:
    """Raises NoRanges for a server that gives whole files only."""
    try:
        with _web_answer(address, "0-0") as answer:
            found = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("Content-Range", ""))
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            if found:
                return State(int(found[1]), tag)
    except _NoSuchRange:
        return State(0, "")
    raise NoRanges(address)


def _web_range(address: str, start: int, end: int) -> bytes:
    with _web_answer(address, f"{start}-{end - 1}") as answer:
        if answer.status != 206:
            raise NoRanges(address)
        return answer.read()
