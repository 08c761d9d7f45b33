# SPDX-License-Identifier: Apache-2.0
"""Video transformers in JAX/Flax: ViViT and VideoMAE.

Letters used for axes everywhere: b batch, t frames, h w pixels, c channels; l tokens (q and k when
query and key tokens differ), n heads, e head dim, d width, f MLP width, p patch pixels, m masked
tokens. Token order is (t, h, w) row-major; pixels are channels-last `b t h w c`.

Public names load on first use, so that `import vivit_jax` and `vivit-jax --help` stay fast.
"""

from importlib import import_module

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "VivitConfig": "config",
    "VideoMAEConfig": "config",
    "PRESETS": "presets",
    "Mask": "masking",
    "tube_mask": "masking",
    "random_mask": "masking",
    "running_cell": "masking",
    "dual_mask": "masking",
    "VivitModel": "models.vivit",
    "VivitForVideoClassification": "models.vivit",
    "VideoMAEModel": "models.videomae",
    "VideoMAEForPreTraining": "models.videomae",
    "VideoMAEForVideoClassification": "models.videomae",
    "VideoClassifier": "classifier",
    "from_pretrained": "pretrained",
    "save_pretrained": "pretrained",
    "map_attention": "attention_maps",
    "extract_features": "features",
    "reconstruct": "reconstruction",
    "export_model": "export",
    "init_from_image_model": "image_init",
    "init_from_pretraining": "handover",
    "init_from_video_model": "video_init",
    "gather_classes": "heads",
    "read_label_map": "heads",
    "VideoProcessor": "data.processor",
    "read_video": "data.decode",
    "probe_video": "data.decode",
    "read_video_pyav": "data.decode",
    "sample_frame_indices": "data.sampling",
    "UserError": "errors",
    "ConfigError": "errors",
    "CheckpointError": "errors",
    "VideoError": "errors",
    "MissingExtra": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vivit_jax' has no attribute {name!r}")
    value = getattr(import_module(f"vivit_jax.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})
