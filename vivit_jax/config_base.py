# SPDX-License-Identifier: Apache-2.0
"""What the configurations of all families share: fields, checks, config.json both ways."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from vivit_jax.errors import ConfigError

logger = logging.getLogger(__name__)
# transformers' ACT2FN, and selu; `layers.linear.ACTIVATIONS` computes them.
HIDDEN_ACTS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh",
    "gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu",
    "relu", "relu2", "relu6", "selu", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip
# These transformers has too; they have trained parameters, which a checkpoint would hold.
PARAMETRIC_ACTS = ("prelu", "xielu")
# `layers.attention.attention` computes them.
Attention = Literal["auto", "xla", "chunked", "cudnn", "pallas"]
ATTENTION_IMPLEMENTATIONS: tuple[str, ...] = get_args(Attention)
Remat = Literal["none", "dots", "block"]  # from the most memory to the least
REMAT_POLICIES: tuple[str, ...] = get_args(Remat)
DTYPES = ("float32", "bfloat16", "float16", "float64")
# `data.sampling` computes them.
Sampler = Literal["hold", "linspace", "loop", "segments"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
# Fields that say how clips were read from videos in training; they do not change the function.
READING = ("frame_stride", "view_sampler")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Keys of config.json that are written anew.
_REWRITTEN = (
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "label2id",
)  # fmt: skip
# Keys in most files of transformers that no model here uses. They are kept without a warning.
_COMMON = (
    "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss", "use_cache",
    "gradient_checkpointing", "finetuning_task", "task_specific_params", "video_size",
    "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder", "add_cross_attention",
    "cross_attention_hidden_size", "tie_encoder_decoder", "tie_word_embeddings", "pruned_heads",
    "use_safetensors",
)  # fmt: skip


def execution_field(default):
    """A field that never changes the function; it is not written to config.json."""
    return dataclasses.field(default=default, metadata={"execution": True})


def optional_field(default):
    """A field that HuggingFace does not have; it is written only if set."""
    return dataclasses.field(default=default, metadata={"only_if_set": True})


def positive_int(value) -> bool:
    """Whether a value is an integer of at least 1 that can be an array's dimension."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def number(value) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def pair(value) -> tuple[int, int]:
    """Height and width of a size that may be one number."""
    return (value, value) if isinstance(value, int) else tuple(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Fields and checks that all families share.

    `drop_path_rate` is stochastic depth, scenic's droplayer: in training each residual branch of
    block i of L is dropped for a whole clip with probability rate * i / (L - 1). With
    `drop_path_rescale` a kept branch is divided by its probability of being kept.

    `class_splits` makes the classifier several classifiers in one projection, for example
    (300, 97) nouns and verbs with `split_names` ("noun", "verb"); they must sum to `num_labels`.

    `id2label` names classes 0, 1, ... As in transformers it may skip indices, and its length is the
    number of classes all the same: {1: "a", 2: "b"} names class 1 of two classes and leaves class 0
    its placeholder. It is then kept as pairs of index and name.

    `attentive_heads`, where a family has it, lets the classifier read what a learned query gathers
    from all tokens in so many heads (`vivit_jax.models.head.AttentivePool`), and not the model's
    own pooling; transformers has no such models.

    `frame_stride` is the number of frames of a video from one of a clip to the next, in training
    and therefore by default in every use, and `view_sampler` how `vivit_jax.data.sampling` placed
    them. By default they are those of the family's papers. With "segments" the stride is only for
    windows, as of `vivit_jax.extract_features`.

    `output_hidden_states` and `output_attentions` are what a model reports by default.

    `extra` holds the other keys of a config.json: they have no effect and are written back.
    """

    # What a family is called: in config.json, there if transformers cannot compute the function
    # (so that it refuses the file), and in texts.
    model_type: ClassVar[str]
    own_model_type: ClassVar[str]
    title: ClassVar[str]
    # The class of the model with each head: "none", "classification", "pretraining".
    heads: ClassVar[Mapping[str, str]]
    # What the family's papers average over the test clips of a video.
    view_average: ClassVar[str] = "softmax"
    # The initial values of its papers, see `vivit_jax.train.start.initial_params`.
    initial_values: ClassVar[str] = "videomae"
    if TYPE_CHECKING:  # fields of every family, each with its own default
        num_frames: int
        hidden_act: str
        layer_norm_eps: float
    # What some families have as fields of these names.
    cosine_attention = False
    layer_scale_init = 0.0
    attention_type = "joint"
    pooling = None
    spatial_only = False
    num_sampled_frames = None
    attentive_heads = None
    temporal_layers = 0
    # Values that change nothing, by keys that transformers computes with and this library does not;
    # every other value is refused.
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "quantization_config": (None,),
        "per_layer_config": (None, {}),
        "tie_last_hidden_states": (None, False),
    }
    probabilities: ClassVar[tuple[str, ...]] = (
        "hidden_dropout_prob", "attention_probs_dropout_prob",
    )  # fmt: skip
    # Without blocks a model is its embedding and its head, without labels a head its features.
    may_be_zero: ClassVar[tuple[str, ...]] = ("num_hidden_layers", "num_labels")

    image_size: int | tuple[int, int] = 224
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    qkv_bias: bool = True
    num_labels: int = 2
    id2label: tuple[str, ...] | tuple[tuple[int, str], ...] | None = None
    problem_type: str | None = None
    output_hidden_states: bool = optional_field(False)
    output_attentions: bool = optional_field(False)
    drop_path_rate: float = optional_field(0.0)
    drop_path_rescale: bool = optional_field(True)
    class_splits: tuple[int, ...] | None = optional_field(None)
    split_names: tuple[str, ...] | None = optional_field(None)
    frame_stride: int = optional_field(2)
    view_sampler: str = optional_field("linspace")

    dtype: str = execution_field("float32")
    param_dtype: str = execution_field("float32")
    attention: str = execution_field("auto")
    scan_layers: bool = execution_field(True)
    remat: str = execution_field("dots")
    extra: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, compare=False, metadata={"execution": True}
    )

    def __post_init__(self):
        if self.id2label is not None:
            object.__setattr__(self, "id2label", _label_tuple(self.id2label))
            if len(self.id2label) != self.num_labels:
                raise ConfigError(
                    f"num_labels is {self.num_labels} but id2label names {len(self.id2label)} "
                    "classes; give both, or id2label=None for the names LABEL_0, LABEL_1, ..."
                )
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        for name in ("dtype", "param_dtype"):
            # jnp.bfloat16 and np.dtype("float32") are as good as their names.
            value = getattr(self, name)
            found = getattr(value, "dtype", value)
            object.__setattr__(self, name, getattr(found, "name", found))
        self.check_sizes()
        for name in self.probabilities:
            self.require(name, 0.0 <= getattr(self, name) <= 1.0, "a probability in [0, 1]")
        # What is kept is divided by its probability.
        good = 0.0 <= self.drop_path_rate < 1.0
        self.require("drop_path_rate", good, "a probability in [0, 1)")
        self.check_activation("hidden_act")
        self.one_of("problem_type", (None, *PROBLEM_TYPES))
        self.one_of("dtype", DTYPES)
        self.one_of("param_dtype", DTYPES)
        self.one_of("attention", ATTENTION_IMPLEMENTATIONS)
        self.one_of("remat", REMAT_POLICIES)
        self.one_of("view_sampler", SAMPLERS)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ConfigError(
                "problem_type='single_label_classification' needs num_labels > 1, got 1; one label "
                "is a regression"
            )
        self._check_splits()

    def require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def one_of(self, name: str, allowed: tuple) -> None:
        self.require(name, getattr(self, name) in allowed, f"one of {list(allowed)}")

    def check_activation(self, name: str) -> None:
        if getattr(self, name) in PARAMETRIC_ACTS:
            raise ConfigError(
                f"{name} is {getattr(self, name)!r}, an activation with trained parameters of its "
                f"own, which these models have no place for; expected one of {list(HIDDEN_ACTS)}"
            )
        self.one_of(name, HIDDEN_ACTS)

    def _check_splits(self) -> None:
        splits, names = self.class_splits, self.split_names
        if splits is None:
            self.require("split_names", names is None, "null where class_splits is null")
            return
        good = isinstance(splits, tuple) and len(splits) > 1 and all(map(positive_int, splits))
        self.require("class_splits", good, "two or more positive integers")
        if sum(splits) != self.num_labels:
            raise ConfigError(
                f"class_splits {splits} sum to {sum(splits)} but num_labels is {self.num_labels}; "
                "all heads share one projection, so they must be equal"
            )
        if names is None:
            names = tuple(str(i + 1) for i in range(len(splits)))
            object.__setattr__(self, "split_names", names)
        good = isinstance(names, tuple) and all(isinstance(name, str) for name in names)
        good = good and len(set(names)) == len(splits)
        self.require("split_names", good, f"{len(splits)} different names")
        if self.problem_type not in (None, "single_label_classification"):
            raise ConfigError(
                f"class_splits needs problem_type single_label_classification or null, got "
                f"{self.problem_type!r}"
            )

    def check_sizes(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and field.name in self.may_be_zero:
                good = positive_int(value) or (type(value) is int and value == 0)
                self.require(field.name, good, "an integer, 0 or more")
            elif field.type is int:
                self.require(field.name, positive_int(value), "a positive integer")
            if field.type is float:
                self.require(field.name, number(value) and value >= 0, "a number, 0 or more")
                # transformers refuses a config.json with 1 where it wants 1.0.
                object.__setattr__(self, field.name, float(value))
            if field.type is bool:
                self.require(field.name, isinstance(value, bool), "true or false")
        self.check_shape("image_size", 2)
        for size, patch, axis in zip(
            self.frame_size, self.tubelet[1:], ("height", "width"), strict=True
        ):
            if size < patch:
                raise ConfigError(
                    f"image_size {self.image_size} is less than one patch {axis} of {patch} "
                    f"({self.tubelet[1:]}); choose at least that"
                )
        if self.num_frames < self.tubelet[0]:
            raise ConfigError(
                f"num_frames {self.num_frames} is less than one tubelet length of "
                f"{self.tubelet[0]}; choose at least that"
            )
        self.check_head_width()
        heads = self.attentive_heads
        good = heads is None or (positive_int(heads) and self.hidden_size % heads == 0)
        wanted = f"null or a divisor of hidden_size {self.hidden_size}"
        self.require("attentive_heads", good, wanted)

    def check_shape(self, name: str, length: int, allow_int: bool = True) -> None:
        value = getattr(self, name)
        good = (allow_int and positive_int(value)) or (
            isinstance(value, tuple) and len(value) == length and all(map(positive_int, value))
        )
        wanted = f"{length} positive integers"
        self.require(name, good, f"a positive integer or {wanted}" if allow_int else wanted)

    def check_head_width(self) -> None:
        self.check_heads("hidden_size", "num_attention_heads")

    def check_heads(self, width: str, heads: str) -> None:
        if getattr(self, width) % getattr(self, heads):
            raise ConfigError(
                f"{width} {getattr(self, width)} is not divisible by {heads} "
                f"{getattr(self, heads)}; every head needs the same width"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return pair(self.image_size)

    @property
    def has_pretraining(self) -> bool:
        """Whether the family is pre-trained by masking."""
        return "pretraining" in self.heads

    @property
    def average(self) -> str:
        """What is averaged over a video's views: the papers' choice.

        Several heads have no joint softmax, so their logits are averaged.
        """
        return "logits" if self.class_splits else self.view_average

    @property
    def has_own_stride(self) -> bool:
        """Whether the model was trained with another frame stride than its family's papers."""
        return self.frame_stride != type(self).frame_stride

    @property
    def split_sizes(self) -> tuple[int, ...]:
        """The number of classes of each head of the classifier; one head without class_splits."""
        return self.class_splits or (self.num_labels,)

    def learned_positions(self) -> int:
        """The length of the longest table of learned positions, 0 if positions are computed."""
        return 0

    def computed_tables(self, head: str) -> dict[str, int]:
        """The tables that a model with this head computes from its config alone, with bytes."""
        return {}

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """Frames, height and width, in pixels, of the block that becomes one token."""
        raise NotImplementedError

    @property
    def key_bias(self) -> bool:
        """Whether the key projection has a bias (queries and values follow `qkv_bias`)."""
        raise NotImplementedError

    @property
    def in_transformers(self) -> bool:
        """Whether transformers has this architecture and so may open what is saved of it."""
        return True

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width at the configured clip size."""
        return self.grid_of(self.num_frames, *self.frame_size)

    def grid_of(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of a clip of this size; whole tubelets only."""
        t, h, w = self.tubelet
        return frames // t, height // h, width // w

    @property
    def num_tokens(self) -> int:
        """Patch tokens at the configured clip size; a class token is not counted."""
        t, h, w = self.grid
        return t * h * w

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by class index, HuggingFace's placeholders where none are given."""
        named = self._names_by_id()
        return tuple(named.get(i, f"LABEL_{i}") for i in range(self.num_labels))

    def _names_by_id(self) -> dict[int, str]:
        names = enumerate(self.id2label or ())
        return dict((i, name) if isinstance(name, str) else name for i, name in names)

    @property
    def kept_note(self) -> str | None:
        """A line that names the keys of `extra`; None if all are common and mean nothing."""
        keys = sorted(self.extra.keys() - set(_COMMON))
        if not keys:
            return None
        return (
            f"config.json says what {type(self).__name__} does not have, which has no effect here "
            f"and is written back on save: {', '.join(keys)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: function fields in HuggingFace's spelling, and `extra`."""
        model_type = self.model_type if self.in_transformers else self.own_model_type
        out: dict[str, Any] = {**self.extra, "model_type": model_type}
        for field in dataclasses.fields(self):
            if field.metadata.get("execution") or field.name in ("num_labels", "id2label"):
                continue
            value = getattr(self, field.name)
            if field.metadata.get("only_if_set") and value == field.default:
                continue
            out[field.name] = list(value) if isinstance(value, tuple) else value
        if self.problem_type is None:
            del out["problem_type"]
        if self.id2label is not None or self.num_labels != 2:
            names = self._names_by_id() or dict(enumerate(self.labels))
            out["id2label"] = {str(i): label for i, label in names.items()}
            out["label2id"] = {label: i for i, label in names.items()}
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, warn: bool = True, **execution):
        """Read the content of config.json; `execution` sets execution fields.

        Unknown keys are kept in `extra`, with a warning that names them. `warn=False` is for
        callers that report `kept_note` themselves. Raises ConfigError for another model_type and
        for a key with which transformers would compute something else.
        """
        values = dict(values)
        found = values.get("model_type", cls.model_type)
        if found not in (cls.model_type, cls.own_model_type):
            raise ConfigError(
                f"model_type is {found!r}, expected {cls.model_type!r} or {cls.own_model_type!r}; "
                "this directory holds another kind of model"
            )
        values = cls._modernise(values)
        known = {f.name for f in dataclasses.fields(cls) if not f.metadata.get("execution")}
        # null leaves these to transformers, and means nothing where transformers has no such key.
        null = ["num_labels", "output_hidden_states", "output_attentions"]
        if found == cls.model_type:
            null += [f.name for f in dataclasses.fields(cls) if f.metadata.get("only_if_set")]
        unset = [name for name in null if values.get(name, 0) is None]
        fields: dict[str, Any] = {k: v for k, v in values.items() if k in known and k not in unset}
        extra = {k: v for k, v in values.items() if k not in known and k not in _REWRITTEN}
        refused = {
            k: v for k, v in extra.items() if k in cls.unsupported and v not in cls.unsupported[k]
        }
        if refused:
            listed = ", ".join(f"{k}={v!r}" for k, v in sorted(refused.items()))
            raise ConfigError(
                f"config.json sets what {cls.__name__} does not implement: {listed}. Without it "
                "the weights compute something else"
            )
        if fields.get("id2label") is not None:
            fields["id2label"] = _label_tuple(fields["id2label"])
            fields["num_labels"] = len(fields["id2label"])
        if placeholders(fields.get("id2label")):
            fields["id2label"] = None
        options: dict[str, Any] = {"extra": extra} | execution
        config = cls(**fields, **options)
        if warn and config.kept_note:
            logger.warning("%s", config.kept_note)
        return config

    @classmethod
    def _modernise(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values


def placeholders(id2label: tuple[str, ...] | None) -> bool:
    """Whether the class names are only HuggingFace's LABEL_0, LABEL_1, ..."""
    return id2label is not None and all(s == f"LABEL_{i}" for i, s in enumerate(id2label))


def _label_tuple(id2label) -> tuple[str, ...] | tuple[tuple[int, str], ...]:
    """Names in the order of classes if every class has one, else pairs of class and name."""
    if isinstance(id2label, list | tuple):
        if all(isinstance(label, str) for label in id2label):
            return tuple(id2label)
        if all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in id2label):
            id2label = dict(id2label)
    if not isinstance(id2label, Mapping):
        raise ConfigError(f"id2label must map class indices to names, got {id2label!r}")
    try:
        by_id = {int(k): str(v) for k, v in id2label.items()}
    except ValueError as error:
        raise ConfigError(f"id2label keys must be class indices: {error}") from None
    if sorted(by_id) == list(range(len(by_id))):
        return tuple(by_id[i] for i in range(len(by_id)))
    return tuple(sorted(by_id.items()))
