# SPDX-License-Identifier: Apache-2.0
"""Random configurations of transformers' ViViT and VideoMAE, on disk in all forms it writes.

A case is a function of its number. Sizes come from ranges in which transformers runs: sides and
frame counts that the patch does not divide, no blocks, one label, heads of any width, every
activation without parameters, every problem type.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from helpers import randomise, to_torch

FORMS = (
    "safetensors", "sharded", "in-memory names", "bin", "sharded bin", "bfloat16", "float16",
)  # fmt: skip
HEADS = {
    "vivit": ("VivitModel", "VivitForVideoClassification"),
    "videomae": ("VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration, the class of transformers that runs it, how it lies on disk, its input."""

    number: int
    family: str
    name: str
    values: dict
    form: str
    frames: int  # of the clip; a multiple of the tubelet may leave some out

    def clip(self, batch: int = 2) -> np.ndarray:
        """float32 [b, t, h, w, c]."""
        size = self.values["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, self.frames, height, width, self.values["num_channels"])
        drawn = np.random.default_rng(self.number).standard_normal(shape)
        return drawn.astype(np.float32)

    def mask(self, tokens: int, batch: int = 2) -> np.ndarray:
        """bool [b, l], as many masked in each row, some and not all."""
        rng = np.random.default_rng(self.number)
        masked = int(rng.integers(1, tokens))
        return np.stack([rng.permutation(tokens) < masked for _ in range(batch)])

    def labels(self, batch: int = 2) -> np.ndarray:
        """What the problem type wants: int [b], or float [b] or [b, labels]."""
        rng, count = np.random.default_rng(self.number), self.values["num_labels"]
        kind = self.values.get("problem_type")
        if kind == "multi_label_classification":
            return rng.integers(0, 2, (batch, count)).astype(np.float32)
        if kind == "regression" or count == 1:
            shape = (batch,) if count == 1 else (batch, count)
            return rng.standard_normal(shape).astype(np.float32)
        return rng.integers(0, count, batch)


def random_case(number: int, activations: tuple[str, ...]) -> Case:
    """The case of a number; `activations` are the names that may be drawn."""
    rng = np.random.default_rng([20261130, number])
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    family = pick("vivit", "videomae")
    name = HEADS[family][rng.integers(len(HEADS[family]))]
    pretraining = name == "VideoMAEForPreTraining"
    heads = pick(1, 2, 3, 4)
    patch = [pick(2, 3, 4), pick(2, 3, 4)]
    length = pick(1, 2, 3)
    if family == "videomae" and (pretraining or rng.random() < 0.5):
        patch[1] = patch[0]  # transformers' decoder takes one number only
    # Its targets are cut with view(), which wants whole patches.
    rest = lambda size: 0 if pretraining else int(rng.integers(0, size))  # noqa: E731
    sides = [p * int(rng.integers(1, 4)) + rest(p) for p in patch]
    steps = int(rng.integers(1, 4))
    if pretraining and sides[0] * sides[1] * steps == patch[0] * patch[1]:
        steps = 2  # something visible, something masked
    channels = int(rng.integers(1, 5))
    values = {
        "image_size": sides if sides[0] != sides[1] or rng.random() < 0.3 else sides[0],
        "num_frames": steps * length + rest(length),
        "num_channels": channels,
        "hidden_size": heads * pick(2, 4, 5),
        "num_hidden_layers": pick(0, 1, 1, 2, 2),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(1, 25)),
        "hidden_act": pick(*activations),
        "hidden_dropout_prob": pick(0.0, 0.1, 1.0, 0, 1),
        "attention_probs_dropout_prob": pick(0.0, 0.2, 1.0),
        "initializer_range": pick(0.02, 0.5),
        "layer_norm_eps": pick(1e-12, 1e-6, 1e-5, 0.1),
        "num_labels": pick(1, 2, 3, 7),
    }
    if family == "vivit":
        values |= {
            "tubelet_size": [length, *patch],
            "qkv_bias": bool(rng.random() < 0.7),
            "pooler_act": pick("tanh", *activations),
            "pooler_output_size": pick(None, 6, 11),
        }
        if rng.random() < 0.3:
            values["head_dim"] = pick(1, 3, 8)
        if rng.random() < 0.2:  # the width of a head is rounded down
            values["hidden_size"] += 1
    else:
        values |= {
            "tubelet_size": length,
            "patch_size": patch[0] if patch[0] == patch[1] else patch,
            pick("qv_bias", "qkv_bias"): bool(rng.random() < 0.7),
            "use_mean_pooling": bool(rng.random() < 0.5),
            "decoder_num_attention_heads": (decoder_heads := pick(1, 2, 3)),
            "decoder_hidden_size": decoder_heads * pick(2, 4),
            "decoder_num_hidden_layers": pick(0, 1, 2),
            "decoder_intermediate_size": int(rng.integers(1, 17)),
            "norm_pix_loss": bool(channels != 3 or rng.random() < 0.5),
        }
        if not pretraining and rng.random() < 0.2:
            values["decoder_num_attention_heads"] = 7  # nothing is made of it
        if pretraining and values["norm_pix_loss"] and length * patch[0] ** 2 < 2:
            values["norm_pix_loss"] = channels != 3
    labels = values["num_labels"]
    kinds = [None, "regression", "multi_label_classification"]
    values["problem_type"] = pick(*kinds, *["single_label_classification"] * (labels > 1))
    if rng.random() < 0.4:  # named, now and then from 1 or with gaps
        start, step = pick((0, 1), (1, 1), (0, 2))
        names = {str(start + step * i): f"class {number} {i}" for i in range(labels)}
        values["id2label"] = names
    frames = values["num_frames"]
    if not pretraining and rng.random() < 0.3:
        frames = frames // length * length + int(rng.integers(0, length))
    return Case(number, family, name, values, pick(*FORMS), frames)


def torch_model(case: Case):
    """transformers' model of a case, eager, weights large, nothing at 0 or 1."""
    import transformers

    config = getattr(transformers, "VivitConfig" if case.family == "vivit" else "VideoMAEConfig")
    values = dict(case.values)
    if values["problem_type"] is None:
        del values["problem_type"]
    made = config(**values, attn_implementation="eager")
    model = getattr(transformers, case.name)(made).eval()
    randomise(model, case.number)
    return model


def write(case: Case, model, directory: Path):
    """Save a model in the case's form; returns it with the weights as they are stored."""
    import torch

    stored = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(case.form)
    if stored is not None:
        model = model.to(stored)
    options = {}
    if case.form.startswith("sharded"):
        options["max_shard_size"] = "1KB"
    if case.form == "in-memory names":
        options["save_original_format"] = False
    model.save_pretrained(directory, **options)
    if case.form.endswith("bin"):
        _as_pickles(directory)
    return model.float()


def _as_pickles(directory: Path) -> None:
    """Turn what save_pretrained wrote into pytorch_model.bin, sharded or not."""
    import torch
    from safetensors.torch import load_file

    for path in sorted(directory.glob("*.safetensors")):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(load_file(path), directory / name)
        path.unlink()
    index = directory / "model.safetensors.index.json"
    if index.exists():
        values = json.loads(index.read_text())
        renamed = {
            key: name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
            for key, name in values["weight_map"].items()
        }
        values["weight_map"] = renamed
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(values))
        index.unlink()


def torch_outputs(case: Case, model, double: bool = False):
    """transformers' output of a case, in float32 or with weights and clip in float64."""
    import torch

    model = model.double() if double else model.float()
    pixels = to_torch(case.clip())
    inputs = {"output_hidden_states": True, "output_attentions": True}
    if case.name == "VideoMAEForPreTraining":
        tokens = model.videomae.embeddings.num_patches
        inputs["bool_masked_pos"] = torch.from_numpy(case.mask(tokens))
    elif "Classification" in case.name:
        labels = torch.from_numpy(case.labels())
        inputs["labels"] = labels.double() if double and labels.is_floating_point() else labels
    with torch.no_grad():
        return model(pixels.double() if double else pixels, **inputs)
