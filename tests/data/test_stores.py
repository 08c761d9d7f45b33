# SPDX-License-Identifier: Apache-2.0
"""Data sets in real object stores: servers of S3 and GCS on this machine."""

import contextlib
import os

import numpy as np
import pytest
from clips import write_clip
from stores import ADDRESSES, Proxy, forget, free_port, gone, store

from vivit_jax.data.datasets.dataset import read_dataset, read_frames
from vivit_jax.data.video.opened import scanned
from vivit_jax.errors import StorageError, UserError
from vivit_jax.files import ranges, storage

pytestmark = pytest.mark.slow
PROTOCOLS = ("s3", "gs")


@pytest.fixture(scope="module", params=PROTOCOLS)
def bucket(request):
    with store(request.param) as address:
        yield address


def test_a_list_and_class_folders(bucket, tmp_path):
    for name in ("run/a b.mp4", "walk/c.mkv"):
        (tmp_path / name).parent.mkdir()
        storage.upload(write_clip(tmp_path / name), f"{bucket}/k400/{name}")
    storage.write(b'"run/a b.mp4" 0\nwalk/c.mkv 1\n', f"{bucket}/k400/list.txt")
    for source in (f"{bucket}/k400/list.txt", f"{bucket}/k400"):
        if not source.endswith(".txt"):
            storage.remove(f"{bucket}/k400/list.txt")
        dataset = read_dataset(source)
        assert [example.label for example in dataset.examples] == [0, 1]
        for example in dataset.examples:
            here = tmp_path / example.path.removeprefix(f"{bucket}/k400/")
            (local,) = (each for each in read_dataset(tmp_path).examples if each.path == str(here))
            wanted = [20, 3, 3]
            np.testing.assert_array_equal(read_frames(example, wanted), read_frames(local, wanted))


def test_objects_are_written_listed_and_removed(bucket, tmp_path):
    data = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "big").write_bytes(data)
    storage.upload(tmp_path / "big", f"{bucket}/x/a/big file")
    storage.write(b"", f"{bucket}/x/empty")
    assert storage.sizes_below(f"{bucket}/x") == {"a/big file": 3_000_000, "empty": 0}
    assert storage.entries(f"{bucket}/x") == [("a", True), ("empty", False)]
    assert storage.read_range(f"{bucket}/x/a/big file", 10, 20) == data[10:20]
    storage.download(f"{bucket}/x/a/big file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data and storage.read(f"{bucket}/x/empty") == b""
    storage.remove(f"{bucket}/x")
    assert not storage.exists(f"{bucket}/x") and storage.sizes_below(f"{bucket}/x") == {}


def test_a_wrong_bucket(bucket):
    wrong = bucket.replace("bucket", "no-such-bucket")
    with pytest.raises(UserError, match="list.txt: (no such file|The specified bucket)"):
        read_dataset(f"{wrong}/list.txt")
    assert storage.exists(bucket) and not storage.exists(wrong)
    with pytest.raises(StorageError, match="^--out .*: cannot be written: .*; check the name of"):
        storage.check_writable(f"{wrong}/run", "--out")


def test_no_credentials(monkeypatch, tmp_path):
    with store("s3") as bucket:
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        forget()
        for ask in (lambda: read_dataset(f"{bucket}/list.txt"), lambda: storage.exists(bucket)):
            with pytest.raises(StorageError, match="Unable to locate credentials; check the cred"):
                ask()


def test_a_server_that_is_gone_for_20_s_costs_time_and_nothing_else(tmp_path, caplog):
    port = free_port()
    with store("s3", port) as bucket:
        storage.upload(write_clip(tmp_path / "a.mp4"), f"{bucket}/a.mp4")
        (tmp_path / "list.txt").write_text(f"{bucket}/a.mp4 0\n")
        (example,) = read_dataset(tmp_path / "list.txt").examples
        expected = read_frames(example, [7])
        for known in (ranges.forget, scanned.cache_clear):
            known()
        with gone(port, seconds=20.0):
            np.testing.assert_array_equal(read_frames(example, [7]), expected)
    told = [r.getMessage() for r in caplog.records if "trying again for" in r.getMessage()]
    print("\n".join(told))
    assert len(told) >= 3 and all("a.mp4" in each for each in told)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_request_is_tried_once_by_the_library(tmp_path, monkeypatch, caplog, protocol):
    """So that each trial is said, and the end comes after the stated time."""
    monkeypatch.setenv(storage.PATIENCE, "2")
    with store(protocol) as bucket, contextlib.ExitStack() as stack:
        storage.write(b"a", f"{bucket}/a")
        (variable,) = ADDRESSES[protocol][:1]
        proxy = stack.enter_context(contextlib.closing(Proxy(os.environ[variable])))
        for name in ADDRESSES[protocol]:
            monkeypatch.setenv(name, proxy.address)
        forget()
        assert storage.read(f"{bucket}/a") == b"a"
        proxy.fault = lambda number, method: "500"
        with pytest.raises(StorageError, match="failed for 2 s"):
            storage.read(f"{bucket}/a")
        told = [r.getMessage() for r in caplog.records if "trying again for" in r.getMessage()]
        assert proxy.counts["500"] == len(told) + 1 >= 3
