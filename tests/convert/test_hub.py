# SPDX-License-Identifier: Apache-2.0
"""Hub ids, against a cache made by hand, and a server on this machine that answers as the hub.

Nothing here touches the network.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
from hub_server import Serving
from huggingface_hub import errors

import vivit_jax
from vivit_jax.cli.__main__ import main
from vivit_jax.errors import install
from vivit_jax.hub import PROCESSOR_FILES, HubId, hub_id, resolve_checkpoint, resolve_processor

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
    assert resolve_checkpoint(ID, COMMIT) == path == resolve_checkpoint(f"hf://{ID}")
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
        vivit_jax.VideoProcessor.from_pretrained(ID)
    expected = vivit_jax.VideoProcessor.vivit()
    usual = expected.save_pretrained(path)
    assert resolve_processor(ID) == usual
    nested = {"video_processor": json.loads(usual.read_text())}
    usual.rename(path / "video_preprocessor_config.json")  # as transformers 5 writes it
    assert vivit_jax.VideoProcessor.from_pretrained(ID) == expected
    (path / "video_preprocessor_config.json").unlink()
    (path / "processor_config.json").write_text(json.dumps(nested))
    assert vivit_jax.VideoProcessor.from_pretrained(ID) == expected
    assert vivit_jax.VideoClassifier.from_pretrained(ID).processor == expected


def test_a_processor_without_a_type_is_of_the_model_beside_it(cached):
    path = cached("single")
    (path / "preprocessor_config.json").write_text('{"size": 20}')
    assert vivit_jax.VideoProcessor.from_pretrained(ID) == vivit_jax.VideoProcessor.vivit(size=20)


def test_a_hub_id_is_looked_up_once(cached, monkeypatch, tmp_path):
    """Else a push between two looks would mix a processor with other weights."""
    vivit_jax.VideoProcessor.vivit().save_pretrained(cached("single"))
    sources = []

    def resolve(source, revision=None):
        sources.append(source)
        return resolve_checkpoint(source, revision)

    monkeypatch.setattr("checkpoints_convert.source.resolve_checkpoint", resolve)
    vivit_jax.VideoClassifier.from_pretrained(ID)
    assert main(["export", ID, "--out", str(tmp_path / "model.stablehlo")]) == 0
    assert sources == [ID, ID]


def test_neither_path_nor_hub_id(offline, tmp_path):
    for source in ("no-such-thing", "a/b/c", tmp_path / "missing", "/missing/dir"):
        with pytest.raises(vivit_jax.CheckpointError, match="does not exist, and is not a hub id"):
            resolve_checkpoint(source)
    with pytest.raises(vivit_jax.CheckpointError, match="HF_HUB_OFFLINE is set"):
        resolve_checkpoint("someone/unknown")
    with pytest.raises(vivit_jax.CheckpointError, match="revision='v2' is for hub ids"):
        resolve_checkpoint(tmp_path, "v2")


@pytest.mark.parametrize("name", ["org/na--me", "org/na..me", f"org/{'x' * 97}", "runs/best."])
def test_a_name_that_the_hub_forbids(name):
    with pytest.raises(vivit_jax.CheckpointError, match="exist, and is not a hub id either"):
        resolve_checkpoint(name)


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

    for name in ("hf_hub_download", "list_repo_files"):
        monkeypatch.setattr(huggingface_hub, name, failing)
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
        *((name, COMMIT) for name in PROCESSOR_FILES),
        ("model.safetensors", COMMIT),
    ]


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        vivit_jax.MissingExtra, match=rf"is not a local path, .*{re.escape(install('hub'))}$"
    ):
        resolve_checkpoint(ID)


@pytest.mark.parametrize(
    ("text", "revision", "expected"),
    [
        ("org/name", None, HubId("org/name")),
        ("org/name", "v1", HubId("org/name", None, "v1")),
        ("org/name@v1", None, HubId("org/name", None, "v1")),
        ("org/name@v1", "v1", HubId("org/name", None, "v1")),
        ("org/na.me-2@refs/pr/3", None, HubId("org/na.me-2", None, "refs/pr/3")),
        ("org/name/model.pth", None, HubId("org/name", "model.pth")),
        ("org/name/a/b.c.pth@v1", None, HubId("org/name", "a/b.c.pth", "v1")),
        ("name", None, None),
        ("org/name@", None, None),
        ("org/name/folder", None, None),
        ("/org/name", None, None),
    ],
)
def test_what_a_hub_id_names(text, revision, expected):
    assert hub_id(text, revision) == expected


def test_two_revisions():
    with pytest.raises(vivit_jax.CheckpointError, match="disagree"):
        resolve_checkpoint("org/name@v1", "v2")


# One process asks for several sources: huggingface_hub reads its settings when it is imported.
ASK = """
import json, sys, time
time.sleep = lambda seconds: None  # between tries of what cannot be reached
from vivit_jax.hub import resolve_checkpoint
from vivit_jax.data.transforms.processor import VideoProcessor
for source in sys.argv[1:]:
    try:
        path = resolve_checkpoint(source)
        config = (path if path.is_dir() else path.parent) / "config.json"
        answer = {"path": str(path)}
        if config.exists():
            answer["note"] = json.loads(config.read_text())["note"]
            answer["size"] = VideoProcessor.from_pretrained(source).size
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
"""


@pytest.fixture
def hub(tmp_path, checkpoints):
    """A server with one model at two revisions, and a repository of an authors' file."""
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for size, (branch, commit) in enumerate(commits.items(), 30):
        path = tmp_path / "served" / branch
        shutil.copytree(checkpoints.path("vivit cls"), path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"note": branch}))
        vivit_jax.VideoProcessor.vivit(size=size).save_pretrained(path)
        commits[branch] = (commit, path)
    authors = tmp_path / "served" / "authors"
    (authors / "base").mkdir(parents=True)
    (authors / "base/model.pth").write_bytes(b"weights")
    (authors / "README.md").write_text("no config.json here")
    repositories = {"someone/model": commits, "someone/authors": {"main": ("c" * 40, authors)}}
    server = Serving(tmp_path, repositories=repositories)

    def ask(*sources, **environment):
        done = subprocess.run(
            [sys.executable, "-c", ASK, *sources],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_ENDPOINT": server.address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                **environment,
            },
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield types.SimpleNamespace(ask=ask, stop=server.stop, asked=server.handler.asked)
    server.stop()


def test_download_cache_and_no_network(hub):
    """Files of two revisions are found again without the hub; the others are named."""
    main, v1, commit, file, no_config, no_revision, unknown = hub.ask(
        *("someone/model", "someone/model@v1", f"someone/model@{'b' * 40}"),
        "someone/model/model.safetensors@v1",
        *("someone/authors", "someone/model@v9", "someone/nothing"),
    )
    assert main["note"] == "main" and main["size"] == {"shortest_edge": 30}
    assert v1["note"] == "v1" and v1["size"] == {"shortest_edge": 31}
    assert commit == v1 and v1["path"].endswith("b" * 40)
    assert file == {**v1, "path": v1["path"] + "/model.safetensors"}
    assert "holds no config.json" in no_config["error"]
    assert "someone/authors/base/model.pth" in no_config["error"]
    assert "has no revision 'v9'" in no_revision["error"]
    assert "nor a repository on the hub" in unknown["error"]
    downloads = [name for method, _, name in hub.asked if method == "GET"]
    assert sorted(downloads) == sorted(
        ["config.json", "preprocessor_config.json", "model.safetensors"] * 2
    )

    hub.stop()
    for environment, reason in (
        ({}, "the hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ):
        again, again_v1, never = hub.ask(
            "someone/model", "someone/model@v1", "someone/other", **environment
        )
        assert (again, again_v1) == (main, v1)
        assert reason in never["error"] and "hf download someone/other" in never["error"]


def test_authors_file_in_a_repository(hub):
    file, missing = hub.ask("someone/authors/base/model.pth", "someone/authors/base/no.pth")
    assert set(file) == {"path"} and file["path"].endswith(f"{'c' * 40}/base/model.pth")
    assert "holds no base/no.pth" in missing["error"]
