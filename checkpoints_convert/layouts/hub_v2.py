# SPDX-License-Identifier: Apache-2.0
"""config.json of VideoMAE V2 on the hub (OpenGVLab/VideoMAEv2-Base and its siblings).

Its model_type is VideoMAEv2_Base, _Large, _Huge, _giant or similar, and `model_config` holds the
arguments of the authors' class VisionTransformer. The weights are the authors', under `model.`; the
code in these repositories, which `auto_map` names, is not run.
"""

import re
from collections.abc import Mapping
from typing import Any

from vivit_jax.config import VideoMAEConfig
from vivit_jax.errors import ConfigError

SECTION = "model_config"
_MODEL_TYPE = re.compile(r"videomae_?v2\w*", re.IGNORECASE)
_EPS = 1e-6
# The authors' arguments: our field for each, and its default there.
_FIELDS = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("num_channels", 3),
    "num_frames": ("num_frames", 16),
    "tubelet_size": ("tubelet_size", 2),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "qkv_bias": ("qkv_bias", False),
    "drop_rate": ("hidden_dropout_prob", 0.0),
    "attn_drop_rate": ("attention_probs_dropout_prob", 0.0),
    "drop_path_rate": ("drop_path_rate", 0.0),
    "head_drop_rate": ("head_dropout", 0.0),
    "init_values": ("layer_scale_init", 0.0),
    "use_mean_pooling": ("use_mean_pooling", True),
    "cos_attn": ("cosine_attention", False),
    "layer_norm_eps": ("layer_norm_eps", _EPS),
}
# Values of other arguments that do not change the function.
_ONLY = {
    "use_learnable_pos_emb": (False, None),
    "norm_layer": ("nn.LayerNorm", "LayerNorm", "torch.nn.LayerNorm", None),
}
_WITHOUT_EFFECT = ("with_cp", "init_scale")  # recomputation in training; fresh classifiers
# Keys of the file for the form itself and the repository's code.
_REPLACED = (SECTION, "model_type", "architectures", "auto_map", "id2label", "label2id")


def is_hub_form(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this form."""
    model_type = values.get("model_type")
    named = isinstance(model_type, str) and _MODEL_TYPE.fullmatch(model_type)
    return bool(named) and SECTION in values


def read_hub_form(values: Mapping[str, Any]) -> tuple[VideoMAEConfig, str]:
    """The config, and the head: a classifier where `num_classes` is positive.

    Other keys of the file are in the config's `extra`. Raises ConfigError for an argument that
    makes the authors' code compute something else.
    """
    section = values[SECTION]
    if not isinstance(section, Mapping):
        raise ConfigError(f"{SECTION} is a {type(section).__name__}, expected a JSON object")
    given = dict(section)
    fields = {ours: given.pop(theirs, default) for theirs, (ours, default) in _FIELDS.items()}
    # There is no layer scale unless its initial value is positive.
    fields["layer_scale_init"] = fields["layer_scale_init"] or 0.0
    eps = fields["layer_norm_eps"]
    fields |= {"hidden_act": "gelu", "fc_norm_eps": eps, "decoder_norm_eps": eps}
    fields["intermediate_size"] = _mlp_width(fields["hidden_size"], given.pop("mlp_ratio", 4))
    wrong = {k: v for k, v in given.items() if k in _ONLY and v not in _ONLY[k]}
    scale = given.pop("qk_scale", None)
    if scale is not None and not _is_usual(scale, fields):
        wrong["qk_scale"] = scale
    if wrong:
        listed = ", ".join(f"{SECTION}.{name}={value!r}" for name, value in wrong.items())
        raise ConfigError(f"{listed}: VideoMAE here has no such option; no published model uses it")
    classes = given.pop("num_classes", 0)
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise ConfigError(f"{SECTION}.num_classes is {classes!r}, expected 0 or more classes")
    if classes:
        fields |= {"num_labels": classes, "id2label": values.get("id2label")}
    rest = {k: v for k, v in values.items() if k not in _REPLACED}
    unknown = {k: v for k, v in given.items() if k not in _ONLY and k not in _WITHOUT_EFFECT}
    if unknown:
        rest[SECTION] = unknown
    config = VideoMAEConfig.from_dict(rest | fields, warn=False)
    return config, "classification" if classes else "none"


def _mlp_width(width: Any, ratio: Any) -> int:
    try:
        return int(width * ratio)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f"{SECTION}.embed_dim is {width!r} and mlp_ratio {ratio!r}, expected two numbers"
        ) from None


def _is_usual(scale: Any, fields: Mapping[str, Any]) -> bool:
    """Whether a scale is the default one."""
    try:
        usual = (fields["hidden_size"] // fields["num_attention_heads"]) ** -0.5
        return abs(scale - usual) <= 1e-6 * usual
    except (TypeError, ZeroDivisionError):
        return False
