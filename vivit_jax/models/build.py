# SPDX-License-Identifier: Apache-2.0
"""Modules from configs: built, traced for the shapes of their parameters, and initialised."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import meta
from jax.core import Tracer

from vivit_jax import param_tree
from vivit_jax.config import Config, check_head
from vivit_jax.errors import ConfigError, UserError
from vivit_jax.layers.platform import flag, platform
from vivit_jax.models.registry import family_of, head_of, is_known


def build_model(config: Config, head: str, add_pooling_layer: bool | None = None) -> nn.Module:
    """The module for a config and a head.

    `add_pooling_layer` is for a headless model; None is its class's default: ViViT has a pooling
    layer, VideoMAE has none. Raises ConfigError if a family without pooling is to have one.
    """
    check_head(config.model_type, head)
    model = family_of(config).models[head]
    options: dict[str, Any] = {"config": config}
    if head == "none" and add_pooling_layer is not None:
        if hasattr(model, "add_pooling_layer"):
            options["add_pooling_layer"] = add_pooling_layer
        elif add_pooling_layer:
            raise ConfigError(f"{model.__name__} has no pooling layer; leave add_pooling_layer out")
    return model(**options)


def headless(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The model without its head, which reports hidden states, and its parameters."""
    params = params if head_of(model) == "none" else params["backbone"]
    return build_model(model.config, "none", add_pooling_layer=False), params


def abstract_params(model: nn.Module) -> dict[str, Any]:
    """The model's parameter tree as ShapeDtypeStructs, in its running layout."""
    with _no_mesh():
        return meta.unbox(boxed_params(model))


def boxed_params(model: nn.Module) -> dict[str, Any]:
    """`abstract_params` in flax's boxes, which hold the logical axes of each parameter."""
    # The same parameters, with less to trace.
    config = dataclasses.replace(model.config, remat="none", attention="xla", dtype="float32")
    return _boxed(model.clone(config=config), flag("jax_enable_x64"))


@functools.lru_cache(maxsize=64)  # tracing a model takes a good part of a second
def _boxed(model: nn.Module, x64: bool) -> dict[str, Any]:
    """`x64` is part of the cache's key: dtypes depend on it."""
    clip, inputs = _init_inputs(model)

    def init(clip):
        return model.init(jax.random.key(0), clip, **inputs)["params"]

    with _no_mesh():
        return jax.eval_shape(init, clip)


def _no_mesh():
    """A block with no mesh set: with one, shapes would name it and get constraints."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _init_inputs(model: nn.Module) -> tuple[jax.ShapeDtypeStruct, dict[str, Any]]:
    config = model.config
    shape = (1, config.num_frames, *config.frame_size, config.num_channels)
    # A model of no family takes a clip alone.
    inputs = family_of(config).init_inputs(config, head_of(model)) if is_known(model) else {}
    return jax.ShapeDtypeStruct(shape, np.float32), inputs


def expected_shapes(
    config: Config, head: str, pooler: bool | None = None
) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters by path, one entry per layer; `pooler`: if headless."""
    leaves = param_tree.flatten(abstract_params(build_model(config, head, pooler)))
    shapes = param_tree.shapes_of(leaves)
    return {path: slot.shape for path, slot in param_tree.slots(shapes).items()}


def check_params(model: nn.Module, params: Mapping[str, Any]) -> None:
    """UserError for params whose paths or shapes are not the model's."""
    expected, found = (
        param_tree.shapes_of(param_tree.flatten(tree)) for tree in (abstract_params(model), params)
    )
    wrong = [path for path in {**expected, **found} if expected.get(path) != found.get(path)]
    if wrong:
        path, more = wrong[0], f" ({len(wrong) - 1} more differ)" if len(wrong) > 1 else ""
        raise UserError(
            f"the params are not those of this {type(model).__name__}: {path} has shape "
            f"{found.get(path, 'none')}, expected {expected.get(path, 'none')}{more}; take both "
            "from one call of from_pretrained or init"
        )


def fresh_params(model: nn.Module, seed: int) -> dict[str, Any]:
    """Freshly drawn parameters of a whole model, with HuggingFace's initial values."""
    leaves = set(param_tree.flatten(abstract_params(model)))
    return param_tree.unflatten(initialise(model, leaves, seed))


def initialise(model: nn.Module, leaves: set[str], seed: int) -> dict[str, jax.Array]:
    """Freshly drawn values of some leaves of the running parameter tree, by path."""
    # Drawn in float32 and cast, so that a seed gives the same head in every dtype.
    config = model.config
    dtype = config.param_dtype
    model = model.clone(config=dataclasses.replace(config, dtype="float32", param_dtype="float32"))
    key = jax.random.key(seed)
    # Compiler options are for a whole program, not for a part of one that is being traced.
    draw = _compiled_draw(platform() == "cpu" and not isinstance(key, Tracer))
    return draw(model, tuple(sorted(leaves)), dtype, key)


DRAW_OPTIONS: dict[str, Any] | None = {"xla_backend_optimization_level": 1}  # on a CPU


@functools.cache
def _compiled_draw(once_on_cpu: bool) -> Callable[..., dict[str, jax.Array]]:
    """`_drawn`, compiled so that only the results are computed, and once for equal models.

    It runs once, so LLVM's later passes do not pay: on a CPU the default level took 7.3 s to
    compile the demo's model and 6.4 s for VideoMAE-B's, this one 3.1 and 4.2 s, for the same bits.
    """
    options = DRAW_OPTIONS if once_on_cpu else None
    return jax.jit(_drawn, static_argnums=(0, 1, 2), compiler_options=options)


def _drawn(model: nn.Module, leaves: tuple[str, ...], dtype: str, key: jax.Array) -> dict:
    clip, inputs = _init_inputs(model)
    variables = model.init(key, jax.numpy.zeros(clip.shape, clip.dtype), **inputs)
    flat = param_tree.flatten(meta.unbox(variables)["params"])
    return {path: flat[path].astype(dtype) for path in leaves}


def check_float64(config: Config) -> None:
    """ConfigError for float64 that jax would silently turn into float32."""
    for field, what in (("param_dtype", "parameters"), ("dtype", "computation")):
        if getattr(config, field) == "float64" and not flag("jax_enable_x64"):
            raise ConfigError(
                f"{what} would be float64, which jax truncates to float32 by default; set "
                f"jax_enable_x64 or pass {field}='float32'"
            )
