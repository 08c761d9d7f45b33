# SPDX-License-Identifier: Apache-2.0
"""Models as flax.nnx modules and back, by flax's own bridge."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.nnx.bridge.variables import linen_vars_to_nnx_attrs

from vivit_jax.errors import UserError
from vivit_jax.models.build import check_params


def to_nnx(
    model: nn.Module, params: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
) -> nnx.bridge.ToNNX:
    """The model with its params as one stateful nnx module, which computes and trains the same.

    Call it as the linen module, without params: `module(pixel_values, deterministic=False)`. Its
    variables are `nnx.Param` by the paths of the params, so that `nnx.jit`, `nnx.value_and_grad`
    and `nnx.Optimizer(module, ..., wrt=nnx.Param)` work on it. It shares the arrays with `params`.

    `rngs` has a stream "dropout" for calls with `deterministic=False`; they may also get
    `rngs=nnx.Rngs(dropout=...)`. `module.train()` and `module.eval()` have no effect, since the
    argument decides. `from_nnx` is the way back, for `save_pretrained` and everything else here.

    Raises UserError for params that are not the model's.
    """
    if not isinstance(model, nn.Module) or not isinstance(params, Mapping):
        raise UserError(
            f"to_nnx takes a flax.linen module and its params, got {type(model).__name__} and "
            f"{type(params).__name__}"
        )
    plain = meta.unbox(dict(params))
    check_params(model, plain)
    module = nnx.bridge.ToNNX(model, rngs)
    for name, value in linen_vars_to_nnx_attrs({"params": plain}).items():
        setattr(module, name, nnx.data(value))
    return module


def from_nnx(module: nnx.bridge.ToNNX) -> tuple[nn.Module, dict[str, Any]]:
    """(model, params) of a module of `to_nnx`, with the params as they are now.

    Raises UserError for another module.
    """
    if not isinstance(module, nnx.bridge.ToNNX):
        raise UserError(f"from_nnx takes a module of vivit_jax.to_nnx, got {type(module).__name__}")
    return module.to_nnx__module, nnx.to_pure_dict(nnx.state(module, nnx.Param))
