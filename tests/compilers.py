"""Marks for tests that compile for hardware that is not there."""

import importlib.util

import jax
import pytest


def _needs(package: str, extra: str):
    # A process that computes on an accelerator cannot compile for others.
    there = importlib.util.find_spec(package) is not None and jax.default_backend() == "cpu"
    return pytest.mark.skipif(not there, reason=f"needs the extra {extra} and no accelerator")


needs_libtpu = _needs("libtpu", "plan")
needs_cuda_plugin = _needs("jax_cuda13_plugin", "cuda")
