# SPDX-License-Identifier: Apache-2.0
"""The logical axes on parameters and activations place a model on a mesh; the function stays."""

import itertools

import jax
import pytest
from flax import linen as nn
from helpers import assert_close, bool_mask, clip, mostly_slow, random_params
from tiny import CASES, config_of
from variants import VARIANTS, variant_config

from vivit_jax import Mask, VivitForVideoClassification

RULES = [
    ("batch", "data"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("embed", "fsdp"),
    *((axis, None) for axis in ("kv", "length", "layers", "channels", "classes", "pixels")),
]


@pytest.mark.parametrize(
    ("case", "attention"),
    mostly_slow(
        [
            *itertools.product(["vivit cls", "mae pretraining"], ["xla", "chunked"]),
            ("encoder", "xla"),
            ("self-attention time first", "xla"),
            ("dot product", "xla"),
        ],
        ("mae pretraining", "chunked"),
    ),
)
def test_sharded_forward_equals_one_device(case, attention):
    assert jax.device_count() == 8
    if case in VARIANTS:
        model = VivitForVideoClassification(variant_config(case, attention=attention))
    else:
        model = CASES[case][0](config_of(case, attention=attention))
    config = model.config
    x = clip(config, batch=4)
    mask = {"mask": Mask.from_bool(bool_mask(config, batch=4))} if "mae" in case else {}
    boxed = jax.eval_shape(model.init, jax.random.key(0), x, **mask)
    variables = {"params": random_params(model)}
    alone = jax.jit(model.apply)(variables, x, **mask)

    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=auto)
    spec = nn.get_partition_spec(boxed)
    placed = jax.device_put(variables, nn.logical_to_mesh_sharding(spec, mesh, RULES))
    backbone = placed["params"]["backbone"]
    kernel = backbone.get("spatial", backbone)["layers"]["mlp_in"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
    shards = jax.device_put((x, mask), jax.NamedSharding(mesh, jax.P("data")))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        together = jax.jit(model.apply)(placed, shards[0], **shards[1])
    assert_close(together.logits, alone.logits, "logits")
