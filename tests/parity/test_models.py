# SPDX-License-Identifier: Apache-2.0
"""Every class against transformers on tiny models with large weights, outputs and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    bool_mask,
    clip,
    error,
    forward,
    mostly_slow,
    random_params,
    to_torch,
    torch_model,
)
from safetensors.numpy import load_file
from tiny import CASES, config_of

import vivit_jax
from checkpoints_convert.layouts.registry import detect
from checkpoints_convert.rules import import_params
from vivit_jax import param_tree
from vivit_jax.models.build import abstract_params

# The tolerances below were chosen from measurements: see helpers.TOLERANCE.
PRETRAINING = [case for case in CASES if "pretraining" in case]
HEADLESS = [case for case in CASES if "base" in case]
CLASSIFIERS = [case for case in CASES if "cls" in case]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """(case, PyTorch model, directory it saved itself to)."""
    case = request.param
    directory = tmp_path_factory.mktemp(case.replace(" ", "_"))
    reference = torch_model(case)
    reference.save_pretrained(directory)
    return case, reference, directory


def torch_run(case, reference, x, mask, labels):
    import torch

    inputs = {"output_hidden_states": True, "output_attentions": True}
    if case in PRETRAINING:
        inputs["bool_masked_pos"] = torch.from_numpy(mask)
    elif case in CLASSIFIERS:
        inputs["labels"] = torch.from_numpy(labels)
    return reference(to_torch(x), **inputs)


def jax_inputs(case, mask, labels):
    if case in PRETRAINING:
        return {"mask": vivit_jax.Mask.from_bool(mask)}
    return {"labels": jnp.asarray(labels)} if case in CLASSIFIERS else {}


def inputs_of(case):
    config = config_of(case)
    return clip(config), bool_mask(config), np.array([1, 3])


def compare(ours, theirs):
    """Compare every field that PyTorch returned; a field missing here fails."""
    for field in ("loss", "logits", "last_hidden_state", "pooler_output"):
        if getattr(theirs, field, None) is not None:
            assert_close(getattr(ours, field), getattr(theirs, field).detach().numpy(), field)
    for field in ("hidden_states", "attentions"):
        stacked = np.stack([x.detach().numpy() for x in getattr(theirs, field)])
        assert_close(getattr(ours, field), stacked, field)


def outputs(pair, **execution):
    """(ours, PyTorch's, our model, params, inputs) with everything that can be asked for."""
    case, reference, directory = pair
    x, mask, labels = inputs_of(case)
    theirs = torch_run(case, reference, x, mask, labels)
    model, params = vivit_jax.from_pretrained(directory, **execution)
    assert type(model).__name__ == CASES[case][1]
    inputs = jax_inputs(case, mask, labels)
    flags = dict(output_hidden_states=True, output_attentions=True)
    return forward(model, params, x, **flags, **inputs), theirs, model, params, (x, inputs)


@pytest.mark.parametrize(
    "pair",
    mostly_slow(CASES, "vivit base", "vivit cls", "mae base", "mae cls", "mae pretraining"),
    indirect=True,
    ids=str,
)
def test_outputs(pair):
    ours, theirs, model, params, (x, inputs) = outputs(pair)
    compare(ours, theirs)
    # Without flags the fused attention path runs; it must agree too and return nothing more.
    plain = forward(model, params, x, **inputs)
    assert plain.hidden_states is None and plain.attentions is None
    for field in ("loss", "logits", "last_hidden_state", "pooler_output"):
        if getattr(theirs, field, None) is not None:
            assert_close(getattr(plain, field), getattr(theirs, field).detach().numpy(), field)


@pytest.mark.parametrize(
    "pair", ["vivit cls", "mae base norm", "mae pretraining"], indirect=True, ids=str
)
def test_outputs_of_looped_layers(pair):
    compare(*outputs(pair, scan_layers=False)[:2])


def _loss_and_gradients(case, flat, **execution):
    """Loss and per-layer gradients of a case under execution flags, at per-layer parameters."""
    model = CASES[case][0](config_of(case, **execution))
    x, mask, labels = inputs_of(case)
    inputs = jax_inputs(case, mask, labels)
    running = param_tree.flatten(abstract_params(model))
    params = {path: np.zeros(leaf.shape, np.float32) for path, leaf in running.items()}
    slots = param_tree.slots(param_tree.shapes_of(running))
    for path, slot in slots.items():
        params[slot.leaf][... if slot.layer is None else slot.layer] = flat[path]

    @jax.jit
    @jax.value_and_grad
    def run(params):
        return model.apply({"params": params}, x, **inputs).loss

    loss, grads = run(param_tree.unflatten(params))
    grads = param_tree.flatten(jax.device_get(grads))  # a jax array compiles each of these slices
    return float(loss), {
        path: grads[slot.leaf] if slot.layer is None else grads[slot.leaf][slot.layer]
        for path, slot in slots.items()
    }


@functools.cache
def _plain_run(case):
    """The loop without any execution flag: (parameters, loss, gradients)."""
    model = CASES[case][0](config_of(case, scan_layers=False))
    flat = param_tree.flatten(random_params(model))
    return flat, *_loss_and_gradients(case, flat, scan_layers=False, attention="xla")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "scan_layers", "remat", "attention"),
    mostly_slow(
        [  # every pair of two flags; test_gradients has the default, True, "dots", "chunked"
            ("vivit cls", True, "none", "xla"),
            ("mae pretraining", False, "none", "chunked"),
            ("vivit cls", True, "block", "chunked"),
            ("mae pretraining", False, "block", "xla"),
            ("mae pretraining", True, "dots", "xla"),
            ("vivit cls", False, "dots", "chunked"),
        ],
        ("mae pretraining", False, "block", "xla"),
    ),
)
def test_execution_flags_do_not_change_values_or_gradients(case, scan_layers, remat, attention):
    flat, loss, gradients = _plain_run(case)
    flags = dict(scan_layers=scan_layers, remat=remat, attention=attention)
    changed_loss, changed = _loss_and_gradients(case, flat, **flags)
    assert abs(changed_loss - loss) < 1e-5 * abs(loss)
    for path, gradient in gradients.items():
        assert_close(changed[path], gradient, "gradient")


@pytest.mark.parametrize(
    "pair",
    mostly_slow(CASES, "vivit cls", "mae pretraining"),
    indirect=True,
    ids=str,
)
def test_gradients(pair, tmp_path):
    case, reference, directory = pair
    model, params = vivit_jax.from_pretrained(directory)
    compare_gradients(case, reference, model, params, tmp_path)


def compare_gradients(case, reference, model, params, directory):
    """Both sides' gradients of the loss, or of something like one; `directory` is written to."""
    import torch

    x, mask, labels = inputs_of(case)
    reference.zero_grad()
    theirs_loss = torch_objective(torch_run(case, reference, x, mask, labels))
    theirs_loss.backward()
    # save_pretrained renames, so gradients take the same way to the file as weights.
    twin = torch_model(case)
    with torch.no_grad():
        for p, g in zip(twin.parameters(), reference.parameters(), strict=True):
            p.copy_(g.grad if g.grad is not None else torch.zeros_like(p))
    twin.save_pretrained(directory)
    source = load_file(directory / "model.safetensors")

    inputs = jax_inputs(case, mask, labels)

    @jax.jit
    @jax.grad
    def gradients(params):
        out = model.apply({"params": params}, x, **inputs)
        return jax_objective(out)

    ours = param_tree.flatten(gradients(params))
    rules = detect(source, model.config).rules(model.config)
    theirs = import_params(source, rules, param_tree.shapes_of(ours))
    measured = 0.0
    for path in ours:
        scale = max(1.0, float(np.abs(theirs[path]).max()))
        close = assert_close(np.asarray(ours[path]) / scale, theirs[path] / scale, "gradient")
        measured = max(measured, close)
    assert sum(float(np.abs(g).max()) > 1e-3 for g in theirs.values()) > len(theirs) / 2
    return measured


@pytest.mark.parametrize("case", mostly_slow(["mae cls", "mae pretraining"], "mae pretraining"))
def test_the_authors_epsilon(case, tmp_path):
    """1e-6 in every norm of both sides, where transformers has 1e-12 and, fixed, 1e-5.

    Measured: encoder 8.3e-6, decoder 2.5e-6, logits 2.8e-6, loss 1.1e-7, gradient 4.0e-6.
    """
    import torch

    reference = torch_model(case, layer_norm_eps=1e-6)
    decoder = []
    if case in PRETRAINING:
        reference.decoder.norm.eps = 1e-6
        for block in reference.decoder.decoder_layers:
            block.register_forward_hook(
                lambda *call: decoder.append(call[-1] if torch.is_tensor(call[-1]) else call[-1][0])
            )
    else:
        reference.fc_norm.eps = 1e-6
    norms = [m for m in reference.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    reference.save_pretrained(tmp_path / "model")
    eps = dict(fc_norm_eps=1e-6, decoder_norm_eps=1e-6)
    model, params = vivit_jax.from_pretrained(tmp_path / "model", config=eps)
    assert {model.config.layer_norm_eps, *(getattr(model.config, name) for name in eps)} == {1e-6}

    x, mask, labels = inputs_of(case)
    theirs = torch_run(case, reference, x, mask, labels)
    flags = dict(output_hidden_states=True, output_attentions=True)
    ours = forward(model, params, x, **flags, **jax_inputs(case, mask, labels))
    compare(ours, theirs)
    encoder = np.stack([x.detach().numpy() for x in theirs.hidden_states])
    measured = {
        "encoder": error(ours.hidden_states, encoder),
        "logits": error(ours.logits, theirs.logits.detach().numpy()),
        "loss": error(ours.loss, theirs.loss.detach().numpy()),
    }
    if case in PRETRAINING:
        layers = np.stack([x.detach().numpy() for x in decoder])
        assert len(layers) == model.config.decoder_num_hidden_layers
        measured["decoder"] = assert_close(ours.decoder_hidden_states[1:], layers, "hidden_states")
    directory = tmp_path / "gradients"
    measured["gradient"] = compare_gradients(case, reference, model, params, directory)
    print(f"\n{case}:", *(f"{what} {value:.1e}" for what, value in measured.items()))


def torch_objective(out):
    import torch

    if getattr(out, "loss", None) is not None:
        return out.loss
    total = torch.sin(out.last_hidden_state).mean()
    return total if out.get("pooler_output") is None else total + out.pooler_output.mean()


def jax_objective(out):
    if getattr(out, "loss", None) is not None:
        return out.loss
    total = jnp.sin(out.last_hidden_state).mean()
    return total if out.pooler_output is None else total + out.pooler_output.mean()


@pytest.mark.parametrize("case", ["vivit cls", "mae pretraining"])
def test_default_matmul_precision(case, tmp_path):
    """What users run unless they ask for more; the suite sets "highest", see `project`."""
    reference = torch_model(case)
    reference.save_pretrained(tmp_path)
    x, mask, labels = inputs_of(case)
    theirs = torch_run(case, reference, x, mask, labels)
    model, params = vivit_jax.from_pretrained(tmp_path)
    with jax.default_matmul_precision("default"):
        ours = forward(model, params, x, **jax_inputs(case, mask, labels))
    assert_close(ours.logits, theirs.logits.detach().numpy(), "logits")
    assert_close(ours.loss, theirs.loss.detach().numpy(), "loss")


@pytest.mark.parametrize("case", ["mae base", "mae base norm", "mae cls"])
def test_masked_encoder(case, tmp_path):
    import torch

    reference = torch_model(case)
    reference.save_pretrained(tmp_path)
    x, mask, _ = inputs_of(case)
    theirs = reference(to_torch(x), bool_masked_pos=torch.from_numpy(mask))
    model, params = vivit_jax.from_pretrained(tmp_path)
    ours = forward(model, params, x, mask=vivit_jax.Mask.from_bool(mask))
    for field in ("logits", "last_hidden_state"):
        if field in theirs:
            assert_close(getattr(ours, field), getattr(theirs, field).detach().numpy(), field)


def test_low_contrast_clip_shows_the_norm_epsilon(tmp_path):
    """Pixels x 0.01 and positions x 0.01: an eps of 1e-5 for 1e-6 would be seen."""
    import torch

    reference = torch_model("vivit cls")
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if "embeddings" in name:
                p *= 0.01
    reference.save_pretrained(tmp_path)
    x = clip(config_of("vivit cls"), scale=0.01)
    theirs = reference(to_torch(x)).logits.detach().numpy()
    model, params = vivit_jax.from_pretrained(tmp_path)
    assert_close(forward(model, params, x).logits, theirs, "logits")
    wrong = type(model)(dataclasses.replace(model.config, layer_norm_eps=1e-5))
    assert error(forward(wrong, params, x).logits, theirs) > 2e-5


@pytest.mark.parametrize("case", ["vivit cls", "mae cls"])
def test_negative_controls_fail(case, tmp_path):
    """What the comparison must catch, it catches."""
    reference = torch_model(case)
    reference.save_pretrained(tmp_path)
    x, _, _ = inputs_of(case)
    theirs = reference(to_torch(x)).logits.detach().numpy()
    model, params = vivit_jax.from_pretrained(tmp_path)
    assert_close(forward(model, params, x).logits, theirs, "logits")

    other_gelu = {"gelu": "gelu_fast", "gelu_fast": "gelu"}[model.config.hidden_act]
    wrong = type(model)(dataclasses.replace(model.config, hidden_act=other_gelu))
    assert error(forward(wrong, params, x).logits, theirs) > 2e-5

    flat = param_tree.flatten(params)
    for a, b in (("query", "key"), ("query", "value")):
        prefix = "backbone/layers/attention/"
        swapped = flat | {
            f"{prefix}{a}/kernel": flat[f"{prefix}{b}/kernel"],
            f"{prefix}{b}/kernel": flat[f"{prefix}{a}/kernel"],
        }
        out = forward(model, param_tree.unflatten(swapped), x).logits
        assert error(out, theirs) > 1e-3
    for path in flat:
        if path.endswith("bias") and "key" not in path:  # a key bias cannot change the softmax
            zeroed = flat | {path: jnp.zeros_like(flat[path])}
            out = forward(model, param_tree.unflatten(zeroed), x).logits
            assert error(out, theirs) > 1e-3, path


@pytest.mark.parametrize("case", ["vivit cls", "mae cls", "mae base norm", "mae pretraining"])
def test_float32_error_is_no_larger_than_pytorchs(case, tmp_path):
    """Against PyTorch in float64, over ten clips: at most 1.5 times PyTorch's own error."""
    import torch

    reference = torch_model(case)
    reference.save_pretrained(tmp_path)
    # Eager ViViT attention rounds its softmax to float32 even for a float64 model; SDPA does not.
    exact = torch_model(case)
    exact.set_attn_implementation("sdpa")
    exact = exact.double()
    config = config_of(case)
    model, params = vivit_jax.from_pretrained(tmp_path)
    field = "last_hidden_state" if case in HEADLESS else "logits"
    squares = np.zeros(2)
    for seed in range(10):
        x, mask = clip(config, seed=seed), bool_mask(config, seed=seed)
        torch_in, jax_in = {}, {}
        if case in PRETRAINING:
            torch_in = {"bool_masked_pos": torch.from_numpy(mask)}
            jax_in = {"mask": vivit_jax.Mask.from_bool(mask)}
        with torch.no_grad():
            truth = exact(to_torch(x).double(), **torch_in)[field].numpy()
            theirs = reference(to_torch(x), **torch_in)[field].numpy()
        ours = getattr(forward(model, params, x, **jax_in), field)
        squares += [np.mean((np.asarray(y) - truth) ** 2) for y in (ours, theirs)]
    ratio = np.sqrt(squares[0] / squares[1])
    assert ratio <= 1.5, f"our error is {ratio:.2f} times PyTorch's"


@pytest.mark.parametrize(
    "case", mostly_slow(["vivit cls", "mae cls", "mae pretraining"], "vivit cls")
)
def test_bfloat16_stays_near_float32(case, tmp_path):
    torch_model(case).save_pretrained(tmp_path)
    x, mask, labels = inputs_of(case)
    inputs = jax_inputs(case, mask, labels)
    model, params = vivit_jax.from_pretrained(tmp_path)
    half, half_params = vivit_jax.from_pretrained(
        tmp_path, dtype="bfloat16", param_dtype="bfloat16"
    )
    mixed, mixed_params = vivit_jax.from_pretrained(tmp_path, dtype="bfloat16")
    assert {str(p.dtype) for p in jax.tree.leaves(half_params)} == {"bfloat16"}
    assert {str(p.dtype) for p in jax.tree.leaves(mixed_params)} == {"float32"}
    exact = np.asarray(forward(model, params, x, **inputs).logits)
    for other, p in ((half, half_params), (mixed, mixed_params)):
        out = forward(other, p, x, **inputs)
        assert out.logits.dtype == jnp.bfloat16 and out.loss.dtype == jnp.float32
        # bfloat16 has 8 bits: 2^-9 per rounding, many of them in three blocks.
        assert 1e-4 < error(np.asarray(out.logits, np.float32), exact) < 0.1


def test_position_resize_matches_huggingface_where_it_works():
    """One frame of tokens and a new non-square size is what transformers gets right."""
    import tempfile

    changes = dict(num_frames=2, image_size=(32, 32))
    reference = torch_model("vivit base", **changes)
    x = clip(config_of("vivit base", num_frames=2, image_size=(32, 48)))
    theirs = reference(to_torch(x), interpolate_pos_encoding=True).last_hidden_state
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        model, params = vivit_jax.from_pretrained(directory)
    ours = forward(model, params, x, interpolate_pos_encoding=True).last_hidden_state
    assert_close(ours, theirs.detach().numpy(), "last_hidden_state")


def test_dropout_needs_a_key_and_changes_the_output():
    config = config_of("mae cls", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    model = CASES["mae cls"][0](config)
    x = clip(config)
    params = random_params(model)
    plain = forward(model, params, x).logits

    @jax.jit
    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, x, deterministic=False, rngs=rngs).logits

    assert (np.asarray(run(0)) == np.asarray(run(0))).all()
    assert error(run(0), plain) > 1e-6 and error(run(0), run(1)) > 1e-6


@pytest.mark.parametrize(
    "case", mostly_slow(CASES, "vivit base", "vivit cls", "mae base norm", "mae pretraining")
)
def test_return_dict_false_gives_the_fields_in_order(case):
    config = config_of(case)
    model = CASES[case][0](config)
    x, mask, labels = inputs_of(case)
    inputs = jax_inputs(case, mask, labels)

    def run(return_dict):
        params = {"params": abstract_params(model)}
        flags = dict(output_hidden_states=True, return_dict=return_dict)
        return jax.eval_shape(lambda p: model.apply(p, x, **flags, **inputs), params)

    values, out = run(False), run(True)
    assert isinstance(values, tuple) and len(values) >= 2
    assert values == out.to_tuple()
