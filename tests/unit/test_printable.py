# SPDX-License-Identifier: Apache-2.0
"""Names, labels and messages from files cannot steer a terminal; odd ids are one line."""

import io
import logging
import os
import sys

import pytest

import vivit_jax
from vivit_jax.cli.predict import _as_text
from vivit_jax.console import run
from vivit_jax.errors import CheckpointError, UserError, printable, quoted
from vivit_jax.hub import HubId, hub_id
from vivit_jax.progress import LiveLine

STEERING = "\x1b[2Jx\x07\x9b1m\u202e\u2028\x7f\r"
ESCAPED = r"\u001b[2Jx\u0007\u009b1m\u202e\u2028\u007f\u000d"


def test_control_characters_are_escapes():
    assert printable(STEERING) == ESCAPED
    assert printable("a\tb\nc é 名 \u200d") == "a\tb\nc é 名 \u200d"
    assert printable("a\tb\nc", one_line=True) == r"a\u0009b\u000ac"
    assert len(quoted("x" * 5000)) == 203 and quoted("a\nb") == r"a\u000ab"


def test_what_a_command_prints(capsys, monkeypatch):
    def show(fail: bool = False) -> None:
        """Print a label."""
        logging.getLogger("x").warning("warned %s", STEERING)
        print(f"label {STEERING}\nnext")
        if fail:
            raise UserError(f"damaged: {STEERING}")

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert run("tool", "Shows.", {"show": show, "other": show}, ["show"]) == 0
    out, err = capsys.readouterr()
    assert out == f"label {ESCAPED}\nnext\n" and err == f"warned {ESCAPED}\n"
    assert run("tool", "Shows.", {"show": show, "other": show}, ["show", "--fail"]) == 2
    assert capsys.readouterr().err.endswith(f"tool: error: damaged: {ESCAPED}\n")
    assert not isinstance(sys.stdout, io.StringIO)  # the stream is as it was


def test_labels_and_clips_are_one_line_each():
    best = {"score": 0.5, "label": f"{STEERING}\nfake 1.0"}
    text = _as_text({"clip": f"a\n{STEERING}", "frames": [0, 1], "predictions": [best]})
    assert len(text.splitlines()) == 2 and "\x1b" not in text and ESCAPED in text


def test_a_live_line_s_texts():
    stream = io.StringIO()
    line = LiveLine("clips", 2, stream=stream)
    line.update(2, STEERING)
    line.say(STEERING)
    assert stream.getvalue() == f"clips 2/2  {ESCAPED}\n{ESCAPED}\n"


@pytest.mark.parametrize(
    "source",
    [
        "org/name/../x.bin", "org/name/./x.bin", "org/name//x.bin", "org/name/a/../../x.bin",
        "org/name@../../x", "org/name@..", "org/na me", "org/na\nme", "org/name\n", "o\0rg/name",
        "a" * 3000, "org/" + "a" * 3000, "org/name@" + "r" * 3000, "\x1b[31mred/x",
        "org/name/" + "d/" * 800 + "x.bin",
    ],
)  # fmt: skip
def test_ids_that_are_none(source):
    assert hub_id(source) is None
    for read in (vivit_jax.from_pretrained, vivit_jax.VideoProcessor.from_pretrained):
        with pytest.raises(CheckpointError, match="does not exist, and is not a hub id") as raised:
            read(source)
        message = str(raised.value)
        assert len(message) < 400 and message == printable(message, one_line=True)


def test_ids_that_are_some():
    assert hub_id("org/name@refs/pr/1") == HubId("org/name", None, "refs/pr/1")
    assert hub_id("a/b.c-d/e.f/g.h.pth@v1.0") == HubId("a/b.c-d", "e.f/g.h.pth", "v1.0")
    assert hub_id(f"{'o' * 96}/{'n' * 96}") == HubId("o" * 96 + "/" + "n" * 96)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint", "x.pth", "pytorch_model.bin"])
def test_a_directory_or_a_fifo_in_the_place_of_weights(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is a directory, expected a file"):
        vivit_jax.from_pretrained(tmp_path)
    if hasattr(os, "mkfifo"):
        (tmp_path / name).rmdir()
        os.mkfifo(tmp_path / name)
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(CheckpointError, match=f"{name}: a FIFO"):
                vivit_jax.from_pretrained(path)


def test_a_directory_in_the_place_of_a_config(tmp_path):
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(vivit_jax.ConfigError, match="config.json is a directory, expected a JSON"):
        vivit_jax.from_pretrained(tmp_path)
