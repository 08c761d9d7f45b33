# SPDX-License-Identifier: Apache-2.0
"""What transformers' own checks of ViViT and VideoMAE ask for, asked of this library.

`CHECKS` has every check of transformers 5.23 for the two models (the common ones, those of the
models themselves and of their pipelines) and what answers it here: a test of this repository, or
why there is nothing to ask. The models are those of its testers: sides that the patch does not
divide, an MLP of odd width, most tokens hidden.
"""

import ast
import dataclasses
import fnmatch
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow, to_torch
from safetensors.numpy import load_file

import vivit_jax
from checkpoints_convert.pretrained import load_report
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params, fresh_params

HERE = "tests/parity/test_transformers_behaviours.py"
DROP_IN, SIZES = "tests/parity/test_drop_in.py", "tests/parity/test_sizes.py"
TEXT = "text models only"
TORCH = "about PyTorch's modules; parameters are a tree of arrays here"
# Name of the check, * for several -> "file::test" that answers it, or why none does.
CHECKS = {
    # of the models' own files
    "test_config": f"{HERE}::test_configs_survive_files_and_changes",
    "test_model": f"{HERE}::test_outputs_are_transformers",
    "test_for_pretraining": f"{HERE}::test_outputs_are_transformers",
    "test_for_video_classification": f"{HERE}::test_outputs_are_transformers",
    "test_forward_signature": f"{HERE}::test_the_first_argument_is_pixel_values",
    "test_inference_interpolate_pos_encoding": f"{SIZES}::test_a_larger_clip_of_the_same_tokens",
    "test_inference_for_*": "tests/parity/test_published_logits.py::test_published_values",
    "test_model_from_pretrained": "tests/parity/test_published_logits.py::test_published_values",
    # outputs
    "test_attention_outputs": f"{HERE}::test_counts_and_shapes_of_what_is_reported",
    "test_hidden_states_output": f"{HERE}::test_counts_and_shapes_of_what_is_reported",
    "test_model_outputs_equivalence": f"{DROP_IN}::test_return_dict_false_is_transformers_tuple",
    "test_can_capture_specific_layers_hidden_states": f"{DROP_IN}::test_hidden_states_by_index",
    "test_model_forward_default_config_values": (
        f"{DROP_IN}::test_the_configs_flags_are_the_default"
    ),
    "test_capture_outputs_decorator": "about hooks; outputs are computed, not captured, here",
    "test_format_of_can_record_outputs": "about hooks; outputs are computed, not captured, here",
    "test_retain_grad_hidden_states_attentions": (
        "arrays keep no gradients; jax.grad differentiates whatever a function returns"
    ),
    "test_model_main_input_name": f"{HERE}::test_the_first_argument_is_pixel_values",
    # numbers
    "test_determinism": f"{HERE}::test_the_same_bits_each_time_and_for_each_clip",
    "test_batching_equivalence": f"{HERE}::test_the_same_bits_each_time_and_for_each_clip",
    "test_eager_matches_sdpa_inference": f"{HERE}::test_attention_can_be_set_afterwards",
    "test_can_set_attention_dynamically": f"{HERE}::test_attention_can_be_set_afterwards",
    "test_config_attn_implementation_setter": f"{HERE}::test_attention_can_be_set_afterwards",
    "test_flash_attn*": "tests/layers/test_attention.py::test_cudnn_agrees_with_float64",
    "test_flex_attention_with_grads": "jax has no such backend",
    "test_sdpa_can_dispatch*": "about the choice of PyTorch's kernels",
    "test_sdpa_can_compile_dynamic": (
        "tests/cli/test_export.py::test_equal_to_the_live_model_at_batch_1_and_5"
    ),
    "test_feed_forward_chunking": "transformers' VideoMAE reads the chunk size and does not use it",
    "test_problem_types": f"{HERE}::test_losses_of_every_problem_type",
    # files
    "test_save_load": f"{HERE}::test_saving_again_gives_the_same_files",
    "test_torch_save_load": f"{HERE}::test_pickled_weights_load_alike",
    "test_can_use_safetensors": f"{HERE}::test_saving_again_gives_the_same_files",
    "test_reverse_loading_mapping": f"{HERE}::test_saving_again_gives_the_same_files",
    "test_can_load_from_already_mapped_keys": f"{HERE}::test_in_memory_names_load_alike",
    "test_load_contiguous_weights": f"{HERE}::test_views_are_saved_like_copies",
    "test_save_load_keys_to_ignore_on_save": "both models save all of their parameters",
    "test_correct_missing_keys": f"{HERE}::test_heads_and_backbones_take_what_they_share",
    "test_base_model_prefix_loads_base_weights": (
        f"{HERE}::test_heads_and_backbones_take_what_they_share"
    ),
    "test_model_base_model_prefix": f"{HERE}::test_heads_and_backbones_take_what_they_share",
    "test_load_with_mismatched_shapes": f"{HERE}::test_other_shapes_are_refused_or_asked_for",
    "test_can_load_ignoring_mismatched_shapes": (
        f"{HERE}::test_other_shapes_are_refused_or_asked_for"
    ),
    "test_from_pretrained_no_checkpoint": TORCH,
    "test_keep_in_fp32_modules*": "neither model keeps parts in float32",
    "test_bc_torch_dtype": f"{HERE}::test_the_old_name_of_dtype_is_read",
    "test_*offload*": "devices hold arrays by sharding; see tests/models/test_sharding.py",
    "test_model_parallelism": "devices hold arrays by sharding; see tests/models/test_sharding.py",
    "test_tp_plan_matches_params": "tests/models/test_parameter_tree.py::test_parameter_tree",
    "test_can*device*": "arrays are put by jax.device_put",
    "test_cannot_load_with_meta_device_context_manager": "arrays are put by jax.device_put",
    # initial values and training
    "test_can_init_all_missing_weights": f"{HERE}::test_initial_values_are_transformers",
    "test_init_weights_can_init_buffers": "neither model has buffers in its checkpoint",
    "test_all_tensors_are_parameter_or_buffer": f"{HERE}::test_initial_values_are_transformers",
    "test_can_be_initialized_on_meta": f"{HERE}::test_shapes_need_no_memory",
    "test_training": f"{HERE}::test_every_parameter_learns_and_remat_changes_nothing",
    "test_training_gradient_checkpointing*": (
        f"{HERE}::test_every_parameter_learns_and_remat_changes_nothing"
    ),
    "test_torch_compile_for_training": (
        f"{HERE}::test_every_parameter_learns_and_remat_changes_nothing"
    ),
    "test_gradient_checkpointing_*": "remat is a field of the configuration, not a state",
    "test_peft_gradient_checkpointing_enable_disable": "there is no PEFT for these modules",
    "test_enable_input_require_grads*": f"{HERE}::test_pixels_have_a_gradient",
    "test_model_get_set_embeddings": TORCH,
    # pipelines
    "test_pipeline_video_classification*": (
        "tests/inference/test_classifier.py::test_transformers_pipeline_gives_the_same"
    ),
    "test_pipeline_feature_extraction*": (
        "tests/cli/test_extract.py::test_command_equals_a_naive_loop"
    ),
    # nothing to ask
    "test_*tied*": "no parameters are tied",
    "test_resize_*": TEXT,
    "test_inputs_embeds*": TEXT,
    "test_*causal_lm*": TEXT,
    "test_encoder_decoder*": TEXT,
    "test_generation*": TEXT,
    "test_sliding_window_mask": TEXT,
    "test_*rope*": TEXT,
    "test_*router*": "no mixture of experts",
    "test_eager_matches_batched_and_grouped_inference": "no mixture of experts",
    "test_get_*_features_*": "models of several modalities only",
    "test_*composite_model*": "models of several parts only",
    "test_internal_model_config_and_subconfig_are_same": "models of several parts only",
    "test_kernels_can_load_without_crashing": "about the hub's CUDA kernels",
    "test_*_is_small": "about the testers",
}
# The names of all of those checks, one a line.
NAMES = Path(__file__).with_name("transformers_checks.txt").read_text().split()

SIZES_OF = {
    "vivit": dict(
        image_size=10, num_frames=8, tubelet_size=[2, 4, 4], hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=37, num_labels=10,
    ),
    "videomae": dict(
        image_size=10, patch_size=2, num_frames=2, tubelet_size=2, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, num_labels=10,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, decoder_hidden_size=32,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=37,
    ),
}  # fmt: skip
CLASSES = (
    "VivitModel", "VivitForVideoClassification",
    "VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining",
)  # fmt: skip
BATCH, MASKED = 3, 22  # of 25 tokens


@dataclasses.dataclass
class Pair:
    """transformers' model as its tester makes it, and what is loaded from its files."""

    name: str
    reference: object
    directory: Path
    model: object
    params: dict

    @property
    def pixels(self):
        config = self.model.config
        shape = (BATCH, config.num_frames, *config.frame_size, config.num_channels)
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    @property
    def hidden(self):
        rows = [np.arange(25) < MASKED, np.arange(25) >= 25 - MASKED, np.arange(25) % 8 > 0]
        return np.stack([row if row.sum() == MASKED else rows[0] for row in rows])

    def inputs(self, labels: bool = False):
        """What our class is called with beside pixels."""
        if self.name == "VideoMAEForPreTraining":
            return {"mask": vivit_jax.Mask.from_bool(self.hidden)}
        return {"labels": np.array([0, 9, 4])} if labels and "Class" in self.name else {}

    def theirs(self, **flags):
        import torch

        if self.name == "VideoMAEForPreTraining":
            flags["bool_masked_pos"] = torch.from_numpy(self.hidden)
        with torch.no_grad():
            return self.reference(to_torch(self.pixels), **flags)

    def ours(self, params=None, pixels=None, model=None, inputs=None, **flags):
        inputs = self.inputs() if inputs is None else inputs
        pixels = self.pixels if pixels is None else pixels
        apply = jax.jit((model or self.model).apply, static_argnames=tuple(flags))
        variables = {"params": self.params if params is None else params}
        return apply(variables, pixels, **inputs, **flags)


# Two always: with a class token, and with a mask and a decoder.
ALWAYS = ("VivitForVideoClassification", "VideoMAEForPreTraining")


@pytest.fixture(scope="module", params=mostly_slow(CLASSES, *ALWAYS))
def pair(request, tmp_path_factory):
    import torch
    import transformers

    name = request.param
    family = "vivit" if name.startswith("Vivit") else "videomae"
    config = getattr(transformers, "VivitConfig" if family == "vivit" else "VideoMAEConfig")
    torch.manual_seed(0)
    made = config(**SIZES_OF[family], attn_implementation="eager")
    reference = getattr(transformers, name)(made).eval()
    directory = tmp_path_factory.mktemp(name)
    reference.save_pretrained(directory)
    return Pair(name, reference, directory, *vivit_jax.from_pretrained(directory))


def of(quick):
    """For a test of pairs: of this class always, of the others with -m slow."""
    return pytest.mark.parametrize("pair", mostly_slow(CLASSES, quick), indirect=True)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def same_params(one, other):
    one, other = param_tree.flatten(one), param_tree.flatten(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], path)


def test_every_check_has_an_answer_that_exists():
    for name in NAMES:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in CHECKS), name
    for pattern in CHECKS:
        assert fnmatch.filter(NAMES, pattern), pattern
    root = Path(__file__).parents[2]
    for answer in CHECKS.values():
        file, found, test = answer.partition("::")
        if found:
            tree = ast.parse((root / file).read_text())
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert test in tests, answer


def test_outputs_are_transformers(pair):
    theirs, ours = pair.theirs(), pair.ours()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        close(ours[key], value.numpy())
    tokens = {"VivitModel": 17, "VideoMAEModel": 25}.get(pair.name)
    shape = {"VideoMAEForPreTraining": (BATCH, MASKED, 24)}.get(pair.name, (BATCH, 10))
    assert (ours[0] if tokens else ours.logits).shape == ((BATCH, tokens, 32) if tokens else shape)


@of("VivitForVideoClassification")
def test_counts_and_shapes_of_what_is_reported(pair):
    seen = {"VivitModel": 17, "VivitForVideoClassification": 17}.get(pair.name, 25)
    seen -= MASKED if pair.name == "VideoMAEForPreTraining" else 0
    out = pair.ours(output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 2 and out.attentions[0].shape == (BATCH, 4, seen, seen)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (BATCH, seen, 32)
    assert list(out)[-1] == "attentions"
    np.testing.assert_allclose(np.asarray(out.attentions).sum(-1), 1, atol=1e-5)
    alone = pair.ours(output_attentions=True, output_hidden_states=False)
    assert len(out) == len(alone) + 1


def test_the_first_argument_is_pixel_values(pair):
    arguments = list(inspect.signature(type(pair.model).__call__).parameters)
    assert arguments[1] == "pixel_values"
    known = set(inspect.signature(pair.reference.forward).parameters)
    known -= {"kwargs", "bool_masked_pos"}  # a Mask, by the name of mask
    assert known <= set(arguments)


@of("VivitForVideoClassification")
def test_the_same_bits_each_time_and_for_each_clip(pair):
    out = pair.ours()
    for one, other in zip(out.to_tuple(), pair.ours().to_tuple(), strict=True):
        np.testing.assert_array_equal(one, other)
    inputs = jax.tree.map(lambda value: value[1:2], pair.inputs())
    alone = pair.ours(pixels=pair.pixels[1:2], inputs=inputs)
    for key in set(out) - {"loss"}:
        close(alone[key][0], out[key][1])


@of("VideoMAEForPreTraining")
def test_attention_can_be_set_afterwards(pair, tmp_path):
    wanted = pair.ours(output_attentions=True)
    for attention in ("xla", "chunked"):
        config = dataclasses.replace(pair.model.config, attention=attention)
        found = pair.ours(model=pair.model.clone(config=config))
        for key in found:
            close(found[key], wanted[key])
    # transformers' choice says how, not what, and is not ours.
    values = json.loads((pair.directory / "config.json").read_text())
    values["attn_implementation"] = "flash_attention_2"
    assert type(pair.model.config).from_dict(values) == pair.model.config


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("regression", 1), ("regression", 10), ("single_label_classification", 10),
        ("multi_label_classification", 10), (None, 1), (None, 10),
    ],
)  # fmt: skip
def test_losses_of_every_problem_type(kind, count):
    import torch
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    from vivit_jax.models.losses import classification_loss

    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4, count)).astype(np.float32)
    labels = rng.standard_normal((4, count)).astype(np.float32)
    if kind == "multi_label_classification":
        labels = (labels > 0).astype(np.float32)
    elif count > 1 and kind != "regression":
        labels = np.array([3, 9, -100, 0])
    config = type("Config", (), {"num_labels": count, "problem_type": kind})()
    theirs = ForSequenceClassificationLoss(torch.tensor(labels), torch.tensor(logits), config)
    close(classification_loss(jnp.asarray(logits), jnp.asarray(labels), kind), theirs.numpy())


def test_saving_again_gives_the_same_files(pair, tmp_path):
    vivit_jax.save_pretrained(tmp_path / "once", pair.model, pair.params)
    wanted, found = (
        load_file(d / "model.safetensors") for d in (pair.directory, tmp_path / "once")
    )
    assert wanted.keys() == found.keys()
    assert all((wanted[name] == found[name]).all() for name in wanted)
    vivit_jax.save_pretrained(tmp_path / "twice", *vivit_jax.from_pretrained(tmp_path / "once"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_pickled_weights_load_alike(pair, tmp_path):
    import torch
    from safetensors.torch import load_file as load

    torch.save(load(pair.directory / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((pair.directory / "config.json").read_text())
    same_params(vivit_jax.from_pretrained(tmp_path)[1], pair.params)


def test_in_memory_names_load_alike(pair, tmp_path):
    pair.reference.save_pretrained(tmp_path, save_original_format=False)
    assert load_file(tmp_path / "model.safetensors").keys() == pair.reference.state_dict().keys()
    same_params(vivit_jax.from_pretrained(tmp_path)[1], pair.params)


def test_views_are_saved_like_copies(pair, tmp_path):
    def turned(leaf):
        return np.asarray(leaf).T.copy().T

    vivit_jax.save_pretrained(tmp_path / "m", pair.model, jax.tree.map(turned, pair.params))
    same_params(vivit_jax.from_pretrained(tmp_path / "m")[1], pair.params)


def test_heads_and_backbones_take_what_they_share(pair):
    report = load_report(pair.directory, head="none")
    model, params = vivit_jax.from_pretrained(pair.directory, head="none")
    if pair.name in ("VivitModel", "VideoMAEModel"):
        assert not report.fresh and not report.dropped
        report = load_report(pair.directory, head="classification")
        assert {path.split("/")[0] for path in report.fresh} <= {"head", "fc_norm"}
        assert all("pooler" in name for name in report.dropped)
        head = vivit_jax.from_pretrained(pair.directory, head="classification")[1]
        same_params(head["backbone"], {k: v for k, v in params.items() if k != "pooler"})
    else:
        same_params(params, pair.params["backbone"])
        prefix = "vivit." if "Vivit" in pair.name else "videomae."
        assert report.dropped and not any(name.startswith(prefix) for name in report.dropped)


def test_other_shapes_are_refused_or_asked_for(pair):
    with pytest.raises(vivit_jax.CheckpointError, match="expected"):
        vivit_jax.from_pretrained(pair.directory, config={"intermediate_size": 38})
    if "Classification" in pair.name:
        model, params = vivit_jax.from_pretrained(pair.directory, num_labels=42)
        assert params["head"]["kernel"].shape == (32, 42)
        same_params(params["backbone"], pair.params["backbone"])
        assert load_report(pair.directory, num_labels=42).fresh == (
            "head/kernel",
            "head/bias",
        )


def test_the_old_name_of_dtype_is_read(pair):
    values = json.loads((pair.directory / "config.json").read_text())
    assert values["dtype"] == "float32"
    values["torch_dtype"] = values.pop("dtype")
    assert type(pair.model.config).from_dict(values) == pair.model.config


def test_configs_survive_files_and_changes():
    for family, cls in (("vivit", vivit_jax.VivitConfig), ("videomae", vivit_jax.VideoMAEConfig)):
        config = cls.from_dict(SIZES_OF[family] | {"hidden_size": 36, "num_labels": 5})
        assert (config.hidden_size, config.num_attention_heads, config.num_labels) == (36, 4, 5)
        written = json.loads(json.dumps(config.to_dict()))
        assert cls.from_dict(written) == config
        assert cls.from_dict(cls().to_dict()) == cls()
        assert dataclasses.replace(config, num_labels=3, id2label=None).num_labels == 3


@of("VideoMAEForPreTraining")
def test_initial_values_are_transformers(pair):
    """Normal with the config's deviation, or the constant that transformers sets."""
    config = dataclasses.replace(pair.model.config, initializer_range=0.5)
    drawn = param_tree.flatten(fresh_params(pair.model.clone(config=config), seed=0))
    set_there = param_tree.flatten(pair.params)
    assert drawn.keys() == set_there.keys()
    for path, leaf in set_there.items():
        values, leaf = np.asarray(drawn[path]), np.asarray(leaf)
        if leaf.std() == 0:  # zeros and ones
            np.testing.assert_array_equal(values, leaf, path)
        else:  # five sigmas of the deviation of so many normal values
            assert abs(values.std() / 0.5 - 1) < 5 / np.sqrt(2 * values.size), path


def test_shapes_need_no_memory():
    huge = dict(hidden_size=2**15, intermediate_size=2**17, num_hidden_layers=100)
    config = vivit_jax.VivitConfig(**huge, num_attention_heads=256)
    shapes = jax.tree.leaves(abstract_params(vivit_jax.VivitModel(config)))
    assert sum(leaf.size for leaf in shapes) > 10**12


@pytest.mark.slow
@of("VideoMAEForPreTraining")
def test_every_parameter_learns_and_remat_changes_nothing(pair):
    inputs = pair.inputs(labels=True)

    def gradients(remat):
        config = dataclasses.replace(pair.model.config, remat=remat)
        model = pair.model.clone(config=config)

        @jax.jit
        @jax.grad
        def run(params):
            out = model.apply({"params": params}, pair.pixels, **inputs)
            if pair.name in ("VivitModel", "VideoMAEModel"):
                return sum((value**2).sum() for value in out.values())
            return out.loss

        return param_tree.flatten(run(pair.params))

    plain, again = gradients("none"), gradients("block")
    for path, gradient in plain.items():
        assert np.isfinite(gradient).all() and np.any(gradient), path
        np.testing.assert_allclose(again[path], gradient, atol=1e-5, rtol=1e-4, err_msg=path)


@of("VivitForVideoClassification")
def test_pixels_have_a_gradient(pair):
    def total(pixels):
        return pair.model.apply({"params": pair.params}, pixels, **pair.inputs())[-1].sum()

    slope = np.asarray(jax.jit(jax.grad(total))(pair.pixels))
    config = pair.model.config
    _, height, width = (n * p for n, p in zip(config.grid, config.tubelet, strict=True))
    assert np.isfinite(slope).all() and np.any(slope[:, :, :height, :width])
    assert not np.any(slope[:, :, height:]) and not np.any(slope[:, :, :, width:])
