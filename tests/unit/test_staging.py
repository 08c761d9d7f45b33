# SPDX-License-Identifier: Apache-2.0
"""Files that take their places together, whenever their writer is killed."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from full_disk import file_size

from checkpoints_convert.files.open import open_checkpoint
from checkpoints_convert.files.save import replaced_directory, write_weights
from checkpoints_convert.files.tensors import LazyTensor
from checkpoints_convert.layouts.hf import read_config
from vivit_jax.errors import CheckpointError, ConfigError, UserError, WriteError
from vivit_jax.files.atomic import whole_file, whole_files
from vivit_jax.files.staging import Staging, clear_leftovers, leftovers, names_in

# Writes once for each place where a writer can be killed: before and after every rename, and at
# every file that is brought to the disk.
KILLED = textwrap.dedent("""
    import json, os, signal, sys
    from pathlib import Path
    from checkpoints_convert.files.save import replaced_directory
    from vivit_jax.files.atomic import whole_file, whole_files

    def model(target):
        with replaced_directory(target, overwrite=True) as new:
            (new / "config.json").write_text("new")
            (new / "model.safetensors").write_text("new")
            (new / "preprocessor_config.json").write_text("new")

    def export(target):
        with whole_files(target / "m.stablehlo", target / "m.json", drop=[target / "m.bin"]) as new:
            for path in new:
                path.write_text("new")

    def one(target):
        with whole_file(target / "a.json") as new:
            new.write_text("new")

    write = {"model": model, "new model": model, "export": export, "one file": one}[sys.argv[1]]
    root, setup = Path(sys.argv[2]), json.loads(sys.argv[3])
    for point in range(1, 200):
        target = root / str(point) / "out"
        target.parent.mkdir()
        if setup is not None:
            target.mkdir()
            for name, text in setup.items():
                (target / name).write_text(text)
        child = os.fork()
        if not child:
            calls = 0

            def dying(call):
                def counted(*args, **kwargs):
                    global calls
                    calls += 1
                    if calls == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = call(*args, **kwargs)
                    calls += 1
                    if calls == point:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result
                return counted

            os.fsync = lambda held: None  # which a process that is killed does not need
            for name in ("replace", "fsync", "mkdir", "rmdir", "unlink"):
                setattr(os, name, dying(getattr(os, name)))
            write(target)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            print(point - 1)
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
""")

OLD_MODEL = {
    "config.json": "old",
    "model-00001-of-00001.safetensors": "old",
    "model.safetensors.index.json": "old",
    "processor_config.json": "old",
    "notes.txt": "kept",
}
NEW_MODEL = dict.fromkeys(["config.json", "model.safetensors", "preprocessor_config.json"], "new")
OLD_EXPORT = dict.fromkeys(["m.stablehlo", "m.json", "m.bin"], "old")


def contents(directory):
    """What others see, None where there is no directory."""
    if not directory.is_dir():
        return None
    return {name: (directory / name).read_text() for name in names_in(directory)}


@pytest.mark.parametrize("names", [["a.json"], ["a.json", "b.bin"]])
def test_what_takes_its_place_is_on_the_disk(names, tmp_path, monkeypatch):
    """Contents before they are moved, and the directory's names afterwards."""
    done, sync, replace = [], os.fsync, os.replace

    def synced(held):
        done.append(("sync", os.fstat(held).st_ino))
        sync(held)

    def replaced(old, new):
        done.append(("move", os.lstat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    paths = [tmp_path / name for name in names]
    with whole_files(*paths) as partial:
        for path in partial:
            path.write_text("new")
    for path in paths:
        number = path.stat().st_ino
        assert done.index(("sync", number)) < done.index(("move", number))
    assert done[-1] == ("sync", tmp_path.stat().st_ino)


@pytest.mark.parametrize(
    ("what", "key", "old", "new"),
    [
        ("model", "config.json", OLD_MODEL, NEW_MODEL | {"notes.txt": "kept"}),
        pytest.param("model", "config.json", {}, NEW_MODEL, marks=pytest.mark.slow),
        pytest.param("new model", "config.json", None, NEW_MODEL, marks=pytest.mark.slow),
        ("export", "m.stablehlo", OLD_EXPORT, {"m.stablehlo": "new", "m.json": "new"}),
        ("one file", "a.json", {"a.json": "old"}, {"a.json": "new"}),
    ],
    ids=["a model over another", "an empty directory", "a new directory", "an export", "a file"],
)
def test_killed_at_every_point(tmp_path, caplog, monkeypatch, what, key, old, new):
    """Whole, old, or without its key file; and whole or old once the next writer has looked."""
    args = [sys.executable, "-c", KILLED, what, str(tmp_path), json.dumps(old)]
    done = subprocess.run(args, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    points = int(done.stdout)
    assert points >= 12
    monkeypatch.setattr(os, "fsync", lambda held: None)
    seen = {"old": 0, "new": 0, "neither": 0}
    for point in range(1, points + 1):
        target = tmp_path / str(point) / "out"
        found = contents(target)
        state = "old" if found == old else "new" if found == new else "neither"
        seen[state] += 1
        assert state != "neither" or key not in found, (point, found)
        caplog.clear()
        for directory in (target.parent, target):
            left = leftovers(directory)
            clear_leftovers(directory)
            assert not left or str(left[0]) in caplog.text
            assert not directory.exists() or os.listdir(directory) == names_in(directory)
        assert contents(target) == (new if state == "new" else old), point
        assert state == "new" or state != "neither" or "is back" in caplog.text or not old
    assert seen["old"] and seen["new"]
    assert bool(seen["neither"]) == (what in ("model", "export"))


def test_what_a_living_writer_writes_stays(tmp_path, caplog):
    with Staging(tmp_path) as first:
        (first.new / "a").write_text("1")
        clear_leftovers(tmp_path)
        with whole_file(tmp_path / "b") as second:
            second.write_text("2")
        assert (first.new / "a").exists() and leftovers(tmp_path) == []
        first.move_in("a")
    assert contents(tmp_path) == {"a": "1", "b": "2"} and not caplog.text
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_writer_in_another_process_is_known_by_its_lock(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from vivit_jax.files.staging import Staging\n"
        "with Staging(Path(sys.argv[1])) as s: print(s.new, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        new = Path(child.stdout.readline().strip())
        clear_leftovers(tmp_path)
        assert new.is_dir()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert leftovers(tmp_path) == [new.parent]
    clear_leftovers(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_reader_names_what_a_killed_writer_left(tmp_path):
    for read in (open_checkpoint, read_config):
        with pytest.raises((CheckpointError, ConfigError)) as told:
            read(tmp_path)
        assert "killed" not in str(told.value)
    staging = left_over(tmp_path)
    for read in (open_checkpoint, read_config):
        with pytest.raises((CheckpointError, ConfigError), match=f"{staging} was left by a writer"):
            read(tmp_path)


def left_over(directory, name="0" * 16, **plan):
    path = directory / f".vivit-jax.{name}.partial"
    for part in ("new", "old"):
        (path / part).mkdir(parents=True)
    if plan:
        (path / "swap.json").write_text(json.dumps(plan))
    return path


def test_names_that_were_planted(tmp_path, caplog, monkeypatch):
    """Neither links nor plans of others move or remove anything."""
    mine, elsewhere = tmp_path / "mine.txt", tmp_path / "elsewhere"
    mine.write_text("mine")
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    link = tmp_path / f".vivit-jax.{'1' * 16}.partial"
    link.symlink_to(elsewhere)
    escaping = left_over(tmp_path, key="k", out=[], **{"in": {"../mine.txt": mine.stat().st_ino}})
    (escaping / "new" / "k").touch()
    clear_leftovers(tmp_path)
    assert link.is_symlink() and (elsewhere / "kept").exists() and mine.exists()
    assert "cannot be put right: swap.json names files elsewhere" in caplog.text

    other = left_over(
        tmp_path, "2" * 16, key="k", out=[], **{"in": {"mine.txt": mine.stat().st_ino}}
    )
    (other / "new" / "k").touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    clear_leftovers(tmp_path)
    assert other.exists() and mine.read_text() == "mine"

    monkeypatch.undo()
    # A name that arrived, as this user's plan says, but not by this writer.
    (other / "swap.json").write_text(json.dumps({"key": "k", "out": [], "in": {"mine.txt": 1}}))
    clear_leftovers(tmp_path)
    assert not other.exists() and mine.read_text() == "mine"

    # The random part is taken: another one is drawn, for mkdir takes nothing that is there.
    drawn = iter(["1" * 16, "3" * 16])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(drawn))
    with whole_file(tmp_path / "b") as partial:
        assert partial.parts[-3] == f".vivit-jax.{'3' * 16}.partial"
        assert partial.parents[1].stat().st_mode & 0o777 == 0o700
        partial.write_text("b")
    assert (tmp_path / "b").read_text() == "b" and os.listdir(elsewhere) == ["kept"]


def test_a_directory_that_was_made_whole_since_is_left_alone(tmp_path, caplog):
    staging = left_over(
        tmp_path, key="config.json", out=["config.json"], **{"in": {"config.json": 1}}
    )
    (staging / "old" / "config.json").write_text("old")
    (staging / "new" / "config.json").write_text("new")
    (tmp_path / "config.json").write_text("by hand")
    clear_leftovers(tmp_path)
    assert contents(tmp_path) == {"config.json": "by hand"} and not staging.exists()
    assert "is back" not in caplog.text


def test_two_swaps_of_a_directory_do_not_mix(tmp_path, monkeypatch):
    import fcntl

    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr("vivit_jax.files.staging._PATIENCE", 0.1)
    waited = pytest.raises(UserError, match="another process has been writing to it for 0.1 s")
    with waited, whole_files(tmp_path / "a", tmp_path / "b") as new:
        for path in new:
            path.write_text("x")
    os.close(held)
    assert not os.listdir(tmp_path)


def test_a_swap_that_cannot_be_undone_keeps_the_old_files(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_text("old")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) > 2:
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    gone = pytest.raises(OSError, match="the disk is gone")
    with gone, whole_files(tmp_path / "a", tmp_path / "b") as new:
        for path in new:
            path.write_text("new")
    monkeypatch.undo()
    clear_leftovers(tmp_path)
    assert contents(tmp_path) == {"a": "old", "b": "old"}
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


# --- directories that are there already ------------------------------------------------------


@pytest.fixture
def model_directory(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    for name, text in OLD_MODEL.items():
        (path / name).write_text(text)
    return path


def overwrite(directory):
    with replaced_directory(directory, overwrite=True) as staged:
        (staged / "config.json").write_text("new")
        (staged / "model.safetensors").write_text("new")
        (staged / "preprocessor_config.json").write_text("new")


def test_the_directory_stays_with_its_mode_and_its_files_keep_theirs(model_directory):
    """Whoever is in it, has mounted it, or may write to it alone, finds it where it was."""
    model_directory.chmod(0o2710)
    (model_directory / "config.json").chmod(0o640)
    before = model_directory.stat()
    overwrite(model_directory)
    after = model_directory.stat()
    assert (after.st_ino, after.st_mode, after.st_uid) == (
        *(before.st_ino, before.st_mode, before.st_uid),
    )
    assert (model_directory / "config.json").stat().st_mode & 0o777 == 0o640
    assert contents(model_directory) == NEW_MODEL | {"notes.txt": "kept"}


def test_the_current_directory(model_directory, monkeypatch):
    monkeypatch.chdir(model_directory)
    overwrite(".")
    assert Path("config.json").read_text() == "new"
    assert contents(model_directory) == NEW_MODEL | {"notes.txt": "kept"}


def test_nothing_outside_of_a_directory_that_exists_is_touched(model_directory, monkeypatch):
    """Else a mount point fails, and a directory in one that is read-only."""

    def inside(call):
        def checked(*paths, **options):
            for path in paths:
                if isinstance(path, str | os.PathLike) and "dir_fd" not in options:
                    assert model_directory in Path(path).absolute().parents, (call, path)
            return call(*paths, **options)

        return checked

    for name in ("mkdir", "rename", "replace", "unlink", "chmod", "symlink", "link", "truncate"):
        monkeypatch.setattr(os, name, inside(getattr(os, name)))
    overwrite(model_directory)
    assert contents(model_directory) == NEW_MODEL | {"notes.txt": "kept"}


def test_a_writable_directory_in_one_that_is_read_only(monkeypatch):
    """As whoever is not root; as root another user is taken for the while."""
    with tempfile.TemporaryDirectory() as parent:
        target = Path(parent, "out")
        target.mkdir()
        (target / "config.json").write_text("old")
        root = os.geteuid() == 0
        if root:
            os.chown(target, 65534, -1)
            os.chown(target / "config.json", 65534, -1)
        os.chmod(parent, 0o555)
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                Path(parent, "other").mkdir()
            overwrite(target)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(parent, 0o755)
        assert contents(target) == NEW_MODEL


@pytest.mark.parametrize("there", ["a model", "an empty directory", "nothing"])
def test_a_disk_that_is_full_is_one_line_and_changes_nothing(model_directory, there):
    target = {"a model": model_directory}.get(there, model_directory.parent / "other")
    if there == "an empty directory":
        target.mkdir()
    before = os.listdir(target.parent), contents(target)
    zeros = np.zeros(100_000, np.float32)
    big = {"w": LazyTensor(zeros.shape, zeros.dtype, lambda: zeros)}
    full = pytest.raises(WriteError)
    with file_size(50_000), full as told, replaced_directory(target, overwrite=True) as staged:
        write_weights(staged, big)
    assert str(told.value) == (
        f"{target} cannot be written: File too large; make room, or choose another place"
    )
    assert (os.listdir(target.parent), contents(target)) == before
    assert not target.exists() or names_in(target) == os.listdir(target)
