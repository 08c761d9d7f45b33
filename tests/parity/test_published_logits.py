# SPDX-License-Identifier: Apache-2.0
"""The numbers that transformers' tests and conversion scripts publish, on the published weights.

`pytest -m network -n 0 tests/parity/test_published_logits.py` downloads 14 checkpoints and
compares. What compares is tested without a network on tiny checkpoints that transformers writes.

Sources: tests/models/{vivit,videomae}/test_modeling_*.py and the two conversion scripts of
huggingface/transformers. The clip is hf-internal-testing/spaghetti-video; VideoMAE's values are for
pixels normalised by 0.5, which is not what its weights were trained with.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers import mostly_slow, to_torch, torch_model
from tiny import config_of

import vivit_jax
from checkpoints_convert.source import open_source

CLIPS = {16: "eating_spaghetti.npy", 32: "eating_spaghetti_32_frames.npy"}
VIVIT = vivit_jax.VideoProcessor.vivit()
SCENIC = vivit_jax.VideoProcessor.vivit(do_normalize=False)  # pixels in [-1, 1], as trained
HALVES = vivit_jax.VideoProcessor.videomae()


@dataclasses.dataclass(frozen=True)
class Published:
    """What a checkpoint gives for a clip: the first of its logits, [k] or [k, k], or its loss."""

    source: str
    processor: vivit_jax.VideoProcessor
    logits: Any = None
    loss: float | None = None
    atol: float = 1e-4
    rtol: float = 0.0
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the config


def mae(name, *logits, **values) -> Published:
    return Published(f"MCG-NJU/videomae-{name}", HALVES, logits or None, **values)


VIVIT_B = "google/vivit-b-16x2-kinetics400"
TESTED_BY_TRANSFORMERS = [
    Published(VIVIT_B, VIVIT, (-0.9498, 2.7971, -1.4049, 0.1024, -1.8353)),
    Published(VIVIT_B, SCENIC, (-1.0543, 2.0764, -0.2104, 0.4439, -0.9658)),
    mae("base-finetuned-kinetics", 0.3669, -0.0688, -0.2421, atol=2e-4, rtol=2e-4),
    mae("base-short", (0.7994, 0.9612, 0.8508), (0.7401, 0.8958, 0.8302), (0.5862, 0.7468, 0.7325)),
    mae("base-short", loss=0.5142, changes={"norm_pix_loss": True}),
    mae("base-short", loss=0.6469, changes={"norm_pix_loss": False}),
]
OF_THE_CONVERSION_SCRIPT = [
    mae("small-finetuned-kinetics", -0.9291, -0.4061, -0.9307),
    mae("small-finetuned-ssv2", 0.2671, -0.4689, -0.8235),
    mae("large-finetuned-kinetics", 0.0771, 0.0011, -0.3625),
    mae("huge-finetuned-kinetics", 0.2433, 0.1632, -0.4894),
    mae("base-short-finetuned-kinetics", 0.6588, 0.0990, -0.2493),
    mae("base-short-finetuned-ssv2", -0.0537, -0.1539, -0.3266),
    mae("base-finetuned-ssv2", 0.1961, -0.8337, -0.6389),
    mae("base", (0.7739, 0.7968, 0.7089), (0.6701, 0.7487, 0.6209), (0.4287, 0.5158, 0.4773)),
    mae("large", (0.7149, 0.7997, 0.6966), (0.6768, 0.7869, 0.6948), (0.5139, 0.6221, 0.5605)),
    mae(
        "base-short-ssv2",
        (0.4712, 0.5296, 0.5786), (0.2278, 0.2729, 0.4026), (0.0352, 0.0730, 0.2506),
    ),
    mae("base-ssv2", (0.8131, 0.8727, 0.8546), (0.7366, 0.9377, 0.8870), (0.5935, 0.8874, 0.8564)),
]  # fmt: skip


def compare(published: Published, frames: np.ndarray, bool_masked_pos: np.ndarray) -> None:
    """AssertionError where the checkpoint's output for uint8 [t, h, w, 3] is another."""
    model, params = vivit_jax.from_pretrained(published.source, config=published.changes)
    inputs = {}
    if isinstance(model, vivit_jax.VideoMAEForPreTraining):
        inputs["mask"] = vivit_jax.Mask.from_bool(bool_masked_pos)
    pixel_values = published.processor(frames)
    out = jax.jit(model.apply)({"params": params}, pixel_values, **inputs)
    close = dict(atol=published.atol, rtol=published.rtol)
    if published.loss is not None:
        np.testing.assert_allclose(float(out.loss), published.loss, **close)
    if published.logits is not None:
        expected = np.asarray(published.logits)
        first = tuple(slice(side) for side in expected.shape)
        np.testing.assert_allclose(out.logits[0][first], expected, **close)


@pytest.mark.network
@pytest.mark.parametrize(
    "published",
    TESTED_BY_TRANSFORMERS + OF_THE_CONVERSION_SCRIPT,
    ids=lambda p: f"{p.source.partition('/')[2]} {p.loss or ''}".strip(),
)
def test_published_values(published):
    import torch
    from huggingface_hub import hf_hub_download

    config = open_source(published.source).config
    place = ("hf-internal-testing/spaghetti-video", CLIPS[config.num_frames])
    frames = np.load(hf_hub_download(*place, repo_type="dataset"))
    place = ("hf-internal-testing/bool-masked-pos", "bool_masked_pos.pt")
    hidden = torch.load(hf_hub_download(*place), weights_only=True).numpy().astype(bool)
    compare(published, frames, hidden.reshape(1, -1))


STAND_INS = {
    "vivit cls": dataclasses.replace(VIVIT, size=26, crop_size=(24, 16)),
    "mae cls": dataclasses.replace(HALVES, size=26, crop_size=(24, 16)),
    "mae pretraining": dataclasses.replace(HALVES, size=26, crop_size=(24, 16)),
}


@pytest.fixture(scope="module", params=mostly_slow(STAND_INS, "vivit cls", "mae pretraining"))
def stand_in(request, tmp_path_factory):
    """A checkpoint that transformers wrote, a clip, and what transformers computes, in 4 digits."""
    import torch

    case, directory = request.param, tmp_path_factory.mktemp("stand-in")
    model, rng = torch_model(case), np.random.default_rng(0)
    model.save_pretrained(directory)
    frames = rng.integers(0, 256, (6, 30, 40, 3), dtype=np.uint8)
    hidden = rng.permutation(config_of(case).num_tokens)[None] % 3 > 0
    pretraining = case == "mae pretraining"
    inputs = {"bool_masked_pos": torch.from_numpy(hidden)} if pretraining else {}
    with torch.no_grad():
        out = model(to_torch(STAND_INS[case](frames)), **inputs)
    logits = out.logits[0, :3, :3] if pretraining else out.logits[0, :5]
    values = {"logits": np.round(logits.numpy(), 4).tolist()}
    if pretraining:
        values["loss"] = round(float(out.loss), 4)
    return Published(str(directory), STAND_INS[case], **values), frames, hidden


def test_the_comparison_on_a_stand_in(stand_in):
    compare(*stand_in)


def test_the_comparison_fails_where_it_should(stand_in):
    published, frames, hidden = stand_in
    wrong = np.asarray(published.logits)
    wrong.ravel()[-1] += 1e-3
    bad = [
        dataclasses.replace(published, logits=wrong, loss=None),
        dataclasses.replace(
            published, processor=dataclasses.replace(published.processor, do_normalize=False)
        ),
    ]
    if published.loss is not None:
        bad.append(dataclasses.replace(published, logits=None, loss=published.loss + 1e-3))
        bad.append(dataclasses.replace(published, changes={"norm_pix_loss": False}))
    for one in bad:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            compare(one, frames, hidden)


def test_where_the_network_is_needed_and_missing(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for published in TESTED_BY_TRANSFORMERS + OF_THE_CONVERSION_SCRIPT:
        with pytest.raises(vivit_jax.CheckpointError, match="hf download"):
            compare(published, np.zeros((16, 8, 8, 3), np.uint8), None)
