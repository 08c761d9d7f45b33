# SPDX-License-Identifier: Apache-2.0
"""A plan as text: what it was compiled for, its figures, and their formulas."""

from collections.abc import Mapping, Sequence

from vivit_jax.errors import counted
from vivit_jax.progress import format_table, readable
from vivit_jax.train.planning.plan import Plan
from vivit_jax.train.planning.step_costs import operation_seconds
from vivit_jax.train.planning.step_parts import part_of
from vivit_jax.train.sharding import mesh_text

_RING = "each as a ring at the links' nominal rate"


def describe(plan: Plan, top: int = 20) -> str:
    """The whole plan, with its `top` costliest operations."""
    sections = (_head, _memory, _arithmetic, _parts, _collectives, _step, _run)
    lines = [line for section in sections for line in section(plan)]
    return "\n".join([*lines, *(_operations(plan, top) if top else [])])


def ranking(plans: Sequence[Plan], refused: Mapping[str, str]) -> str:
    """A table of the compiled meshes, and why others are out."""
    rows = [("mesh", "step ms", "waiting ms", "peak", "MFU", "clips/s")]
    rows += [
        (
            mesh_text(each.mesh),
            _ms(each.step_seconds, 1),
            _ms(each.waiting_seconds, 1),
            readable(each.peak),
            f"{each.utilization:.1%}",
            f"{each.clips_per_second:.0f}",
        )
        for each in plans
    ]
    lines = format_table(rows) if plans else []
    return "\n".join([*lines, *(f"{mesh}: {why}" for mesh, why in refused.items())])


def _head(plan: Plan) -> list[str]:
    hosts = "1 machine" if plan.topology.hosts == 1 else f"{plan.topology.hosts} machines"
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return [
        f"{plan.recipe} on {plan.topology}, {counted(plan.topology.count, 'device')} of {hosts}, "
        f"mesh {mesh_text(plan.mesh)}",
        "all of this is an estimate from the compiled program: nothing was run",
        f"{versions}; compiled in {plan.compile_seconds:.0f} s",
    ]


def _memory(plan: Plan) -> list[str]:
    there = readable(plan.topology.chip.memory)
    lines = [
        f"memory of a device: peak {readable(plan.peak)} of {there}: it fits",
        f"  parameters {readable(plan.parameters)}, optimiser state {readable(plan.optimizer)}, "
        f"all arguments {readable(plan.arguments)}, temporaries {readable(plan.temporaries)}",
    ]
    if plan.topology.chip.platform == "gpu":
        lines.append("  jax allocates three quarters of a GPU's memory by default")
    return lines


def _arithmetic(plan: Plan) -> list[str]:
    again = f", and {_figure(plan.recomputed / 1e12, 2)} computed again" if plan.recomputed else ""
    done = f"{_figure(plan.flops / 1e12, 2)} TFLOP{again}"
    return [
        f"products of a device's step: {done}, by formula; its memory moves "
        f"{readable(plan.bytes)}, by the shapes",
    ]


def _parts(plan: Plan) -> list[str]:
    timed = plan.topology.chip.platform == "tpu"
    whole = sum(part.seconds for part in plan.parts) or 1
    rows = [("part", *(("ms", "share") if timed else ()), "moved")]
    for part in plan.parts:
        times = (_ms(part.seconds, 2), f"{part.seconds / whole:.1%}") if timed else ()
        rows.append((part.name, *times, readable(part.bytes)))
    note = "  (by the traced name of each operation, or of one in a fusion; XLA's copies are other)"
    return ["", *format_table(rows), note]


def _collectives(plan: Plan) -> list[str]:
    if not plan.moved:
        return ["", "no collectives"]
    rows = [("collectives", "axes", "times", "held", "sent", "ms", "of which overlapped")]
    for each in plan.moved:
        seconds = overlapped = "unknown"
        if each.seconds is not None:
            seconds, overlapped = _ms(each.seconds, 2), _ms(each.beside_seconds, 2)
        rows.append(
            (
                each.kind,
                " x ".join(each.axes) or "-",
                str(each.times),
                readable(each.bytes),
                readable(each.sent),
                seconds,
                overlapped,
            )
        )
    return ["", *format_table(rows)]


def _step(plan: Plan) -> list[str]:
    chip = plan.topology.chip
    if chip.platform == "gpu":
        compute = (
            f"the larger of products at {chip.flops / 1e12:.0f} TFLOP/s and traffic at "
            f"{chip.bandwidth / 1e9:.0f} GB/s; a GPU's compiler estimates no times"
        )
    else:
        compute = f"{plan.cycles:,} cycles, estimated by the compiler, at {chip.clock / 1e9:g} GHz"
    least = "at least " if chip.platform == "gpu" else ""
    lines = ["", f"step: {least}{_ms(plan.step_seconds, 1)} ms = compute + kernels + waiting"]
    lines.append(f"  compute {_ms(plan.compute_seconds, 1)} ms: {compute}")
    calls = ", ".join(f"{name} {times}" for name, times in sorted(plan.kernels.items()))
    kernels = "no Pallas kernels" if chip.platform == "tpu" else "counted in compute"
    if plan.kernel_seconds:
        kernels = (
            "attention in half precision as fitted to the schedules of libtpu 0.0.42.1, others "
            "at least: products or traffic at the chip's figures"
        )
    lines.append(f"  kernels {_ms(plan.kernel_seconds, 1)} ms: {kernels}")
    if calls:
        lines.append(f"    custom calls: {calls}")
    if plan.uncounted_kernels:
        lines.append(f"    {plan.uncounted_kernels} calls without a cost estimate: traffic alone")
    lines.append(
        f"  waiting {_ms(plan.waiting_seconds, 1)} ms: collectives that nothing overlaps, and the "
        f"excess of the others over the rest, {_RING}"
    )
    if plan.network_bytes or any(each.seconds is None for each in plan.moved):
        sent = f", {readable(plan.network_bytes)} a device" if plan.network_bytes else ""
        lines.append(
            f"    without the traffic between slices or machines{sent}: an unknown network"
        )
    if plan.unknown_loops:
        lines.append(f"  {plan.unknown_loops} loops of unknown length count once")
    return lines


def _run(plan: Plan) -> list[str]:
    most = "at most " if plan.topology.chip.platform == "gpu" else ""
    line = f"{most}MFU {plan.utilization:.1%}, {plan.clips_per_second:.0f} clips/s"
    if plan.days is None or plan.epoch_videos is None:
        return [f"{line}; the number of videos in an epoch is not known: --clips N"]
    least = "at least " if most else ""
    data = f"{counted(plan.epochs, 'epoch')} of {counted(plan.epoch_videos, 'video')}"
    return [f"{line}; {least}{plan.days:.2f} days for {data}"]


def _operations(plan: Plan, top: int) -> list[str]:
    timed = plan.topology.chip.platform == "tpu"
    rows = [("costliest operations", "part", "times", "moved", *(("ms",) if timed else ()))]
    for each in plan.operations[:top]:
        asked = "/".join(each.op_name.rsplit("/", 2)[-2:])
        seconds = operation_seconds(each, plan.topology)
        rows.append(
            (
                f"{each.name}: {asked}" if asked else each.name,
                part_of(each.op_name),
                str(each.times),
                readable(each.bytes * each.times),
                *((_ms(seconds, 2),) if timed else ()),
            )
        )
    return ["", *format_table(rows)]


def _ms(seconds: float, places: int) -> str:
    return _figure(1e3 * seconds, places)


def _figure(value: float, places: int) -> str:
    """With `places` decimals; two digits for values below one."""
    return f"{value:.{places}f}" if value >= 1 or not value else f"{value:.2g}"
