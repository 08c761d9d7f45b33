# SPDX-License-Identifier: Apache-2.0
"""Where clips come from and what happens to them in training, as frozen dataclasses."""

import dataclasses
from typing import Literal

Sampler = Literal["hold", "linspace", "loop", "segments"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where clips come from and which frames are sampled; see `vivit_jax.data.datasets.dataset`."""

    train: str = ""  # a list file, a directory with a folder per class, or one of clips
    validation: str | None = None
    root: str | None = None  # of relative paths in lists; None: the list's own directory
    # Training clips; see `vivit_jax.data.sampling`. "hold": exact stride, short videos hold the
    # last frame (VideoMAE pre-training); "linspace": evenly spread over num_frames * stride frames
    # (VideoMAE fine-tuning); "loop": exact stride, short videos start again (ViViT); "segments":
    # one frame of each of num_frames equal parts (TSN, SSv2).
    sampler: Sampler = "linspace"
    stride: int = 4
    repeats: int = 1  # differently augmented copies of each clip that is read, all in one step
    threads: int = 2  # that read clips, in each process of the pipeline
    workers: int = 0  # processes that read clips; 0: none beside this one
    cache_gib: float = 0.0  # for whole decoded videos, kept by each process while there is room
    frame_name: str = "img_{:05}.jpg"  # of frame folders whose list says how many there are
    first_frame: int = 1  # the number of their first frame
    max_bad_share: float = 0.05  # of the clips read so far (once there are 20), then the run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """What happens to a training clip, alike in all of its frames."""

    # Shortest side before anything else, None: as it is read. It is for the frames of the recipe's
    # model; where `model.start` has others it changes with their side, unless it is `given`.
    resize: int | None = None
    crop: Literal["multi_scale", "random_resized", "random", "center"] = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # area, for random_resized
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, for random_resized
    jitter_scale: tuple[float, float] | None = None  # of height and of width, before the crop
    flip: float = 0.5  # probability
    # "rand-m7-n4-mstd0.5-inc1" as in timm, or "scenic-m20-n2".
    rand_augment: str | None = None
    colour: float = 0.0  # probability of scenic's colour jitter
    erase: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of its Beta distribution
    cutmix: float = 0.0
    mix_switch: float = 0.5  # probability of cutmix where both are on
    mix_prob: float = 1.0
    mix_group: int | None = None  # clips that share one lambda: a paper's batch per device
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed at all."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)
