# SPDX-License-Identifier: Apache-2.0
"""Training from a pack."""

import numpy as np
import pytest
from clips import write_clip
from tiny_recipes import PRETRAIN, changed

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
