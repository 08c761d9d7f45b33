# SPDX-License-Identifier: Apache-2.0
"""A cache of blocks that several processes share, one of which is killed while it writes."""

import hashlib
import os
import signal
import subprocess
import sys

import pytest

from vivit_jax.files import block_cache

BLOCKS, SIZE, PROCESSES, LIMIT = 40, 50_000, 4, 600_000  # of bytes; 12 of the blocks fit

_READER = f"""
import os, random, signal, sys
from vivit_jax.files import block_cache

def content(number):
    return random.Random(number).randbytes({SIZE})

seed, dies = int(sys.argv[1]), sys.argv[2] == "dies"
rng, found, replace, written = random.Random(seed), 0, os.replace, 0

def dying(partial, path):  # its partial file stays
    global written
    written += 1
    if dies and written == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, path)

os.replace = dying
for _ in range(400):
    number = min(int(rng.expovariate(0.15)), {BLOCKS - 1})  # some are read often
    block = block_cache.get("s3://bucket/a", "tag", number)
    if block is None:
        block_cache.put("s3://bucket/a", "tag", number, content(number))
    else:
        assert block == content(number), number
        found += 1
print(found)
"""


@pytest.mark.slow
def test_several_processes_read_and_write_one_cache(tmp_path):
    environment = os.environ | {
        block_cache.DIRECTORY: str(tmp_path),
        block_cache.GIB: repr(LIMIT / 2**30),
    }
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", _READER, str(k), "dies" if k == 0 else "lives"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for k in range(PROCESSES)
    ]
    both = [reader.communicate(timeout=300) for reader in readers]
    said = [out for out, _ in both]
    assert [errors for _, errors in both] == [""] * PROCESSES
    assert [reader.returncode for reader in readers] == [-signal.SIGKILL, 0, 0, 0]
    assert all(int(each) > 50 for each in said[1:])  # found what was held
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    (partial,) = [path for path in files if path.name.startswith(".")]
    assert f".{readers[0].pid}." in partial.name
    # Each process writes a twentieth of the limit, or a block, before it looks again.
    assert sum(path.stat().st_size for path in files) <= LIMIT + PROCESSES * max(LIMIT / 20, SIZE)
    for path in files:
        if path is not partial:
            data = path.read_bytes()
            assert hashlib.blake2b(data[16:], digest_size=16).digest() == data[:16]
    # What the killed one left goes with the oldest blocks later.
    os.utime(partial, (0, 0))
    block_cache._shrink(tmp_path, LIMIT // 2)
    assert not partial.exists()
