# SPDX-License-Identifier: Apache-2.0
"""The files of JAX checkpoints, with flax and numpy as references in both directions."""

import io
import random
import tracemalloc
import zipfile
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize
from flax.traverse_util import flatten_dict

from checkpoints_convert.files import flax_files
from checkpoints_convert.files.flax_files import open_msgpack, open_npz, write_msgpack
from checkpoints_convert.files.open import open_checkpoint
from checkpoints_convert.files.tensors import LazyTensor
from vivit_jax.errors import CheckpointError

DTYPES = ("float32", "float64", "float16", ml_dtypes.bfloat16, "int64", "int32", "uint32", "bool")


def array(shape, dtype="float32"):
    return np.asarray(np.random.default_rng(0).standard_normal(shape) * 9).astype(dtype)


def arrays() -> dict:
    """All dtypes, a scalar, an empty array, a transposed one, and one of every width of length."""
    out = {f"{np.dtype(dtype).name}": array((2, 3), dtype) for dtype in DTYPES}
    out |= {"scalar": array(()), "empty": array((0, 4)), "transposed": array((3, 5)).T}
    return out | {f"long_{n}": array(n, "int8") for n in (1, 2, 250, 256, 65536)}


def tree() -> dict:
    return {
        "optimizer": {"target": {"params": arrays()}, "empty": {}, "none": None},
        "global_step": 12345,
        "scale": 0.5,
        "done": True,
        "numpy": {"scalar": np.float32(1.5), "step": np.int64(7), "bfloat16": jnp.bfloat16(2)},
        "complex": 1 + 2j,
        "text": "ViViT ü",
        "bytes": b"\x00\xff",
        "negative": -(2**40),
        "large": 2**64 - 1,
    }


def in_full(opened) -> dict[str, np.ndarray]:
    out = {name: tensor.read() for name, tensor in opened.items()}
    for name, tensor in opened.items():
        assert (out[name].shape, out[name].dtype) == (tensor.shape, tensor.dtype), name
    return out


def assert_same(got: dict[str, np.ndarray], wanted: dict) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        value = np.asarray(value, object if isinstance(value, str | bytes | None) else None)
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
        assert got[name].tolist() == value.tolist(), name


def refused(path, opener=open_checkpoint) -> str:
    with pytest.raises(CheckpointError) as error:
        opener(path)
    return str(error.value)


def saved(path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else msgpack_serialize(content))
    return path


# --- reading msgpack ---------------------------------------------------------------------------


def test_everything_that_flax_writes_is_read(tmp_path):
    path = saved(tmp_path / "model.msgpack", tree())
    wanted = flatten_dict(msgpack_restore(path.read_bytes()), sep="/")
    assert_same(in_full(open_msgpack(path)), wanted)
    assert {"optimizer/target/params/bfloat16", "global_step", "text"} <= wanted.keys()


def test_lists_and_integer_keys(tmp_path):
    path = tmp_path / "lists"
    data = {"a": [array(2), {"b": [1, 2]}, []], "layers": {0: 3}}
    # flax turns the lists of a train state into maps; those of a bare tree it leaves.
    for content in (msgpack_serialize(data), flax.serialization.to_bytes(data)):
        got = in_full(open_checkpoint(saved(path, content)).tensors)
        assert list(got) == ["a/0", "a/1/b/0", "a/1/b/1", "layers/0"]
        assert np.array_equal(got["a/0"], array(2)) and got["a/1/b/1"] == 2


@pytest.mark.parametrize("limit", [1, 8, 20, 1000])
def test_arrays_in_pieces(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)
    monkeypatch.setattr(flax_files, "MAX_CHUNK_SIZE", limit)
    data = {"params": arrays() | {"long_65536": array(300, "int8")}}
    theirs = msgpack_serialize(data, in_place=False)
    path = saved(tmp_path / "model.msgpack", theirs)
    wanted = {f"params/{k}": data["params"][k] for k in sorted(data["params"])}
    opened = open_msgpack(path)
    assert_same(in_full(opened), wanted)
    assert write_msgpack(tmp_path / "ours", opened).read_bytes() == theirs


def test_opening_reads_heads_only_and_reading_one_tensor(tmp_path, monkeypatch):
    shape, count = (1 << 20,), 16  # 64 MiB
    tensors = {f"params/{i}": np.full(shape, i, np.float32) for i in range(count)}
    path = write_msgpack(tmp_path / "model.msgpack", tensors)
    del tensors
    bytes_read = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            bytes_read.append(super().readinto(buffer))
            return bytes_read[-1]

    monkeypatch.setattr(Path, "open", lambda self, *_, **__: io.BufferedReader(Counted(self)))
    tracemalloc.start()
    try:
        opened = open_checkpoint(path).tensors
        assert tracemalloc.get_traced_memory()[1] < 2**20
        assert sum(bytes_read) < 2**19
        bytes_read.clear()
        assert (opened["params/7"].read() == 7).all()
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
        assert sum(bytes_read) < 5 * 2**20
    finally:
        tracemalloc.stop()


def test_every_truncation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 100)
    data = tree()
    data["optimizer"]["target"]["params"] = {
        "a": array((3, 2)),
        "b": array(40),
        "c": array((), "f2"),
    }
    content = msgpack_serialize(data)
    path = tmp_path / "model.msgpack"
    for keep in range(len(content)):
        assert f"{path} is not a complete msgpack file" in refused(saved(path, content[:keep]))
    assert "continues after" in refused(saved(path, content + b"\x00"))
    assert "copy or download it again" in refused(path)


def test_damage_is_refused_or_harmless(tmp_path):
    data = tree()
    data["optimizer"]["target"]["params"] = {"a": array((3, 2)), "b": array(40)}
    content = msgpack_serialize(data)
    random.seed(0)
    path = tmp_path / "model.msgpack"
    for _ in range(600):
        damaged = bytearray(content)
        for _ in range(random.choice((1, 1, 4))):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        try:
            in_full(open_msgpack(saved(path, bytes(damaged))))
        except CheckpointError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    "content",
    [b"\xc1" * 50, b"\x81\xa1a" * 5000, b"\x80\x80", b"\x81\xa1a\xdd\xff\xff\xff\xff", b"\x81\xc1"],
    ids=["no object", "endless depth", "two maps", "endless array", "no key"],
)
def test_garbage(tmp_path, content):
    assert "is not a complete msgpack file" in refused(saved(tmp_path / "x.msgpack", content))


def test_what_is_not_a_tree_of_arrays(tmp_path):
    path = tmp_path / "x.msgpack"
    assert "holds a single object (a msgpack array)" in refused(saved(path, [1, 2]))
    assert "holds a single object (a msgpack extension)" in refused(saved(path, array(2)))
    assert "holds a single object (a msgpack value)" in refused(saved(path, b"version https://"))
    assert "contains '/'" in refused(saved(path, {"a": {"b/c": 1}}))
    assert "the key 'a' of x/a occurs twice" in refused(
        saved(path, b"\x81\xa1x\x82\xa1a\x01\xa1a\x02")
    )
    other = msgpack.packb({"x": {"y": msgpack.ExtType(5, b"abc")}})
    assert "x/y is stored as msgpack extension 5" in refused(saved(path, other))
    assert "is not a string" in refused(saved(path, msgpack.packb({"x": {None: 1}})))
    float8 = {"w": np.zeros(2, ml_dtypes.float8_e4m3fn)}
    assert "w is stored as float8_e4m3fn; readable: float64" in refused(saved(path, float8))


def packed(*payload) -> bytes:
    return msgpack.packb({"w": msgpack.ExtType(1, msgpack.packb(payload))})


@pytest.mark.parametrize(
    "content",
    [
        packed((2,), "float32", bytes(9)),
        packed((-1, -2), "float32", bytes(8)),
        packed((2.0,), "float32", bytes(8)),
        packed((2,), None, bytes(8)),
        packed((2,), "float32", bytes(8), 1),
        packed((2,), "float32", "12345678"),
        packed(None, "float32", bytes(8)),
    ],
)
def test_arrays_that_contradict_themselves(tmp_path, content):
    assert "is not a complete msgpack file" in refused(saved(tmp_path / "x.msgpack", content))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": {"0": 7}},
        {"shape": {"0": -2, "1": -3}},
        {"shape": {"0": 2.5}},
        {"shape": 6},
        {"chunks": {"0": array(3), "2": array(3)}},
        {"chunks": {"0": array(3), "1": array(3, "int32")}},
        {"chunks": {"0": array(3), "1": 3}},
        {"chunks": {}},
        {"chunks": None},
    ],
    ids=str,
)
def test_pieces_that_contradict_themselves(tmp_path, change):
    pieces = {"0": array(3), "1": array(3)}
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 2, "1": 3}, "chunks": pieces}
    path = saved(tmp_path / "x.msgpack", {"w": whole})
    assert open_checkpoint(path).tensors["w"].read().shape == (2, 3)
    assert "is not a complete msgpack file" in refused(saved(path, {"w": whole | change}))


def test_file_that_shrinks_after_it_was_opened(tmp_path):
    path = saved(tmp_path / "x.msgpack", {"w": array(100)})
    tensor = open_msgpack(path)["w"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="shorter"):
        tensor.read()


# --- writing msgpack ---------------------------------------------------------------------------


def test_written_file_is_the_one_flax_writes(tmp_path):
    data = tree()
    del data["optimizer"]["empty"]  # a map without leaves has no names
    path = write_msgpack(tmp_path / "ours", flatten_dict(data, sep="/"))
    assert path.read_bytes() == msgpack_serialize(data, in_place=True)
    assert path.read_bytes() == flax.serialization.to_bytes(data)
    in_order = dict(sorted(flatten_dict(data, sep="/").items()))
    assert write_msgpack(path, in_order).read_bytes() == msgpack_serialize(data)


def test_lazy_tensors_are_read_one_at_a_time(tmp_path):
    log = []

    def lazy(name):
        return LazyTensor((2,), np.dtype("f4"), lambda: log.append(name) or array(2))

    names = ["b/x", "a/y", "b/z"]
    path = write_msgpack(tmp_path / "ours", {name: lazy(name) for name in names})
    assert log == ["b/x", "b/z", "a/y"]  # the order in the file
    assert list(open_msgpack(path)) == log


def test_what_was_opened_can_be_written_again(tmp_path):
    path = saved(tmp_path / "theirs", tree())
    opened = open_msgpack(path)
    again = open_msgpack(write_msgpack(tmp_path / "ours", opened))
    assert_same(in_full(again), in_full(opened))


def test_byte_order_and_jax_arrays(tmp_path):
    path = write_msgpack(tmp_path / "x", {"big": array(3).astype(">f4"), "jax": jnp.ones(2)})
    got = msgpack_restore(path.read_bytes())
    assert np.array_equal(got["big"], array(3)) and np.array_equal(got["jax"], np.ones(2))


def test_what_cannot_be_written(tmp_path):
    path = tmp_path / "x"
    for names in (("a", "a/b"), ("a/b", "a"), ("a/b/c", "a/b"), ("a/b", "a/b/c/d")):
        with pytest.raises(CheckpointError, match="every name must be a leaf"):
            write_msgpack(path, dict.fromkeys(names, 1))
    assert not path.exists()
    for value in (np.array(["text"]), np.zeros(2, "i4,f4"), np.array([None, 1])):
        with pytest.raises(CheckpointError, match=r"a/b is of dtype .*, expected one of float64"):
            write_msgpack(path, {"a/b": value})


# --- npz ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    path = tmp_path / "model.npz"
    data = arrays() | {"params/cls": array((1, 1, 8)), "big": array(3).astype(">f8")}
    save(path, **data)
    opened = open_checkpoint(path).tensors
    assert_same(in_full(opened), data | {"big": data["big"].astype("f8")})
    assert opened["bfloat16"].dtype == ml_dtypes.bfloat16
    assert opened["transposed"].read().tolist() == data["transposed"].tolist()


def test_npz_reads_headers_only(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, **{str(i): np.full(1 << 20, i, np.float32) for i in range(16)})
    tracemalloc.start()
    try:
        opened = open_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        assert (opened["7"].read() == 7).all()
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()


def test_npz_that_could_run_code_or_is_ambiguous(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, fine=array(2), odd=np.array([None, "x"], object))
    assert "odd.npy holds pickled Python objects" in refused(path)
    np.savez(path, a=array(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", b"")
    assert "or repeated names: a.npy, notes.txt" in refused(path)


def test_damaged_npz(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", a=array(50), b=array(()))
    content = (tmp_path / "good.npz").read_bytes()
    path = tmp_path / "bad.npz"
    for keep in range(0, len(content), 7):
        assert f"{path} is not a complete npz file" in refused(saved(path, content[:keep]))
    random.seed(0)
    for _ in range(400):
        damaged = bytearray(content)
        damaged[random.randrange(len(damaged))] ^= random.randrange(1, 256)
        try:
            in_full(open_npz(saved(path, bytes(damaged))))
            flax_files.looks_like_npz(path)
        except CheckpointError as error:
            assert str(path) in str(error)


# --- which file --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint_123", "vivit_base_k400", "ViT-B.v1"])
def test_kind_by_content(tmp_path, name):
    path = saved(tmp_path / name, {str(i): i for i in range(3)})
    assert list(open_checkpoint(path).tensors) == ["0", "1", "2"]
    for head in (b"\x81", b"\xde\x00\x01", b"\xdf\x00\x00\x00\x01"):  # of small and larger maps
        assert open_checkpoint(saved(path, head + b"\xa1a\x07")).tensors["a"].read() == 7
    with path.open("wb") as file:
        np.savez(file, a=array(3))
    assert np.array_equal(open_checkpoint(path).tensors["a"].read(), array(3))
    for content in (b"", b"PK\x03\x04 cut", b"model_checkpoint_path: 'x'"):
        message = refused(saved(path, content))
        assert "unknown kind of file; expected .safetensors, .bin" in message and "npz" in message


def test_newest_step_is_opened(tmp_path):
    for step in (9, 10, 100):
        saved(tmp_path / f"checkpoint_{step}", {"step": step})
    for name in ("checkpoint_101.tmp", "checkpoint_tmp", "checkpoint_102.orbax-checkpoint-tmp-1"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "events.out").write_bytes(b"log")
    assert open_checkpoint(tmp_path).path == tmp_path / "checkpoint_100"
    (tmp_path / "checkpoint_100").unlink()
    opened = open_checkpoint(tmp_path)
    assert opened.tensors["step"].read() == 10 and opened.files == (tmp_path / "checkpoint_10",)
    (tmp_path / "checkpoint_11").mkdir()
    message = refused(tmp_path)
    assert "checkpoint_11 is a directory, expected a file" in message and "to_bytes" in message


def test_directory_with_flax_files(tmp_path):
    for name in ("weights.msgpack", "flax_model.msgpack", "checkpoint_3", "checkpoint"):
        saved(tmp_path / name, {"a": 1})
        assert open_checkpoint(tmp_path).path.name == name
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is not a complete" in refused(tmp_path)


def test_directory_with_single_files(tmp_path):
    message = refused(tmp_path)
    for name in ("pytorch_model.bin", "checkpoint_<step>", "flax_model.msgpack", "*.npz"):
        assert name in message
    np.savez(tmp_path / "b.npz", a=array(2))
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]
    saved(tmp_path / "a.msgpack", {"a": 1})
    assert "several weight files: a.msgpack, b.npz; name one" in refused(tmp_path)


def test_files_that_would_unpack_to_much_more(tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    np.savez_compressed(path, w=np.zeros(10**6))
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", "1000000")
    with pytest.raises(CheckpointError, match="w.npy would take 8,000,128 bytes.*UNPACK_LIMIT=80"):
        open_npz(path)
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", "9000000")
    assert open_npz(path)["w"].read().shape == (10**6,)
    # A byte each in the file, an object each in memory.
    path = tmp_path / "checkpoint"
    path.write_bytes(b"\x81\xa1a\xdc\x20\x00" + b"\xc0" * 2**13)
    with monkeypatch.context() as patch:
        patch.setenv("VIVIT_JAX_UNPACK_LIMIT", "2000000")
        with pytest.raises(CheckpointError, match="values would take .* VIVIT_JAX_UNPACK_LIMIT"):
            open_msgpack(path)
    assert len(open_msgpack(path)) == 2**13


def test_names_of_several_lines_are_told_in_one(tmp_path):
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a\nb\x1b[2J", b"")
    with pytest.raises(CheckpointError, match=r"repeated names: a\\u000ab\\u001b\[2J; rewrite"):
        open_npz(path)
    path = tmp_path / "checkpoint"
    path.write_bytes(msgpack.packb({"a\nb/c": 1}))
    with pytest.raises(CheckpointError) as raised:
        open_msgpack(path)
    assert len(str(raised.value).splitlines()) == 1
