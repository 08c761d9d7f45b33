# SPDX-License-Identifier: Apache-2.0
"""Model configurations: frozen, with the field names of HuggingFace's config.json.

There are two kinds of fields. *Function* fields decide what is computed and are written to
config.json. *Execution* fields (`dtype`, `param_dtype`, `attention`, `scan_layers`, `remat`) decide
how; they never change the function beyond rounding and are not written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vivit_jax.config_base import (
    TransformerConfig,
    number,
    optional_field,
    pair,
    positive_int,
)
from vivit_jax.errors import ConfigError, UserError
from vivit_jax.files.limits import check_unpacked

ATTENTION_TYPES = (
    "joint", "factorised_encoder", "factorised_self_attention", "factorised_dot_product",
)  # fmt: skip
POOLINGS = ("cls", "mean", "max", "sum")
Config = TransformerConfig  # of any family
# Per channel, of pixels in [0, 1]; VideoMAE was trained with these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VivitConfig(TransformerConfig):
    """ViViT in its four forms (Arnab et al. 2021); the defaults are ViViT-B/16x2, joint attention.

    `attention_type` is one of

    * "joint" (model 1): every token attends to every token;
    * "factorised_encoder" (model 2): `num_hidden_layers` blocks over the tokens of each frame, one
      pooled token per frame, `num_temporal_layers` blocks over those. With `spatial_only` the mean
      over frames takes the place of the temporal blocks;
    * "factorised_self_attention" (model 3): each block attends over time and over space, one after
      the other in `attention_order`, "time_space" or "space_time";
      `zero_init_temporal_attention` initialises the temporal attention to contribute nothing;
    * "factorised_dot_product" (model 4): in each block half of the heads attend over time, half
      over space.

    `pooling` makes one vector of the tokens (of each stage, in a factorised encoder): "cls" adds a
    class token and reads it; "mean", "max" and "sum" reduce over all tokens, without a class token.
    Models 3 and 4 have no class token. None is "cls" where there can be one, else "mean"; it is
    resolved at once, so give `dataclasses.replace` pooling=None with another attention_type.

    `tubelet_size` is (frames, height, width) in pixels. With `num_sampled_frames` a clip is thinned
    to that many frames, uniformly, before it is cut into tubelets of one frame.
    `drop_path_rate` is scenic's droplayer; it acts in factorised self-attention too, where scenic
    accepts a rate and ignores it. `hidden_dropout_prob` acts on the outputs of residual branches,
    as in transformers; scenic also drops between the layers of the MLP. `hidden_act="gelu_fast"` is
    the tanh approximation that scenic trains with. Only the headless model has the pooler.

    `head_dim` is the width of a head; all heads together need not be as wide as `hidden_size`. If
    the heads of a config.json do not divide `hidden_size`, the width is rounded down as in
    transformers.
    """

    model_type: ClassVar[str] = "vivit"
    own_model_type: ClassVar[str] = "vivit_jax"
    title: ClassVar[str] = "ViViT"
    heads: ClassVar[Mapping[str, str]] = {
        "none": "VivitModel",
        "classification": "VivitForVideoClassification",
    }
    view_average: ClassVar[str] = "logits"
    initial_values: ClassVar[str] = "scenic"

    num_frames: int = 32
    tubelet_size: tuple[int, int, int] = (2, 16, 16)
    hidden_act: str = "gelu_fast"
    layer_norm_eps: float = 1e-6
    pooler_output_size: int | None = None  # None: hidden_size
    pooler_act: str = "tanh"
    head_dim: int | None = optional_field(None)  # None: hidden_size // num_attention_heads
    drop_path_rescale: bool = optional_field(False)  # scenic does not
    attention_type: str = optional_field("joint")
    attention_order: str = optional_field("time_space")
    num_temporal_layers: int = optional_field(4)
    spatial_only: bool = optional_field(False)
    zero_init_temporal_attention: bool = optional_field(False)
    pooling: str | None = optional_field(None)
    num_sampled_frames: int | None = optional_field(None)
    attentive_heads: int | None = optional_field(None)
    view_sampler: str = optional_field("loop")

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **TransformerConfig.unsupported,
        "is_causal": (None, False),
    }

    def __post_init__(self):
        super().__post_init__()
        width = self.pooler_output_size
        good = width is None or positive_int(width)
        self.require("pooler_output_size", good, "a positive integer or null")
        self.check_activation("pooler_act")
        self._check_attention()

    def check_head_width(self):
        if self.head_dim is None:
            super().check_head_width()
        else:
            self.require("head_dim", positive_int(self.head_dim), "a positive integer or null")

    def check_sizes(self):
        self.check_shape("tubelet_size", 3, allow_int=False)
        sampled = self.num_sampled_frames
        self.require(
            "num_sampled_frames",
            sampled is None or positive_int(sampled),
            "a positive integer or null",
        )
        super().check_sizes()
        if sampled is not None and self.tubelet_size[0] != 1:
            raise ConfigError(
                f"num_sampled_frames {sampled} needs tubelets of one frame, got tubelet_size "
                f"{self.tubelet_size}; use tubelet_size=(1, {self.tubelet_size[1]}, "
                f"{self.tubelet_size[2]}), or num_sampled_frames=None"
            )
        if sampled is not None and sampled > self.num_frames:
            raise ConfigError(
                f"num_sampled_frames {sampled} exceeds num_frames {self.num_frames}; the model "
                "picks them from the frames of a clip"
            )

    def _check_attention(self):
        self.one_of("attention_type", ATTENTION_TYPES)
        self.one_of("attention_order", ("time_space", "space_time"))
        self.one_of("pooling", (None, *POOLINGS))
        blocks_factorised = self.attention_type in ATTENTION_TYPES[2:]
        if self.pooling is None:
            object.__setattr__(self, "pooling", "mean" if blocks_factorised else "cls")
        if blocks_factorised and self.pooling == "cls":
            raise ConfigError(
                f"pooling 'cls' needs a class token, which {self.attention_type} does not have: it "
                "has no place in time and space; use pooling 'mean', 'max' or 'sum', or None for "
                "'mean'"
            )
        if self.attention_type == "factorised_dot_product" and self.num_attention_heads % 2:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be even for "
                "factorised_dot_product: half of the heads attend over time, half over space"
            )
        if self.attention_type != "joint" and not self.num_hidden_layers:
            raise ConfigError(
                f"num_hidden_layers must be a positive integer for attention_type "
                f"{self.attention_type!r}, got 0"
            )
        for name, wanted in (
            ("spatial_only", "factorised_encoder"),
            ("zero_init_temporal_attention", "factorised_self_attention"),
        ):
            if getattr(self, name) and self.attention_type != wanted:
                raise ConfigError(
                    f"{name} needs attention_type {wanted!r}, got {self.attention_type!r}"
                )

    @property
    def tubelet(self):
        """Frames, height and width of a tubelet: `tubelet_size`."""
        return self.tubelet_size

    @property
    def head_width(self):
        """Width of one attention head."""
        return self.head_dim or super().head_width

    @property
    def key_bias(self):
        """Keys have a bias where queries and values have one."""
        return self.qkv_bias

    @property
    def in_transformers(self):
        """transformers has only joint attention on tubelets, read from the class token."""
        joint = self.attention_type == "joint" and self.pooling == "cls"
        return joint and self.num_sampled_frames is None and self.attentive_heads is None

    @property
    def temporal_layers(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of blocks of the temporal stage, 0 without one."""
        staged = self.attention_type == "factorised_encoder" and not self.spatial_only
        return self.num_temporal_layers if staged else 0

    @classmethod
    def _modernise(cls, values):
        # transformers reads a width of 0 as None, and rounds the width of heads down.
        values["pooler_output_size"] = values.get("pooler_output_size") or None
        sizes = [values.get(k, getattr(cls, k)) for k in ("hidden_size", "num_attention_heads")]
        if all(map(positive_int, sizes)) and sizes[0] % sizes[1]:
            values.setdefault("head_dim", sizes[0] // sizes[1])
        return values

    def grid_of(self, frames, height, width):
        """Tokens along time, height and width of a clip of this size."""
        return super().grid_of(self.num_sampled_frames or frames, height, width)

    def learned_positions(self):
        """The length of the longest table of learned positions, without the class token."""
        time, height, width = self.grid
        if self.attention_type == "factorised_encoder":
            return max(time, height * width)
        return time * height * width

    def computed_tables(self, head):
        """The indices of the sampled frames, with bytes."""
        sampled, frames = self.num_sampled_frames, self.num_frames
        return {f"{sampled} of {frames:,} frames": 8 * frames} if sampled else {}

    def to_dict(self):
        """The content of config.json; the fields of attention are always written."""
        out = super().to_dict()
        if self.in_transformers:
            del out["pooling"]
            return out
        out |= {"attention_type": self.attention_type, "pooling": self.pooling}
        if self.temporal_layers:
            out["num_temporal_layers"] = self.num_temporal_layers
        if self.attention_type == "factorised_self_attention":
            out["attention_order"] = self.attention_order
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoMAEConfig(TransformerConfig):
    """VideoMAE; the defaults are the base model (Tong et al. 2022) as HuggingFace computes it.

    `qkv_bias` adds biases to queries and values; a key bias could not change the softmax, so there
    is none. HuggingFace fixes the epsilon of the two norms outside the blocks at 1e-5 whatever
    `layer_norm_eps` says; `fc_norm_eps` and `decoder_norm_eps` make them visible (the authors'
    models use 1e-6 everywhere).

    From the authors' code: `head_dropout` acts before the classifier. `cosine_attention` compares
    the directions of queries and keys, times a learned factor per head. A positive
    `layer_scale_init` puts learned factors with this initial value on every residual branch
    (VideoMAE V2; no published model uses either of the last two).

    `image_mean` and `image_std`, a number per channel, are the processor's; they turn pixels back
    into [0, 1] where pre-training predicts pixels. Without them RGB uses ImageNet's, and other
    channels stay as they are.
    """

    model_type: ClassVar[str] = "videomae"
    own_model_type: ClassVar[str] = "videomae_jax"
    title: ClassVar[str] = "VideoMAE"
    heads: ClassVar[Mapping[str, str]] = {
        "none": "VideoMAEModel",
        "pretraining": "VideoMAEForPreTraining",
        "classification": "VideoMAEForVideoClassification",
    }

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
    fc_norm_eps: float = optional_field(1e-5)
    decoder_norm_eps: float = optional_field(1e-5)
    head_dropout: float = optional_field(0.0)
    cosine_attention: bool = optional_field(False)
    layer_scale_init: float = optional_field(0.0)
    attentive_heads: int | None = optional_field(None)
    image_mean: float | tuple[float, ...] | None = optional_field(None)
    image_std: float | tuple[float, ...] | None = optional_field(None)
    frame_stride: int = optional_field(4)

    probabilities: ClassVar[tuple[str, ...]] = (*TransformerConfig.probabilities, "head_dropout")
    may_be_zero: ClassVar[tuple[str, ...]] = (
        *TransformerConfig.may_be_zero, "decoder_num_hidden_layers",
    )  # fmt: skip

    def check_sizes(self):
        self.check_shape("patch_size", 2)
        super().check_sizes()
        if (self.image_mean is None) != (self.image_std is None):
            raise ConfigError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}; give both, the "
                "processor's, or neither"
            )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is None:
                continue
            if number(value):
                check_unpacked(f"{name} of all channels", 8 * self.num_channels, error=ConfigError)
                value = (value,) * self.num_channels
            good = isinstance(value, tuple) and len(value) == self.num_channels
            good = good and all(number(v) and (v > 0 or name == "image_mean") for v in value)
            wanted = "a number" if name == "image_mean" else "a number above 0"
            self.require(name, good, f"{wanted} for each of {self.num_channels} channels, or one")
            object.__setattr__(self, name, tuple(map(float, value)))

    @property
    def tubelet(self):
        """Frames, height and width of a tubelet: `tubelet_size` and `patch_size`."""
        return (self.tubelet_size, *pair(self.patch_size))

    @property
    def key_bias(self):
        """Never: it could not change the softmax, and checkpoints have none."""
        return False

    @property
    def in_transformers(self):
        """transformers has neither cosine attention nor layer scale, nor an attentive head."""
        own = self.cosine_attention or self.layer_scale_init or self.attentive_heads
        return not own

    def computed_tables(self, head):
        """The fixed positions of the encoder and of pre-training's decoder, with bytes."""
        widths = {"": self.hidden_size}
        if head == "pretraining":
            widths["the decoder's "] = self.decoder_hidden_size
        return {
            f"{whose}positions of {self.num_tokens:,} tokens of width {width:,}": (
                8 * self.num_tokens * width
            )
            for whose, width in widths.items()
        }

    @property
    def patch_values(self) -> int:
        """The number of values in a tubelet, the width of a reconstructed token."""
        t, h, w = self.tubelet
        return t * h * w * self.num_channels

    def decoder(self) -> "VideoMAEConfig":
        """The same configuration with the decoder's sizes in place of the encoder's.

        Raises ConfigError if the decoder's heads do not divide its width; as in transformers that
        does not matter to models without a decoder.
        """
        self.check_heads("decoder_hidden_size", "decoder_num_attention_heads")
        return dataclasses.replace(
            self,
            hidden_size=self.decoder_hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
            attentive_heads=None,
        )

    def to_dict(self):
        """The content of config.json."""
        # transformers 4 reads qkv_bias, transformers 5 writes qv_bias: write both.
        return super().to_dict() | {"qv_bias": self.qkv_bias}

    @classmethod
    def _modernise(cls, values):
        # If both are present, transformers uses qkv_bias.
        qv_bias = values.pop("qv_bias", None)
        if qv_bias is not None:
            values.setdefault("qkv_bias", qv_bias)
        return values


FAMILIES: list[type[Config]] = []
ARCHITECTURES: dict[str, tuple[str, str]] = {}  # class name -> (family, head)


def register_config(config: type[Config]) -> None:
    """Add a family's config; `vivit_jax.models.registry.register_family` adds the whole family.

    Raises UserError if its model_type or the name of one of its classes is taken.
    """
    types = {name for each in FAMILIES for name in (each.model_type, each.own_model_type)}
    names = (config.model_type, config.own_model_type, *config.heads.values())
    taken = sorted({*names} & {*types, *ARCHITECTURES})
    if taken:
        raise UserError(f"{config.__name__}: {', '.join(taken)} is taken; choose another name")
    FAMILIES.append(config)
    for head, name in config.heads.items():
        ARCHITECTURES[name] = (config.model_type, head)


register_config(VivitConfig)
register_config(VideoMAEConfig)


def config_from_dict(values: Mapping[str, Any], **options) -> Config:
    """Read the content of a config.json of any family, chosen by its `model_type`.

    `options` are those of `from_dict`.
    """
    model_type = values.get("model_type")
    known = {name: cls for cls in FAMILIES for name in (cls.model_type, cls.own_model_type)}
    if model_type not in known:
        raise ConfigError(
            f"config.json: model_type is {model_type!r}, expected one of {sorted(known)}"
        )
    return known[model_type].from_dict(values, **options)


def head_of_architectures(architectures: Any, family: str) -> str | None:
    """The head that config.json's `architectures` names; None if it names no class known here."""
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ConfigError(f"architectures must be a list of class names, got {architectures!r}")
    for name in architectures or ():
        found, head = ARCHITECTURES.get(name, (None, None))
        if found == family:
            return head
    return None


def architecture(family: str, head: str) -> str:
    """The class name of a model, in HuggingFace and here."""
    return next(name for name, key in ARCHITECTURES.items() if key == (family, head))


def check_head(family: str, head: str) -> None:
    """Raise UserError unless the family has such a head."""
    heads = [h for f, h in ARCHITECTURES.values() if f == family]
    if head not in heads:
        raise UserError(f"head is {head!r}, expected one of {sorted(heads)} for {family}")
