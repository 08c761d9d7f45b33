"""What is read from compiled programs is what they were written to do, on each platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_cuda_plugin, needs_libtpu
from jax.sharding import NamedSharding, PartitionSpec

from vivit_jax.train.planning.compiled import read_program
from vivit_jax.train.planning.hardware import compile_only_devices, parse_topology
from vivit_jax.train.planning.hlo import parse
from vivit_jax.train.planning.replica_groups import mesh_axes, replica_groups
from vivit_jax.train.sharding import AXES, BATCH, make_mesh

SIZES = dict(data=2, fsdp=2, tensor=2)
LAYERS, ROWS, LENGTH, WIDTH, INNER = 5, 16, 256, 512, 1024


TPU = pytest.param("v5e:2x4", marks=needs_libtpu)
GPU = pytest.param("h100:8", marks=needs_cuda_plugin)


def mesh_on(where, sizes=SIZES):
    devices = None if where == "cpu" else compile_only_devices(parse_topology(where))
    return make_mesh(sizes, devices)


def compiled(function, mesh, where, *args, out=None):
    """The compiled function of arrays of (shape, spec, dtype)."""

    def place(spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    shapes = [jax.ShapeDtypeStruct(s, d, sharding=place(spec)) for s, spec, d in args]
    target = {"cpu": "cpu", "h100:8": "gpu"}.get(where, "tpu")
    options = {} if out is None else {"out_shardings": jax.tree.map(place, out, is_leaf=_is_spec)}
    # The whole of a product in float32 takes a TPU's compiler ten times as long.
    short = jax.default_matmul_precision("default")
    with jax.set_mesh(mesh), jax.default_device(target), short:
        return jax.jit(function, **options).lower(*shapes).compile()


def _is_spec(value):
    return isinstance(value, tuple) and all(v is None or v in (*AXES, AXES, BATCH) for v in value)


def training(mesh):
    """The gradient of a scanned MLP whose weights are split over fsdp and tensor."""
    by_clips, by_heads = (
        NamedSharding(mesh, PartitionSpec(BATCH, None, last)) for last in (None, "tensor")
    )

    def loss(weights, x):
        def block(x, layer):
            inner = jax.lax.with_sharding_constraint(jax.nn.relu(x @ layer[0]), by_heads)
            return x + jax.lax.with_sharding_constraint(inner @ layer[1], by_clips), None

        return jax.lax.scan(block, x, weights)[0].mean()

    return jax.value_and_grad(loss)


@pytest.fixture(scope="module", params=["cpu", TPU, GPU])
def trained(request):
    where = request.param
    mesh = mesh_on(where)
    specs = ((None, "fsdp", "tensor"), (None, "tensor", "fsdp"))
    given = [
        ((LAYERS, WIDTH, INNER), specs[0], jnp.float32),
        ((LAYERS, INNER, WIDTH), specs[1], jnp.float32),
        ((ROWS, LENGTH, WIDTH), (BATCH,), jnp.float32),
    ]
    step = training(mesh)
    found = compiled(
        lambda a, b, x: step((a, b), x), mesh, where, *given, out=((), (specs[0], specs[1]))
    )
    return where, read_program(found, mesh)


def total(program, kind, *axes):
    """Bytes that a device sends over some axes by collectives of a kind, in all loops."""
    return sum(
        each.sent * each.times
        for each in program.collectives
        if (each.kind, each.axes) == (kind, axes)
    )


def test_the_collectives_of_a_step(trained):
    """By what has to move, not by how many instructions the compiler uses."""
    where, program = trained
    weights = LAYERS * 2 * WIDTH * INNER * 4
    activations = LAYERS * ROWS * LENGTH * WIDTH * 4
    # Both weights whole along fsdp, once forward and once backward, half of them from the other;
    # a TPU multiplies in bfloat16 and converts before.
    gathered = weights / (2 if where == "v5e:2x4" else 1)
    assert total(program, "all-gather", "fsdp") == 2 * gathered / 2 / 2
    # What heads make, and its gradient, summed over tensor.
    assert total(program, "all-reduce", "tensor") == 2 * activations / 4
    kept = "all-reduce" if where == "cpu" else "reduce-scatter"
    times = 2 if where == "cpu" else 1
    assert total(program, kept, "fsdp") == times * weights / 2 / 2
    # An all-reduce of two devices sends everything once.
    assert total(program, "all-reduce", "data") == weights / 2 / 2
    assert {each.kind for each in program.collectives} == {"all-gather", "all-reduce", kept}
    assert {each.times for each in program.collectives if each.bytes > 8} == {LAYERS}
    # GPU's reduction of several arrays at once has no name.
    names = {each.op_name for each in program.collectives if each.bytes > 8} - {""}
    assert names and all("while/body" in name for name in names)


def test_the_loops_of_a_step(trained):
    _, program = trained
    assert [(loop.trips, loop.times) for loop in program.loops] == [(LAYERS, 1), (LAYERS, 1)]


def test_the_operations_of_a_step(trained):
    where, program = trained
    # A condition runs once more than its body.
    assert program.bytes > 0
    assert {op.times for op in program.operations} == {1, LAYERS, LAYERS + 1}
    # Stacked weights are read a layer at a time.
    whole = LAYERS * 2 * WIDTH * INNER * 4 / 4
    assert program.bytes >= whole
    moved = [op for op in program.operations if op.times == LAYERS]
    assert max(op.bytes for op in moved) < whole + ROWS * LENGTH * (WIDTH + 2 * INNER) * 4
    assert bool(program.cycles) == (where == "v5e:2x4")


@pytest.mark.parametrize("where", ["cpu", TPU, GPU])
def test_loops_within_loops(where):
    mesh = mesh_on(where)

    def step(x):
        def inner(x, _):
            return jnp.sin(x @ x), None

        def outer(x, _):
            return jax.lax.scan(inner, x, None, length=3)[0] + 1, None

        x = jax.lax.scan(outer, x, None, length=7)[0]
        return jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x * 2, x)

    program = read_program(compiled(step, mesh, where, ((256, 256), (), jnp.float32)), mesh)
    assert sorted((loop.times, loop.trips) for loop in program.loops if loop.trips) == [
        (1, 7),
        (7, 3),
    ]
    assert [loop.trips for loop in program.loops if loop.trips not in (3, 7)] == [None]
    assert {op.times for op in program.operations} >= {7, 21}


@pytest.mark.parametrize("where", ["cpu", TPU, GPU])
def test_of_branches_the_costliest_counts(where):
    """Operations of the other branches are listed too."""
    mesh = mesh_on(where)

    def often(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=7)[0]

    def step(which, x):
        return jax.lax.switch(which, [lambda x: x, often, lambda x: x + x.sum()], x)

    given = ((), (), jnp.int32), ((512, 512), ("data",), jnp.float32)
    program = read_program(compiled(step, mesh, where, *given, out=("data",)), mesh)
    assert [(loop.trips, loop.times) for loop in program.loops] == [(7, 1)]
    within = [each for each in program.collectives if "while/body" in each.op_name]
    beside = [each for each in program.collectives if "branch_2_fun" in each.op_name]
    assert {each.times for each in within} == {7} and {each.times for each in beside} == {0}


@pytest.mark.parametrize("where", ["cpu", TPU, GPU])
def test_a_condition_that_asks_other_devices(where):
    """A loop with an unknown number of rounds counts once, so its condition runs twice."""
    mesh = mesh_on(where)

    def step(x):
        return jax.lax.while_loop(lambda x: (x < 3).any(), lambda x: x * 2, x)

    shape = ((512, 256), (BATCH,), jnp.float32)
    program = read_program(compiled(step, mesh, where, shape, out=(BATCH,)), mesh)
    assert [(loop.trips, loop.times) for loop in program.loops] == [(None, 1)]
    (asked,) = program.collectives
    assert (asked.kind, asked.axes, asked.times) == ("all-reduce", BATCH, 2)


@pytest.mark.parametrize("where", ["cpu", TPU, GPU])
@pytest.mark.parametrize("sizes", [dict(data=4, fsdp=2, tensor=1), dict(data=2, fsdp=1, tensor=4)])
def test_axes_of_different_sizes(where, sizes):
    """What is split along an axis is gathered along that axis, in whatever order devices are."""
    mesh = mesh_on(where, sizes)
    for axis in [axis for axis, size in sizes.items() if size > 1]:
        weights, rows = (None, axis), (AXES,)
        found = compiled(
            lambda w, x: x @ w,
            mesh,
            where,
            ((512, 512), weights, jnp.float32),
            ((2048, 512), rows, jnp.float32),
            out=rows,
        )
        (gathered,) = read_program(found, mesh).collectives
        assert (gathered.kind, gathered.axes, gathered.group) == (
            "all-gather",
            (axis,),
            sizes[axis],
        )


@pytest.mark.parametrize("where", ["cpu", TPU, GPU])
def test_other_collectives(where):
    """Collectives that a program names itself, inside shard_map, each once."""
    mesh = mesh_on(where)

    def moved(x):
        x = jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])
        x = jnp.sin(jax.lax.all_to_all(x, "data", 0, 1, tiled=True))
        x = jnp.cos(jax.lax.psum_scatter(x, "fsdp", tiled=True))
        return jax.lax.all_gather(x, ("data", "tensor"), tiled=True)

    spec = PartitionSpec(BATCH, None, "tensor")
    mapped = jax.shard_map(
        moved, mesh=mesh, in_specs=spec, out_specs=PartitionSpec("fsdp"), check_vma=False
    )
    text = compiled(mapped, mesh, where, ((512, 256, 512), spec, jnp.float32)).as_text()
    program = read_program(text, mesh)
    size = 512 * 256 * 512 * 4 // 8
    found = {(each.kind, each.axes, each.group): each.bytes for each in program.collectives}
    assert found.pop(("collective-permute", ("tensor",), 2)) == size
    assert found.pop(("all-to-all", ("data",), 2)) == size
    assert found.pop(("all-gather", ("data", "tensor"), 4)) == 4 * size // 2
    # Small or odd sums are scattered in two instructions, as on CPU.
    ((kind, axes, group), bytes_) = found.popitem()
    assert (axes, group, bytes_) == (("fsdp",), 2, size) and not found
    assert kind in ("reduce-scatter", "all-reduce")


@pytest.mark.parametrize(
    ("text", "axes", "groups"),
    [
        ("{}", ("data", "fsdp", "tensor"), ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("{{0,1},{2,3},{4,5},{6,7}}", ("tensor",), ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("[4,2]<=[8]", ("tensor",), ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("[4,2]<=[4,2]T(1,0)", ("fsdp",), ((0, 2), (4, 6), (1, 3), (5, 7))),
        ("[4,2]<=[2,4]T(1,0)", ("data",), ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor"), ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("[1,8]<=[8]", ("data", "fsdp", "tensor"), ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=4,'b'=2] {'a'}", ("data", "fsdp"), ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=4,'b'=1,'c'=2] {'c'}", ("tensor",), ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",), ((0, 2), (1, 3), (4, 6), (5, 7))),
        (
            "mesh['a'=2,'b'=4], device_ids=([8]<=[4,2]T(1,0)) {'a'}",
            ("tensor",),
            ((0, 1), (2, 3), (4, 5), (6, 7)),
        ),
        (
            "mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'c'}",
            ("data", "fsdp"),
            ((0, 2, 4, 6), (1, 3, 5, 7)),
        ),
        (
            "mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'a'}",
            ("tensor",),
            ((0, 1), (2, 3), (4, 5), (6, 7)),
        ),
        (
            "mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}",
            ("fsdp",),
            ((0, 2), (1, 3), (4, 6), (5, 7)),
        ),
    ],
)
def test_groups_of_devices(text, axes, groups):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    assert replica_groups(attributes, 8) == groups
    assert mesh_axes(groups, SIZES) == axes


@pytest.mark.parametrize(
    "text", ["other(1,2)", "mesh['a'=8], other=1 {'a'}", "[4,2]<=[8]X(0)", "mesh['a'=8], {'a'}"]
)
def test_groups_that_are_not_understood(text):
    with pytest.raises(ValueError, match="replica.groups"):
        replica_groups(f", replica_groups={text}, x=1", 8)


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("module @jit_f {}")


def test_an_instruction_of_several_lines():
    """As a Pallas kernel's notes are printed, which look like the end of a computation."""
    text = """
ENTRY %main.1 (p.0: f32[3]) -> f32[3] {
  %p.0 = f32[3]{0} parameter(0)
  %k.1 = f32[3]{0} custom-call(%p.0), custom_call_target="tpu_custom_call", attributes={metadata={
"notes":"{\\"block\\": 512}"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %t.2 = f32[3]{0} negate(%k.1)
}
"""
    module = parse(text)
    assert list(module.computations["main.1"]) == ["p.0", "k.1", "t.2"]
    kernel = module.computations["main.1"]["k.1"]
    assert (kernel.op_name, kernel.quoted("custom_call_target")) == (
        "jit(f)/kernel",
        "tpu_custom_call",
    )


def test_bytes_of_shapes():
    text = """
ENTRY %main.1 (p.0: s4[3]) -> (pred[2], bf16[2,3]) {
  %p.0 = s4[3]{0:T(128)S(1)} parameter(0)
  ROOT %t = (pred[2]{0}, /*index=1*/bf16[2,3]{1,0:T(8,128)(2,1)}, f8e4m3fn[5], token[]) tuple(%p.0)
}
"""
    module = parse(text)
    (given, root) = module.computations[module.entry].values()
    assert [array.bytes for array in given.arrays + root.arrays] == [2, 2, 12, 5, 0]
    assert [array.space for array in given.arrays + root.arrays] == [1, 0, 0, 0, 0]
    np.testing.assert_equal(root.arrays[1].shape, (2, 3))
