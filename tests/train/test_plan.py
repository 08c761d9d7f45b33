"""A plan says what the compiled step is, and its formulas are those that it prints."""

import dataclasses
import importlib.metadata
import json
import math
import re
import types

import jax
import pytest
from compilers import needs_cuda_plugin, needs_libtpu
from helpers import mostly_slow
from tiny import SMALL_VIVIT
from tiny_recipes import FINETUNE, PRETRAIN, changed

from vivit_jax.errors import UserError
from vivit_jax.layers.pallas import cycles
from vivit_jax.models.build import abstract_params
from vivit_jax.models.flops import forward_flops, recomputed_flops, step_flops
from vivit_jax.recipes import RECIPES, model_config, recipe_named
from vivit_jax.recipes.recipe import ModelSettings
from vivit_jax.train.planning import plan as plan_module
from vivit_jax.train.planning.compiled import Operation
from vivit_jax.train.planning.hardware import CHIPS, parse_topology
from vivit_jax.train.planning.hlo import Array
from vivit_jax.train.planning.least_memory import least_memory, refused
from vivit_jax.train.planning.meshes import all_meshes, cost, sensible_meshes, sent
from vivit_jax.train.planning.plan import Plan, plan, planned_setup, training_videos
from vivit_jax.train.planning.plan_text import describe, ranking
from vivit_jax.train.planning.step_costs import Moved, Part, kernel_seconds, link_bandwidth
from vivit_jax.train.planning.step_parts import PARTS, part_of
from vivit_jax.train.sharding import AXES, make_mesh, mesh_text, parse_mesh
from vivit_jax.train.start.initial_model import planned_model

ONE = parse_topology("v5e:1x1")
FOUR = parse_topology("v5e:2x2")
VIVIT = dataclasses.replace(
    FINETUNE,
    name="tiny-vivit",
    model=ModelSettings(
        preset="vivit-b-16x2-kinetics400",
        config=SMALL_VIVIT | dict(num_labels=4),
    ),
)


@pytest.fixture
def on_cpu(monkeypatch):
    """Topologies are of this machine's CPU devices, so that plans compile in a second."""
    monkeypatch.setattr(plan_module, "compile_only_devices", lambda t: jax.devices()[: t.count])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0")


def made(**fields):
    """A plan by hand: 4 chips of v5e, 30 ms of compute, 4 of kernels."""
    operation = Operation("fusion.1", "fusion", "jit(step)/mul", None, (), (), 5, 45_000_000, 0, 1)
    values = dict(
        recipe="some-kinetics400-pretrain",
        topology=FOUR,
        mesh=parse_mesh(None, 4),
        clips=64,
        videos=32,
        versions={"jax": "1", "libtpu": "2"},
        compile_seconds=3.0,
        peak=2**33,
        parameters=2**20,
        optimizer=2**21,
        arguments=2**22,
        temporaries=2**32,
        flops=10**12,
        recomputed=0,
        cycles=45_000_000,
        kernels={"attention": 12},
        kernel_seconds=4e-3,
        uncounted_kernels=0,
        parts=(Part("encoder MLP", 30e-3, 2**30),),
        moved=(
            Moved("all-reduce", ("data",), 3, 100, 200, 6e-3, 2e-3),
            Moved("all-gather", ("data", "fsdp"), 3, 100, 200, 40e-3, 40e-3),
        ),
        network_bytes=0,
        bytes=2**30,
        unknown_loops=0,
        operations=(operation,),
        epochs=100,
        epoch_videos=3200,
        text="HloModule",
    )
    return Plan(**values | fields)


def test_the_formulas():
    found = made()
    assert found.compute_seconds == pytest.approx(30e-3)
    # 4 ms of the all-reduce have nothing beside them; of 42 ms that have, 34 are hidden.
    assert found.waiting_seconds == pytest.approx(4e-3 + 8e-3)
    assert found.step_seconds == pytest.approx(46e-3)
    assert found.clips_per_second == pytest.approx(64 / 46e-3)
    assert found.host_videos_per_second == pytest.approx(32 / 46e-3)
    assert found.utilization == pytest.approx(1e12 / 197e12 / 46e-3)
    assert found.days == pytest.approx(100 * 100 * 46e-3 / 86400)
    assert made(epoch_videos=None).days is None
    hidden = made(moved=(Moved("all-gather", ("fsdp",), 1, 1, 1, 34e-3, 34e-3),))
    assert hidden.waiting_seconds == pytest.approx(0)
    between = made(moved=(Moved("all-reduce", ("data",), 1, 1, 1, None, 0.0),))
    assert between.waiting_seconds == 0


def test_the_text_has_the_figures():
    text = describe(made(unknown_loops=2))
    for expected in (
        "some-kinetics400-pretrain on v5e:2x2, 4 devices of 1 machine, mesh data=4",
        "estimate",
        "nothing was run",
        "jax 1, libtpu 2; compiled in 3 s",
        "peak 8.00 GiB of 16.00 GiB: it fits",
        "parameters 1.0 MiB, optimiser state 2.0 MiB, all arguments 4.0 MiB",
        "1.00 TFLOP",
        "step: 46.0 ms = compute + kernels + waiting",
        "compute 30.0 ms: 45,000,000 cycles, estimated by the compiler, at 1.5 GHz",
        "kernels 4.0 ms",
        "attention 12",
        "waiting 12.0 ms",
        "2 loops of unknown length",
        "MFU 11.0%, 1391 clips/s; 0.01 days for 100 epochs of 3,200 videos",
        "fusion.1: jit(step)/mul",
    ):
        assert expected in text, expected
    assert "--clips N" in describe(made(epoch_videos=None))
    gpu = describe(made(topology=parse_topology("h100:8")))
    assert "estimates no times" in gpu and "at most MFU" in gpu and "at least" in gpu
    between = (Moved("all-reduce", ("data",), 1, 1, 1, None, 0.0),)
    assert "between slices or machines: an unknown network" in describe(made(moved=between))
    assert "machines, 2.0 MiB a device: an unknown" in describe(made(network_bytes=2**21))
    assert "fusion.1" not in describe(made(), top=0)


def test_figures_of_a_small_step_are_not_zero():
    tiny = Operation("fusion.1", "fusion", "jit(step)/mul", None, (), (), 5, 600, 0, 1)
    text = describe(made(cycles=600, flops=2 * 10**8, moved=(), operations=(tiny,)))
    for expected in ("step: 4.0 ms", "compute 0.0004 ms", "step: 0.0002 TFLOP", "waiting 0.0 ms"):
        assert expected in text, expected
    assert text.splitlines()[-1].split()[-1] == "0.0004"


def test_the_figures_as_json():
    values = json.loads(json.dumps(made().to_dict()))
    assert values["estimate"] == "nothing was run" and values["topology"] == "v5e:2x2"
    assert values["step_seconds"] == made().step_seconds and values["devices"] == 4
    assert values["operations"][0]["part"] == "optimiser" and "text" not in values


def test_a_ranking():
    fast, slow = made(), made(mesh=parse_mesh("data=2,fsdp=2", 4), cycles=90_000_000)
    lines = ranking([fast, slow], {"tensor=4": "does not divide"}).splitlines()
    assert lines[1].startswith("data=4 ") and lines[2].startswith("data=2,fsdp=2 ")
    assert lines[3] == "tensor=4: does not divide"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(step)/jvp(M)/backbone/patch_embed/dot_general", "patch embedding"),
        (
            "jit(step)/jvp(M)/backbone/while/body/closed_call/layers/attention/exp",
            "encoder attention",
        ),
        ("jit(step)/transpose(jvp(M))/decoder/while/body/layers/attention/x", "decoder attention"),
        ("checkpoint/rematted_computation/layers/mlp_in/tanh", "encoder MLP"),
        ("jit(step)/jvp(M)/decoder/while/body/layers/mlp_out.unrounded/add", "decoder MLP"),
        ("jit(step)/jvp(M)/backbone/spatial/while/body/layers/ln_mlp/mul", "encoder norms"),
        ("jit(step)/jvp(M)/decoder/ln_final/rsqrt", "decoder norms"),
        ("jit(step)/jvp(M)/backbone/while/body/dynamic_slice", "encoder, rest"),
        ("jit(step)/jvp(M)/to_decoder.unrounded/dot_general", "decoder, rest"),
        ("jit(step)/jvp(M)/jit(_var)/reduce_sum", "loss"),
        ("jit(step)/transpose(jvp())/sub", "loss"),
        ("jit(step)/jvp()/mul", "input pixels"),
        ("batch['clips']", "input pixels"),
        ("jit(step)/vmap(jit(_shuffle))/sort", "masks and random numbers"),
        ("jit(step)/jit(_where)/select_n", "optimiser"),
        ("state.optimizer.inner_states['train'].mu['backbone']['layers']", "optimiser"),
        ("", "other"),
        ("broadcast.227", "other"),
    ],
)
def test_parts_of_a_step(name, part):
    assert part_of(name) == part and part in PARTS


def test_videos_of_recipes():
    known = {name: training_videos(name) for name in RECIPES}
    assert {name for name, count in known.items() if count is None} == {
        "demo-pretrain",
        "demo-finetune",
        "demo-all-labels",
        "demo-vivit",
    }
    assert known["videomae-v2-giant-kinetics710-kinetics600-finetune"] == 366_006
    assert known["videomae-v1-base-kinetics400-pretrain"] == 240_436


def test_links_by_the_sides_of_the_torus():

    def at(x, y, slice_index=0):
        return types.SimpleNamespace(coords=(x, y, 0), slice_index=slice_index)

    topology = parse_topology("v5e:4x4")
    row, column = [at(x, 0) for x in range(4)], [at(0, y) for y in range(4)]
    assert link_bandwidth(row, topology) == link_bandwidth(column, topology) == 100e9
    assert link_bandwidth(row + column, topology) == 200e9
    assert link_bandwidth([at(0, 0, i) for i in range(2)], topology) is None
    gpus = [types.SimpleNamespace(process_index=i // 8) for i in range(16)]
    assert link_bandwidth(gpus[:8], parse_topology("h100:16")) == 450e9
    assert link_bandwidth(gpus[::8], parse_topology("h100:16")) is None


def test_seconds_of_kernels():
    """The larger of products and traffic, at the chip's figures, as often as they run."""
    kernel = Operation(
        "k", "custom-call", "", "tpu_custom_call", (), (), 819, None, 197 * 10**6, 12
    )
    assert kernel_seconds(kernel, ONE) == pytest.approx(12e-6)
    moving = dataclasses.replace(kernel, bytes=819 * 10**4, flops=0)
    assert kernel_seconds(moving, ONE) == pytest.approx(12e-5)
    assert kernel_seconds(dataclasses.replace(kernel, target="other"), ONE) == 0


def test_seconds_of_attentions_kernels():
    """By its own estimate, of the shapes that one device has; two cores share the heads."""
    q, k = (Array("bf16", (96, 64, length)) for length in (1568, 784))
    for way, factor in (("forward", 1.55), ("backward", 1.32)):
        kernel = Operation(
            f"attention_{way}.7", "custom-call", "", "tpu_custom_call", (q, k, k), (), 1, None, 1, 3
        )
        one = 3 * cycles(96, 1568, 784, 64, backward=way == "backward")
        assert kernel_seconds(kernel, ONE) == pytest.approx(one / 1.5e9)
        found = kernel_seconds(kernel, parse_topology("v4:2x2x1"))
        assert found == pytest.approx(one * factor / 2 / 1.05e9)
        wide = tuple(dataclasses.replace(array, dtype="f32") for array in (q, k, k))
        kernel = dataclasses.replace(kernel, operands=wide, bytes=819 * 10**3)
        assert kernel_seconds(kernel, ONE) == pytest.approx(3e-6)


def test_what_is_computed_again():
    """With "block" all products of blocks once more, and nothing else."""
    for recipe, counts in ((PRETRAIN, (2, None)), (FINETUNE, (None, None)), (VIVIT, (None, None))):
        config = model_config(recipe)
        head = "pretraining" if recipe.task == "pretrain" else "classification"
        assert recomputed_flops(config, head, *counts) == 0
        block = dataclasses.replace(config, remat="block")
        forward = forward_flops(config, head, *counts)
        again = recomputed_flops(block, head, *counts)
        assert 0 < again < forward
        if head == "classification":  # an encoder of as many blocks again would take that much
            twice = dataclasses.replace(config, num_hidden_layers=2 * config.num_hidden_layers)
            grown = forward_flops(twice, head, *counts) - forward
            assert grown == again or recipe is VIVIT  # whose last block reads one token


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", mostly_slow(["data=8", "data=2,fsdp=2,tensor=2"], "data=2,fsdp=2,tensor=2")
)
def test_a_plan_is_of_the_step_that_trains(mesh, on_cpu):
    topology = parse_topology("h100:8")
    sizes = parse_mesh(mesh, 8)
    found = plan(PRETRAIN, topology, sizes, videos=160)
    model, _ = planned_model(PRETRAIN)
    params = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract_params(model)))
    if mesh == "data=8":
        assert found.parameters == params and found.optimizer - 2 * params in (4, 8)
        reduced = sum(
            m.bytes for m in found.moved if m.kind == "all-reduce" and m.axes == ("data",)
        )
        assert params <= reduced
    else:
        assert params / 8 < found.parameters < params / 2
        assert {axis for m in found.moved for axis in m.axes} == set(AXES)
    config = model_config(PRETRAIN)
    assert found.flops == 2 * step_flops(config, "pretraining", 2, 6)
    assert (found.clips, found.videos, found.epoch_videos) == (16, 16, 160)
    assert found.topology.hosts == 1 and found.peak and found.temporaries
    assert "HloModule" in found.text
    assert json.loads(json.dumps(found.to_dict()))["mesh"] == sizes
    setup = planned_setup(PRETRAIN, topology, sizes, 160)
    assert setup.per_epoch == 10
    least = least_memory(setup)
    assert least["gradients"] == found.parameters and least["batch"] == 2 * 4 * 16 * 16 * 3 * 2 ** (
        0 if mesh == "data=8" else 1
    )


@pytest.mark.parametrize(
    ("recipe", "topology", "mesh", "message"),
    [
        (PRETRAIN, "h100:8", "tensor=8", "does not divide"),
        (changed(PRETRAIN, train__batch_size=12), "h100:8", "data=8", "multiple of 8"),
        (changed(PRETRAIN, train__batch_size=160), "h100:8", "data=8", "more than the 100 videos"),
        (changed(PRETRAIN, train__epochs=0), "h100:8", "data=8", "train.epochs"),
        (changed(PRETRAIN, train__epochs=10**30), "h100:8", "data=8", "at most 2147483647 steps"),
        (changed(PRETRAIN, model__start="weights"), "h100:8", "data=8", "a plan opens no weights"),
    ],
)
def test_what_cannot_be_planned(recipe, topology, mesh, message, on_cpu):
    with pytest.raises(UserError, match=message) as told:
        plan(recipe, parse_topology(topology), parse_mesh(mesh, 8), videos=100)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("slices", "mesh", "message"),
    [
        (100_000, None, "16 clips, which 400,000 devices"),
        (2, "fsdp=8", "mesh fsdp=8 does not divide 2 slices"),
        (2, "tensor=8", "mesh tensor=8 splits a batch into 1 parts, which 2 processes"),
    ],
)
def test_sizes_are_checked_before_there_are_devices(slices, mesh, message, monkeypatch):
    """400000 of them take a quarter of a minute."""

    def never(topology):
        raise AssertionError("devices are made")

    monkeypatch.setattr(plan_module, "compile_only_devices", never)
    topology = parse_topology("v5e:2x2", slices)
    with pytest.raises(UserError, match=message):
        planned_setup(PRETRAIN, topology, parse_mesh(mesh, topology.count))


def test_too_little_memory_is_told_before_compiling(on_cpu, monkeypatch):
    def never():
        raise AssertionError("it would be compiled")

    setup = planned_setup(PRETRAIN, parse_topology("h100:8"), parse_mesh("data=8", 8), 100)
    held = sum(least_memory(setup).values())
    for memory, expected in (
        (held // 2, r"--mesh fsdp=8, which leaves 0\.\d MiB of state a device"),
        (held // 64, "more than [0-9]+ chips along fsdp"),
    ):
        chip = dataclasses.replace(CHIPS["h100"], memory=memory)
        monkeypatch.setitem(CHIPS, "h100", chip)
        with pytest.raises(UserError, match=f"does not fit: .*what may fit: .*{expected}") as told:
            plan(
                PRETRAIN,
                parse_topology("h100:8"),
                parse_mesh("data=8", 8),
                videos=100,
                before_compiling=never,
            )
        assert "\n" not in str(told.value)


def test_meshes_to_search(on_cpu):
    """All that divide; why others are out."""
    assert len(list(all_meshes(8))) == 10
    assert all(math.prod(sizes.values()) == 12 for sizes in all_meshes(12))
    base = recipe_named("videomae-v1-base-kinetics400-pretrain")
    assert sensible_meshes(base, parse_topology("h100:8"))[0][0] == parse_mesh("fsdp=8", 8)
    meshes, refused = sensible_meshes(PRETRAIN, parse_topology("h100:8"), 100)
    assert {sizes["tensor"] for sizes in meshes} == {1, 2}  # heads
    assert all("does not divide" in why for why in refused.values()) and refused
    with pytest.raises(UserError, match="multiple of"):
        sensible_meshes(changed(PRETRAIN, train__batch_size=3), parse_topology("h100:8"), 100)


@pytest.mark.parametrize("clips", [8, 1024])
def test_what_meshes_send(clips, on_cpu):
    recipe, topology = changed(PRETRAIN, train__batch_size=clips), parse_topology("h100:2")
    params = 4 * sum(
        leaf.size for leaf in jax.tree.leaves(abstract_params(planned_model(PRETRAIN)[0]))
    )
    config = model_config(PRETRAIN)
    seen, all_tokens = 2, 8
    encoder = seen * config.hidden_size * config.num_hidden_layers
    decoder = all_tokens * config.decoder_hidden_size * config.decoder_num_hidden_layers
    expected = {
        "data=2": params,  # in a ring of two each sends all of it once
        "fsdp=2": 3 * params / 2,
        "tensor=2": 4 * 4 * clips * (encoder + decoder),
    }
    for mesh, size in expected.items():
        setup = planned_setup(recipe, topology, parse_mesh(mesh, 2), 10**4)
        found = sent(setup)
        assert found.pop(mesh.split("=")[0]) == pytest.approx(size), mesh
        assert set(found.values()) == {0}


def test_the_cheapest_meshes_come_first(on_cpu):
    """For few clips heads are split, for many each device updates a part of the state."""
    topology = parse_topology("h100:2")
    for clips, expected in ((8, "tensor=2"), (1024, "fsdp=2")):
        recipe = changed(PRETRAIN, train__batch_size=clips)
        meshes, _ = sensible_meshes(recipe, topology, 10**4)
        costs = [cost(planned_setup(recipe, topology, s, 10**4), topology) for s in meshes]
        assert mesh_text(meshes[0]) == expected and costs == sorted(costs)


# ms of a step as compiled for v5e on 2026-11-30, in bfloat16; the large model with 64 clips.
COMPILED = {
    ("large", "v5e:2x4"): {
        "fsdp=8": 96.3, "data=2,fsdp=4": 101.8, "data=8": 128.8, "fsdp=4,tensor=2": 148.8,
        "data=4,tensor=2": 161.8, "data=2,tensor=4": 223.8,
    },
    ("small", "v5e:8x8"): {"data=8,fsdp=8": 28.1, "data=64": 28.7},
    ("base", "v5e:8x8"): {
        "data=4,fsdp=16": 105.8, "data=8,fsdp=8": 108.0, "data=64": 114.9,
        "data=32,tensor=2": 187.7,
    },
    ("huge", "v5e:8x8"): {"data=8,fsdp=8": 296.9, "data=64": 346.8},
}  # fmt: skip


@pytest.mark.quick_cases(1)
@needs_libtpu
@pytest.mark.parametrize(("size", "topology"), COMPILED)
def test_meshes_come_in_the_order_of_their_compiled_steps(size, topology):
    recipe = recipe_named(f"videomae-v1-{size}-kinetics400-pretrain")
    clips = {"train__batch_size": 64} if size == "large" else {}
    config = dict(recipe.model.config) | {"dtype": "bfloat16"}
    recipe, topology = changed(recipe, model__config=config, **clips), parse_topology(topology)
    meshes, _ = sensible_meshes(recipe, topology)
    steps = COMPILED[size, topology.text]
    assert [mesh_text(s) for s in meshes if mesh_text(s) in steps] == sorted(steps, key=steps.get)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("INTERNAL: no such thing\nSuspected", "refuses the step of tiny-pretrain: INTERNAL: no"),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.",
            "needs 20.00 GiB of a device and h100 has 15.75 GiB; what may fit: .*remat=block",
        ),
        ("RESOURCE_EXHAUSTED: something\nelse", "does not fit: RESOURCE_EXHAUSTED: something else"),
    ],
)
def test_refusals_are_one_line(said, message, on_cpu):
    topology = parse_topology("h100:8")
    setup = planned_setup(PRETRAIN, topology, parse_mesh("data=8", 8), 100)
    told = str(refused(jax.errors.JaxRuntimeError(said), setup, topology))
    assert re.search(message, told) and "\n" not in told


def test_what_a_compiler_refuses_is_told(on_cpu, monkeypatch):
    def refuse(lowered):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing\nSuspected")

    monkeypatch.setattr(plan_module, "_compiled", refuse)
    with pytest.raises(UserError, match="refuses the step of tiny-finetune: INTERNAL: no such"):
        plan(FINETUNE, parse_topology("h100:1"), parse_mesh("data=1", 1), videos=100)


def test_a_peak_beyond_the_memory_is_refused(on_cpu, monkeypatch):
    """Of such a program compilers for GPUs warn only."""
    memory = types.SimpleNamespace(peak_memory_in_bytes=80 * 2**30 + 1)
    found = types.SimpleNamespace(as_text=lambda: "", memory_analysis=lambda: memory)
    monkeypatch.setattr(plan_module, "_compiled", lambda lowered: found)
    message = "compiler needs 80.00 GiB of a device and h100 has 80.00 GiB; what may fit: .*remat="
    with pytest.raises(UserError, match=message) as told:
        plan(PRETRAIN, parse_topology("h100:8"), parse_mesh("data=8", 8), videos=100)
    assert "\n" not in str(told.value)


def test_what_would_fit_leaves_the_state_as_it_is(on_cpu):
    """With half the batch a step of twice the memory would not fit, for its state is no smaller."""
    recipe = changed(PRETRAIN, train__batch_size=64)
    topology = parse_topology("h100:8")
    setup = planned_setup(recipe, topology, parse_mesh("data=8", 8), 100)
    said = "RESOURCE_EXHAUSTED: Used 2.00M of 1.00M hbm"
    told = str(refused(jax.errors.JaxRuntimeError(said), setup, topology))
    parts, clips = (int(re.search(rf"{name}=(\d+)", told)[1]) for name in ("late", "batch_size"))
    least = least_memory(setup)
    held = least["state"] + least["gradients"]
    for fixed, rest in ((held, clips / 64), (held + least["batch"], 1 / parts)):
        assert fixed + (2 * 2**20 - fixed) * rest <= 2**20
    assert (parts, clips) == (4, 24)


def test_products_without_tiles_are_compiled_otherwise():
    """XLA gives up on some shapes where there is no GPU to try tiles on."""
    asked = []

    def compile(compiler_options=None):
        asked.append(compiler_options)
        if compiler_options is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that ...")
        return "compiled"

    assert plan_module._compiled(types.SimpleNamespace(compile=compile)) == "compiled"
    assert asked == [None, {"xla_gpu_enable_triton_gemm": False}]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("recipe", [PRETRAIN, VIVIT], ids=lambda recipe: recipe.name)
def test_a_plan_for_tpus(recipe):
    found = plan(recipe, FOUR, parse_mesh("data=2,fsdp=2", 4), videos=1000)
    assert found.cycles > 0 and found.peak > found.arguments
    assert found.compute_seconds == found.cycles / 1.5e9
    # Mixup's Beta distribution is drawn by rejection: nobody knows in how many rounds.
    assert bool(found.unknown_loops) == (recipe is VIVIT)
    assert found.days > 0 and 0 < found.utilization < 1
    seconds = sum(part.seconds for part in found.parts)
    assert seconds == pytest.approx(found.compute_seconds + found.kernel_seconds)
    names = {part.name for part in found.parts}
    assert {"patch embedding", "encoder attention", "encoder MLP", "optimiser"} <= names
    assert ("decoder attention" in names) == (recipe is PRETRAIN)
    assert {m.axes for m in found.moved} >= {("data",), ("fsdp",)}
    assert "nothing was run" in describe(found)


@needs_libtpu
@pytest.mark.slow
def test_a_plan_for_slices():
    """Of each device's gradients, scattered within its slice, its part is sent to the other."""
    found = plan(PRETRAIN, parse_topology("v5e:2x1", 2), parse_mesh("data=4", 4), videos=1000)
    assert found.topology.count == 4
    assert found.network_bytes >= found.parameters / 2
    assert {m.seconds is None for m in found.moved} == {False}


@needs_libtpu
@pytest.mark.slow
def test_what_the_compiler_refuses_is_one_line():
    large = changed(PRETRAIN, train__batch_size=3_000_000)
    with pytest.raises(
        UserError, match="the compiler needs .* GiB of a device and v5e has"
    ) as told:
        plan(large, ONE, parse_mesh(None, 1), videos=10**7)
    assert "train.accumulate=" in str(told.value) and "\n" not in str(told.value)


@needs_cuda_plugin
def test_a_plan_for_gpus():
    found = plan(PRETRAIN, parse_topology("h100:8"), parse_mesh("data=8", 8), videos=1000)
    assert not found.cycles and found.step_seconds > 0
    assert {(m.kind, m.axes) for m in found.moved} == {("all-reduce", ("data",))}
    chip = found.topology.chip
    least = max(found.flops / chip.flops, found.bytes / chip.bandwidth)
    assert found.compute_seconds == least


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_planned_up_to_the_compiler(name, on_cpu):
    setup = planned_setup(recipe_named(name), parse_topology("h100:4"), parse_mesh("fsdp=4", 4))
    clips = setup.batch_shapes["clips"]
    assert clips.shape[0] == setup.clips and clips.sharding.shard_shape(clips.shape)[0] * 4 == (
        setup.clips
    )
    least = least_memory(setup)
    assert min(least.values()) > 0
    seen, predicted = setup.token_counts
    assert (seen is None) == (setup.recipe.task == "finetune")
    assert seen is None or seen + predicted <= setup.model.config.num_tokens


def test_a_mesh_of_a_topology(on_cpu):
    setup = planned_setup(FINETUNE, parse_topology("h100:4"), parse_mesh("fsdp=4", 4), 100)
    assert setup.mesh == make_mesh(parse_mesh("fsdp=4", 4), jax.devices()[:4])
    assert setup.batch_shapes["labels"].shape == (16,)
