# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import itertools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_in_float64 import cotangent, largest_errors, plain, qkv, reference, with_gradients
from helpers import clip, mostly_slow, random_params
from tiny import VIDEOMAE, config_of

from vivit_jax import (
    ConfigError,
    UserError,
    VideoMAEConfig,
    VivitForVideoClassification,
    VivitModel,
)
from vivit_jax.benchmark.products import operations, products_of
from vivit_jax.benchmark.work import Work, program
from vivit_jax.layers import attention as attention_module
from vivit_jax.layers import chunked, linear
from vivit_jax.layers.attention import attention, choose_implementation
from vivit_jax.layers.chunked import TILES, Tile
from vivit_jax.layers.cudnn import cudnn_refusal, target_gpu
from vivit_jax.layers.placed import placed_attention

LENGTHS = [1, 17, 100, 200, 201, 399, 401, 640]


@pytest.mark.parametrize(
    ("length", "implementation"),
    mostly_slow(
        itertools.product(LENGTHS, ["auto", "xla", "chunked"]),
        *((length, "chunked") for length in LENGTHS),
        *((1, "auto"), (640, "auto"), (17, "xla"), (401, "xla")),
    ),
)
def test_every_backend_is_exact(implementation, length):
    q, k, v = qkv(length)
    out = attention(*map(jnp.asarray, (q, k, v)), implementation=implementation)
    np.testing.assert_allclose(out, reference(q, k, v), atol=5e-6)  # measured 6.0e-7


# Queries, keys, tile; what `_plan` makes of them: queries in a block, heads at a time out of 10.
PLANS = {
    "one block, all heads": (201, 201, Tile(4096, 2**14, 2**26), (201, 10)),
    "one block, 10 heads as 5 times 2, of 3 at most": (201, 201, Tile(4096, 603, 2**26), (201, 2)),
    "the same by scores": (201, 201, Tile(4096, 2**14, 130_000), (201, 2)),
    "one block, head by head": (201, 201, Tile(4096, 201, 2**26), (201, 1)),
    "four blocks, padded": (201, 201, Tile(64, 2**14, 2**26), (51, 1)),
    "blocks by rows, padded": (201, 201, Tile(4096, 50, 2**26), (41, 1)),
    "blocks by scores, padded": (201, 201, Tile(4096, 2**14, 50 * 201), (41, 1)),
    "blocks without padding": (200, 200, Tile(50, 2**14, 2**26), (50, 1)),
    "one query at a time": (17, 17, Tile(1, 1, 1), (1, 1)),
    "fewer keys, all heads": (201, 33, Tile(4096, 2**14, 2**26), (201, 10)),
    "fewer keys, blocks": (201, 33, Tile(64, 2**14, 2**26), (51, 1)),
    "more keys, 2 heads at a time": (33, 201, Tile(4096, 100, 2**26), (33, 2)),
    "more keys, blocks": (33, 201, Tile(8, 2**14, 2**26), (7, 1)),
    "one query": (1, 201, Tile(4096, 2**14, 2**26), (1, 10)),
    "one key": (201, 1, Tile(64, 2**14, 2**26), (51, 1)),
}


@pytest.mark.parametrize("plan", PLANS)
def test_chunked_in_tiles_of_every_kind(plan, monkeypatch):
    queries, keys, tile, expected = PLANS[plan]
    for place in TILES:
        monkeypatch.setitem(TILES, place, tile)
    assert chunked._plan(10, queries, keys, tile) == expected
    q, k, v = qkv(queries, heads=5, keys=keys)
    d_out = cotangent(q)
    found = with_gradients(placed_attention, q, k, v, d_out)
    output, gradient = largest_errors(found, reference(q, k, v, d_out))
    assert output < 2e-6  # measured 5.8e-7
    assert gradient < 3e-5  # measured 9.0e-6 with one key, 1.7e-6 else


@pytest.mark.parametrize(
    ("length", "width"),
    mostly_slow(
        [(160, 64), (160, 88), (1568, 64), (1568, 80), (3137, 64)], (160, 64), (160, 88), (1568, 80)
    ),
)
def test_chunked_at_published_sizes(length, width):
    """The sequences of VideoMAE's encoder and decoder and of ViViT, with published widths."""
    q, k, v = qkv(length, heads=2, width=width, batch=1)
    d_out = cotangent(q)
    found = with_gradients(placed_attention, q, k, v, d_out)
    output, gradient = largest_errors(found, reference(q, k, v, d_out))
    assert output < 1e-6  # measured 3.6e-7
    assert gradient < 2e-6  # measured 7.4e-7


@pytest.mark.parametrize("length", [17, 401, 700])  # together, and in one and two blocks on CPU
def test_chunked_float64_stays_float64(length):
    q, k, v = qkv(length, dtype=np.float64)
    d_out = cotangent(q)
    with jax.enable_x64(True):
        found = with_gradients(placed_attention, *map(jnp.asarray, (q, k, v, d_out)))
    output, gradient = largest_errors(found, reference(q, k, v, d_out))
    assert output < 3e-15  # measured 8.6e-16
    assert gradient < 4e-15  # measured 1.2e-15


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_bfloat16_keeps_a_float32_softmax(implementation):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(401))
    out = attention(q, k, v, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    # One rounding of the weights and one of the output: 2^-9 each; measured 3.2e-3.
    np.testing.assert_allclose(np.asarray(out, np.float32), reference(q, k, v), atol=6e-3)


@pytest.mark.parametrize("length", [17, 401, 700])
@pytest.mark.parametrize(
    ("dtype", "allowed", "allowed_gradient"),
    [
        (jnp.bfloat16, 8e-3, 1.2e-2),  # measured 3.9e-3 and 5.6e-3
        (jnp.float16, 1.2e-3, 2e-3),  # measured 5.0e-4 and 8.3e-4
    ],
)
def test_chunked_in_half_precision(length, dtype, allowed, allowed_gradient):
    q, k, v = (jnp.asarray(x, dtype) for x in qkv(length))
    d_out = jnp.asarray(cotangent(q), dtype)
    found = with_gradients(placed_attention, q, k, v, d_out)
    output, gradient = largest_errors(found, reference(q, k, v, d_out))
    assert output < allowed and gradient < allowed_gradient


def test_sums_of_weights_pass_what_float16_holds():
    """3137 equal weights times 30 make 94110 before the division, and float16 ends at 65504."""
    shape = (1, 3137, 1, 8)
    zeros, v = jnp.zeros(shape, jnp.float16), jnp.full(shape, 30, jnp.float16)
    assert (placed_attention(zeros, zeros, v) == 30).all()


@pytest.mark.parametrize(
    "tile", [TILES["cpu"], Tile(64, 2**12, 2**21)], ids=["one block", "blocks"]
)
def test_large_scores_stay_finite_and_exact(tile, monkeypatch):
    """Scores in the thousands: their float32 rounding is all that is lost, as in plain float32."""
    monkeypatch.setitem(TILES, "cpu", tile)
    q, k, v = qkv(301, scale=30)
    d_out = cotangent(q)
    exact = reference(q, k, v, d_out)
    ours, plains = (
        largest_errors(with_gradients(attend, q, k, v, d_out), exact)
        for attend in (placed_attention, plain)
    )
    # Measured with AVX2 5.4e-3 and 0.27, where the plain form has 6.3e-3 and 0.24; with AVX-512
    # 4.5e-3 and 0.30, where it has 7.0e-3 and 0.18.
    assert ours[0] < 2.5 * plains[0] and ours[1] < 2.5 * plains[1]


def test_one_key_far_above_the_others_takes_all():
    q = k = jnp.full((1, 5, 1, 4), 0.0).at[0, :, 0, 0].set(jnp.arange(5) * 1e4)
    v = jnp.arange(20.0).reshape(1, 5, 1, 4)
    out, d_q, d_k, d_v = with_gradients(placed_attention, q, k, v, jnp.ones_like(q))
    np.testing.assert_array_equal(out[0, 1:, 0], jnp.tile(v[0, 4, 0], (4, 1)))
    np.testing.assert_allclose(out[0, 0, 0], v[0, :, 0].mean(0), rtol=1e-6)
    np.testing.assert_allclose(d_v[0, :, 0, 0], [0.2, 0.2, 0.2, 0.2, 4.2], rtol=1e-6)
    assert np.isfinite(d_q).all() and np.isfinite(d_k).all()


@pytest.mark.parametrize("tile", [TILES["cpu"], Tile(8, 2**12, 2**21)], ids=["one block", "blocks"])
def test_second_derivative(tile, monkeypatch):
    monkeypatch.setitem(TILES, "cpu", tile)

    def second(attend):
        loss = lambda *x: jnp.sum(jnp.sin(attend(*x)))  # noqa: E731
        first = jax.grad(loss, argnums=(0, 1, 2))
        bent = lambda *x: sum(jnp.sum(jnp.sin(3 * g)) for g in first(*x))  # noqa: E731
        return jax.jit(jax.grad(bent, argnums=(0, 1, 2)))

    inputs = qkv(33, keys=21, dtype=np.float64)
    ours = second(placed_attention)(*(jnp.asarray(x, jnp.float32) for x in inputs))
    with jax.enable_x64(True):
        exact = second(plain)(*map(jnp.asarray, inputs))
    for a, b in zip(ours, exact, strict=True):
        assert np.abs(b).max() > 1
        np.testing.assert_allclose(a, b, atol=3e-5)  # measured 1.0e-5


def test_forward_mode_is_refused_and_left_to_xla():
    q, k, v = map(jnp.asarray, qkv(17))

    def along(implementation):
        return jax.jvp(lambda q: attention(q, k, v, implementation=implementation), (q,), (q,))

    with pytest.raises(TypeError, match="forward-mode autodiff"):
        along("chunked")
    assert np.isfinite(along("xla")[1]).all()


@pytest.mark.parametrize("length", [1, 17, 201])
def test_float64_stays_float64(length):
    q, k, v = qkv(length, dtype=np.float64)
    with jax.enable_x64(True):
        out = jax.jit(attention)(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(out, reference(q, k, v), atol=1e-14)


def temporary_bytes(implementation, length, gradient, heads=12):
    """What a compiled forward pass or gradient holds beside its arguments; heads of 64."""
    x = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    run = lambda q, k, v: attention(q, k, v, implementation=implementation)  # noqa: E731
    if gradient:
        run = jax.grad(lambda *x: attention(*x, implementation=implementation).sum(), (0, 1, 2))
    return jax.jit(run).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def score_bytes(length, heads=12):
    return heads * length**2 * 4


@pytest.mark.parametrize(("gradient", "part"), [(False, 4), (True, 3)])
def test_chunked_never_holds_the_scores_of_all_heads(gradient, part):
    """Measured 22.0 MiB forward and 34.6 for the gradient; the scores are 112.5 MiB."""
    assert temporary_bytes("xla", 1568, gradient) >= score_bytes(1568)  # so that this can fail
    short, long = (temporary_bytes("chunked", length, gradient) for length in (1568, 3136))
    assert short < score_bytes(1568) / part
    assert long / short < 2.1  # measured 2.00 for both: linear in tokens


@pytest.mark.parametrize("gradient", [False, True])
def test_the_accelerators_tile_is_linear_in_tokens_too(gradient, monkeypatch):
    """48 heads, whose scores take from 113 to 7203 MiB.

    Measured 109, 211, 417 and 378 MiB forward, 196, 383, 758 and 611 for the gradient.
    """
    monkeypatch.setitem(TILES, "cpu", TILES["default"])
    lengths = (784, 1568, 3136, 6272)
    found = [temporary_bytes("chunked", length, gradient, heads=48) for length in lengths]
    for short, long in itertools.pairwise(found):
        assert long / short < 2.1
    assert found[-1] < score_bytes(lengths[-1], heads=48) / 8


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "length", "expected"),
    [
        ("cpu", "float32", 64, 1568, "chunked"),
        ("cpu", "bfloat16", 64, 1568, "chunked"),
        ("cpu", "float32", 64, 50, "chunked"),
        ("cpu", "float32", 64, 1, "xla"),
        ("cpu", "bfloat16", 64, 1, "xla"),
        # XLA's softmax is in float32 even there, and its CPU backend has no batched float16.
        ("cpu", "float64", 64, 1, "chunked"),
        ("cpu", "float16", 64, 1, "chunked"),
        ("cpu", "float16", 64, 50, "chunked"),
        ("gpu", "bfloat16", 64, 3137, "cudnn"),
        ("gpu", "float16", 88, 1568, "cudnn"),
        ("gpu", "bfloat16", 64, 1, "xla"),
        ("gpu", "float16", 64, 1, "xla"),
        ("gpu", "float32", 64, 1568, "chunked"),
        ("gpu", "float32", 64, 1, "xla"),
        ("gpu", "float64", 64, 1568, "chunked"),
        ("gpu", "float64", 64, 1, "chunked"),
        ("tpu", "bfloat16", 64, 1568, "pallas"),
        ("tpu", "float32", 88, 160, "pallas"),
        ("tpu", "float64", 64, 1568, "chunked"),
        ("tpu", "bfloat16", 64, 16, "chunked"),
        ("tpu", "bfloat16", 4, 1568, "chunked"),
        ("tpu", "bfloat16", 64, 1, "xla"),
    ],
)
def test_what_auto_stands_for(platform, dtype, head_dim, length, expected, caplog, monkeypatch):
    monkeypatch.setattr(attention_module, "cudnn_refusal", lambda *what: None)
    log = choices(caplog, platform, dtype, head_dim, length, expected)
    assert expected in log and "cuDNN" not in log


def choices(caplog, platform, dtype, head_dim, length, expected):
    """The single line logged for a choice, however often it is made."""
    attention_module._choose.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert choose_implementation(platform, dtype, head_dim, length) == expected
    attention_module._choose.cache_clear()  # the next test may see another cuDNN
    (record,) = caplog.records
    return record.getMessage()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_cudnn_refuses_is_chunked_and_the_log_says_why(dtype, caplog, monkeypatch):
    asked = []
    refusal = lambda *what: asked.append(what) or "no engine for this"  # noqa: E731
    monkeypatch.setattr(attention_module, "cudnn_refusal", refusal)
    log = choices(caplog, "gpu", dtype, 256, 1568, "chunked")
    assert caplog.records[0].levelno == logging.WARNING  # seen without asking for it
    assert log.endswith("256, 1568 queries; cuDNN refuses: no engine for this")
    assert asked == [(dtype, 256, 1568, target_gpu())]  # a compilation each, so once


def test_without_a_gpu_cudnn_refuses_itself(caplog):
    if jax.default_backend() == "gpu":
        pytest.skip("about a machine without a GPU")
    assert cudnn_refusal("bfloat16", 64, 160) == "there is no GPU to ask it on"
    log = choices(caplog, "gpu", "bfloat16", 64, 160, "chunked")
    assert log.endswith("cuDNN refuses: there is no GPU to ask it on")


def test_cudnn_where_it_cannot_run_is_an_error_not_a_fallback():
    if jax.default_backend() == "gpu":
        q, k, v = map(jnp.asarray, qkv(64))  # float32
    else:
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv(64, width=64))
    with pytest.raises(ConfigError, match="attention='cudnn' cannot run here.*auto"):
        attention(q, k, v, implementation="cudnn")


@pytest.fixture
def pretended_cudnn(monkeypatch):
    """Programs are traced and lowered as if cuDNN were available; they cannot be run."""
    from jax._src.cudnn import fused_attention_stablehlo  # jax has no public switch for this

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(
        fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False
    )
    monkeypatch.setattr(attention_module, "cudnn_refusal", lambda *_: None)
    for module in (linear, attention_module):
        monkeypatch.setattr(module, "platform", lambda: "gpu")


@pytest.mark.parametrize("dtype", mostly_slow(["bfloat16", "float16"], "bfloat16"))
@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("dots", 1), ("block", 2)])
def test_cudnn_in_a_training_step_and_what_remat_keeps_of_it(
    remat, forwards, dtype, pretended_cudnn
):
    """Of a scanned encoder, whose only other products are projections."""
    sizes = dict(hidden_size=128, num_attention_heads=2, image_size=32, patch_size=4)
    config = VideoMAEConfig(
        **VIDEOMAE | sizes, attention="auto", dtype=dtype, remat=remat, scan_layers=True
    )
    made = program(Work("", config, "finetune"))
    traced = made.step.trace(made.state, made.inputs)
    steps = str(traced.jaxpr)
    assert steps.count("dot_product_attention_fwd_wrapper[") == forwards
    assert steps.count("dot_product_attention_bwd_wrapper[") == 1
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\$\w+)\(", text)
    assert {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"} == set(calls)


@pytest.mark.parametrize(("implementation", "again"), [("xla", 1), ("chunked", 0)])
def test_what_remat_keeps_of_attention_is_not_computed_again(implementation, again):
    """With "dots" only the scores of "xla", which are not kept; with "block" all of it."""
    sizes = dict(hidden_size=32, num_attention_heads=4, image_size=32, patch_size=2)
    flops = {}
    for remat in ("none", "dots", "block"):
        config = VideoMAEConfig(
            **VIDEOMAE | sizes | dict(intermediate_size=8, num_hidden_layers=1),
            attention=implementation,
            remat=remat,
            scan_layers=False,
        )
        made = program(Work("", config, "finetune"))
        flops[remat] = operations(products_of(made.step, made.state, made.inputs))
    tokens = config.num_tokens
    one = 2 * tokens**2 * config.hidden_size  # scores, or weights times values
    assert flops["dots"] - flops["none"] == again * one
    assert flops["block"] - flops["none"] > 2 * one


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("length", [160, 1568, 3137])
@pytest.mark.parametrize("width", [64, 80, 88])
def test_cudnn_agrees_with_float64(length, width, dtype):
    """Output and gradients, no farther off than the tiles in the same dtype."""
    assert cudnn_refusal(jnp.dtype(dtype).name, width, length) is None
    q, k, v = (jnp.asarray(x, dtype) for x in qkv(length, width=width))
    d_out = jnp.asarray(cotangent(q), dtype)
    exact = reference(q, k, v, d_out)
    backends = (functools.partial(attention, implementation="cudnn"), placed_attention)
    cudnn, tiles = (largest_errors(with_gradients(f, q, k, v, d_out), exact) for f in backends)
    assert cudnn[0] < 2 * tiles[0] and cudnn[1] < 8 * tiles[1]  # float16's tiles are wider


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_training_step_through_cudnn_agrees_with_float32(dtype):
    """Loss and gradients of a model with odd length, against the same in float32."""
    config = dataclasses.replace(config_of("vivit base"), hidden_size=256, num_attention_heads=4)
    model = VivitForVideoClassification(config)
    params, x = random_params(model, scale=0.05), clip(config)
    labels = np.arange(len(x)) % config.num_labels

    def step(**execution):
        model = VivitForVideoClassification(dataclasses.replace(config, **execution))
        loss = lambda p: model.apply({"params": p}, x, labels=labels).loss  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    exact, exact_gradients = step(attention="chunked")
    loss, gradients = step(attention="cudnn", dtype=dtype)
    assert abs(loss - exact) < 2e-2 * abs(exact)
    apart = optax.tree.norm(optax.tree.sub(gradients, exact_gradients))
    assert apart < 5e-2 * optax.tree.norm(exact_gradients)


def test_float16_runs_on_cpu_except_where_xla_cannot():
    q, k, v = (jnp.asarray(x, jnp.float16) for x in qkv(17))
    for implementation in ("auto", "chunked"):
        out = attention(q, k, v, implementation=implementation)
        assert out.dtype == jnp.float16
        np.testing.assert_allclose(np.asarray(out, np.float32), reference(q, k, v), atol=2e-3)
    if jax.default_backend() == "cpu":
        with pytest.raises(ConfigError, match="cannot run float16 on CPU"):
            attention(q, k, v, implementation="xla")


def test_unknown_implementation():
    with pytest.raises(ConfigError, match="got 'flash'"):
        attention(*map(jnp.asarray, qkv(4)), implementation="flash")


def test_head_mask_silences_heads_layer_by_layer():
    """Zero for a head equals zeroing the rows of the output projection that read it."""
    config = dataclasses.replace(config_of("vivit base"), scan_layers=False)
    model, x = VivitModel(config), clip(config)
    params = {"params": random_params(model)}
    apply = jax.jit(model.apply, static_argnames="output_attentions")
    head_mask = np.array([[1, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]], np.float32)
    ours = apply(params, x, head_mask=head_mask, output_attentions=True)
    cut = jax.tree.map(lambda p: p, params)
    for layer, row in enumerate(head_mask):
        out = cut["params"][f"layers_{layer}"]["attention"]["out"]
        out["kernel"] = out["kernel"] * row[:, None, None]
    expected = apply(cut, x).last_hidden_state
    np.testing.assert_allclose(ours.last_hidden_state, expected, atol=1e-5)
    silent = np.asarray(ours.attentions).sum(axis=(-2, -1)) == 0
    assert (silent == (head_mask == 0)[:, None]).all()
    untouched = apply(params, x).last_hidden_state
    assert np.abs(np.asarray(untouched) - np.asarray(expected)).max() > 1e-2
    ones = apply(params, x, head_mask=np.ones(4)).last_hidden_state
    np.testing.assert_allclose(ones, untouched, atol=1e-5)
    with pytest.raises(UserError, match=r"\(4,\) or \(3, 4\), got \(3,\)"):
        model.apply(params, x, head_mask=np.ones(3))


def test_without_jit_nothing_is_compiled_again(caplog):
    """A second call outside of `jax.jit`, as in a notebook, takes the program of the first."""
    q, k, v = (jnp.asarray(x) for x in qkv(37, batch=1))
    step = jax.value_and_grad(lambda *x: attention(*x, implementation="chunked").sum())
    with jax.log_compiles():
        first = step(q, k, v)
        assert "Finished XLA compilation" in caplog.text
        caplog.clear()
        again = step(q, k, v)
    assert "Finished XLA compilation" not in caplog.text
    jax.tree.map(np.testing.assert_array_equal, first, again)
