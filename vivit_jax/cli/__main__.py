# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax`: every command is a function; heavy imports happen inside it."""

import sys
from collections.abc import Sequence

from vivit_jax.cli.attention import attention
from vivit_jax.cli.benchmark import benchmark
from vivit_jax.cli.benchmark_input import benchmark_input
from vivit_jax.cli.demo import demo
from vivit_jax.cli.evaluate import evaluate
from vivit_jax.cli.export import export
from vivit_jax.cli.extract import extract
from vivit_jax.cli.plan import plan
from vivit_jax.cli.predict import predict
from vivit_jax.cli.presets import presets
from vivit_jax.cli.recipes import recipes
from vivit_jax.cli.reconstruct import reconstruct
from vivit_jax.cli.run import run
from vivit_jax.cli.train import finetune, pretrain

COMMANDS = {
    "attention": attention,
    "benchmark": benchmark,
    "benchmark-input": benchmark_input,
    "demo": demo,
    "evaluate": evaluate,
    "export": export,
    "extract": extract,
    "finetune": finetune,
    "plan": plan,
    "predict": predict,
    "presets": presets,
    "pretrain": pretrain,
    "recipes": recipes,
    "reconstruct": reconstruct,
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return run("vivit-jax", "Video transformers in JAX: ViViT and VideoMAE.", COMMANDS, args)


if __name__ == "__main__":
    sys.exit(main())
