# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax push` against a server on this machine: what arrives, what is refused, what opens."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import random_params
from hub_server import serving
from tiny import CASES, config_of
from tiny_checkpoints import read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.card import for_repository, is_own
from vivit_jax.train.storage.saved_models import model_directory

ID, TOKEN = "org/name", "hf_secret"
PROCESSOR = vivit_jax.VideoProcessor.named("videomae-imagenet", size=26, crop_size=(24, 16))
FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("push") / "model"
    model = CASES["mae cls"][0](config_of("mae cls"))
    vivit_jax.save_pretrained(directory, model, random_params(model), PROCESSOR)
    return directory


@pytest.fixture
def model(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that huggingface_hub takes for its own in this process."""
    from huggingface_hub import constants

    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub", token=TOKEN) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        url = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server.handler


@pytest.fixture
def no_network(monkeypatch):
    import socket

    def connect(*_):
        raise AssertionError("a dry run connects to nothing")

    monkeypatch.setattr(socket.socket, "connect", connect)


def held(hub, revision="main", repository=ID):
    """The files of a repository by name."""
    directory = hub.repositories[repository][revision][1]
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != ".gitattributes"}


def expected(model, revision=None):
    """The files of a directory, the card as it is published."""
    found = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file()}
    card = for_repository(found["README.md"].decode(), ID, revision)
    return found | {"README.md": card.encode()}


def test_what_arrives_is_what_was_there_and_opens_by_its_id(run, hub, model):
    (model / "metrics.jsonl").write_text("{}")
    (model / "events.out.tfevents.1").write_text("x")
    (model / "checkpoints").mkdir()
    status, out, err = run("push", model, ID, "--message", "First")
    assert status == 0 and "error" not in err and "/org/name/commit/" in out
    assert "not sent: checkpoints, events.out.tfevents.1, metrics.jsonl" in out
    assert held(hub) == {n: c for n, c in expected(model).items() if n in FILES}
    ((_, _, lines),) = hub.commits
    assert lines[0]["value"]["summary"] == "First"
    kinds = {line["value"]["path"]: line["key"] for line in lines[1:]}
    assert kinds["model.safetensors"] == "lfsFile" and kinds["config.json"] == "file"
    assert ID not in hub.private
    loaded, params = vivit_jax.from_pretrained(ID)
    first, second = vivit_jax.from_pretrained(model)
    assert loaded == first and vivit_jax.VideoProcessor.from_pretrained(ID) == PROCESSOR
    np.testing.assert_array_equal(params["head"]["kernel"], second["head"]["kernel"])
    assert 'from_pretrained("org/name")' in held(hub)["README.md"].decode()
    assert 'from_pretrained(".")' in (model / "README.md").read_text()  # here it stays


def test_a_branch_is_made_and_a_new_repository_may_be_private(run, hub, model):
    status, out, _ = run("push", model, ID, "--private", "--revision", "v1")
    assert status == 0 and ID in hub.private and "(new repository)" in out
    assert held(hub, "v1") == expected(model, "v1") and held(hub) == {}
    assert run("push", model, ID, "--private", "--revision", "v1")[0] == 0  # both are there now
    assert f'open it with vivit_jax.from_pretrained("{ID}@v1")' in out
    vivit_jax.from_pretrained(f"{ID}@v1")


def test_weights_of_an_earlier_push_leave_with_the_new_ones(run, hub, model, tmp_path):
    """Readers would take the old file, not the new shards; the old processor, not the new one."""
    assert run("push", model, ID)[0] == 0
    nested = {"image_processor": json.loads((model / "preprocessor_config.json").read_text())}
    place = hub.repositories[ID]["main"][1]
    (place / "processor_config.json").write_text(json.dumps(nested))
    opened = vivit_jax.from_pretrained(model)
    sharded = tmp_path / "sharded"
    vivit_jax.save_pretrained(sharded, *opened, PROCESSOR, max_shard_size="100KB")
    status, out, _ = run("push", sharded, ID)
    assert status == 0 and held(hub) == expected(sharded)
    assert "removed there, as the new files replace them: model.safetensors, processor_" in out
    assert same_tensors(read_safetensors(hub.repositories[ID]["main"][1]), read_safetensors(model))


def test_a_card_that_was_edited_on_the_hub_is_kept(run, hub, model):
    assert run("push", model, ID)[0] == 0
    place = hub.repositories[ID]["main"][1]
    (place / "README.md").write_text("---\nlicense: mit\n---\nmine")
    status, out, _ = run("push", model, ID)
    assert status == 0 and "the card on the hub was written by hand and is kept" in out
    assert held(hub)["README.md"] == b"---\nlicense: mit\n---\nmine"
    (model / "README.md").write_text("---\nlicense: mit\n---\nmine too")  # the user's own word
    assert run("push", model, ID)[0] == 0
    assert held(hub)["README.md"] == b"---\nlicense: mit\n---\nmine too"


def test_a_dry_run_says_what_would_go_and_connects_to_nothing(run, no_network, model):
    for extra in ("LICENSE", "picture.png", "of mine.webp", "video.mp4", "secret.png"):
        (model / extra).write_text("x")
    shown = "![one](./picture.png) <img src='of%20mine.webp'> !\\[no\\](secret.png) video.mp4"
    (model / "README.md").write_text(f"---\nlicense: mit\n---\n{shown}\n")
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    status, out, err = run("push", model, ID, "--dry-run", "--private")
    assert (status, err) == (0, "")
    for name in (*FILES, "LICENSE", "picture.png", "of mine.webp"):
        assert f"  {name}" in out
    assert "not sent: secret.png, video.mp4" in out
    assert f"{(model / 'model.safetensors').stat().st_size:,} bytes" in out
    assert "VideoMAEForVideoClassification" in out and "its weights fit its config" in out
    assert f"would go to {ID}, branch main; nothing was sent" in out
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before


def test_a_model_without_a_card_gets_one(run, hub, model):
    (model / "README.md").unlink()  # as transformers saves it
    assert run("push", model, ID)[0] == 0
    assert is_own(held(hub)["README.md"].decode()) and not (model / "README.md").exists()


def test_of_a_run_the_best_model_goes(run, hub, model, tmp_path):
    for step, score in ((4, 0.5), (8, 0.75), (12, 0.75), (16, None)):
        shutil.copytree(model, tmp_path / "run/models" / str(step))
        metadata = tmp_path / "run/checkpoints" / str(step) / "run/metadata"
        metadata.parent.mkdir(parents=True)
        metrics = {} if score is None else {"score": score}
        metadata.write_text(json.dumps({"metrics": metrics}))
    assert model_directory(tmp_path / "run") == tmp_path / "run/models/12"
    assert run("push", tmp_path / "run", ID)[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoints")  # to save room: no scores
    assert model_directory(tmp_path / "run") == tmp_path / "run/models/16"
    assert model_directory(tmp_path) == model  # what demo writes


def broken(model, kind):
    """Spoil a model so that it must not be published."""
    if kind == "no weights":
        (model / "model.safetensors").unlink()
    elif kind == "cut":
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[:-100])
    elif kind == "other classes":
        values = json.loads((model / "config.json").read_text())
        names = {str(i): f"LABEL_{i}" for i in range(7)}
        (model / "config.json").write_text(json.dumps(values | {"id2label": names, "label2id": {}}))
    elif kind == "pickle":
        (model / "model.safetensors").rename(model / "weights.safetensors")
    elif kind == "config path":
        values = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(values | {"note": "/home/me/data"}))
    elif kind == "card path":
        card = model / "README.md"
        card.write_text(card.read_text() + "\nTrained on /mnt/clips/ours.\n")
    elif kind == "card bytes":
        (model / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff")
    elif kind == "card yaml":
        (model / "README.md").write_text("---\nlicense: [mit\n---\n")
    elif kind == "card index":
        (model / "README.md").write_text("---\nmodel-index:\n- name: x\n---\n")
    else:
        (model / "README.md").write_text("# Mine\n")


WRONG = {
    "no weights": "holds no weights",
    "cut": "model.safetensors is not a complete",
    "other classes": "classifier.weight  got (5, 48), expected (7, 48)",
    "pickle": "is not what the hub takes for a model, model.safetensors beside config.json",
    "config path": "names a place on this machine, /home/me/data",
    "card path": "names a place on this machine, /mnt/clips/ours.",
    "card bytes": "README.md is not UTF-8",
    "card yaml": "the metadata between the lines --- is wrong",
    "card index": "the metadata between the lines --- is wrong",
    "card bare": "has no metadata for the hub",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_should_not_be_published_is_refused(run, no_network, model, kind):
    broken(model, kind)
    status, out, err = run("push", model, ID)
    assert status == 2 and not out and WRONG[kind] in err and "Traceback" not in err
    assert err.count("\n") == (4 if kind == "other classes" else 1)  # a line for each tensor


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("name", "is not a repository's name; expected org/name"),
        ("org/na--me", "is not a name that the hub takes"),
        ("org/name@v1", "names a revision; give it as --revision v1"),
        ("org/name/model.safetensors", "is not a repository's name; expected org/name"),
        ("https://huggingface.co/org/name", "is not a repository's name; expected org/name"),
    ],
)
def test_names_that_are_none(run, no_network, model, name, told):
    status, _, err = run("push", model, name)
    assert status == 2 and told in err and err.count("\n") == 1


@pytest.mark.parametrize("revision", ["", "a b", '"', "../x"])
def test_a_branch_that_is_none(run, no_network, model, revision):
    status, _, err = run("push", model, ID, f"--revision={revision}")
    assert status == 2 and "is not the name of a branch" in err and err.count("\n") == 1


def test_directories_that_are_no_models(run, no_network, tmp_path):
    (tmp_path / "run/models").mkdir(parents=True)
    (tmp_path / "run/checkpoints/8").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for place, told in (
        (tmp_path / "nothing", "is not a directory; expected a run, or a saved model"),
        (tmp_path / "empty", "holds no model: expected config.json and weights, or a run"),
        (tmp_path / "run", "has no model yet"),
        (tmp_path / "run/checkpoints/8", "state of training, which is not published; name the run"),
    ):
        status, _, err = run("push", place, ID)
        assert status == 2 and told in err and err.count("\n") == 1


def refusal(status, message, **headers):
    return status, {"X-Error-Message": message, **headers}, json.dumps({"error": message})


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        (
            {"create": refusal(403, "You don't have the rights to create a model")},
            "org/name: the token may not write there: You don't have the rights",
        ),
        ({"create": refusal(404, "no such organisation")}, "is org a user or an organisation?"),
        ({"create": refusal(429, "slow down")}, "the hub answered 429"),
        ({"commit": refusal(500, "oh")}, "the hub answered 500"),
        ({"commit": refusal(412, "a commit has happened since")}, "has happened since; push again"),
        ({"commit": (200, {}, "{}")}, "answer is not understood (KeyError"),
        ({"create": (200, {}, "[]")}, "answer is not understood"),
        ({"commit": refusal(403, "gone")}, "the token may not write there: gone"),
        ({"/lfs/": refusal(403, "signature")}, "the token may not write there"),
        (
            {"validate-yaml": (400, {}, '{"errors": [{"message": "bad licence"}]}')},
            "org/name cannot be sent: Invalid metadata in README.md. - bad licence",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(run, hub, model, monkeypatch, fails, told):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries
    hub.fails.update(fails)
    status, _, err = run("push", model, ID)
    *bars, line = err.splitlines()
    assert status == 2 and told in line and TOKEN not in err
    assert all(bar.startswith("model.safetensors: ") for bar in bars if bar)


def test_tokens(run, hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    status, _, err = run("push", model, ID)
    assert status == 2 and "the hub does not accept the token" in err and "hf_other" not in err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    status, _, err = run("push", model, ID)
    assert status == 2 and "no token is set; set HF_TOKEN, or log in with `hf auth login`" in err
    assert hub.repositories == {}


def test_a_public_repository_does_not_become_private(run, hub, model):
    assert run("push", model, ID)[0] == 0
    status, _, err = run("push", model, ID, "--private")
    assert status == 2 and "is public, so --private would not hide what is sent" in err
    assert len(hub.commits) == 1


def test_no_network_and_no_extra(run, hub, model, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    status, _, err = run("push", model, ID)
    assert status == 2 and "the hub cannot be reached: " in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for flags in ((), ("--dry-run",)):
        status, _, err = run("push", model, ID, *flags)
        assert status == 2 and "pip install" in err and "hub" in err


@pytest.mark.slow
def test_a_process_of_its_own_takes_the_hub_and_the_token_from_the_environment(model, tmp_path):
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub", token=TOKEN) as server:
        done = subprocess.run(
            [sys.executable, "-m", "vivit_jax.cli", "push", str(model), ID],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_ENDPOINT": server.address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_TOKEN": TOKEN,
            },
        )
        assert done.returncode == 0 and "published:" in done.stdout, done.stderr
        assert held(server.handler) == expected(model)
