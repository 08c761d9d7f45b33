# SPDX-License-Identifier: Apache-2.0
import errno
import os
import tempfile

import pytest

from vivit_jax.errors import UserError
from vivit_jax.files.atomic import check_directory, check_output, whole_file


def told(check, *args, **options):
    with pytest.raises(UserError) as caught:
        check(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "\u89c6" * 83 + ".txt"])
def test_a_name_as_long_as_the_file_system_takes(tmp_path, name):
    path = tmp_path / name
    check_output(path, (".txt",), overwrite=False)
    with whole_file(path) as partial:
        partial.write_text("whole")
        assert partial.suffix == ".txt" and tmp_path in partial.parents
    assert path.read_text() == "whole" and os.listdir(tmp_path) == [name]


def test_files_of_long_names_have_names_of_their_own_meanwhile(tmp_path):
    first, second = (tmp_path / f"{'a' * 100}{i}.txt" for i in range(2))
    with whole_file(first) as one, whole_file(second) as two:
        assert one != two
        one.write_text("1")
        two.write_text("2")
    assert first.read_text() == "1" and second.read_text() == "2"


def test_check_output_leaves_nothing(tmp_path):
    check_output(tmp_path / "a.txt", (".txt",), overwrite=False)
    check_directory(tmp_path / "b" / "c", ["a.txt"])
    check_directory(tmp_path, ["a.txt"])
    assert not list(tmp_path.iterdir())


def test_check_output_refuses_what_cannot_be_written(tmp_path):
    (tmp_path / "a").write_text("mine")
    (tmp_path / "d.txt").mkdir()
    for name, message in {
        "a/b.txt": f"{tmp_path}/a is a file; expected a directory",
        "d.txt": "d.txt is a directory; expected a file name",
        "n/b.txt": f"there is no directory {tmp_path}/n; make it first",
        "a" * 252 + ".txt": "File name too long; choose another name",
    }.items():
        assert message in told(check_output, tmp_path / name, (".txt",), overwrite=True)


def test_a_file_system_that_takes_no_files(tmp_path, monkeypatch):
    def read_only(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    message = f"no file can be made in {tmp_path} (Read-only file system); choose another place"
    assert message in told(check_output, tmp_path / "a.txt", (".txt",), overwrite=True)
    assert message in told(check_directory, tmp_path / "b", ["a.txt"])
