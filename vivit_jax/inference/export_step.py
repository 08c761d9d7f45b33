# SPDX-License-Identifier: Apache-2.0
"""The training step of a recipe as one file that `jax.export` runs, without this library and optax.

The program is the whole step: masks, augmentation and dropout (drawn from the recipe's seed and the
step number in the state), the gradient, the optimiser, the moving average and the check that all of
it is finite. It takes the state as a dict of arrays by path, `{"params/backbone/...": ...,
"optimizer/...": ..., "step": ...}`, and returns one like it. jax.export could write the nested
state, but writer and reader would have to register every optax class in it; a dict needs nothing,
and its paths are those of a checkpoint.

* Several devices: the file is for as many devices as the step's mesh has, of any kind, and records
  how each array is sharded.
* Several platforms: the step is traced as for CPU, see `vivit_jax.inference.export`, so that the
  file has no kernel of one platform. For the mesh's own platform alone it is traced as it runs
  there. jax's compatibility guarantees cover Pallas kernels for TPU (tpu_custom_call), but not
  cuDNN's attention: such a file, for "cuda" in half precision, needs the jaxlib that wrote it.
* A file does not record donation. `load_step` donates the state again, as `make_step` does.
* The file has no derivative of the step (vjp_order is 0).
* Matrix products have the jax_default_matmul_precision at the time of writing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vivit_jax.errors import CheckpointError, UserError, counted, first_line
from vivit_jax.files.atomic import whole_file
from vivit_jax.inference.export import PLATFORMS, check_extra, check_platforms, traced_for
from vivit_jax.train.setup import TrainSetup
from vivit_jax.train.sharding import AXES, make_mesh, mesh_text, replicated
from vivit_jax.train.step import jit_step
from vivit_jax.train.storage.stored_state import array_text, flat, some_of

_CUDNN = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
_EXPORTED_AS = {"gpu": "cuda"}  # device platform -> its name in a file
_NAME = "training_step"


def export_step(
    setup: TrainSetup, path: str | Path, *, platforms: Sequence[str] = PLATFORMS
) -> None:
    """Write the step of a setup (see `vivit_jax.train.setup`) for the setup's mesh.

    Nothing is run or compiled, and the mesh's devices need not exist. Reading the file takes only
    jax and flatbuffers:

    step = jax.export.deserialize(bytearray(open("step.stablehlo", "rb").read()))
    state, values = jax.jit(step.call, donate_argnums=0)(state, batch)

    Raises UserError for unknown platforms, MissingExtra without flatbuffers.
    """
    check_extra("exporting a training step")
    check_platforms(platforms)
    tree, states = jax.tree.structure(setup.shapes), flat(setup.shapes)
    paths = list(states)

    def training_step(state, batch):
        state = jax.tree.unflatten(tree, [state[path] for path in paths])
        new, values = setup.step.function(state, batch)
        return flat(new), values

    out = {path: leaf.sharding for path, leaf in states.items()}, replicated(setup.mesh)
    place = setup.mesh.devices.flat[0].platform
    own = [_EXPORTED_AS.get(place, place)] == list(platforms)
    with traced_for(place if own else "cpu"), setup.step.here():
        exported = jax.export.export(
            jax.jit(training_step, donate_argnums=0, out_shardings=out),
            platforms=tuple(platforms),
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(name) for name in _CUDNN],
        )(states, setup.batch_shapes)
    program = exported.serialize()
    with whole_file(Path(path)) as partial:
        partial.write_bytes(program)


class ExportedStep:
    """A step from a file: (state, batch) -> (new state, scalars by name).

    The state is a TrainState, a dict of arrays by path, or any tree with the same paths; the new
    one has the same structure, and the old one is donated. `state` and `batch` are the inputs as
    ShapeDtypeStructs by name, with shardings on `mesh`; arrays that lie elsewhere, such as NumPy's,
    are moved there.
    """

    def __init__(self, program: jax.export.Exported, mesh: Mesh):
        self.mesh, self.platforms = mesh, tuple(program.platforms)
        wanted = [
            jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)
            for aval, sharding in zip(program.in_avals, program.in_shardings_jax(mesh), strict=True)
        ]
        (self.state, self.batch), _ = jax.tree.unflatten(program.in_tree, wanted)
        out = jax.tree.unflatten(program.out_tree, program.out_shardings_jax(mesh))
        with jax.default_device(mesh.devices.flat[0].platform):  # the platform to compile for
            self._run = jit_step(
                program.call,
                pretraining="labels" not in self.batch,
                devices=program.nr_devices,
                out_shardings=out,
            )

    def __call__(self, state: Any, batch: Mapping[str, Any]) -> tuple[Any, dict[str, jax.Array]]:
        states = flat(state)
        placed = [
            {name: jax.device_put(x, wanted[name].sharding) for name, x in given.items()}
            for given, wanted in (
                (_checked("state", states, self.state), self.state),
                (_checked("batch", batch, self.batch), self.batch),
            )
        ]
        new, values = self._run(*placed)
        return jax.tree.unflatten(jax.tree.structure(state), [new[p] for p in states]), values

    def lower(self) -> jax.stages.Lowered:
        """Lowered for its mesh, whose devices need not exist."""
        return self._run.lower(self.state, self.batch)


def load_step(
    path: str | Path,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> ExportedStep:
    """Read a file of `export_step`, to run on `devices`, by default the first of all devices.

    Raises CheckpointError for a file that is missing or not such a step, UserError for too few
    devices and for a platform that it was not exported for, MissingExtra without flatbuffers.
    """
    check_extra("reading an exported training step")
    program = _read(Path(path))
    sizes = dict(program.in_avals[0].sharding.mesh.shape)
    found = list(jax.devices() if devices is None else devices)
    if len(found) < program.nr_devices:
        raise UserError(
            f"{path} is a step on {counted(program.nr_devices, 'device')} ({mesh_text(sizes)}), "
            f"there are {len(found)}; export it again for a mesh of them"
        )
    found = found[: program.nr_devices]
    place = _EXPORTED_AS.get(found[0].platform, found[0].platform)
    if place not in program.platforms:
        raise UserError(
            f"{path} is a step for {', '.join(program.platforms)}, and the devices are of {place}; "
            f"export it again with platforms=[{place!r}, ...]"
        )
    return ExportedStep(program, make_mesh(sizes, found))


def _read(path: Path) -> jax.export.Exported:
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        program = jax.export.deserialize(content)
    except Exception as error:  # flatbuffers raises anything for wrong bytes
        raise CheckpointError(
            f"{path} is not a program that this jax reads ({first_line(error)}); expected a whole "
            "file of export_step, from a jax not much older or newer"
        ) from error
    mesh = program.in_avals[0].sharding.mesh if program.in_avals else None
    if program.fun_name != _NAME or mesh is None or tuple(mesh.axis_names) != AXES:
        raise CheckpointError(
            f"{path} is the program {program.fun_name!r}, expected one that export_step wrote"
        )
    return program


def _checked(what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """`given`. UserError unless it has the names, shapes and dtypes of `wanted`."""
    differs = [
        f"{name} ({array_text(given[name])} here, {array_text(leaf)} there)"
        for name, leaf in wanted.items()
        if name in given and array_text(given[name]) != array_text(leaf)
    ]
    kinds = {
        "missing": sorted(wanted.keys() - given.keys()),
        "unknown": sorted(given.keys() - wanted.keys()),
        "different": differs,
    }
    problems = [f"{title}: {some_of(names)}" for title, names in kinds.items() if names]
    if problems:
        raise UserError(
            f"the {what} does not fit the exported step; {'; '.join(problems)}. Give what its "
            f"{what} lists"
        )
    return given
