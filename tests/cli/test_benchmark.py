# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax benchmark`: every figure, and no ratio of different functions."""

import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from vivit_jax.benchmark import compare, fit, memory, products, report, seeds, sides, work
from vivit_jax.benchmark.busy import STAT, Busy
from vivit_jax.benchmark.measure import Measured, Rounds, Timing
from vivit_jax.benchmark.memory import Peak
from vivit_jax.benchmark.products import ProductsAlone
from vivit_jax.benchmark.sides import JaxSide, TorchSide
from vivit_jax.benchmark.work import inputs_of, work_of
from vivit_jax.cli.__main__ import main
from vivit_jax.config_base import REMAT_POLICIES
from vivit_jax.errors import UserError
from vivit_jax.layers import attention as attention_module

SMALL = "videomae-small-kinetics400"
# Two frames are 196 tokens: a second on any machine.
QUICK = ("benchmark", "--models", SMALL, "--frames", "2", "--repeats", "2")
VIVITS = ("vivit-b-16x2-kinetics400", "vivit-b-16x2-fe-kinetics400")
ALONE = ("--no-peak-memory", "--no-products")
TORCH = ("--against", "torch", "--variants", "sdpa")


@pytest.fixture(autouse=True)
def tiny(request, monkeypatch):
    """A tiny model under a preset's name; another process knows the real preset only."""
    if request.function is test_every_figure_is_there:
        return
    preset = work.PRESETS[SMALL]
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    decoder = dict(decoder_hidden_size=24, decoder_num_attention_heads=2)
    decoder |= dict(decoder_intermediate_size=32, decoder_num_hidden_layers=1)
    config = dataclasses.replace(preset.config, image_size=64, **sizes, **decoder)
    changed = {**work.PRESETS, SMALL: dataclasses.replace(preset, config=config)}
    monkeypatch.setattr(work, "PRESETS", changed)
    square, dimensions = ((64, 64), "float32"), (((1,), (0,)), ((), ()))
    small = products.Counter({(square, square, dimensions, None, "float32", False): 1})
    monkeypatch.setattr(compare, "large_product", lambda _: ProductsAlone(small, "large"))


@pytest.mark.alone
def test_every_figure_is_there(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main([*QUICK, *TORCH, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    figures = json.loads(path.read_text())
    assert figures["versions"]["jax"] == jax.__version__ and figures["cores"] > 0
    (result,) = figures["results"]
    assert result["flops"] == work_of(SMALL, frames=2).flops()
    assert result["products_seconds"] > 0 and "this work's products alone" in printed
    ours, theirs = result["rows"]
    assert result["products_ratio"] > 0.5 and result["product_flops_per_second"] > 1e9
    assert (ours["name"], theirs["name"]) == ("vivit_jax", "torch sdpa")
    weights = 4 * 21_900_000
    for row in (ours, theirs):
        assert len(row["timing"]["seconds"]) == 2 and row["median_seconds"] > 0
        assert row["clips_per_second"] == pytest.approx(1 / row["median_seconds"])
        # The weights are in memory, a few times at most.
        assert weights < row["peak"]["step"] <= row["peak"]["whole"] < 6 * weights
    assert ours["compilation"]["seconds"] > 0 and not ours["compilation"]["cached"]
    assert ours["ratio"] is None and theirs["compilation"] is None
    rounds = [ours["timing"]["seconds"], theirs["timing"]["seconds"]]
    assert theirs["ratio"] == pytest.approx(np.median(np.divide(*rounds)))
    assert theirs["ratio_least"] == pytest.approx(min(rounds[0]) / min(rounds[1]))
    assert theirs["ratio_interval"] is None and ours["median_interval"] is None  # of two rounds
    assert theirs["memory_ratio"] == ours["peak"]["step"] / theirs["peak"]["step"]
    parts = [ours["compilation"][f"{part}_seconds"] for part in ("trace", "lower", "xla")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(ours["compilation"]["seconds"])
    assert result["rounds"]["done"] == 2 and result["busy"]["timed"] == 2
    found = theirs["agreement"]["distance"]["output"]
    assert theirs["agrees"] and 0 < found < 5e-6  # measured 4.2e-7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_steps_agree_in_loss_and_in_every_gradient(kind, tmp_path):
    path = tmp_path / "figures.json"
    arguments = [*QUICK, *TORCH, *ALONE, "--work", kind, "--batch", "2", "--json", str(path)]
    assert main(arguments) == 0
    (result,) = json.loads(path.read_text())["results"]
    found = result["rows"][1]["agreement"]["distance"]
    assert found["output"] < 1e-6  # measured 1.0e-7
    assert 0 < found["gradient"] < 2e-5  # measured 3.4e-6


def test_no_ratio_where_outputs_differ(monkeypatch, capsys):
    warm_up = TorchSide.warm_up
    monkeypatch.setattr(TorchSide, "warm_up", lambda side: warm_up(side) * 1.01)
    assert main([*QUICK, *TORCH, *ALONE]) == 1
    (_, row) = [line for line in capsys.readouterr().out.splitlines() if "torch sdpa" in line]
    assert "DIFFERS" in row and "1e-02" in row


@pytest.mark.slow
def test_no_ratio_where_the_smallest_gradient_differs(monkeypatch, capsys):
    moments = JaxSide.moments

    def wrong(side):
        found = moments(side)
        # The gradient of the key bias is 0 but for rounding.
        told = [name for name in found if not name.endswith("key.bias")]
        least = min(told, key=lambda name: np.linalg.norm(found[name]))
        return found | {least: -found[least]}

    monkeypatch.setattr(JaxSide, "moments", wrong)
    assert main([*QUICK, *TORCH, *ALONE, "--work", "finetune"]) == 1
    (_, row) = [line for line in capsys.readouterr().out.splitlines() if "torch sdpa" in line]
    assert "DIFFERS" in row and "gradient 2e+00" in row


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("forward", "float32"),
        ("forward", "float16"),
        ("finetune", "bfloat16"),
    ],
)
@pytest.mark.slow
def test_no_ratio_where_scores_are_a_tenth_too_small(kind, dtype, monkeypatch, capsys):
    case = [*QUICK, *TORCH, *ALONE, "--work", kind, "--dtype", dtype, "--repeats", "1"]
    with jax.default_matmul_precision(None):
        assert main(case) == 0
    assert "DIFFERS" not in capsys.readouterr().out
    attention = attention_module.attention

    def wrong(q, k, v, **options):
        # But not in the float32 reference of half precision.
        is_side = q.dtype == dtype and jax.config.jax_default_matmul_precision != "highest"
        return attention(q * 0.9 if is_side else q, k, v, **options)

    monkeypatch.setattr(attention_module, "attention", wrong)
    with jax.default_matmul_precision(None):
        assert main(case) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_a_variant_that_cannot_run_is_named_and_left_out(monkeypatch, capsys):
    warm_up = TorchSide.warm_up

    def broken(side):
        if side.variant == "compile":
            raise RuntimeError("no C++ compiler\nsecond line")
        return warm_up(side)

    monkeypatch.setattr(TorchSide, "warm_up", broken)
    assert main([*QUICK, *TORCH, "compile", *ALONE]) == 0
    out = capsys.readouterr().out
    assert "torch compile did not run: RuntimeError: no C++ compiler" in out
    assert "second line" not in out and "torch sdpa" in out


def test_backends_of_ours_are_rows_of_one_table(capsys):
    assert main([*QUICK, *ALONE, "--attention", "chunked", "xla"]) == 0
    out = capsys.readouterr().out
    assert "vivit_jax chunked" in out and "vivit_jax xla" in out and "DIFFERS" not in out


@pytest.mark.slow
def test_the_tables_of_the_documentation(monkeypatch, capsys):
    monkeypatch.setattr(seeds, "work_of", lambda _, *args, **kw: work_of(SMALL, *args, frames=2))
    monkeypatch.setattr(compare, "peak_memory", lambda *_: Peak(2**20, 2**21))
    assert main(["benchmark", "--preset", "seeds", "--batch", "2", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    titles = ["ViViT-B, one training step", "ViViT-B, inference", "VideoMAE-B, inference"]
    assert [line for title in titles for line in out.splitlines() if line.startswith(title)] == [
        f"{title}, float32" for title in titles
    ]
    rows = [line.split() for line in out.splitlines() if line[:1].isdigit()]
    assert [row[0] for row in rows] == ["2", "2", "2"]
    assert all(len(row) == 11 for row in rows)


@pytest.mark.slow
def test_a_side_that_cannot_run_leaves_its_row_of_the_table_empty(monkeypatch, capsys):
    monkeypatch.setattr(seeds, "work_of", lambda _, *args, **kw: work_of(SMALL, *args, frames=2))
    monkeypatch.setattr(compare, "peak_memory", lambda *_: Peak(2**20, 2**21))

    def broken(side):
        raise MemoryError("not enough")

    monkeypatch.setattr(TorchSide, "warm_up", broken)
    assert main(["benchmark", "--preset", "seeds", "--batch", "2", "--repeats", "1"]) == 1
    out = capsys.readouterr().out
    assert out.count("torch eager did not run: MemoryError: not enough") == 3
    assert len([line for line in out.splitlines() if line.split() == ["2", *10 * "-"]]) == 3


@pytest.mark.slow
def test_what_fits_is_said_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(JaxSide, "warm_up", None)
    # The search for it is tests/benchmark/test_memory_fit.py's.
    monkeypatch.setattr(fit, "largest_batch", lambda work, memory: 17)
    path = tmp_path / "fit.json"
    command = ["benchmark", "--models", SMALL, "--frames", "2", "--work", "finetune", "--fit"]
    command += ["--json", str(path)]
    assert main([*command, "--memory", "1MiB"]) == 0
    assert "yes" not in capsys.readouterr().out
    assert main([*command, "--memory", "44MiB", "--overwrite"]) == 0
    printed = capsys.readouterr().out.partition("remat")[2]
    assert " no " not in printed and printed.count("17\n") == 3
    (result,) = json.loads(path.read_text())["results"]
    assert result["memory"] == 44 * 2**20 and all(row["fits"] for row in result["rows"])


def test_what_fits_with_each_attention(monkeypatch, capsys):
    monkeypatch.setattr(fit, "largest_batch", lambda work, memory: 17)
    asked = []
    found = fit.Memory(1, 1, 1, 3, 2, 2, 4, 0)
    monkeypatch.setattr(fit, "memory_of", lambda work: asked.append(work) or found)
    models = ("--models", SMALL, "vivit-b-16x2-kinetics400", "--frames", "2", "--work", "pretrain")
    assert main(["benchmark", *models, "--fit", "--attention", "chunked", "xla"]) == 0
    printed = capsys.readouterr()
    tables = [line for line in printed.out.splitlines() if " pretrain, batch 1" in line]
    assert ["attention chunked" in tables[0], "attention xla" in tables[1]] == [True, True]
    assert len(tables) == 2
    assert {(w.config.attention, w.config.remat) for w in asked} == {
        (attention, remat) for attention in ("chunked", "xla") for remat in REMAT_POLICIES
    }
    assert (
        "vivit-b-16x2-kinetics400 has no masked pre-training and is left out of it" in printed.err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "vivit-c"], "there is no preset 'vivit-c'"),
        (["--models", "vivit-b-16x2-kinetics400", "--work", "pretrain"], "needs a VideoMAE"),
        (["--work", "pretrain", "--models", *VIVITS], "a ViViT, which has no masked"),
        (["--models", SMALL, SMALL], "--models must be one value or several different ones"),
        (["--batch"], "--batch must be one value or several different ones, got ()"),
        (["--frames", "0"], "num_frames"),
        (["--models", "vivit-b-16x2-fe-kinetics400", *TORCH], "transformers does not have"),
        (["--models", "videomae-v2-base", "--work", "pretrain", *TORCH], "no dual masks"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--rounds-until", "0%"], "below 100%, such as 3%, got 0%"),
        (["--rounds-until", "300%"], "below 100%, such as 3%, got 300%"),
        (["--rounds-until=-3%"], "below 100%, such as 3%, got -3%"),
        (["--rounds-until", "abc"], "below 100%, such as 3%, got abc"),
        (["--rounds-until", "3"], "below 100%, such as 3%, got 3"),
        (["--rounds-until", "nan%"], "below 100%, such as 3%, got nan%"),
        (["--rounds-until", "3%", "--most-rounds", "4"], "--most-rounds must be at least 5, got 4"),
        (["--most-rounds", "9"], "--most-rounds 9 is for --rounds-until"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--fit", "--most-rounds", "9"], "--fit has no use for --most-rounds"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--memory", "1GiB"], "pass --fit too"),
        (["--fit", "--memory", "much"], "got 'much'"),
        (["--preset", "seeds", "--fit"], "--preset seeds has no use for --fit"),
        (["--preset", "seeds", "--models", SMALL], "--preset seeds has no use for --models"),
        (["--preset", "seeds", "--dtype"], "--dtype must be one value or several"),
        (["--preset", "seeds", "--dtype", "float32", "bfloat16"], "takes one --dtype"),
        (["--fit", *TORCH], "--fit has no use for --against"),
        (["--fit", "--repeats", "3"], "--fit has no use for --repeats; it takes --models"),
        (["--variants", "sdpa"], "pass --against torch too"),
        (["--peak-tflops", "9", "--dtype", "float32", "bfloat16"], "is the rate of one --dtype"),
        (["--peak-tflops", "0"], "--peak-tflops must be above 0, got 0"),
        (["--json", "no/such/file.json"], "--json no/such/file.json"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, capsys):
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_compiled_programs_are_kept_on_request(tmp_path, capsys, monkeypatch):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    command = ["--compilation-cache", str(tmp_path / "cache"), *QUICK, *ALONE]
    compilation_cache.reset_cache()
    try:
        assert main(command) == 0
        kept = {path.name for path in (tmp_path / "cache").iterdir()}
        assert kept and "(cache)" not in capsys.readouterr().out
        assert main(command) == 0
        assert {path.name for path in (tmp_path / "cache").iterdir()} == kept
        assert "(cache)" in capsys.readouterr().out
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # jax keeps the first directory it was given
    assert main(["--compilation-cache"]) == 2
    assert "needs a directory" in capsys.readouterr().err


def test_what_was_measured_is_kept_when_the_next_cannot_be(tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.json"
    measured = compare.compare

    def full(work, *args, **options):
        if work.batch == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9\nmore")
        return measured(work, *args, **options)

    monkeypatch.setattr(compare, "compare", full)
    assert main([*QUICK, *ALONE, "--batch", "1", "2", "--json", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.endswith("not enough memory: RESOURCE_EXHAUSTED: Out of memory allocating 9\n")
    assert [result["batch"] for result in json.loads(path.read_text())["results"]] == [1]


def test_the_share_of_what_a_device_is_sold_for(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert main([*QUICK, *ALONE, "--peak-tflops", "2", "--json", str(path)]) == 0
    assert "MFU" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())["results"]
    (row,) = result["rows"]
    assert row["mfu"] == pytest.approx(result["flops"] / row["median_seconds"] / 2e12)


@pytest.mark.slow
def test_why_memory_could_not_be_measured(tmp_path, monkeypatch):
    """The process's own message, not the last of JAX's notes."""
    case = work_of("videomae-small-kinetics400", frames=2)
    with pytest.raises(UserError, match=f"memory of vivit_jax failed: .*{tmp_path}"):
        memory.peak_memory(case, "vivit_jax", tmp_path / "nothing")
    killed = lambda *_, **__: subprocess.CompletedProcess("", -9, "", "")  # noqa: E731
    monkeypatch.setattr(subprocess, "run", killed)
    with pytest.raises(UserError, match="ended by SIGKILL, as a system out of memory does"):
        memory.peak_memory(case, "vivit_jax", tmp_path)


def test_inputs_are_the_same_for_every_side():
    case = work_of(SMALL, "pretrain", 2, frames=2)
    first, second = inputs_of(case), inputs_of(case)
    np.testing.assert_array_equal(first["pixel_values"], second["pixel_values"])
    np.testing.assert_array_equal(first["mask"].visible, second["mask"].visible)


def test_products_that_take_no_longer_than_calling_them_bound_nothing():
    case = work_of(SMALL, frames=2)
    row = report.Row("vivit_jax", Timing((1.0, 1.0)), None, None, None)
    for seconds, expected in (((0.0, 0.5), None), ((0.5, 0.5), 2)):
        found = report.Comparison(case, (row,), 1e9, Timing(seconds))
        assert found.over_products == expected and str(found)


def test_without_its_memory_a_side_is_timed_all_the_same(monkeypatch, capsys):
    def fails(*_):
        raise UserError("measuring the memory of vivit_jax failed: no /proc")

    monkeypatch.setattr(compare, "peak_memory", fails)
    assert main([*QUICK, "--no-products"]) == 1
    out = capsys.readouterr().out
    assert "failed: no /proc; --no-peak-memory leaves it out" in out and "\nvivit_jax " in out


def measured_as(monkeypatch, busy=None, **seconds):
    """Rounds of made-up times; returns the `Rounds` that each comparison requested."""
    asked = []

    def alternate(sides, rounds, reach):
        asked.append(rounds)
        times = {side.name: Timing(tuple(seconds.get(side.name, (1.0,) * 8))) for side in sides}
        return Measured(times, reach(times), busy)

    monkeypatch.setattr(compare, "alternate", alternate)
    return asked


def test_a_table_of_known_times(monkeypatch, capsys, tmp_path):
    path = tmp_path / "figures.json"
    theirs = {"torch sdpa": (2.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0)}
    busy = Busy(STAT, 0.05, 2, 0.25, 0.125, (2, 4, 5), 8)
    asked = measured_as(monkeypatch, busy, **theirs)
    monkeypatch.setattr(
        compare, "peak_memory", lambda _, side, __: Peak(3 if side == "vivit_jax" else 4, 9)
    )
    options = ["--repeats", "8", "--rounds-until", "2.5%", "--seed", "7", "--json", str(path)]
    assert main([*QUICK[:-2], *TORCH, "--no-products", *options]) == 0
    assert asked == [Rounds(8, 0.025, 200, 7)]
    out = capsys.readouterr().out
    row = [line.split() for line in out.splitlines() if line.startswith("torch sdpa")][1]
    assert row[2:6] == ["0.500", "0.500-0.500", "1.000", "0.750"]
    assert "8 rounds, each in an order of its own (seed 7), to +-2.5% of the median" in out
    assert "others took 25% of the time of 2 cores (/proc/stat, steal 12%)" in out
    assert "over 5% in 3 of 8 rounds: 2, 4-5\n" in out and "--most-rounds" not in out
    assert max(map(len, out.partition("\n\n")[2].splitlines())) <= 120
    (result,) = json.loads(path.read_text())["results"]
    _, row = result["rows"]
    assert (row["ratio"], row["ratio_interval"], row["ratio_least"]) == (0.5, [0.5, 0.5], 1.0)
    assert row["memory_ratio"] == 0.75 and row["least_seconds"] == 1.0
    assert result["rounds"] == {
        **{"done": 8, "seed": 7, "least": 8, "until": 0.025, "most": 200},
        **{"reach": 0.0, "narrow": True},
    }
    assert result["busy"]["rounds"] == [2, 4, 5] and result["busy"]["told"]


def test_a_quiet_machine_gives_no_warning_and_an_end_by_the_ceiling_does(monkeypatch, capsys):
    uneven = (1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0)
    measured_as(monkeypatch, Busy(STAT, 0.05, 2, 0.01, 0.0, (), 8), vivit_jax=uneven)
    assert main([*QUICK, *ALONE, "--rounds-until", "5%", "--most-rounds", "8"]) == 0
    out = capsys.readouterr().out
    assert "busy" not in out
    assert "to +-5% of the median at 95 %: +-33.33%; ended by --most-rounds 8" in out


def test_rounds_watch_the_ratios_of_the_table(monkeypatch):
    class Agrees:
        def __init__(self, holds):
            self.holds = holds

    steady, uneven = Timing((1.0,) * 6), Timing((1.0, 2.0) * 3)
    timings = {"ours": steady, "equal": steady, "wrong": uneven}
    width = compare._reach(timings, {"equal": Agrees(True), "wrong": Agrees(False)}, Rounds())
    assert width(timings) == 0
    width = compare._reach(timings, {"equal": Agrees(True), "wrong": Agrees(True)}, Rounds())
    assert width(timings) > 0.1
    alone = compare._reach(["wrong"], {}, Rounds())
    assert alone(timings) == uneven.interval.reach > 0.1
    assert alone({"wrong": Timing((1.0, 2.0))}) is None


@pytest.mark.parametrize("place", ["gpu", "tpu"])
def test_no_ratio_between_two_kinds_of_machine(place, monkeypatch, capsys):
    monkeypatch.setattr(sides, "platform", lambda: place)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*QUICK, *TORCH]) == 2
    assert f"JAX runs on {place} and this PyTorch" in capsys.readouterr().err
