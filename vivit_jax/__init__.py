# SPDX-License-Identifier: Apache-2.0
"""Video transformers in JAX/Flax: ViViT and VideoMAE.

Letters used for axes everywhere: b batch, t frames, h w pixels, c channels; l tokens (q and k when
query and key tokens differ), n heads, e head dim, d width, f MLP width, p patch pixels, m masked
tokens. Token order is (t, h, w) row-major; pixels are channels-last `b t h w c`.

Each room imports from those to its right only: `cli`; `inference`, `benchmark`; `train`;
`checkpoints_convert`; `models`, `recipes`; `layers`, `data`; `files` and the modules beside this
one, which hold configs, presets, outputs and masks.

Public names load on first use, so that `import vivit_jax` and `vivit-jax --help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vivit_jax.version import __version__  # noqa: F401

if TYPE_CHECKING:  # for editors and type checkers, which do not run __getattr__
    from checkpoints_convert.pretrained import from_pretrained, save_pretrained
    from checkpoints_convert.start.from_image import init_from_image_model
    from checkpoints_convert.start.from_pretraining import init_from_pretraining
    from checkpoints_convert.start.from_video import init_from_video_model
    from checkpoints_convert.start.label_map import gather_classes, read_label_map
    from vivit_jax.config import VideoMAEConfig, VivitConfig
    from vivit_jax.data.sampling import sample_frame_indices
    from vivit_jax.data.transforms.processor import VideoProcessor
    from vivit_jax.data.video.decode import read_video_pyav
    from vivit_jax.data.video.sources import probe_video, read_video
    from vivit_jax.errors import CheckpointError, ConfigError, MissingExtra, UserError, VideoError
    from vivit_jax.inference.attention_maps import map_attention
    from vivit_jax.inference.classifier import VideoClassifier
    from vivit_jax.inference.export import export_model
    from vivit_jax.inference.features import extract_features
    from vivit_jax.inference.reconstruction import reconstruct
    from vivit_jax.masking import Mask, dual_mask, random_mask, running_cell, tube_mask
    from vivit_jax.models.nnx_bridge import from_nnx, to_nnx
    from vivit_jax.models.videomae import (
        VideoMAEForPreTraining,
        VideoMAEForVideoClassification,
        VideoMAEModel,
    )
    from vivit_jax.models.vivit import VivitForVideoClassification, VivitModel
    from vivit_jax.presets import PRESETS

# The module of each public name. tests/unit/test_public_names.py compares all three lists.
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
    "to_nnx": "vivit_jax.models.nnx_bridge",
    "from_nnx": "vivit_jax.models.nnx_bridge",
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
    "read_video": "vivit_jax.data.video.sources",
    "probe_video": "vivit_jax.data.video.sources",
    "read_video_pyav": "vivit_jax.data.video.decode",
    "sample_frame_indices": "vivit_jax.data.sampling",
    "UserError": "vivit_jax.errors",
    "ConfigError": "vivit_jax.errors",
    "CheckpointError": "vivit_jax.errors",
    "VideoError": "vivit_jax.errors",
    "MissingExtra": "vivit_jax.errors",
}
__all__ = [
    "CheckpointError",
    "ConfigError",
    "Mask",
    "MissingExtra",
    "PRESETS",
    "UserError",
    "VideoClassifier",
    "VideoError",
    "VideoMAEConfig",
    "VideoMAEForPreTraining",
    "VideoMAEForVideoClassification",
    "VideoMAEModel",
    "VideoProcessor",
    "VivitConfig",
    "VivitForVideoClassification",
    "VivitModel",
    "dual_mask",
    "export_model",
    "extract_features",
    "from_nnx",
    "from_pretrained",
    "gather_classes",
    "init_from_image_model",
    "init_from_pretraining",
    "init_from_video_model",
    "map_attention",
    "probe_video",
    "random_mask",
    "read_label_map",
    "read_video",
    "read_video_pyav",
    "reconstruct",
    "running_cell",
    "sample_frame_indices",
    "save_pretrained",
    "to_nnx",
    "tube_mask",
]


if not TYPE_CHECKING:  # with it, type checkers would take any name for a public one

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'vivit_jax' has no attribute {name!r}")
        value = getattr(import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
