# SPDX-License-Identifier: Apache-2.0
"""The .pth files of VideoMAE's authors: read, written, inspected, verified, refused.

The files come from tiny_authors.py, so that they share nothing with what reads them.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers import assert_close, bool_mask, clip
from tiny_authors import (
    MODELS,
    read,
    settings_of,
    shapes,
    state,
    torch_state,
    training_state,
    write,
)
from tiny_checkpoints import pop, put, read_safetensors, same_tensors

import vivit_jax
from checkpoints_convert.convert import convert_checkpoint
from checkpoints_convert.layouts import videomae_authors
from checkpoints_convert.layouts.hf import transformers_notes
from checkpoints_convert.layouts.registry import container_names, published
from checkpoints_convert.rules import export_params
from checkpoints_convert.source import open_source
from vivit_jax import param_tree
from vivit_jax.errors import CheckpointError, ConfigError, MissingExtra
from vivit_jax.models.build import abstract_params, build_model

CONTAINERS = tuple(videomae_authors.CONTAINERS)


def flags_of(case):
    return ["--config", *settings_of(case)]


def expected_config(case, **changes):
    """The config of a tiny model, from what was drawn and not from names and shapes."""
    drawn = MODELS[case]
    values = dict(
        image_size=(24, 16),
        num_frames=6,
        tubelet_size=2,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        layer_norm_eps=1e-6,
        fc_norm_eps=1e-6,
        decoder_norm_eps=1e-6,
        qkv_bias=drawn.get("bias", True),
        use_mean_pooling=drawn.get("mean_pooling", drawn["kind"] != "pretraining"),
        cosine_attention=drawn.get("cosine", False),
        layer_scale_init=0.1 if drawn.get("layer_scale") else 0.0,
    )
    if drawn["kind"] == "classification":
        values |= dict(num_labels=5)
    if drawn["kind"] == "pretraining":
        values |= dict(
            decoder_hidden_size=24,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=2,
            decoder_intermediate_size=40,
        )
    return vivit_jax.VideoMAEConfig(**values | changes)


def same_state(got, wanted):
    """Equal bits, dtypes, shapes and order."""
    assert list(got) == list(wanted)
    assert {n: v.shape for n, v in got.items()} == {n: v.shape for n, v in wanted.items()}
    return same_tensors(got, wanted)


# --- the published trees ------------------------------------------------------------------------

DECODERS = {
    "small": dict(width=192, heads=3, layers=4, mlp=768),
    "base": dict(width=384, heads=6, layers=4, mlp=1536),
    "large": dict(width=512, heads=8, layers=12, mlp=2048),
    "large V2": dict(width=512, heads=8, layers=4, mlp=2048),
    "huge": dict(width=640, heads=8, layers=12, mlp=2560),
    "huge V2": dict(width=512, heads=8, layers=4, mlp=2048),
    "giant V2": dict(width=512, heads=8, layers=4, mlp=2234),
}
ENCODERS = {
    "small": dict(width=384, heads=6, layers=12, mlp=1536, patch=(16, 16)),
    "base": dict(width=768, heads=12, layers=12, mlp=3072, patch=(16, 16)),
    "large": dict(width=1024, heads=16, layers=24, mlp=4096, patch=(16, 16)),
    "huge": dict(width=1280, heads=16, layers=32, mlp=5120, patch=(16, 16)),
    "giant": dict(width=1408, heads=16, layers=40, mlp=6144, patch=(14, 14)),
}
# (kind, model, classes) -> parameters, as counted from the authors' modules
PUBLISHED = {
    ("pretraining", "small", 0): 24_029_376,
    ("pretraining", "base", 0): 94_210_944,
    ("pretraining", "large", 0): 342_996_992,
    ("pretraining", "large V2", 0): 317_782_016,
    ("pretraining", "huge", 0): 692_487_296,
    ("pretraining", "huge V2", 0): 645_659_392,
    ("pretraining", "giant V2", 0): 1_026_306_560,
    ("classification", "small", 400): 22_033_936,
    ("classification", "base", 400): 86_534_800,
    ("classification", "large", 400): 304_270_736,
    ("classification", "huge", 400): 632_119_440,
    ("classification", "giant", 710): 1_012_611_142,
}


def published_tree(kind, model, classes):
    encoder = ENCODERS[model.removesuffix(" V2")]
    return shapes(kind, **encoder, classes=classes, decoder=DECODERS.get(model))


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[] if key[1] in ("small", "huge", "giant V2") else pytest.mark.slow)
        for key in PUBLISHED
    ],
    ids=lambda key: " ".join(map(str, key[:2])),
)
def test_published_trees_both_ways(key):
    tree = published_tree(*key)
    assert sum(int(np.prod(shape)) for shape in tree.values()) == PUBLISHED[key]
    tensors = {name: SimpleNamespace(shape=shape) for name, shape in tree.items()}
    config, head, notes = videomae_authors.infer_config(Path("x.pth"), tensors, {}, [])
    assert (head, config.num_attention_heads) == (key[0], ENCODERS[key[1].split()[0]]["heads"])
    assert config.num_frames == 16 and config.image_size == 224
    (note,) = notes
    assert "num_frames=16, image_size=224" in note and "assumed" in note
    assert config.layer_norm_eps == config.fc_norm_eps == config.decoder_norm_eps == 1e-6
    if head == "pretraining":
        assert config.decoder_num_attention_heads == DECODERS[key[1]]["heads"]
    else:
        assert config.num_labels == key[2]
    # What is read off a file is the preset of that name.
    version = "v2" if "V2" in key[1] or "giant" in key[1] else "v1"
    classes = {0: "", 400: "-kinetics400", 710: "-kinetics710"}[key[2]]
    preset = vivit_jax.PRESETS[f"videomae-{version}-{key[1].split()[0]}{classes}"].config
    ours, wanted = config.to_dict(), preset.to_dict()
    decoder = {name for name in ours if name.startswith("decoder_") and head != "pretraining"}
    assert {k: ours[k] for k in ours.keys() - decoder} == {
        k: wanted[k] for k in wanted.keys() - decoder
    }
    model = build_model(config, head)
    leaves = param_tree.shapes_of(param_tree.flatten(abstract_params(model)))
    # A broadcast scalar has a shape and no data.
    params = {path: np.broadcast_to(np.float32(0), shape) for path, shape in leaves.items()}
    rules = published("videomae", head, layout="videomae").rules(config)
    exported = export_params(params, rules, leaves)
    assert {name: t.shape for name, t in exported.items()} == tree and list(exported) == list(tree)
    videomae_authors.check_function(config, head)


def test_names_of_the_base_models():
    """The two trees of recipes.md 3.2 once more, by hand."""
    pretraining = published_tree("pretraining", "base", 0)
    assert len(pretraining) == 218 and len(published_tree("classification", "base", 400)) == 162
    assert list(pretraining)[0] == "mask_token" and pretraining["mask_token"] == (1, 1, 384)
    assert list(pretraining)[-1] == "encoder_to_decoder.weight"
    for name, shape in {
        "encoder.patch_embed.proj.weight": (768, 3, 2, 16, 16),
        "encoder.blocks.11.attn.q_bias": (768,),
        "encoder.blocks.11.attn.qkv.weight": (2304, 768),
        "encoder.blocks.0.mlp.fc1.weight": (3072, 768),
        "encoder.norm.bias": (768,),
        "decoder.blocks.3.attn.qkv.weight": (1152, 384),
        "decoder.blocks.3.mlp.fc1.weight": (1536, 384),
        "decoder.head.weight": (1536, 384),
        "encoder_to_decoder.weight": (384, 768),
    }.items():
        assert pretraining[name] == shape


# --- there and back -----------------------------------------------------------------------------


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("case", MODELS)
def test_round_trip(run, tmp_path, case):
    tensors = state(case)
    index = list(MODELS).index(case)
    container, back = CONTAINERS[index % 3], CONTAINERS[(index + 1) % 3]
    path = write(tmp_path / "pth/checkpoint-799.pth", tensors, container)
    status, out, _ = run("convert", path, tmp_path / "hf", *flags_of(case))
    assert status == 0
    if container != "bare":
        count = 3 * len(tensors) + 3
        assert f"\n  optimizer ({count} entries)  left out: training state" in out
        assert "\n  epoch  left out: training state" in out
    assert f"{sum(value.size for value in tensors.values()):,} parameters" in out
    values = json.loads((tmp_path / "hf/config.json").read_text())
    assert vivit_jax.VideoMAEConfig.from_dict(values) == expected_config(case)
    flags = ["--to", "videomae", "--container", back]
    status, _, err = run("convert", tmp_path / "hf", tmp_path / "back", *flags)
    assert (status, err) == (0, "")
    assert same_state(read(tmp_path / "back/checkpoint.pth", back), tensors)
    files = sorted(path.name for path in (tmp_path / "back").iterdir())
    assert files == ["checkpoint.pth", "config.json", "preprocessor_config.json"]
    assert values == json.loads((tmp_path / "back/config.json").read_text())


PREFIXES = {
    "DistributedDataParallel": ("V2 fine-tuned", lambda name: f"module.{name}"),
    "torch.compile": ("pretraining", lambda name: f"_orig_mod.{name}"),
    "both": ("fine-tuned", lambda name: f"module._orig_mod.{name}"),
    "a compiled encoder": (
        "pretraining",
        lambda name: (
            name.replace("encoder.", "encoder._orig_mod.") if name.startswith("encoder.") else name
        ),
    ),
    "a detector": ("fine-tuned", lambda name: f"backbone.{name}"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_taken_off(tmp_path, prefix, container):
    case, rename = PREFIXES[prefix]
    tensors = state(case)
    renamed = {rename(name): value for name, value in tensors.items()}
    path = write(tmp_path / "x.pth", renamed, container)
    opened = open_source(path, settings=settings_of(case))
    assert opened.layout.name == "videomae" and opened.config == expected_config(case)
    assert same_tensors({name: t.read() for name, t in opened.tensors.items()}, tensors)
    assert len(opened.tensors) + len(opened.left_out) == len(opened.checkpoint.tensors)


def test_a_state_dict_of_lightning(tmp_path):
    tensors = state("pretraining")
    named = {f"model.{name}": value for name, value in tensors.items()}
    path = write(tmp_path / "x.pth", named, "state_dict")
    opened = open_source(path, settings=settings_of("pretraining"))
    assert same_tensors({name: t.read() for name, t in opened.tensors.items()}, tensors)
    assert {name.split("/")[0] for name in opened.left_out} == {"optimizer", "epoch", "scaler"}


@pytest.mark.parametrize(
    ("place", "embedding"),
    [
        (lambda held: {"model_ema": held, "epoch": 3}, "model_ema/patch_embed.proj.weight"),
        (lambda held: {"model": {"module": held}}, "model/module/patch_embed.proj.weight"),
        (lambda held: {"weights": held} | {str(i): i for i in range(9)}, "weights/patch_embed"),
    ],
)
def test_parameters_in_no_known_container(run, tmp_path, place, embedding):
    import torch

    held = place(torch_state(state("fine-tuned")))
    torch.save(held, tmp_path / "x.pth")
    status, out, err = run("convert", tmp_path / "x.pth", tmp_path / "o", *flags_of("fine-tuned"))
    assert (status, out) == (2, "") and err.count("\n") == 1
    names = [*held][:8] + ["2 more"] * (len(held) == 10)
    assert f"x.pth holds {', '.join(names)}, and a VideoMAE" in err, err
    assert "is read from model, module, state_dict or" in err
    assert f"Its patch embedding is {embedding}" in err


def test_prefixes_that_hide_a_second_model(tmp_path):
    tensors = state("fine-tuned")
    both = tensors | {f"module.{name}": value for name, value in tensors.items()}
    with pytest.raises(CheckpointError, match=r"module\.patch_embed.* are both patch_embed"):
        open_source(write(tmp_path / "x.pth", both, "bare"), settings=settings_of("fine-tuned"))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_dtypes_are_kept(run, tmp_path, dtype):
    tensors = {name: value.astype(dtype) for name, value in state("fine-tuned").items()}
    path = write(tmp_path / "x.pth", tensors, "module")
    flags = flags_of("fine-tuned")
    assert run("convert", path, tmp_path / "out", "--to", "videomae", *flags)[0] == 0
    assert same_state(read(tmp_path / "out/checkpoint.pth"), tensors)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == np.dtype(dtype).name


def test_a_written_directory_is_opened_as_it_is(tmp_path):
    case = "V2 pretraining"
    path = write(tmp_path / "x.pth", state(case))
    settings = [*settings_of(case), "layer_scale_init=0.2"]
    convert_checkpoint(path, tmp_path / "out", to_layout="videomae", settings=settings)
    model, loaded = vivit_jax.from_pretrained(tmp_path / "out", scan_layers=False)
    assert model.config.layer_scale_init == 0.2 and model.config.image_size == (24, 16)
    scale = loaded["decoder"]["layers_1"]["attention"]["scale"]
    np.testing.assert_array_equal(scale, state(case)["decoder.blocks.1.attn.scale"][:, 0, 0])
    gamma = loaded["backbone"]["layers_2"]["scale_mlp"]
    np.testing.assert_array_equal(gamma, state(case)["encoder.blocks.2.gamma_2"])
    headless, _ = vivit_jax.from_pretrained(tmp_path / "out", head="none")
    assert isinstance(headless, vivit_jax.VideoMAEModel)


def test_settings_as_a_mapping(tmp_path):
    case = "fine-tuned"
    path = write(tmp_path / "x.pth", state(case))
    settings = {"num_attention_heads": 4, "num_frames": 6, "image_size": [24, 16]}
    assert open_source(path, settings=settings).config == expected_config(case)
    with pytest.raises(ConfigError, match="no field 'num_heads'; did you mean"):
        open_source(path, settings={"num_heads": 4})
    with pytest.raises(ConfigError, match="num_attention_heads must be a whole number, got 'four'"):
        open_source(path, settings={"num_attention_heads": "four"})


def test_label_map_keeps_some_classes(run, tmp_path):
    tensors = state("fine-tuned")
    path = write(tmp_path / "x.pth", tensors)
    (tmp_path / "map.json").write_text("[4, 0, 2]")
    names = 'id2label=["a","b","c","d","e"]'
    flags = [*flags_of("fine-tuned"), names, "--label-map", tmp_path / "map.json"]
    status, out, _ = run("convert", path, tmp_path / "hf", *flags)
    assert status == 0 and "classifier: 3 of 5 classes, as " in out
    assert run("convert", tmp_path / "hf", tmp_path / "back", "--to", "videomae")[0] == 0
    wanted = dict(tensors)
    for name in ("head.weight", "head.bias"):
        wanted[name] = tensors[name][[4, 0, 2]]
    assert same_state(read(tmp_path / "back/checkpoint.pth"), wanted)
    values = json.loads((tmp_path / "hf/config.json").read_text())
    assert values["id2label"] == {"0": "e", "1": "a", "2": "c"}
    for text, expected in (("[5]", "label_map lists class 5"), ("{}", "must be a list of class")):
        (tmp_path / "map.json").write_text(text)
        status, _, err = run("convert", path, tmp_path / "out", *flags)
        assert status == 2 and expected in err
    (tmp_path / "map.json").write_text("[0]")
    flags = [*flags_of("pretraining"), "--label-map", tmp_path / "map.json"]
    path = write(tmp_path / "y.pth", state("pretraining"))
    status, _, err = run("convert", path, tmp_path / "out", *flags)
    assert status == 2 and "need a classifier" in err and not (tmp_path / "out").exists()


# --- what the files say -------------------------------------------------------------------------


def test_arguments_of_the_script_say_the_clip(tmp_path):
    case = "pretraining"
    arguments = dict(num_frames=6, input_size=32, normlize_target=False)
    path = write(tmp_path / "x.pth", state(case), **arguments)
    heads = [s for s in settings_of(case) if "heads" in s]
    opened = open_source(path, settings=heads)
    assert opened.config == expected_config(case, image_size=32, norm_pix_loss=False)
    assert opened.notes == ()
    # A mapping in the place of the Namespace says as much, and settings have the last word.
    held = training_state(state(case), "model", **arguments)
    held["args"] = vars(held["args"]) | {"num_segments": 2}
    import torch

    torch.save(held, path)
    opened = open_source(path, settings=[*heads, "image_size=16"])
    assert opened.config == expected_config(case, image_size=16, num_frames=12, norm_pix_loss=False)


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        ("fine-tuned", "num_frames, image_size, num_attention_heads"),
        ("V2 fine-tuned", "num_frames, image_size"),
        (
            "pretraining",
            "num_frames, image_size, num_attention_heads, decoder_num_attention_heads",
        ),
    ],
)
def test_the_rest_is_asked_for_at_once(run, tmp_path, case, asked):
    path = write(tmp_path / "x.pth", state(case))
    for command in (["convert", path, tmp_path / "out"], ["verify", path]):
        status, out, err = run(*command)
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert f"the weights do not say {asked}; of its widths 48" in err, err
        assert "(384, 768" not in err and "384, 768, 1024, 1280, 1408" in err
    assert not (tmp_path / "out").exists()
    # The example in the message is a command line that works.
    example = err.partition("--config ")[2].split()
    assert open_source(path, settings=example).config.num_frames == 16


@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        ("fine-tuned", ["num_labels=4"], "num_labels=4, the weights say 5"),
        ("fine-tuned", ["use_mean_pooling=false"], "use_mean_pooling=False, the weights say True"),
        ("fine-tuned", ["layer_scale_init=0.1"], "layer_scale_init=0.1, the weights say 0.0"),
        ("fine-tuned", ["num_heads=4"], "no field 'num_heads'"),
        ("V2 fine-tuned", ["num_attention_heads=8"], "num_attention_heads=8, the weights say 4"),
        ("pretraining", ["decoder_hidden_size=48"], "decoder_hidden_size=48, the weights say 24"),
    ],
)
def test_settings_that_contradict_the_weights(run, tmp_path, case, settings, expected):
    path = write(tmp_path / "x.pth", state(case))
    given = [s for s in settings_of(case) if s.split("=")[0] != settings[0].split("=")[0]]
    status, out, err = run("convert", path, tmp_path / "out", "--config", *given, *settings)
    assert (status, out) == (2, "") and expected in err, err


def test_layer_scale_is_noted(tmp_path):
    path = write(tmp_path / "x.pth", state("V2 fine-tuned"))
    (note,) = open_source(path, settings=settings_of("V2 fine-tuned")).notes
    assert "layer_scale_init=0.1: assumed" in note
    settings = [*settings_of("V2 fine-tuned"), "layer_scale_init=0.3"]
    opened = open_source(path, settings=settings)
    assert opened.notes == () and opened.config.layer_scale_init == 0.3


def test_no_note_hides_another():
    config = expected_config("fine-tuned", class_splits=(2, 3), hidden_act="selu")
    splits, act, eps = transformers_notes(config, "classification")
    assert "class_splits" in splits and "selu" in act and "fc_norm_eps is 1e-06" in eps
    config = expected_config("pretraining", image_mean=0.5, image_std=0.5)
    pixels, eps = transformers_notes(config, "pretraining")
    assert "image_mean is (0.5, 0.5, 0.5)" in pixels and "decoder_norm_eps is 1e-06" in eps
    assert transformers_notes(config, "none") == ()
    (note,) = transformers_notes(expected_config("V2 fine-tuned"), "classification")
    assert "does not have this model" in note and "'videomae_jax'" in note


# --- damage and danger --------------------------------------------------------------------------


DAMAGE = {
    "a tensor of a middle block": (
        "pretraining",
        pop("encoder.blocks.1.mlp.fc1.bias"),
        ["1 missing\n  missing (1):\n    encoder.blocks.1.mlp.fc1.bias  expected (80,)"],
    ),
    "a block of the decoder": ("pretraining", pop("decoder.blocks.0."), ["decoder.blocks.0."]),
    "the first block": ("fine-tuned", pop("blocks.0."), ["blocks.0.mlp.fc1.weight"]),
    "no embedding": ("pretraining", pop("encoder.patch_embed"), ["encoder.patch_embed.proj.weig"]),
    "the final norm": ("pretraining", pop("encoder.norm"), ["2 missing", "encoder.norm.bias"]),
    "the classifier's bias": ("fine-tuned", pop("head.bias"), ["head.bias  expected (5,)"]),
    "the classifier's kernel": ("fine-tuned", pop("head.weight"), ["is named head.weight"]),
    "a bias of one block": ("fine-tuned", pop("blocks.1.attn.q_bias"), ["blocks.1.attn.q_bias"]),
    "one tensor too many": ("fine-tuned", put("blocks.1.norm3.weight", 48), ["1 unexpected"]),
    "both norms": ("fine-tuned", put("norm.weight", 48), ["fc_norm.weight", "norm.bias"]),
    "integers": ("fine-tuned", put("head.bias", 5, "int32"), ["head.bias  int32"]),
    "learned positions": (
        "fine-tuned",
        put("pos_embed", (1, 18, 48)),
        ["holds model/pos_embed: learned positions"],
    ),
    "learned positions of the encoder": (
        "pretraining",
        put("encoder.pos_embed", (1, 19, 48)),
        ["encoder.pos_embed: learned positions (use_learnable_pos_emb) are not supported"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_written(run, tmp_path, damage):
    case, edit, expected = DAMAGE[damage]
    tensors = state(case)
    edit(tensors)
    path = write(tmp_path / "pth/x.pth", tensors)
    status, out, err = run("convert", path, tmp_path / "out", *flags_of(case))
    assert (status, out) == (2, "") and "Traceback" not in err
    for part in expected:
        assert part in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pth"]


def test_cut_files(run, tmp_path):
    path = write(tmp_path / "x.pth", state("fine-tuned"))
    data = path.read_bytes()
    for keep in (0, 100, len(data) // 2, len(data) - 300):
        path.write_bytes(data[:keep])
        status, out, err = run("convert", path, tmp_path / "out", *flags_of("fine-tuned"))
        assert (status, out) == (2, "") and f"{path} is " in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_code_in_a_pickle_is_refused_and_not_run(run, tmp_path):
    import torch

    touched = tmp_path / "touched"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (touched,))

    class Bag(argparse.Namespace):
        pass

    held = training_state(state("fine-tuned"), "model")
    for place in ("args", "epoch"):
        for danger in (Payload(), argparse.Namespace(x=Payload())):
            torch.save(held | {place: danger}, tmp_path / "x.pth")
            status, out, err = run("inspect", tmp_path / "x.pth")
            assert (status, out) == (2, "") and "could run code" in err
            assert err.endswith("torch says: Unsupported global: GLOBAL getattr\n")
    assert not touched.exists()


def test_numbers_of_numpy_in_the_training_state(tmp_path):
    """The optimiser's learning rate is an element of an array, whatever numpy pickled it."""
    import torch

    numbers = [np.dtype(code).type(1) for code in ("f8", "f4", "f2", "i8", "i4", "u1", "bool")]
    held = training_state(state("fine-tuned"), "model")
    held["numbers"] = {value.dtype.name: value for value in numbers}
    torch.save(held, tmp_path / "x.pth")
    old = tmp_path / "old.pth"
    modern, ancient = b"cnumpy._core.multiarray\nscalar\n", b"cnumpy.core.multiarray\nscalar\n"
    with zipfile.ZipFile(tmp_path / "x.pth") as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(modern, ancient))
    assert ancient in old.read_bytes()
    for path in (tmp_path / "x.pth", old):
        opened = open_source(path, settings=settings_of("fine-tuned"))
        for value in numbers:
            leaf = opened.checkpoint.tensors[f"numbers/{value.dtype.name}"]
            assert (leaf.shape, leaf.dtype, leaf.read()) == ((), value.dtype, value)
        assert opened.checkpoint.tensors["optimizer/param_groups/0/lr"].read() == 0.05
    held["numbers"] = np.zeros(3)  # an array's pickle calls more than its bytes need
    torch.save(held, path)
    with pytest.raises(CheckpointError, match=r"GLOBAL numpy\._core\.multiarray\._reconstruct$"):
        open_source(path)


def odd_values():
    import torch

    return {
        "not a dense tensor": torch.ones(5).to_sparse(),
        "stored as complex64": torch.ones(5, dtype=torch.cfloat),
        "stored as float8_e4m3fn": torch.ones(5).to(torch.float8_e4m3fn),
        "the key 0.5 of": {0.5: torch.ones(5)},
        "the key ('a', 1) of": {("a", 1): 3},
    }


@pytest.mark.parametrize("expected", odd_values())
def test_odd_values_beside_the_model_are_left_out_and_in_it_refused(run, tmp_path, expected):
    import torch

    value, path = odd_values()[expected], tmp_path / "x.pth"
    held = training_state(state("fine-tuned"), "model")
    torch.save(held | {"odd": value}, path)
    status, out, err = run("inspect", path, *flags_of("fine-tuned"))
    assert (status, err) == (0, "") and "  odd  left out: training state" in out
    assert run("convert", path, tmp_path / "hf", *flags_of("fine-tuned"))[0] == 0
    for inside in ({"model": held["model"] | {"head.bias": value}}, held["model"] | {"x": value}):
        torch.save(inside, path)
        nested = isinstance(value, dict) and "model" not in inside  # beside a bare state dict
        status, _, err = run("convert", path, tmp_path / "out", *flags_of("fine-tuned"))
        assert status == (0 if nested else 2) and (nested or expected in err), err


def test_a_tensor_of_one_number_is_never_training_state(run, tmp_path):
    import torch

    for container in CONTAINERS:
        held = training_state(state("fine-tuned"), container)
        (held if container == "bare" else held[container])["t"] = torch.tensor(3.0)
        held["step"] = 3  # a plain value is
        torch.save(held, tmp_path / "x.pth")
        status, _, err = run("convert", tmp_path / "x.pth", tmp_path / "o", *flags_of("fine-tuned"))
        assert status == 2 and "1 unexpected\n  unexpected (1):\n    t  ()" in err, err
    del held["t"]
    torch.save(held, tmp_path / "x.pth")
    opened = open_source(tmp_path / "x.pth", settings=settings_of("fine-tuned"))
    assert list(opened.left_out) == ["step"]


def test_without_torch(tmp_path, monkeypatch):
    path = write(tmp_path / "x.pth", state("fine-tuned"))
    monkeypatch.setitem(sys.modules, "torch", None)
    for use in (lambda: open_source(path), lambda: videomae_authors.write(tmp_path, {}, "model")):
        with pytest.raises(MissingExtra, match=r"pip install .*\[torch\]"):
            use()


# --- writing: refusals, other layouts -----------------------------------------------------------


def test_containers_offered_are_those_of_the_layouts(run, tmp_path):
    assert container_names() == ("optimizer", "params", "model", "module", "bare")
    shown = run("convert", "--help")[1]
    assert f"--container {{{','.join(container_names())}}}" in shown
    path = write(tmp_path / "x.pth", state("fine-tuned"))
    for to, container in (("hf", "model"), ("videomae", "params"), ("scenic", "bare")):
        flags = ["--to", to, "--container", container]
        status, _, err = run("convert", path, tmp_path / "out", *flags_of("fine-tuned"), *flags)
        assert status == 2 and f"container '{container}' is not for the {to} layout" in err
        assert "scenic checkpoints: optimizer, params" in err
        assert "videomae checkpoints: model, module, bare" in err


def test_what_the_authors_code_would_compute_otherwise(run, checkpoints, tmp_path):
    source = checkpoints.path("mae pretraining")
    status, _, err = run("convert", source, tmp_path / "out", "--to", "videomae")
    assert status == 2 and "converted from the authors' files" in err
    assert "this model has layer_norm_eps=1e-12, decoder_norm_eps=1e-05." in err
    flags = err.partition("--config ")[2].split()
    assert flags == ["layer_norm_eps=1e-06", "decoder_norm_eps=1e-06"]
    status, _, err = run(
        "convert", source, tmp_path / "out", "--to", "videomae", "--config", *flags
    )
    assert status == 0 and err == ""
    small = vivit_jax.VideoMAEConfig(
        hidden_size=384, num_attention_heads=16, num_labels=5, layer_norm_eps=1e-6
    )
    with pytest.raises(ConfigError, match="computes fc_norm_eps=1e-06, num_attention_heads=6"):
        videomae_authors.check_function(small, "classification")
    with pytest.raises(ConfigError, match="use_mean_pooling=false"):
        videomae_authors.check_function(
            expected_config("pretraining", use_mean_pooling=True), "pretraining"
        )
    own = dict(image_mean=0.5, image_std=0.5, norm_pix_loss=False)
    with pytest.raises(ConfigError, match="--config image_mean=null image_std=null"):
        videomae_authors.check_function(expected_config("pretraining", **own), "pretraining")
    videomae_authors.check_function(expected_config("pretraining", **own), "none")
    # They do not matter to normalised tubelets, and the authors have none for other channels.
    for change in ({"norm_pix_loss": True}, {"num_channels": 4}):
        videomae_authors.check_function(
            expected_config("pretraining", **own | change), "pretraining"
        )


def test_statistics_of_other_channels_there_and_back(run, tmp_path):
    tensors = state("pretraining", channels=4)
    path = write(tmp_path / "x.pth", tensors, normlize_target=False)
    statistics = ["image_mean=0.1,0.2,0.3,0.4", "image_std=0.5"]
    flags = [*flags_of("pretraining"), *statistics]
    assert run("convert", path, tmp_path / "hf", *flags)[0] == 0
    assert run("convert", tmp_path / "hf", tmp_path / "back", "--to", "videomae")[0] == 0
    assert same_state(read(tmp_path / "back/checkpoint.pth"), tensors)
    for directory in ("hf", "back"):
        config = open_source(tmp_path / directory).config
        assert (config.num_channels, config.norm_pix_loss) == (4, False)
        assert config.image_mean == (0.1, 0.2, 0.3, 0.4) and config.image_std == (0.5,) * 4


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        ("fine-tuned", {"layer_norm_eps": 1e-12}, "layer_norm_eps=1e-06"),
        ("fine-tuned", {"fc_norm_eps": 1e-5}, "fc_norm_eps=1e-06"),
        ("pretraining", {"hidden_act": "gelu_new"}, "hidden_act=gelu"),
        ("pretraining", {"use_mean_pooling": True}, "use_mean_pooling=false"),
    ],
)
def test_the_config_of_another_model_beside_a_file(run, tmp_path, case, changes, expected):
    path = write(tmp_path / "pth/x.pth", state(case))
    beside = tmp_path / "pth/config.json"
    beside.write_text(json.dumps(expected_config(case, **changes).to_dict()))
    for command in (["convert", path, tmp_path / "out"], ["verify", path]):
        status, out, err = run(*command)
        assert (status, out) == (2, "") and err.count("\n") == 1
        ((name, value),) = changes.items()
        assert f"{beside} says {name}={value!r}, and the code of VideoMAE's authors" in err, err
        assert "Remove it" in err and err.endswith(f"--config {expected}\n")
    opened = open_source(path, settings=[expected])
    assert opened.config == expected_config(case)
    beside.write_text(json.dumps(expected_config(case).to_dict()))
    assert open_source(path).config == expected_config(case)


def test_the_heads_of_a_small_model_beside_a_file(tmp_path):
    small = dict(hidden_size=384, num_hidden_layers=1, intermediate_size=80, num_labels=5)
    config = expected_config("fine-tuned", **small | {"num_attention_heads": 16})
    path = write(tmp_path / "x.pth", state("fine-tuned", width=384, layers=1))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(
        ConfigError, match="num_attention_heads=16, .* --config num_attention_heads=6"
    ):
        open_source(path)


def test_the_hint_to_write_it_without_its_own_statistics_works(run, tmp_path):
    flags = [*flags_of("pretraining"), "norm_pix_loss=false", "image_mean=0.5", "image_std=0.25"]
    path = write(tmp_path / "x.pth", state("pretraining"))
    assert run("convert", path, tmp_path / "hf", *flags)[0] == 0
    command = ["convert", tmp_path / "hf", tmp_path / "out", "--to", "videomae"]
    status, _, err = run(*command)
    assert status == 2 and "this model has image_mean=(0.5, 0.5, 0.5)" in err
    hint = err.partition("--config ")[2].split()
    assert hint == ["image_mean=null", "image_std=null"]
    assert run(*command, "--config", *hint)[0] == 0
    config = open_source(tmp_path / "out").config
    assert config == expected_config("pretraining", norm_pix_loss=False)


@pytest.mark.parametrize(
    ("case", "flags", "expected"),
    [
        ("vivit cls", [], "layout 'videomae' holds videomae, not vivit"),
        ("mae cls", ["--config", "hidden_act=relu", "layer_norm_eps=1e-6"], "hidden_act='relu'"),
        ("mae cls", ["--max-shard-size", "1MB"], "a videomae checkpoint is one file"),
    ],
)
def test_refused_by_the_authors_layout(run, checkpoints, tmp_path, case, flags, expected):
    source = checkpoints.path(case)
    status, out, err = run("convert", source, tmp_path / "out", "--to", "videomae", *flags)
    assert (status, out) == (2, "") and expected in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_another_file_at_the_destination(run, tmp_path):
    path = write(tmp_path / "x.pth", state("fine-tuned"))
    flags = [*flags_of("fine-tuned"), "--to", "videomae", "--overwrite"]
    out = tmp_path / "out"
    write(out / "best.pth", state("fine-tuned"))
    status, _, err = run("convert", path, out, *flags)
    assert status == 2 and "best.pth, which would be read instead of checkpoint.pth" in err
    (out / "best.pth").unlink()
    (out / "model.safetensors").write_bytes(b"old")  # would be preferred, and is replaced
    assert run("convert", path, out, *flags)[0] == 0
    assert run("convert", path, out, *flags)[0] == 0
    assert not (out / "model.safetensors").exists()


def test_layouts_are_told_apart(run, images, tmp_path):
    import torch
    from safetensors.torch import load_file

    image = load_file(images.path("timm"))
    heads = ["--config", "num_attention_heads=4", "num_frames=4"]
    for held in (image, {"model": image, "epoch": 1}):  # as timm saves it, and as DeiT does
        torch.save(held, tmp_path / "image.pth")
        flags = [*heads, "--overwrite"]
        status, out, err = run("convert", tmp_path / "image.pth", tmp_path / "out", *flags)
        assert status == 0 and "timm names of an image ViT" in out, err
    assert "epoch" in out
    torch.save({"state_dict": {"embedding": image["head.bias"]}, "epoch": 1}, tmp_path / "any.pth")
    status, _, err = run("convert", tmp_path / "any.pth", tmp_path / "none")
    assert status == 2 and "not a flat state dict, it also holds: state_dict, epoch" in err


def test_a_flat_pth_of_transformers(checkpoints, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file

    source = checkpoints.path("mae cls")
    torch.save(load_file(source / "model.safetensors"), tmp_path / "weights.pth")
    shutil.copy(source / "config.json", tmp_path)
    opened = open_source(tmp_path)
    assert opened.layout.name == "hf" and opened.config.hidden_size == 48


# --- what it computes, inspect, verify, the processor -------------------------------------------


@pytest.mark.parametrize("case", ["fine-tuned", "fine-tuned, first token", "pretraining"])
def test_transformers_computes_the_same_but_for_an_epsilon(run, tmp_path, case, caplog):
    import torch
    import transformers

    path = write(tmp_path / "x.pth", state(case))
    status, out, err = run("convert", path, tmp_path / "hf", *flags_of(case))
    field = {"fine-tuned": "fc_norm_eps", "pretraining": "decoder_norm_eps"}.get(case)
    note = f"{field} is 1e-06 here; transformers computes with 1e-05"
    assert (status, err, caplog.text) == (0, "", "")  # in the report and not in a warning as well
    assert out.count(note) == (field is not None)
    model, params = vivit_jax.from_pretrained(tmp_path / "hf")
    cls = getattr(transformers, type(model).__name__)
    reference, info = cls.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    pixels = clip(model.config)
    inputs = torch.from_numpy(pixels.transpose(0, 1, 4, 2, 3).copy())
    mask = bool_mask(model.config) if case == "pretraining" else None
    extra = () if mask is None else (torch.from_numpy(mask),)
    ours = None if mask is None else vivit_jax.Mask.from_bool(mask)
    for norm in ("fc_norm", "decoder.norm"):
        if field and field.startswith(norm.split(".")[0]):
            reference.get_submodule(norm).eps = 1e-6
    with torch.inference_mode():
        wanted = reference.eval()(inputs, *extra).logits.numpy()
    got = jax.jit(lambda p, x, m: model.apply({"params": p}, x, mask=m).logits)(
        params, pixels, ours
    )
    assert_close(got, wanted, "logits")


def test_transformers_refuses_what_it_does_not_compute(run, tmp_path):
    import transformers

    case = "V2 fine-tuned"
    path = write(tmp_path / "x.pth", state(case))
    status, out, err = run("convert", path, tmp_path / "hf", *flags_of(case))
    assert (status, err) == (0, "") and "transformers computes" not in out
    names = read_safetensors(tmp_path / "hf")
    assert names["videomae.encoder.layer.2.attention.attention.scale"].shape == (4,)
    assert {"videomae.encoder.layer.0.lambda_1", "videomae.encoder.layer.0.lambda_2"} < set(names)
    with pytest.raises(ValueError, match="`videomae_jax`"):
        transformers.AutoModelForVideoClassification.from_pretrained(tmp_path / "hf")
    status, out, err = run("verify", path, *flags_of(case))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "is a VideoMAE with cosine attention and layer scale" in err
    assert "vivit-convert inspect" in err


def test_verify(run, tmp_path):
    path = write(tmp_path / "x.pth", state("fine-tuned"))
    status, out, err = run("verify", path, *flags_of("fine-tuned"), "--json")
    result = json.loads(out)
    assert status == 0 and result["passed"] and result["source"] == str(path), err
    assert "fc_norm_eps is 1e-06 here" in result["note"]
    blocks = [row for row in result["rows"] if row["name"].startswith("block")]
    assert len(blocks) == 3 and max(row["relative"] for row in blocks) < 2e-5


def test_pixels_of_other_channels_do_not_run_in_transformers(run, tmp_path):
    import torch
    import transformers

    path = write(tmp_path / "x.pth", state("pretraining", channels=4), normlize_target=False)
    note = (
        "transformers does not run pre-training with norm_pix_loss=False and 4 channels: it has no "
        "loss for pixels other than RGB"
    )
    flags = [*flags_of("pretraining"), "image_mean=0.5", "image_std=0.5"]
    status, out, _ = run("convert", path, tmp_path / "hf", *flags)
    assert status == 0 and out.count("transformers ") == out.count(note) == 1
    for source, more in ((path, flags), (tmp_path / "hf", [])):
        status, out, err = run("verify", source, *more)
        assert (status, out) == (2, "") and note in err and err.count("\n") == 1, err
    model = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path / "hf")
    config = expected_config("pretraining", num_channels=4)
    inputs = torch.from_numpy(clip(config).transpose(0, 1, 4, 2, 3).copy())
    with pytest.raises(ValueError, match="Can't unnormalize non-RGB images"):
        model(inputs, torch.from_numpy(bool_mask(config)))
    # Normalised tubelets have a loss.
    flags = [*flags_of("pretraining"), "norm_pix_loss=true"]
    status, out, err = run("verify", path, *flags)
    assert status == 0 and "loss" in out, err


def test_inspect(run, tmp_path):
    path = write(tmp_path / "x.pth", state("pretraining"))
    status, out, err = run("inspect", path)
    assert status == 2 and "the weights do not say num_frames" in err
    assert "model/encoder.blocks.{0-2}.attn.qkv.weight  (144, 48) float32" in out
    assert "args/output_dir  () object" in out and "sha256" in out
    status, out, err = run("inspect", path, *flags_of("pretraining"))
    assert (status, err) == (0, "")
    for part in (
        f"layout      videomae: VideoMAEForPreTraining ({path})\n",
        "  image_size: [24, 16]\n",
        "  layer_norm_eps: 1e-06\n",
        "  args (3 entries)  left out: training state",
        "  norm_pix_loss=true: assumed",
        "of them left out, none missing",
    ):
        assert part in out, out


def test_processor(run, tmp_path):
    path = write(tmp_path / "pth/x.pth", state("fine-tuned"))
    assert run("convert", path, tmp_path / "hf", *flags_of("fine-tuned"))[0] == 0
    processor = vivit_jax.VideoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_mean == (0.485, 0.456, 0.406)
    assert processor.crop_size == {"height": 24, "width": 16}
    assert processor.size == {"shortest_edge": 16} and processor.rescale_factor == 1 / 255
    # A file that lies beside the checkpoint is the one it was used with.
    vivit_jax.VideoProcessor.videomae(size=18).save_pretrained(tmp_path / "pth")
    beside = (tmp_path / "pth/preprocessor_config.json").read_bytes()
    assert run("convert", path, tmp_path / "copied", *flags_of("fine-tuned"))[0] == 0
    assert (tmp_path / "copied/preprocessor_config.json").read_bytes() == beside


def test_other_channels_have_no_processor(run, tmp_path):
    path = write(tmp_path / "x.pth", state("fine-tuned", channels=4))
    status, out, _ = run("convert", path, tmp_path / "hf", *flags_of("fine-tuned"))
    assert status == 0 and "no processor is known for 4 channels" in out
    assert not (tmp_path / "hf/preprocessor_config.json").exists()
