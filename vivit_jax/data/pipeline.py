# SPDX-License-Identifier: Apache-2.0
"""Batches of augmented clips: grain reads ahead in threads or processes, the order is a function.

Element i of a run is a pure function of (seed, i): epoch i // clips per epoch takes the examples in
an order of its own, and what is drawn for a clip (its frames, crops, colours) is drawn from (seed,
i). So a run that stopped goes on with nothing but the place in that sequence, and any number of
processes and workers reads the same batches.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from vivit_jax.data.datasets.dataset import Dataset, Example, read_training_clip, read_whole
from vivit_jax.data.one_clip import one_clip
from vivit_jax.data.sampling import training_indices
from vivit_jax.data.settings import AugmentSettings, DataSettings
from vivit_jax.data.transforms.augment import train_transform
from vivit_jax.errors import UserError, VideoError
from vivit_jax.processes import follow_the_main_process, interrupts_held

# Elements there may be, skipped clips included: more than any run reads.
_ENDLESS = 2**48
# Before so many clips were read, a share of bad ones says little.
_FEW = 20


@dataclasses.dataclass(frozen=True)
class ProcessShard:
    """Which rows of each batch this process reads: part `index` of `count` equal parts."""

    index: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class EpochSampler:
    """A source for grain: place in this process's sequence -> (example, number of the element).

    The sequence begins at `first`, for a run that goes on.
    """

    dataset: Dataset
    batch_size: int  # of all processes
    seed: int
    shard: ProcessShard
    first: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in a pass over the examples; what is left sits the epoch out."""
        return len(self.dataset) // self.batch_size

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, place: int) -> tuple[Example, int]:
        rows = self.batch_size // self.shard.count
        batch, row = divmod(self.first + int(place), rows)
        element = batch * self.batch_size + self.shard.index * rows + row
        epoch, position = divmod(element, self.steps_per_epoch * self.batch_size)
        order = _permutation(len(self.dataset), self.seed, epoch)
        return self.dataset.examples[order[position]], element


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


class Cache:
    """Whole decoded videos, kept while there is room for `room` bytes; each process has its own.

    A video with frames that cannot be decoded is not kept: whether a clip is refused for them
    depends on which frames it has.
    """

    def __init__(self, room: float):
        self.room, self._whole_room = room, room
        self._videos: dict[Example, np.ndarray | None] = {}
        self._underway: set[Example] = set()
        self._changed = threading.Condition()
        self._filler: threading.Thread | None = None
        self._stopped = threading.Event()

    def __reduce__(self):
        return Cache, (self._whole_room,)

    def video(self, example: Example) -> np.ndarray | None:
        """All frames of an example; None where there is no room, or not all can be read."""
        with self._changed:
            self._changed.wait_for(lambda: example not in self._underway)
            if example in self._videos or self.room <= 0:
                return self._videos.get(example)
            self._underway.add(example)
        video = None
        try:
            # The clip that is wanted may lie before what is damaged.
            with contextlib.suppress(VideoError), one_clip(example.path):
                video = read_whole(example)
        finally:
            with self._changed:
                # What a video takes is known once it is decoded: the last one may not fit quite.
                self.room -= 0 if video is None else video.nbytes
                self._videos[example] = video
                self._underway.discard(example)
                self._changed.notify_all()
        return video

    def fill(self, examples: Iterable[Example]) -> None:
        """Decode videos beside what else is done, until there is no room or `stop` is called.

        So the first pass over the clips, which has to decode them, gets a start while the step is
        compiled.
        """

        def run():
            for example in examples:
                if self._stopped.is_set() or self.room <= 0:
                    return
                if example not in self._underway:
                    self.video(example)

        self._stopped.clear()
        self._filler = threading.Thread(target=run, name="decode ahead", daemon=True)
        self._filler.start()

    def clear(self) -> None:
        """Forget all videos; nothing may be reading."""
        self.room = self._whole_room
        self._videos.clear()

    def stop(self) -> None:
        """End `fill`, after the video that it is at."""
        if self._filler is not None:
            self._stopped.set()
            self._filler.join()
            self._filler = None


@dataclasses.dataclass(frozen=True)
class LoadClip:
    """What is done with an element: read the example's clip, then augment it, `repeats` times.

    Returns {"clips": uint8 [repeats, t, h, w, c], "label"}, or {"bad": message, "path"} for a file
    that cannot be read.
    """

    settings: DataSettings
    transform: Callable[[np.random.Generator, np.ndarray], np.ndarray]
    num_frames: int
    num_channels: int
    seed: int
    cache: Cache

    def __call__(self, item: tuple[Example, int]) -> dict[str, Any]:
        example, element = item
        rng = np.random.default_rng((self.seed, element, 1))
        try:
            with one_clip(example.path):
                frames = self._frames(example, rng)
                return {"clips": self._augmented(example, rng, frames), "label": example.label}
        except VideoError as error:
            return {"bad": str(error), "path": example.path}

    def _augmented(
        self, example: Example, rng: np.random.Generator, frames: np.ndarray
    ) -> np.ndarray:
        if frames.shape[-1] != self.num_channels:
            raise VideoError(
                f"{example.path} has {frames.shape[-1]} channels, the model takes "
                f"{self.num_channels}"
            )
        try:
            return np.stack([self.transform(rng, frames) for _ in range(self.settings.repeats)])
        except UserError as error:  # knows frames, not where they are from
            kind = VideoError if isinstance(error, VideoError) else UserError
            raise kind(f"{example.path}: {error}") from None

    def _frames(self, example: Example, rng: np.random.Generator) -> np.ndarray:
        settings = self.settings
        how = dict(num_frames=self.num_frames, stride=settings.stride, sampler=settings.sampler)
        video = self.cache.video(example)
        if video is None:
            return read_training_clip(example, rng, **how)
        return video[training_indices(total=len(video), rng=rng, **how)]


def _start_worker(index: int, count: int) -> None:
    """Prepare one of grain's processes: Ctrl-C is for the main one, whose end is its end too."""
    follow_the_main_process()


def _collect() -> None:
    gc.collect()


class Batches:
    """Endless batches {"clips": uint8 [b, t, h, w, c], "labels": int32 [b] or [b, heads]}.

    `b` is this process's part of batch_size * repeats; the copies of a clip are neighbours. A bad
    clip is left out, the next one takes its place, and `bad` names it; UserError where bad clips
    are more than `settings.max_bad_share` of those read. `state()` and `restore()` are for
    checkpoints. Close it, or use it in a `with` statement: grain's threads and processes end then.
    """

    def __init__(
        self,
        dataset: Dataset,
        settings: DataSettings,
        augment: AugmentSettings,
        *,
        num_frames: int,
        size: tuple[int, int],
        num_channels: int = 3,
        batch_size: int,
        seed: int,
        shard: ProcessShard = ProcessShard(),
        labelled: bool = True,
    ):
        if batch_size % shard.count:
            raise UserError(
                f"train.batch_size {batch_size} is not a multiple of the {shard.count} processes "
                "that share it; use one that is"
            )
        if len(dataset) < batch_size:
            raise UserError(
                f"{dataset.source} has {len(dataset)} clips, train.batch_size is {batch_size}; "
                "a batch takes different clips: use a smaller batch, or data.repeats"
            )
        if labelled and not dataset.labels_per_example:
            raise UserError(f"{dataset.source} has no labels, which batches with labels need")
        self.sampler = EpochSampler(dataset, batch_size, seed, shard)
        self.bad: dict[str, str] = {}  # path -> why, of clips that could not be read
        self._read, self._left_out, self._in_a_row = 0, 0, 0
        self._settings, self._labelled = settings, labelled
        self._rows = batch_size // shard.count
        self._cache = Cache(settings.cache_gib * 2**30)
        transform = train_transform(augment, size)
        self._load_clip = LoadClip(settings, transform, num_frames, num_channels, seed, self._cache)
        self._elements: Iterator[dict[str, Any]] | None = None
        self._first: list[dict[str, Any]] = []  # that came while processes were started

    def _start(self) -> Iterator[dict[str, Any]]:
        """What grain reads from the element after the last one that was read."""
        import grain.python as grain

        threads, workers = self._settings.threads, self._settings.workers
        # Two batches, of all processes together. Not more: with 1200 small clips ahead
        # of it a step of the demo took 50 ms in place of 30, most of it waiting.
        ahead = -(-2 * self._rows // max(workers, 1)) + threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        order = dataclasses.replace(self.sampler, first=self._read)
        elements = grain.MapDataset.source(order).map(self._load_clip).to_iter_dataset(options)
        if workers:
            from absl import flags

            # grain's processes read flags, which are parsed where absl runs the program.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers)
            elements = elements.mp_prefetch(options, worker_init_fn=_start_worker)
        elif self._settings.cache_gib:
            epoch = self.sampler.steps_per_epoch * self._rows
            # What grain reads at once is left to it.
            self._cache.fill(order[place][0] for place in range(ahead, epoch))
        return iter(elements)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._elements is None:
            with interrupts_held() if self._settings.workers else contextlib.nullcontext():
                self._elements = self._start()
                self._first = [next(self._elements)]  # by which all processes run
        found: list[dict[str, Any]] = []
        while len(found) < self._rows:
            element = self._first.pop() if self._first else next(self._elements)
            self._read += 1
            if "bad" in element:
                self._left_out += 1
                self._in_a_row += 1
                self.bad[element["path"]] = element["bad"]
                self._check()
            else:
                self._in_a_row = 0
                found.append(element)
        batch = {"clips": np.concatenate([element["clips"] for element in found])}
        if self._labelled:
            labels = np.array([element["label"] for element in found], np.int32)
            batch["labels"] = np.repeat(labels, self._settings.repeats, axis=0)
        return batch

    def state(self) -> dict[str, Any]:
        """Where the sequence stands, as JSON values; any `threads` and `workers` go on from it."""
        return {
            "clips": self.sampler.dataset.fingerprint,
            "processes": self.sampler.shard.count,
            "read": self._read,
            "left_out": self._left_out,
            "bad": dict(self.bad),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state()` was taken, by as many processes.

        Raises UserError for another number of processes, and for other clips or another order of
        them: what was read says nothing about those.
        """
        if state["clips"] != self.sampler.dataset.fingerprint:
            raise UserError(
                f"{self.sampler.dataset.source} lists other clips or labels than when the run was "
                "saved, or in another order; put it back as it was, or start another run from the "
                "model so far (model.start)"
            )
        if state["processes"] != self.sampler.shard.count:
            raise UserError(
                f"the clips were read by {state['processes']} processes, each with an order of its "
                f"own, and now there are {self.sampler.shard.count}; go on with as many as before"
            )
        self.close()
        self._read, self._left_out, self._in_a_row = state["read"], state["left_out"], 0
        self.bad = dict(state["bad"])

    def close(self) -> None:
        """End the threads and processes that read ahead; the next batch would start them again."""
        self._cache.stop()
        self._first = []
        if self._elements is not None:
            self._elements.close()
            self._elements = None
            # grain's iterators refer to each other, and complain where they are still there at the
            # very end of the interpreter. Collected once, however many there were.
            atexit.unregister(_collect)
            atexit.register(_collect)
        self._cache.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _check(self) -> None:
        limit, named = self._settings.max_bad_share, "; ".join(list(self.bad.values())[:3])
        if self._read >= _FEW and self._left_out > limit * self._read:
            raise UserError(
                f"{self._left_out} of {self._read} clips could not be read, more than "
                f"data.max_bad_share {limit:g}: {named}; mend or remove these files, or raise "
                "data.max_bad_share"
            )
        if self._in_a_row >= max(len(self.sampler.dataset), _FEW):
            raise UserError(
                f"{self._in_a_row} clips in a row could not be read: {named}; mend or remove these "
                "files"
            )
