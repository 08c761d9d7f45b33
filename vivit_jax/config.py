# SPDX-License-Identifier: Apache-2.0
"""Model configurations: frozen, with the field names of HuggingFace's config.json.

Two kinds of fields. *Function* fields decide what is computed and are written to config.json.
*Execution* fields (`dtype`, `param_dtype`, `attention`, `scan_layers`, `remat`) decide how; they
never change the function beyond rounding and are not written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vivit_jax.errors import ConfigError

HIDDEN_ACTS = (
    "gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "quick_gelu", "relu",
    "selu", "silu", "swish", "tanh", "sigmoid", "linear",
)  # fmt: skip
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "chunked", "cudnn")
REMAT_POLICIES = ("none", "block", "dots")
DTYPES = ("float32", "bfloat16", "float16", "float64")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Attributes that config.json may hold and that say nothing about the function.
_IGNORED = (
    "architectures", "model_type", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "dtype", "torch_dtype", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "return_dict",
    "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "use_cache", "gradient_checkpointing", "finetuning_task", "task_specific_params", "video_size",
    "label2id",
)  # fmt: skip
# Attributes of every HuggingFace config that would change the function if set otherwise.
_ONLY_AT_DEFAULT: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "tie_word_embeddings": (True, False),  # there are no word embeddings to tie
    "pruned_heads": ({}, None),
    "chunk_size_feed_forward": (0,),
}


def _execution(default):
    return dataclasses.field(default=default, metadata={"execution": True})


def _positive_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TransformerConfig:
    """Fields and checks that ViViT and VideoMAE share."""

    model_type: ClassVar[str]

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
    id2label: tuple[str, ...] | None = None
    problem_type: str | None = None

    dtype: str = _execution("float32")
    param_dtype: str = _execution("float32")
    attention: str = _execution("auto")
    scan_layers: bool = _execution(True)
    remat: str = _execution("none")

    def __post_init__(self):
        if self.id2label is not None:
            object.__setattr__(self, "id2label", _label_tuple(self.id2label))
            if len(self.id2label) != self.num_labels:
                raise ConfigError(
                    f"num_labels is {self.num_labels} but id2label names {len(self.id2label)} "
                    "classes; give both, or id2label=None for the names LABEL_0, LABEL_1, ..."
                )
        for name in ("image_size", "tubelet_size", "patch_size"):
            value = getattr(self, name, None)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in ("dtype", "param_dtype"):
            # jnp.bfloat16 and np.dtype("float32") are as good as their names.
            value = getattr(self, name)
            found = getattr(value, "dtype", value)
            object.__setattr__(self, name, getattr(found, "name", found))
        self._check_sizes()
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            self._require(name, 0.0 <= getattr(self, name) < 1.0, "a probability in [0, 1)")
        self._one_of("hidden_act", HIDDEN_ACTS)
        self._one_of("problem_type", (None, *PROBLEM_TYPES))
        self._one_of("dtype", DTYPES)
        self._one_of("param_dtype", DTYPES)
        self._one_of("attention", ATTENTION_IMPLEMENTATIONS)
        self._one_of("remat", REMAT_POLICIES)
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ConfigError(
                "problem_type='single_label_classification' needs num_labels > 1, got 1; one label "
                "is a regression"
            )

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def _one_of(self, name: str, allowed: tuple) -> None:
        self._require(name, getattr(self, name) in allowed, f"one of {list(allowed)}")

    def _check_sizes(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                self._require(field.name, _positive_int(value), "a positive integer")
            if field.type is float:
                self._require(field.name, _number(value) and value >= 0, "a number, 0 or more")
                # transformers refuses a config.json with 1 where it wants 1.0.
                object.__setattr__(self, field.name, float(value))
            if field.type is bool:
                self._require(field.name, isinstance(value, bool), "true or false")
        self._check_shape("image_size", 2)
        for size, patch, axis in zip(
            self.frame_size, self.tubelet[1:], ("height", "width"), strict=True
        ):
            if size % patch:
                raise ConfigError(
                    f"image_size {self.image_size} is not divisible by the patch {axis} {patch} "
                    f"({self.tubelet[1:]}); choose a multiple of it"
                )
        if self.num_frames % self.tubelet[0]:
            raise ConfigError(
                f"num_frames {self.num_frames} is not divisible by the tubelet length "
                f"{self.tubelet[0]}; choose a multiple of it"
            )
        self._check_heads("hidden_size", "num_attention_heads")

    def _check_shape(self, name: str, length: int, allow_int: bool = True) -> None:
        value = getattr(self, name)
        good = (allow_int and _positive_int(value)) or (
            isinstance(value, tuple) and len(value) == length and all(map(_positive_int, value))
        )
        wanted = f"{length} positive integers"
        self._require(name, good, f"a positive integer or {wanted}" if allow_int else wanted)

    def _check_heads(self, width: str, heads: str) -> None:
        if getattr(self, width) % getattr(self, heads):
            raise ConfigError(
                f"{width} {getattr(self, width)} is not divisible by {heads} "
                f"{getattr(self, heads)}; every head needs the same width"
            )

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        return _pair(self.image_size)

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """Frames, height and width, in pixels, of the block that becomes one token."""
        raise NotImplementedError

    @property
    def key_bias(self) -> bool:
        """Whether the key projection has a bias (queries and values follow `qkv_bias`)."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width at the configured clip size."""
        clip = (self.num_frames, *self.frame_size)
        return tuple(n // p for n, p in zip(clip, self.tubelet, strict=True))

    @property
    def num_tokens(self) -> int:
        """Patch tokens at the configured clip size; a class token is not counted."""
        t, h, w = self.grid
        return t * h * w

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by class index, HuggingFace's placeholders where none are given."""
        return self.id2label or tuple(f"LABEL_{i}" for i in range(self.num_labels))

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: the function fields in HuggingFace's spelling."""
        out: dict[str, Any] = {"model_type": self.model_type}
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
            out["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            out["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **execution):
        """Read the content of config.json; `execution` sets execution fields.

        Raises ConfigError for another model_type and for any attribute this library does not
        implement, rather than computing something else.
        """
        values = dict(values)
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ConfigError(
                f"model_type is {found!r}, expected {cls.model_type!r}; this directory holds "
                "another kind of model"
            )
        values = cls._modernise(values)
        known = {f.name for f in dataclasses.fields(cls) if not f.metadata.get("execution")}
        fields = {k: v for k, v in values.items() if k in known}
        unknown = {
            k: v
            for k, v in values.items()
            if k not in known
            and k not in _IGNORED
            and not (k in _ONLY_AT_DEFAULT and v in _ONLY_AT_DEFAULT[k])
        }
        if unknown:
            listed = ", ".join(f"{k}={v!r}" for k, v in sorted(unknown.items()))
            raise ConfigError(
                f"config.json sets what {cls.__name__} does not implement: {listed}. Remove an "
                "attribute from config.json only if you know that it does not change the function"
            )
        if fields.get("id2label") is not None:
            fields["id2label"] = _label_tuple(fields["id2label"])
            fields["num_labels"] = len(fields["id2label"])
        if placeholders(fields.get("id2label")):
            fields["id2label"] = None
        return cls(**fields, **execution)

    @classmethod
    def _modernise(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values


def placeholders(id2label: tuple[str, ...] | None) -> bool:
    """Whether the class names are only HuggingFace's LABEL_0, LABEL_1, ..."""
    return id2label is not None and all(s == f"LABEL_{i}" for i, s in enumerate(id2label))


def _label_tuple(id2label) -> tuple[str, ...]:
    if isinstance(id2label, list | tuple) and all(isinstance(label, str) for label in id2label):
        return tuple(id2label)
    if not isinstance(id2label, Mapping):
        raise ConfigError(f"id2label must map class indices to names, got {id2label!r}")
    try:
        by_id = {int(k): str(v) for k, v in id2label.items()}
    except ValueError as error:
        raise ConfigError(f"id2label keys must be class indices: {error}") from None
    if sorted(by_id) != list(range(len(by_id))):
        raise ConfigError(
            f"id2label must name every class 0..{len(by_id) - 1} once, got keys {sorted(by_id)}"
        )
    return tuple(by_id[i] for i in range(len(by_id)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VivitConfig(_TransformerConfig):
    """ViViT with joint space-time attention; the defaults are ViViT-B/16x2 (Arnab et al. 2021).

    `tubelet_size` is (frames, height, width) in pixels. `hidden_act="gelu_fast"` is the tanh
    approximation that scenic trains with. The pooler belongs to the headless model only.
    """

    model_type: ClassVar[str] = "vivit"

    num_frames: int = 32
    tubelet_size: tuple[int, int, int] = (2, 16, 16)
    hidden_act: str = "gelu_fast"
    layer_norm_eps: float = 1e-6
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"

    def __post_init__(self):
        super().__post_init__()
        width = self.pooler_output_size
        good = width is None or _positive_int(width)
        self._require("pooler_output_size", good, "a positive integer or null")
        self._one_of("pooler_act", HIDDEN_ACTS)

    def _check_sizes(self):
        self._check_shape("tubelet_size", 3, allow_int=False)
        super()._check_sizes()

    @property
    def tubelet(self):
        """Frames, height and width of a tubelet: `tubelet_size`."""
        return self.tubelet_size

    @property
    def key_bias(self):
        """Keys have a bias where queries and values have one."""
        return self.qkv_bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoMAEConfig(_TransformerConfig):
    """VideoMAE; the defaults are the base model (Tong et al. 2022) as HuggingFace computes it.

    `qkv_bias` adds biases to queries and values; there is no key bias, it could not change the
    softmax. HuggingFace fixes the epsilon of the two norms outside the blocks at 1e-5 whatever
    `layer_norm_eps` says; `fc_norm_eps` and `decoder_norm_eps` make them visible (the authors'
    models use 1e-6 everywhere).
    """

    model_type: ClassVar[str] = "videomae"

    num_frames: int = 16
    tubelet_size: int = 2
    patch_size: int | tuple[int, int] = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    use_mean_pooling: bool = True
    decoder_num_attention_heads: int = 6
    decoder_hidden_size: int = 384
    decoder_num_hidden_layers: int = 4
    decoder_intermediate_size: int = 1536
    norm_pix_loss: bool = True
    fc_norm_eps: float = dataclasses.field(default=1e-5, metadata={"only_if_set": True})
    decoder_norm_eps: float = dataclasses.field(default=1e-5, metadata={"only_if_set": True})

    def _check_sizes(self):
        self._check_shape("patch_size", 2)
        super()._check_sizes()
        self._check_heads("decoder_hidden_size", "decoder_num_attention_heads")

    @property
    def tubelet(self):
        """Frames, height and width of a tubelet: `tubelet_size` and `patch_size`."""
        return (self.tubelet_size, *_pair(self.patch_size))

    @property
    def key_bias(self):
        """Never: it could not change the softmax, and the checkpoints have none."""
        return False

    @property
    def patch_values(self) -> int:
        """Numbers in one tubelet, the width of a reconstructed token."""
        t, h, w = self.tubelet
        return t * h * w * self.num_channels

    def decoder(self) -> "VideoMAEConfig":
        """The same configuration with the decoder's sizes in the place of the encoder's."""
        return dataclasses.replace(
            self,
            hidden_size=self.decoder_hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
        )

    def to_dict(self):
        """The content of config.json."""
        # transformers 4 reads qkv_bias, transformers 5 writes qv_bias: say it in both spellings.
        return super().to_dict() | {"qv_bias": self.qkv_bias}

    @classmethod
    def _modernise(cls, values):
        # Where both are present transformers lets qkv_bias win.
        qv_bias = values.pop("qv_bias", None)
        if qv_bias is not None:
            values.setdefault("qkv_bias", qv_bias)
        return values


CONFIGS = {cls.model_type: cls for cls in (VivitConfig, VideoMAEConfig)}


def config_from_dict(values: Mapping[str, Any], **execution) -> VivitConfig | VideoMAEConfig:
    """Read the content of a config.json of either family, chosen by its `model_type`."""
    model_type = values.get("model_type")
    if model_type not in CONFIGS:
        raise ConfigError(
            f"config.json: model_type is {model_type!r}, expected one of {sorted(CONFIGS)}"
        )
    return CONFIGS[model_type].from_dict(values, **execution)
