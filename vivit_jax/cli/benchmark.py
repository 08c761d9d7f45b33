# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark`: how fast, in how much memory, and beside PyTorch."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from vivit_jax.errors import UserError


def benchmark(
    *,
    models: tuple[str, ...] = ("videomae-base-kinetics400", "vivit-b-16x2-kinetics400"),
    work: tuple[Literal["forward", "finetune", "pretrain"], ...] = ("forward",),
    batch: tuple[int, ...] = (1,),
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",),
    attention: tuple[Literal["auto", "xla", "cudnn", "chunked"], ...] = ("auto",),
    remat: Literal["none", "dots", "block"] = "dots",
    frames: int | None = None,
    repeats: int = 5,
    against: Literal["torch"] | None = None,
    variants: tuple[Literal["eager", "sdpa", "compile"], ...] = ("eager", "sdpa", "compile"),
    peak_memory: bool = True,
    products: bool = True,
    preset: Literal["seeds"] | None = None,
    fit: bool = False,
    memory: str | None = None,
    json: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Time models on noise, with fresh weights: time, rate, memory, and the ratio to PyTorch.

    Every combination of models, work, batch and dtype is a table of its own, whose rows take
    turns. A step of finetune or pretrain is loss, gradients and AdamW's update. With --against the
    outputs are compared first (and the gradients of a step); where they differ no ratio is printed
    and the exit status is 1.

    Args:
        models: Names of `vivit-jax presets`.
        work: What is done: a forward pass, a fine-tuning step, a pre-training step (VideoMAE).
        batch: Clips at a time.
        dtype: Of the computation; params of training steps stay float32.
        attention: Backends of this library, each a row.
        remat: What a training step keeps for its backward pass.
        frames: Frames of a clip, the model's own by default.
        repeats: Rounds that are timed, after a first step of every row.
        against: The same weights and inputs through transformers, in the same rounds.
        variants: Rows of PyTorch: attention eager, sdpa, and torch.compile with sdpa.
        peak_memory: Run every row once more in a process of its own and report its memory.
        products: Also time the model's matrix products alone, what bounds it on this machine.
        preset: "seeds" prints the tables of transformers' documentation, ViViT-B and VideoMAE-B at
            batch 1, 2, 4 and 8, eager against sdpa, with this library's column; of the other
            flags only dtype, batch, repeats and json count.
        fit: Do not run: print what memory the work takes, and what fits into --memory.
        memory: For --fit, such as 16GiB; the device's own by default.
        json: Also write the figures to this file.
        overwrite: Replace the file of --json.
    """
    from vivit_jax.benchmark.sides import check_work, share_the_gpu
    from vivit_jax.cli.output import check_output

    if json is not None:
        check_output(json, (".json",), overwrite, flag="--json")
    if against or preset or peak_memory:
        share_the_gpu()
    from vivit_jax.benchmark import report
    from vivit_jax.benchmark.work import has_pretraining, work_of

    lists = dict(models=models, work=work, batch=batch, dtype=dtype)
    lists |= dict(attention=attention, variants=variants)
    for flag, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{flag} must be one value or several different ones, got {values}")
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}")
    if memory is not None and not fit:
        raise UserError(f"--memory {memory} is for --fit; pass --fit too")
    if preset == "seeds":
        if fit:
            raise UserError("--preset seeds measures, --fit does not run: pass one of them")
        sizes = report.SEED_BATCHES if batch == (1,) else batch
        return _print(report.seed_tables(sizes, dtype[0], repeats), json)
    pairs = [(name, kind) for name in models for kind in work]
    idle = [pair for pair in pairs if pair[1] == "pretrain" and not has_pretraining(pair[0])]
    if idle == pairs:
        raise UserError(
            f"--work pretrain needs a VideoMAE, got {list(models)}: ViViTs, which have no masked "
            "pre-training; use forward or finetune"
        )
    for name, _ in idle:
        print(f"{name} has no masked pre-training and sits it out", file=sys.stderr)
    works = [
        work_of(name, kind, size, frames=frames, dtype=number, attention=backend, remat=remat)
        for name, kind in pairs
        if (name, kind) not in idle
        for size in batch
        for number in dtype
        for backend in (attention if fit else attention[:1])  # `compare` makes a row of each
    ]
    if fit:
        return _print((Fits(each, memory) for each in works), json)
    for each in works if against else ():
        check_work(each)
    rows = variants if against else ()
    options = dict(memory=peak_memory, products=products)
    return _print(
        (report.compare(each, attention, rows, repeats, **options) for each in works), json
    )


class Fits:
    """A work's memory under each remat policy, as a result to print."""

    agrees = True

    def __init__(self, work, memory: str | None):
        from vivit_jax.benchmark import fit

        available = fit.device_memory() if memory is None else fit.parse_bytes(memory)
        if available is None:
            raise UserError("the device does not tell its memory; pass --memory, such as 16GiB")
        self.work, self.memory = work, available
        print(f"compiling {work.name} {work.kind} for its analysis ...", file=sys.stderr)
        self.rows = fit.alternatives(work, available)

    def __str__(self) -> str:
        from vivit_jax.benchmark import fit

        return fit.table(self.rows, self.memory)

    def to_dict(self) -> dict:
        """The work, the memory at hand and the rows as plain values."""
        return {
            "model": self.work.name,
            "work": self.work.kind,
            "batch": self.work.batch,
            "frames": self.work.config.num_frames,
            "dtype": self.work.config.dtype,
            "memory": self.memory,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


def _print(results, json: Path | None) -> int:
    """Print each result as soon as it is there; 1 if the sides of one disagree."""
    from vivit_jax.benchmark.environment import environment
    from vivit_jax.cli.output import write_json

    where = environment()
    print(where.line)
    done = []
    for result in results:
        print(f"\n{result}", flush=True)
        done.append(result)
    if json is not None:
        values = dataclasses.asdict(where) | {"results": [result.to_dict() for result in done]}
        write_json(json, values)
    return 0 if all(result.agrees for result in done) else 1
