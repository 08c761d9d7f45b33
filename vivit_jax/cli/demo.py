# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax demo`: from nothing to a trained, saved, reloaded and verified model."""

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from vivit_jax.errors import MissingExtra, UserError

# A demo directory is known by this file; it is written first and completed last.
MARKER = "vivit-demo.json"
PICTURE = "predictions.png"
# What a demo writes besides, of any model.
WRITTEN = ("data", "model", PICTURE, "reconstructions.png", "reconstruction.gif")
EPOCHS = {"vivit": 12, "videomae": 12, "pretraining": 40}
IMAGE_SIZE = 48
NUM_FRAMES = 8
FPS = 10


@dataclasses.dataclass(frozen=True)
class Run:
    """What every model's part of the demo works with."""

    out: Path
    model: str
    seed: int
    epochs: int
    data: dict[str, list[tuple[Path, int]]]  # per split, as `write_dataset` returns it
    frames: dict[str, Any]  # per split uint8 [n, t, h, w, 3]
    labels: dict[str, Any]  # per split int [n]
    stage: Callable[[str], contextlib.AbstractContextManager]

    @property
    def directory(self) -> Path:
        """Of the saved model."""
        return self.out / "model"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether all checks passed, and what to write and say of the results."""

    passed: bool
    summary: dict[str, Any]
    files: dict[str, str]  # name in `out` -> what it shows
    commands: Sequence[str]  # to go on with


def demo(
    *,
    out: Path = Path("vivit-demo"),
    model: Literal["vivit", "videomae", "pretraining"] = "vivit",
    seed: int = 0,
    clips_per_class: int = 160,
    test_clips_per_class: int = 40,
    epochs: int | None = None,
    overwrite: bool = False,
) -> int:
    """Write a small video data set, train a model on it, and check all that follows.

    Needs no network, no data and no accelerator, and takes about a minute on two cores (several
    for pretraining). The data are mp4 files of moving shapes in eight classes that no still image
    tells apart. A classifier is evaluated on held-out clips; pretraining learns without labels to
    fill in hidden patches, and its error on held-out clips is compared with two baselines. The
    model is saved as a HuggingFace directory, loaded back, used on one file and, where PyTorch is
    installed, compared with PyTorch. The exit status is 1 if one of these checks fails.

    Args:
        out: Directory to write; it must be new or empty.
        model: The family of the classifier to train, or pretraining for a masked autoencoder.
        seed: Seed of the data, the initial weights and the order of training.
        clips_per_class: Training clips of each of the eight classes.
        test_clips_per_class: Held-out clips of each class.
        epochs: Passes over the training clips. Default: 12, for pretraining 40.
        overwrite: Replace what an earlier demo wrote in `out`; other files there stay.
    """
    epochs = EPOCHS[model] if epochs is None else epochs
    counts = {
        "--clips-per-class": clips_per_class,
        "--test-clips-per-class": test_clips_per_class,
        "--epochs": epochs,
    }
    for flag, value in counts.items():
        if value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    _prepare(out, overwrite)

    seconds: dict[str, float] = {}
    stage = functools.partial(_timed, seconds)
    with stage("start"):
        import jax
        import numpy as np

        from vivit_jax.cli.demo_pretraining import pretrain
        from vivit_jax.data.synthetic import CLASSES, write_dataset

        device = jax.devices()[0].platform
    say(f"vivit-jax demo, seed {seed}, on {device} with {os.cpu_count()} processors")

    train_count, test_count = (len(CLASSES) * n for n in (clips_per_class, test_clips_per_class))
    say(f"\ndata: {train_count} clips to train on, {test_count} held out, in {out / 'data'}")
    with stage("write clips"):
        splits = {"train": clips_per_class, "test": test_clips_per_class}
        shape = dict(num_frames=NUM_FRAMES, image_size=IMAGE_SIZE, fps=FPS)
        data = write_dataset(out / "data", splits, seed=seed, **shape)
    size = sum(path.stat().st_size for clips in data.values() for path, _ in clips)
    say(
        f"  {len(CLASSES)} kinds of motion, {NUM_FRAMES} frames of {IMAGE_SIZE}x{IMAGE_SIZE}, "
        f"{FPS} per second, H.264 in mp4, {size / 1e6:.1f} MB"
    )
    with stage("read clips"):
        frames = {split: _read([path for path, _ in clips]) for split, clips in data.items()}
        labels = {split: np.array([label for _, label in clips]) for split, clips in data.items()}

    run = Run(out, model, seed, epochs, data, frames, labels, stage)
    outcome = (pretrain if model == "pretraining" else _classify)(run)

    summary = dict(model=model, seed=seed, epochs=epochs) | outcome.summary
    summary["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    _mark(out, summary)
    width = max(map(len, (*outcome.files, MARKER)))
    say(
        f"\nwritten to {out.resolve()}:\n"
        "  data/{train,test}/<class>/<number>.mp4\n"
        "  model/  config.json, model.safetensors, preprocessor_config.json"
    )
    for name, what in (outcome.files | {MARKER: "figures and times"}).items():
        say(f"  {name:{width}}  {what}")
    say(
        f"\n{sum(seconds.values()):.1f} s: "
        + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    )
    say("\n".join(["\nnext:", *(f"  {command}" for command in outcome.commands)]))
    return 0 if outcome.passed else 1


def _classify(run: Run) -> Outcome:
    """Train, evaluate, save, load and use a classifier."""
    import numpy as np

    import vivit_jax
    from vivit_jax.cli.predict import predict
    from vivit_jax.data.synthetic import CLASSES
    from vivit_jax.train.fit import logits_of

    net, processor = _build(run.model)
    with run.stage("train"):
        labels = run.labels["train"]
        params = _train(net, processor, run.frames["train"], labels, run.epochs, run.seed)
    with run.stage("evaluate"):
        held_out, truth = processor(run.frames["test"]), run.labels["test"]
        logits = logits_of(net, params, held_out)
    accuracy = float((logits.argmax(-1) == truth).mean())
    say(f"\nheld-out accuracy {accuracy:.1%} of {len(truth)} clips (chance {1 / len(CLASSES):.1%})")
    for line in _per_class(CLASSES, truth, logits.argmax(-1)):
        say(f"  {line}")

    directory = run.directory
    with run.stage("save and load"):
        vivit_jax.save_pretrained(directory, net, params, processor)
        loaded = logits_of(*vivit_jax.from_pretrained(directory), held_out)
    same = say_whether_same("logits", loaded, logits, directory)

    file = run.data["test"][0][0]
    say(f"\n$ vivit-jax predict {quoted(file)} --model {quoted(directory)}")
    with run.stage("predict"):
        predict((file,), model=str(directory), top_k=3)

    with run.stage("PyTorch"):
        agrees = agrees_with_pytorch(directory, file)

    with run.stage("picture"):
        subtitle = (
            f"{type(net).__name__} trained by vivit-jax demo, seed {run.seed}: "
            f"{accuracy:.1%} of {len(truth)} held-out clips right. "
            "What leaves a frame on one side comes in on the other."
        )
        # One clip of every class.
        first = np.unique(truth, return_index=True)[1]
        frames = run.frames["test"][first]
        _draw(run.out / PICTURE, frames, truth[first], logits[first], subtitle)

    predictions = {
        run.data["test"][i][0].relative_to(run.out).as_posix(): CLASSES[logits[i].argmax()]
        for i in first
    }
    return Outcome(
        passed=same and agrees,
        summary=dict(accuracy=accuracy, predictions=predictions),
        files={PICTURE: "a held-out clip of every class with its prediction"},
        commands=(
            f"vivit-jax predict {quoted(run.out)}/data/test/*/0000.mp4 --model {quoted(directory)}",
            f"vivit-convert inspect {quoted(directory)}",
            f"vivit-convert verify {quoted(directory)} --clip {quoted(file)}",
        ),
    )


def say(text: str) -> None:
    # Flushed, so that what is written to a pipe can be followed.
    print(text, flush=True)


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def say_whether_same(what: str, loaded, saved, directory: Path) -> bool:
    """Whether a model that was loaded back computes what the saved one did, bit for bit."""
    import numpy as np

    same = np.array_equal(loaded, saved)
    verdict = "identical" if same else f"OFF BY {np.abs(loaded - saved).max():.1e}"
    say(f"\nsaved as {directory} and loaded back: the {what} are {verdict}")
    return same


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _prepare(out: Path, overwrite: bool) -> None:
    """Make `out` a directory that holds nothing a demo writes, and mark it as ours."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a directory, new or empty")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise UserError(
                f"--out {out} is not empty; choose another directory, or pass --overwrite to "
                "replace an earlier demo"
            )
        if not (out / MARKER).is_file():
            raise UserError(
                f"--out {out} was not written by vivit-jax demo (it holds no {MARKER}), so "
                "--overwrite leaves it alone; choose another directory"
            )
        for name in WRITTEN:
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    _mark(out, {})


def _mark(out: Path, values: dict[str, Any]) -> None:
    text = json.dumps({"written_by": "vivit-jax demo"} | values, indent=2)
    (out / MARKER).write_text(text + "\n")


def _build(family: str):
    """The untrained model and its processor."""
    import vivit_jax
    from vivit_jax.data.synthetic import CLASSES

    sizes: dict[str, Any] = dict(
        image_size=IMAGE_SIZE,
        num_frames=NUM_FRAMES,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        num_labels=len(CLASSES),
        id2label=CLASSES,
        # 0.02 suits widths near 768; here it costs epochs before the loss moves.
        initializer_range=0.06,
    )
    # Four frames per token: the patch projection itself sees motion, which two hardly show.
    if family == "vivit":
        config = vivit_jax.VivitConfig(tubelet_size=(4, 16, 16), **sizes)
        processor = vivit_jax.VideoProcessor.named(
            "vivit-scenic", size=IMAGE_SIZE, crop_size=IMAGE_SIZE
        )
        return vivit_jax.VivitForVideoClassification(config), processor
    config = vivit_jax.VideoMAEConfig(tubelet_size=4, patch_size=16, **sizes)
    processor = vivit_jax.VideoProcessor.videomae(size=IMAGE_SIZE, crop_size=IMAGE_SIZE)
    return vivit_jax.VideoMAEForVideoClassification(config), processor


def _train(model, processor, clips, labels, epochs: int, seed: int):
    """Params trained on clips, uint8 [n, t, h, w, 3]; prints the model and every epoch."""
    from vivit_jax.data.synthetic import augment
    from vivit_jax.train.fit import init_params

    return fit_aloud(
        model,
        init_params(model, seed),
        processor,
        clips,
        labels,
        augment=augment,
        epochs=epochs,
        batch_size=16,
        learning_rate=2e-3,
        seed=seed,
    )


def fit_aloud(model, params, processor, clips, labels=None, *, epochs: int, **options):
    """`vivit_jax.train.fit.fit` on clips, uint8 [n, t, h, w, 3], telling how it goes."""
    import jax
    import numpy as np

    from vivit_jax.train.fit import fit, normaliser

    config = model.config
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(
        f"\nmodel: {type(model).__name__}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, {config.num_tokens} tokens, {size:,} parameters"
    )

    def report(epoch):
        accuracy = "" if epoch.accuracy is None else f"accuracy {epoch.accuracy:6.1%}  "
        digits = 3 if accuracy else 4
        say(
            f"  epoch {epoch.number:>2}/{epochs}  loss {epoch.loss:.{digits}f}  {accuracy}"
            f"{epoch.clips_per_second:4.0f} clips/s"
        )

    # The processor's geometry once and clip by clip, its arithmetic on the device in every step.
    geometry = dict(do_rescale=False, offset=False, do_normalize=False)
    clips = np.concatenate([processor(clip, **geometry).astype(np.uint8) for clip in clips])
    return fit(
        model,
        params,
        clips,
        labels,
        normalise=normaliser(processor),
        epochs=epochs,
        report=report,
        **options,
    )


def _read(paths: Sequence[Path]):
    """The clips of the files, uint8 [n, t, h, w, 3], as `vivit-jax predict` reads them."""
    import numpy as np

    from vivit_jax.data.decode import read_video

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.stack(list(pool.map(lambda path: read_video(path, num_frames=NUM_FRAMES), paths)))


def agrees_with_pytorch(directory: Path, clip: Path) -> bool:
    """Compare the saved model with PyTorch on one file; True where there is no PyTorch."""
    from checkpoints_convert.verify import verify_checkpoint

    try:
        result = verify_checkpoint(directory, clip=clip)
    except MissingExtra as missing:
        say(f"\nnot compared with PyTorch: {missing}")
        return True
    say(f"\n$ vivit-convert verify {quoted(directory)} --clip {quoted(clip)}\n{result}")
    return result.passed


def _per_class(classes: Sequence[str], labels, predicted) -> Iterator[str]:
    """One line per class: its accuracy and what its other clips were taken for."""
    import numpy as np

    width = max(map(len, classes))
    for k, name in enumerate(classes):
        answers = np.bincount(predicted[labels == k], minlength=len(classes))
        line = f"{name:{width}}  {answers[k] / answers.sum():6.1%}"
        wrong = [
            f"{answers[j]} as {classes[j]}"
            for j in np.argsort(-answers, kind="stable")
            if j != k and answers[j]
        ]
        yield f"{line}   {', '.join(wrong)}".rstrip()


def _draw(path: Path, clips, labels, logits, subtitle: str) -> None:
    """A row per clip, uint8 [t, h, w, 3], with what the model takes it for."""
    import jax
    import numpy as np

    from vivit_jax.cli.panels import RIGHT, WRONG, Panels
    from vivit_jax.data.synthetic import CLASSES

    answers = []
    for truth, scores in zip(labels, np.asarray(jax.nn.softmax(logits)), strict=True):
        colour, verdict = (RIGHT, "right") if scores.argmax() == truth else (WRONG, "wrong")
        answer = CLASSES[scores.argmax()]
        answers.append((answer, colour, f"{verdict}, probability {scores.max():.2f}"))
    Panels(
        title="Held-out clips and what the model takes them for",
        notes=[subtitle],
        warning=None,
        labels=[CLASSES[k] for k in labels],
        clips=clips,
        times=[f"{i / FPS:.3g} s" for i in range(NUM_FRAMES)],
        group=len(clips),
        answers=answers,
    ).save_png(path)
