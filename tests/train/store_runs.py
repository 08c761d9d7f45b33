# SPDX-License-Identifier: Apache-2.0
"""Runs in object stores, for tests."""

import contextlib
from pathlib import Path

from clips import write_clip as painted_clip
from stores import store
from tiny_recipes import PRETRAIN, changed
from tiny_runs import free_port, settings

from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.data.packing.pack import Packing, pack
from vivit_jax.files import storage
from vivit_jax.files.addresses import place


def copied(address: str, directory: Path) -> Path:
    """A run, copied from its store."""
    for name in storage.sizes_below(address):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(f"{address}/{name}", directory / name)
    return directory


def lives(parent, tmp_path, processes: int, args) -> list:
    """The processes of a run, with directories of their own as on machines of their own."""
    shared = ["--coordinator", f"localhost:{free_port()}", "--processes", processes]
    found = []
    for k in range(processes):
        (tmp_path / "tmp" / str(k)).mkdir(exist_ok=True)
        own = [*shared, "--process", k] if processes > 1 else []
        log, directory = tmp_path / f"{k}.log", str(tmp_path / "tmp" / str(k))
        found.append(parent.start(log, [*args, *own], TMPDIR=directory))
    return found


def steps_taken(tmp_path) -> int:
    """The steps that the first process of a run in a store has reported."""
    files = (tmp_path / "tmp" / "0").glob("vivit-jax-runs-*/*/metrics.jsonl")
    return sum(path.read_text().count('"kind": "train"') for path in files)


PRETRAINING = "videomae-v1-base-kinetics400-pretrain"


@contextlib.contextmanager
def packed_in_s3(tmp_path, steps: int):
    """A bucket of S3 with packed clips, and the command line of pre-training from its shards."""
    (tmp_path / "clips").mkdir()
    for k in range(24):
        painted_clip(tmp_path / "clips" / f"{k}.mp4", 16 + k, gop=4)
    with store("s3") as bucket:
        where = f"{bucket}/packs/clips"
        pack(read_dataset(tmp_path / "clips"), place(where), Packing(shard_bytes=20_000))
        shards = [entry.name for entry in storage.entries(where) if entry.name.endswith(".tar")]
        assert len(shards) >= 4
        recipe = changed(
            PRETRAIN,
            data__train=f"{where}/clips-{{000000..{len(shards) - 1:06}}}.tar",
            train__batch_size=16,
            train__epochs=steps,  # of one step each
            train__checkpoint_every=3,
        )
        cache = ["--compilation-cache", tmp_path / "cache", "pretrain", "--recipe", PRETRAINING]
        yield bucket, [*cache, "--set", *settings(recipe, PRETRAINING), "--resume", "auto", "--out"]
