# SPDX-License-Identifier: Apache-2.0
"""How an evaluation sees a video, as JSON values and in the words of every report and card."""

from typing import Any

from vivit_jax.errors import counted
from vivit_jax.recipes.recipe import EvalSettings


def protocol_values(config, settings: EvalSettings) -> dict[str, Any]:
    """How many views a video has, and of what, as JSON values."""
    return {
        "clips": settings.clips,
        "crops": settings.crops,
        "frames": config.num_frames,
        "stride": settings.stride,
        "sampler": settings.sampler,
        "average": settings.average,
    }


def protocol_text(config, settings: EvalSettings) -> str:
    """The same in words, with the size of frames, and whether the stride is the model's."""
    height, width = config.frame_size
    if settings.sampler == "segments":
        source = ""
    elif settings.stride != config.frame_stride:
        source = f" (the model's: {config.frame_stride})"
    elif config.has_own_stride:
        source = " (as the model was trained)"
    else:
        source = f" (usual for {config.title})"
    return (
        f"{counted(settings.clips, 'clip')} x {counted(settings.crops, 'crop')} of "
        f"{_frames_text(config, settings)}{source}, sampler {settings.sampler}, shorter side "
        f"{settings.resize}, crop {height}x{width}, mean of {settings.average}"
    )


def _frames_text(config, settings: EvalSettings) -> str:
    """The frames of a view in words."""
    if settings.sampler == "segments":
        return f"{counted(config.num_frames, 'frame')}, one from each of as many segments"
    return f"{counted(config.num_frames, 'frame')}, {settings.stride} apart"
