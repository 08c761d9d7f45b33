# SPDX-License-Identifier: Apache-2.0
"""Hub ids, against a cache directory made by hand: nothing here touches the network."""

import shutil
import sys
import types

import pytest
from huggingface_hub import errors

import vivit_jax
from vivit_jax.hub import resolve_checkpoint, resolve_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ID = "someone/tiny-vivit"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def cached(offline, checkpoints, tmp_path):
    """Put a checkpoint into the cache as if it had been downloaded; returns its directory."""

    def put(storage):
        repository = tmp_path / "hub" / f"models--{ID.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text(COMMIT)
        path = repository / "snapshots" / COMMIT
        shutil.copytree(checkpoints.path("vivit cls", "hub", storage), path)
        return path

    return put


@pytest.mark.parametrize("storage", ["single", "sharded", "bin", "sharded bin"])
def test_hub_id_from_the_cache(cached, storage):
    path = cached(storage)
    assert resolve_checkpoint(ID) == path
    assert resolve_checkpoint(ID, COMMIT) == path
    model, _ = vivit_jax.from_pretrained(ID)
    assert isinstance(model, vivit_jax.VivitForVideoClassification)


def test_missing_shard_in_the_cache(cached):
    path = cached("sharded")
    sorted(path.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(vivit_jax.CheckpointError, match="-of-.*HF_HUB_OFFLINE is set"):
        resolve_checkpoint(ID)


def test_cache_without_weights(cached):
    (cached("single") / "model.safetensors").unlink()
    with pytest.raises(vivit_jax.CheckpointError, match=r"cache \(offline\) holds none of model"):
        resolve_checkpoint(ID)


def test_processor_file(cached):
    path = cached("single")
    with pytest.raises(vivit_jax.CheckpointError, match="preprocessor_config.json"):
        resolve_file(ID, "preprocessor_config.json")
    vivit_jax.VideoProcessor.vivit().save_pretrained(path)
    assert resolve_file(ID, "preprocessor_config.json") == path / "preprocessor_config.json"
    assert resolve_file(path, "config.json") == path / "config.json"
    assert resolve_file(path / "model.safetensors", "config.json") == path / "config.json"
    with pytest.raises(vivit_jax.CheckpointError, match="nothing.json does not exist"):
        resolve_file(path, "nothing.json")


def test_neither_path_nor_hub_id(offline, tmp_path):
    for source in ("no-such-thing", "a/b/c", tmp_path / "missing", "/missing/dir"):
        with pytest.raises(vivit_jax.CheckpointError, match="does not exist, and is not a hub id"):
            resolve_checkpoint(source)
    with pytest.raises(vivit_jax.CheckpointError, match="HF_HUB_OFFLINE is set"):
        resolve_checkpoint("someone/unknown")
    with pytest.raises(vivit_jax.CheckpointError, match="revision='v2' is for hub ids"):
        resolve_checkpoint(tmp_path, "v2")


def answer(status):
    return types.SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda: errors.RepositoryNotFoundError("x", response=answer(404)), "neither a local path"),
        (lambda: errors.RevisionNotFoundError("x", response=answer(404)), "no revision 'v9'"),
        (lambda: errors.GatedRepoError("x", response=answer(403)), "is gated"),
        (lambda: errors.HfHubHTTPError("500 oh", response=answer(500)), "the hub answered 500 oh"),
        (lambda: errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (lambda: errors.EntryNotFoundError("x"), "holds no config.json"),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, expected):
    import huggingface_hub

    def failing(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    with pytest.raises(vivit_jax.CheckpointError, match=expected):
        resolve_checkpoint(ID, "v9")


def test_one_weight_format_of_one_commit_is_downloaded(monkeypatch, checkpoints, tmp_path):
    import huggingface_hub

    stored = shutil.copytree(checkpoints.path("vivit cls"), tmp_path / COMMIT)
    (stored / "pytorch_model.bin").write_bytes(b"not needed")
    asked = []

    def download(repository, filename, revision=None):
        asked.append((filename, revision))
        if not (stored / filename).exists():
            raise errors.EntryNotFoundError(filename)
        return str(stored / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve_checkpoint(ID) == stored
    assert asked == [
        ("config.json", None),
        ("preprocessor_config.json", COMMIT),
        ("model.safetensors", COMMIT),
    ]


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(vivit_jax.MissingExtra, match=r"vivit_jax\[hub\]"):
        resolve_checkpoint(ID)
