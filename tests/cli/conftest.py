# SPDX-License-Identifier: Apache-2.0
import contextlib
import io

import jax
import pytest

from vivit_jax.cli.__main__ import main

TINY = (
    *("--clips-per-class", "3", "--labelled-clips-per-class", "2"),
    *("--test-clips-per-class", "2", "--epochs", "1"),
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A directory that a tiny demo wrote, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "a b"
    printed, complaints = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(complaints),
        jax.default_matmul_precision("default"),
    ):
        assert main(["demo", "--out", str(out), *TINY]) == 0
    return out, printed.getvalue(), complaints.getvalue()
