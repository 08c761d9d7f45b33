# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark`: how fast, in how much memory, and beside PyTorch."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from vivit_jax.benchmark import compare, fit, seeds
from vivit_jax.benchmark.intervals import LEAST
from vivit_jax.benchmark.measure import Rounds, environment
from vivit_jax.benchmark.sides import check_work, share_the_gpu
from vivit_jax.benchmark.work import Work, has_pretraining, work_of
from vivit_jax.cli.options import Dtype
from vivit_jax.config_base import REMAT_POLICIES, Attention, Remat
from vivit_jax.console import FLAT
from vivit_jax.errors import UserError, quoted
from vivit_jax.files.atomic import check_output, write_json
from vivit_jax.train.planning.memory import device_memory, parse_bytes

MODELS = ("videomae-base-kinetics400", "vivit-b-16x2-kinetics400")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What is timed, and how.

    Attributes:
        models: Names of `vivit-jax presets`.
        work: A forward pass, a fine-tuning step, or a pre-training step (VideoMAE).
        batch: Clips at a time. Default: 1, or 1, 2, 4 and 8 with --preset seeds.
        dtype: What the model computes in; params of training steps stay float32.
        attention: Backends of this library, each a row.
        remat: What a training step keeps for its backward pass, by default "dots"; --fit compares
            all three unless one is given.
        frames: Frames of a clip. Default: the model's own.
        repeats: Rounds that are timed, 5 by default. In a round every row takes two steps, and the
            rows come in a random order. With --rounds-until, the least number of rounds.
        rounds_until: Such as 3%: go on until the interval (95 %) of each ratio, or of the time
            without --against, reaches no farther than that share to either side.
        most_rounds: For --rounds-until, the largest number of rounds, 200 by default.
        seed: Seed of the order of the rows in each round.
        against: Run the same weights and inputs through transformers in the same rounds.
        variants: Rows of PyTorch: attention eager, sdpa, and torch.compile with sdpa.
        peak_memory: Run every row once more in a process of its own and report its memory.
        products: On a CPU, also time the model's matrix products alone, which bound its speed.
        peak_tflops: Nominal rate of the device in this dtype; adds the share of it (MFU).
        preset: "seeds" prints the tables of transformers' documentation with a column for this
            library: ViViT-B and VideoMAE-B at batch 1, 2, 4 and 8, eager against sdpa. Other flags
            it takes are batch, one dtype, those of rounds, and json.
        fit: Run nothing: print the memory that the work takes, and what fits into --memory.
        memory: For --fit, such as 16GiB. Default: the device's own.
        json: Also write the figures to this file, after each table. The docstring of
            Comparison.to_dict in vivit_jax/benchmark/report.py describes them.
        overwrite: Replace the file of --json.
    """

    models: tuple[str, ...] = MODELS
    work: tuple[Literal["forward", "finetune", "pretrain"], ...] = ("forward",)
    batch: tuple[int, ...] | None = None
    dtype: tuple[Dtype, ...] = ("float32",)
    attention: tuple[Attention, ...] = ("auto",)
    remat: Remat | None = None
    frames: int | None = None
    repeats: int | None = None
    rounds_until: str | None = None
    most_rounds: int | None = None
    seed: int = 0
    against: Literal["torch"] | None = None
    variants: tuple[Literal["eager", "sdpa", "compile"], ...] = ("eager", "sdpa", "compile")
    peak_memory: bool = True
    products: bool = True
    peak_tflops: float | None = None
    preset: Literal["seeds"] | None = None
    fit: bool = False
    memory: str | None = None
    json: Path | None = None
    overwrite: bool = False


_DEFAULTS = BenchmarkOptions()
_OF_ROUNDS = ("repeats", "rounds_until", "most_rounds", "seed")
_OF_FIT = ("models", "work", "batch", "dtype", "attention", "remat", "frames", "memory")


def benchmark(options: Annotated[BenchmarkOptions, FLAT]) -> int:
    """Time models on noise, and compare them with PyTorch.

    Weights are fresh. Every combination of models, work, batch and dtype is a table, whose rows
    take turns. A step of finetune or pretrain is loss, gradients and AdamW's update. With --against
    the outputs (and the gradients of a step, tensor by tensor) are compared first; where they
    differ no ratio is printed and the exit status is 1.
    """
    if options.json is not None:
        check_output(options.json, (".json",), options.overwrite, flag="--json")
    rounds = _check(options)
    if options.against or options.preset or options.peak_memory:
        share_the_gpu()
    if options.preset == "seeds":
        batches = options.batch or seeds.SEED_BATCHES
        return _print(seeds.seed_tables(batches, options.dtype[0], rounds), options.json)
    works = _works(options)
    if options.fit:
        policies = REMAT_POLICIES if options.remat is None else (options.remat,)
        return _print((Fits(work, options.memory, policies) for work in works), options.json)
    for work in works if options.against else ():
        check_work(work)
    results = (
        compare.compare(
            work,
            options.attention,
            options.variants if options.against else (),
            rounds,
            memory=options.peak_memory,
            products=options.products,
            peak_rate=options.peak_tflops and options.peak_tflops * 1e12,
        )
        for work in works
    )
    return _print(results, options.json)


def _check(options: BenchmarkOptions) -> Rounds:
    """The rounds of the flags; UserError for flags that are wrong or contradict each other."""
    if options.preset == "seeds":
        _only("--preset seeds", options, "batch", "dtype", *_OF_ROUNDS)
        if len(options.dtype) > 1:
            given = " ".join(options.dtype)
            raise UserError(f"--preset seeds takes one --dtype, got {given}")
    elif options.fit:
        _only("--fit", options, *_OF_FIT)
    elif options.memory is not None:
        raise UserError(f"--memory {options.memory} is for --fit; pass --fit too")
    if options.variants != _DEFAULTS.variants and not options.against:
        raise UserError("--variants is for --against torch; pass --against torch too")
    for flag in ("models", "work", "dtype", "attention", "variants", "batch"):
        values = getattr(options, flag)
        if values is not None and (not values or len(set(values)) < len(values)):
            raise UserError(f"--{flag} must be one value or several different ones, got {values}")
    rounds = _rounds(options)
    peak = options.peak_tflops
    if peak is not None and not 0 < peak < math.inf:
        raise UserError(f"--peak-tflops must be above 0, got {peak:g}")
    if peak is not None and len(options.dtype) > 1:
        given = " ".join(options.dtype)
        raise UserError(f"--peak-tflops is the rate of one --dtype, got {given}")
    return rounds


def _works(options: BenchmarkOptions) -> list[Work]:
    """Every combination of the flags; ViViT models have no pre-training."""
    pairs = [(name, kind) for name in options.models for kind in options.work]
    idle = [(n, kind) for n, kind in pairs if kind == "pretrain" and not has_pretraining(n)]
    if idle == pairs:
        idle = []  # `work_of` refuses them
    for name, _ in idle:
        print(f"{name} has no masked pre-training and is left out of it", file=sys.stderr)
    # `compare` makes a row of each attention, in one work.
    attentions = options.attention if options.fit else options.attention[:1]
    return [
        work_of(
            name,
            kind,
            batch,
            frames=options.frames,
            dtype=dtype,
            attention=attention,
            remat=options.remat or "dots",
        )
        for name, kind in pairs
        if (name, kind) not in idle
        for batch in options.batch or (1,)
        for dtype in options.dtype
        for attention in attentions
    ]


def _rounds(options: BenchmarkOptions) -> Rounds:
    """The `Rounds` of the flags. Raises UserError."""
    least = Rounds.least if options.repeats is None else options.repeats
    until, most, seed = options.rounds_until, options.most_rounds, options.seed
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


def _only(mode: str, options: BenchmarkOptions, *flags: str) -> None:
    """Raise UserError for a flag that the mode would ignore."""
    known = {*flags, "preset", "json", "overwrite"} | ({"fit"} if mode == "--fit" else set())
    for name, value in vars(options).items():
        if name not in known and value != getattr(_DEFAULTS, name):
            allowed = ", ".join(f"--{flag}".replace("_", "-") for flag in flags)
            name = name.replace("_", "-")
            raise UserError(f"{mode} has no use for --{name}; it takes {allowed} and --json")


class Result(Protocol):
    """A table to print."""

    @property
    def agrees(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...


class Fits:
    """A work's memory under each remat policy, as a result to print."""

    agrees = True

    def __init__(self, work: Work, memory: str | None, policies: Sequence[str]):
        available = device_memory() if memory is None else parse_bytes(memory)
        if available is None:
            raise UserError("the memory of the device is unknown; pass --memory, such as 16GiB")
        self.work, self.memory = work, available
        print(f"compiling {work.name} {work.kind} for its analysis ...", file=sys.stderr)
        self.rows = fit.alternatives(work, available, policies)

    def __str__(self) -> str:
        return fit.table(self.rows, self.memory)

    def to_dict(self) -> dict[str, Any]:
        """The work, the available memory and the rows as plain values."""
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


def _print(results: Iterable[Result], json: Path | None) -> int:
    """Print each result as soon as it is known; 1 if the sides of one disagree."""
    where = environment()
    print(where.line)
    agree, values = True, dataclasses.asdict(where) | {"results": list[dict[str, Any]]()}
    for result in results:
        print(f"\n{result}", flush=True)
        agree = agree and result.agrees
        values["results"].append(result.to_dict())
        if json is not None:  # each time, in case the next result fails
            write_json(json, values)
    return 0 if agree else 1
