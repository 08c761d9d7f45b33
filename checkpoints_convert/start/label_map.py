# SPDX-License-Identifier: Apache-2.0
"""Cuts classifiers of fewer classes out of larger ones, as VideoMAE V2 does with Kinetics-710."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.core import meta

from vivit_jax import param_tree
from vivit_jax.config import Config
from vivit_jax.errors import UserError
from vivit_jax.files.json_files import read_json


def read_label_map(path: str | Path) -> tuple[int, ...]:
    """Read a label map: a JSON list whose entry k is the larger model's class for class k.

    The authors of VideoMAE V2 publish such files for Kinetics-400, 600 and 700 out of 710
    (misc/label_710to400.json). Raises UserError for anything else, OSError without a file.
    """
    values = read_json(path, hint="expected a label map, a JSON list of class indices")
    return _checked(values, str(path))


def gather_classes(
    config: Config, params: Mapping[str, Any], label_map: Sequence[int]
) -> tuple[Config, dict[str, Any]]:
    """A classifier of the classes that `label_map` lists, in its order: (config, params).

    `params` is the parameter tree of a classification model, nested or flat ('/'-joined); the
    columns of `head/kernel` [d, classes] and `head/bias` [classes] are gathered, everything else is
    passed on. Class names follow their classes. Raises UserError for a class that the model does
    not have, and for a model without a classifier or with several.
    """
    label_map = _checked(label_map, "label_map")
    if config.class_splits is not None:
        raise UserError(
            f"class_splits is {config.class_splits}: a label map lists classes of one classifier; "
            "gather each head separately"
        )
    flat = param_tree.flatten(meta.unbox(params))
    if "head/kernel" not in flat or flat["head/kernel"].shape[-1] != config.num_labels:
        found = flat["head/kernel"].shape if "head/kernel" in flat else "none"
        raise UserError(
            f"params need a classifier of num_labels={config.num_labels} classes under head/, "
            f"got {found}"
        )
    if max(label_map) >= config.num_labels:
        raise UserError(
            f"label_map lists class {max(label_map)}, the classifier has {config.num_labels} "
            f"(0 to {config.num_labels - 1}); the map belongs to another model"
        )
    rows = np.asarray(label_map)
    gathered = {path: flat[path][..., rows] for path in ("head/kernel", "head/bias")}
    names = config.id2label and tuple(config.labels[i] for i in label_map)
    config = dataclasses.replace(config, num_labels=len(label_map), id2label=names)
    nested = any(isinstance(value, Mapping) for value in params.values())
    flat |= gathered
    return config, param_tree.unflatten(flat) if nested else flat


def _checked(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, np.ndarray | jax.Array) and values.ndim == 1:
        values = values.tolist()
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values)
    if not good or not all(
        isinstance(v, int | np.integer) and not isinstance(v, bool) and v >= 0 for v in values
    ):
        raise UserError(
            f"{name} must be a list of class indices, entry k the larger model's class for class "
            f"k, got {str(values)[:80]}"
        )
    return tuple(int(v) for v in values)
