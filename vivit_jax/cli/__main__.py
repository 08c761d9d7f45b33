# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax`: a command is one file in this folder and one entry here."""

import sys
from collections.abc import Sequence

from vivit_jax.console import run

COMMANDS = {
    "attention": "vivit_jax.cli.attention:attention",
    "benchmark": "vivit_jax.cli.benchmark:benchmark",
    "benchmark-input": "vivit_jax.cli.benchmark_input:benchmark_input",
    "check-data": "vivit_jax.cli.check_data:check_data",
    "demo": "vivit_jax.cli.demo:demo",
    "evaluate": "vivit_jax.cli.evaluate:evaluate",
    "export": "vivit_jax.cli.export:export",
    "extract": "vivit_jax.cli.extract:extract",
    "finetune": "vivit_jax.cli.train:finetune",
    "pack": "vivit_jax.cli.pack:pack_command",
    "plan": "vivit_jax.cli.plan:plan",
    "predict": "vivit_jax.cli.predict:predict",
    "presets": "vivit_jax.cli.presets:presets",
    "pretrain": "vivit_jax.cli.train:pretrain",
    "probe": "vivit_jax.cli.probe:probe_command",
    "push": "vivit_jax.cli.push:push",
    "recipes": "vivit_jax.cli.recipes:recipes",
    "reconstruct": "vivit_jax.cli.reconstruct:reconstruct",
}

# How `--help` groups them.
GROUPS = {
    "First": ("demo",),
    "Data and training": ("check-data", "pack", "probe", "finetune", "pretrain", "recipes", "plan"),
    "Using a model": ("predict", "evaluate", "extract", "attention", "reconstruct"),
    "Sharing a model": ("push", "export", "presets"),
    "Speed": ("benchmark", "benchmark-input"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    description = "Video transformers in JAX: ViViT and VideoMAE."
    return run("vivit-jax", description, COMMANDS, args, groups=GROUPS)


if __name__ == "__main__":
    sys.exit(main())
