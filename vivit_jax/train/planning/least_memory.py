# SPDX-License-Identifier: Apache-2.0
"""Whether a step can fit a device at all, before anything is compiled, and what to do if not."""

import math
import re

import jax

from vivit_jax.errors import UserError, first_line
from vivit_jax.progress import readable
from vivit_jax.train.planning.hardware import Topology
from vivit_jax.train.setup import TrainSetup
from vivit_jax.train.sharding import batch_shards, bytes_on_a_device


def least_memory(setup: TrainSetup) -> dict[str, int]:
    """A lower bound of what a device holds, in bytes by kind; nothing is compiled.

    Gradients have the shapes and shardings of the parameters. Of the activations only the inputs of
    blocks count, which the backward pass needs with any `remat`.
    """
    config, shards = setup.model.config, batch_shards(setup.mesh.shape)
    clips = setup.clips // shards // setup.recipe.train.accumulate
    visible, _ = setup.token_counts
    tokens = config.num_tokens if visible is None else visible
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    kept = clips * tokens * config.hidden_size * itemsize * config.num_hidden_layers
    return {
        "state": bytes_on_a_device(setup.shapes),
        "gradients": bytes_on_a_device(setup.shapes.params),
        "batch": bytes_on_a_device(setup.batch_shapes),
        "inputs of the encoder's blocks": kept,
    }


def check_least_memory(setup: TrainSetup, topology: Topology) -> None:
    """Raises UserError if a step's least memory exceeds the device's."""
    least = least_memory(setup)
    needed, there = sum(least.values()), topology.chip.memory
    if needed <= there:
        return
    of_what = ", ".join(f"{readable(size)} of {name}" for name, size in least.items())
    raise UserError(
        f"{setup.recipe.name} does not fit: a device needs at least {readable(needed)} "
        f"({of_what}) and {topology.kind} has {readable(there)}; "
        f"{_way_out(setup, topology, needed, there)}"
    )


def refused(error: Exception, setup: TrainSetup, topology: Topology) -> UserError:
    """A compiler's refusal in one line; if memory is short, with what would fit."""
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
        return UserError(
            f"the compiler for {topology.kind} refuses the step of {setup.recipe.name}: "
            f"{first_line(error)[:300]}"
        )
    found = re.search(r"\(?([\d.]+)([KMGT])\)? exceeds available \w+ \(?([\d.]+)([KMGT])", message)
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", message) or found
    if used is None:
        first = " ".join(message.split())[:300]
        return UserError(f"{setup.recipe.name} does not fit: {first}")
    needed, there = (float(used[i]) * 1024 ** ("KMGT".index(used[i + 1]) + 1) for i in (1, 3))
    return too_large(setup, topology, needed, there)


def too_large(setup: TrainSetup, topology: Topology, needed: float, there: float) -> UserError:
    """One line for a program that needs more memory than a device has, with what would fit."""
    return UserError(
        f"{setup.recipe.name} does not fit: the compiler needs {readable(int(needed))} of a "
        f"device and {topology.kind} has {readable(int(there))}; "
        f"{_way_out(setup, topology, needed, there)}"
    )


def _way_out(setup: TrainSetup, topology: Topology, needed: float, there: float) -> str:
    """What would make a step smaller, the least change first.

    Fewer clips do not shrink the state and its gradients; accumulation does not shrink the batch.
    """
    recipe, mesh, config = setup.recipe, setup.mesh.shape, setup.model.config
    least, memory = least_memory(setup), topology.chip.memory
    held, ways = least["state"] + least["gradients"], []
    if held < memory:
        if config.dtype == "float32":
            ways.append("model.config.dtype=bfloat16")
        if config.remat != "block":
            ways.append("model.config.remat=block")
        parts, shards = recipe.train.accumulate, batch_shards(setup.mesh.shape)
        clips, kept = setup.clips // shards, held + least["batch"]
        enough = [
            k
            for k in range(parts + 1, clips + 1)
            if clips % k == 0 and (needed - kept) * parts <= (there - kept) * k
        ]
        ways += [f"train.accumulate={enough[0]}"] if enough else []
        share = max(there - held, 0) / max(needed - held, 1)
        smaller = int(recipe.train.batch_size * share) // (shards * parts) * shards * parts
        ways += [f"train.batch_size={smaller}"] if smaller else []
    most = topology.count // mesh["tensor"]
    left = held * mesh["fsdp"] / most
    if mesh["fsdp"] < most and left < memory:
        ways.append(f"--mesh fsdp={most}, which leaves {readable(int(left))} of state a device")
    if held >= memory:
        ways.append(f"more than {math.ceil(held * mesh['fsdp'] / memory)} chips along fsdp")
    else:
        ways.append(f"more chips than {topology.count}, for fewer clips each")
    return f"what may fit: {'; '.join(ways)}"
