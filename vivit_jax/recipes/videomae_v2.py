# SPDX-License-Identifier: Apache-2.0
"""VideoMAE V2's recipes (Wang et al. 2023): the scripts of the authors' repository.

Pre-training is on the authors' mixture UnlabeledHybrid, with dual masks. Each video gives 4 clips,
masked separately, and the authors count an epoch four times: 800e and 1200e are 200 and 300 epochs
here. They took every second frame of Something-Something's frame folders, which have 12 frames per
second, and every fourth of the rest; a recipe has one `data.stride` for all.

A giant fine-tuned on Kinetics-710 starts the smaller Kinetics with the rows of its classifier that
these have (`vivit-convert convert --label-map`), and other data with a fresh classifier. The
authors' model zoo has results of the giant only. What all have in common is in
`vivit_jax.recipes.videomae`.
"""

from vivit_jax.recipes.recipe import MaskSettings, Recipe
from vivit_jax.recipes.videomae import FinetuneScript, PretrainScript, finetuning, pretraining

_DUAL = MaskSettings(kind="dual", ratio=0.9, decoder_ratio=0.5)


def videomae_v2_base_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 base, masked pre-training on UnlabeledHybrid, 200 epochs of 4 clips ("800e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_b_hybrid_pt.sh.
    Hardware: 32 GPUs x 32 videos x 4 clips.
    Result: none published.
    """
    script = PretrainScript(
        gpus=32, videos=32, lr=1e-3, epochs=200, repeats=4, warmup=20.0, mask=_DUAL
    )
    return pretraining("videomae-v2-base-hybrid-pretrain", "videomae-v2-base", script)


def videomae_v2_large_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 large, masked pre-training on UnlabeledHybrid, 300 epochs of 4 clips ("1200e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_l_hybrid_pt.sh.
    Hardware: 48 GPUs x 32 videos x 4 clips.
    Result: none published.
    """
    script = PretrainScript(
        gpus=48, videos=32, lr=1e-3, epochs=300, repeats=4, warmup=30.0, mask=_DUAL
    )
    return pretraining("videomae-v2-large-hybrid-pretrain", "videomae-v2-large", script)


def videomae_v2_huge_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 huge, masked pre-training on UnlabeledHybrid, 300 epochs of 4 clips ("1200e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_h_hybrid_pt.sh.
    Hardware: 64 GPUs x 32 videos x 4 clips, with activation checkpointing
    (`model.config.remat=block`).
    Result: none published.
    """
    script = PretrainScript(
        gpus=64, videos=32, lr=1e-3, epochs=300, repeats=4, warmup=30.0, mask=_DUAL
    )
    return pretraining("videomae-v2-huge-hybrid-pretrain", "videomae-v2-huge", script)


def videomae_v2_giant_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 giant, masked pre-training on UnlabeledHybrid, 300 epochs of 4 clips ("1200e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_g_hybrid_pt.sh.
    Hardware: 64 GPUs x 32 videos x 4 clips, with activation checkpointing
    (`model.config.remat=block`).
    Result: none of its own; fine-tuned 87.2 top-1 on Kinetics-400, 83.8 on Kinetics-710, 77.0 on
    Something-Something v2.
    """
    script = PretrainScript(
        gpus=64, videos=32, lr=6e-4, epochs=300, repeats=4, warmup=30.0, clip=0.02, mask=_DUAL
    )
    return pretraining("videomae-v2-giant-hybrid-pretrain", "videomae-v2-giant", script)


def videomae_v2_base_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 base, fine-tuning on Kinetics-400, 90 epochs.

    Starts from: videomae-v2-base-hybrid-pretrain.
    Source: scripts/finetune/vit_b_k400_ft.sh.
    Hardware: 32 GPUs x 16 videos x 2 repeats.
    Result: none published; 5 x 3 views.
    """
    script = FinetuneScript(gpus=32, videos=16, lr=7e-4, epochs=90)
    return finetuning(
        "videomae-v2-base-kinetics400-finetune", "videomae-v2-base-kinetics400", script
    )


def videomae_v2_base_kinetics710_finetune() -> Recipe:
    """VideoMAE V2 base, fine-tuning on Kinetics-710, 90 epochs.

    Starts from: videomae-v2-base-hybrid-pretrain.
    Source: scripts/finetune/vit_b_k710_ft.sh.
    Hardware: 32 GPUs x 16 videos x 2 repeats.
    Result: none published (81.5 is a model distilled from the giant); 5 x 3 views.
    """
    script = FinetuneScript(gpus=32, videos=16, lr=7e-4, epochs=90)
    return finetuning(
        "videomae-v2-base-kinetics710-finetune", "videomae-v2-base-kinetics710", script
    )


def videomae_v2_base_ssv2_finetune() -> Recipe:
    """VideoMAE V2 base, fine-tuning on Something-Something v2, 25 epochs.

    Starts from: videomae-v2-base-hybrid-pretrain.
    Source: scripts/finetune/vit_b_ssv2_ft.sh.
    Hardware: 16 GPUs x 16 videos x 2 repeats.
    Result: none published; 2 x 3 views.
    """
    script = FinetuneScript(gpus=16, videos=16, lr=2e-3, epochs=25, segments=True, layer_decay=0.65)
    return finetuning("videomae-v2-base-ssv2-finetune", "videomae-v2-base-ssv2", script)


def videomae_v2_large_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 large, fine-tuning on Kinetics-400, 35 epochs.

    Starts from: videomae-v2-large-hybrid-pretrain.
    Source: scripts/finetune/vit_l_k400_ft.sh.
    Hardware: 32 GPUs x 6 videos x 2 repeats.
    Result: none published; 5 x 3 views.
    """
    script = FinetuneScript(gpus=32, videos=6, lr=2e-3, epochs=35, drop_path=0.2)
    return finetuning(
        "videomae-v2-large-kinetics400-finetune", "videomae-v2-large-kinetics400", script
    )


def videomae_v2_large_ssv2_finetune() -> Recipe:
    """VideoMAE V2 large, fine-tuning on Something-Something v2, 20 epochs.

    Starts from: videomae-v2-large-hybrid-pretrain.
    Source: scripts/finetune/vit_l_ssv2_ft.sh.
    Hardware: 32 GPUs x 6 videos x 2 repeats.
    Result: none published; 2 x 3 views.
    """
    script = FinetuneScript(gpus=32, videos=6, lr=5e-4, epochs=20, segments=True, drop_path=0.2)
    return finetuning("videomae-v2-large-ssv2-finetune", "videomae-v2-large-ssv2", script)


def _huge(name: str, preset: str, num_labels: int | None = None) -> Recipe:
    script = FinetuneScript(
        gpus=32,
        videos=4,
        lr=1e-3,
        epochs=40,
        layer_decay=0.8,
        drop_path=0.2,
        head_dropout=0.5,
        num_labels=num_labels,
    )
    return finetuning(name, preset, script)


def videomae_v2_huge_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 huge, fine-tuning on Kinetics-400, 40 epochs.

    Starts from: videomae-v2-huge-hybrid-pretrain.
    Source: scripts/finetune/vit_h_k400_ft.sh.
    Hardware: 32 GPUs x 4 videos x 2 repeats.
    Result: none published; 5 x 3 views.
    """
    return _huge("videomae-v2-huge-kinetics400-finetune", "videomae-v2-huge-kinetics400")


def videomae_v2_huge_kinetics600_finetune() -> Recipe:
    """VideoMAE V2 huge, fine-tuning on Kinetics-600, 40 epochs.

    Starts from: videomae-v2-huge-hybrid-pretrain.
    Source: scripts/finetune/vit_h_k600_ft.sh.
    Hardware: 32 GPUs x 4 videos x 2 repeats, as for Kinetics-400 and Kinetics-710; the script says
    one GPU, with which its scaled lr would be 1/32 of theirs.
    Result: none published; 5 x 3 views.
    """
    return _huge("videomae-v2-huge-kinetics600-finetune", "videomae-v2-huge-kinetics400", 600)


def videomae_v2_huge_kinetics710_finetune() -> Recipe:
    """VideoMAE V2 huge, fine-tuning on Kinetics-710, 40 epochs.

    Starts from: videomae-v2-huge-hybrid-pretrain.
    Source: scripts/finetune/vit_h_k710_ft.sh.
    Hardware: 32 GPUs x 4 videos x 2 repeats.
    Result: none published; 5 x 3 views.
    """
    return _huge("videomae-v2-huge-kinetics710-finetune", "videomae-v2-huge-kinetics710")


def videomae_v2_huge_ssv2_finetune() -> Recipe:
    """VideoMAE V2 huge, fine-tuning on Something-Something v2, 20 epochs.

    Starts from: videomae-v2-huge-hybrid-pretrain.
    Source: scripts/finetune/vit_h_ssv2_ft.sh.
    Hardware: 32 GPUs x 4 videos x 2 repeats.
    Result: none published; 2 x 3 views.
    """
    script = FinetuneScript(
        gpus=32, videos=4, lr=5e-4, epochs=20, segments=True, layer_decay=0.8, drop_path=0.2
    )
    return finetuning("videomae-v2-huge-ssv2-finetune", "videomae-v2-huge-ssv2", script)


def videomae_v2_giant_kinetics710_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on Kinetics-710, 35 epochs.

    Starts from: videomae-v2-giant-hybrid-pretrain.
    Source: scripts/finetune/vit_g_k710_ft.sh.
    Hardware: 32 GPUs x 3 videos x 2 repeats.
    Result: 83.8 top-1, 96.4 top-5, 5 x 3 views.
    """
    script = FinetuneScript(
        gpus=32,
        videos=3,
        lr=1e-3,
        epochs=35,
        weight_decay=0.1,
        layer_decay=0.9,
        drop_path=0.3,
        clip=5.0,
    )
    return finetuning(
        "videomae-v2-giant-kinetics710-finetune", "videomae-v2-giant-kinetics710", script
    )


def videomae_v2_giant_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on Kinetics-400 without Kinetics-710, 30 epochs.

    Starts from: videomae-v2-giant-hybrid-pretrain.
    Source: scripts/finetune/vit_g_k400_ft.sh.
    Hardware: 64 GPUs x 3 videos x 2 repeats.
    Result: 87.2 top-1, 97.4 top-5, 5 x 3 views.
    """
    script = FinetuneScript(
        gpus=64, videos=3, lr=1e-3, epochs=30, weight_decay=0.1, layer_decay=0.9, drop_path=0.2
    )
    return finetuning(
        "videomae-v2-giant-kinetics400-finetune", "videomae-v2-giant-kinetics400", script
    )


def _from_kinetics710(name: str, num_labels: int | None = None) -> Recipe:
    script = FinetuneScript(
        gpus=32,
        videos=3,
        lr=1e-5,
        epochs=3,
        warmup=1.0,
        weight_decay=0.1,
        layer_decay=0.9,
        drop_path=0.25,
        num_labels=num_labels,
    )
    return finetuning(name, "videomae-v2-giant-kinetics400", script)


def videomae_v2_giant_kinetics710_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on Kinetics-400 after Kinetics-710, 3 epochs.

    Starts from: videomae-v2-giant-kinetics710-finetune, its classifier cut to 400 classes.
    Source: scripts/finetune/vit_g_k710_it_k400_ft.sh.
    Hardware: 32 GPUs x 3 videos x 2 repeats.
    Result: 88.4 top-1, 98.0 top-5, 5 x 3 views.
    """
    return _from_kinetics710("videomae-v2-giant-kinetics710-kinetics400-finetune")


def videomae_v2_giant_kinetics710_kinetics600_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on Kinetics-600 after Kinetics-710, 3 epochs.

    Starts from: videomae-v2-giant-kinetics710-finetune, its classifier cut to 600 classes.
    Source: scripts/finetune/vit_g_k710_it_k600_ft.sh.
    Hardware: 32 GPUs x 3 videos x 2 repeats.
    Result: 88.8 top-1, 98.2 top-5, 5 x 3 views.
    """
    return _from_kinetics710("videomae-v2-giant-kinetics710-kinetics600-finetune", 600)


def videomae_v2_giant_ssv2_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on Something-Something v2, 20 epochs.

    Starts from: videomae-v2-giant-hybrid-pretrain.
    Source: scripts/finetune/vit_g_ssv2_ft.sh.
    Hardware: 32 GPUs x 3 videos x 2 repeats.
    Result: 77.0 top-1, 95.9 top-5, 2 x 3 views.
    """
    script = FinetuneScript(
        gpus=32, videos=3, lr=3e-4, epochs=20, segments=True, layer_decay=0.9, drop_path=0.25
    )
    return finetuning("videomae-v2-giant-ssv2-finetune", "videomae-v2-giant-ssv2", script)


def videomae_v2_giant_kinetics710_ucf101_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on UCF101 after Kinetics-710, 50 epochs.

    Starts from: videomae-v2-giant-kinetics710-finetune, with a fresh classifier.
    Source: scripts/finetune/vit_g_k710_it_ucf101_ft.sh.
    Hardware: 8 GPUs x 3 videos x 2 repeats.
    Result: 99.6 top-1, 100.0 top-5, 5 x 3 views.
    """
    script = FinetuneScript(
        gpus=8,
        videos=3,
        lr=1e-3,
        epochs=50,
        layer_decay=0.9,
        drop_path=0.35,
        head_dropout=0.5,
        num_labels=101,
    )
    return finetuning(
        "videomae-v2-giant-kinetics710-ucf101-finetune", "videomae-v2-giant-kinetics400", script
    )


def videomae_v2_giant_kinetics710_hmdb51_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on HMDB51 after Kinetics-710, 15 epochs, every second frame.

    Starts from: videomae-v2-giant-kinetics710-finetune, with a fresh classifier.
    Source: scripts/finetune/vit_g_k710_it_hmdb51_ft.sh.
    Hardware: 8 GPUs x 3 videos x 2 repeats.
    Result: 88.1 top-1, 98.5 top-5, 5 x 3 views.
    """
    script = FinetuneScript(
        gpus=8,
        videos=3,
        lr=5e-4,
        epochs=15,
        stride=2,
        layer_decay=0.9,
        drop_path=0.35,
        head_dropout=0.5,
        num_labels=51,
    )
    return finetuning(
        "videomae-v2-giant-kinetics710-hmdb51-finetune", "videomae-v2-giant-kinetics400", script
    )


RECIPES = (
    videomae_v2_base_hybrid_pretrain,
    videomae_v2_large_hybrid_pretrain,
    videomae_v2_huge_hybrid_pretrain,
    videomae_v2_giant_hybrid_pretrain,
    videomae_v2_base_kinetics400_finetune,
    videomae_v2_base_kinetics710_finetune,
    videomae_v2_base_ssv2_finetune,
    videomae_v2_large_kinetics400_finetune,
    videomae_v2_large_ssv2_finetune,
    videomae_v2_huge_kinetics400_finetune,
    videomae_v2_huge_kinetics600_finetune,
    videomae_v2_huge_kinetics710_finetune,
    videomae_v2_huge_ssv2_finetune,
    videomae_v2_giant_kinetics710_finetune,
    videomae_v2_giant_kinetics400_finetune,
    videomae_v2_giant_kinetics710_kinetics400_finetune,
    videomae_v2_giant_kinetics710_kinetics600_finetune,
    videomae_v2_giant_ssv2_finetune,
    videomae_v2_giant_kinetics710_ucf101_finetune,
    videomae_v2_giant_kinetics710_hmdb51_finetune,
)
