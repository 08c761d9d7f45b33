# SPDX-License-Identifier: Apache-2.0
"""torch's files: tensors of every kind as torch loads them, and damage and bombs in one line."""

import argparse
import io
import pickle
import random
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

from checkpoints_convert.files.open import open_checkpoint
from vivit_jax.errors import CheckpointError, UserError

DATA = "pytorch_model/data.pkl"


def state():
    w = torch.arange(24.0).reshape(4, 6)
    return {
        "plain": torch.ones(3),
        "shared": w,
        "view": w[1:, ::2].t(),
        "parameter": torch.nn.Parameter(w[0]),
        "empty": torch.zeros(0, 3),
        "expanded": torch.ones(1).expand(5, 5),
        "negative": torch._neg_view(w),
        "scalar": torch.tensor(2.0),
        "bfloat16": w.bfloat16(),
        "bool": torch.tensor([True, False]),
        "int64": torch.arange(4),
    }


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("checksums", [True, False])
def test_tensors_of_every_kind(tmp_path, archive, checksums):
    torch.serialization.set_crc32_options(checksums)
    try:
        path = tmp_path / "pytorch_model.bin"
        torch.save(state(), path, _use_new_zipfile_serialization=archive)
    finally:
        torch.serialization.set_crc32_options(True)
    opened = open_checkpoint(tmp_path).tensors
    assert list(opened) == list(state())
    for name, tensor in state().items():
        wanted = tensor.detach().resolve_neg()
        got = opened[name].read()
        assert got.shape == opened[name].shape == tuple(wanted.shape)
        assert str(got.dtype) == str(wanted.dtype).removeprefix("torch.")
        assert np.array_equal(got.astype(np.float64), wanted.double().numpy())


def archive_of(path, pickled: bytes, deflated: bool = False) -> None:
    """A file as torch writes it, around a pickle of one's own and one tensor of 16 bytes."""
    torch.save({"w": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in (parts | {DATA: pickled}).items():
            archive.writestr(name, data)


def refused(directory) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(directory)
    message = str(raised.value)
    assert str(directory / "pytorch_model.bin") in message and len(message.splitlines()) == 1
    return message


def test_compressed_entries_are_refused_before_they_are_unpacked(tmp_path):
    archive_of(tmp_path / "pytorch_model.bin", b"\x80\x02}." + b"\0" * 10**6, deflated=True)
    assert "data.pkl is compressed, which torch never writes" in refused(tmp_path)


def global_(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def laughs(begin: bytes, twice: bytes, levels: int = 40) -> bytes:
    """An object whose every level holds the one below twice."""
    out = b"\x80\x02" + begin + b"q\x00"
    for level in range(levels):
        out += twice.replace(b"?", bytes([level])) + b"q" + bytes([level + 1])
    return out


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("pickled", "told"),
    [
        (laughs(b"]", b"](h?h?e") + b".", "unfolds to"),
        (laughs(b"}", b"}(K\x00h?K\x01h?u") + b".", "unfolds to"),
        (laughs(b")", b"h?h?\x86") + b".", "unfolds to"),
        # The key of a map, which is hashed while it is loaded.
        (b"\x80\x02}" + laughs(b")", b"h?h?\x86")[2:] + b"K\x01s.", "unfolds to"),
        (b"\x80\x02}X\x01\x00\x00\x00w" + b"]" * 300 + b"a" * 299 + b"s.", "nested deeper"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00wh\x00s.", "a tree that contains itself"),
        (b"\x80\x02" + global_("__builtin__ bytearray") + b"J\xff\xff\xff\x7f\x85R.", "a number"),
        (b"\x80\x02" + global_("torch FloatStorage") + b"J\xff\xff\xff\x7f\x85R.", "a number"),
        (b"\x80\x02" + global_("torch Tensor") + b"J\xff\xff\xff\x7f\x85\x81.", "a number"),
        (
            b"\x80\x02" + global_("_codecs encode") + b"U\x04aaaaX\x03\x00\x00\x00hex\x86R.",
            "another encoding than latin1",
        ),
        (
            b"\x80\x02" + global_("numpy dtype") + b"X\x0b\x00\x00\x00V2000000000\x85R.",
            "another dtype than a plain number",
        ),
        (b"\x80\x02h\x05.", "takes a value that does not exist"),
        (b"\x80\x02K\x01\x86.", "takes a value that does not exist"),
    ],
)
def test_pickles_that_would_be_large_or_never_end(tmp_path, pickled, told, archive):
    path = tmp_path / "pytorch_model.bin"
    if archive:
        archive_of(path, pickled)
    else:  # behind the number, version and machine of torch before 1.6
        head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        path.write_bytes(b"".join(pickle.dumps(each, 2) for each in head) + pickled)
    assert told in refused(tmp_path)


def test_a_limit_that_can_be_raised(tmp_path, monkeypatch):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"numbers": list(range(5000)), "w": torch.ones(1).expand(10**5)}, path)
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", str(10**6))
    assert "set the environment's VIVIT_JAX_UNPACK_LIMIT=" in refused(tmp_path)
    monkeypatch.setenv("VIVIT_JAX_UNPACK_LIMIT", str(10**7))
    assert open_checkpoint(tmp_path).tensors["w"].read().shape == (10**5,)
    monkeypatch.delenv("VIVIT_JAX_UNPACK_LIMIT")
    torch.save({"w": torch.ones(1).expand(10**5, 10**5)}, path)
    assert "would take 40,000,000,000 bytes" in refused(tmp_path)


def test_values_that_scripts_leave_in_their_files_are_no_bombs(tmp_path):
    shared = {"a": torch.ones(2), "lr": np.float64(0.5), "raw": b"\xff\x00"}
    held = {"model": shared, "ema": shared, "args": argparse.Namespace(sizes=[(1, 2)] * 50)}
    for archive in (True, False):
        path = tmp_path / "pytorch_model.bin"
        torch.save(held, path, _use_new_zipfile_serialization=archive)
        opened = open_checkpoint(tmp_path).tensors
        assert opened["ema/lr"].read() == 0.5
        assert opened["model/raw"].read().item() == b"\xff\x00"
        assert opened["ema/a"].read().tolist() == [1, 1]


def local_header(data: bytes, name: str) -> int:
    """Where the local header of an entry begins."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.getinfo(name).header_offset


@pytest.mark.parametrize(
    ("field", "offset"),
    [("mark", 0), ("flags", 6), ("method", 8), ("crc", 14), ("name length", 26), ("extra", 28)],
)
@pytest.mark.parametrize("place", ["data/0", "data/1"])
def test_a_damaged_local_header(tmp_path, field, offset, place):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(50), "b": torch.ones(50)}, path)
    data = bytearray(path.read_bytes())
    at = local_header(bytes(data), f"pytorch_model/{place}") + offset
    data[at] ^= 1
    path.write_bytes(data)
    assert "is not a complete torch file" in refused(tmp_path)


def test_a_directory_that_gives_an_entry_another_place_or_checksum(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(50), "b": torch.ones(50)}, path)
    data = path.read_bytes()
    first, second = (data.rindex(f"pytorch_model/data/{i}".encode()) - 46 for i in (0, 1))
    swapped = bytearray(data)
    swapped[first + 42 : first + 46], swapped[second + 42 : second + 46] = (
        data[second + 42 : second + 46],
        data[first + 42 : first + 46],
    )
    path.write_bytes(swapped)
    assert "disagree" in refused(tmp_path)
    wrong = bytearray(data)
    wrong[first + 16] ^= 1  # its checksum
    path.write_bytes(wrong)
    opened = open_checkpoint(tmp_path).tensors
    with pytest.raises(CheckpointError, match="the checksum of pytorch_model/data/0 does not"):
        opened["a"].read()
    assert opened["b"].read().tolist() == [1] * 50


def test_a_damaged_tensor_is_found_as_it_is_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(state(), path)
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<2f", 22.0, 23.0))
    data[at] ^= 1
    path.write_bytes(data)
    opened = open_checkpoint(tmp_path).tensors
    for name in ("shared", "view", "parameter", "negative"):  # parts of the same damaged bytes
        with pytest.raises(CheckpointError, match=re.escape(f"{path} is damaged (the checksum")):
            opened[name].read()
    assert opened["plain"].read().tolist() == [1, 1, 1]
    path.write_bytes(data[:200])
    with pytest.raises(CheckpointError, match="has become shorter"):
        opened["int64"].read()


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_flipped_bits_never_give_other_numbers(tmp_path, count):
    whole = {f"layer.{i}.weight": torch.randn(3 + i, 4) for i in range(6)}
    path = tmp_path / "pytorch_model.bin"
    torch.save(whole, path)
    good, same = path.read_bytes(), 0
    for seed in range(count):
        drawn, data = random.Random(seed), bytearray(good)
        for _ in range(drawn.choice([1, 1, 2, 4])):
            data[drawn.randrange(len(data))] ^= 1 << drawn.randrange(8)
        path.write_bytes(data)
        try:
            read = {name: t.read() for name, t in open_checkpoint(tmp_path).tensors.items()}
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            continue
        assert read.keys() == whole.keys(), seed
        assert all(np.array_equal(read[name], whole[name].numpy()) for name in whole), seed
        same += 1
    assert 0 < same < count


def test_nothing_of_torch_but_its_public_loader(tmp_path, monkeypatch):
    """What torch changes below `torch.load` cannot end in its own errors here."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(state() | {"sparse": torch.eye(3).to_sparse()}, path)
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append((a, k)) or load(*a, **k))
    opened = open_checkpoint(tmp_path).tensors
    (((file,), options),) = loads
    assert options == {"map_location": "meta", "weights_only": True}
    assert len(file.getvalue()) < path.stat().st_size and isinstance(file, io.BytesIO)
    assert np.array_equal(opened["view"].read(), state()["view"].numpy())
    assert "not a dense tensor under a name: sparse" in str(opened["sparse"].read())


def test_an_archive_that_was_packed_again(tmp_path):
    """Records in another order, at other places: they are found by name, not by alignment."""
    path = tmp_path / "pytorch_model.bin"
    torch.save(state(), path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in reversed(parts.items()):
            archive.writestr(name, data)
    opened = open_checkpoint(tmp_path).tensors
    for name, tensor in state().items():
        wanted = tensor.detach().resolve_neg().double().numpy()
        assert np.array_equal(opened[name].read().astype(np.float64), wanted), name
