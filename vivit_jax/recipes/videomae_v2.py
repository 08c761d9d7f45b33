# SPDX-License-Identifier: Apache-2.0
"""VideoMAE V2's recipes (Wang et al. 2023): the scripts of the authors' repository.

Pre-training is on the authors' mixture UnlabeledHybrid with dual masks. A video that is read gives
4 clips, each masked by itself, and the authors count an epoch four times: 800e and 1200e are 200
and 300 epochs here. They took every second frame of Something-Something's frame folders, which are
at 12 frames per second, and every fourth of the rest; a recipe has one `data.stride` for all.

A giant that was fine-tuned on Kinetics-710 goes on with the rows of its classifier that the
smaller Kinetics have (`vivit-convert convert --label-map`), and with a fresh classifier elsewhere.
The authors' model zoo has results of the giant only. What is common to all is in
`vivit_jax.recipes.videomae`.
"""

from vivit_jax.recipes.recipe import MaskSettings, Recipe
from vivit_jax.recipes.videomae import finetuning, pretraining

_DUAL = MaskSettings(kind="dual", ratio=0.9, decoder_ratio=0.5)


def videomae_v2_base_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 base, masked pre-training on UnlabeledHybrid, 200 epochs of 4 clips ("800e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_b_hybrid_pt.sh.
    Hardware: 32 GPUs x 32 videos x 4 clips.
    Result: none published.
    """
    return pretraining(
        "videomae-v2-base-hybrid-pretrain", "videomae-v2-base", 32, 32, 1e-3, 200,
        repeats=4, warmup=20.0, mask=_DUAL,
    )  # fmt: skip


def videomae_v2_large_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 large, masked pre-training on UnlabeledHybrid, 300 epochs of 4 clips ("1200e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_l_hybrid_pt.sh.
    Hardware: 48 GPUs x 32 videos x 4 clips.
    Result: none published.
    """
    return pretraining(
        "videomae-v2-large-hybrid-pretrain", "videomae-v2-large", 48, 32, 1e-3, 300,
        repeats=4, warmup=30.0, mask=_DUAL,
    )  # fmt: skip


def videomae_v2_huge_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 huge, masked pre-training on UnlabeledHybrid, 300 epochs of 4 clips ("1200e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_h_hybrid_pt.sh.
    Hardware: 64 GPUs x 32 videos x 4 clips, with activation checkpointing
    (`model.config.remat=block`).
    Result: none published.
    """
    return pretraining(
        "videomae-v2-huge-hybrid-pretrain", "videomae-v2-huge", 64, 32, 1e-3, 300,
        repeats=4, warmup=30.0, mask=_DUAL,
    )  # fmt: skip


def videomae_v2_giant_hybrid_pretrain() -> Recipe:
    """VideoMAE V2 giant, masked pre-training on UnlabeledHybrid, 300 epochs of 4 clips ("1200e").

    Starts from: nothing.
    Source: scripts/pretrain/vit_g_hybrid_pt.sh.
    Hardware: 64 GPUs x 32 videos x 4 clips, with activation checkpointing
    (`model.config.remat=block`).
    Result: none of its own; fine-tuned 87.2 top-1 on Kinetics-400, 83.8 on Kinetics-710, 77.0 on
    Something-Something v2.
    """
    return pretraining(
        "videomae-v2-giant-hybrid-pretrain", "videomae-v2-giant", 64, 32, 6e-4, 300,
        repeats=4, warmup=30.0, clip=0.02, mask=_DUAL,
    )  # fmt: skip


def videomae_v2_base_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 base, fine-tuning on Kinetics-400, 90 epochs.

    Starts from: videomae-v2-base-hybrid-pretrain.
    Source: scripts/finetune/vit_b_k400_ft.sh.
    Hardware: 32 GPUs x 16 videos x 2 repeats.
    Result: none published; 5 x 3 views.
    """
    name = "videomae-v2-base-kinetics400-finetune"
    return finetuning(name, "videomae-v2-base-kinetics400", 32, 16, 7e-4, 90)


def videomae_v2_base_kinetics710_finetune() -> Recipe:
    """VideoMAE V2 base, fine-tuning on Kinetics-710, 90 epochs.

    Starts from: videomae-v2-base-hybrid-pretrain.
    Source: scripts/finetune/vit_b_k710_ft.sh.
    Hardware: 32 GPUs x 16 videos x 2 repeats.
    Result: none published (81.5 is of a model distilled from the giant); 5 x 3 views.
    """
    name = "videomae-v2-base-kinetics710-finetune"
    return finetuning(name, "videomae-v2-base-kinetics710", 32, 16, 7e-4, 90)


def videomae_v2_base_ssv2_finetune() -> Recipe:
    """VideoMAE V2 base, fine-tuning on Something-Something v2, 25 epochs.

    Starts from: videomae-v2-base-hybrid-pretrain.
    Source: scripts/finetune/vit_b_ssv2_ft.sh.
    Hardware: 16 GPUs x 16 videos x 2 repeats.
    Result: none published; 2 x 3 views.
    """
    name = "videomae-v2-base-ssv2-finetune"
    return finetuning(
        name, "videomae-v2-base-ssv2", 16, 16, 2e-3, 25, segments=True, layer_decay=0.65
    )


def videomae_v2_large_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 large, fine-tuning on Kinetics-400, 35 epochs.

    Starts from: videomae-v2-large-hybrid-pretrain.
    Source: scripts/finetune/vit_l_k400_ft.sh.
    Hardware: 32 GPUs x 6 videos x 2 repeats.
    Result: none published; 5 x 3 views.
    """
    name = "videomae-v2-large-kinetics400-finetune"
    return finetuning(name, "videomae-v2-large-kinetics400", 32, 6, 2e-3, 35, drop_path=0.2)


def videomae_v2_large_ssv2_finetune() -> Recipe:
    """VideoMAE V2 large, fine-tuning on Something-Something v2, 20 epochs.

    Starts from: videomae-v2-large-hybrid-pretrain.
    Source: scripts/finetune/vit_l_ssv2_ft.sh.
    Hardware: 32 GPUs x 6 videos x 2 repeats.
    Result: none published; 2 x 3 views.
    """
    name = "videomae-v2-large-ssv2-finetune"
    return finetuning(name, "videomae-v2-large-ssv2", 32, 6, 5e-4, 20, segments=True, drop_path=0.2)


def _huge(name: str, preset: str, num_labels: int | None = None) -> Recipe:
    return finetuning(
        name, preset, 32, 4, 1e-3, 40,
        layer_decay=0.8, drop_path=0.2, head_dropout=0.5, num_labels=num_labels,
    )  # fmt: skip


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
    Hardware: 32 GPUs x 4 videos x 2 repeats, those of Kinetics-400 and Kinetics-710; the script is
    left at one GPU, where the rate that its lr comes to would be 1/32 of theirs.
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
    return finetuning(
        "videomae-v2-huge-ssv2-finetune", "videomae-v2-huge-ssv2", 32, 4, 5e-4, 20,
        segments=True, layer_decay=0.8, drop_path=0.2,
    )  # fmt: skip


def videomae_v2_giant_kinetics710_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on Kinetics-710, 35 epochs.

    Starts from: videomae-v2-giant-hybrid-pretrain.
    Source: scripts/finetune/vit_g_k710_ft.sh.
    Hardware: 32 GPUs x 3 videos x 2 repeats.
    Result: 83.8 top-1, 96.4 top-5, 5 x 3 views.
    """
    return finetuning(
        "videomae-v2-giant-kinetics710-finetune", "videomae-v2-giant-kinetics710", 32, 3, 1e-3, 35,
        weight_decay=0.1, layer_decay=0.9, drop_path=0.3, clip=5.0,
    )  # fmt: skip


def videomae_v2_giant_kinetics400_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on Kinetics-400 without Kinetics-710 before, 30 epochs.

    Starts from: videomae-v2-giant-hybrid-pretrain.
    Source: scripts/finetune/vit_g_k400_ft.sh.
    Hardware: 64 GPUs x 3 videos x 2 repeats.
    Result: 87.2 top-1, 97.4 top-5, 5 x 3 views.
    """
    return finetuning(
        "videomae-v2-giant-kinetics400-finetune", "videomae-v2-giant-kinetics400", 64, 3, 1e-3, 30,
        weight_decay=0.1, layer_decay=0.9, drop_path=0.2,
    )  # fmt: skip


def _from_kinetics710(name: str, num_labels: int | None = None) -> Recipe:
    return finetuning(
        name, "videomae-v2-giant-kinetics400", 32, 3, 1e-5, 3,
        warmup=1.0, weight_decay=0.1, layer_decay=0.9, drop_path=0.25, num_labels=num_labels,
    )  # fmt: skip


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
    return finetuning(
        "videomae-v2-giant-ssv2-finetune", "videomae-v2-giant-ssv2", 32, 3, 3e-4, 20,
        segments=True, layer_decay=0.9, drop_path=0.25,
    )  # fmt: skip


def videomae_v2_giant_kinetics710_ucf101_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on UCF101 after Kinetics-710, 50 epochs.

    Starts from: videomae-v2-giant-kinetics710-finetune, with a fresh classifier.
    Source: scripts/finetune/vit_g_k710_it_ucf101_ft.sh.
    Hardware: 8 GPUs x 3 videos x 2 repeats.
    Result: 99.6 top-1, 100.0 top-5, 5 x 3 views.
    """
    return finetuning(
        "videomae-v2-giant-kinetics710-ucf101-finetune", "videomae-v2-giant-kinetics400",
        8, 3, 1e-3, 50,
        layer_decay=0.9, drop_path=0.35, head_dropout=0.5, num_labels=101,
    )  # fmt: skip


def videomae_v2_giant_kinetics710_hmdb51_finetune() -> Recipe:
    """VideoMAE V2 giant, fine-tuning on HMDB51 after Kinetics-710, 15 epochs, every second frame.

    Starts from: videomae-v2-giant-kinetics710-finetune, with a fresh classifier.
    Source: scripts/finetune/vit_g_k710_it_hmdb51_ft.sh.
    Hardware: 8 GPUs x 3 videos x 2 repeats.
    Result: 88.1 top-1, 98.5 top-5, 5 x 3 views.
    """
    return finetuning(
        "videomae-v2-giant-kinetics710-hmdb51-finetune", "videomae-v2-giant-kinetics400",
        8, 3, 5e-4, 15,
        stride=2, layer_decay=0.9, drop_path=0.35, head_dropout=0.5, num_labels=51,
    )  # fmt: skip


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
