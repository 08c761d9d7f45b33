# SPDX-License-Identifier: Apache-2.0
"""Memory and time of loading a ViViT-L sized checkpoint (1.2 GB)."""

import json
import subprocess
import sys

import numpy as np
import pytest

import vivit_jax
from checkpoints_convert.files.save import write_weights
from checkpoints_convert.layouts.hf import write_config
from checkpoints_convert.layouts.registry import published
from checkpoints_convert.rules import export_params
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params, build_model

CONFIG = vivit_jax.VivitConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
    num_labels=400,
)
# VmHWM and not ru_maxrss, which a new process inherits from the large one that started it.
LOAD = """
import json, re, sys, time
import jax, safetensors.numpy, vivit_jax, checkpoints_convert.pretrained
jax.block_until_ready(jax.numpy.zeros(3) + 1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before, started = peak(), time.perf_counter()
model, params = vivit_jax.from_pretrained(sys.argv[1], scan_layers=sys.argv[2] == "scan")
jax.block_until_ready(params)
loaded, high = time.perf_counter(), peak()
plain = jax.device_put(safetensors.numpy.load_file(sys.argv[1] + "/model.safetensors"))
jax.block_until_ready(plain)
plain_seconds = time.perf_counter() - loaded
print(json.dumps({"seconds": loaded - started, "plain": plain_seconds, "bytes": high - before}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large")
    rules = published("vivit", "classification").rules(CONFIG)
    shapes = param_tree.shapes_of(
        param_tree.flatten(abstract_params(build_model(CONFIG, "classification")))
    )
    values = {
        name: np.random.default_rng(0).standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }
    write_weights(path, export_params(values, rules))
    write_config(path, CONFIG, "classification", "float32")
    return path


@pytest.mark.alone
@pytest.mark.parametrize("layers", ["scan", "loop"])
def test_loading_holds_the_weights_once(large, layers):
    size = (large / "model.safetensors").stat().st_size
    assert size > 1.2e9
    runs = []
    for _ in range(2):  # the second with a warm page cache
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(large), layers], capture_output=True, check=True
        )
        runs.append(json.loads(done.stdout))
    ratio = max(run["bytes"] for run in runs) / size
    seconds, plain = runs[-1]["seconds"], runs[-1]["plain"]
    print(
        f"\n{layers}: peak {ratio:.2f} x file size, {size / 1e9:.2f} GB; "
        f"{seconds:.1f} s warm, {plain:.1f} for all its tensors as they are"
    )
    assert 0.9 < ratio <= 1.3
    # Not in seconds (2.6 to 4.6, 5 wanted), which a busy machine stretches. Measured 1.3 to 2.5.
    assert seconds < 6 * plain
