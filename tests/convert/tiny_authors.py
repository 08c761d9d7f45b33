# SPDX-License-Identifier: Apache-2.0
"""Files of VideoMAE's authors: names, shapes and order as their modules register them.

Written out from the trees of the published files, sharing nothing with the tables that read them.
"""

import argparse
from pathlib import Path

import numpy as np

TINY = dict(width=48, heads=4, layers=3, mlp=80, patch=(8, 8), classes=5)
DECODER = dict(width=24, heads=2, layers=2, mlp=40)
V2 = dict(cosine=True, layer_scale=True)
# name -> what differs from a V1 model
MODELS = {
    "pretraining": dict(kind="pretraining"),
    "fine-tuned": dict(kind="classification"),
    "fine-tuned, first token": dict(kind="classification", mean_pooling=False),
    "V2 pretraining": dict(kind="pretraining", **V2),
    "V2 fine-tuned": dict(kind="classification", **V2),
    "V2 cosine": dict(kind="classification", cosine=True),
    "V2 layer scale": dict(kind="pretraining", layer_scale=True),
    "pretraining no bias": dict(kind="pretraining", bias=False),
    "headless": dict(kind="none", mean_pooling=False),
    "headless, no norm": dict(kind="none"),
}
FLAGS = ["num_attention_heads=4", "num_frames=6", "image_size=24,16"]


def settings_of(case: str) -> list[str]:
    """What a file of a tiny model does not say."""
    values = MODELS[case]
    more = ["decoder_num_attention_heads=2"] if values["kind"] == "pretraining" else []
    heads = 0 if values.get("cosine") else 1
    return FLAGS[1 - heads :] + more * heads


def blocks(prefix, *, width, heads, layers, mlp, cosine=False, layer_scale=False, bias=True):
    """Shapes of the blocks of one stack by name, in order."""
    tree = {}
    for i in range(layers):
        at = f"{prefix}blocks.{i}."
        if layer_scale:
            tree |= {f"{at}gamma_1": (width,), f"{at}gamma_2": (width,)}
        tree |= {f"{at}norm1.weight": (width,), f"{at}norm1.bias": (width,)}
        if cosine:
            tree[f"{at}attn.scale"] = (heads, 1, 1)
        if bias:
            tree |= {f"{at}attn.q_bias": (width,), f"{at}attn.v_bias": (width,)}
        tree |= {
            f"{at}attn.qkv.weight": (3 * width, width),
            f"{at}attn.proj.weight": (width, width),
            f"{at}attn.proj.bias": (width,),
            f"{at}norm2.weight": (width,),
            f"{at}norm2.bias": (width,),
            f"{at}mlp.fc1.weight": (mlp, width),
            f"{at}mlp.fc1.bias": (mlp,),
            f"{at}mlp.fc2.weight": (width, mlp),
            f"{at}mlp.fc2.bias": (width,),
        }
    return tree


def shapes(
    kind,
    *,
    width,
    patch,
    classes=0,
    decoder=None,
    mean_pooling=True,
    channels=3,
    tubelet=2,
    heads=0,
    layers,
    mlp,
    **options,
):
    """Shapes of a model by name, in order."""
    prefix = "encoder." if kind == "pretraining" else ""
    tree = {"mask_token": (1, 1, decoder["width"])} if kind == "pretraining" else {}
    tree[f"{prefix}patch_embed.proj.weight"] = (width, channels, tubelet, *patch)
    tree[f"{prefix}patch_embed.proj.bias"] = (width,)
    tree |= blocks(prefix, width=width, heads=heads, layers=layers, mlp=mlp, **options)
    if kind == "pretraining":
        d, pixels = decoder["width"], channels * tubelet * patch[0] * patch[1]
        tree |= {"encoder.norm.weight": (width,), "encoder.norm.bias": (width,)}
        tree |= blocks("decoder.", **decoder, **options)
        tree |= {"decoder.norm.weight": (d,), "decoder.norm.bias": (d,)}
        tree |= {"decoder.head.weight": (pixels, d), "decoder.head.bias": (pixels,)}
        return tree | {"encoder_to_decoder.weight": (d, width)}
    if not mean_pooling:
        tree |= {"norm.weight": (width,), "norm.bias": (width,)}
    if kind == "classification":
        if mean_pooling:
            tree |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
        tree |= {"head.weight": (classes, width), "head.bias": (classes,)}
    return tree


def state(case: str, seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """Random tensors of a tiny model, in order; nothing is at 0 or 1."""
    values = {**TINY, "decoder": DECODER, **MODELS[case], **changes}
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * 0.3 + 0.1).astype(np.float32)
        for name, shape in shapes(**values).items()
    }


def torch_state(tensors) -> dict:
    """The same as torch tensors; bfloat16 comes as the bits that numpy has no name for."""
    import torch

    def converted(array):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return {name: converted(np.array(value)) for name, value in tensors.items()}


def training_state(tensors, container: str, **arguments) -> dict:
    """What the authors' scripts save around a state dict; `arguments` are those of the script."""
    import torch

    parameters = torch_state(tensors)
    if container == "bare":
        return parameters
    moments = {
        i: {"step": torch.tensor(3.0), "exp_avg": p * 0, "exp_avg_sq": p * 0}
        for i, p in enumerate(parameters.values())
    }
    # The schedule is an array, and the optimiser keeps the element that it was given.
    groups = [
        {"lr": np.linspace(0, 0.1, 3)[1], "betas": (0.9, 0.95), "params": list(range(len(moments)))}
    ]
    held = {
        container: parameters,
        "optimizer": {"state": moments, "param_groups": groups},
        "epoch": 3,
        "scaler": {"scale": 65536.0, "_growth_tracker": 7},
    }
    if container == "model":
        held["args"] = argparse.Namespace(model="x", opt_betas=None, output_dir="o", **arguments)
        held["model_ema"] = {name: p + 1 for name, p in parameters.items()}
    return held


def write(path, tensors, container: str = "model", **arguments) -> Path:
    """Save as torch does; returns the path."""
    import torch

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(training_state(tensors, container, **arguments), path)
    return path


def read(path, container: str = "model") -> dict[str, np.ndarray]:
    """The state dict of a file, in its order, by torch itself."""
    import ml_dtypes
    import torch

    held = torch.load(path, weights_only=True)
    held = held if container == "bare" else held[container]
    return {
        name: t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if t.dtype == torch.bfloat16
        else t.numpy()
        for name, t in held.items()
    }
