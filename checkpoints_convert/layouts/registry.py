# SPDX-License-Identifier: Apache-2.0
"""Which layout a checkpoint is in, and the table that reads and writes it."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from checkpoints_convert.rules import Rule
from checkpoints_convert.tables import hf_videomae, hf_vivit, scenic_vivit, videomae_authors
from vivit_jax.config import Config
from vivit_jax.errors import CheckpointError, UserError

# Table modules by layout and family. The command line offers the layouts found here.
_TABLES = {
    ("hf", "vivit"): hf_vivit,
    ("hf", "videomae"): hf_videomae,
    ("scenic", "vivit"): scenic_vivit,
    ("videomae", "videomae"): videomae_authors,
}
PREFIXES = (hf_vivit.PREFIX, hf_videomae.PREFIX)  # of the backbones in HuggingFace's names
LAYOUTS = tuple(dict.fromkeys(layout for layout, _ in _TABLES))
IMAGE = "vit"  # read, as the start of a video model, never written
# The kernel of the patch embedding tells the layouts apart, and its rank images from video; the
# authors of VideoMAE share timm's names.
_PATCH_KERNELS = {
    "embeddings.patch_embeddings.projection.weight": "hf",
    "patch_embed.proj.weight": "timm",
    "embedding/kernel": "flax",
}
_HEAD_NAMES = {
    "classification": ("classifier.",),
    "pretraining": ("decoder.", "encoder_to_decoder.", "mask_token"),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint spells one model: its layout, family, head, name prefix and dialect.

    `pooler` says whether a headless model has what makes one vector of its tokens: ViViT's pooling
    layer, VideoMAE's norm of their mean.
    """

    name: str
    family: str
    head: str
    prefix: str
    pooler: bool = False
    dialect: str = "hub"

    def rules(self, config: Config) -> list[Rule]:
        """The weight table of this layout for a model of `config`."""
        return _table(self.name, self.family).rules(
            config,
            head=self.head,
            prefix=self.prefix,
            dialect=self.dialect,
            pooler=self.pooler,
        )

    def with_head(self, head: str) -> "Layout":
        """The same names read into a model with another head."""
        return dataclasses.replace(self, head=head, pooler=self.pooler and head == "none")


def published(family: str, head: str, pooler: bool = False, name: str = "hf") -> Layout:
    """The spelling in which a layout is written: for hf, that of the files on the hub."""
    table = _table(name, family)
    prefix = table.PREFIX if head in table.PREFIXED else ""
    return Layout(name, family, head, prefix, pooler=pooler)


def naming(tensors: Mapping[str, Any]) -> tuple[str, str] | None:
    """(naming, prefix) of a checkpoint: "hf", "timm" or "flax" names; None if there are no patches.

    The prefix is what precedes the name of the patch embedding.
    """
    for name in tensors:
        for ending, kind in _PATCH_KERNELS.items():
            prefix = name.removesuffix(ending)
            if name.endswith(ending) and (not prefix or prefix[-1] in "./"):
                return kind, prefix
    return None


def detect(
    names: Collection[str],
    config: Config,
    head: str | None = None,
    name: str = "hf",
) -> Layout:
    """The spelling of a checkpoint of this layout with these tensor names.

    `head` is what config.json's `architectures` says an hf checkpoint holds; without it, and in
    every other layout, the names decide. Raises CheckpointError if the names are of another family
    than the config.
    """
    family = config.model_type
    table = _table(name, family)
    if name != "hf":
        return Layout(name, family, *table.spelling(names))
    for (layout, other), wrong in _TABLES.items():
        if layout == name and other != family and any(n.startswith(wrong.PREFIX) for n in names):
            raise CheckpointError(
                f"config.json says model_type {family!r} but the tensors are named "
                f"{wrong.PREFIX}*: this is a {other} checkpoint with the wrong config.json"
            )
    prefix = table.PREFIX if any(n.startswith(table.PREFIX) for n in names) else ""
    head = head or _head_of(names)
    pooler = head == "none" and any(n.startswith(table.pooler(prefix)) for n in names)
    return Layout(name, family, head, prefix, pooler, table.dialect_of(names))


def _table(name: str, family: str):
    if (name, family) not in _TABLES:
        held = [other for layout, other in _TABLES if layout == name]
        raise UserError(f"layout {name!r} holds {', '.join(held) or 'no model'}, not {family}")
    return _TABLES[name, family]


def _head_of(names: Collection[str]) -> str:
    for head, prefixes in _HEAD_NAMES.items():
        if any(name.startswith(prefixes) for name in names):
            return head
    return "none"
