# SPDX-License-Identifier: Apache-2.0
"""Batches of augmented clips, read ahead by grain in threads or processes.

Element i of a run is a pure function of (seed, i): epoch i // clips per epoch has its own order of
the examples, a clip's random draws (frames, crop, colours) come from (seed, i), and so does the
clip that takes the place of an unreadable one. So a run resumes from its number of steps alone, and
any number of processes and workers reads the same batches.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vivit_jax.data.cache import VideoCache
from vivit_jax.data.datasets.dataset import Dataset, Example, labels_wanted, read_training_clip
from vivit_jax.data.one_clip import one_clip
from vivit_jax.data.sampling import training_indices
from vivit_jax.data.settings import FEW_CLIPS, AugmentSettings, DataSettings
from vivit_jax.data.transforms.augment import Transform, train_transform
from vivit_jax.errors import UserError, VideoError, counted
from vivit_jax.files import block_cache
from vivit_jax.processes import follow_the_main_process, interrupts_held

# More elements than any run reads, skipped clips included.
_ENDLESS = 2**48
_ATTEMPTS = FEW_CLIPS  # clips that are tried for one element before any is reported


@dataclasses.dataclass(frozen=True)
class ClipShape:
    """The shape of a training clip, [t, h, w, c] = [num_frames, *size, num_channels]."""

    num_frames: int
    size: tuple[int, int]
    num_channels: int = 3


@dataclasses.dataclass(frozen=True)
class ProcessShard:
    """The rows of each batch that this process reads: part `index` of `count` equal parts."""

    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class EpochSampler:
    """A grain source: place in this process's sequence -> (example, number of the element).

    The sequence begins at `first`, for a run that resumes.
    """

    dataset: Dataset
    batch_size: int  # over all processes
    seed: int
    shard: ProcessShard
    first: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in a pass over the examples; the remainder is dropped."""
        return len(self.dataset) // self.batch_size

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> tuple[Example, int]:
        rows = self.batch_size // self.shard.count
        batch, row = divmod(self.first + int(index), rows)
        element = batch * self.batch_size + self.shard.index * rows + row
        epoch, position = divmod(element, self.steps_per_epoch * self.batch_size)
        order = _permutation(len(self.dataset), self.seed, epoch)
        return self.dataset.examples[order[position]], element

    def spare(self, element: int, attempt: int) -> Example:
        """What takes an element's place if its own clip and `attempt` - 1 others are unreadable.

        As many attempts as there are examples try each of them.
        """
        start = int(np.random.default_rng((self.seed, element, 2)).integers(len(self.dataset)))
        return self.dataset.examples[(start + attempt) % len(self.dataset)]


@functools.lru_cache(maxsize=2)  # an epoch and the next, of which clips are read ahead
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    order = np.arange(count, dtype=np.uint32 if count < 2**32 else np.uint64)
    np.random.default_rng((seed, epoch)).shuffle(order)  # as `permutation`, in less memory
    return order


class _Underway:
    """The calls of a function, of which there may be several at once."""

    def __init__(self):
        self._count, self._changed = 0, threading.Condition()

    def call(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The function, whose calls are counted."""

        def counted_call(item: Any) -> Any:
            with self._changed:
                self._count += 1
            try:
                return function(item)
            finally:
                with self._changed:
                    self._count -= 1
                    self._changed.notify_all()

        return counted_call

    def wait(self) -> None:
        """Return once there is none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count)


@dataclasses.dataclass(frozen=True)
class LoadClip:
    """Reads an element's clip, then augments it `repeats` times.

    Returns {"clips": uint8 [repeats, t, h, w, c], "label", "bad"}, where "bad" has the path and the
    message of each clip that could not be read before this one. After _ATTEMPTS of them it returns
    {"bad", "element", "next"}, to go on with `read`.
    """

    settings: DataSettings
    transform: Transform
    shape: ClipShape
    sampler: EpochSampler
    cache: VideoCache

    def __call__(self, item: tuple[Example, int]) -> dict[str, Any]:
        example, element = item
        return self.read(element, 0, example)

    def read(self, element: int, first: int, example: Example | None = None) -> dict[str, Any]:
        """Read an element, whose clip is `example`, or from a spare clip on."""
        bad = []
        for attempt in range(first, first + _ATTEMPTS):
            clip = self.sampler.spare(element, attempt) if example is None else example
            again = (attempt,) if attempt else ()
            rng = np.random.default_rng((self.sampler.seed, element, 1, *again))
            try:
                with one_clip(clip.path):
                    clips = self._augmented(clip, rng, self._frames(clip, rng))
                return {"clips": clips, "label": clip.label, "bad": bad}
            except VideoError as error:
                bad.append((clip.path, str(error)))
            example = None
        return {"bad": bad, "element": element, "next": first + _ATTEMPTS}

    def _augmented(
        self, example: Example, rng: np.random.Generator, frames: UInt8[np.ndarray, "_ _ _ _"]
    ) -> UInt8[np.ndarray, "repeats t h w c"]:
        if frames.shape[-1] != self.shape.num_channels:
            raise VideoError(
                f"{example.path} has {counted(frames.shape[-1], 'channel')}, the model takes "
                f"{self.shape.num_channels}"
            )
        try:
            return np.stack([self.transform(rng, frames) for _ in range(self.settings.repeats)])
        except UserError as error:  # a transform does not know the frames' path
            kind = VideoError if isinstance(error, VideoError) else UserError
            raise kind(f"{example.path}: {error}") from None

    def _frames(self, example: Example, rng: np.random.Generator) -> UInt8[np.ndarray, "t h w c"]:
        sampler, stride, num_frames = (
            self.settings.sampler,
            self.settings.stride,
            self.shape.num_frames,
        )
        video = self.cache.video(example)
        if video is None:
            return read_training_clip(
                example, rng, num_frames=num_frames, stride=stride, sampler=sampler
            )
        return video[training_indices(sampler, len(video), num_frames, stride, rng)]


def _steps(state: dict[str, Any], batch_size: int) -> int:
    """The steps at which a state was taken."""
    if "steps" in state:
        return state["steps"]
    # Until December 2026 each process counted its clips, and the next one replaced a bad one.
    if state["left_out"]:
        raise UserError(
            f"an earlier version saved this run, and {counted(state['left_out'], 'clip')} that it "
            "could not read had moved the order of the others; go on with that version, or start "
            "another run from the model so far (model.start)"
        )
    return state["read"] // (batch_size // state["processes"])


def unshared(batch_size: int, processes: int) -> str:
    """Why so many processes cannot read a batch."""
    return (
        f"train.batch_size {batch_size} is not a multiple of the {processes} processes "
        "that share it; use one that is"
    )


def few_clips(dataset: Dataset, batch_size: int) -> str:
    """Why a data set is too small for a batch."""
    return (
        f"{dataset.source} has {counted(len(dataset), 'clip')}, train.batch_size is {batch_size}; "
        "the clips of a batch are all different: use a smaller batch, or data.repeats"
    )


def _start_worker(index: int, count: int) -> None:
    """Set up one of grain's processes: it ignores Ctrl-C and ends with the main process."""
    follow_the_main_process()


def _collect() -> None:
    gc.collect()


class Batches:
    """Endless batches {"clips": uint8 [b, t, h, w, c], "labels": int32 [b] or [b, heads]}.

    `augment` makes training clips of decoded ones: settings, or the function itself. `b` is this
    process's part of batch_size * repeats; the copies of a clip are neighbours. Another clip, drawn
    at random, replaces a bad one, and `bad` names it; UserError if bad clips are more than
    `settings.max_bad_share` of those read. `state()` and `restore()` are for checkpoints. Close it,
    or use it in a `with` statement, to end grain's threads and processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: DataSettings,
        augment: AugmentSettings | Transform,
        *,
        shape: ClipShape,
        batch_size: int,
        seed: int,
        shard: ProcessShard = ProcessShard(),
        labelled: bool = True,
    ):
        if batch_size % shard.count:
            raise UserError(unshared(batch_size, shard.count))
        if len(dataset) < batch_size:
            raise UserError(few_clips(dataset, batch_size))
        if labelled and not dataset.labels_per_example:
            wanted = labels_wanted(dataset)
            raise UserError(f"{dataset.source} has no labels, which this task needs{wanted}")
        self.sampler = EpochSampler(dataset, batch_size, seed, shard)
        self.bad: dict[str, str] = {}  # path -> reason, of clips that could not be read
        self._steps, self._read, self._left_out, self._in_a_row = 0, 0, 0, 0
        self._settings, self._labelled = settings, labelled
        self._rows = batch_size // shard.count
        self._cache = VideoCache(settings.cache_gib * 2**30)
        block_cache.use(settings.cache_dir, settings.cache_dir_gib)
        transform = augment if callable(augment) else train_transform(augment, shape.size)
        self._load_clip = LoadClip(settings, transform, shape, self.sampler, self._cache)
        self._underway = _Underway()
        self._elements: Any = None  # grain's DatasetIterator, or None
        self._first: list[dict[str, Any]] = []  # the element read while processes started

    def _start(self) -> Any:
        """grain's iterator, from the batch after the last one."""
        import grain.python as grain

        threads, workers = self._settings.threads, self._settings.workers
        # Two batches, over all processes. More hurts: 1200 queued small clips slowed a step of the
        # demo from 30 to 50 ms, most of it waiting.
        ahead = -(-2 * self._rows // max(workers, 1)) + threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        order = dataclasses.replace(self.sampler, first=self._steps * self._rows)
        load = self._load_clip if workers else self._underway.call(self._load_clip)
        elements = grain.MapDataset.source(order).map(load).to_iter_dataset(options)
        if workers:
            from absl import flags

            # grain's processes read flags, which only a program run by absl has parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers)
            elements = elements.mp_prefetch(options, worker_init_fn=_start_worker)
        elif self._settings.cache_gib:
            epoch = self.sampler.steps_per_epoch * self._rows
            # The first `ahead` clips are left to grain.
            self._cache.fill(order[place][0] for place in range(ahead, epoch))
        return iter(elements)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._elements is None:
            with interrupts_held() if self._settings.workers else contextlib.nullcontext():
                self._elements = self._start()
                self._first = [next(self._elements)]  # returns once all processes run
        found: list[dict[str, Any]] = []
        while len(found) < self._rows:
            element = self._first.pop() if self._first else next(self._elements)
            self._count(element)
            while "clips" not in element:
                element = self._load_clip.read(element["element"], element["next"])
                self._count(element)
            found.append(element)
        self._steps += 1
        batch = {"clips": np.concatenate([element["clips"] for element in found])}
        if self._labelled:
            labels = np.array([element["label"] for element in found], np.int32)
            batch["labels"] = np.repeat(labels, self._settings.repeats, axis=0)
        return batch

    def read(self, number: int) -> dict[str, Any]:
        """Reads the clip of one element in this thread, and returns it as `LoadClip` does."""
        return self._load_clip(self.sampler[number])

    def state(self) -> dict[str, Any]:
        """The position in the sequence, as JSON values; valid for any `threads` and `workers`."""
        return {
            "clips": self.sampler.dataset.fingerprint,
            "steps": self._steps,
            "read": self._read,
            "left_out": self._left_out,
            "bad": dict(self.bad),
        }

    def restore(self, *states: dict[str, Any]) -> None:
        """Resume after the batch at which all processes, by their numbers, took their `state()`.

        Now there may be more of them, or fewer.

        Raises UserError for other clips, or another order of them, as the position would be
        meaningless.
        """
        if states[0]["clips"] != self.sampler.dataset.fingerprint:
            raise UserError(
                f"{self.sampler.dataset.source} lists other clips or labels than when the run was "
                "saved, or in another order; restore it, or start another run from the "
                "model so far (model.start)"
            )
        steps = _steps(states[0], self.sampler.batch_size)
        parts = self.sampler.shard.count
        if len(states) == parts:
            states, parts = (states[self.sampler.shard.index],), 1
        self.close()
        self._steps, self._in_a_row = steps, 0
        self._read, self._left_out = (
            sum(state[name] for state in states) // parts for name in ("read", "left_out")
        )
        self.bad = {path: why for state in states for path, why in state["bad"].items()}

    def close(self) -> None:
        """End the threads and processes that read ahead; the next batch starts them again."""
        self._cache.stop()
        self._first = []
        if self._elements is not None:
            self._elements.close()
            self._elements = None
            self._underway.wait()  # grain's threads end what they have begun
            # grain's iterators refer to each other, and complain if they still exist when the
            # interpreter exits. They are collected once, however many there were.
            atexit.unregister(_collect)
            atexit.register(_collect)
        self._cache.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _count(self, element: dict[str, Any]) -> None:
        """Count the clips that were read for an element. UserError if too many of them are bad."""
        for path, why in element["bad"]:
            self._read += 1
            self._left_out += 1
            self._in_a_row += 1
            self.bad[path] = why
            self._check()
        if "clips" in element:
            self._read += 1
            self._in_a_row = 0

    def _check(self) -> None:
        limit, named = self._settings.max_bad_share, "; ".join(list(self.bad.values())[:3])
        if self._read >= FEW_CLIPS and self._left_out > limit * self._read:
            raise UserError(
                f"{self._left_out} of {self._read} clips could not be read, more than "
                f"data.max_bad_share {limit:g}: {named}; repair or remove these files, or raise "
                "data.max_bad_share"
            )
        if self._in_a_row >= max(len(self.sampler.dataset), FEW_CLIPS):
            raise UserError(
                f"{counted(self._in_a_row, 'clip')} in a row could not be read: {named}; repair "
                "or remove these files"
            )
