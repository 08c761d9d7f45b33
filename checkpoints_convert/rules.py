# SPDX-License-Identifier: Apache-2.0
"""Weight tables and the engine that moves tensors through them, strictly and in both directions.

A table is a list of `Rule`. Importing reads the rules from left to right, exporting from right to
left, so there is no hand-written inverse that could disagree. All names and shapes are checked
before any data is read, and all faults are reported at once.

A source maps names to tensors. A tensor has `shape` and `dtype`; if it has `read()`, data is read
one tensor at a time, else it is an array. Rules only permute, so the same calls carry gradients.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import einops
import ml_dtypes
import numpy as np

from checkpoints_convert.files.tensors import LazyTensor
from checkpoints_convert.problems import Problems, collapse
from vivit_jax import param_tree
from vivit_jax.errors import CheckpointError

FLOATS = ("float32", "bfloat16", "float16", "float64")
_ALIGNMENT = 64  # bytes; jax on CPU adopts aligned arrays without a copy
_STRIPE = 16  # four-byte numbers in a cache line


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint and the parameter, or parameters, that it holds.

    `src` and `dst` are templates in which `{i}` counts the `layers`. `pattern` is an einops
    pattern from the tensor to the parameter, with `sizes` for the axes that it splits. A tuple
    `dst` names parameters that share one tensor, such as fused query, key and value, along the
    pattern's first target axis, `s`. An empty `dst` leaves the tensor out for the given `reason`;
    such a tensor may be absent.
    """

    src: str
    dst: str | tuple[str, ...]
    pattern: str = "... -> ..."
    layers: int | None = None
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A rule for one layer: a tensor's name and the interchange paths of its parameters."""

    src: str
    dst: tuple[str, ...]
    rule: Rule

    def to_params(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Split and permute a tensor into one array per path; views where possible."""
        out = self._rearrange(tensor, self.rule.pattern)
        return [out] if isinstance(self.rule.dst, str) else list(out)

    def to_tensor(self, params: list[np.ndarray]) -> np.ndarray:
        """Permute and merge the arrays of all paths into the tensor."""
        before, after = (side.strip() for side in self.rule.pattern.split("->"))
        whole = params[0] if isinstance(self.rule.dst, str) else np.stack(params)
        return self._rearrange(whole, f"{after} -> {before}")

    def tensor_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The tensor's shape for parameters of these shapes."""
        # A broadcast scalar has any shape and no data, and permuting it only permutes the shape.
        return self.to_tensor([np.broadcast_to(np.uint8(0), shape) for shape in shapes]).shape

    def _rearrange(self, array: np.ndarray, pattern: str) -> np.ndarray:
        sizes = dict(self.rule.sizes)
        if not isinstance(self.rule.dst, str):
            sizes["s"] = len(self.dst)
        return einops.rearrange(array, pattern, **sizes)


def expand(rules: Iterable[Rule]) -> Iterator[Row]:
    """One row per rule and layer; consecutive rules of one stack are expanded layer by layer.

    So a table in the order of a block's tensors gives the order of a whole state dict.
    """
    for (layers, _), stack in itertools.groupby(rules, _stack):
        stack = list(stack)
        for i in (None,) if layers is None else range(layers):
            for rule in stack:
                paths = (rule.dst,) if isinstance(rule.dst, str) else rule.dst
                yield Row(
                    rule.src.replace("{i}", str(i)),
                    tuple(path.replace("{i}", str(i)) for path in paths),
                    rule,
                )


def _stack(rule: Rule) -> tuple[int | None, str]:
    """The key that rules of one stack of blocks share: its depth and the name before the layer."""
    return rule.layers, "" if rule.layers is None else rule.src.partition("{i}")[0]


def match_import(
    source: Mapping[str, Any],
    rules: Iterable[Rule],
    expected: Mapping[str, tuple[int, ...]],
    what: str = "checkpoint",
) -> list[Row]:
    """Check names, shapes and dtypes of a source against a table and a parameter tree.

    `expected` is the shape of every leaf by path, in either form of `param_tree`. Returns the rows
    of the tensors in the source. Raises one CheckpointError that lists every tensor that is
    missing, unexpected, of a wrong shape or of an unsupported dtype, and every parameter that no
    rule sets, two rules set, or the model does not have.
    """
    problems = Problems(f"{what} does not fit the model")
    slots = param_tree.slots(expected)
    rows = list(expand(rules))
    wanted = {}
    for row in rows:
        absent = [path for path in row.dst if path not in slots]
        for path in absent:
            problems.add("not in the model, but in the table", path, f"from {row.src}")
        if row.dst and not absent:
            wanted[row.src] = row.tensor_shape([slots[path].shape for path in row.dst])
    for row in rows:
        shape = wanted.get(row.src)
        if shape is None:
            continue
        ours = ", ".join(f"{path} {slots[path].shape}" for path in row.dst)
        if row.src not in source:
            problems.missing(row.src, shape, f"expected {shape} [{ours}]")
        elif tuple(source[row.src].shape) != shape:
            got = tuple(source[row.src].shape)
            problems.add("wrong shape", row.src, f"got {got}, expected {shape} [{ours}]")
    known = [row.src for row in rows]
    problems.twice("read twice by the table", known)
    problems.twice("set twice by the table", [path for row in rows for path in row.dst])
    for name in sorted(source.keys() - set(known)):
        problems.unexpected(name, tuple(source[name].shape))
    for name in sorted(wanted.keys() & source.keys()):
        if dtype_name(source[name]) not in FLOATS:
            problems.add("unsupported dtype", name, _wrong_dtype(source[name]))
    for path in sorted(slots.keys() - {path for row in rows for path in row.dst}):
        problems.add("parameter set by nothing", path, f"{slots[path].shape}")
    problems.raise_if_any()
    return [row for row in rows if row.src in source]


def read_params(
    source: Mapping[str, Any],
    rows: Iterable[Row],
    expected: Mapping[str, tuple[int, ...]],
    dtype: str | np.dtype | None = None,
) -> dict[str, np.ndarray]:
    """Read the tensors of rows that `match_import` has checked.

    Returns one newly allocated array per leaf, of `dtype`, or as stored (None). Only one more
    tensor is in memory at a time. Raises CheckpointError if the layers of a stacked leaf have
    dtypes without a common one, and if finite numbers become infinite in `dtype`.
    """
    slots = param_tree.slots(expected)
    rows = [row for row in rows if row.dst]
    dtypes = leaf_dtypes(source, rows, slots) if dtype is None else {}
    out: dict[str, np.ndarray] = {}
    overflows = []
    for row in rows:
        for path, value in zip(row.dst, row.to_params(_read(source[row.src])), strict=True):
            slot = slots[path]
            if slot.leaf not in out:
                out[slot.leaf] = _empty(expected[slot.leaf], dtypes.get(slot.leaf, dtype))
            leaf = out[slot.leaf]
            target = leaf if slot.layer is None else leaf[slot.layer]
            with np.errstate(over="ignore"):
                _copy(target, value)
            if _narrower(target.dtype, value.dtype) and _overflowed(target, value):
                overflows.append(row.src)
    if overflows:
        raise CheckpointError(
            f"too large for {dtype}: {', '.join(collapse(overflows))}; keep a wider dtype"
        )
    return out


def import_params(
    source: Mapping[str, Any],
    rules: Iterable[Rule],
    expected: Mapping[str, tuple[int, ...]],
    dtype: str | np.dtype | None = None,
    what: str = "checkpoint",
) -> dict[str, np.ndarray]:
    """Read a checkpoint into a parameter tree with `expected` leaf shapes by path.

    `match_import`, then `read_params`.
    """
    return read_params(source, match_import(source, rules, expected, what), expected, dtype)


def leaf_dtypes(
    source: Mapping[str, Any], rows: Iterable[Row], slots: Mapping[str, param_tree.Slot]
) -> dict[str, np.dtype]:
    """The stored dtype of every leaf; layers that differ are promoted to a common dtype."""
    dtypes: dict[str, np.dtype] = {}
    for row in rows:
        stored = np.dtype(dtype_name(source[row.src]))
        for path in row.dst:
            leaf = slots[path].leaf
            dtypes[leaf] = _common_dtype(dtypes.get(leaf, stored), stored)
    return dtypes


def export_params(
    params: Mapping[str, Any],
    rules: Iterable[Rule],
    expected: Mapping[str, tuple[int, ...]] | None = None,
    what: str = "params",
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint, by name, from a flat parameter tree in either form.

    Values are arrays (numpy or jax); each tensor is computed by its `read()`. If `expected` leaf
    shapes are given, the tree must have exactly those. Raises one CheckpointError that lists every
    parameter that is missing, unexpected, of a wrong shape, or not used exactly once by the table.
    """
    problems = Problems(f"{what} do not fit the model")
    shapes = param_tree.shapes_of(params)
    for path, shape in (expected or {}).items():
        if path not in shapes:
            problems.missing(path, shape, f"expected {shape}")
        elif shapes[path] != shape:
            problems.add("wrong shape", path, f"got {shapes[path]}, expected {shape}")
    if expected is not None:
        for path in sorted(shapes.keys() - expected.keys()):
            problems.unexpected(path, shapes[path])
        problems.raise_if_any()
    slots = param_tree.slots(shapes)
    rows = [row for row in expand(rules) if row.dst]
    used = [path for row in rows for path in row.dst]
    for path in sorted(set(used) - slots.keys()):
        problems.missing(path, (), "named by the table")
    for path in sorted(slots.keys() - set(used)):
        problems.unexpected(path, slots[path].shape)
    for path, leaf in params.items():
        if dtype_name(leaf) not in FLOATS:
            problems.add("unsupported dtype", path, _wrong_dtype(leaf))
    problems.twice("used twice by the table", used)
    problems.twice("written twice by the table", [row.src for row in rows])
    problems.raise_if_any()
    return {row.src: _exported(params, row, [slots[path] for path in row.dst]) for row in rows}


def _exported(params, row: Row, slots: list[param_tree.Slot]) -> LazyTensor:
    def read():
        leaves = [np.asarray(params[slot.leaf]) for slot in slots]
        values = [
            (leaf if slot.layer is None else leaf[slot.layer]).astype(dtype, copy=False)
            for leaf, slot in zip(leaves, slots, strict=True)
        ]
        tensor = _empty(shape, dtype)
        _copy(tensor, row.to_tensor(values))
        return tensor

    dtype = functools.reduce(
        _common_dtype, (np.dtype(dtype_name(params[slot.leaf])) for slot in slots)
    )
    shape = row.tensor_shape([slot.shape for slot in slots])
    return LazyTensor(shape, dtype, read)


def dtype_name(tensor: Any) -> str:
    """`float32`, `bfloat16`, ... of a numpy, jax, torch or lazy tensor."""
    return str(tensor.dtype).removeprefix("torch.")


def stored_dtype(tensors: Mapping[str, Any]) -> str:
    """The dtype of a checkpoint: that of its tensors, float32 if they differ."""
    names = {dtype_name(tensor) for tensor in tensors.values()}
    return names.pop() if len(names) == 1 else "float32"


def _common_dtype(a: np.dtype, b: np.dtype) -> np.dtype:
    """The narrowest of FLOATS that holds every value of both."""
    # numpy promotes bfloat16 with float16 only since ml_dtypes 0.7; both are promoted with float32.
    return a if a == b else np.promote_types(np.promote_types(a, np.float32), b)


def _wrong_dtype(tensor: Any) -> str:
    return f"{dtype_name(tensor)}, expected one of {', '.join(FLOATS)}"


def _read(tensor: Any) -> np.ndarray:
    return tensor.read() if hasattr(tensor, "read") else np.asarray(tensor)


def _empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _narrower(target: np.dtype, stored: np.dtype) -> bool:
    return bool(ml_dtypes.finfo(target).max < ml_dtypes.finfo(stored).max)


def _overflowed(target: np.ndarray, value: np.ndarray) -> bool:
    return bool((np.isinf(target) & np.isfinite(value)).any())


def _copy(target: np.ndarray, value: np.ndarray) -> None:
    """target[...] = value; about four times faster for copies that transpose."""
    if value.ndim < 2 or value.strides[-1] == value.itemsize:
        target[...] = value
        return
    for i in range(0, value.shape[-1], _STRIPE):
        target[..., i : i + _STRIPE] = value[..., i : i + _STRIPE]
