# SPDX-License-Identifier: Apache-2.0
"""Few labels: the demo's classifier after pre-training and from scratch, for several seeds."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vivit_jax.cli.demo_run import Demo, reports_hidden, say, shortened
from vivit_jax.cli.panels import FAINT, INK
from vivit_jax.data.datasets.dataset import Dataset, read_dataset
from vivit_jax.data.datasets.synthetic import CLASSES
from vivit_jax.files.atomic import whole_file
from vivit_jax.recipes.demo import demo_finetune
from vivit_jax.train.evaluation import evaluate
from vivit_jax.train.pages.chart import COLOURS, save_png
from vivit_jax.train.prepare import first_state, prepare
from vivit_jax.train.setup import TrainSetup
from vivit_jax.train.sharding import batch_sharding, make_mesh, parse_mesh

ARMS = {"pretrained": "after pre-training", "scratch": "from scratch"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Held-out accuracies of the arms, one for each seed."""

    labels: int  # in all classes
    held_out: int  # clips
    seeds: Sequence[int]
    accuracies: dict[str, list[float]]  # by the names of ARMS

    def mean(self, arm: str) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.accuracies[arm]))

    def error(self, arm: str) -> float:
        """The standard error of the mean."""
        return _standard_error(self.accuracies[arm])

    @property
    def gain(self) -> tuple[float, float]:
        """The mean over the seeds of what pre-training adds, and its standard error.

        Both arms of a seed learn from the same clips, so that it is more certain than the means.
        """
        gains = np.subtract(self.accuracies["pretrained"], self.accuracies["scratch"])
        return float(gains.mean()), _standard_error(gains)

    @property
    def result(self) -> str:
        """The means, the gain, and their standard errors, in points."""
        means = ", ".join(
            f"{self.mean(arm):.1%} +- {100 * self.error(arm):.1f} {words}"
            for arm, words in ARMS.items()
        )
        gain, error = self.gain
        return f"{means}; difference {100 * gain:.1f} +- {100 * error:.1f} points"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        arms = {
            arm: {
                "accuracies": values,
                "mean": self.mean(arm),
                "standard_error": self.error(arm),
            }
            for arm, values in self.accuracies.items()
        }
        about = dict(labels=self.labels, classes=len(CLASSES), held_out=self.held_out)
        gain = dict(zip(("mean", "standard_error"), self.gain, strict=True))
        return about | dict(chance=1 / len(CLASSES), seeds=[*self.seeds], arms=arms, gain=gain)


def _standard_error(values: Any) -> float:
    """Of the mean of some values; 0 for a single one, which has none."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def compare(demo: Demo, pretrained: Path) -> Comparison:
    """Fine-tune on few labels, from the pre-trained model and from nothing, once for each seed.

    A seed has labelled clips of its own, and its own initial weights and order of clips.
    """
    test = read_dataset(demo.test)
    mesh = make_mesh(parse_mesh(None, jax.device_count()))
    accuracies: dict[str, list[float]] = {arm: [] for arm in ARMS}
    step, labels = None, 0
    for number, seed in enumerate(demo.seeds):
        clips = read_dataset(demo.labelled(number))
        labels, recipe = len(clips), demo_finetune()
        epochs = demo.epochs_of(recipe, labels, halved=True)
        for arm, start in (("pretrained", pretrained), ("scratch", None)):
            recipe = shortened(recipe, epochs, labels, seed, start)
            with reports_hidden():  # of the decoder, which no classifier has, for every seed
                setup, batches, begin = prepare(recipe, mesh, None, (clips, test))
            assert begin is not None  # a new run
            # These recipes draw nothing inside a step, so that one compiled step serves all seeds.
            step = step or setup.step
            with contextlib.closing(batches):
                state = first_state(setup, begin.params)
                for _ in range(setup.last):
                    state, _ = step(state, jax.device_put(next(batches), batch_sharding(mesh)))
            accuracies[arm].append(_accuracy(setup, state.params, test))
        each = ", ".join(f"{accuracies[arm][-1]:.1%} {words}" for arm, words in ARMS.items())
        say(f"  seed {seed}, {labels} labels: {each}")
    return Comparison(labels, len(test), demo.seeds, accuracies)


def _accuracy(setup: TrainSetup, params: Any, test: Dataset) -> float:
    settings = setup.recipe.evaluation
    found = evaluate(setup.model, params, test, settings, setup.processor, mesh=setup.mesh)
    return found.metrics["accuracy"]


def draw_comparison(found: Comparison, path: Path) -> None:
    """Write a bar chart: a bar with its standard error for each arm, a dot for each seed."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        values = {arm: 100 * np.array(each) for arm, each in found.accuracies.items()}
        spread = np.linspace(-0.13, 0.13, len(found.seeds)) if len(found.seeds) > 1 else np.zeros(1)
        axes.plot(
            np.add.outer(range(len(ARMS)), spread),
            [*values.values()],
            color=FAINT,
            lw=0.8,
            zorder=2,
        )
        for place, arm in enumerate(ARMS):
            mean, colour = 100 * found.mean(arm), COLOURS[place]
            axes.bar(place, mean, width=0.55, color=colour, alpha=0.85)
            axes.errorbar(place, mean, 100 * found.error(arm), color=INK, capsize=6, elinewidth=1.5)
            axes.plot(place + spread, values[arm], "o", color="#ffffff", mec=INK, mew=0.8, ms=5)
            text = f"{mean:.1f} \u00b1 {100 * found.error(arm):.1f} %"
            highest = max(mean + 100 * found.error(arm), values[arm].max())
            axes.annotate(
                text, (place, highest), (0, 11), textcoords="offset points", ha="center", color=INK
            )
        chance = 100 / len(CLASSES)
        axes.axhline(chance, color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            "chance", (0.5, chance), (0, 3), textcoords="offset points", ha="center", color=INK
        )
        axes.set(xlim=(-0.5, 1.5), ylim=(0, 108), ylabel="right answers on held-out clips, %")
        axes.set_yticks(range(0, 101, 20))
        axes.set_xticks(range(len(ARMS)), [*ARMS.values()], color=INK, fontsize=11)
        axes.tick_params(axis="x", length=0)
        axes.set_title(f"Fine-tuned with {found.labels} labels", loc="left", color=INK)
        gain, error = (100 * value for value in found.gain)
        figure.supxlabel(
            f"Bars: mean \u00b1 standard error on {found.held_out} held-out clips.\n"
            f"Dots: {len(found.seeds)} seeds, each with weights and labelled clips of its own.\n"
            f"Difference, seed by seed: {gain:.1f} \u00b1 {error:.1f} points.",
            fontsize=9,
            color=FAINT,
        )

    with whole_file(path) as partial:
        save_png(partial, (4.8, 4.0), draw)
