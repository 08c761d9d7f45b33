# SPDX-License-Identifier: Apache-2.0
"""Compiled steps of every family on a mesh, and the table of what may move between its devices."""

import dataclasses
import math

import jax
import numpy as np
from tiny_recipes import FINETUNE, PRETRAIN, changed

import vivit_jax
from vivit_jax.layers.linear import projections_in
from vivit_jax.models.build import build_model
from vivit_jax.recipes.checks import model_config
from vivit_jax.recipes.recipe import HEADS, Recipe
from vivit_jax.train.optim import trained
from vivit_jax.train.planning.compiled import Collective, Program, read_program
from vivit_jax.train.setup import TrainSetup, make_setup
from vivit_jax.train.sharding import AXES, BATCH, make_mesh
from vivit_jax.train.storage.stored_state import flat

PROCESSOR = vivit_jax.VideoProcessor.named("videomae-imagenet", size=16, crop_size=16)
# Tokens, widths and counts of layers all differ, so that an array is known by its sizes.
_SIZES = dict(
    image_size=16,
    num_frames=8,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
)
_VIDEOMAE = _SIZES | dict(
    tubelet_size=2,
    patch_size=4,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=32,
)
_PLAIN = dict(
    optim__ema=None,
    augment__erase=0.0,
    augment__mixup=0.0,
    augment__cutmix=0.0,
    augment__mix_group=None,
)


def _pretrain(**config) -> Recipe:
    return changed(PRETRAIN, model__config=_VIDEOMAE | config, optim__ema=None)


def _finetune(**config) -> Recipe:
    return changed(FINETUNE, model__config=_VIDEOMAE | dict(num_labels=4) | config, **_PLAIN)


def _vivit(kind: str, pooling: str, **config) -> Recipe:
    config = _SIZES | dict(tubelet_size=(2, 4, 4), num_labels=4) | config
    return changed(
        FINETUNE,
        model__preset="vivit-b-16x2-kinetics400",
        model__config=config | dict(attention_type=kind, pooling=pooling),
        optim__layer_decay=None,
        **_PLAIN,
    )


def _dual(recipe: Recipe) -> Recipe:
    return changed(recipe, mask__kind="dual", mask__ratio=0.5)


FAMILIES = {
    "videomae pretrain": _pretrain(),
    "videomae finetune": _finetune(),
    "v2 pretrain": _dual(_pretrain(cosine_attention=True)),
    "v2 finetune": _finetune(cosine_attention=True),
    "joint": _vivit("joint", "cls"),
    "encoder": _vivit("factorised_encoder", "cls", num_temporal_layers=2),
    "encoder mean": _vivit("factorised_encoder", "mean", num_temporal_layers=2),
    "self-attention": _vivit("factorised_self_attention", "mean"),
    "dot product": _vivit("factorised_dot_product", "mean"),
    # Further ways through a step.
    "mixed": changed(
        _finetune(),
        augment__erase=0.5,
        augment__mixup=0.8,
        augment__cutmix=1.0,
        augment__mix_group=2,
    ),
    "in parts": changed(_finetune(), train__accumulate=2),
    "v2 in parts": changed(_dual(_pretrain()), train__accumulate=2),
    "average and frozen": changed(
        _finetune(), optim__ema=0.9, optim__freeze=("backbone/patch_embed/.*",)
    ),
    "weights of attention": _finetune(attention_probs_dropout_prob=0.1),
}


def mesh_of(text: str, devices=None):
    """That of "data=4,tensor=2", over the first of the devices there are."""
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, size = part.split("=")
        sizes[name] = int(size)
    devices = jax.devices() if devices is None else devices
    return make_mesh(sizes, devices[: math.prod(sizes.values())])


def build(recipe: Recipe, mesh, **config) -> TrainSetup:
    """The recipe's setup on a mesh, with fields of the model's configuration changed."""
    recipe = changed(recipe, model__config=dict(recipe.model.config) | config)
    model = build_model(model_config(recipe), HEADS[recipe.task])
    return make_setup(recipe, mesh, model, PROCESSOR, per_epoch=2)


def compiled(setup: TrainSetup) -> jax.stages.Compiled:
    """The real step, not run."""
    return setup.step.lower(setup.shapes, setup.batch_shapes).compile()


def program_of(setup: TrainSetup) -> Program:
    return read_program(compiled(setup), setup.mesh)


# What may move

SCALARS = 1024  # bytes of losses, counts and norms, in all of a step


@dataclasses.dataclass(frozen=True)
class Row:
    """Collectives of these kinds along these axes: of how many bytes a device has, at most."""

    what: str
    kinds: tuple[str, ...]
    axes: tuple[tuple[str, ...], ...]  # any of them
    least: int
    most: int
    each: int | None = None  # bytes of the largest one

    def holds(self, found: Collective) -> bool:
        small = self.each is None or found.bytes <= self.each
        return found.kind in self.kinds and found.axes in self.axes and small


def table(setup: TrainSetup) -> list[Row]:
    """What moves between the devices of a step, in bytes; nothing else may.

    Along data and fsdp: the gradients, once for each part of a batch. Along fsdp: the parameters
    that it splits, for the forward and for the backward pass of each part. Along tensor: the
    activations after every attention and MLP, and on the way back before them. XLA on CPU makes no
    reduce-scatter: it adds up whole gradients, of which each device then keeps its own.

    On CPU and TPU; on GPU queries, keys and values are one product.
    """
    sizes = dict(setup.mesh.shape)
    parts, params = setup.recipe.train.accumulate, flat(setup.shapes.params)

    def along(*names):
        return tuple(name for name in names if sizes[name] > 1)

    def held(leaf, axis):
        return sizes[axis] if axis in leaf.sharding.spec else 1

    # What a device has of a parameter as it is used, once fsdp's parts are together.
    used = flat(jax.eval_shape(_used(setup), setup.shapes.params))

    def size(path):
        return params[path].size * used[path].dtype.itemsize

    whole = {path: size(path) // held(leaf, "tensor") for path, leaf in params.items()}
    fsdp = [path for path, leaf in params.items() if held(leaf, "fsdp") > 1]
    learns = flat(trained(setup.recipe.optim, setup.shapes.params))
    learning = [path for path in params if np.any(learns[path])]
    gradients = sum(whole[path] for path in learning)
    if along("data"):  # those that fsdp splits are added up along data after it, a part of each
        gradients += sum(whole[path] // sizes["fsdp"] for path in {*learning} & {*fsdp})
    # Vectors are gathered again for whatever the backward pass computes again.
    gathered = sum(whole[path] * (2 if path.endswith("kernel") else 3) for path in fsdp)
    # Those in a loop over layers are gathered one by one.
    layers = {path: params[path].shape[0] if "layers/" in path else 1 for path in fsdp}
    batch_axes = tuple(filter(None, (along(*names) for names in (BATCH, ("data",), ("fsdp",)))))
    exact = not along("fsdp")
    config = setup.model.config
    frames = config.grid[0] if getattr(config, "spatial_only", None) is not None else 1
    pooled = _rows(setup) * frames * config.hidden_size * 4
    rows = [
        Row(
            "gradients",
            ("all-reduce", "reduce-scatter"),
            batch_axes,
            # Of several parts XLA adds some small gradients up only once.
            parts * gradients * (99 if exact and parts > 1 else 100 if exact else 50) // 100,
            parts * (gradients if exact else gradients * 17 // 16) + SCALARS,  # with padding
        ),
        Row(
            "parameters, gathered",
            ("all-gather",),
            (along("fsdp"),),
            parts * sum(whole[path] for path in fsdp),
            parts * gathered,
            each=max((whole[path] // layers[path] for path in fsdp), default=0),
        ),
        Row(
            "activations",
            ("all-reduce",),
            (along("tensor"),),
            activations(setup),
            activations(setup) + SCALARS,
        ),
    ]
    everywhere = tuple(tuple(a for i, a in enumerate(AXES) if n >> i & 1) for n in range(1, 8))
    if along("fsdp"):
        # A class token's rows and a classifier's are too few for XLA to leave where they are.
        moves = ("all-gather", "collective-permute", "all-to-all")
        rows.append(Row("pooled clips", moves, everywhere, 0, 32 * pooled, each=pooled))
    if along("fsdp") and along("tensor"):
        # Where tensor does not split a product XLA does, and then gathers the kernel along both.
        other = sum(whole[path] for path in fsdp if held(params[path], "tensor") == 1)
        axes = (("tensor",), ("fsdp", "tensor"))
        rows.append(
            Row("parameters, moved", ("all-gather", "collective-permute"), axes, 0, 3 * other)
        )
    rows.append(Row("norms", ("all-reduce",), everywhere, 0, SCALARS, each=64))
    return rows


def activations(setup: TrainSetup) -> int:
    """Bytes that are added up along tensor: each block's after its projections, and backwards.

    Forward that is once for every attention and MLP. Backwards it is once for the MLP, and once for
    an attention's queries, keys and values, of which XLA on CPU adds up each by itself where fsdp
    does not split their kernels: products of such add up their gradients before.
    """
    if setup.mesh.shape["tensor"] == 1:
        return 0
    config, recipe = setup.model.config, setup.recipe
    rows = _rows(setup) * recipe.train.accumulate

    # Forward they are added to the residual before they are rounded.
    backward = np.dtype(config.dtype).itemsize
    together = _place(setup) == "tpu" or setup.mesh.shape["fsdp"] > 1
    products = 1 if together else 3

    def blocks(tokens: int, width: int, layers: int, attentions: int = 1, read: bool = False):
        """`read`: of the last block a class token is all that is used."""
        full = (layers - read) * tokens
        values = 4 * full * (attentions + 1) + backward * full * (products * attentions + 1)
        if read:
            keys = 2 * tokens if products == 3 else tokens
            # The one query is added up by itself, but where all are products of the partitioner's.
            query = 1 if products == 3 or setup.mesh.shape["fsdp"] > 1 else 0
            values += 4 * 2 + backward * (1 + query + keys)
        return rows * width * values

    t, h, w = config.grid
    width, layers = config.hidden_size, config.num_hidden_layers
    if recipe.task == "pretrain":
        visible, decoded = setup.token_counts
        decoder = config.decoder()
        decoded = blocks(visible + decoded, decoder.hidden_size, decoder.num_hidden_layers)
        return blocks(visible, width, layers) + decoded
    kind = getattr(config, "attention_type", "joint")
    cls = getattr(config, "pooling", None) == "cls"
    if kind == "factorised_encoder":
        rows_of_frames = t * blocks(h * w + cls, width, layers, read=cls)
        return rows_of_frames + blocks(t + cls, width, config.num_temporal_layers, read=cls)
    attentions = 2 if kind == "factorised_self_attention" else 1
    return blocks(t * h * w + cls, width, layers, attentions, read=cls)


def misplaced(setup: TrainSetup, program: Program) -> list[str]:
    """What of the program's collectives is not as the table says, a line each."""
    rows = table(setup)
    total, wrong = dict.fromkeys((row.what for row in rows), 0), []
    for found in program.collectives:
        row = next((row for row in rows if row.holds(found)), None)
        if row is None:
            wrong.append(f"{found.kind} along {found.axes}, {found.bytes} bytes: {found.op_name}")
        else:
            total[row.what] += found.bytes * found.times
    wrong += [
        f"{row.what}: {total[row.what]} bytes, expected {row.least} to {row.most}"
        for row in rows
        if not row.least <= total[row.what] <= row.most
    ]
    return wrong


def _used(setup: TrainSetup):
    return lambda params: projections_in(params, setup.model.config.dtype)


def _place(setup: TrainSetup) -> str:
    return setup.mesh.devices.flat[0].platform


def _rows(setup: TrainSetup) -> int:
    """Clips of a part on a device."""
    sizes = setup.mesh.shape
    shards = math.prod(sizes[axis] for axis in BATCH)
    return setup.recipe.train.batch_size // setup.recipe.train.accumulate // shards
