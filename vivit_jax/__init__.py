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
    "VivitConfig": "vivit_jax.config",
    "VideoMAEConfig": "vivit_jax.config",
    "PRESETS": "vivit_jax.presets",
    "Mask": "vivit_jax.masking",
    "tube_mask": "vivit_jax.masking",
    "random_mask": "vivit_jax.masking",
    "running_cell": "vivit_jax.masking",
    "dual_mask": "vivit_jax.masking",
    "VivitModel": "vivit_jax.models.vivit",
    "VivitForVideoClassification": "vivit_jax.models.vivit",
    "VideoMAEModel": "vivit_jax.models.videomae",
    "VideoMAEForPreTraining": "vivit_jax.models.videomae",
    "VideoMAEForVideoClassification": "vivit_jax.models.videomae",
    "VideoClassifier": "vivit_jax.inference.classifier",
    "from_pretrained": "checkpoints_convert.pretrained",
    "save_pretrained": "checkpoints_convert.pretrained",
    "map_attention": "vivit_jax.inference.attention_maps",
    "extract_features": "vivit_jax.inference.features",
    "reconstruct": "vivit_jax.inference.reconstruction",
    "export_model": "vivit_jax.inference.export",
    "init_from_image_model": "checkpoints_convert.start.from_image",
    "init_from_pretraining": "checkpoints_convert.start.from_pretraining",
    "init_from_video_model": "checkpoints_convert.start.from_video",
    "gather_classes": "checkpoints_convert.start.label_map",
    "read_label_map": "checkpoints_convert.start.label_map",
    "VideoProcessor": "vivit_jax.data.transforms.processor",
    "read_video": "vivit_jax.data.video.decode",
    "probe_video": "vivit_jax.data.video.decode",
    "read_video_pyav": "vivit_jax.data.video.decode",
    "sample_frame_indices": "vivit_jax.data.sampling",
    "UserError": "vivit_jax.errors",
    "ConfigError": "vivit_jax.errors",
    "CheckpointError": "vivit_jax.errors",
    "VideoError": "vivit_jax.errors",
    "MissingExtra": "vivit_jax.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vivit_jax' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_PUBLIC})
