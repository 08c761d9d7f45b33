# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax pack` at the command line, and its shards in other commands."""

import json
import os
import re
import signal
import sys
import tempfile

import numpy as np
import pytest
from clips import write_clip
from commands import run_command

from vivit_jax.cli import pack as command
from vivit_jax.cli.pack import parse_size
from vivit_jax.data.datasets.dataset import read_dataset
from vivit_jax.data.packing import pack as packing
from vivit_jax.errors import UserError
from vivit_jax.files.parts import part_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of four clips each."""
    path = tmp_path_factory.mktemp("data")
    for label, name in enumerate(("run", "walk")):
        (path / name).mkdir()
        for k in range(4):
            write_clip(path / name / f"{k} {name}.mp4", 24 + k + 9 * label)
    return path


def run(capsys, *args):
    return run_command(capsys, "pack", *args)


def test_a_pack_is_written_checked_and_named(data, tmp_path, capsys):
    out = tmp_path / "shards"
    status, said, errors = run(capsys, data, out, "--threads", "2")
    assert status == 0 and errors == ""
    size = (out / "shards-000000.tar").stat().st_size / 1e6
    assert said == f"{out}: 8 clips in 1 shard, {size:.1f} MB\n"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(capsys, data, out)[0] == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for name in ("", "manifest.json", "shards-000000.tar", "shards-{000000..000000}.tar"):
        source = out / name
        status, said, _ = run_command(
            capsys, "check-data", source, "--frames", "8", "--stride", "1", "--json", "-"
        )
        found = json.loads(said)
        assert status == 0 and found["trains"], found
        assert [each["name"] for each in found["classes"]] == ["run", "walk"]


@pytest.mark.parametrize("container", ["tar", "arrayrecord"])
def test_checksums_find_what_decoding_does_not(tmp_path, capsys, container):
    """A bit of a pixel of an array is turned over."""
    rng, data, out = np.random.default_rng(0), tmp_path / "data", tmp_path / "packed"
    for name in ("a", "b"):
        (data / name).mkdir(parents=True)
        for k in range(4):
            np.save(data / name / f"{k}.npy", rng.integers(0, 255, (9, 16, 16, 3), np.uint8))
    assert run(capsys, data, out, "--format", container)[0] == 0
    checked = ("check-data", out, "--frames", "8", "--stride", "1", "--checksums")
    status, said, _ = run_command(capsys, *checked)
    assert status == 0 and "other content" not in said
    path = read_dataset(out).examples[5].path
    shard = out / f"packed-000000.{container}"
    content = bytearray(shard.read_bytes())
    content[part_of(path).start + 3000] ^= 1
    shard.write_bytes(content)
    status, said, _ = run_command(capsys, *checked)
    assert status == 0 and "warning  1 clip of other content than was packed" in said
    assert path in said
    status, _, errors = run_command(capsys, "check-data", data, "--checksums")
    assert status == 2 and "has no checksums; expected a pack that vivit-jax pack wrote" in errors


def test_shards_that_are_not_there_stop_training(tmp_path, capsys):
    for name in ("k-{0..3}.tar", "k.tfrecord@4"):
        status, said, _ = run_command(capsys, "check-data", tmp_path / name)
        assert status == 1 and "4 shards are missing, such as" in said and "would stop" in said


def test_ctrl_c_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "pack", interrupted)
    module = sys.modules["vivit_jax.console.run"]  # a function hides it
    monkeypatch.setattr(module, "stopped_by", lambda name: 128 + signal.SIGINT)
    status, _, errors = run(capsys, data, tmp_path / "out")
    assert status == 130 and "the same command goes on with the next" in errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_it_leaves_only_finished_shards(
    data, tmp_path, capsys, monkeypatch, name
):
    """Such as a scheduler's, which would otherwise leave a shard in TMPDIR each time."""
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp))
    added, number = packing._added, signal.Signals[name]
    before = signal.getsignal(number)

    def ending(shard, dataset, member):
        if member.index == 5:
            os.kill(os.getpid(), number)
        return added(shard, dataset, member)

    monkeypatch.setattr(packing, "_added", ending)
    # Each clip is a shard, and smaller than the least size of one.
    monkeypatch.setattr(command, "parse_size", lambda text: 1)
    status, _, errors = run(capsys, data, tmp_path / "out", "--resize", "32")
    assert status == 128 + number and "the same command goes on with the next" in errors
    assert signal.getsignal(number) == before and not [*tmp.iterdir()]
    shards = [f"out-{k:06}.tar" for k in range(5)]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([*shards, *(f"{shard}.json" for shard in shards)])


def test_sizes():
    assert parse_size("256MiB") == 256 * 2**20 and parse_size("1.5 gb") == 1_500_000_000
    assert parse_size("2000000") == 2_000_000
    for wrong in ("10", "-1MiB", "1TiBs", "", "MiB", "nan"):
        with pytest.raises(UserError, match="^--shard-size is .*; expected bytes, such as 256MiB"):
            parse_size(wrong)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["DATA", "OUT", "--shard-size", "10"], "--shard-size is 10; expected bytes, such as"),
        (["DATA", "OUT", "--resize", "8"], "--resize is 8; expected an even number of pixels"),
        (["DATA", "OUT", "--resize", "225"], "--resize is 225; expected an even number"),
        (["DATA", "OUT", "--threads", "0"], "--threads is 0; expected 1 to 1024"),
        (["DATA", "OUT", "--threads", "99999"], "--threads is 99999; expected 1 to 1024"),
        (["DATA", "OUT", "--max-bad-share", "2"], "--max-bad-share is 2; expected a share"),
        (["DATA", "DATA/shards"], "lies in DATA .*; choose a directory outside it"),
        (["DATA", "DATA/run/0 run.mp4"], "lies in DATA"),
        (["nowhere", "OUT"], "nowhere: no such|nowhere: .*No such file"),
        (["DATA", "https://x.org/pack"], "https://x.org/pack"),
        (["DATA", "OUT.tar"], r"out.tar ends in .tar; expected the name of a directory"),
    ],
)
def test_wrong_inputs(data, tmp_path, capsys, args, message):
    args = [a.replace("DATA", str(data)).replace("OUT", str(tmp_path / "out")) for a in args]
    args = [str(tmp_path / a) if a == "nowhere" else a for a in args]
    status, said, errors = run(capsys, *args)
    assert status == 2 and said == "" and len(errors.splitlines()) == 1, errors
    assert re.search(message, errors), errors
    assert not (tmp_path / "out").exists() and not (data / "shards").exists()
