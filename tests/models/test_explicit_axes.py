# SPDX-License-Identifier: Apache-2.0
"""Whole models on meshes with explicit axes, which `jax.make_mesh` makes: one device's numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_programs import collectives, moved
from flax import linen as nn
from helpers import bool_mask, clip, error, mostly_slow, random_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import CASES, VIDEOMAE, config_of
from variants import variant_config

import vivit_jax
from vivit_jax.errors import UserError
from vivit_jax.layers.axes import names_in
from vivit_jax.layers.tubelets import ByteClips
from vivit_jax.models.build import abstract_params, boxed_params

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CLIPS = 8
VIVITS = ("joint", "encoder", "self-attention time first", "dot product")
HEADLESS = ("vivit base", "mae base")
PRETRAINING = ("mae pretraining", "dual masking", "tanh")
MODELS = (*VIVITS, *HEADLESS, *PRETRAINING[:2], "mae cls")


@functools.cache
def built(name: str):
    """(model, clips, further inputs) of a case."""
    if name in VIVITS:
        model = vivit_jax.VivitForVideoClassification(variant_config(name))
    elif name == "dual masking":
        model = vivit_jax.VideoMAEForPreTraining(vivit_jax.VideoMAEConfig(**VIDEOMAE))
    elif name == "tanh":
        model = vivit_jax.VideoMAEForPreTraining(config_of("mae pretraining", hidden_act="tanh"))
    else:
        model = CASES[name][0](config_of(name))
    inputs = {}
    if name in PRETRAINING:
        masks = [bool_mask(model.config, CLIPS)]
        if name == "dual masking":
            masks.append(bool_mask(model.config, CLIPS, 0.5, seed=1))
        inputs["mask"] = vivit_jax.Mask.from_bool(*masks)
    elif name not in HEADLESS:
        inputs["labels"] = np.arange(CLIPS) % 5
    return model, clip(model.config, CLIPS), inputs


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, which of its axes split clips, and which the parameters along what."""

    sizes: dict[str, int]
    clips: tuple[str, ...]
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    types: tuple = ()  # by default all axes are explicit
    rules: tuple = ()

    def mesh(self, types=None):
        types = types or self.types or (EXPLICIT,) * len(self.sizes)
        return jax.make_mesh(tuple(self.sizes.values()), tuple(self.sizes), axis_types=types)

    def placed(self, mesh, name):
        """A case's parameters, clips and further inputs on the mesh."""
        model, x, inputs = built(name)
        logical, rules = nn.get_partition_spec(boxed_params(model)), list(self.params.items())
        params = jax.device_put(
            random_params(model), nn.logical_to_mesh_sharding(logical, mesh, rules)
        )
        place = NamedSharding(mesh, PartitionSpec(self.clips))
        return params, *jax.device_put((x, inputs), place)


TENSOR = dict(heads="tensor", mlp="tensor")
LAYOUTS = {
    "clips": Layout(dict(data=8), ("data",)),
    "heads": Layout(dict(data=4, tensor=2), ("data",), TENSOR),
    "parts": Layout(dict(a=2, b=2, c=2), ("a", "b"), dict(embed="b", heads="c", mlp="c")),
    "width": Layout(dict(x=4, y=2), ("x",), dict(embed="y")),
    "whole": Layout(dict(x=8), ()),
    "clips explicit": Layout(dict(data=4, tensor=2), ("data",), TENSOR, (EXPLICIT, AUTO)),
    "heads explicit": Layout(dict(data=4, tensor=2), ("data",), TENSOR, (AUTO, EXPLICIT)),
    "clips explicit, with rules": Layout(
        *(dict(x=4, y=2), ("x",), dict(heads="y", mlp="y"), (EXPLICIT, AUTO)),
        rules=(("batch", "x"), ("heads", "y"), ("mlp", "y")),
    ),
}


def both(model, params, x, inputs):
    """A model's output, and the gradient of its loss, or of what it returns, to the parameters."""

    def objective(params):
        out = model.apply({"params": params}, x, **inputs)
        loss = getattr(out, "loss", None)
        return jnp.mean(jnp.sin(out.last_hidden_state)) if loss is None else loss, out

    (_, out), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    return out, gradient


@functools.cache
def alone(name):
    """What one device returns."""
    model, x, inputs = built(name)
    return jax.jit(functools.partial(both, model))(random_params(model), x, inputs)


def assert_same(found, exact):
    assert jax.tree.structure(found) == jax.tree.structure(exact)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert error(a, b) < 1e-5  # measured 1.6e-6


@pytest.mark.parametrize(
    ("name", "layout"),
    mostly_slow(
        [(name, layout) for layout in LAYOUTS for name in MODELS],
        ("mae cls", "clips explicit, with rules"),
    ),
)
def test_output_and_gradient(name, layout):
    model, layout = built(name)[0], LAYOUTS[layout]
    mesh = layout.mesh()
    with jax.set_mesh(mesh), nn.logical_axis_rules(layout.rules):
        placed = layout.placed(mesh, name)
        found, gradient = jax.jit(functools.partial(both, model))(*placed)
    assert_same((found, gradient), alone(name))
    assert jax.tree.map(jax.typeof, gradient) == jax.tree.map(jax.typeof, placed[0])
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    clips = [axis for axis in layout.clips if types[axis] == EXPLICIT]
    for part, x in found.items():
        spec = jax.typeof(x).sharding.spec
        assert [names_in(entry) for entry in spec] == [clips, [], []][: x.ndim], part


@pytest.mark.parametrize(
    ("name", "layout"),
    mostly_slow(
        [
            (name, layout)
            for name in ("joint", "dot product", "mae pretraining")
            for layout in ("clips", "heads", "parts")
        ],
    ),
)
def test_what_moves_is_what_moves_on_automatic_axes_with_rules(name, layout):
    model, layout = built(name)[0], LAYOUTS[layout]
    programs = []
    for types in (None, (AUTO,) * len(layout.sizes)):
        mesh = layout.mesh(types)
        rules = (("batch", layout.clips), *layout.params.items()) if types else ()
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
            placed = layout.placed(mesh, name)
            program = jax.jit(lambda *args: both(model, *args)).lower(*placed).compile()
        programs.append(moved(program, mesh))
    assert programs[0] == programs[1] != []


@pytest.mark.parametrize("mapped", [False, True])
def test_nothing_moves_where_clips_are_split_only(mapped):
    model, layout = built("mae base")[0], LAYOUTS["clips"]
    mesh = layout.mesh()

    def states(params, x):
        return model.apply({"params": params}, x).last_hidden_state

    def by_clip(params, x):
        return jax.vmap(lambda x: states(params, x[None])[0])(x)

    with jax.set_mesh(mesh):
        params, x, _ = layout.placed(mesh, "mae base")
        program = jax.jit(by_clip if mapped else states).lower(params, x).compile()
        found = program(params, x)
    assert collectives(program, mesh) == []
    assert jax.typeof(found).sharding.spec[0] == "data"
    assert_same(found, alone("mae base")[0].last_hidden_state)


@pytest.mark.parametrize("jitted", [True, False])
def test_bytes_with_no_mesh_set(jitted):
    """The mesh is that of the types."""
    model, layout = built("mae base")[0], LAYOUTS["heads"]
    mesh, config = layout.mesh(), model.config
    shape = (CLIPS, config.num_frames, *config.frame_size, config.num_channels)
    clips = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    clips = ByteClips(clips, (1 / 128,), (-1.0,))
    exact = jax.jit(model.apply)({"params": random_params(model)}, clips)
    params = layout.placed(mesh, "mae base")[0]
    placed = jax.device_put(clips, NamedSharding(mesh, PartitionSpec("data")))
    found = (jax.jit(model.apply) if jitted else model.apply)({"params": params}, placed)
    assert_same(found, exact)
    assert jax.typeof(found.last_hidden_state).sharding.spec[0] == "data"


@pytest.mark.slow
@pytest.mark.parametrize("manual", mostly_slow(["data", "tensor"], "data"))
def test_inside_a_shard_map_over_one_axis(manual):
    # The gradient of GELU's erf does not lower within a `shard_map` that checks types in jax 0.12.
    name, layout = "tanh", LAYOUTS["heads"]
    model, mesh = built(name)[0], layout.mesh()
    whole = PartitionSpec()
    clips = PartitionSpec("data") if manual == "data" else whole

    def on_device(params, x, inputs):
        out, gradient = both(model, params, x, inputs)
        if manual == "data":  # each device has the mean over its own clips
            gradient = jax.tree.map(lambda g: g / mesh.shape["data"], gradient)
            out = out.replace(loss=jax.lax.pmean(out.loss, "data"))
        return out.loss, out.logits, gradient

    with jax.set_mesh(mesh):
        placed = layout.placed(mesh, name)
        if manual == "tensor":
            placed = (jax.device_put(placed[0], NamedSharding(mesh, whole)), *placed[1:])
        run = jax.shard_map(
            on_device,
            in_specs=(whole, clips, clips),
            out_specs=(whole, clips, whole),
            axis_names={manual},
        )
        loss, logits, gradient = jax.jit(run)(*placed)
    exact, exact_gradient = alone(name)
    assert_same((loss, logits, gradient), (exact.loss, exact.logits, exact_gradient))
    assert jax.typeof(logits).sharding.spec[0] == "data"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "jitted"),
    mostly_slow([("mae pretraining", True), ("mae base", False)], ("mae base", False)),
)
def test_init(name, jitted):
    """Parameters are whole on every device, and are taken in their boxes."""
    model, x, inputs = built(name)
    key = jax.random.key(0)
    exact = jax.jit(model.init)(key, x, **inputs)
    mesh = LAYOUTS["heads"].mesh()
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        found = (jax.jit(model.init) if jitted else model.init)(key, x, **inputs)
        out = jax.jit(model.apply)(found, x, **inputs)
    assert_same(found, exact)
    assert_same(out, jax.jit(model.apply)(exact, np.asarray(x), **inputs))
    kernel = nn.unbox(found)["params"]
    kernel = kernel.get("backbone", kernel)["layers"]["attention"]["query"]["kernel"]
    assert [names_in(entry) for entry in jax.typeof(kernel).sharding.spec] == [[]] * 4


@pytest.mark.parametrize("name", ["encoder", "self-attention time first", "dot product"])
def test_types_of_all_that_is_reported(name):
    model, layout = built(name)[0], LAYOUTS["heads"]
    mesh = layout.mesh()

    def run(params, x, states, return_dict=True):
        flags = dict(output_hidden_states=states, output_attentions=True, return_dict=return_dict)
        return model.apply({"params": params}, pixel_values=x, **flags)

    with jax.set_mesh(mesh):
        params, x, _ = layout.placed(mesh, name)
        out = jax.eval_shape(lambda *args: run(*args, True), params, x)
        chosen = jax.eval_shape(lambda *args: run(*args, (1,)), params, x)
        plain = jax.eval_shape(lambda *args: run(*args, True, return_dict=False), params, x)
    assert plain == out.to_tuple()
    assert len(out) == {"encoder": 5, "self-attention time first": 4, "dot product": 4}[name]
    for part, x in out.items():
        spec = [names_in(entry) for entry in x.sharding.spec]
        expected = [[] for _ in range(x.ndim)]
        expected[part != "logits"] = ["data"]
        if part.endswith("attentions"):
            expected[-3] = ["tensor"]
        assert spec == expected, part
    one = chosen.hidden_states[1]
    assert names_in(one.sharding.spec[0]) == ["data"] and one.shape[0] == CLIPS
    assert chosen.hidden_states[0] is None


@pytest.mark.slow
def test_dropout_and_head_mask():
    model, layout = built("mae cls")[0], LAYOUTS["heads"]
    drops = dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, drop_path_rate=0.3)
    model = model.clone(config=dataclasses.replace(model.config, **drops))
    mask = np.linspace(0, 2, model.config.num_attention_heads, dtype=np.float32)

    @jax.jit
    def run(params, x, key):
        flags = dict(deterministic=False, head_mask=mask, output_attentions=True)
        return model.apply({"params": params}, x, rngs={"dropout": key}, **flags)

    key, mesh = jax.random.key(0), layout.mesh()
    exact = run(random_params(model), built("mae cls")[1], key)
    with jax.set_mesh(mesh):
        found = run(*layout.placed(mesh, "mae cls")[:2], key)
    assert_same(found, exact)


def test_numpy_without_jit():
    """Arrays that lie nowhere yet are whole on every device."""
    model, x, _ = built("mae base")
    with jax.set_mesh(LAYOUTS["clips"].mesh()):
        found = model.apply({"params": random_params(model)}, x)
    assert_same(found, alone("mae base")[0])


class Whole(nn.Module):
    """A user's own model that contains ours."""

    @nn.compact
    def __call__(self, x, inputs):
        out = vivit_jax.VideoMAEForVideoClassification(config_of("mae cls"), name="video")
        return out(x, **inputs).logits + self.param("shift", nn.initializers.ones, (1, 5))


def test_within_another_module():
    layout, (_, x, inputs) = LAYOUTS["heads"], built("mae cls")
    params = {"video": random_params(built("mae cls")[0]), "shift": np.ones((1, 5), np.float32)}
    mesh = layout.mesh()
    with jax.set_mesh(mesh):
        video, x, inputs = layout.placed(mesh, "mae cls")
        params = {"video": video, "shift": params["shift"]}
        found = jax.jit(Whole().apply)({"params": params}, x, inputs)
    assert_same(found, alone("mae cls")[0].logits + 1)


def test_clips_that_are_split_within():
    model, layout = built("mae base")[0], LAYOUTS["heads"]
    mesh = layout.mesh()
    with jax.set_mesh(mesh):
        params, x, _ = layout.placed(mesh, "mae base")
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "tensor")))
        with pytest.raises(UserError) as error:
            model.apply({"params": params}, x)
    assert str(error.value) == (
        "pixel_values of type float32[8@data,6@tensor,24,16,3] is split within clips, along axis "
        "'tensor' of the mesh, and a model takes whole clips: jax.reshard(pixel_values, "
        "PartitionSpec(('data',)))"
    )


@pytest.mark.parametrize("types", [AUTO, EXPLICIT])
def test_shapes_of_parameters_name_no_mesh(types):
    """They are kept for other meshes."""
    model = vivit_jax.VideoMAEModel(config_of("mae base", layer_norm_eps=0.5 + (types == AUTO)))
    with jax.set_mesh(LAYOUTS["clips"].mesh((types,))), nn.logical_axis_rules((("mlp", "data"),)):
        shapes = abstract_params(model)
    assert {leaf.sharding for leaf in jax.tree.leaves(shapes)} == {None}
