# SPDX-License-Identifier: Apache-2.0
"""A loss, an augmentation and a model of one's own, in place of the recipe's.

**A loss** is a function `(params, outputs, batch) -> (loss, metrics)`. `params` are the model's, as
it used them; `outputs` is what the model returned; `batch` has "pixel_values" [b, t, h, w, c]
(float32, augmented and mixed, as the model took them), "clip_ids" [b], and to fine-tune "labels"
(int [b] or [b, heads], those before mixing) and "targets" (float [b, classes], smoothed and mixed),
to pre-train "mask". The loss is a scalar: the mean over the clips, so that `train.accumulate` and
the mesh do not change it. `metrics` are scalars by name, which are averaged, logged and drawn.

Arrays that a loss needs besides, such as a teacher's params, are part of a pytree that can be
called: `jax.tree_util.Partial(distil, teacher, teacher_params)` is called as
`distil(teacher, teacher_params, params, outputs, batch)`. They are arguments of the step's program,
not constants in it: every device holds them once, replicated, or as they are placed on the mesh.

**An augmentation** is an `Augment`, of clips in NumPy or of pixels in the step.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import UInt8

from vivit_jax.data.settings import AugmentSettings
from vivit_jax.data.transforms.augment import Size, Transform, train_transform
from vivit_jax.errors import UserError
from vivit_jax.models.registry import is_known
from vivit_jax.train.clock import MEASURED
from vivit_jax.train.sharding import replicated

Loss = Callable[[Any, Any, Mapping[str, Any]], tuple[Any, dict[str, Any]]]
# What each line of metrics.jsonl has besides a loss's metrics.
_TAKEN = (
    "loss", "gradient_norm", "lr", "bad_steps", *MEASURED, "kind", "step", "time", "not_finite",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Augment:
    """Augmentations of one's own, after those of the recipe.

    Attributes:
        clips: (numpy Generator, uint8 [t, h, w, c]) -> the same shape and type. It runs where clips
            are read, in threads, or with `data.workers` in processes, for which it must be
            picklable. The generator is a function of the seed, the epoch and the clip's place in
            it, so that a resumed run draws the same.
        pixels: (key, float [t, h, w, c]) -> the same shape. It runs in the step, under vmap, on
            normalised pixels before mixing. The key is a function of the seed, the step and the
            clip's place in the batch, so that neither the mesh nor `train.accumulate` changes it.
    """

    clips: Callable[[np.random.Generator, np.ndarray], np.ndarray] | None = None
    pixels: Callable[[jax.Array, jax.Array], jax.Array] | None = None

    def __post_init__(self):
        for name in ("clips", "pixels"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise UserError(f"Augment.{name} is {value!r}; expected a function, or None")
        if self.clips is None and self.pixels is None:
            raise UserError("Augment() augments nothing: give it clips=, pixels= or both")


@dataclasses.dataclass(frozen=True, eq=False)
class Own:
    """What a run has of its caller's. `model` is one of no family, or one with own `params`."""

    loss: Loss | None = None
    augment: Augment | None = None
    model: nn.Module | None = None
    params: Any = dataclasses.field(default=None, repr=False)

    @classmethod
    def checked(cls, loss: Any, augment: Any, model: Any) -> "Own":
        """From what `train` was given. Raises UserError for what is of no use."""
        if loss is not None and not callable(loss):
            raise UserError(
                f"loss is {loss!r}; expected a function (params, outputs, batch) -> (loss, metrics)"
            )
        function: Any = augment
        given = Augment(clips=function) if callable(augment) else augment
        if given is not None and not isinstance(given, Augment):
            raise UserError(
                f"augment is {augment!r}; expected a function (rng, uint8 clip) -> clip, or a "
                "vivit_jax.train.Augment"
            )
        own_loss: Any = loss
        params = None
        if isinstance(model, tuple) and len(model) >= 2:
            model, params = model[:2]
        if model is not None and not isinstance(model, nn.Module):
            raise UserError(
                f"model is {type(model).__name__}; expected a flax.linen module, or one and its "
                "params, as vivit_jax.from_pretrained returns"
            )
        return cls(own_loss, given, model, params)

    @functools.cached_property
    def named(self) -> dict[str, str]:
        """What a resumed run has to be given again, by name."""
        functions = {"loss": self.loss, "model": self.model}
        if self.augment is not None:
            functions["augment.clips"] = self.augment.clips
            functions["augment.pixels"] = self.augment.pixels
        return {name: _name(each) for name, each in functions.items() if each is not None}

    def transform(self, settings: AugmentSettings, size: Size) -> AugmentSettings | Transform:
        """What makes training clips of decoded ones: the settings, or both augmentations."""
        own = None if self.augment is None else self.augment.clips
        if own is None:
            return settings
        return functools.partial(_both, train_transform(settings, size), own)

    @property
    def takes_floats(self) -> bool:
        """Whether the loss or the model needs pixels as floats, not as bytes."""
        return self.loss is not None or (self.model is not None and not is_known(self.model))

    @property
    def pixels(self) -> Callable | None:
        """The augmentation of pixels."""
        return None if self.augment is None else self.augment.pixels

    @property
    def loss_arrays(self) -> list[Any]:
        """The arrays of the loss, which the step takes as its last argument."""
        return [leaf for leaf in jax.tree.leaves(self.loss) if _is_array(leaf)]

    def placed_arrays(self, mesh: Mesh) -> list[jax.Array]:
        """`loss_arrays` on the devices of a mesh: replicated, unless they are already there."""
        devices, everywhere = {*mesh.devices.flat}, replicated(mesh)

        def place(array):
            there = isinstance(array, jax.Array) and array.sharding.device_set == devices
            return array if there else jax.device_put(array, everywhere)

        return [place(array) for array in self.loss_arrays]

    def loss_with(self, arrays: list[Any]) -> Loss | None:
        """The loss with other arrays in place of its own, as a step is traced with."""
        leaves, tree = jax.tree.flatten(self.loss)
        given = iter(arrays)
        found = [next(given) if _is_array(leaf) else leaf for leaf in leaves]
        return None if self.loss is None else _checked_loss(jax.tree.unflatten(tree, found))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _checked_loss(loss: Loss) -> Loss:
    """The loss, with a UserError for a result of another form than documented."""

    def checked(params, outputs, batch):
        found = loss(params, outputs, batch)
        name = _name(loss)
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Mapping):
            alone = isinstance(found, jax.Array)
            kind = "an array alone" if alone else f"a {type(found).__name__}"
            raise UserError(
                f"the loss {name} returned {kind}; expected (loss, metrics), the metrics a "
                "dict of scalars by name, which may be empty"
            )
        value, metrics = jnp.asarray(found[0]), dict(found[1])
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(
                f"the loss {name} returned an array of {value.dtype} with shape {value.shape}; "
                "expected a float scalar, the mean over the clips"
            )
        for key, metric in metrics.items():
            if not isinstance(key, str) or key in _TAKEN:
                raise UserError(
                    f"the loss {name} returned a metric called {key!r}; expected another name "
                    f"than {', '.join(_TAKEN)}"
                )
            if jnp.shape(metric):
                raise UserError(
                    f"the loss {name} returned {key!r} with shape {jnp.shape(metric)}; expected a "
                    "scalar"
                )
        return value, {key: jnp.asarray(metric, jnp.float32) for key, metric in metrics.items()}

    return checked


NOTHING = Own()


def _both(
    first: Transform, own: Transform, rng: np.random.Generator, clip: UInt8[np.ndarray, "t _ _ c"]
) -> UInt8[np.ndarray, "t h w c"]:
    """The recipe's augmentation, then the caller's, whose result is checked."""
    clip = first(rng, clip)
    try:
        found = np.asarray(own(rng, clip))
    except Exception as error:
        # A UserError ends the run; any other error about a clip would leave the clip out.
        raise UserError(
            f"the augmentation {_name(own)} failed: {type(error).__name__}: {error}"
        ) from error
    if found.dtype != np.uint8 or found.shape != clip.shape:
        raise UserError(
            f"the augmentation {_name(own)} returned an array of {found.dtype} with shape "
            f"{found.shape}; expected uint8 {clip.shape}, as it was given"
        )
    return found


def _name(each: Any) -> str:
    """The name of a function, of the one in a partial, or of an object's type, with its module."""
    while hasattr(each, "func"):
        each = each.func
    named = each if hasattr(each, "__qualname__") else type(each)
    return f"{named.__module__}.{named.__qualname__}"
