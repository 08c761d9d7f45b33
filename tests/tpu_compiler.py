# SPDX-License-Identifier: Apache-2.0
"""Compiles for TPUs in a process of its own: libtpu now and then ends one while it compiles.

About one compilation of forty ended in a segmentation fault with libtpu 0.0.42.1 and jax 0.10.2,
where it weighs fusions of matrix products in a thread of little stack; most programs compiled the
next time, and without a limit of the stack none was seen to end one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from vivit_jax.processes import stack_without_limit

ATTEMPTS = 4
FOUR_CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_DONE = "done: "  # before a result, as libtpu and jax print too
# Below these widths XLA has other ways with what fsdp splits.
_SIZES = dict(dtype="bfloat16", hidden_size=128, intermediate_size=256)
_DECODER = dict(decoder_hidden_size=64, decoder_intermediate_size=128)


class Compiler:
    """Asks another process for one of the functions below, and a new one where that one ends."""

    def __init__(self, log: Path):
        self._log, self._process = log, None

    def __call__(self, job: str, **arguments):
        for _ in range(ATTEMPTS):
            if self._process is None:
                self._start()
            try:
                print(json.dumps([job, arguments]), file=self._process.stdin, flush=True)
                for line in self._process.stdout:
                    if line.startswith(_DONE):
                        return json.loads(line.removeprefix(_DONE))
            except BrokenPipeError:
                pass
            status = self._process.wait()
            self._process = None
            if status >= 0:  # not ended by a signal: an exception, which comes again
                break
        raise RuntimeError(f"{job} of {arguments} ended with {status}: {self._log.read_text()}")

    def _start(self):
        here = Path(__file__)
        paths = [here.parents[1], here.parent, here.parent / "train"]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, paths))}
        env.pop("XLA_FLAGS", None)
        with open(self._log, "w") as log, stack_without_limit():
            self._process = subprocess.Popen(
                [sys.executable, str(here)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def close(self):
        if self._process is not None:
            self._process.communicate()


def _devices(topology: str):
    from vivit_jax.train.planning.hardware import compile_only_devices, parse_topology

    return compile_only_devices(parse_topology(topology))


def _setting(family: str, mesh, **config):
    from partitioned import FAMILIES, build

    recipe = FAMILIES[family]
    sizes = _SIZES | (_DECODER if "decoder_hidden_size" in recipe.model.config else {})
    return build(recipe, mesh, **sizes | config)


def _read(setup):
    from partitioned import compiled, misplaced

    from vivit_jax.train.planning.compiled import read_program

    found = compiled(setup)
    wrong = misplaced(setup, read_program(found, setup.mesh))
    return {"wrong": wrong, "peak": found.memory_analysis().peak_memory_in_bytes}


def step(topology: str, family: str, mesh: str, **config):
    """What of a tiny step's collectives is not as the table says, and the memory it needs."""
    from partitioned import mesh_of

    return _read(_setting(family, mesh_of(mesh, _devices(topology)), **config))


def published(topology: str, recipe: str, mesh: dict[str, int], **fields):
    """As `step`, of a published recipe in bfloat16, with fields of it changed."""
    from tiny_recipes import changed

    from vivit_jax.recipes import recipe_named
    from vivit_jax.train.planning.hardware import parse_topology
    from vivit_jax.train.planning.plan import planned_setup

    recipe = recipe_named(recipe)
    config = dict(recipe.model.config) | {"dtype": "bfloat16"}
    recipe = changed(recipe, model__config=config, **fields)
    setup = planned_setup(recipe, parse_topology(topology), mesh)
    return _read(setup) | {"clips": setup.clips}


def attention(topology: str, tokens: int):
    """The collectives in attention, forward and backward, clips over data, heads over tensor."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from partitioned import mesh_of

    from vivit_jax.layers.attention import attention
    from vivit_jax.train.planning.compiled import read_program

    mesh = mesh_of("data=2,tensor=2", _devices(topology))
    place = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
    x = jax.ShapeDtypeStruct((4, tokens, 4, 64), jnp.bfloat16, sharding=place)
    loss = lambda q, k, v: attention(q, k, v).astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=(place,) * 3)
    with jax.set_mesh(mesh), jax.default_device("tpu"):
        found = read_program(gradients.lower(x, x, x).compile(), mesh)
    return [f"{each.kind} of {each.bytes} bytes: {each.op_name}" for each in found.collectives]


def kernels(topology: str, q, keys: int, dtype: str, names=("data", "tensor"), rules=()):
    """The attention kernels and their gradients on four chips, clips and heads over two axes.

    `q` is the shape [b, q, n, e]. What is in the program: kernels, collectives and whatever else
    works, with the bytes of temporaries and what was logged.
    """
    import functools
    import logging

    import jax
    import numpy as np
    from flax import linen as nn
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from vivit_jax.layers.attention import attention
    from vivit_jax.train.planning.compiled import read_program

    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("vivit_jax.layers.placed").addHandler(handler)
    mesh = Mesh(np.array(_devices(topology)).reshape(2, 2), names)
    place = NamedSharding(mesh, PartitionSpec(names[0], None, names[1]))
    k = [q[0], keys, *q[2:]]
    q, k = (jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in (q, k))

    def step(q, k, v, d_out):
        out, pullback = jax.vjp(functools.partial(attention, implementation="pallas"), q, k, v)
        return out, *pullback(d_out)

    here = jax.set_mesh(mesh), jax.default_device("tpu"), nn.logical_axis_rules(rules)
    with here[0], here[1], here[2]:
        found = jax.jit(step, out_shardings=place).lower(q, k, k, q).compile()
    logging.getLogger("vivit_jax.layers.placed").removeHandler(handler)
    program = read_program(found, mesh)
    targets = [each.target for each in program.operations]
    return {
        "kernels": targets.count("tpu_custom_call"),
        "collectives": [each.kind for each in program.collectives],
        "others": sorted({x.opcode for x in program.operations} - {"custom-call"}),
        "temporaries": found.memory_analysis().temp_size_in_bytes,
        "logged": logged,
    }


def from_a_file(topology: str, path: str):
    """Of a step that was exported on CPU: kinds of collectives, and how much is donated."""
    from partitioned import mesh_of

    from vivit_jax.inference.export_step import export_step, load_step
    from vivit_jax.train.planning.compiled import read_program

    export_step(_setting("videomae pretrain", mesh_of("data=2,tensor=2")), path)
    loaded = load_step(path, _devices(topology))
    found = loaded.lower().compile()
    memory = found.memory_analysis()
    return {
        "kinds": sorted({each.kind for each in read_program(found, loaded.mesh).collectives}),
        "donated": memory.alias_size_in_bytes / memory.output_size_in_bytes,
    }


if __name__ == "__main__":
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_prng_impl", "rbg")
    for line in sys.stdin:
        job, arguments = json.loads(line)
        print(_DONE + json.dumps(globals()[job](**arguments)), flush=True)
