# SPDX-License-Identifier: Apache-2.0
"""The parameter trees that checkpoints and other people's scripts depend on.

A leaf is [dtype, axis=size, ...]; axes without a logical name are `_`. After a wanted change,
`PYTHONPATH=tests:tests/parity python tests/models/test_parameter_tree.py` writes the files anew.
"""

import json
from pathlib import Path

import jax
import pytest
from flax import linen as nn
from helpers import clip
from tiny import CASES, config_of
from variants import VARIANTS, variant_config

from vivit_jax import Mask, VivitForVideoClassification, param_tree

GOLDENS = Path(__file__).parent.parent / "goldens"
V2 = dict(cosine_attention=True, layer_scale_init=0.5)
TREES = {
    "vivit_model": ("vivit base", {}),
    "vivit_classifier": ("vivit cls", {}),
    "vivit_classifier_loop": ("vivit cls", dict(scan_layers=False)),
    "vivit_factorised_encoder": ("encoder", {}),
    "vivit_factorised_encoder_mean": ("encoder mean", {}),
    "vivit_factorised_self_attention": ("self-attention time first", {}),
    "vivit_factorised_dot_product": ("dot product", {}),
    "videomae_model": ("mae base norm", {}),
    "videomae_classifier": ("mae cls", {}),
    "videomae_attentive": ("mae cls", dict(attentive_heads=3)),
    "videomae_pretraining": ("mae pretraining", {}),
    "videomae_v2_options": ("mae pretraining", V2),
}


def parameter_tree(case, changes):
    if case in VARIANTS:
        cls = VivitForVideoClassification
        config = variant_config(case, **changes)
    else:
        cls, config = CASES[case][0], config_of(case, **changes)
    model, x = cls(config), clip(config, batch=1)
    inputs = {}
    if "pretraining" in case:
        import numpy as np

        inputs["mask"] = Mask.from_bool(np.arange(config.num_tokens)[None] % 2 == 0)
    boxed = jax.eval_shape(model.init, jax.random.key(0), x, **inputs)["params"]
    axes = param_tree.flatten(nn.get_partition_spec(boxed))
    leaves = param_tree.flatten(nn.unbox(boxed))
    assert axes.keys() == leaves.keys()
    return {
        path: [
            str(leaf.dtype),
            *(f"{axis or '_'}={size}" for axis, size in zip(axes[path], leaf.shape, strict=True)),
        ]
        for path, leaf in sorted(leaves.items())
    }


@pytest.mark.parametrize("name", TREES)
def test_parameter_tree(name):
    assert parameter_tree(*TREES[name]) == json.loads((GOLDENS / f"{name}.json").read_text())


def write_goldens():
    GOLDENS.mkdir(exist_ok=True)
    for name, (case, changes) in TREES.items():
        tree = parameter_tree(case, changes)
        rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in tree.items())
        (GOLDENS / f"{name}.json").write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    write_goldens()
