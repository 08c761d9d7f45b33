# SPDX-License-Identifier: Apache-2.0
"""Training from a pack."""

import contextlib
import random
import signal
import time

import numpy as np
import pytest
from clips import write_clip
from tiny_recipes import PRETRAIN, changed
from tiny_runs import Parent

from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.data.packing.pack import Packing, pack
from vivit_jax.train import train
from vivit_jax.train.log import read_metrics


@pytest.mark.slow
def test_training_from_a_pack_is_training_from_the_files(tmp_path):
    """Losses to the last bit, with shards of a few clips."""
    data = tmp_path / "clips"
    data.mkdir()
    for k in range(8):
        write_clip(data / f"{k}.mp4", 24 + k)
    pack(read_dataset(data), tmp_path / "packed", Packing(shard_bytes=10_000))
    losses = []
    for source in (data, tmp_path / "packed"):
        out = tmp_path / f"run-{source.name}"
        recipe = changed(PRETRAIN, data__train=str(source), train__epochs=3, train__batch_size=8)
        train(recipe, out, say=lambda text: None)
        losses.append([row["loss"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row])
    assert len(losses[0]) >= 3
    np.testing.assert_array_equal(*losses)


@pytest.mark.slow
def test_a_pack_that_is_killed_again_and_again_has_the_same_bytes(tmp_path):
    """By SIGKILL, each time after another shard or a moment later; with --resize."""
    data, rng = tmp_path / "clips", random.Random(0)
    data.mkdir()
    for k in range(24):
        write_clip(data / f"{k}.mp4", 60 + k, size=(160, 112))
        pixels = np.random.default_rng(k).integers(0, 255, (20, 64, 64, 3), np.uint8)
        np.save(data / f"{k}.npy", pixels)
    options = ["--shard-size", "1MiB", "--resize", "96", "--threads", "2"]
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(Parent()) as parent:
        patch.chdir(tmp_path)
        (whole,) = [parent.start(tmp_path / "log", ["pack", data, tmp_path / "a" / "k", *options])]
        assert whole.end() == 0, whole.text
        shards = len([*(tmp_path / "a" / "k").glob("*.tar")])
        assert shards >= 4
        out, died = tmp_path / "b" / "k", 0
        for k in range(6):
            life = parent.start(tmp_path / "log", ["pack", data, out, *options])
            wanted = min(k, shards - 1)
            if life.until(lambda n=wanted: len([*out.glob("*.json")]) >= n and out.exists()):
                time.sleep(rng.uniform(0, 0.05))
                with contextlib.suppress(ProcessLookupError):
                    life.send(signal.SIGKILL)
            died += life.end() == -signal.SIGKILL
        assert died >= 1
        last = parent.start(tmp_path / "log", ["pack", data, out, *options])
        assert last.end() == 0, last.text
    read = lambda path: {each.name: each.read_bytes() for each in path.iterdir()}  # noqa: E731
    assert read(out) == read(tmp_path / "a" / "k")
