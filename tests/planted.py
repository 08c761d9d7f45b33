# SPDX-License-Identifier: Apache-2.0
"""Realistic one-line mistakes, one for each: where, what stands there, what stands there instead.

The old text occurs exactly once in its file: `faults.py` fails where code has moved.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    path: str
    old: str
    new: str


LAYERS, MODELS = "vivit_jax/layers/", "vivit_jax/models/"
DATA, TRAIN, INFERENCE = "vivit_jax/data/", "vivit_jax/train/", "vivit_jax/inference/"
CONVERT, BENCHMARK, CLI = "checkpoints_convert/", "vivit_jax/benchmark/", "vivit_jax/cli/"
FILES = "vivit_jax/files/"

FAULTS = [
    # layers
    Fault(
        "explicit attention without its scale",
        LAYERS + "attention.py",
        "jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)",
        "jax.nn.softmax(scores, axis=-1)",
    ),
    Fault(
        "time and space swapped",
        LAYERS + "attention.py",
        "y, over_time = attend(q, k, v, head_mask, -4)",
        "y, over_time = attend(q, k, v, head_mask, -3)",
    ),
    Fault(
        "a tile's gradient without the softmax's mean",
        LAYERS + "chunked.py",
        "d_scores = weights * (d_weights - mean)",
        "d_scores = weights * d_weights",
    ),
    Fault(
        "padded queries kept",
        LAYERS + "chunked.py",
        "x = x.reshape(x.shape[0], -1, width)[:, :length]",
        "x = x.reshape(x.shape[0], -1, width)[:, -length:]",
    ),
    Fault(
        "dropout that is not made up for",
        LAYERS + "dropout.py",
        "jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))",
        "jnp.where(kept, x, jnp.zeros_like(x))",
    ),
    Fault(
        "sin and cos swapped",
        LAYERS + "embed.py",
        "np.where(column % 2, np.cos(angle), np.sin(angle))",
        "np.where(column % 2, np.sin(angle), np.cos(angle))",
    ),
    Fault(
        "positions resized between corners",
        LAYERS + "embed.py",
        "centre = (np.arange(new) + 0.5) * old / new - 0.5",
        "centre = np.arange(new) * old / new",
    ),
    Fault(
        "the frames of a clip begin too early",
        LAYERS + "embed.py",
        "np.round(np.arange(1, count + 1) * total / (count + 1))",
        "np.round(np.arange(count) * total / (count + 1))",
    ),
    # models, masks
    Fault(
        "the wrong epsilon of VideoMAE's last norm",
        MODELS + "videomae.py",
        "LayerNorm(config, config.fc_norm_eps",
        "LayerNorm(config, config.layer_norm_eps",
    ),
    Fault(
        "mask tokens at the places of the visible ones",
        MODELS + "videomae.py",
        "blanks = blanks + _positions(x, grid, mask.predicted)",
        "blanks = blanks + _positions(x, grid, mask.predicted * 0)",
    ),
    Fault(
        "the classifier reads the last token",
        MODELS + "videomae.py",
        "x = out.last_hidden_state[:, 0]",
        "x = out.last_hidden_state[:, -1]",
    ),
    Fault(
        "targets with a biased variance",
        MODELS + "losses.py",
        "jnp.var(x, axis=axis, keepdims=True, ddof=1)",
        "jnp.var(x, axis=axis, keepdims=True)",
    ),
    Fault(
        "heads' losses summed",
        MODELS + "losses.py",
        "return sum(losses[1:], losses[0]) / len(heads)",
        "return sum(losses[1:], losses[0])",
    ),
    Fault(
        "smoothing over all classes but one",
        MODELS + "losses.py",
        "(1 - label_smoothing) + label_smoothing / classes",
        "(1 - label_smoothing) + label_smoothing / (classes - 1)",
    ),
    Fault(
        "masked and visible swapped",
        "vivit_jax/masking.py",
        "return Mask(visible=tubes(order[:, hidden:]), masked=tubes(order[:, :hidden]))",
        "return Mask(visible=tubes(order[:, :hidden]), masked=tubes(order[:, hidden:]))",
    ),
    Fault(
        "cells that do not run on",
        "vivit_jax/masking.py",
        "pointer = np.arange(4)[:, None] + np.arange(t) + 1",
        "pointer = np.arange(4)[:, None] + np.arange(t) * 0 + 1",
    ),
    # the root: config, presets, recipes, command lines
    Fault(
        "another pooling where none is given",
        "vivit_jax/config.py",
        'object.__setattr__(self, "pooling", "mean" if blocks_factorised else "cls")',
        'object.__setattr__(self, "pooling", "cls" if not blocks_factorised else "max")',
    ),
    Fault(
        "a preset's wrong epsilon",
        "vivit_jax/presets.py",
        "dict(layer_norm_eps=1e-6",
        "dict(layer_norm_eps=1e-12",
    ),
    Fault(
        "a recipe's learning rate",
        "vivit_jax/recipes/videomae_v1.py",
        "videos=8, lr=5e-4, epochs=50",
        "videos=8, lr=5e-3, epochs=50",
    ),
    Fault(
        "an exit status that is always 0",
        "vivit_jax/console/run.py",
        "    return status or 0",
        "    return 0",
    ),
    Fault(
        "escapes of a file's name sent to the terminal",
        "vivit_jax/console/run.py",
        "return self._stream.write(printable(text))",
        "return self._stream.write(text)",
    ),
    # data
    Fault(
        "a clip one frame late",
        DATA + "sampling.py",
        '"center": room // 2',
        '"center": (room + 1) // 2',
    ),
    Fault(
        "a window one frame long",
        DATA + "sliding_window.py",
        "return (self.num_frames - 1) * self.frame_stride + 1",
        "return self.num_frames * self.frame_stride + 1",
    ),
    Fault(
        "every epoch in the same order",
        DATA + "pipeline.py",
        "np.random.default_rng((seed, epoch)).shuffle(order)",
        "np.random.default_rng((seed, 0)).shuffle(order)",
    ),
    Fault(
        "every clip augmented alike",
        DATA + "pipeline.py",
        "rng = np.random.default_rng((self.sampler.seed, element, 1, *again))",
        "rng = np.random.default_rng((self.sampler.seed, 0, 1, *again))",
    ),
    Fault(
        "bad clips that are forgotten in a saved position",
        DATA + "pipeline.py",
        'self.bad = {path: why for state in states for path, why in state["bad"].items()}',
        "self.bad = {}",
    ),
    Fault(
        "a flip of rows",
        DATA + "transforms/augment.py",
        "clip[:, :, ::-1, channel]",
        "clip[:, ::-1, :, channel]",
    ),
    Fault(
        "half a pixel in the resize",
        DATA + "transforms/augment.py",
        "place = (np.arange(start, start + count) + 0.5) * (length / wanted) - 0.5",
        "place = np.arange(start, start + count) * (length / wanted)",
    ),
    Fault(
        "the shape of a crop drawn evenly",
        DATA + "transforms/augment.py",
        "shape = math.exp(rng.uniform(math.log(low), math.log(high)))",
        "shape = rng.uniform(low, high)",
    ),
    Fault(
        "std in the place of the mean",
        DATA + "transforms/pixel_values.py",
        "np.subtract(flat, rows[0], out=flat)",
        "np.subtract(flat, rows[1], out=flat)",
    ),
    Fault(
        "a crop's rest on the wrong side",
        DATA + "transforms/frame_ops.py",
        "start = max(0, math.ceil((wanted - length) / 2))",
        "start = max(0, math.floor((wanted - length) / 2))",
    ),
    Fault(
        "a keyframe too late",
        DATA + "video/packets.py",
        'np.searchsorted(pts[keys], pts[positions], side="right") - 1',
        'np.searchsorted(pts[keys], pts[positions], side="left") - 1',
    ),
    # train
    Fault(
        "decay of biases",
        TRAIN + "optim.py",
        r"(bias|scale(_\w+)?|cls|query|mask_token|pos_embed)",
        r"(scale(_\w+)?|cls|query|mask_token|pos_embed)",
    ),
    Fault(
        "layer decay that starts one block late",
        TRAIN + "optim.py",
        "factor(below + k + 1)",
        "factor(below + k)",
    ),
    Fault(
        "a warm-up of one step more",
        TRAIN + "optim.py",
        'last = max(warm - 1, 1) if settings.schedule == "videomae" else max(warm, 1)',
        "last = max(warm, 1)",
    ),
    Fault(
        "the average's decay the wrong way round",
        TRAIN + "optim.py",
        "optax.incremental_update(params, average, 1 - decay)",
        "optax.incremental_update(params, average, decay)",
    ),
    Fault(
        "accumulated losses summed",
        TRAIN + "step.py",
        "weights = jnp.full(parts, 1 / parts)",
        "weights = jnp.ones(parts)",
    ),
    Fault(
        "parts that all have the first ids",
        TRAIN + "step.py",
        "clip_ids=jnp.arange(clips, dtype=jnp.int32)",
        "clip_ids=jnp.zeros(clips, dtype=jnp.int32)",
    ),
    Fault(
        "the same draws in every step",
        TRAIN + "step.py",
        "jax.random.fold_in(seed, state.step)",
        "jax.random.fold_in(seed, 0)",
    ),
    Fault(
        "bad steps that are never forgotten",
        TRAIN + "step.py",
        "bad_steps=jnp.where(fine, 0, state.bad_steps + 1)",
        "bad_steps=state.bad_steps + ~fine",
    ),
    Fault(
        "a damaged checkpoint that counts as whole",
        TRAIN + "storage/checksums.py",
        "if found != value:",
        "if not found:",
    ),
    Fault(
        "the oldest checkpoints kept",
        TRAIN + "storage/checkpoint.py",
        "sorted(steps)[-self._keep :]",
        "sorted(steps)[: self._keep]",
    ),
    Fault(
        "views summed",
        TRAIN + "evaluation.py",
        "best, scores = _best_of_heads(config, scores), scores.mean(1)",
        "best, scores = _best_of_heads(config, scores), scores.sum(1)",
    ),
    Fault(
        "one class too many ahead",
        TRAIN + "metrics.py",
        "hits = (ahead < k).astype(scores.dtype)",
        "hits = (ahead <= k).astype(scores.dtype)",
    ),
    Fault(
        "an average that starts at nothing",
        TRAIN + "state.py",
        "average=jax.tree.map(jnp.copy, params) if averaged else None",
        "average=jax.tree.map(jnp.zeros_like, params) if averaged else None",
    ),
    # files, conversion
    Fault("no fsync", FILES + "staging.py", "os.fsync(held)", "held"),
    Fault(
        "a tensor in two shards that is not noticed",
        CONVERT + "files/open.py",
        "if weight_map.get(name) != shard",
        "if name not in weight_map",
    ),
    Fault(
        "a kernel not transposed",
        CONVERT + "tables/hf_block.py",
        'DENSE = "o i -> i o"',
        'DENSE = "o i -> o i"',
    ),
    Fault(
        "rows and columns of a patch swapped",
        CONVERT + "tables/hf_block.py",
        '"o c t h w -> t h w c o"',
        '"o c t h w -> t w h c o"',
    ),
    Fault(
        "a table without its bias",
        CONVERT + "tables/hf_videomae.py",
        '*dense("encoder_to_decoder", "to_decoder", bias=False),',
        '*dense("encoder_to_decoder", "to_decoder"),',
    ),
    Fault(
        "the wrong frame of an inflated kernel",
        CONVERT + "start/from_image.py",
        "weights = np.arange(frames) == frames // 2",
        "weights = np.arange(frames) == 0",
    ),
    Fault(
        "a head that is not made small",
        CONVERT + "start/from_pretraining.py",
        "params[path] = params[path] * init_scale",
        "params[path] = params[path] * 1.0",
    ),
    Fault(
        "names of classes that stay in the old order",
        CONVERT + "start/label_map.py",
        "tuple(config.labels[i] for i in label_map)",
        "tuple(sorted(config.labels[i] for i in label_map))",
    ),
    # inference, benchmark, commands
    Fault(
        "a comparison that fails and exits with 0",
        CONVERT + "verify.py",
        "return 0 if result.passed else 1",
        "return 0",
    ),
    Fault(
        "an unreadable clip that does not count",
        CLI + "predict.py",
        "return int(bool(failed))",
        "return 0",
    ),
    Fault(
        "a gradient to the pixels counted",
        MODELS + "flops.py",
        "return 2 * found.embedding + 3 * (found.blocks + found.heads)",
        "return 3 * (found.embedding + found.blocks + found.heads)",
    ),
    Fault(
        "an interval of 90 %",
        BENCHMARK + "intervals.py",
        "tail = 100 * (1 - LEVEL) / 2",
        "tail = 100 * (1 - LEVEL)",
    ),
    Fault(
        "the residual left out of a rollout",
        INFERENCE + "attention_maps.py",
        "jnp.float32(0.5 if rollout else 0.0)",
        "jnp.float32(0.0)",
    ),
    Fault(
        "class tokens in the mean",
        INFERENCE + "features.py",
        "x = x[..., int(with_cls) :, :]",
        "x = x[..., 0:, :]",
    ),
    Fault(
        "the worst classes first",
        INFERENCE + "classifier.py",
        'np.argsort(-values, kind="stable")',
        'np.argsort(values, kind="stable")',
    ),
]
