# SPDX-License-Identifier: Apache-2.0
"""Settings of the training data and its augmentation, as frozen dataclasses."""

import dataclasses
from typing import Literal

from vivit_jax.config_base import Sampler

MOST_CLASSES = 1_000_000  # a larger number in a list is taken for a mistake
MOST_READERS = 1024  # threads of a process, or processes; each holds clips
FEW_CLIPS = 20  # the share of unreadable clips is judged from this many on


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where clips come from and which frames are sampled; see `vivit_jax.data.datasets.dataset`."""

    train: str = ""  # a list file, a directory with a folder per class, or a directory of clips
    validation: str | None = None
    # Share of each class of `train` to hold out for validation instead, drawn by train.seed; see
    # `vivit_jax.data.datasets.hold_out`.
    hold_out: float | None = None
    root: str | None = None  # base of relative paths in lists; None: the list's own directory
    # The rows of a list with several splits; a split's usual other names will do, and "test" where
    # there is no "validation".
    train_split: str = "train"
    validation_split: str = "validation"
    class_names: str | None = None  # a file that names the classes of a list, in order
    # How training clips are sampled; see `vivit_jax.data.sampling`. "hold": exact stride, short
    # videos hold their last frame (VideoMAE pre-training); "linspace": evenly spread over
    # num_frames * stride frames (VideoMAE fine-tuning); "loop": exact stride, short videos start
    # again (ViViT); "segments": one frame from each of num_frames equal parts (TSN, SSv2).
    sampler: Sampler = "linspace"
    stride: int = 4
    repeats: int = 1  # differently augmented copies of each clip, all in one step
    threads: int = 2  # reader threads in each process of the pipeline
    workers: int = 0  # reader processes; 0: read in this process
    cache_gib: float = 0.0  # room for whole decoded videos, in each process
    cache_dir: str | None = None  # a directory here that keeps what is read of storage
    cache_dir_gib: float = 20.0  # its size
    frame_name: str = "img_{:05}.jpg"  # image names in frame folders whose list gives a count
    first_frame: int = 1  # number of the first image in such a folder
    max_bad_share: float = 0.05  # share of unreadable clips, after the first 20, that stops the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Augmentation of a training clip, the same for all of its frames.

    `vivit_jax.data.transforms.augment` computes the fields up to `rand_augment` on the host,
    `vivit_jax.train.augment_on_device` the rest on the device; `vivit_jax.recipes.checks` has the
    range of each.
    """

    # Shortest side after a first resize; None: no resize. It suits the frame size of the recipe's
    # model and scales with that of `model.start`, unless it is `given`.
    resize: int | None = None
    crop: Literal["multi_scale", "random_resized", "random", "center"] = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the area, for random_resized
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, for random_resized
    jitter_scale: tuple[float, float] | None = None  # factors of height and width before the crop
    flip: float = 0.5  # probability
    # "rand-m7-n4-mstd0.5-inc1" as in timm, or "scenic-m20-n2".
    rand_augment: str | None = None
    colour: float = 0.0  # probability of scenic's colour jitter
    erase: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of its Beta distribution
    cutmix: float = 0.0  # alpha of its Beta distribution
    mix_switch: float = 0.5  # probability of cutmix if both are on
    mix_prob: float = 1.0  # probability of mixing at all
    mix_group: int | None = None  # clips that share one lambda: a paper's batch per device
    smoothing: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed at all."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)
