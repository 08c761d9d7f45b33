# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON: sound values, and one line for whatever else a file may hold."""

import json
import os

import pytest

from vivit_jax.errors import CheckpointError, ConfigError, UserError
from vivit_jax.files.json_files import MAX_DEPTH, parse_json, read_json


def test_values_as_the_json_module_reads_them(tmp_path):
    values = {
        "a": [1, -2.5, None, True, "é\u0000"],
        "big": 2**64 - 1,
        "small": -(2**63),
        "e": 1e300,
    }
    path = tmp_path / "values.json"
    path.write_text(json.dumps(values))
    assert read_json(path) == values
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(nested, "it") == json.loads(nested)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting property name"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested deeper than 64 levels"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64 levels"),
        ("1" + "0" * 400, "integer 1000000000000000000000000000000000000000... of 401 characters"),
        ("1" + "0" * 10_000, "of 10001 characters is beyond 64 bits"),
        (str(2**64), "the integer 18446744073709551616 is beyond 64 bits"),
        ("-1e999", "the number -1e999 is beyond float64"),
    ],
)
def test_text_that_is_refused_in_one_line(text, told, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for error in (ConfigError, CheckpointError):
        with pytest.raises(error) as raised:
            read_json(path, error, "write it again")
        message = str(raised.value)
        assert message.startswith(f"{path} is not valid JSON: ") and told in message
        assert message.endswith("; write it again") and len(message.splitlines()) == 1


def test_what_is_no_file_or_too_long(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="is a directory, expected a JSON file"):
        read_json(tmp_path, ConfigError)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(UserError, match="fifo: a FIFO"):
            read_json(tmp_path / "fifo")
    path = tmp_path / "long.json"
    path.write_text("[" + "0," * 10_000 + "0]")
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", "1000000")
    with pytest.raises(UserError, match="would take 1,100,.* VIVIT_JAX_UNPACK_LIMIT=1100"):
        read_json(path)
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", "1200000")
    assert len(read_json(path)) == 10_001
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", "1GB")
    with pytest.raises(UserError, match="VIVIT_JAX_UNPACK_LIMIT is '1GB', expected a positive"):
        read_json(path)
