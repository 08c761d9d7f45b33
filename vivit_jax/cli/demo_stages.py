# SPDX-License-Identifier: Apache-2.0
"""The stages of `vivit-jax demo`."""

import dataclasses
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoints_convert.files.save import replaced_directory
from checkpoints_convert.pretrained import from_pretrained
from checkpoints_convert.verify import verify_checkpoint
from vivit_jax.cli.demo_run import (
    CLIPS,
    FPS,
    MOVING,
    PREDICTIONS,
    RECONSTRUCTIONS,
    Demo,
    Outcome,
    quoted,
    say,
)
from vivit_jax.cli.options import PictureOptions
from vivit_jax.cli.panels import RIGHT, WRONG, Panels
from vivit_jax.cli.predict import predict
from vivit_jax.cli.reconstruct import MaskOptions, draw_mask, panels_of, reconstruct
from vivit_jax.data.datasets.dataset import Dataset, read_dataset, read_frames
from vivit_jax.data.datasets.synthetic import CLASSES
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.errors import MissingExtra
from vivit_jax.files.atomic import whole_file
from vivit_jax.inference import reconstruction
from vivit_jax.inference.reconstruction import error_dict, error_table, rmse
from vivit_jax.models.videomae import VideoMAEForPreTraining
from vivit_jax.recipes.demo import demo_finetune, demo_pretrain, demo_vivit
from vivit_jax.recipes.recipe import Recipe
from vivit_jax.train.evaluation import Evaluation, evaluate
from vivit_jax.train.loop import Outcome as Ended
from vivit_jax.train.loop import train
from vivit_jax.train.sharding import make_mesh, parse_mesh

SHOWN = ("circle-clockwise", "grow", "move-left", "move-down")


def videomae(demo: Demo) -> Outcome:
    """Masked pre-training, fine-tuning on few labels, and the same model from scratch."""
    data = demo.out / "data"
    pretraining = demo.out / "pretrained"
    _copy(_run(demo, demo_pretrain(), "pretraining", data / "train").model, pretraining)
    with demo.stage("reconstruct"):
        errors, recipe = _reconstructions(demo, pretraining)
        file = sorted(demo.test.glob("grow/*.mp4"))[0]
        options = f"--mask {recipe.mask.kind} --mask-ratio {recipe.mask.ratio:g}"
        command = f"vivit-jax reconstruct {quoted(file)} --model {quoted(pretraining)} {options}"
        say(f"\n$ {command} --out {quoted(demo.out / MOVING)}")
        reconstruct(
            file,
            model=str(pretraining),
            picture=PictureOptions(out=demo.out / MOVING),
            mask=MaskOptions(mask=recipe.mask.kind, mask_ratio=recipe.mask.ratio),
        )
    few = data / "labelled"
    finetuning = _run(demo, demo_finetune(), "finetuning", few, start=pretraining)
    scratch = _run(demo, demo_finetune(), "scratch", few)
    used = _use(demo, finetuning, recipe=demo_finetune())
    accuracy, other = used.evaluation.metrics["accuracy"], scratch.metrics["accuracy"]
    count = demo.labelled * len(CLASSES)
    say(
        f"\nheld-out accuracy with {count} labelled clips: {accuracy:.1%} after pre-training, "
        f"{other:.1%} from scratch"
    )
    return Outcome(
        passed=used.passed,
        summary=dict(
            accuracy=accuracy,
            accuracy_from_scratch=other,
            predictions=used.predictions,
            rmse=errors,
        ),
        files={
            "pretraining/": "the run without labels; curves in its report.html",
            "pretrained/": "its model",
            "finetuning/": "the run on few labels that starts from it",
            "scratch/": "the same run from nothing",
            RECONSTRUCTIONS: "held-out clips: original, masked, reconstruction",
            MOVING: "one of them, moving",
            PREDICTIONS: "a held-out clip of every class with its prediction",
        },
        commands=(
            f"{command} --out reconstruction.mp4",
            f"vivit-jax evaluate --model {quoted(demo.out / 'model')} --data {quoted(demo.test)}",
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
            "finetuning/": "the run; curves in its report.html",
            PREDICTIONS: "a held-out clip of every class with its prediction",
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


def _run(demo: Demo, recipe: Recipe, name: str, data: Path, start: Path | None = None) -> Ended:
    """Train into `demo.out / name`."""
    task = recipe.task
    begin = "" if start is None else f" --start {quoted(start)}"
    say(
        f"\n$ vivit-jax {task} --recipe {recipe.name} --data {quoted(data)}{begin} "
        f"--out {quoted(demo.out / name)}"
    )
    clips = len(read_dataset(data, labels=None if task == "finetune" else 0))
    settings = recipe.train
    epochs = settings.epochs if demo.epochs is None else demo.epochs
    if demo.epochs is None and demo.quick and task == "pretrain":
        # A sixth of the steps: a third of the epochs on half of the clips.
        share = CLIPS["train"] * len(CLASSES) / clips
        epochs = max(1, min(settings.epochs // 3, int(settings.epochs * share / 6)))
    recipe = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, start=None if start is None else str(start)),
        data=dataclasses.replace(recipe.data, train=str(data), validation=str(demo.test)),
        optim=dataclasses.replace(
            recipe.optim, warmup_epochs=min(recipe.optim.warmup_epochs, epochs / 4)
        ),
        train=dataclasses.replace(
            settings,
            epochs=epochs,
            batch_size=min(settings.batch_size, clips),
            seed=demo.seed,
            evaluate_every=epochs,
            checkpoint_every=epochs * (clips // min(settings.batch_size, clips)),
        ),
    )
    with demo.stage(name):
        outcome = train(recipe, demo.out / name, say=lambda text: say(f"  {text}"))
    if outcome.stopped:
        # Training saved a checkpoint, but a demo is not resumed: stop as without one.
        signal.raise_signal(signal.Signals[outcome.stopped])
    return outcome


def _copy(model: Path, directory: Path) -> None:
    """Copy a model's files atomically."""
    with replaced_directory(directory) as staged:
        for path in model.iterdir():
            shutil.copyfile(path, staged / path.name)


def _use(demo: Demo, trained: Ended, recipe: Recipe) -> _Used:
    """Load, evaluate and use a trained and saved classifier."""
    directory = demo.out / "model"
    _copy(trained.model, directory)
    with demo.stage("evaluate"):
        evaluation = _evaluate(demo, directory, recipe)
    dataset = read_dataset(demo.test)
    labels = np.array([example.label for example in dataset.examples])
    # Every clip was made here and can be read: none is without scores.
    scores = np.stack([a.scores for a in evaluation.answers if a.scores is not None])
    accuracy = evaluation.metrics["accuracy"]
    say(
        f"\nheld-out accuracy {accuracy:.1%} of {len(labels)} clips (chance {1 / len(CLASSES):.1%})"
    )
    same = accuracy == trained.metrics["accuracy"]
    verdict = (
        "the same accuracy" if same else f"ANOTHER ACCURACY, {trained.metrics['accuracy']:.1%}"
    )
    say(f"loaded back from {directory}: {verdict} as in training")
    for line in _per_class(labels, scores.argmax(-1)):
        say(f"  {line}")

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


def _reconstructions(demo: Demo, directory: Path) -> tuple[dict[str, Any], Recipe]:
    """Errors on hidden patches of held-out clips, and a picture of four of them."""
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
    say(
        f"\nRMSE on hidden patches of {len(pixels)} held-out clips, pixels in [0, 1], {kind} masks "
        f"of {ratio:g}:"
    )
    say("\n".join(f"  {line}" for line in error_table(errors)))
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
    return {f"{kind} {ratio:g}": error_dict(errors)}, recipe


def agrees_with_pytorch(directory: Path, clip: Path) -> bool:
    """Compare the saved model with PyTorch on one file; True without PyTorch."""
    try:
        result = verify_checkpoint(directory, clip=clip)
    except MissingExtra as missing:
        say(f"\nnot compared with PyTorch: {missing}")
        return True
    say(f"\n$ vivit-convert verify {quoted(directory)} --clip {quoted(clip)}\n{result}")
    return result.passed


def _per_class(labels, predicted) -> Iterator[str]:
    """One line per class: its accuracy and the wrong answers."""
    width = max(map(len, CLASSES))
    for k, name in enumerate(CLASSES):
        answers = np.bincount(predicted[labels == k], minlength=len(CLASSES))
        line = f"{name:{width}}  {answers[k] / answers.sum():6.1%}"
        wrong = [
            f"{answers[j]} as {CLASSES[j]}"
            for j in np.argsort(-answers, kind="stable")
            if j != k and answers[j]
        ]
        yield f"{line}   {', '.join(wrong)}".rstrip()


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
