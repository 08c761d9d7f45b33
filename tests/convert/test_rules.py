# SPDX-License-Identifier: Apache-2.0
import ml_dtypes
import numpy as np
import pytest

from checkpoints_convert.rules import Rule, expand, export_params, import_params
from vivit_jax import param_tree
from vivit_jax.errors import CheckpointError

LAYERS, HEADS, WIDTH = 3, 2, 8
QKV = tuple("layers_{i}/attention/" + name + "/kernel" for name in ("query", "key", "value"))
TABLE = [
    Rule("cls", "cls"),
    Rule("fc.{i}.weight", "layers_{i}/mlp/kernel", "o i -> i o", layers=LAYERS),
    Rule("blocks.{i}.qkv.weight", QKV, "(s n e) d -> s d n e", layers=LAYERS, sizes={"n": HEADS}),
    Rule("k.{i}.bias", (), layers=LAYERS, reason="it changes nothing"),
]
STACKED = {
    "cls": (1, WIDTH),
    "layers/mlp/kernel": (LAYERS, WIDTH, 5),
    **{
        path.replace("layers_{i}", "layers"): (LAYERS, WIDTH, HEADS, WIDTH // HEADS) for path in QKV
    },
}
PER_LAYER = {path: slot.shape for path, slot in param_tree.slots(STACKED).items()}


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    out = {"cls": rng.standard_normal((1, WIDTH))}
    for i in range(LAYERS):
        out[f"fc.{i}.weight"] = rng.standard_normal((5, WIDTH))
        out[f"blocks.{i}.qkv.weight"] = rng.standard_normal((3 * WIDTH, WIDTH))
        out[f"k.{i}.bias"] = rng.standard_normal(WIDTH)
    return {name: value.astype(dtype) for name, value in out.items()}


def failure(call, *args, **kwargs) -> str:
    with pytest.raises(CheckpointError) as error:
        call(*args, **kwargs)
    return str(error.value)


@pytest.mark.parametrize("expected", [STACKED, PER_LAYER], ids=["stacked", "per layer"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_round_trip_is_exact_in_both_layouts(expected, dtype):
    source = tensors(dtype)
    params = import_params(source, TABLE, expected)
    assert {path: array.shape for path, array in params.items()} == expected
    assert all(array.dtype == dtype for array in params.values())
    back = {name: t.read() for name, t in export_params(params, TABLE, expected).items()}
    kept = {name: value for name, value in source.items() if not name.startswith("k.")}
    assert back.keys() == kept.keys()
    for name, value in kept.items():
        assert back[name].dtype == dtype and np.array_equal(back[name], value), name


def test_values_go_where_the_pattern_says():
    source = tensors()
    params = import_params(source, TABLE, STACKED)
    assert np.array_equal(params["layers/mlp/kernel"][2], source["fc.2.weight"].T)
    fused = source["blocks.1.qkv.weight"].reshape(3, HEADS, WIDTH // HEADS, WIDTH)
    for s, name in enumerate(("query", "key", "value")):
        ours = params[f"layers/attention/{name}/kernel"][1]
        assert np.array_equal(ours, fused[s].transpose(2, 0, 1)), name


def test_wide_transposed_tensors_are_copied_whole():
    value = np.random.default_rng(0).standard_normal((37, 50)).astype(np.float32)
    rules = [Rule("w", "kernel", "o i -> i o")]
    assert np.array_equal(
        import_params({"w": value}, rules, {"kernel": (50, 37)})["kernel"], value.T
    )


def test_leaves_are_aligned_for_jax():
    params = import_params(tensors(), TABLE, STACKED)
    assert all(array.ctypes.data % 64 == 0 for array in params.values())


def test_cast_on_read_and_promotion_of_mixed_layers():
    source = tensors()
    assert import_params(source, TABLE, STACKED, "bfloat16")["cls"].dtype == ml_dtypes.bfloat16
    source["fc.1.weight"] = source["fc.1.weight"].astype(ml_dtypes.bfloat16)
    mixed = import_params(source, TABLE, STACKED)["layers/mlp/kernel"]
    assert mixed.dtype == np.float32
    assert np.array_equal(mixed[1], source["fc.1.weight"].T.astype(np.float32))
    source["fc.2.weight"] = source["fc.2.weight"].astype(np.float16)
    source["fc.0.weight"] = source["fc.0.weight"].astype(ml_dtypes.bfloat16)
    halves = import_params(source, TABLE, STACKED)["layers/mlp/kernel"]
    assert halves.dtype == np.float32  # the narrowest that holds bfloat16 and float16
    for layer in range(3):
        stored = source[f"fc.{layer}.weight"]
        assert np.array_equal(halves[layer], stored.T.astype(np.float32))
    params = import_params(tensors(np.float16), TABLE, STACKED)
    key = "layers/attention/key/kernel"
    params[key] = params[key].astype(ml_dtypes.bfloat16)
    fused = export_params(params, TABLE, STACKED)["blocks.1.qkv.weight"]
    assert fused.dtype == np.float32 and fused.read().dtype == np.float32


def test_reads_one_tensor_at_a_time_and_nothing_before_all_checks():
    reads = []

    class Lazy:
        def __init__(self, name, value):
            self.name, self.value = name, value
            self.shape, self.dtype = value.shape, value.dtype

        def read(self):
            reads.append(self.name)
            return self.value

    source = {name: Lazy(name, value) for name, value in tensors().items()}
    broken = {name: value for name, value in source.items() if name != "cls"}
    failure(import_params, broken, TABLE, STACKED)
    assert reads == []
    import_params(source, TABLE, STACKED)
    assert sorted(reads) == sorted(name for name in source if not name.startswith("k."))


def test_every_wrong_tensor_is_listed_at_once():
    source = tensors()
    source["surprise"] = source.pop("cls")
    source["fc.1.weight"] = np.zeros((5, WIDTH + 1), np.float32)
    for i in range(LAYERS):
        del source[f"blocks.{i}.qkv.weight"]
    source["extra.weight"] = np.zeros(3, np.float32)
    source["fc.2.weight"] = source["fc.2.weight"].astype(np.int64)
    message = failure(import_params, source, TABLE, STACKED, what="file.bin")
    assert message.startswith("file.bin does not fit the model: ")
    for part in (
        "cls  expected (1, 8) [cls (1, 8)]",
        "surprise  (1, 8) (perhaps cls, renamed)",
        "fc.1.weight  got (5, 9), expected (5, 8) [layers_1/mlp/kernel (8, 5)]",
        "blocks.{0-2}.qkv.weight  expected (24, 8) [layers_{0-2}/attention/query/kernel (8, 2, 4)",
        "missing (4)",
        "unexpected (2)",
        "extra.weight  (3,)",
        "fc.2.weight  int64, expected one of float32",
    ):
        assert part in message, message


def test_table_that_does_not_cover_the_model():
    message = failure(
        import_params,
        tensors() | {"other": np.zeros(2, np.float32)},
        [*TABLE, Rule("cls", "cls"), Rule("other", "nowhere")],
        STACKED | {"layers/unset/scale": (LAYERS, 4)},
    )
    for part in (
        "set twice by the table (1):\n    cls  2 times",
        "read twice by the table (1):\n    cls  2 times",
        "not in the model, but in the table (1):\n    nowhere  from other",
        "parameter set by nothing (3):\n    layers_{0-2}/unset/scale  (4,)",
    ):
        assert part in message, message


def test_number_of_layers_must_agree():
    def stacked(layers):
        return {path: (layers, *s[1:]) if "layers" in path else s for path, s in STACKED.items()}

    message = failure(import_params, tensors(), TABLE, stacked(LAYERS - 1))
    assert "layers_2/mlp/kernel  from fc.2.weight" in message
    assert "layers_3/mlp/kernel" in failure(import_params, tensors(), TABLE, stacked(LAYERS + 1))


def test_export_lists_every_wrong_parameter_at_once():
    params = import_params(tensors(), TABLE, STACKED)
    params["Cls"] = params.pop("cls")
    params["layers/mlp/kernel"] = params["layers/mlp/kernel"][:, :-1]
    params["more"] = np.zeros(3, np.float32)
    message = failure(export_params, params, TABLE, STACKED, "params")
    for part in (
        "cls  expected (1, 8)",
        "Cls  (1, 8) (perhaps cls, renamed)",
        "layers/mlp/kernel  got (3, 7, 5), expected (3, 8, 5)",
        "more  (3,)",
    ):
        assert part in message, message
    assert "layers_{0-2}/mlp/kernel  named by" in failure(
        export_params, {"cls": params["Cls"]}, TABLE
    )


def test_export_refuses_what_a_checkpoint_cannot_hold():
    params = import_params(tensors(), TABLE, STACKED)
    params["cls"] = params["cls"].astype(np.complex64)
    assert "cls  complex64" in failure(export_params, params, TABLE, STACKED)


def test_expand_counts_layers():
    assert [row.src for row in expand(TABLE)][:4] == ["cls", *(f"fc.{i}.weight" for i in range(3))]


def test_expand_goes_layer_by_layer_through_a_stack():
    each, fewer = {"layers": 2}, {"layers": 1}
    rules = [
        Rule("a.{i}.w", "layers_{i}/w", **each),
        Rule("a.{i}.b", "layers_{i}/b", **each),
        Rule("b.{i}.w", "more/layers_{i}/w", **each),
        Rule("b.{i}.x", "more/layers_{i}/x", **fewer),
        Rule("end", "end"),
    ]
    names = ["a.0.w", "a.0.b", "a.1.w", "a.1.b", "b.0.w", "b.1.w", "b.0.x", "end"]
    assert [row.src for row in expand(rules)] == names


def test_paths():
    assert param_tree.layer_path("layers/b", 3) == "layers_3/b"
    assert param_tree.layer_path("players/layers/b", 3) == "players/layers_3/b"
    shapes = {"a/layers/b": (2, 5), "players/c": (7,), "a/layers_9/d": (3,)}
    assert param_tree.slots(shapes) == {
        "a/layers_0/b": param_tree.Slot("a/layers/b", 0, (5,)),
        "a/layers_1/b": param_tree.Slot("a/layers/b", 1, (5,)),
        "players/c": param_tree.Slot("players/c", None, (7,)),
        "a/layers_9/d": param_tree.Slot("a/layers_9/d", None, (3,)),
    }
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert param_tree.unflatten(param_tree.flatten(nested)) == nested


def test_numbers_too_large_for_the_dtype_are_refused():
    source = {"a": np.array([1e6], np.float32), "b": np.array([1.0, np.inf], np.float32)}
    rules = [Rule("a", "a"), Rule("b", "b")]
    expected = {"a": (1,), "b": (2,)}
    with pytest.raises(CheckpointError, match="too large for float16: a; keep"):
        import_params(source, rules, expected, "float16")
    with pytest.raises(CheckpointError, match="too large for bfloat16: a; keep"):
        import_params(source | {"a": np.array([3.4e38], np.float32)}, rules, expected, "bfloat16")
    assert np.isinf(import_params(source, rules, expected, "float32")["b"][1])
