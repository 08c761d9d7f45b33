# SPDX-License-Identifier: Apache-2.0
"""VideoMAE and VideoMAE V2 in float64 numpy, written from the papers, from nothing of this package.

Tong et al. 2022, https://arxiv.org/abs/2203.12602 ("V1"), and Wang et al. 2023,
https://arxiv.org/abs/2303.16727 ("V2"). Parameter names and shapes are those of the authors' files.
What the papers leave open follows what those files were trained with: erf GELU, LayerNorm epsilon
1e-6 everywhere, tokens in time-major order, a fixed sinusoid over the flat token index. Cosine
attention is there where a block has a `attn.scale`, layer scale where it has a `gamma_1`.
"""

import numpy as np
from scipy.special import erf

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGEST_SCALE = 4.6052  # log(100), as V2's code rounds it: exp(4.6052) is 100.003


def random_params(config, head, rng):
    """Draw every parameter of one model, float32, so large that none hides at its initial value.

    `head` is "pretraining" or "classification"; `config` has the field names of config.json.
    """
    shapes = {}

    def dense(name, inputs, outputs, bias=True):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def blocks(prefix, depth, width, mlp, heads):
        for name in (f"{prefix}blocks.{layer}" for layer in range(depth)):
            norm(f"{name}.norm1", width)
            dense(f"{name}.attn.qkv", width, 3 * width, bias=False)
            if config.qkv_bias:  # keys have none
                shapes[f"{name}.attn.q_bias"] = shapes[f"{name}.attn.v_bias"] = (width,)
            if config.cosine_attention:
                shapes[f"{name}.attn.scale"] = (heads, 1, 1)
            dense(f"{name}.attn.proj", width, width)
            norm(f"{name}.norm2", width)
            dense(f"{name}.mlp.fc1", width, mlp)
            dense(f"{name}.mlp.fc2", mlp, width)
            if config.layer_scale_init > 0:
                shapes[f"{name}.gamma_1"] = shapes[f"{name}.gamma_2"] = (width,)

    assert head in ("pretraining", "classification"), head
    prefix = "encoder." if head == "pretraining" else ""
    width, patch = config.hidden_size, config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    kernel = (config.num_channels, config.tubelet_size, *patch)
    shapes[f"{prefix}patch_embed.proj.weight"] = (width, *kernel)
    shapes[f"{prefix}patch_embed.proj.bias"] = (width,)
    sizes = (config.intermediate_size, config.num_attention_heads)
    blocks(prefix, config.num_hidden_layers, width, *sizes)
    if head == "pretraining":
        narrow = config.decoder_hidden_size
        norm("encoder.norm", width)
        dense("encoder_to_decoder", width, narrow, bias=False)
        shapes["mask_token"] = (1, 1, narrow)
        sizes = (config.decoder_intermediate_size, config.decoder_num_attention_heads)
        blocks("decoder.", config.decoder_num_hidden_layers, narrow, *sizes)
        norm("decoder.norm", narrow)
        dense("decoder.head", narrow, int(np.prod(kernel)))
    else:
        norm("fc_norm" if config.use_mean_pooling else "norm", width)
        dense("head", width, config.num_labels)

    params = {}
    for name, shape in shapes.items():
        if name.endswith("attn.scale"):  # from 3 to 50 times the cosine, where it starts at 10
            value = np.log(10) + 0.7 * rng.standard_normal(shape)
        elif len(shape) == 1 or name == "mask_token":
            value = 0.3 * rng.standard_normal(shape)
            if "norm" in name and name.endswith("weight"):
                value += 1
            elif "gamma" in name:
                value += 0.5
        else:
            value = rng.standard_normal(shape) * min(2 / np.sqrt(np.prod(shape[1:])), 0.5)
        params[name] = value.astype(np.float32)
    return params


def pretrain(
    params,
    pixels,
    hidden,
    dropped=None,
    *,
    tubelet=(2, 16, 16),
    heads=12,
    decoder_heads=6,
    normalise=True,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
):
    """Run pre-training on pixels [b, t, h, w, c]; everything returned is float64.

    `hidden` bool [b, n] says which tokens the encoder does not see, `dropped` bool [b, n] which the
    decoder does not reconstruct (V2 section 3.2); without it (V1) it reconstructs the hidden ones.
    Returned, k tokens being reconstructed: 'embedded' and each of 'layers', what enters the
    encoder's blocks and leaves them, 'tokens' after its norm; 'decoder_embedded' and
    'decoder_layers' alike; 'logits' and 'targets' [b, k, t * h * w * c]; 'counted' bool [b, k], the
    tokens in the loss; 'loss'.
    """
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    pixels = np.asarray(pixels, np.float64)
    out = encode(params, pixels, tubelet, heads, "encoder.", hidden)
    out["tokens"] = layer_norm(subtree(params, "encoder.norm"), out["layers"][-1])

    # The decoder sees what the encoder made, then a mask token for all that it is to reconstruct.
    # In V2 these overlap: a token may come once encoded and once as a mask token.
    kept = hidden if dropped is None else ~dropped
    visible = out["tokens"] @ params["encoder_to_decoder.weight"].T
    positions = sinusoid(hidden.shape[1], visible.shape[-1])
    x = []
    for row in range(len(pixels)):
        asked = params["mask_token"][0] + positions[kept[row]]
        x.append(np.concatenate([visible[row] + positions[~hidden[row]], asked]))
    x = np.stack(x)
    out["decoder_embedded"] = x
    out["decoder_layers"] = run_blocks(params, "decoder.", x, decoder_heads)
    x = out["decoder_layers"][-1][:, visible.shape[1] :]
    x = layer_norm(subtree(params, "decoder.norm"), x)
    out["logits"] = dense(subtree(params, "decoder.head"), x)

    targets = all_targets(pixels * std + mean, tubelet, normalise)
    out["targets"] = np.stack([rows[keep] for rows, keep in zip(targets, kept, strict=True)])
    # V2 section 3.2: the loss is over tokens that the encoder did not see and the decoder made.
    out["counted"] = np.stack([rows[keep] for rows, keep in zip(hidden, kept, strict=True)])
    out["loss"] = squared_error(out["logits"], out["targets"], out["counted"])
    return out


def classify(params, pixels, *, tubelet=(2, 16, 16), heads=12):
    """Run the classifier on pixels [b, t, h, w, c]; everything returned is float64.

    'embedded', 'layers' and 'tokens' [b, n, d] as in `pretrain` (the tokens have no norm where they
    are averaged) and 'logits' [b, classes].
    """
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    out = encode(params, np.asarray(pixels, np.float64), tubelet, heads, "")
    out["tokens"] = out["layers"][-1]
    if "norm.weight" in params:
        out["tokens"] = layer_norm(subtree(params, "norm"), out["tokens"])
        pooled = out["tokens"][:, 0]
    else:
        pooled = layer_norm(subtree(params, "fc_norm"), out["tokens"].mean(axis=1))
    out["logits"] = dense(subtree(params, "head"), pooled)
    return out


def tube(rng, batch, grid, ratio):
    """V1 section 3.2: one pattern per clip, the same at all times; bool [b, n], True is hidden."""
    area = grid[1] * grid[2]
    masks = []
    for _ in range(batch):
        frame = np.zeros(area, bool)
        frame[rng.choice(area, int(ratio * area), replace=False)] = True
        masks.append(np.tile(frame, grid[0]))
    return np.stack(masks)


def running_cell(starts, grid, ratio):
    """V2 section 3.2: 2x2 cells whose pattern moves on at every time; bool [b, n], True is dropped.

    A clip's pattern begins at its entry of `starts`, 0 to 3.
    """
    queue = [True] * int(4 * ratio) + [False] * (4 - int(4 * ratio))
    masks = []
    for pointer in starts:
        clip = np.zeros(grid, bool)
        for time in range(grid[0]):
            pointer += 1  # before the first time too
            for i in range(grid[1]):
                for j in range(grid[2]):
                    clip[time, i, j] = queue[(2 * (i % 2) + j % 2 + pointer) % 4]
        masks.append(clip.reshape(-1))
    return np.stack(masks)


def patches(pixels, tubelet):
    """Cut pixels [b, t, h, w, c] into tubelets [b, n, t, h, w, c], time-major."""
    depth, height, width = tubelet
    grid = [pixels.shape[1] // depth, pixels.shape[2] // height, pixels.shape[3] // width]
    out = []
    for t, i, j in np.ndindex(*grid):
        patch = pixels[:, t * depth : (t + 1) * depth, i * height : (i + 1) * height]
        out.append(patch[:, :, :, j * width : (j + 1) * width])
    return np.stack(out, axis=1)


def all_targets(pixels, tubelet, normalise=True, ddof=1):
    """What each token's reconstruction is compared with, [b, n, t * h * w * c].

    V1 section 3.1 after He et al.: each patch, and each of its channels, has its mean taken off and
    is divided by its standard deviation.
    """
    values = patches(pixels, tubelet)
    if normalise:
        inside = (2, 3, 4)
        std = values.std(axis=inside, keepdims=True, ddof=ddof)
        values = (values - values.mean(axis=inside, keepdims=True)) / (std + 1e-6)
    return values.reshape(*values.shape[:2], -1)


def squared_error(logits, targets, counted):
    """Mean over a token's values, then over the counted tokens of the whole batch."""
    tokens = ((logits - targets) ** 2).mean(axis=-1)
    return tokens[counted].sum() / counted.sum()


def encode(params, pixels, tubelet, heads, prefix, hidden=None):
    """Embed the tokens that are not hidden and run the encoder's blocks on them."""
    cut = patches(pixels, tubelet)
    kernel = params[f"{prefix}patch_embed.proj.weight"].transpose(0, 2, 3, 4, 1)
    x = cut.reshape(*cut.shape[:2], -1) @ kernel.reshape(len(kernel), -1).T
    x = x + params[f"{prefix}patch_embed.proj.bias"]
    x = x + sinusoid(*x.shape[1:])
    if hidden is not None:
        x = np.stack([tokens[~mask] for tokens, mask in zip(x, hidden, strict=True)])
    return {"embedded": x, "layers": run_blocks(params, prefix, x, heads)}


def sinusoid(count, width):
    """Fixed positions [count, width] over the flat index: Vaswani et al. 2017, section 3.5."""
    column = np.arange(width)
    angle = np.arange(count)[:, None] / 10000 ** (2 * (column // 2) / width)
    return np.where(column % 2 == 0, np.sin(angle), np.cos(angle))


def run_blocks(params, prefix, x, heads):
    """The tokens [b, n, d] that leave each of the blocks below `prefix`."""
    out = []
    depth = sum(
        name.startswith(f"{prefix}blocks.") and name.endswith(".norm1.weight") for name in params
    )
    for layer in range(depth):
        x = block(subtree(params, f"{prefix}blocks.{layer}"), x, heads)
        out.append(x)
    return out


def block(params, x, heads):
    """Pre-norm attention, then the MLP; with layer scale each branch has a factor per channel."""
    branch = self_attention(subtree(params, "attn"), layer_norm(subtree(params, "norm1"), x), heads)
    x = x + params.get("gamma_1", 1) * branch
    branch = layer_norm(subtree(params, "norm2"), x)
    branch = dense(subtree(params, "mlp.fc1"), branch)
    branch = dense(subtree(params, "mlp.fc2"), branch * (1 + erf(branch / np.sqrt(2))) / 2)
    return x + params.get("gamma_2", 1) * branch


def self_attention(params, x, heads):
    """Attention among tokens [b, n, d]; the rows of qkv are queries, keys, values, each by head."""
    q, k, v = np.split(x @ params["qkv.weight"].T, 3, axis=-1)
    q, v = q + params.get("q_bias", 0), v + params.get("v_bias", 0)
    out = np.zeros_like(x)
    size = x.shape[-1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        if "scale" in params:  # V2's code after Swin V2: a learned factor with a bound
            scores = unit(q[..., part]) @ unit(k[..., part]).swapaxes(1, 2)
            scores *= np.exp(min(params["scale"][head, 0, 0], LARGEST_SCALE))
        else:
            scores = q[..., part] @ k[..., part].swapaxes(1, 2) / np.sqrt(size)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[..., part] = weights / weights.sum(axis=-1, keepdims=True) @ v[..., part]
    return dense(subtree(params, "proj"), out)


def unit(x):
    """Vectors of length 1 along the last axis."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def dense(params, x):
    """A linear map of the last axis."""
    return x @ params["weight"].T + params["bias"]


def layer_norm(params, x):
    """LayerNorm over the last axis, with the biased variance."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * params["weight"] + params["bias"]


def subtree(params, name):
    """The parameters below `name`, without that prefix."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): params[key] for key in params if key.startswith(prefix)}
