# SPDX-License-Identifier: Apache-2.0
"""Groups of flags that several commands share."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Literal

from vivit_jax.data.datasets.dataset import Dataset, read_dataset
from vivit_jax.data.datasets.list_rows import NoSuchSplit
from vivit_jax.errors import UserError, quoted
from vivit_jax.files.addresses import Place
from vivit_jax.train.processes.join import chosen, connected, detected
from vivit_jax.train.processes.peers import Patience

_NO_SPLIT = "\0"  # what no split is called
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which frames of a video make up its clip.

    Attributes:
        stride: Frames between sampled frames. Default: the model's, as it was trained, less for a
            video that is too short for it.
        start: Where the clip starts: begin, center, end, or the index of its first frame.
        pad: How to fill up a video with fewer frames than the model takes.
    """

    stride: int | None = None
    start: str = "center"
    pad: Literal["error", "repeat_last", "loop"] = "error"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How a data set is listed, as in training.

    Attributes:
        root: Directory of the relative paths of a list. Default: the list's own.
        frame_name: Names of images in folders of frames, as a Python format of their number.
        first_frame: Number of a folder's first image, if the list does not give it.
        split: What to read of a list or directory with several splits, such as test.
        class_names: A file that names the classes of a list, in their order.
    """

    root: str | None = None
    frame_name: str = "img_{:05}.jpg"
    first_frame: int = 1
    split: str | None = None
    class_names: str | None = None

    def listed(self, source: str | Place, labels: int | None) -> Dataset:
        """The data set with so many labels for each clip. Raises UserError."""
        if self.first_frame < 0:
            raise UserError(f"--first-frame must be at least 0, got {self.first_frame}")
        self.check_split(source, labels)
        return self._read(source, labels, self.split)

    def check_split(self, source: str | Place, labels: int | None = None) -> None:
        """UserError for a split of data that have none, which it would not change."""
        if self.split is None:
            return
        with contextlib.suppress(NoSuchSplit):
            self._read(source, labels, _NO_SPLIT)
            raise UserError(
                f"{source} has no splits: --split {quoted(self.split)} chooses nothing; leave it "
                "out, or name the clips of that split"
            )

    def _read(self, source: str | Place, labels: int | None, split: str | None) -> Dataset:
        return read_dataset(
            source,
            self.root,
            labels=labels,
            frame_name=self.frame_name,
            first_frame=self.first_frame,
            split=split,
            class_names=self.class_names,
        )


def validation_share(text: str) -> float | None:
    """The share that --validation holds out, 0 for none, or None for a place of clips.

    Raises UserError for a number that is no share.
    """
    if text.lower() == "none":
        return 0.0
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 <= share < 1:
        raise UserError(
            f"--validation is {quoted(text)}; expected a share of each class, at least 0 and less "
            "than 1, such as 0.2, a list or directory of held-out clips, or none"
        )
    return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """The picture that a command writes.

    Attributes:
        out: File to write: .png has a column for each frame, at most eight evenly spaced ones; .mp4
            and .gif move and show every frame.
        overwrite: Replace files that exist.
        json: Print a JSON object instead of text.
    """

    out: Path
    overwrite: bool = False
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """The processes that work on one command together.

    Attributes:
        coordinator: Address of process 0, host:port, if there are several.
        processes: How many processes there are; auto: all of the TPU pod, SLURM, Open MPI or
            Kubernetes job that this one belongs to, which gives the other flags too.
        process: Number of this process, from 0.
        coordinator_timeout: Seconds to wait until all processes have come.
        hang_timeout: Seconds that a process may stay behind the others before all end.
    """

    coordinator: str | None = None
    processes: int | Literal["auto"] = 1
    process: int = 0
    coordinator_timeout: float = 300.0
    hang_timeout: float = 900.0

    def connected(self) -> contextlib.AbstractContextManager[None]:
        """Work together with the other processes in a block. Raises UserError."""
        for name in ("coordinator_timeout", "hang_timeout"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {value:g}; expected seconds")
        if self.processes == "auto":
            if self.coordinator is not None or self.process:
                raise UserError(
                    "--processes auto asks the cluster; leave out --coordinator and --process"
                )
            member = detected(self.coordinator_timeout)
        else:
            member = chosen(self.coordinator, self.processes, self.process)
        patience = Patience(meeting=self.coordinator_timeout, hang=self.hang_timeout)
        return connected(member, patience)


READ, ONE_PROCESS = ReadOptions(), ProcessOptions()  # defaults
