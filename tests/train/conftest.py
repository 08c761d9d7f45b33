# SPDX-License-Identifier: Apache-2.0
"""What tests of runs share."""

import tempfile

import fsspec
import pytest

from vivit_jax.files import ranges
from vivit_jax.train.storage import lease


@pytest.fixture
def fresh_stores(tmp_path, monkeypatch):
    """An empty store in memory, and directories of the test's own."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    ranges.forget()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lease, "_SETTLED", 0)  # no other run begins
