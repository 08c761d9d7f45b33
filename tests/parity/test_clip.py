# SPDX-License-Identifier: Apache-2.0
"""From a video file to logits: the documented reader and processor of transformers, and ours."""

import av
import numpy as np
import pytest
from clips import write_clip
from helpers import assert_close, forward, torch_model

import vivit_jax

PROCESSORS = {"vivit cls": "VivitImageProcessor", "mae cls": "VideoMAEImageProcessorPil"}


@pytest.mark.parametrize("case", PROCESSORS)
def test_same_logits_from_the_same_file(case, tmp_path):
    import torch
    import transformers

    clip = write_clip(tmp_path / "clip.mp4", frames=40, size=(96, 64))
    processor = getattr(transformers, PROCESSORS[case])(
        size={"shortest_edge": 28}, crop_size={"height": 24, "width": 16}
    )
    reference = torch_model(case)
    reference.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")

    indices = [3, 8, 13, 18, 23, 28]
    with av.open(str(clip)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    inputs = processor([decoded[i] for i in indices], return_tensors="pt")
    with torch.inference_mode():
        theirs = reference(**inputs).logits.numpy()

    ours = vivit_jax.VideoProcessor.from_pretrained(tmp_path / "model")
    frames = vivit_jax.read_video(clip, indices=indices)
    assert np.array_equal(frames, np.stack([decoded[i] for i in indices]))
    pixel_values = ours(frames)
    expected = inputs["pixel_values"].numpy().transpose(0, 1, 3, 4, 2)
    assert np.array_equal(pixel_values, expected)
    model, params = vivit_jax.from_pretrained(tmp_path / "model")
    assert_close(forward(model, params, pixel_values).logits, theirs, "logits")
