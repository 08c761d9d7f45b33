# SPDX-License-Identifier: Apache-2.0
"""Reading and writing files: damage, indices, pickles, and directories that appear whole."""

import json
import pickle
import re
import sys

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoints import read_safetensors, same_tensors

from checkpoints_convert.files.open import open_checkpoint
from checkpoints_convert.files.save import parse_size, replaced_directory, write_weights
from checkpoints_convert.files.tensors import LazyTensor, check_readable
from vivit_jax.errors import CheckpointError, MissingExtra, UserError, install
from vivit_jax.files.staging import names_in


def lazy(tensors):
    return {
        name: LazyTensor(value.shape, value.dtype, lambda value=value: value)
        for name, value in tensors.items()
    }


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    dtypes = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)
    out = {
        f"b.{i}": rng.standard_normal((i + 2, 3)).astype(dtype) for i, dtype in enumerate(dtypes)
    }
    return out | {"a.scalar": np.array(3.5, np.float32), "ü.empty": np.zeros((0, 3), np.float32)}


def refused(path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    return str(error.value)


def test_written_file_is_the_one_the_safetensors_library_writes(tmp_path, tensors):
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    (ours,) = write_weights(tmp_path, lazy(tensors))
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    opened = open_checkpoint(ours).tensors
    assert same_tensors({name: t.read() for name, t in opened.items()}, tensors)


def test_shards_and_index(tmp_path, tensors):
    paths = write_weights(tmp_path, lazy(tensors), 50)
    assert paths[-1].name == "model.safetensors.index.json" and len(paths) > 3
    assert paths[0].name == f"model-00001-of-{len(paths) - 1:05}.safetensors"
    index = json.loads(paths[-1].read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert same_tensors(read_safetensors(tmp_path), tensors)
    opened = open_checkpoint(tmp_path)
    assert same_tensors({name: t.read() for name, t in opened.tensors.items()}, tensors)
    assert len(opened.files) == len(paths) - 1


def test_sizes():
    assert parse_size("5GB") == 5 * 10**9 and parse_size("1KiB") == 1024
    assert parse_size(100) == 100 and parse_size("1.5 MB") == 1_500_000 and parse_size(None) is None
    for wrong in ("", "GB", "5 apples", "0", "-1"):
        with pytest.raises(UserError, match="max_shard_size"):
            parse_size(wrong)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_safetensors(tmp_path, tensors, keep):
    (path,) = write_weights(tmp_path, lazy(tensors))
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a complete safetensors file" in refused(tmp_path)


def test_corrupt_header(tmp_path, tensors):
    (path,) = write_weights(tmp_path, lazy(tensors))
    data = bytearray(path.read_bytes())
    data[8:12] = b"????"
    path.write_bytes(data)
    assert "is not a complete safetensors file" in refused(path)


def test_file_that_shrinks_after_it_was_opened(tmp_path, tensors):
    (path,) = write_weights(tmp_path, lazy(tensors))
    opened = open_checkpoint(path).tensors
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="shorter"):
        for tensor in opened.values():
            tensor.read()


def test_dtype_that_numpy_lacks(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert "w is stored as F8_E4M3" in refused(tmp_path)


def test_what_is_not_a_checkpoint(tmp_path):
    assert "holds no weights; expected one of model.safetensors" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("hello")
    assert "unknown kind of file" in refused(tmp_path / "notes.txt")


def test_safetensors_are_preferred_over_pickles(tmp_path, tensors):
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    write_weights(tmp_path, lazy(tensors))
    assert open_checkpoint(tmp_path).path.name == "model.safetensors"


def test_a_tensor_in_two_shards(tmp_path):
    """One of the two is what the index does not mean, whatever it holds."""
    from safetensors.numpy import save_file

    value = np.zeros(2, np.float32)
    for shard, names in (("one.safetensors", "ab"), ("two.safetensors", "bc")):
        save_file(dict.fromkeys(names, value), tmp_path / shard)
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert "b in one.safetensors is not in the index" in refused(tmp_path)


def test_index_that_disagrees_with_its_shards(tmp_path, tensors):
    *_, index = write_weights(tmp_path, lazy(tensors), 50)
    good = json.loads(index.read_text())

    def with_map(change):
        weight_map = dict(good["weight_map"])
        change(weight_map)
        index.write_text(json.dumps(good | {"weight_map": weight_map}))
        return refused(tmp_path)

    def misplace(weight_map):
        weight_map["absent"] = weight_map["b.0"]
        del weight_map["b.1"]

    message = with_map(misplace)
    assert f"absent is not in {good['weight_map']['b.0']}" in message
    assert f"b.1 in {good['weight_map']['b.1']} is not in the index" in message
    message = with_map(lambda weight_map: weight_map.update({"b.0": "model-9.safetensors"}))
    assert "names shards that do not exist: model-9.safetensors" in message
    assert "outside" in with_map(lambda weight_map: weight_map.update({"b.0": "../x.safetensors"}))
    long = "model" + "1" * 300 + ".safetensors"
    assert "names a shard model111" in with_map(lambda weight_map: weight_map.update({"b.0": long}))
    zero = "model\0.safetensors"
    assert "that do not exist" in with_map(lambda weight_map: weight_map.update({"b.0": zero}))
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        assert str(index) in refused(tmp_path)


def test_pickles(tmp_path, tensors):
    import torch

    path = tmp_path / "pytorch_model.bin"
    state = {"b.0": torch.ones(2), "b.1": torch.ones(3, dtype=torch.bfloat16)}
    torch.save(state, path)
    opened = open_checkpoint(tmp_path).tensors
    assert opened["b.1"].read().dtype == ml_dtypes.bfloat16
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert np.array_equal(open_checkpoint(tmp_path).tensors["b.0"].read(), np.ones(2))
    torch.save([1, 2], path)
    assert "holds a list" in refused(tmp_path)
    odd = {
        "not a dense tensor under a name: w": torch.ones(2).to_sparse(),
        "w is stored as complex64; readable: float64, float32": torch.ones(2, dtype=torch.cfloat),
        "w is stored as float8_e5m2; ": torch.ones(2).to(torch.float8_e5m2),
        "the key (1, 2) of w": {(1, 2): torch.ones(2)},
        "the key 0.5 of w": {0.5: torch.ones(2)},
    }
    for expected, value in odd.items():
        torch.save({"w": value}, path)
        opened = open_checkpoint(tmp_path).tensors  # it concerns who reads it
        ((name, leaf),) = opened.items()
        assert name.startswith("w") and (leaf.shape, leaf.dtype) == ((), object)
        assert expected in str(leaf.read()) and str(path) not in str(leaf.read())
        with pytest.raises(CheckpointError, match=re.escape(expected)):
            check_readable(path, opened)
    torch.save({"a": {"b": 1}, "a/b": 2}, path)
    assert "holds a/b twice" in refused(tmp_path)
    cycle = {}
    cycle["again"] = cycle
    torch.save(cycle, path)
    assert "a tree that contains itself" in refused(tmp_path)


def test_pickled_training_state(tmp_path):
    """Nested as scripts leave it: every leaf by its path, the arguments as plain values."""
    import argparse

    import torch

    path = tmp_path / "checkpoint.pth"
    groups = [{"lr": 0.1, "params": [0, 1]}]
    state = {
        "model": {"b.0": torch.ones(2)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": groups},
        "epoch": 3,
        "best": None,
        "args": argparse.Namespace(name="x", size=(16, 16)),
        "list": [torch.ones(1), {}],
    }
    torch.save(state, path)
    opened = open_checkpoint(tmp_path).tensors
    assert {name: t.read().tolist() for name, t in opened.items()} == {
        "model/b.0": [1.0, 1.0],
        "optimizer/state/0/step": 3.0,
        "optimizer/param_groups/0/lr": 0.1,
        "optimizer/param_groups/0/params": [0, 1],
        "epoch": 3,
        "best": None,
        "args/name": "x",
        "args/size": (16, 16),
        "list/0": [1.0],
    }
    assert opened["args/size"].shape == () and opened["args/size"].dtype == object
    assert opened["epoch"].dtype == np.int64


def test_pickle_that_would_run_code_is_refused(tmp_path):
    import torch

    class Payload:
        def __reduce__(self):
            return (print, ("must never be printed",))

    torch.save({"w": torch.ones(2), "x": Payload()}, tmp_path / "pytorch_model.bin")
    assert "could run code" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, pickle.dumps({"a": 1}, 2)[:-3]])
def test_damaged_pickle(tmp_path, content):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin is" in refused(tmp_path)


def test_truncated_zip_pickle(tmp_path):
    import torch

    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-300])
    assert "pytorch_model.bin is" in refused(tmp_path)


def test_pickle_without_torch(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=rf"{re.escape(install('torch'))}$"):
        open_checkpoint(tmp_path)


# --- directories -----------------------------------------------------------------------------


def names(path):
    return sorted(p.name for p in path.iterdir())


def contents(path):
    return {p.name: p.read_text() for p in path.iterdir() if p.is_file()}


def test_new_directory_appears_whole(tmp_path):
    for existing in (False, True):
        target = tmp_path / f"parent/out{existing}"
        if existing:
            target.mkdir(parents=True)
        with replaced_directory(target) as staged:
            (staged / "config.json").write_text("{}")
            assert not existing or names_in(target) == []
        assert names(target) == ["config.json"]
        assert target.stat().st_mode & 0o777 == tmp_path.joinpath("parent").stat().st_mode & 0o777
    assert names(tmp_path / "parent") == ["outFalse", "outTrue"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path, error):
    for target in (tmp_path / "out", tmp_path / "new" / "parents" / "out"):
        with pytest.raises(error), replaced_directory(target) as staged:
            (staged / "model.safetensors").write_text("half")
            raise error
        assert names(tmp_path) == []


def test_not_empty_destination(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"), replaced_directory(tmp_path):
        pass
    with (
        pytest.raises(CheckpointError, match="is a file"),
        replaced_directory(tmp_path / "notes.txt", overwrite=True),
    ):
        pass


OLD = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model-00002-of-00002.safetensors": "old",
    "model.safetensors.index.json": "old",
    "pytorch_model.bin": "old",
    "preprocessor_config.json": "kept",
    "notes.txt": "kept",
}


@pytest.fixture
def old_directory(tmp_path):
    path = tmp_path / "out"
    (path / "logs").mkdir(parents=True)
    for name, text in OLD.items():
        (path / name).write_text(text)
    return path


def test_overwrite_replaces_model_files_only(old_directory):
    with replaced_directory(old_directory, overwrite=True) as staged:
        (staged / "config.json").write_text("new")
        (staged / "model.safetensors").write_text("new")
    assert contents(old_directory) == {
        "config.json": "new",
        "model.safetensors": "new",
        "preprocessor_config.json": "kept",
        "notes.txt": "kept",
    }
    assert (old_directory / "logs").is_dir()
    assert names(old_directory.parent) == ["out"]


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_interrupted_overwrite_restores_everything(old_directory, monkeypatch, fail_at):
    import os

    calls, replace = [], os.replace

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), replaced_directory(old_directory, overwrite=True) as new:
        (new / "config.json").write_text("new")
        (new / "model.safetensors").write_text("new")
    assert contents(old_directory) == OLD
    assert names(old_directory) == sorted([*OLD, "logs"])
    assert names(old_directory.parent) == ["out"]


def test_a_run_s_directory_is_told_by_its_models(tmp_path):
    for step in ("18", "20"):
        (tmp_path / "models" / step).mkdir(parents=True)
        (tmp_path / "models" / step / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is a training run; name .*/models/18 \(or 20\)"):
        open_checkpoint(tmp_path)


def test_names_that_no_file_can_have():
    for name in ("a" * 3000, "org/" + "b" * 3000, "a\0b"):
        with pytest.raises(CheckpointError) as raised:
            open_checkpoint(name)
        told = str(raised.value)
        assert len(told) < 300 and told.isprintable() and told.startswith(name[:1])
