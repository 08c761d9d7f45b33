"""Topologies are parsed, and wrong ones refused, before a compiler is loaded."""

import dataclasses
import importlib.util

import jax
import pytest
from compilers import needs_cuda_plugin, needs_libtpu

from vivit_jax.errors import MissingExtra, UserError
from vivit_jax.train.planning.hardware import CHIPS, compile_only_devices, parse_topology
from vivit_jax.train.sharding import make_mesh, parse_mesh


@pytest.mark.parametrize(
    ("text", "slices", "count", "hosts"),
    [
        ("v5e:1x1", 1, 1, 1),
        ("v5e:2x4", 1, 8, 2),
        ("v5e:8x8", 2, 128, 32),
        ("v4:2x2x1", 1, 4, 1),
        ("v5p:4x4x4", 1, 64, 16),
        ("v6e:16x16", 1, 256, 64),
        ("a100:4", 1, 4, 1),
        ("h100:16", 1, 16, 2),
    ],
)
def test_topologies(text, slices, count, hosts):
    found = parse_topology(text, slices)
    assert (found.count, found.hosts, found.chip) == (count, hosts, CHIPS[found.kind])


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v7x:2x2", 1, "got 'v7x', expected one such as v4:4x4x4, v5e:8x8, .*h100:8"),
        ("", 1, "expected one such as"),
        ("v5e", 1, "'' is not a shape"),
        ("v5e:8x", 1, "'8x' is not a shape"),
        ("v5e:0x8", 1, "'0x8' is not a shape"),
        ("v5e:\u0662x\u0662", 1, "is not a shape"),
        (f"v5e:{'9' * 5000}x2", 1, "is not a shape"),
        ("v5e:8", 1, "a slice of v5e has 2 sides, got 1; for example v5e:4x4"),
        ("v5p:8x8", 1, "a slice of v5p has 3 sides, got 2; for example v5p:4x4x4"),
        ("v5e:3x4", 1, "2x2 chips, which 3x4 are not made of"),
        ("v6e:32x32", 1, "1024 chips, and a slice of v6e at most 256"),
        ("h100:12", 1, "up to 8 or a multiple of the 8"),
        ("h100:2x8", 1, "up to 8 or a multiple of the 8"),
        ("h100:8", 2, "--slices 2: h100 has none"),
        ("v5e:8x8", 0, "--slices 0: expected 1 or more$"),
    ],
)
def test_what_is_no_topology(text, slices, message):
    with pytest.raises(UserError, match=message) as told:
        parse_topology(text, slices)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("text", "extra"), [("v5e:2x2", "plan"), ("h100:8", "cuda")])
def test_a_compiler_that_is_missing(text, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf"pip install .*\[{extra}\]"):
        compile_only_devices(parse_topology(text))


def test_a_process_that_has_an_accelerator_already(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match="already computes on gpu.*JAX_PLATFORMS=cpu"):
        compile_only_devices(parse_topology("h100:8"))


@pytest.mark.parametrize("kind", [k for k, c in CHIPS.items() if c.platform == "tpu"])
@needs_libtpu
def test_devices_of_tpus(kind):
    topology = parse_topology(f"{kind}:{'x'.join(['2'] * CHIPS[kind].dimensions)}", slices=2)
    devices = compile_only_devices(topology)
    assert (len(devices), {d.platform for d in devices}) == (topology.count, {"tpu"})
    assert len({d.process_index for d in devices}) == topology.hosts
    assert {d.slice_index for d in devices} == {0, 1}


@needs_libtpu
def test_slices_lie_along_data():
    topology = parse_topology("v5e:2x4", slices=2)
    devices = compile_only_devices(topology)
    mesh = make_mesh(parse_mesh("data=4,fsdp=4", 16), devices)
    assert mesh.shape == dict(data=4, fsdp=4, tensor=1)
    slices = [{d.slice_index for d in row.flat} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    for text, message in (
        ("fsdp=16", "does not divide 2 slices"),
        ("data=2,tensor=8", "cannot share"),
    ):
        with pytest.raises(UserError, match=message):
            make_mesh(parse_mesh(text, 16), devices)


@needs_libtpu
def test_a_mesh_that_does_not_lie_on_a_torus():
    devices = compile_only_devices(parse_topology("v5p:4x4x4"))
    assert make_mesh(parse_mesh("data=4,fsdp=16", 64), devices).shape["fsdp"] == 16
    with pytest.raises(UserError, match="whole sides of their torus") as told:
        make_mesh(parse_mesh("data=2,fsdp=32", 64), devices)
    assert "\n" not in str(told.value)


@needs_libtpu
def test_what_the_compiler_refuses_is_one_line():
    odd = dataclasses.replace(parse_topology("v5e:2x2"), sizes=(3, 2))
    with pytest.raises(UserError, match="its compiler says: .*3x2"):
        compile_only_devices(odd)


@pytest.mark.parametrize("kind", [k for k, c in CHIPS.items() if c.platform == "gpu"])
@needs_cuda_plugin
def test_devices_of_gpus(kind):
    devices = compile_only_devices(parse_topology(f"{kind}:8"))
    assert len(devices) == 8 and {d.platform for d in devices} == {"gpu"}
    assert CHIPS[kind].name in str(devices[0])
