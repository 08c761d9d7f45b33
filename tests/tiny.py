# SPDX-License-Identifier: Apache-2.0
"""The tiny models of the tests, one of each family, and the cases made of them."""

import vivit_jax
from vivit_jax.models.videomae import (
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)
from vivit_jax.models.vivit import VivitForVideoClassification, VivitModel

# Odd on purpose: frames, height and width all differ, and so do token counts and head counts.
VIVIT = dict(
    image_size=(24, 16),
    num_frames=6,
    tubelet_size=(2, 8, 8),
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    num_labels=5,
)
VIDEOMAE = dict(
    image_size=(24, 16),
    patch_size=8,
    num_frames=6,
    tubelet_size=2,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    num_labels=5,
    decoder_hidden_size=24,
    decoder_intermediate_size=40,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
)
# An image ViT of the same widths, from which a video model starts.
IMAGE = dict(
    image_size=24,
    patch_size=8,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
)

# Smaller: 8 tokens, for what trains or runs many times.
SMALL = dict(
    image_size=16,
    num_frames=4,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
)
SMALL_VIVIT = SMALL | dict(tubelet_size=(2, 8, 8))
SMALL_DECODER = dict(
    decoder_hidden_size=8,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=16,
)
SMALL_VIDEOMAE = SMALL | SMALL_DECODER | dict(tubelet_size=2, patch_size=8)

# name -> (our class, transformers' class name, our configuration)
CASES = {
    "vivit base": (VivitModel, "VivitModel", VIVIT),
    "vivit base relu pooler": (
        VivitModel,
        "VivitModel",
        VIVIT | dict(pooler_output_size=20, pooler_act="relu"),
    ),
    "vivit cls": (VivitForVideoClassification, "VivitForVideoClassification", VIVIT),
    "vivit cls no bias": (
        VivitForVideoClassification,
        "VivitForVideoClassification",
        VIVIT | dict(qkv_bias=False),
    ),
    "mae base": (VideoMAEModel, "VideoMAEModel", VIDEOMAE),
    "mae base norm": (VideoMAEModel, "VideoMAEModel", VIDEOMAE | dict(use_mean_pooling=False)),
    "mae cls": (VideoMAEForVideoClassification, "VideoMAEForVideoClassification", VIDEOMAE),
    "mae cls token 0": (
        VideoMAEForVideoClassification,
        "VideoMAEForVideoClassification",
        VIDEOMAE | dict(use_mean_pooling=False),
    ),
    "mae pretraining": (
        VideoMAEForPreTraining,
        "VideoMAEForPreTraining",
        VIDEOMAE | dict(use_mean_pooling=False),
    ),
    "mae pretraining raw pixels": (
        VideoMAEForPreTraining,
        "VideoMAEForPreTraining",
        VIDEOMAE | dict(norm_pix_loss=False, use_mean_pooling=False),
    ),
    "mae pretraining no bias": (
        VideoMAEForPreTraining,
        "VideoMAEForPreTraining",
        VIDEOMAE | dict(qkv_bias=False),
    ),
}


def config_of(case: str, **changes):
    cls, _, values = CASES[case]
    family = vivit_jax.VivitConfig if "vivit" in case else vivit_jax.VideoMAEConfig
    return family(**{**values, **changes})
