# SPDX-License-Identifier: Apache-2.0
"""Data in object stores and on the web: read as local files are, by ranges, with retries."""

import http.server
import logging
import os
import re
import threading
import time
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from clips import write_clip
from commands import run_command

from vivit_jax.data.datasets.dataset import count_frames, read_dataset, read_frames
from vivit_jax.data.pipeline import Batches, ClipShape
from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.data.video.decode import probe_video, read_video
from vivit_jax.data.video.opened import scanned
from vivit_jax.errors import StorageError, UserError, VideoError
from vivit_jax.files import block_cache, ranges, storage
from vivit_jax.files.addresses import Address, is_address, place
from vivit_jax.files.reading import opened


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is known from the tests before."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    ranges.forget()
    scanned.cache_clear()
    storage._reached.clear()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Clips in two folders of classes, and lists of them."""
    root = tmp_path_factory.mktemp("clips")
    for k, name in enumerate(("run/a b.mp4", "run/b.mkv", "walk/c.mp4", "walk/d.npy")):
        (root / name).parent.mkdir(exist_ok=True)
        if name.endswith("npy"):
            np.save(root / name, np.full((9, 8, 8, 3), k, np.uint8))
        else:
            write_clip(root / name, frames=30 + k)
    (root / "list.txt").write_text('"run/a b.mp4" 0\nwalk/c.mp4 1\nwalk/d.npy 1\n')
    (root / "list.csv").write_text("path,label\nrun/a b.mp4,run\nwalk/c.mp4,walk\n")
    return root


@pytest.fixture
def stored(clips):
    """The address of a copy of the clips."""
    fsspec.filesystem("memory").put(f"{clips}/", "/bucket/clips/", recursive=True)
    return "memory://bucket/clips"


class Server(http.server.BaseHTTPRequestHandler):
    """Files of `files` by path, with ranges; each of `faults` spoils an answer.

    A fault is a status, or "short" for an answer that breaks off.
    """

    files: dict[str, bytes] = {}
    faults: list = []
    asked: list = []
    ranged = True

    def do_GET(self):
        data, wanted = self.files.get(self.path), self.headers.get("Range")
        self.asked.append((self.path, wanted))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int) or data is None:
            self.send_error(fault or 404)
            return
        about = {}
        if wanted and self.ranged:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            about = {"Content-Range": f"bytes {start}-{end}/{len(data)}", "ETag": '"one"'}
            data = data[start : end + 1]
        self.send_response(206 if about else 200)
        for name, value in (about | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "short" else data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES", (0.01,))
    for name in ("files", "faults", "asked"):
        monkeypatch.setattr(Server, name, type(getattr(Server, name))())
    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://localhost:{running.server_port}"
        running.shutdown()


def test_what_is_an_address():
    for text in ("gs://bucket/a", "s3://b", "memory:/b/c", "https://x.org/a.mp4?key=1"):
        assert is_address(text) and isinstance(place(text), Address), text
    for text in ("a.mp4", "/a/b", r"C:\a", "C:/a", "a:b", "x/gs://b", "gs:", ""):
        assert not is_address(text), text
    run = place("gs://bucket/runs/one/")
    assert str(run / "models" / "10") == "gs://bucket/runs/one/models/10"
    assert (run.name, str(run.parent), (run / "a.tar.gz").suffix) == (
        "one",
        "gs://bucket/runs",
        ".gz",
    )
    assert str(place(os.path.join("x", "y"))) == os.path.join("x", "y")
    # A Path has dropped a slash.
    assert str(place(Path("gs://bucket/a"))) == "gs://bucket/a"


@pytest.mark.parametrize("source", ["", "list.txt", "list.csv"])
def test_data_sets_are_read_as_local_ones(clips, stored, source):
    here, there = read_dataset(clips / source), read_dataset(f"{stored}/{source}".rstrip("/"))
    assert there.classes == here.classes and there.fingerprint == here.fingerprint
    assert len(here) == {"": 4, "list.txt": 3, "list.csv": 2}[source]
    for a, b in zip(here.examples, there.examples, strict=True):
        assert (b.path, b.label) == (a.path.replace(str(clips), stored), a.label)
        assert count_frames(a) == count_frames(b)
        for indices in ([3, 0, 8], [5]):
            np.testing.assert_array_equal(read_frames(a, indices), read_frames(b, indices))


def test_a_local_list_may_name_addresses(clips, stored, tmp_path):
    (tmp_path / "list.txt").write_text(f'"{stored}/run/a b.mp4" 0\n')
    (example,) = read_dataset(tmp_path / "list.txt").examples
    assert example.path == f"{stored}/run/a b.mp4"
    assert probe_video(example.path) == probe_video(clips / "run/a b.mp4")


def write_noise(path, frames: int, gop: int) -> None:
    """A video that hardly compresses, with its index at the end, as most are."""
    noise = np.random.default_rng(0).integers(0, 50, (40, 120, 160, 3), dtype=np.uint8)
    slope = (np.indices((120, 160)).sum(0)[..., None] % 200).astype(np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "ultrafast", "g": str(gop), "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for k in range(frames):
            image = noise[k * 7 % 40] + np.roll(slope, k, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())


def share_read(path, indices: list[int]) -> float:
    """The share of a file in storage that is read for some of its frames, which are checked."""
    data = path.read_bytes()
    fsspec.filesystem("memory").pipe("/b/long.mp4", data)
    ranges.forget()
    scanned.cache_clear()
    before = storage.TRAFFIC.bytes_read
    found = read_video("memory://b/long.mp4", indices=indices)
    np.testing.assert_array_equal(found, read_video(path, indices=indices))
    return (storage.TRAFFIC.bytes_read - before) / len(data)


def test_a_sparse_clip_needs_the_index_and_what_is_around_its_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "BLOCK", 2**14)
    write_noise(tmp_path / "long.mp4", 400, gop=20)
    for indices in ([*range(100, 132, 4)], [399], [0, 150]):
        assert 0 < share_read(tmp_path / "long.mp4", indices) < 0.25


@pytest.mark.slow
def test_a_clip_of_ten_minutes_needs_a_tenth_of_the_file_at_most(tmp_path):
    write_noise(tmp_path / "long.mp4", 15_000, gop=250)
    for start in (0, 7000, 14_900):
        share = share_read(tmp_path / "long.mp4", [*range(start, start + 64, 4)])
        print(f"frames from {start} on: {share:.2%} of {(tmp_path / 'long.mp4').stat().st_size:,}")
        assert share < 0.1


def test_a_server_with_faults(clips, server, caplog, monkeypatch):
    path = clips / "run/a b.mp4"
    Server.files["/a.mp4"] = path.read_bytes()
    Server.faults[:] = [500, 503, None, "short", "short", 500]
    with caplog.at_level(logging.WARNING):
        found = read_video(f"{server}/a.mp4", indices=[7])
    np.testing.assert_array_equal(found, read_video(path, indices=[7]))
    told = [r.getMessage() for r in caplog.records if "trying again" in r.getMessage()]
    assert len(told) == 5 and not Server.faults, told
    assert "the server answers 500" in told[0] and "bytes" in told[2]
    # A clear end after the stated time; a clip is not taken for a bad one.
    ranges.forget()
    Server.faults[:] = [500] * 1000
    monkeypatch.setenv(storage.PATIENCE, "0.1")
    with pytest.raises(StorageError, match=r"/a.mp4: .* failed for 0.1 s: .* 500 .*TIMEOUT") as bad:
        read_video(f"{server}/a.mp4", indices=[7])
    assert not isinstance(bad.value, VideoError) and "\n" not in str(bad.value)


def test_a_server_without_ranges_gives_the_whole_file_once(clips, server, monkeypatch):
    monkeypatch.setattr(Server, "ranged", False)
    Server.files["/a.mp4"] = (clips / "run/a b.mp4").read_bytes()
    found = read_video(f"{server}/a.mp4", indices=[7, 2])
    np.testing.assert_array_equal(found, read_video(clips / "run/a b.mp4", indices=[7, 2]))
    assert [wanted for _, wanted in Server.asked].count(None) == 1


def test_what_is_not_there(server, stored, tmp_path):
    for address, told in (
        (f"{server}/none.mp4", "the server answers 404"),
        (f"{stored}/none.mp4", "no such file; expected a video file"),
        (f"{stored}/run", "a directory"),
        (f"{stored}/empty.mp4", r"an empty file \(0 bytes\)"),
    ):
        if "empty" in address:
            fsspec.filesystem("memory").pipe("/bucket/clips/empty.mp4", b"")
        with pytest.raises(VideoError, match=told):
            read_video(address, indices=[0])
    for source, told in (
        (f"{stored}/none.txt", "none.txt: no such file; expected a list file"),
        (f"{server}/folder", "the server answers 404"),
        ("memory://nowhere/x", "x: no such file"),
    ):
        with pytest.raises(UserError, match=told):
            read_dataset(source)


def test_missing_clips_are_not_asked_for_when_a_list_is_read(server):
    Server.files["/list.txt"] = b"a.mp4 0\nb.mp4 1\n"
    assert len(read_dataset(f"{server}/list.txt")) == 2
    assert {path for path, _ in Server.asked} == {"/list.txt"}


def test_the_cache_holds_blocks_up_to_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv(block_cache.DIRECTORY, str(tmp_path / "cache"))
    data = np.random.default_rng(0).bytes(8 * ranges.BLOCK)
    fsspec.filesystem("memory").pipe("/b/data", data)

    def read() -> tuple[int, int]:
        """Reads the file; (bytes of storage, bytes of the cache)."""
        ranges.forget()
        before = storage.TRAFFIC.bytes_read, storage.TRAFFIC.bytes_cached
        with opened("memory://b/data") as file:
            assert file.read() == data
        return (
            storage.TRAFFIC.bytes_read - before[0],
            storage.TRAFFIC.bytes_cached - before[1],
        )

    assert read() == (len(data), 0)
    assert read() == (0, len(data))
    held = [path for path in (tmp_path / "cache").glob("*/*")]
    assert len(held) == 8
    held[0].write_bytes(held[1].read_bytes()[:-1])  # damage costs a request
    assert read()[0] >= ranges.BLOCK
    # Half as much room: what was used longest ago leaves.
    monkeypatch.setenv(block_cache.GIB, str(4.5 * ranges.BLOCK / 2**30))
    fsspec.filesystem("memory").pipe("/b/data", data := data[::-1])
    ranges.forget()
    read()
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*"))
    assert 0 < size <= 4.5 * ranges.BLOCK + 16 * 8
    for value in ("0", "much"):
        monkeypatch.setenv(block_cache.GIB, value)
        with pytest.raises(UserError, match="CACHE_GIB"):
            block_cache.check()


def test_what_was_used_longest_ago_leaves_the_cache_first(tmp_path, monkeypatch):
    """And what a dead writer left, but nothing of a living one."""
    monkeypatch.setenv(block_cache.DIRECTORY, str(tmp_path))
    monkeypatch.setenv(block_cache.GIB, "1")
    for number in range(5):
        block_cache.put("s3://b/a", "tag", number, bytes(1000))
    paths = [block_cache._path(tmp_path, "s3://b/a", "tag", number) for number in range(5)]
    now = time.time()
    for age, path in zip((400, 100, 300, 200, 500), paths, strict=True):
        os.utime(path, (now - age, now - age))
    assert block_cache.get("s3://b/a", "tag", 4) == bytes(1000)  # the oldest is used again
    living, dead = (paths[0].with_name(f".{name}.1.1") for name in ("living", "dead"))
    for path, age in ((living, 550.0), (dead, 10 * block_cache._DEAD)):
        path.write_bytes(bytes(1000))
        os.utime(path, (now - age, now - age))
    block_cache._shrink(tmp_path, 4000)  # three blocks of 1016 bytes are well below
    assert not dead.exists() and living.exists()
    assert [path.exists() for path in paths] == [False, True, False, True, True]


def test_a_file_that_is_read_in_order_takes_fewer_and_fewer_requests():
    """And one that is read here and there no more than what is asked for."""
    data = np.random.default_rng(0).bytes(40 * ranges.BLOCK)
    fsspec.filesystem("memory").pipe("/b/long", data)
    ranges.forget()
    before = storage.TRAFFIC.requests
    with opened("memory://b/long") as file:
        assert file.read() == data
    assert storage.TRAFFIC.requests - before == 6  # 1, 2, 4, 8, 16 blocks and the rest
    ranges.forget()
    before = storage.TRAFFIC.bytes_read
    with opened("memory://b/long") as file:
        for block in (30, 3, 12):
            file.seek(block * ranges.BLOCK)
            assert file.read(100) == data[block * ranges.BLOCK :][:100]
    assert storage.TRAFFIC.bytes_read - before == 3 * ranges.BLOCK


def test_a_file_that_changes_is_seen_after_half_a_minute(monkeypatch):
    files, clock = fsspec.filesystem("memory"), [1000 * ranges._FRESH]
    monkeypatch.setattr(ranges.time, "monotonic", lambda: clock[0])
    ranges.forget()
    for content in (b"first", b"second one"):
        files.pipe("/b/changing", content)
        with opened("memory://b/changing") as file:
            assert file.read() == content
        clock[0] += ranges._FRESH
    ranges.forget()


def test_a_name_like_a_status_is_none(monkeypatch):
    monkeypatch.setattr(storage, "_PAUSES", (0.01,))
    answers = iter([ConnectionError("no connection to /b/403.mp4"), None])

    class Files:
        def cat_file(self, path, start, end):
            if (error := next(answers)) is not None:
                raise error
            return b"x"

    monkeypatch.setattr(storage, "_files", lambda address: Files())
    assert storage.read_range("memory://b/403.mp4", 0, 1) == b"x"


def test_training_keeps_what_it_reads_in_the_cache(stored, tmp_path, monkeypatch):
    for name in (block_cache.DIRECTORY, block_cache.GIB):
        monkeypatch.setenv(name, "")  # and what the batches set is undone
    settings = DataSettings(cache_dir=str(tmp_path / "cache"), cache_dir_gib=1.0, sampler="loop")
    dataset = read_dataset(f"{stored}/list.csv")
    shape = ClipShape(4, (32, 32))
    with Batches(dataset, settings, AugmentSettings(), shape=shape, batch_size=2, seed=0) as found:
        next(found)
    assert len(list((tmp_path / "cache").glob("*/*"))) == 2


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(block_cache.DIRECTORY, str(tmp_path / "file"))
    with pytest.raises(UserError, match="cache_dir .*file: .*; name a directory"):
        block_cache.check()


@pytest.mark.parametrize(
    "command, args",
    [
        ("probe", ("--data", "x", "--model", "m", "--out", "gs://b/out")),
        ("export", ("m", "--out", "s3://b/out.bin")),
        ("plan", ("--recipe", "r", "--topology", "v5e:2x2", "--json", "gs://b/plan.json")),
        ("demo", ("--out", "gs://b/demo")),
    ],
)
def test_a_local_path_that_is_an_address_is_refused_at_once(
    capsys, tmp_path, monkeypatch, command, args
):
    monkeypatch.chdir(tmp_path)
    status, _, said = run_command(capsys, command, *args)
    assert status == 2 and said.count("\n") == 1, said
    assert f"{args[-1]} is not on this machine, and {command} takes a local path there" in said
    assert not os.listdir(tmp_path)
