# SPDX-License-Identifier: Apache-2.0
"""One tiny image ViT of transformers, saved under every kind of names that are read.

The renaming here is written from the shapes that vision_transformer and timm have, not with our
tables, so that the two can disagree.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from helpers import randomise
from tiny import IMAGE
from tiny_checkpoints import read_safetensors

HEADS = IMAGE["num_attention_heads"]
KINDS = ("hf", "hf memory", "hf base", "npz", "npz old", "npz big", "msgpack", "state", "timm")


def torch_vit(**changes):
    """transformers' ViTForImageClassification with large weights."""
    import transformers

    values = IMAGE | dict(attn_implementation="eager", num_labels=5) | changes
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**values)).eval()
    randomise(model)
    return model


def arrays(model) -> dict[str, np.ndarray]:
    """The state of a ViTModel, by the names that transformers 5 has in memory."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def flax_names(vit, heads: int = HEADS) -> dict[str, np.ndarray]:
    """A ViTModel's weights as vision_transformer has them."""
    w, d = arrays(vit), vit.config.hidden_size
    out = {
        "cls": w["embeddings.cls_token"],
        "embedding/kernel": w["embeddings.patch_embeddings.projection.weight"].transpose(
            2, 3, 1, 0
        ),
        "embedding/bias": w["embeddings.patch_embeddings.projection.bias"],
        "Transformer/posembed_input/pos_embedding": w["embeddings.position_embeddings"],
        "Transformer/encoder_norm/scale": w["layernorm.weight"],
        "Transformer/encoder_norm/bias": w["layernorm.bias"],
    }
    for i in range(vit.config.num_hidden_layers):
        ours, theirs = f"Transformer/encoderblock_{i}", f"layers.{i}"
        for norm, name in (("LayerNorm_0", "layernorm_before"), ("LayerNorm_1", "layernorm_after")):
            out[f"{ours}/{norm}/scale"] = w[f"{theirs}.{name}.weight"]
            out[f"{ours}/{norm}/bias"] = w[f"{theirs}.{name}.bias"]
        attention = f"{ours}/MultiHeadDotProductAttention_0"
        for part in ("query", "key", "value"):
            name = f"{theirs}.attention.{part[0]}_proj"
            out[f"{attention}/{part}/kernel"] = w[f"{name}.weight"].T.reshape(d, heads, -1)
            out[f"{attention}/{part}/bias"] = w[f"{name}.bias"].reshape(heads, -1)
        name = f"{theirs}.attention.o_proj"
        out[f"{attention}/out/kernel"] = w[f"{name}.weight"].T.reshape(heads, -1, d)
        out[f"{attention}/out/bias"] = w[f"{name}.bias"]
        for j in range(2):
            dense, name = f"{ours}/MlpBlock_0/Dense_{j}", f"{theirs}.mlp.fc{j + 1}"
            out[f"{dense}/kernel"], out[f"{dense}/bias"] = w[f"{name}.weight"].T, w[f"{name}.bias"]
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def timm_names(vit) -> dict[str, np.ndarray]:
    """A ViTModel's weights as timm has them."""
    w, bias = arrays(vit), vit.config.qkv_bias
    out = {
        "cls_token": w["embeddings.cls_token"],
        "pos_embed": w["embeddings.position_embeddings"],
        "patch_embed.proj.weight": w["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": w["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": w["layernorm.weight"],
        "norm.bias": w["layernorm.bias"],
    }
    for i in range(vit.config.num_hidden_layers):
        for leaf in ("weight", "bias") if bias else ("weight",):
            parts = [w[f"layers.{i}.attention.{part}_proj.{leaf}"] for part in "qkv"]
            out[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(parts)
        for theirs, name in (
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.proj", "attention.o_proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            for leaf in ("weight", "bias"):
                out[f"blocks.{i}.{theirs}.{leaf}"] = w[f"layers.{i}.{name}.{leaf}"]
    return out


def numbered_in_one_row(tensors: dict) -> dict:
    """Submodules as files from before Linen, and the published npz, number them."""
    old = {
        "LayerNorm_1": "LayerNorm_2",
        "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
        "MlpBlock_0": "MlpBlock_3",
    }
    return {"/".join(old.get(part, part) for part in n.split("/")): x for n, x in tensors.items()}


def save_npz(path: Path, tensors: dict, prefix: str = "") -> Path:
    np.savez(path, **{prefix + name: value for name, value in tensors.items()})
    return path


def save_timm(path: Path, tensors: dict) -> Path:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def save_msgpack(path: Path, tree: dict) -> Path:
    from flax.serialization import msgpack_serialize

    path.write_bytes(msgpack_serialize(tree))
    return path


@dataclasses.dataclass
class ImageModels:
    """The same weights in files of every kind, written once."""

    root: Path

    def __post_init__(self):
        self.torch = torch_vit()
        self.vit = self.torch.vit
        self._written: dict[str, Path] = {}

    def path(self, kind: str) -> Path:
        """A directory or file; do not change it, see `copy`."""
        if kind not in self._written:
            self._written[kind] = self._write(kind, self.root / kind.replace(" ", "_"))
        return self._written[kind]

    def _write(self, kind: str, path: Path) -> Path:
        import transformers
        from flax.traverse_util import unflatten_dict

        if kind == "hf":
            self.torch.save_pretrained(path)
        elif kind == "hf memory":
            self.torch.save_pretrained(path, save_original_format=False)
        elif kind == "hf base":
            base = transformers.ViTModel(self.vit.config, use_mask_token=True)
            randomise(base, 1)
            base.load_state_dict(self.vit.state_dict(), strict=False)
            base.save_pretrained(path)
        if kind.startswith("hf"):
            return path
        if kind == "timm":
            head = {"head.weight": np.ones((5, 48), "f4"), "head.bias": np.ones(5, "f4")}
            return save_timm(path.with_suffix(".safetensors"), timm_names(self.vit) | head)
        tensors = flax_names(self.vit)
        head = {"head/kernel": np.ones((48, 5), "f4"), "head/bias": np.ones(5, "f4")}
        hidden = {"pre_logits/kernel": np.ones((48, 48), "f4"), "pre_logits/bias": np.ones(48)}
        if kind == "npz":
            return save_npz(path.with_suffix(".npz"), tensors | head)
        if kind == "npz old":
            return save_npz(path.with_suffix(".npz"), numbered_in_one_row(tensors) | hidden | head)
        if kind == "npz big":
            return save_npz(path.with_suffix(".npz"), tensors | head, "opt/target/")
        head = {name.replace("head", "output_projection"): value for name, value in head.items()}
        tree = unflatten_dict(tensors | head, sep="/")
        if kind == "msgpack":
            return save_msgpack(path.with_suffix(".msgpack"), {"params": tree})
        state = {"optimizer": {"target": tree, "state": {"step": 3}}, "global_step": 3}
        path.mkdir()
        save_msgpack(path / "checkpoint_3", state)
        return path

    def copy(self, directory: Path, kind: str, edit=lambda tensors: None, config=None) -> Path:
        """A changed copy of a HuggingFace directory or of a file of timm's names."""
        if kind == "timm":
            tensors = read_safetensors(self.path(kind).parent)  # the only safetensors there
            edit(tensors)
            return save_timm(directory / "model.safetensors", tensors)
        path = directory / "copy"
        shutil.copytree(self.path(kind), path)
        tensors = read_safetensors(path)
        edit(tensors)
        save_timm(path / "model.safetensors", tensors)
        if config is not None:
            values = json.loads((path / "config.json").read_text())
            config(values)
            (path / "config.json").write_text(json.dumps(values))
        return path
