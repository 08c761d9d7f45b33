# SPDX-License-Identifier: Apache-2.0
"""`vivit-jax demo --model pretraining`: a masked autoencoder that fills in what it does not see."""

import functools

from vivit_jax.cli.demo import (
    IMAGE_SIZE,
    NUM_FRAMES,
    Outcome,
    Run,
    agrees_with_pytorch,
    fit_aloud,
    quoted,
    say,
    say_whether_same,
)

PICTURE, MOVING = "reconstructions.png", "reconstruction.gif"
# Tubes of nine tenths, the papers' masks, leave too little of these clips to find a shape by, which
# moves about a tenth of the frame's side from frame to frame. Any half of the patches is hidden
# instead, and the error behind tubes is reported beside that.
MASK, RATIO = "random", 0.5
SHOWN = ("circle-clockwise", "grow", "move-left", "move-down")


def pretrain(run: Run) -> Outcome:
    """Train without labels, measure on held-out clips, save, load and use the model."""
    import jax
    import numpy as np

    import vivit_jax
    from vivit_jax.cli.reconstruct import panels_of, reconstruct
    from vivit_jax.data.synthetic import CLASSES
    from vivit_jax.masking import random_mask
    from vivit_jax.reconstruction import error_dict, error_table, rmse
    from vivit_jax.train.fit import init_params

    net, processor = build()
    grid = net.config.grid
    with run.stage("train"):
        mask = functools.partial(random_mask, grid=grid, ratio=RATIO)
        params = init_params(net, run.seed, mask(jax.random.key(0), 1))
        params = fit_aloud(
            net,
            params,
            processor,
            run.frames["train"],
            mask=mask,
            augment=_augment,
            epochs=run.epochs,
            batch_size=16,
            learning_rate=4e-3,
            b2=0.95,
            seed=run.seed,
        )

    # The first clip of every class, then the second: every batch holds clips of all.
    truth = run.labels["test"]
    order = np.lexsort((truth, [path.name for path, _ in run.data["test"]]))
    held_out, truth = processor(run.frames["test"][order]), truth[order]
    with run.stage("evaluate"):
        results = evaluate(net, params, held_out, processor, MASK, RATIO)
        tables = {f"{MASK} {RATIO}": rmse(results)}
        for kind, ratio in (("tube", 0.75), ("tube", 0.9)):
            others = evaluate(net, params, held_out, processor, kind, ratio)
            tables[f"{kind} {ratio}"] = rmse(others)
    for name, errors in tables.items():
        learnt = "as in training" if name == f"{MASK} {RATIO}" else "which it was not trained on"
        say(f"\nRMSE on hidden patches of {len(held_out)} held-out clips, {name} mask, {learnt}:")
        say("\n".join(f"  {line}" for line in error_table(errors)))

    directory = run.directory
    with run.stage("save and load"):
        vivit_jax.save_pretrained(directory, net, params, processor)
        again = vivit_jax.from_pretrained(directory)
        loaded = evaluate(*again, held_out, processor, MASK, RATIO)
    clips = [np.concatenate([result.clips for result in both]) for both in (loaded, results)]
    same = say_whether_same("reconstructions", *clips, directory)

    file, moving = run.data["test"][0][0], run.out / MOVING
    options = f"--mask {MASK} --mask-ratio {RATIO}"
    command = f"vivit-jax reconstruct {quoted(file)} --model {quoted(directory)} {options}"
    say(f"\n$ {command} --out {quoted(moving)}")
    with run.stage("reconstruct"):
        reconstruct(file, model=str(directory), out=moving, mask=MASK, mask_ratio=RATIO)

    with run.stage("PyTorch"):
        agrees = agrees_with_pytorch(directory, file)

    with run.stage("picture"):
        chosen = [int(np.argmax(truth == CLASSES.index(kind))) for kind in SHOWN]
        panels = panels_of(
            results[0].take(chosen),
            title="Held-out clips, half of their patches hidden, and what the model makes of them",
            about=f"{type(net).__name__}, vivit-jax demo, seed {run.seed}; {MASK} mask",
            times=[f"frame {i}" for i in range(NUM_FRAMES)],
        )
        panels.save_png(run.out / PICTURE)

    return Outcome(
        passed=same and agrees,
        summary={"rmse": {name: error_dict(errors) for name, errors in tables.items()}},
        files={
            PICTURE: "held-out clips: original, masked, reconstruction",
            MOVING: "one of them, moving",
        },
        commands=(
            f"{command} --out reconstruction.mp4",
            f"vivit-convert inspect {quoted(directory)}",
            f"vivit-convert verify {quoted(directory)} --clip {quoted(file)}",
        ),
    )


def evaluate(net, params, clips, processor, kind: str, ratio: float) -> list:
    """Reconstructions of clips, pixel values [n, t, h, w, c], in batches of 64."""
    from vivit_jax.cli.reconstruct import draw_mask
    from vivit_jax.reconstruction import reconstruct

    results = []
    for i in range(0, len(clips), 64):
        batch = clips[i : i + 64]
        masks = draw_mask(kind, i, len(batch), net.config.grid, ratio)
        results.append(reconstruct(net, params, batch, masks, processor))
    return results


def build():
    """The untrained model and its processor."""
    import vivit_jax

    config = vivit_jax.VideoMAEConfig(
        image_size=IMAGE_SIZE,
        num_frames=NUM_FRAMES,
        tubelet_size=2,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        # On CPU the gradient of an MLP with erf takes twice as long.
        hidden_act="gelu_new",
        use_mean_pooling=False,
        # Most patches are background, whose detail is noise. Normalised, that noise would be most
        # of the loss, and brightness and colour, which show the shape, would be no part of it.
        norm_pix_loss=False,
        initializer_range=0.06,
    )
    processor = vivit_jax.VideoProcessor.named(
        "videomae-imagenet", size=IMAGE_SIZE, crop_size=IMAGE_SIZE
    )
    return vivit_jax.VideoMAEForPreTraining(config), processor


def _augment(rng, clips):
    import numpy as np

    from vivit_jax.data.synthetic import augment

    return augment(rng, clips, np.zeros(len(clips), int))[:1]
