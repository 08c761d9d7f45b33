# SPDX-License-Identifier: Apache-2.0
"""The stages of `vivit-jax demo`."""

import contextlib
import dataclasses
import io
import operator
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints_convert.files.save import replaced_directory
from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.verify import verify_checkpoint
from vivit_jax.cli.attention import MapOptions, attention
from vivit_jax.cli.demo_few_labels import compare, draw_comparison
from vivit_jax.cli.demo_run import (
    ATTENTION,
    FEW_CHART,
    FEW_RESULTS,
    FPS,
    MOVING,
    PREDICTIONS,
    RECONSTRUCTIONS,
    Demo,
    Outcome,
    quoted,
    say,
    shortened,
)
from vivit_jax.cli.options import PictureOptions
from vivit_jax.cli.panels import RIGHT, WRONG, Panels
from vivit_jax.cli.predict import predict
from vivit_jax.cli.reconstruct import MaskOptions, draw_mask, panels_of, reconstruct
from vivit_jax.data.datasets.dataset import Dataset, read_dataset, read_frames
from vivit_jax.data.datasets.synthetic import CLASSES
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.video.decode import read_video
from vivit_jax.errors import MissingExtra
from vivit_jax.files.atomic import whole_file, write_json
from vivit_jax.inference import reconstruction
from vivit_jax.inference.reconstruction import ROWS_OF_COLUMNS, error_dict, rmse
from vivit_jax.models.videomae import VideoMAEForPreTraining
from vivit_jax.recipes.demo import demo_all_labels, demo_pretrain, demo_vivit
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.evaluation import Evaluation, evaluate
from vivit_jax.train.loop import Outcome as Ended
from vivit_jax.train.loop import train
from vivit_jax.train.sharding import make_mesh, parse_mesh

SHOWN = ("circle-clockwise", "grow", "move-left", "move-down")
ATTENDED = "circle-clockwise"  # the class of the clip whose attention is drawn
_MOST_SHOWN = 3  # kinds of mistakes in a line


def videomae(demo: Demo) -> Outcome:
    """Masked pre-training, a comparison with and without it on few labels, a classifier on all."""
    data = demo.out / "data"
    pretrained = demo.out / "pretrained"
    pretraining = _run(demo, demo_pretrain(), "pretraining", data / "train")
    _copy(Path(pretraining.model), pretrained)
    say(f"loss on held-out clips {pretraining.metrics['loss']:.4f}; model in {pretrained}")
    with demo.stage("reconstruct"):
        errors, command = _reconstructions(demo, pretrained)
    say("\nfine-tuning on few labels, after pre-training and from scratch, for three seeds:")
    with demo.stage("few labels"):
        few = compare(demo, pretrained)
        draw_comparison(few, demo.out / FEW_CHART)
        write_json(demo.out / FEW_RESULTS, few.to_dict())
    say(f"with {few.labels} labels right on {few.result} (means and standard errors)")
    recipe = demo_all_labels()
    used = _use(demo, _run(demo, recipe, "finetuning", data / "train"), recipe)
    with demo.stage("attention"):
        attending = _attention(demo)
    return Outcome(
        passed=used.passed,
        summary=dict(
            accuracy=used.evaluation.metrics["accuracy"],
            predictions=used.predictions,
            rmse=errors,
            few_labels=few.to_dict(),
        ),
        files={
            PREDICTIONS: "picture: a held-out clip of every class with its prediction",
            FEW_CHART: f"picture: accuracy with {few.labels} labels; numbers in {FEW_RESULTS}",
            ATTENTION: "picture: where the classifier looks",
            RECONSTRUCTIONS: "picture: held-out clips: original, masked, reconstruction",
            MOVING: "one of them, moving",
            "pretraining/": "the run without labels; curves in its report.html",
            "pretrained/": "its model",
            "finetuning/": "the run on all labels, from scratch",
        },
        commands=(
            f"{command} --out reconstruction.mp4",
            f"{attending} --out attention.mp4",
            f"vivit-jax evaluate --recipe {recipe.name} --model {quoted(demo.out / 'model')} "
            f"--data {quoted(demo.test)}",
            *used.commands,
        ),
    )


def vivit(demo: Demo) -> Outcome:
    """A ViViT from scratch, on all clips with their labels."""
    finetuning = _run(demo, demo_vivit(), "finetuning", demo.out / "data" / "train")
    used = _use(demo, finetuning, recipe=demo_vivit())
    return Outcome(
        passed=used.passed,
        summary=dict(accuracy=used.evaluation.metrics["accuracy"], predictions=used.predictions),
        files={
            PREDICTIONS: "picture: a held-out clip of every class with its prediction",
            "finetuning/": "the run; curves in its report.html",
        },
        commands=used.commands,
    )


@dataclasses.dataclass(frozen=True)
class _Used:
    """Results of a trained model."""

    passed: bool
    evaluation: Evaluation
    predictions: dict[str, str]  # of the files shown
    commands: tuple[str, ...]


def _run(demo: Demo, recipe: Recipe, name: str, data: Path) -> Ended:
    """Train into `demo.out / name`, and print the command."""
    named = recipe
    task = recipe.task
    clips = len(read_dataset(data, labels=None if task == "finetune" else 0))
    epochs = demo.epochs_of(recipe, clips, halved=task == "pretrain")
    recipe = shortened(recipe, epochs, clips, demo.seed, None)
    flags = [f"--recipe {recipe.name}", f"--data {quoted(data)}"]
    flags += [f"--out {quoted(demo.out / name)}"]
    changed = [f"{field}={new:g}" for field, old, new in _lengths(named, recipe) if new != old]
    flags += ["--set", *changed] if changed else []
    say(f"\n$ vivit-jax {task} {' '.join(flags)}")
    recipe = dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, train=str(data), validation=str(demo.test)),
        train=dataclasses.replace(
            recipe.train,
            evaluate_every=epochs,
            checkpoint_every=epochs * (clips // recipe.train.batch_size),
        ),
    )
    with demo.stage(name):
        outcome = train(recipe, demo.out / name, say=lambda text: say(f"  {text}"))
    if outcome.stopped:
        # Training saved a checkpoint, but a demo is not resumed: stop as without one.
        signal.raise_signal(signal.Signals[outcome.stopped])
    return outcome


def _lengths(*recipes: Recipe) -> Iterator[tuple[Any, ...]]:
    """Fields that a demo changes: the name, and the value in each recipe."""
    for name in ("train.epochs", "optim.warmup_epochs", "train.batch_size", "train.seed"):
        yield name, *(operator.attrgetter(name)(recipe) for recipe in recipes)


def _copy(model: Path, directory: Path) -> None:
    """Copy a model's files atomically."""
    with replaced_directory(directory) as staged:
        for path in model.iterdir():
            shutil.copyfile(path, staged / path.name)


def _use(demo: Demo, trained: Ended, recipe: Recipe) -> _Used:
    """Load, evaluate and use a trained and saved classifier."""
    directory = demo.out / "model"
    _copy(Path(trained.model), directory)
    with demo.stage("evaluate"):
        evaluation = _evaluate(demo, directory, recipe)
    dataset = read_dataset(demo.test)
    labels = np.array([example.label for example in dataset.examples])
    # Every clip was made here and can be read: none is without scores.
    scores = np.stack([a.scores for a in evaluation.answers if a.scores is not None])
    accuracy = evaluation.metrics["accuracy"]
    same = accuracy == trained.metrics["accuracy"]
    say(
        f"right on {accuracy:.1%} of {len(labels)} held-out clips (chance "
        f"{1 / len(CLASSES):.1%}){_mistakes(labels, scores.argmax(-1))}"
    )
    if not same:
        say(
            f"LOADED BACK FROM {directory} IT HAS ANOTHER ACCURACY than in training, "
            f"{trained.metrics['accuracy']:.1%}"
        )

    file = Path(dataset.examples[0].path)
    say(f"\n$ vivit-jax predict {quoted(file)} --model {quoted(directory)}")
    with demo.stage("predict"):
        predict((file,), model=str(directory), top_k=3)
    with demo.stage("PyTorch"):
        agrees = agrees_with_pytorch(directory, file)
    with demo.stage("pictures"):
        first = np.unique(labels, return_index=True)[1].tolist()  # one clip of every class
        _draw_predictions(demo, dataset, first, labels, scores, accuracy)
    predictions = {
        Path(dataset.examples[i].path).relative_to(demo.out).as_posix(): CLASSES[scores[i].argmax()]
        for i in first
    }
    commands = (
        f"vivit-jax predict {quoted(demo.out)}/data/test/*/0000.mp4 --model {quoted(directory)}",
        f"vivit-convert inspect {quoted(directory)}",
        f"vivit-convert verify {quoted(directory)} --clip {quoted(file)}",
    )
    return _Used(same and agrees, evaluation, predictions, commands)


def _evaluate(demo: Demo, directory: Path, recipe: Recipe) -> Evaluation:
    """A saved model on the held-out clips."""
    model, params = from_pretrained(directory)
    return evaluate(
        model,
        params,
        read_dataset(demo.test),
        recipe.evaluation,
        VideoProcessor.from_pretrained(directory),
        mesh=make_mesh(parse_mesh(None, jax.device_count())),
    )


def _reconstructions(demo: Demo, directory: Path) -> tuple[dict[str, Any], str]:
    """Errors on hidden patches of held-out clips, pictures of some, and the command for one."""
    model, params = from_pretrained(directory)
    assert isinstance(model, VideoMAEForPreTraining)
    processor = VideoProcessor.from_pretrained(directory)
    recipe = demo_pretrain()
    kind, ratio = recipe.mask.kind, recipe.mask.ratio
    examples = read_dataset(demo.test).examples
    # The first clip of every class, then the second, so that a batch has all classes.
    examples = sorted(examples, key=lambda example: (Path(example.path).name, example.label))
    examples = examples[:64] if demo.quick else examples
    frames = np.stack([read_frames(example, range(8)) for example in examples])
    pixels = processor(frames)
    results = []
    for i in range(0, len(pixels), 64):
        batch = pixels[i : i + 64]
        masks = draw_mask(kind, i, len(batch), model.config.grid, ratio)
        results.append(reconstruction.reconstruct(model, params, batch, masks, processor))
    errors = rmse(results)
    file = sorted(demo.test.glob("grow/*.mp4"))[0]
    options = f"--mask {kind} --mask-ratio {ratio:g}"
    command = f"vivit-jax reconstruct {quoted(file)} --model {quoted(directory)} {options}"
    say(f"\n$ {command} --out {quoted(demo.out / MOVING)}")
    named = zip(ROWS_OF_COLUMNS[0], errors[:, 0], strict=True)
    say(
        f"{ratio:.0%} of the patches hidden; RMSE there, pixels in [0, 1], {len(pixels)} held-out "
        f"clips: {', '.join(f'{name} {error:.4f}' for name, error in named)}"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        reconstruct(
            file,
            model=str(directory),
            picture=PictureOptions(out=demo.out / MOVING),
            mask=MaskOptions(mask=kind, mask_ratio=ratio),
        )
    chosen = [
        next(i for i, example in enumerate(examples) if Path(example.path).parent.name == name)
        for name in SHOWN
    ]
    panels = panels_of(
        results[0].take(chosen),
        title="Held-out clips, partly hidden, and their reconstruction",
        about=f"{type(model).__name__}, vivit-jax demo, seed {demo.seed}; {kind} mask",
        times=[f"frame {i}" for i in range(frames.shape[1])],
    )
    with whole_file(demo.out / RECONSTRUCTIONS) as partial:
        panels.save_png(partial)
    return {f"{kind} {ratio:g}": error_dict(errors)}, command


def _attention(demo: Demo) -> str:
    """Draw the classifier's attention on a held-out clip; returns the command."""
    file = whole_path(sorted(demo.test.glob(f"{ATTENDED}/*.mp4")))
    model = demo.out / "model"
    command = f"vivit-jax attention {quoted(file)} --model {quoted(model)} --kind rollout"
    say(f"\n$ {command} --out {quoted(demo.out / ATTENTION)}")
    attention(
        file,
        model=str(model),
        picture=PictureOptions(out=demo.out / ATTENTION),
        attend=MapOptions(kind="rollout"),
    )
    return command


def whole_path(files: Sequence[Path]) -> Path:
    """The clip whose shape stays clear of the edges: of all, least changes there."""

    def change(file: Path) -> int:
        spread = np.ptp(read_video(file), axis=0)
        spread[1:-1, 1:-1] = 0
        return int(spread.max())

    return min(files, key=change)


def agrees_with_pytorch(directory: Path, clip: Path) -> bool:
    """Compare the saved model with PyTorch on one file; True without PyTorch."""
    try:
        result = verify_checkpoint(directory, clip=clip)
    except MissingExtra as missing:
        say(f"\nnot compared with PyTorch: {missing}")
        return True
    say(f"\n$ vivit-convert verify {quoted(directory)} --clip {quoted(clip)}")
    *table, verdict = str(result).splitlines()
    say(verdict if result.passed else "\n".join((*table, verdict)))
    return result.passed


def _mistakes(labels, predicted) -> str:
    """The most frequent wrong answers, as the end of a line."""
    wrong = labels != predicted
    pairs = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    most = [f"{n} {CLASSES[a]} as {CLASSES[b]}" for (a, b), n in pairs.most_common(_MOST_SHOWN)]
    more = ", ..." if len(pairs) > len(most) else ""
    return f"; wrong: {', '.join(most)}{more}" if most else ""


def _draw_predictions(
    demo: Demo, dataset: Dataset, shown: Sequence[int], labels, scores, accuracy: float
) -> None:
    """Draw a row for each of the clips `shown`, with its prediction."""
    answers = []
    for i in shown:
        probabilities = np.exp(scores[i])  # averages of softmax are logarithms
        right = scores[i].argmax() == labels[i]
        colour, verdict = (RIGHT, "right") if right else (WRONG, "wrong")
        answer = CLASSES[scores[i].argmax()]
        answers.append((answer, colour, f"{verdict}, probability {probabilities.max():.2f}"))
    frames = np.stack([read_frames(dataset.examples[i], range(8)) for i in shown])
    panels = Panels(
        title="Held-out clips and their predictions",
        notes=[
            f"Trained by vivit-jax demo, seed {demo.seed}: {accuracy:.1%} of {len(labels)} "
            "held-out clips right. Shapes that leave a frame on one side enter on the other."
        ],
        warning=None,
        labels=[CLASSES[labels[i]] for i in shown],
        clips=list(frames),
        times=[f"{i / FPS:.3g} s" for i in range(frames.shape[1])],
        group=len(frames),
        answers=answers,
    )
    with whole_file(demo.out / PREDICTIONS) as partial:
        panels.save_png(partial)
