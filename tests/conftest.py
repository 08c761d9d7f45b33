# SPDX-License-Identifier: Apache-2.0
import collections
import gc
import os
import sys

import array_types
import compiler_flags
import jax
import pytest

gc.disable()  # until all is imported, which leaves little garbage
array_types.install()  # before anything of the packages is imported

from tpu_compiler import Compiler  # noqa: E402

from vivit_jax import progress  # noqa: E402
from vivit_jax.models import build  # noqa: E402

progress._LONG = 60.0  # a busy machine compiles slowly, and tests read what is said on stderr
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Drawing a tiny model's fresh parameters is all compilation, and this generator compiles in less
# than half the time of the default one.
jax.config.update("jax_default_prng_impl", "rbg")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """What compiles for TPUs that are not there, see `tpu_compiler`."""
    found = Compiler(tmp_path_factory.mktemp("libtpu") / "log")
    yield found
    found.close()


def as_users(config) -> bool:
    """Whether these are the full-size checks (-m alone), which compile as users do."""
    return "alone" in config.option.markexpr.replace("not alone", "")


def pytest_configure(config):
    if not as_users(config):
        os.environ.setdefault("XLA_FLAGS", " ".join(compiler_flags.TESTS))
        # PyTorch's second thread waits for work by running, on the core of another worker.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish(session):
    if not as_users(session.config):
        build.DRAW_OPTIONS = None  # the level in XLA_FLAGS, which compiles in half the time
    # Tracing makes many objects, and each full collection walks all that is not frozen.
    gc.freeze()
    gc.enable()
    gc.set_threshold(500_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def reports_without_curves(request):
    """The curves of a run's report take longer to draw than a tiny run's steps.

    They are read in tests/train/test_report.py, and the demo's process draws its own.
    """
    chart = sys.modules.get("vivit_jax.train.pages.chart")
    with pytest.MonkeyPatch.context() as patch:
        if chart is not None and request.module.__name__ != "test_report":
            patch.setattr(chart, "picture", lambda *_: "<svg/>")
        yield


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """Full garbage collections walk what a file's tests made, and nothing older."""
    gc.collect(1)
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before -m leaves tests out
def pytest_collection_modifyitems(items):
    cases = collections.Counter()
    for item in items:
        few = item.get_closest_marker("quick_cases")
        if few is not None and not item.get_closest_marker("slow"):
            cases[item.path, item.originalname] += 1
            if cases[item.path, item.originalname] > few.args[0]:
                item.add_marker(pytest.mark.slow)
    has_gpu = jax.default_backend() == "gpu"
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU with cuDNN"))
