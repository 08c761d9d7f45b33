# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark`: how fast, in how much memory, and beside PyTorch."""

import dataclasses
import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vivit_jax.benchmark import compare, fit, seeds
from vivit_jax.benchmark.intervals import LEAST
from vivit_jax.benchmark.measure import Rounds, environment
from vivit_jax.benchmark.sides import check_work, share_the_gpu
from vivit_jax.benchmark.work import has_pretraining, work_of
from vivit_jax.config_base import REMAT_POLICIES
from vivit_jax.errors import UserError, quoted
from vivit_jax.files.atomic import check_output, write_json

MODELS = ("videomae-base-kinetics400", "vivit-b-16x2-kinetics400")
_OF_ROUNDS = ("repeats", "rounds_until", "most_rounds", "seed")


def benchmark(
    *,
    models: tuple[str, ...] = MODELS,
    work: tuple[Literal["forward", "finetune", "pretrain"], ...] = ("forward",),
    batch: tuple[int, ...] | None = None,
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",),
    attention: tuple[Literal["auto", "xla", "cudnn", "chunked", "pallas"], ...] = ("auto",),
    remat: Literal["none", "dots", "block"] | None = None,
    frames: int | None = None,
    repeats: int | None = None,
    rounds_until: str | None = None,
    most_rounds: int | None = None,
    seed: int = 0,
    against: Literal["torch"] | None = None,
    variants: tuple[Literal["eager", "sdpa", "compile"], ...] = ("eager", "sdpa", "compile"),
    peak_memory: bool = True,
    products: bool = True,
    peak_tflops: float | None = None,
    preset: Literal["seeds"] | None = None,
    fit: bool = False,
    memory: str | None = None,
    json: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Time models on noise, with fresh weights: time, rate, memory, and the ratio to PyTorch.

    Every combination of models, work, batch and dtype is a table of its own, whose rows take
    turns. A step of finetune or pretrain is loss, gradients and AdamW's update. With --against the
    outputs are compared first (and the gradients of a step, tensor by tensor); where they differ no
    ratio is printed and the exit status is 1.

    Args:
        models: Names of `vivit-jax presets`.
        work: What is done: a forward pass, a fine-tuning step, a pre-training step (VideoMAE).
        batch: Clips at a time; 1 by default, with --preset seeds 1, 2, 4 and 8.
        dtype: Of the computation; params of training steps stay float32.
        attention: Backends of this library, each a row.
        remat: What a training step keeps for its backward pass, "dots" by default; --fit compares
            all three unless one is given.
        frames: Frames of a clip, the model's own by default.
        repeats: Rounds that are timed, 5 by default; in a round every row takes two steps, and the
            rows come in an order drawn for it. With --rounds-until the least number of them.
        rounds_until: Such as 3%: rounds go on until the interval (95 %) of each ratio, or without
            --against of the time, reaches no farther than that share to either side.
        most_rounds: For --rounds-until: where it ends at the latest, 200 by default.
        seed: Of the order of the rows in each round.
        against: The same weights and inputs through transformers, in the same rounds.
        variants: Rows of PyTorch: attention eager, sdpa, and torch.compile with sdpa.
        peak_memory: Run every row once more in a process of its own and report its memory.
        products: On a CPU also time the model's matrix products alone, what bounds it there.
        peak_tflops: What the device is sold for in this dtype; adds the share of it (MFU).
        preset: "seeds" prints the tables of transformers' documentation, ViViT-B and VideoMAE-B at
            batch 1, 2, 4 and 8, eager against sdpa, with this library's column. Of the other
            flags it takes batch, one dtype, those of rounds and json.
        fit: Do not run: print what memory the work takes, and what fits into --memory.
        memory: For --fit, such as 16GiB; the device's own by default.
        json: Also write the figures to this file, after each table; what they are is told in the
            docstring of Comparison.to_dict in vivit_jax/benchmark/report.py.
        overwrite: Replace the file of --json.
    """
    given = locals()

    if json is not None:
        check_output(json, (".json",), overwrite, flag="--json")
    if preset == "seeds":
        _only("--preset seeds", given, "batch", "dtype", *_OF_ROUNDS)
        if len(dtype) > 1:
            raise UserError(f"--preset seeds takes one --dtype, got {' '.join(dtype)}")
    elif fit:
        of_work = ("models", "work", "batch", "dtype", "attention", "remat", "frames")
        _only("--fit", given, *of_work, "memory")
    elif memory is not None:
        raise UserError(f"--memory {memory} is for --fit; pass --fit too")
    if variants != _DEFAULTS["variants"] and not against:
        raise UserError("--variants is for --against torch; pass --against torch too")
    if against or preset or peak_memory:
        share_the_gpu()

    lists = dict(models=models, work=work, dtype=dtype, attention=attention, variants=variants)
    for flag, values in (lists | ({} if batch is None else {"batch": batch})).items():
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{flag} must be one value or several different ones, got {values}")
    rounds = _rounds(repeats, rounds_until, most_rounds, seed)
    if peak_tflops is not None and not 0 < peak_tflops < math.inf:
        raise UserError(f"--peak-tflops must be above 0, got {peak_tflops:g}")
    if peak_tflops is not None and len(dtype) > 1:
        raise UserError(f"--peak-tflops is that of one --dtype, got {' '.join(dtype)}")
    if preset == "seeds":
        return _print(seeds.seed_tables(batch or seeds.SEED_BATCHES, dtype[0], rounds), json)
    pairs = [(name, kind) for name in models for kind in work]
    idle = [pair for pair in pairs if pair[1] == "pretrain" and not has_pretraining(pair[0])]
    if idle == pairs:
        idle = []  # for `work_of` to refuse
    for name, _ in idle:
        print(f"{name} has no masked pre-training and sits it out", file=sys.stderr)
    options = dict(frames=frames, remat=remat or "dots")
    works = [
        work_of(name, kind, size, dtype=number, attention=backend, **options)
        for name, kind in pairs
        if (name, kind) not in idle
        for size in batch or (1,)
        for number in dtype
        for backend in (attention if fit else attention[:1])  # `compare` makes a row of each
    ]
    if fit:
        policies = REMAT_POLICIES if remat is None else (remat,)
        return _print((Fits(each, memory, policies) for each in works), json)
    for each in works if against else ():
        check_work(each)
    rows = variants if against else ()
    options = dict(memory=peak_memory, products=products)
    options |= dict(peak_rate=peak_tflops and peak_tflops * 1e12)
    return _print(
        (compare.compare(each, attention, rows, rounds, **options) for each in works), json
    )


_DEFAULTS = {name: value.default for name, value in inspect.signature(benchmark).parameters.items()}


def _rounds(least: int | None, until: str | None, most: int | None, seed: int):
    """The `Rounds` of the flags; UserError for what no rounds can be."""
    least = Rounds.least if least is None else least
    if least < 1:
        raise UserError(f"--repeats must be at least 1, got {least}")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, got {seed}")
    if until is None and most is not None:
        raise UserError(f"--most-rounds {most} is for --rounds-until; pass --rounds-until too")
    if until is None:
        return Rounds(least, seed=seed)
    share = _share(until)
    most = max(least, Rounds.most) if most is None else most
    if most < max(least, LEAST):
        raise UserError(
            f"--most-rounds must be at least {max(least, LEAST)}, got {most}: an interval takes "
            f"{LEAST} rounds, and --repeats is {least}"
        )
    return Rounds(least, share, most, seed)


def _share(text: str) -> float:
    """A share from a text such as "3%"."""
    number, sign, rest = text.strip().partition("%")
    try:
        share = float(number) / 100 if sign and not rest else math.nan
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UserError(
            "--rounds-until must be a share above 0% and below 100%, such as 3%, "
            f"got {quoted(text)}"
        )
    return share


def _only(mode: str, given: dict, *flags: str) -> None:
    """UserError where a flag was given that the mode would ignore."""
    known = {*flags, "preset", "fit", "json", "overwrite"} - (
        {"fit"} if "preset" in mode else set()
    )
    for name, default in _DEFAULTS.items():
        if name not in known and given[name] != default:
            allowed = ", ".join(f"--{flag}".replace("_", "-") for flag in flags)
            name = name.replace("_", "-")
            raise UserError(f"{mode} has no use for --{name}; it takes {allowed} and --json")


class Fits:
    """A work's memory under each remat policy, as a result to print."""

    agrees = True

    def __init__(self, work, memory: str | None, policies: Sequence[str]):

        available = fit.device_memory() if memory is None else fit.parse_bytes(memory)
        if available is None:
            raise UserError("the device does not tell its memory; pass --memory, such as 16GiB")
        self.work, self.memory = work, available
        print(f"compiling {work.name} {work.kind} for its analysis ...", file=sys.stderr)
        self.rows = fit.alternatives(work, available, policies)

    def __str__(self) -> str:

        return fit.table(self.rows, self.memory)

    def to_dict(self) -> dict:
        """The work, the memory at hand and the rows as plain values."""
        return {
            "model": self.work.name,
            "work": self.work.kind,
            "batch": self.work.batch,
            "frames": self.work.config.num_frames,
            "dtype": self.work.config.dtype,
            "attention": self.work.config.attention,
            "memory": self.memory,
            "reserve": fit.RESERVE,
            "rows": [dataclasses.asdict(row) | {"total": row.memory.total} for row in self.rows],
        }


def _print(results, json: Path | None) -> int:
    """Print each result as soon as it is there; 1 if the sides of one disagree."""
    where = environment()
    print(where.line)
    agree, values = True, dataclasses.asdict(where) | {"results": []}
    for result in results:
        print(f"\n{result}", flush=True)
        agree = agree and result.agrees
        values["results"].append(result.to_dict())
        if json is not None:  # so that what was measured is kept if the next cannot be
            write_json(json, values)
    return 0 if agree else 1
