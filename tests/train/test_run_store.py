# SPDX-License-Identifier: Apache-2.0
"""Runs whose directory is in an object store."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from clips import write_clip as painted_clip
from commands import run_command
from helpers import random_params
from store_runs import PRETRAINING, copied
from stores import store
from tiny import SMALL_VIDEOMAE
from tiny_recipes import PRETRAIN, changed
from tiny_runs import assert_same, lines, settings, share_steps, small_recipe, state

import vivit_jax
from vivit_jax.errors import StorageError, UserError
from vivit_jax.files import storage
from vivit_jax.files.addresses import Address
from vivit_jax.train.loop import train
from vivit_jax.train.storage.lease import OWNER
from vivit_jax.train.storage.run_store import UPLOADED, run_store
from vivit_jax.train.storage.saved_models import model_directory

pytestmark = pytest.mark.usefixtures("fresh_stores")
QUIET = {"say": lambda text: None}


class _Stop:
    """A callback that ends a run after a step."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, event) -> None:
        if event.step == self.step:
            event.stop("enough")


def assert_trained_alike(address: str, tmp_path: Path, recipe) -> None:
    """A run in a store, stopped and resumed, ends as one in a directory that was not."""
    with share_steps():
        here = train(recipe, tmp_path / "here", **QUIET)
        first = train(recipe, address, callbacks=[_Stop(3)], **QUIET)
        assert first.step == 3 and str(first.model).startswith(f"{address}/models/")
        # A process that was killed while it copied the next checkpoint.
        storage.write(b"half", f"{address}/checkpoints/5/state/array")
        last = train(recipe, address, resume=True, **QUIET)
    assert (last.step, last.metrics) == (here.step, here.metrics)
    there = copied(address, tmp_path / "copy")
    for kind in ("train", "evaluate"):
        assert lines(there, kind) == lines(tmp_path / "here", kind)
    assert_same(there, tmp_path / "here", here.step)
    for kind in ("checkpoints", "models"):
        kept = {path.name for path in (tmp_path / "here" / kind).iterdir() if path.name.isdecimal()}
        assert {path.name for path in (there / kind).iterdir()} == kept
    assert (there / "report.html").exists()
    assert json.loads((there / "recipe.json").read_text())["name"] == recipe.name


@pytest.mark.slow
def test_a_run_in_a_store_ends_as_one_in_a_directory(tmp_path, capsys):
    recipe = small_recipe(tmp_path / "data", clips=8)
    assert_trained_alike("memory://bucket/run", tmp_path, recipe)
    assert not [p for p in (tmp_path / "tmp").rglob("*") if p.is_file() and p.suffix != ".lock"]
    # Its best model, by its address and by that of the run.
    best = model_directory(Address("memory://bucket/run"))
    assert str(best).startswith("memory://bucket/run/models/")
    there, params = vivit_jax.from_pretrained(str(best))
    here, expected = vivit_jax.from_pretrained(model_directory(tmp_path / "here"))
    assert there.config == here.config
    np.testing.assert_array_equal(params["head"]["kernel"], expected["head"]["kernel"])
    status, said, _ = run_command(
        capsys, "evaluate", "--model", "memory://bucket/run", "--data", tmp_path / "data" / "test",
        "--out", "memory://bucket/found.json",
    )  # fmt: skip
    assert status == 0 and "written to memory://bucket/found.json" in said
    found = json.loads(storage.read("memory://bucket/found.json"))
    assert len(found["videos"]) == 16


@pytest.mark.slow
def test_a_run_goes_on_before_a_checkpoint_that_was_not_copied(tmp_path, caplog):
    recipe = changed(small_recipe(tmp_path / "data", clips=8), train__keep=3)
    with share_steps():
        train(recipe, "memory://b/run", callbacks=[_Stop(4)], **QUIET)
        steps = {path.name for path in Address("memory://b/run/checkpoints").iterdir()}
        assert steps == {"2", "4"}
        (name, *_) = (n for n in storage.sizes_below("memory://b/run/checkpoints/4") if "/d/" in n)
        storage.remove(f"memory://b/run/checkpoints/4/{name}")
        train(recipe, "memory://b/run", resume=True, **QUIET)
        there = copied("memory://b/run", tmp_path / "copy")
        assert [line["step"] for line in lines(there)] == [1, 2, 3, 4, 5, 6]
        assert state(there, 4)
        # One that was changed there: messages name it there, not the copy here.
        changed_one = "memory://b/run/checkpoints/6"
        held = bytearray(storage.read(f"{changed_one}/run/metadata"))
        held[len(held) // 2] ^= 1
        storage.write(bytes(held), f"{changed_one}/run/metadata")
        train(recipe, "memory://b/run", resume=True, **QUIET)
    assert "memory://b/run/checkpoints/4 was not written to its end; it is left out" in caplog.text
    assert f"step 6, {changed_one}, is damaged: run/metadata has changed" in caplog.text
    assert "later 6 in memory://b/run/checkpoints" in caplog.text
    assert str(tmp_path / "tmp") not in caplog.text


def write_step(store, step: int, text: str = "a") -> None:
    """What a run writes of a step, as far as a store sees it."""
    for name in (f"models/{step}/config.json", f"checkpoints/{step}/state/d/1"):
        (store.path / name).parent.mkdir(parents=True)
        (store.path / name).write_text(f"{text}{step}")
    with (store.path / "metrics.jsonl").open("a") as file:
        file.write(f"{step}\n")


def test_what_is_new_is_copied_and_what_is_gone_is_removed(tmp_path, caplog):
    address = "memory://b/run"

    def there() -> dict[str, bytes]:
        return {
            name: storage.read(f"{address}/{name}")
            for name in storage.sizes_below(address)
            if not name.endswith((UPLOADED, OWNER))
        }

    with run_store(address, resume=False) as store:
        (store.path / "recipe.json").write_text("{}")
        for step in (1, 2, 3):
            store.settle()
            write_step(store, step)
            if step == 3:  # as a run that keeps two
                for kind in ("models", "checkpoints"):
                    shutil.rmtree(store.path / kind / "1")
            store.publish()
        store.finish()
        expected = {
            path.relative_to(store.path).as_posix(): path.read_bytes()
            for path in store.path.rglob("*")
            if path.is_file()
        }
        assert there() == expected and "checkpoints/3/state/d/1" in expected
        with (
            pytest.raises(
                UserError, match="--out memory://b/run: another process is training into"
            ),
            run_store(address, resume=True),
        ):
            pass
    # A step that lacks an object, one without its last one, and one that is written anew.
    storage.write(b"x", f"{address}/checkpoints/4/state/d/1")
    storage.remove(f"{address}/checkpoints/3/state/d/1")
    with run_store(address, resume=True) as store:
        for step in (3, 4):
            assert f"{address}/checkpoints/{step} was not written to its end" in caplog.text
        found = {p.relative_to(store.path).as_posix() for p in store.path.rglob("*") if p.is_file()}
        assert found == {"recipe.json", "metrics.jsonl", "checkpoints/2/state/d/1"}
        for kind in ("models", "checkpoints"):
            shutil.rmtree(store.path / kind / "2")
            shutil.rmtree(store.path / kind / "3", ignore_errors=True)
        write_step(store, 2, "b")
        write_step(store, 3, "b")
        store.finish()
    assert there()["checkpoints/2/state/d/1"] == b"b2" == there()["models/2/config.json"]
    assert there()["checkpoints/3/state/d/1"] == b"b3"
    assert not [name for name in there() if "/4/" in name]
    assert there()["metrics.jsonl"] == b"1\n2\n3\n2\n3\n"
    assert not [path for path in (tmp_path / "tmp").rglob("*") if path.suffix not in ("", ".lock")]


def test_errors_name_the_place_and_not_the_directory_here():
    with (
        pytest.raises(UserError, match="^memory://b/run/recipe.json is wrong$"),
        run_store("memory://b/run", resume=False) as store,
    ):
        raise UserError(f"{store.path}/recipe.json is wrong")


def test_places_that_are_refused_before_anything_runs(tmp_path):
    recipe = small_recipe(tmp_path / "data", clips=8)
    storage.write(b"{}", "memory://b/full/other.json")
    storage.write(b"{}", "memory://b/run/recipe.json")
    for out, resume, told in (
        ("https://x.org/run", False, "https://x.org/run: web servers cannot be written to; name a"),
        ("teleport://x/run", False, "teleport is no protocol that is known"),
        ("ftp://x/run", False, "ftp:// needs host besides an address, which there is no way to"),
        ("memory://b/full", False, "--out memory://b/full is not empty; choose a new directory"),
        ("memory://b/run", False, "--out memory://b/run holds a run; continue it with --resume"),
        ("memory://b/none", True, "memory://b/none holds no run to resume: there is no recipe"),
    ):
        with pytest.raises(UserError, match=told):
            train(recipe, out, resume=resume, **QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_run_in_a_real_store(tmp_path, protocol):
    recipe = small_recipe(tmp_path / "data", clips=8)
    with store(protocol) as bucket:
        for path in (tmp_path / "data").rglob("*.npy"):
            name = path.relative_to(tmp_path).as_posix()
            storage.upload(path, f"{bucket}/{name}")
        places = {
            f"data__{n}": f"{bucket}/data/{s}"
            for n, s in (("train", "train"), ("validation", "test"))
        }
        assert_trained_alike(f"{bucket}/run", tmp_path, changed(recipe, **places))
        wrong = bucket.replace("bucket", "no-such-bucket")
        with pytest.raises(StorageError, match="^--out .*/run: cannot be written: .*; check"):
            train(recipe, f"{wrong}/run", **QUIET)


@pytest.mark.slow
def test_the_commands_of_the_page_run_in_stores(tmp_path, capsys, monkeypatch):
    """With a store in memory for all buckets, and settings of a small model."""
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(each) for each in lines]
    named = ["finetune", "evaluate", "extract", "pack", "pretrain"]
    assert [command[1] for command in commands] == named
    recipe = small_recipe(tmp_path / "data", clips=8)
    for path in (tmp_path / "data").rglob("*.npy"):
        storage.upload(
            path, f"memory://bucket/k400/{path.relative_to(tmp_path / 'data').as_posix()}"
        )
    for name, split in (("train", "train"), ("val", "test")):
        lines = [f"{split}/{label}/{k}.npy {label}\n" for label in range(2) for k in range(8)]
        storage.write("".join(lines).encode(), f"memory://bucket/k400/{name}.csv")
    painted_clip(tmp_path / "film.mp4")
    storage.upload(tmp_path / "film.mp4", "memory://bucket/films/film.mp4")
    config = vivit_jax.VideoMAEConfig(**SMALL_VIDEOMAE)
    model = vivit_jax.VideoMAEForPreTraining(config)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = dataclasses.replace(vivit_jax.VideoProcessor.videomae(), **sizes)
    vivit_jax.save_pretrained(tmp_path / "mae", model, random_params(model), processor)
    for where in ("runs/pretraining/models/3", "model"):
        for path in (tmp_path / "mae").iterdir():
            storage.upload(path, f"memory://bucket/{where}/{path.name}")
    nowhere = {"data__train": "", "data__validation": None}
    small = {
        "finetune": ["--set", *settings(changed(recipe, **nowhere))],
        "pretrain": ["--set", *settings(changed(PRETRAIN, train__batch_size=8), PRETRAINING)],
    }
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "k400" / "train")
    for command in commands:
        args = [re.sub("^(gs|s3)://", "memory://", each) for each in command[1:]]
        args = [each.replace("/tmp/clips", str(tmp_path / "clips")) for each in args]
        args = [each.replace("..000511}", "..000000}") for each in args]  # one shard is full here
        status, said, told = run_command(capsys, *args, *small.get(args[0], ()))
        assert status == 0, said + told
    assert storage.exists("memory://bucket/runs/one.json")
    assert storage.exists("memory://bucket/features/film.safetensors")
    assert storage.exists("memory://bucket/packs/k400/manifest.json")
    assert storage.exists("memory://bucket/runs/from-shards/report.html")
