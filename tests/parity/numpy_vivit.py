# SPDX-License-Identifier: Apache-2.0
"""The four ViViT models in float64 numpy, written from the paper and from nothing of this package.

Equations and sections are those of Arnab et al. 2021, "ViViT: A Video Vision Transformer",
https://arxiv.org/abs/2103.15691. Parameter names and shapes are those of the authors' code (scenic,
`projects/vivit`), joined by '/'. What the paper leaves open follows that code: tanh GELU, LayerNorm
epsilon 1e-6, tokens in time-major order, one more LayerNorm after the last block.
"""

import numpy as np

TYPES = ("joint", "factorised_encoder", "factorised_self_attention", "factorised_dot_product")


def random_params(
    attention_type,
    *,
    tubelet=(2, 8, 8),
    grid=(3, 3, 2),
    channels=3,
    width=48,
    heads=4,
    layers=3,
    temporal_layers=2,
    mlp=80,
    classes=5,
    class_token=True,
    spatial_only=False,
    sampled_frames=None,
    seed=0,
):
    """Draw every parameter of one model, float32, so large that none hides at its initial value.

    `tubelet` and `grid` are (time, height, width); `sampled_frames` replaces the grid's time.
    Models 3 and 4 never have a class token.
    """
    assert attention_type in TYPES, attention_type
    two_attentions = attention_type == "factorised_self_attention"
    time, space = sampled_frames or grid[0], grid[1] * grid[2]
    shapes = {}

    def dense(name, inputs, outputs):
        shapes[f"{name}/kernel"] = (*inputs, *outputs)
        shapes[f"{name}/bias"] = outputs

    def norm(name):
        shapes[f"{name}/scale"] = shapes[f"{name}/bias"] = (width,)

    def encoder(name, cls, tokens, depth):
        if cls:
            shapes[cls] = (1, 1, width)
        shapes[f"{name}/posembed_input/pos_embedding"] = (1, tokens + bool(cls), width)
        for block in (f"{name}/encoderblock_{layer}" for layer in range(depth)):
            for kind in ("time", "space") if two_attentions else ("0",):
                norm(f"{block}/LayerNorm_{kind}")
                attention = f"{block}/MultiHeadDotProductAttention_{kind}"
                for part in ("query", "key", "value"):
                    dense(f"{attention}/{part}", (width,), (heads, width // heads))
                dense(f"{attention}/out", (heads, width // heads), (width,))
            norm(f"{block}/LayerNorm_mlp" if two_attentions else f"{block}/LayerNorm_1")
            perceptron = f"{block}/MlpBlock" if two_attentions else f"{block}/MlpBlock_0"
            dense(f"{perceptron}/Dense_0", (width,), (mlp,))
            dense(f"{perceptron}/Dense_1", (mlp,), (width,))
        norm(f"{name}/encoder_norm")

    kernel = tubelet if sampled_frames is None else tubelet[1:]
    dense("embedding", (*kernel, channels), (width,))
    if attention_type == "factorised_encoder":
        encoder("SpatialTransformer", class_token and "cls_SpatialTransformer", space, layers)
        if not spatial_only:
            cls = class_token and "cls_TemporalTransformer"
            encoder("TemporalTransformer", cls, time, temporal_layers)
    else:
        cls = class_token and attention_type == "joint" and "cls"
        encoder("Transformer", cls, time * space, layers)
    dense("output_projection", (width,), (classes,))

    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in shapes.items():
        std = 0.3 if name.endswith(("/bias", "/scale")) else 0.5
        if name.endswith("/kernel"):
            fan_in = np.prod(shape) / np.prod(shapes[name.replace("/kernel", "/bias")])
            std = min(2 / np.sqrt(fan_in), std)
        value = std * rng.standard_normal(shape) + name.endswith("/scale")
        params[name] = value.astype(np.float32)
    return params


def forward(
    params,
    pixels,
    *,
    attention_type,
    attention_order="time_space",
    pooling="cls",
    tubelet=(2, 8, 8),
    sampled_frames=None,
    spatial_only=False,
):
    """Run one model on pixels [b, t, h, w, c]; everything returned is float64.

    'logits' [b, classes]; 'embedded' and each of 'layers', the tokens that enter the first encoder
    and that leave its blocks; 'tokens', those of the last encoder after its norm. Tokens are
    [b, n, d], n = t * h * w (+ 1), time-major. The factorised encoder's are [b, t, n, d] in space
    (n = h * w (+ 1)), then [b, t (+ 1), d] in time; it adds 'spatial_tokens' after the first norm,
    'frames' [b, t, d] and 'temporal_layers'.
    """
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    grid = tubes(params, np.asarray(pixels, np.float64), tubelet, sampled_frames)
    flat = (grid.shape[0], -1, grid.shape[-1])

    def over_grid(block, *args):
        return lambda params, x: block(params, x.reshape(grid.shape), *args).reshape(flat)

    if attention_type == "factorised_encoder":
        # Model 2, section 3.3: a ViT for every temporal index, then a second one over the indices.
        out = encode(params, "SpatialTransformer", grid, block)
        frames = pool(out["tokens"], pooling)  # h_i of the paper
        out |= {"spatial_tokens": out["tokens"], "frames": frames, "temporal_layers": []}
        if spatial_only:  # a baseline of section 4.2: frames are averaged, whatever `pooling`
            pooled = frames.mean(axis=1)
        else:
            second = encode(params, "TemporalTransformer", frames, block)
            out["tokens"], out["temporal_layers"] = second["tokens"], second["layers"]
            pooled = pool(out["tokens"], pooling)
    else:
        kind = {
            "joint": block,  # model 1, section 3.3: every token attends to every token
            "factorised_self_attention": over_grid(self_attention_block, attention_order),
            "factorised_dot_product": over_grid(block, factorised_attention),
        }[attention_type]
        assert attention_type == "joint" or pooling != "cls", "models 3 and 4 have no class token"
        out = encode(params, "Transformer", grid.reshape(flat), kind)
        pooled = pool(out["tokens"], pooling)
    out["logits"] = dense(subtree(params, "output_projection"), pooled)
    return out


def sampled_indices(sampled, frames):
    """Which of `frames` frames uniform sampling keeps: section 3.2, 'Uniform frame sampling'.

    The authors' `arange(step, frames, step)` rounds to one frame too many for some pairs (2 of 8).
    """
    if sampled >= frames:
        return list(range(frames))
    return [round(i * frames / (sampled + 1)) for i in range(1, sampled + 1)]


def tubes(params, pixels, tubelet, sampled_frames):
    """Project every tube of pixels [b, t, h, w, c] to a token; [b, nt, nh * nw, d], section 3.2."""
    kernel = params["embedding/kernel"]
    if sampled_frames is not None:  # a tube is one frame deep
        pixels = pixels[:, sampled_indices(sampled_frames, pixels.shape[1])]
        tubelet, kernel = (1, *tubelet[1:]), kernel[None]
    assert kernel.shape[:3] == tuple(tubelet), (kernel.shape, tubelet)
    depth, height, width = tubelet
    grid = [pixels.shape[1] // depth, pixels.shape[2] // height, pixels.shape[3] // width]
    tokens = []
    for t, i, j in np.ndindex(*grid):  # time-major
        tube = pixels[:, t * depth : (t + 1) * depth, i * height : (i + 1) * height]
        tube = tube[:, :, :, j * width : (j + 1) * width]
        tokens.append(np.einsum("bthwc,thwcd->bd", tube, kernel) + params["embedding/bias"])
    return np.stack(tokens, axis=1).reshape(len(pixels), grid[0], grid[1] * grid[2], -1)


def encode(params, name, x, block):
    """One encoder on tokens [..., n, d]: class token, positions, blocks, final norm."""
    cls = params.get("cls" if name == "Transformer" else f"cls_{name}")
    params = subtree(params, name)
    if cls is not None:
        x = np.concatenate([np.broadcast_to(cls, x[..., :1, :].shape), x], axis=-2)
    x = x + params["posembed_input/pos_embedding"]  # eq. 1; the class token has a position too
    out = {"embedded": x, "layers": []}
    for layer in range(sum(key.endswith("/Dense_0/bias") for key in params)):
        x = block(subtree(params, f"encoderblock_{layer}"), x)
        out["layers"].append(x)
    out["tokens"] = layer_norm(subtree(params, "encoder_norm"), x)
    return out


def block(params, x, attend=None):
    """Eq. 2, pre-norm attention over the tokens [..., n, d], then eq. 3, the MLP."""
    normed = layer_norm(subtree(params, "LayerNorm_0"), x)
    x = x + (attend or self_attention)(subtree(params, "MultiHeadDotProductAttention_0"), normed)
    normed = layer_norm(subtree(params, "LayerNorm_1"), x)
    return x + perceptron(subtree(params, "MlpBlock_0"), normed)


def self_attention_block(params, x, order):
    """Model 3 on x [b, t, s, d], eq. 4 to 6: each axis has its own norm, attention and residual."""
    for axis in order.split("_"):
        normed = layer_norm(subtree(params, f"LayerNorm_{axis}"), x)
        attention = subtree(params, f"MultiHeadDotProductAttention_{axis}")
        if axis == "space":  # eq. 4: among tokens of one temporal index
            x = x + self_attention(attention, normed)
        else:  # eq. 5: among tokens of one spatial index
            x = x + self_attention(attention, normed.swapaxes(1, 2)).swapaxes(1, 2)
    normed = layer_norm(subtree(params, "LayerNorm_mlp"), x)
    return x + perceptron(subtree(params, "MlpBlock"), normed)  # eq. 6


def self_attention(params, x):
    """MSA of tokens [..., n, d]: concatenating heads and multiplying by W_O is a sum over heads."""
    heads = len(params["out/kernel"])
    return params["out/bias"] + sum(one_head(params, head, x) for head in range(heads))


def factorised_attention(params, x):
    """Model 4, eq. 7 and below it, on x [b, t, s, d]: one MSA, half of its heads along each axis.

    The paper writes Concat(Y_s, Y_t); in the authors' code the first half of the heads is temporal.
    """
    heads = len(params["out/kernel"])
    assert heads % 2 == 0, heads
    temporal = sum(one_head(params, head, x.swapaxes(1, 2)) for head in range(heads // 2))
    spatial = sum(one_head(params, head, x) for head in range(heads // 2, heads))
    return params["out/bias"] + temporal.swapaxes(1, 2) + spatial


def one_head(params, head, x):
    """Softmax(Q K^T / sqrt(d_k)) V of one head (eq. 7), times that head's rows of W_O."""
    q, k, v = (
        x @ params[f"{part}/kernel"][:, head] + params[f"{part}/bias"][head]
        for part in ("query", "key", "value")
    )
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ v @ params["out/kernel"][head]


def perceptron(params, x):
    """Two linear maps with a GELU between them (section 3.1), in its tanh approximation."""
    x = dense(subtree(params, "Dense_0"), x)
    x = x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    return dense(subtree(params, "Dense_1"), x)


def dense(params, x):
    """A linear map of the last axis."""
    return x @ params["kernel"] + params["bias"]


def layer_norm(params, x):
    """LayerNorm over the last axis, with the biased variance."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * params["scale"] + params["bias"]


def pool(x, pooling):
    """One vector of tokens [..., n, d]; 'cls' is index 0, be there a class token or not."""
    if pooling == "cls":
        return x[..., 0, :]
    return {"mean": np.mean, "max": np.max, "sum": np.sum}[pooling](x, axis=-2)


def subtree(params, name):
    """The parameters below `name`, without that prefix."""
    prefix = f"{name}/"
    return {key.removeprefix(prefix): params[key] for key in params if key.startswith(prefix)}
