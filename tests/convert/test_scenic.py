# SPDX-License-Identifier: Apache-2.0
"""scenic's ViViT checkpoints: read, written, inspected, verified, refused.

The parameters come from numpy_vivit.py and the files from flax, so that neither shares anything
with what reads them; the published trees are written out here once more.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
from flax.serialization import msgpack_serialize
from flax.training.checkpoints import convert_pre_linen, restore_checkpoint
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import assert_close, mostly_slow
from numpy_vivit import forward, random_params
from tiny import VIVIT
from tiny_checkpoints import pop, put, read_safetensors, same_tensors
from variants import reference

import vivit_jax
from checkpoints_convert.convert import convert_checkpoint
from checkpoints_convert.files.flax_files import open_msgpack
from checkpoints_convert.layouts import scenic
from checkpoints_convert.layouts.registry import published
from checkpoints_convert.rules import export_params
from vivit_jax import param_tree
from vivit_jax.errors import ConfigError
from vivit_jax.models.build import abstract_params, build_model

JOINT = "joint"
FE, FSA, FDP = (f"factorised_{kind}" for kind in ("encoder", "self_attention", "dot_product"))
FRAMES, SIZE = "num_frames=6", "image_size=24,16"
# What random_params draws, and what the weights do not say of it.
MODELS = {
    "joint": (dict(attention_type=JOINT), [FRAMES, SIZE]),
    "joint sampled": (
        dict(attention_type=JOINT, sampled_frames=4),
        [FRAMES, SIZE, "num_sampled_frames=4"],
    ),
    "encoder": (dict(attention_type=FE), [SIZE]),
    "encoder spatial only": (dict(attention_type=FE, spatial_only=True), [FRAMES, SIZE]),
    "encoder spatial only max": (
        dict(attention_type=FE, spatial_only=True, class_token=False),
        [FRAMES, SIZE, "pooling=max"],
    ),
    "encoder sampled": (dict(attention_type=FE, sampled_frames=4), [FRAMES, SIZE]),
    "self-attention time first": (
        dict(attention_type=FSA),
        [FRAMES, SIZE, "attention_order=time_space"],
    ),
    "self-attention space first": (
        dict(attention_type=FSA),
        [FRAMES, SIZE, "attention_order=space_time", "pooling=sum"],
    ),
    "self-attention sampled": (
        dict(attention_type=FSA, sampled_frames=4),
        [FRAMES, SIZE, "num_sampled_frames=4", "attention_order=time_space"],
    ),
    "dot product": (dict(attention_type=FDP), [FRAMES, SIZE, f"attention_type={FDP}"]),
    "dot product max": (
        dict(attention_type=FDP),
        [FRAMES, SIZE, f"attention_type={FDP}", "pooling=max"],
    ),
    "dot product sampled": (
        dict(attention_type=FDP, sampled_frames=4),
        [FRAMES, SIZE, "num_sampled_frames=4", f"attention_type={FDP}"],
    ),
} | {
    f"{kind} {pooling}": (
        dict(attention_type=attention_type, class_token=False),
        [*settings, f"pooling={pooling}"],
    )
    for kind, attention_type, settings in (
        ("joint", JOINT, [FRAMES, SIZE, "attention_type=joint"]),
        ("encoder", FE, [SIZE]),
    )
    for pooling in ("mean", "max", "sum")
}
CONTAINERS = ("optimizer", "params", "pre-Linen")
BLOCK = "Transformer/encoderblock_1"


def params_of(case, **changes):
    return random_params(**{**MODELS[case][0], **changes})


def settings_of(case):
    return MODELS[case][1]


def flags_of(case):
    return ["--config", *settings_of(case)]


def expected_config(case):
    """The config of a case, from what was drawn and not from names and shapes."""
    drawn, settings = MODELS[case]
    values = dict(setting.split("=") for setting in settings)
    sampled = drawn.get("sampled_frames")
    return vivit_jax.VivitConfig(
        **VIVIT | dict(tubelet_size=(1 if sampled else 2, 8, 8)),
        num_sampled_frames=sampled,
        num_temporal_layers=2 if drawn["attention_type"] == FE and "only" not in case else 4,
        attention_type=drawn["attention_type"],
        spatial_only=drawn.get("spatial_only", False),
        attention_order=values.get("attention_order", "time_space"),
        pooling=values.get("pooling"),
    )


def nested(params):
    return unflatten_dict({tuple(name.split("/")): value for name, value in params.items()})


def pre_linen(params):
    """Submodules of a block in one row of numbers, in the order in which it calls them."""
    row = {
        "LayerNorm_0": "LayerNorm_0",
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
        "LayerNorm_1": "LayerNorm_2",
        "MlpBlock_0": "MlpBlock_3",
    }
    return {
        "/".join(row.get(part, part) for part in name.split("/")): value
        for name, value in params.items()
    }


def write(directory, params, container="optimizer", name="checkpoint_300"):
    """A train state as scenic leaves it, by flax."""
    tree = nested(pre_linen(params) if container == "pre-Linen" else params)
    momentum = {key: np.zeros(3, np.float32) for key in ("embedding", "Transformer")}
    state = {
        "accum_train_time": 12.5,
        "global_step": np.int32(300),
        "metadata": None,
        "model_state": {},
        "rng": np.array([0, 7], np.uint32),
    }
    if container == "params":
        state |= {"opt_state": {"0": {"mu": tree, "nu": None}, "1": {}}, "params": tree}
    else:
        target = {"params": tree} if container == "pre-Linen" else tree
        held = {"param_states": momentum, "step": np.int32(300), "grad_ema": None}
        state["optimizer"] = {"state": held, "target": target}
    directory.mkdir(exist_ok=True, parents=True)
    (directory / name).write_bytes(msgpack_serialize(state))
    return directory / name


def restored(directory):
    """The parameters, by the accesses that scenic's loaders make; FrozenDicts where they do."""
    state = restore_checkpoint(str(directory), None)
    if "params" in state:
        params = state["params"]
    else:
        params = state["optimizer"]["target"]
        assert "params" not in params  # would be converted from pre-Linen names
    # Of two loaders one accepts None here and one does not; an empty dict suits both.
    assert flax.core.freeze(state["model_state"]) == flax.core.freeze({})
    assert int(state["global_step"]) == 0 and state.get("metadata") is None
    assert state["rng"].shape == (2,) and state["rng"].dtype == np.uint32
    return {"/".join(path): value for path, value in flatten_dict(params).items()}


def same_bits(got, wanted):
    return same_tensors({name: np.asarray(value) for name, value in got.items()}, wanted)


# --- the published trees ------------------------------------------------------------------------


def published_tree(kind, *, width=768, heads=12, layers=12, temporal=4, mlp=3072, classes=400):
    """Shapes by name for 32x224x224 in tubelets of 2x16x16, as scenic initialises them."""
    tree = {"embedding/kernel": (2, 16, 16, 3, width), "embedding/bias": (width,)}
    tree |= {"output_projection/kernel": (width, classes), "output_projection/bias": (classes,)}
    per_head = (heads, width // heads)
    attention = {"out/kernel": (*per_head, width), "out/bias": (width,)}
    for part in ("query", "key", "value"):
        attention |= {f"{part}/kernel": (width, *per_head), f"{part}/bias": per_head}
    perceptron = {"Dense_0/kernel": (width, mlp), "Dense_0/bias": (mlp,)}
    perceptron |= {"Dense_1/kernel": (mlp, width), "Dense_1/bias": (width,)}
    norm = {"scale": (width,), "bias": (width,)}
    block = {
        "LayerNorm_0": norm,
        "MultiHeadDotProductAttention_0": attention,
        "LayerNorm_1": norm,
        "MlpBlock_0": perceptron,
    }
    if kind == "fsa":
        block = {
            "LayerNorm_time": norm,
            "MultiHeadDotProductAttention_time": attention,
            "LayerNorm_space": norm,
            "MultiHeadDotProductAttention_space": attention,
            "LayerNorm_mlp": norm,
            "MlpBlock": perceptron,
        }
    stages = {
        "joint": [("Transformer", "cls", 3137, layers)],
        "fe": [
            ("SpatialTransformer", "cls_SpatialTransformer", 197, layers),
            ("TemporalTransformer", "cls_TemporalTransformer", 17, temporal),
        ],
    }.get(kind, [("Transformer", None, 3136, layers)])
    for name, cls, positions, depth in stages:
        if cls:
            tree[cls] = (1, 1, width)
        tree[f"{name}/posembed_input/pos_embedding"] = (1, positions, width)
        tree |= {f"{name}/encoder_norm/{leaf}": shape for leaf, shape in norm.items()}
        for i in range(depth):
            for module, leaves in block.items():
                for leaf, shape in leaves.items():
                    tree[f"{name}/encoderblock_{i}/{module}/{leaf}"] = shape
    return tree


LARGE = dict(width=1024, heads=16, layers=24, mlp=4096)
TREES = {
    "vivit-b-16x2-kinetics400": (published_tree("joint"), 200, 88_954_000),
    "vivit-b-16x2-fe-kinetics400": (published_tree("fe"), 268, 115_062_928),
    "vivit-b-16x2-fsa-kinetics400": (published_tree("fsa"), 319, 117_319_312),
    "vivit-b-16x2-fdp-kinetics400": (published_tree("fdp"), 199, 88_952_464),
    "vivit-l-16x2-fe-kinetics400": (published_tree("fe", temporal=24, **LARGE), 780, 606_827_920),
    "vivit-l-16x2-fe with 4 layers": (published_tree("fe", **LARGE), 460, 354_903_440),
}
ASKED = {"b-16x2-kin": ["num_frames=32"], "fdp": ["num_frames=32", f"attention_type={FDP}"]}
ASKED["fsa"] = ["num_frames=32", "attention_order=time_space"]


def preset(name):
    if name in vivit_jax.PRESETS:
        return vivit_jax.PRESETS[name].config
    large = vivit_jax.PRESETS["vivit-l-16x2-fe-kinetics400"].config
    return dataclasses.replace(large, num_temporal_layers=4)


@pytest.mark.parametrize("name", mostly_slow(TREES, *[*TREES][::2]))
def test_exported_trees_are_the_published_ones(name):
    tree, leaves, parameters = TREES[name]
    model = build_model(preset(name), "classification")
    shapes = param_tree.shapes_of(param_tree.flatten(abstract_params(model)))
    # A broadcast scalar has a shape and no data.
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    rules = published("vivit", "classification", layout="scenic").rules(model.config)
    exported = export_params(params, rules, shapes)
    assert {path: tensor.shape for path, tensor in exported.items()} == tree
    assert len(exported) == leaves
    assert sum(int(np.prod(tensor.shape)) for tensor in exported.values()) == parameters


@pytest.mark.parametrize("name", TREES)
def test_published_trees_say_their_config(name):
    tensors = {path: SimpleNamespace(shape=shape) for path, shape in TREES[name][0].items()}
    asked = next((more for key, more in ASKED.items() if key in name), [])
    settings = ["image_size=224", *asked]
    config, head, notes = scenic.infer_config(Path("checkpoint_1"), tensors, {}, settings)
    assert config == preset(name) and head == "classification"
    assert notes == [] or "fsa" in name or "fdp" in name
    assert not scenic.is_image_model(tensors)
    # The example in the message is a command line that works, here with the right sizes too.
    with pytest.raises(ConfigError, match="the weights do not say") as error:
        scenic.infer_config(Path("checkpoint_1"), tensors, {}, [])
    example = str(error.value).partition("--config ")[2].split()
    assert scenic.infer_config(Path("checkpoint_1"), tensors, {}, example)[0].image_size == 224


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", MODELS)
def test_parameters_are_found_in_every_container(tmp_path, case, container):
    params = params_of(case)
    path = write(tmp_path, params, container)
    found, left_out = scenic.parameters(path, open_msgpack(path))
    assert same_bits({name: tensor.read() for name, tensor in found.items()}, params)
    assert len(found) + len(left_out) == len(open_msgpack(path))
    assert "rng" in left_out and "metadata" in left_out


@pytest.mark.parametrize("case", MODELS)
def test_linen_names_are_those_of_flax(case):
    """Linen names stay; pre-Linen ones become what flax's own conversion makes of them."""
    for names in (params_of(case), pre_linen(params_of(case))):
        wanted = convert_pre_linen(nested({name: name for name in names}))
        new_by_old = {old: "/".join(new) for new, old in flatten_dict(wanted).items()}
        assert scenic.linen_names(names) == new_by_old


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("case", MODELS)
def test_round_trip(run, tmp_path, case):
    params = params_of(case)
    index = list(MODELS).index(case)
    container, back = CONTAINERS[index % 3], CONTAINERS[index % 2]
    write(tmp_path / "scenic", params, container)
    status, out, err = run("convert", tmp_path / "scenic", tmp_path / "hf", *flags_of(case))
    assert (status, err) == (0, "")
    state = "opt_state/0" if container == "params" else "optimizer/state"
    assert f"\n  {state} (" in out and "rng  left out: training state, not weights" in out
    assert f"{sum(value.size for value in params.values()):,} parameters" in out
    flags = ["--to", "scenic", "--container", back]
    assert run("convert", tmp_path / "hf", tmp_path / "back", *flags)[0] == 0
    assert same_bits(restored(tmp_path / "back"), params)
    assert (back == "params") == ("params" in restore_checkpoint(str(tmp_path / "back"), None))
    files = sorted(path.name for path in (tmp_path / "back").iterdir())
    assert files == ["checkpoint_0", "config.json", "preprocessor_config.json"]
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert vivit_jax.VivitConfig.from_dict(config) == expected_config(case)
    assert config == json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    "case",
    [
        "joint",
        "joint sampled",
        pytest.param("joint mean", marks=pytest.mark.slow),
        "encoder",
        pytest.param("encoder max", marks=pytest.mark.slow),
        pytest.param("encoder spatial only", marks=pytest.mark.slow),
        "self-attention space first",
        "dot product",
    ],
)
def test_what_was_converted_computes_what_it_computed(tmp_path, case):
    params, config = params_of(case), expected_config(case)
    path = write(tmp_path / "scenic", params, "pre-Linen")
    convert_checkpoint(path, tmp_path / "hf", settings=settings_of(case))
    pixels = np.random.default_rng(1).standard_normal((2, 6, 24, 16, 3)).astype(np.float32)
    wanted = reference(config, params, pixels)
    model, loaded = vivit_jax.from_pretrained(tmp_path / "hf")
    assert_close(
        jax.jit(model.apply)({"params": loaded}, pixels).logits, wanted["logits"], "logits"
    )


@pytest.mark.parametrize(
    ("case", "dtype"),
    [("joint", "float16"), ("encoder sampled", ml_dtypes.bfloat16), ("dot product", "mixed")],
)
def test_dtypes_are_kept(run, tmp_path, case, dtype):
    params = params_of(case)
    for name, value in params.items():
        if dtype != "mixed" or "encoderblock_1" in name:
            params[name] = value.astype("float16" if dtype == "mixed" else dtype)
    write(tmp_path / "scenic", params)
    assert run("convert", tmp_path / "scenic", tmp_path / "hf", *flags_of(case))[0] == 0
    assert run("convert", tmp_path / "hf", tmp_path / "back", "--to", "scenic")[0] == 0
    assert same_bits(restored(tmp_path / "back"), params)
    flags = [*flags_of(case), "--dtype", "float32", "--to", "scenic"]
    assert run("convert", tmp_path / "scenic", tmp_path / "wide", *flags)[0] == 0
    wide = {name: value.astype(np.float32) for name, value in params.items()}
    assert same_bits(restored(tmp_path / "wide"), wide)


def test_a_written_checkpoint_is_opened_as_it_is(tmp_path):
    """config.json beside it says everything, also where names and shapes are an image model's."""
    case = "joint sampled"
    params = params_of(case, grid=(4, 2, 2))  # 16 positions: four frames, or one of 4 x 4
    settings = [FRAMES, "image_size=16", "num_sampled_frames=4"]
    path = write(tmp_path / "scenic", params)
    convert_checkpoint(
        path, tmp_path / "out", from_layout="scenic", to_layout="scenic", settings=settings
    )
    model, loaded = vivit_jax.from_pretrained(tmp_path / "out", scan_layers=False)
    assert model.config.num_sampled_frames == 4 and model.config.image_size == 16
    kernel = loaded["backbone"]["patch_embed"]["kernel"]
    np.testing.assert_array_equal(kernel[0], params["embedding/kernel"])
    headless, _ = vivit_jax.from_pretrained(tmp_path / "out", head="none")
    assert isinstance(headless, vivit_jax.VivitModel)
    assert same_bits(restored(tmp_path / "out"), params)


@pytest.mark.parametrize("case", ["vivit base", "vivit cls"])
def test_from_transformers_and_back(run, checkpoints, tmp_path, case):
    source = checkpoints.path(case)
    assert run("convert", source, tmp_path / "scenic", "--to", "scenic")[0] == 0
    (tmp_path / "scenic/config.json").unlink()
    status, out, _ = run("convert", tmp_path / "scenic", tmp_path / "hf", *flags_of("joint"))
    assert status == 0 and "rng  left out" in out
    assert same_tensors(read_safetensors(tmp_path / "hf"), checkpoints.hub_tensors(case))
    read = vivit_jax.VivitConfig.from_dict
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "hf"))
    # A model without a classifier has labels in transformers' config, but nowhere in its weights.
    labels = dict(num_labels=2, id2label=None) if case == "vivit base" else {}
    pooler = read(after).pooler_output_size
    same = dataclasses.replace(read(before), pooler_output_size=pooler, **labels)
    assert read(after) == same and pooler in (None, 48)
    assert before["architectures"] == after["architectures"]


# --- what the weights say -----------------------------------------------------------------------


@pytest.mark.parametrize("case", MODELS)
def test_config_is_read_off(case):
    config, head, notes = scenic.infer_config(Path("x"), params_of(case), {}, settings_of(case))
    assert config == expected_config(case) and head == "classification"
    asked_pooling = any(setting.startswith("pooling=") for setting in settings_of(case))
    assert any("pooling=mean is assumed" in note for note in notes) == (
        config.pooling != "cls" and not asked_pooling
    )


def test_sizes_are_read_off():
    drawn = dict(channels=1, width=24, heads=3, layers=4, temporal_layers=1, mlp=40, classes=7)
    params = params_of("encoder", grid=(5, 3, 2), tubelet=(4, 8, 8), **drawn)
    config, _, _ = scenic.infer_config(Path("x"), params, {}, [SIZE])
    assert config == vivit_jax.VivitConfig(
        image_size=(24, 16),
        num_frames=20,
        tubelet_size=(4, 8, 8),
        num_channels=1,
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=4,
        num_temporal_layers=1,
        intermediate_size=40,
        num_labels=7,
        attention_type=FE,
    )


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        ("joint", "image_size, num_frames"),
        ("joint sampled", "image_size, num_frames, num_sampled_frames"),
        ("encoder", "image_size"),
        ("encoder sampled", "image_size, num_frames"),
        ("encoder spatial only", "image_size, num_frames"),
        (
            "self-attention time first",
            "image_size, attention_order (time_space or space_time), num_frames",
        ),
        ("joint mean", "image_size, attention_type (joint or factorised_dot_product), num_frames"),
        ("dot product", "image_size, attention_type (joint or factorised_dot_product), num_frames"),
    ],
)
def test_the_rest_is_asked_for_at_once(run, tmp_path, case, asked):
    write(tmp_path / "scenic", params_of(case))
    for command in (
        ["convert", tmp_path / "scenic", tmp_path / "out"],
        ["verify", tmp_path / "scenic"],
    ):
        status, out, err = run(*command)
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert f"the weights do not say {asked}; there are" in err, err
        assert "for tubelets of" in err and "--config image_size=224" in err
    assert not (tmp_path / "out").exists()
    # One of them is not enough, and the error lists what is left.
    if "," in asked:
        _, _, err = run("convert", tmp_path / "scenic", tmp_path / "out", "--config", SIZE)
        assert f"do not say {asked.removeprefix('image_size, ')};" in err


@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        ("joint", ["num_frames=12", SIZE], "holds 19 positions, expected 37 for num_frames=12, "),
        (
            "joint",
            [FRAMES, "image_size=32,16"],
            "expected 25 for num_frames=6, image_size=(32, 16)",
        ),
        ("joint", [FRAMES, SIZE, "pooling=mean"], "pooling='mean', the weights say 'cls'"),
        ("joint", [FRAMES, "image_size=4"], "image_size"),
        ("joint", [FRAMES, SIZE, "num_labels=4"], "num_labels=4, the weights say 5"),
        ("joint", [FRAMES, SIZE, "num_heads=4"], "no field 'num_heads'"),
        ("encoder", ["image_size=16"], "SpatialTransformer/posembed_input/pos_embedding holds 7"),
        ("encoder", [SIZE, "num_frames=8"], "num_frames=8, the weights say 6"),
        (
            "joint sampled",
            [FRAMES, SIZE, "num_sampled_frames=8"],
            "num_sampled_frames 8 exceeds num_frames 6",
        ),
        (
            "dot product",
            [FRAMES, SIZE, f"attention_type={FDP}", "pooling=cls"],
            "pooling='cls', the weights say",
        ),
    ],
)
def test_wrong_settings(run, tmp_path, case, settings, expected):
    write(tmp_path / "scenic", params_of(case))
    status, out, err = run("convert", tmp_path / "scenic", tmp_path / "out", "--config", *settings)
    assert (status, out) == (2, "") and expected in err, err
    assert "Traceback" not in err and sorted(p.name for p in tmp_path.iterdir()) == ["scenic"]


def test_settings_override_what_was_read():
    settings = [*settings_of("joint"), "layer_norm_eps=1e-5", 'id2label=["a","b","c","d","e"]']
    config, _, _ = scenic.infer_config(Path("x"), params_of("joint"), {}, settings)
    assert config.layer_norm_eps == 1e-5 and config.labels == ("a", "b", "c", "d", "e")
    settings = [SIZE, "num_frames=6", "drop_path_rate=0.2"]
    config, _, _ = scenic.infer_config(Path("x"), params_of("encoder"), {}, settings)
    assert config.drop_path_rate == 0.2
    scenic.check_function(config)
    with pytest.raises(ConfigError, match="pooler_act='relu'"):
        scenic.check_function(dataclasses.replace(config, pooler_act="relu"), pooler=True)
    scenic.check_function(dataclasses.replace(config, pooler_act="relu"))


def without_head(params):
    for leaf in ("kernel", "bias"):
        params.pop(f"output_projection/{leaf}")
    return params


def with_pre_logits(params, width=20):
    rng = np.random.default_rng(3)
    params["pre_logits/kernel"] = rng.standard_normal((48, width)).astype(np.float32)
    params["pre_logits/bias"] = rng.standard_normal(width).astype(np.float32)
    return params


@pytest.mark.parametrize(
    ("case", "pooler"),
    [("joint", False), ("joint", True), ("encoder", True), ("dot product", False)],
)
def test_without_a_head(run, tmp_path, case, pooler):
    params = without_head(params_of(case))
    if pooler:
        params = with_pre_logits(params)
    write(tmp_path / "scenic", params)
    assert run("convert", tmp_path / "scenic", tmp_path / "hf", *flags_of(case))[0] == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["architectures"] == ["VivitModel"]
    assert ("pooler.dense.bias" in read_safetensors(tmp_path / "hf")) == pooler
    model, _ = vivit_jax.from_pretrained(tmp_path / "hf")
    assert isinstance(model, vivit_jax.VivitModel) and model.add_pooling_layer == pooler
    assert not pooler or model.config.pooler_output_size == 20
    assert run("convert", tmp_path / "hf", tmp_path / "back", "--to", "scenic")[0] == 0
    assert same_bits(restored(tmp_path / "back"), params)


# --- damage -------------------------------------------------------------------------------------

SPATIAL, TEMPORAL = "SpatialTransformer", "TemporalTransformer"


DAMAGE = {
    "a tensor of a middle block": (
        "joint",
        pop(f"{BLOCK}/MlpBlock_0/Dense_0/bias"),
        [f"1 missing\n  missing (1):\n    {BLOCK}/MlpBlock_0/Dense_0/bias  expected (80,)"],
    ),
    "a middle block": (
        "joint",
        pop(f"{BLOCK}/"),
        ["16 missing", f"{BLOCK}/LayerNorm_0/scale", f"{BLOCK}/MlpBlock_0/Dense_1/kernel"],
    ),
    "the first block": ("joint", pop("Transformer/encoderblock_0/"), ["encoderblock_0/"]),
    "a middle block of the temporal stage": (
        "encoder",
        pop(f"{TEMPORAL}/encoderblock_0/"),
        ["16 missing", f"{TEMPORAL}/encoderblock_0/LayerNorm_1/bias"],
    ),
    "a temporal norm": (
        "encoder",
        pop(f"{TEMPORAL}/encoder_norm/scale"),
        [f"1 missing\n  missing (1):\n    {TEMPORAL}/encoder_norm/scale"],
    ),
    "the norm before temporal attention": (
        "self-attention time first",
        pop(f"{BLOCK}/LayerNorm_time/bias"),
        [f"{BLOCK}/LayerNorm_time/bias"],
    ),
    "the first temporal attention": (
        "self-attention time first",
        pop("Transformer/encoderblock_0/MultiHeadDotProductAttention_time/query/kernel"),
        ["encoderblock_0/MultiHeadDotProductAttention_time/query/kernel"],
    ),
    "temporal positions": (
        "encoder",
        pop(f"{TEMPORAL}/posembed_input"),
        [f"{TEMPORAL}/posembed_input/pos_embedding"],
    ),
    "the spatial class token": (
        "encoder",
        pop("cls_Spatial"),
        ["1 missing\n  missing (1):\n    cls_SpatialTransformer"],
    ),
    "the temporal class token": (
        "encoder",
        pop("cls_Temporal"),
        ["1 missing\n  missing (1):\n    cls_TemporalTransformer"],
    ),
    "positions": ("joint", pop("Transformer/posembed_input"), ["pos_embedding"]),
    "the classifier's bias": ("joint", pop("output_projection/bias"), ["output_projection/bias"]),
    "the classifier's kernel": (
        "joint",
        pop("output_projection/kernel"),
        ["1 unexpected", "output_projection/bias"],
    ),
    "one tensor too many": (
        "joint",
        put(f"{BLOCK}/LayerNorm_2/scale", 48),
        [f"1 unexpected\n  unexpected (1):\n    {BLOCK}/LayerNorm_2/scale"],
    ),
    "pre_logits and a classifier": (
        "joint",
        with_pre_logits,
        ["2 unexpected", "pre_logits/bias", "pre_logits/kernel"],
    ),
    "an embedding of three axes": (
        "joint",
        put("embedding/kernel", (8, 8, 48)),
        ["no tensor of the right rank is named embedding/kernel"],
    ),
    "an embedding of six axes": (
        "encoder",
        put("embedding/kernel", (1, 2, 8, 8, 3, 48)),
        ["no tensor of the right rank is named embedding/kernel"],
    ),
    "no embedding": ("joint", pop("embedding/kernel"), ["is named embedding/kernel"]),
    "positions of one axis": (
        "encoder",
        put(f"{TEMPORAL}/posembed_input/pos_embedding", 48),
        [f"{TEMPORAL}/posembed_input/pos_embedding"],
    ),
    "integers": ("joint", put("embedding/bias", 48, "int32"), ["embedding/bias  int32"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_written(run, tmp_path, damage):
    case, edit, expected = DAMAGE[damage]
    params = params_of(case)
    edit(params)
    container = "params" if "first" in damage else "optimizer"
    write(tmp_path / "scenic", params, container)
    status, out, err = run("convert", tmp_path / "scenic", tmp_path / "out", *flags_of(case))
    assert (status, out) == (2, "") and "Traceback" not in err
    for part in expected:
        assert part in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenic"]


def test_a_cut_file(run, tmp_path):
    path = write(tmp_path / "scenic", params_of("joint"))
    path.write_bytes(path.read_bytes()[:-100])
    status, _, err = run("convert", path, tmp_path / "out", *flags_of("joint"))
    assert status == 2 and "not a complete msgpack file" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenic"]


# --- writing: refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "flags", "expected"),
    [
        ("mae cls", [], "layout 'scenic' holds vivit, not videomae"),
        ("mae base", [], "layout 'scenic' holds vivit, not videomae"),
        ("vivit cls", ["--config", "hidden_act=gelu"], "hidden_act='gelu'"),
        ("vivit cls", ["--config", "layer_norm_eps=1e-5"], "layer_norm_eps=1e-05"),
        ("vivit cls no bias", [], "scenic computes qkv_bias=True; this model has qkv_bias=False"),
        ("vivit base relu pooler", [], "this model has pooler_act='relu'"),
        ("vivit cls", ["--max-shard-size", "1MB"], "a scenic checkpoint is one file"),
    ],
)
def test_refused_by_scenics_layout(run, checkpoints, tmp_path, case, flags, expected):
    source = checkpoints.path(case)
    status, out, err = run("convert", source, tmp_path / "out", "--to", "scenic", *flags)
    assert (status, out) == (2, "") and expected in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--container", "params"], "container 'params' is not for the hf layout"),
        (["--inflation", "average"], "is not an image model: inflation would have no effect"),
        (["--positions", "tile", "--temporal-attention", "zero"], "positions, temporal_attention"),
        (["--from", "hf"], "config.json does not exist"),
        (["--from", "vit"], "expected an image ViT"),
    ],
)
def test_flags_that_do_not_apply(run, tmp_path, flags, expected):
    write(tmp_path / "scenic", params_of("joint"))
    status, out, err = run(
        "convert", tmp_path / "scenic", tmp_path / "out", *flags_of("joint"), *flags
    )
    assert (status, out) == (2, "") and expected in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scenic"]


def test_named_layouts_that_are_others(run, checkpoints, tmp_path):
    status, _, err = run(
        "convert", checkpoints.path("vivit cls"), tmp_path / "out", "--from", "scenic"
    )
    assert status == 2 and "embedding/kernel" in err and "Traceback" not in err
    (tmp_path / "empty").write_bytes(msgpack_serialize({}))
    for flags in (["--from", "scenic"], []):
        status, _, err = run("convert", tmp_path / "empty", tmp_path / "out", *flags)
        assert status == 2 and "Traceback" not in err


def test_another_step_at_the_destination(run, checkpoints, tmp_path):
    """A reader takes the latest step, which would not be the one that was written."""
    out = tmp_path / "out"
    later = write(out, params_of("joint"))
    flags = ["--to", "scenic", "--overwrite"]
    status, _, err = run("convert", checkpoints.path("vivit cls"), out, *flags)
    assert status == 2 and "checkpoint_300, which would be read instead of checkpoint_0" in err
    assert [path.name for path in out.iterdir()] == ["checkpoint_300"]
    later.unlink()
    shutil.copy(checkpoints.path("mae cls") / "model.safetensors", out)
    assert run("convert", checkpoints.path("vivit cls"), out, *flags)[0] == 0
    assert not (out / "model.safetensors").exists()  # it would be preferred too
    assert run("convert", checkpoints.path("vivit cls"), out, *flags)[0] == 0


# --- inspect, verify, transformers, the processor -----------------------------------------------


def test_inspect(run, tmp_path):
    path = write(tmp_path / "scenic", params_of("joint"))
    status, out, err = run("inspect", path)
    assert status == 2 and "the weights do not say image_size, num_frames" in err
    name = "optimizer/target/Transformer/encoderblock_{0-2}/LayerNorm_0/bias  (48,) float32"
    assert name in out and "metadata  () object" in out and "sha256" in out
    status, out, err = run("inspect", path, *flags_of("joint"))
    assert (status, err) == (0, "")
    for part in (
        f"layout      scenic: VivitForVideoClassification ({path})\n",
        "  image_size: [24, 16]\n",
        "  rng  left out: training state, not weights of the model\n",
        "8 of them left out, none missing",
    ):
        assert part in out, out
    # What had to be assumed is said here too, not only by convert.
    path = write(tmp_path / "mean", params_of("encoder mean"))
    assert "pooling=mean is assumed" in run("inspect", path, "--config", SIZE)[1]


def test_verify_compares_with_transformers(run, tmp_path):
    path = write(tmp_path / "scenic", params_of("joint"), "pre-Linen")
    status, out, err = run("verify", path, *flags_of("joint"), "--json")
    result = json.loads(out)
    assert status == 0 and result["passed"] and result["source"] == str(path), err
    assert [row["name"] for row in result["rows"]][-2:] == ["logits", "loss"]
    assert max(row["difference"] / max(1, row["scale"]) for row in result["rows"]) < 2e-5


@pytest.mark.parametrize("case", [case for case in MODELS if case != "joint"])
def test_verify_says_where_there_is_no_reference(run, tmp_path, case):
    path = write(tmp_path / "scenic", params_of(case))
    status, out, err = run("verify", path, *flags_of(case))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert f"{expected_config(case).attention_type} attention" in err
    assert "No PyTorch reference exists for it" in err and "vivit-convert inspect" in err


def test_verify_takes_no_settings_where_there_is_a_config(run, checkpoints):
    status, out, err = run("verify", checkpoints.path("vivit cls"), "--config", "hidden_act=gelu")
    assert (status, out) == (2, "") and "--config is for checkpoints without a config.json" in err


@pytest.mark.parametrize("case", ["encoder", "joint mean", "self-attention sampled", "dot product"])
def test_transformers_refuses_what_it_does_not_compute(tmp_path, case):
    import transformers

    path = write(tmp_path / "scenic", params_of(case))
    convert_checkpoint(path, tmp_path / "hf", settings=settings_of(case))
    transformers.utils.logging.set_verbosity_error()
    with pytest.raises(ValueError, match="`vivit_jax`"):
        transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "hf")
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.VivitForVideoClassification.from_pretrained(tmp_path / "hf")


def test_transformers_loads_joint_attention(tmp_path):
    import torch
    import transformers

    params = params_of("joint")
    path = write(tmp_path / "scenic", params)
    convert_checkpoint(path, tmp_path / "hf", settings=settings_of("joint"))
    pixels = np.random.default_rng(1).standard_normal((2, 6, 24, 16, 3)).astype(np.float32)
    wanted = forward(params, pixels, attention_type=JOINT)["logits"]
    for cls in (
        transformers.AutoModelForVideoClassification,
        transformers.VivitForVideoClassification,
    ):
        model, info = cls.from_pretrained(tmp_path / "hf", output_loading_info=True)
        assert not any(info.values()), info
        with torch.inference_mode():
            logits = model(torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).copy())).logits
        assert_close(logits.numpy(), wanted, "logits")


def test_processor(run, tmp_path):
    path = write(tmp_path / "scenic", params_of("encoder"))
    assert run("convert", path, tmp_path / "hf", *flags_of("encoder"))[0] == 0
    processor = vivit_jax.VideoProcessor.from_pretrained(tmp_path / "hf")
    values = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert values["crop_size"] == {"height": 24, "width": 16}
    assert values["size"] == {"shortest_edge": 16 + 32}
    frames = np.zeros((6, 64, 80, 3), np.uint8)
    frames[:, :, 40:] = 255
    pixels = processor(frames)
    assert pixels.shape == (1, 6, 24, 16, 3)
    assert abs(pixels.min() + 1) < 1e-6 and abs(pixels.max() - 1) < 1e-6

    # A file that lies beside the checkpoint is the one it was used with.
    vivit_jax.VideoProcessor.named("vivit-kinetics400").save_pretrained(tmp_path / "scenic")
    beside = (tmp_path / "scenic/preprocessor_config.json").read_bytes()
    for target, flags in (("copied", []), ("scenic2", ["--to", "scenic"])):
        assert run("convert", path, tmp_path / target, *flags_of("encoder"), *flags)[0] == 0
        assert (tmp_path / target / "preprocessor_config.json").read_bytes() == beside
