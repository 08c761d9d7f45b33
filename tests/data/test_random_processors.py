# SPDX-License-Identifier: Apache-2.0
"""200 random preprocessor files give the same bits in transformers and here."""

import json

import numpy as np
import pytest
from test_processor import run_theirs, same_bits

from vivit_jax.data.transforms.processor import VideoProcessor

ALWAYS, ALL = 100, 200  # a few milliseconds each
# Other keys of files on the hub, which change no pixel of these frames.
OTHERS = {
    "do_pad": None, "do_sample_frames": False, "num_frames": 16, "default_to_square": False,
    "return_tensors": None, "processor_class": "AnyProcessor", "device": None, "my_note": "kept",
    "fps": 25, "disable_grouping": None, "do_zero_centering": True, "data_format": "channels_first",
}  # fmt: skip


def random_processor(number: int):
    """(family, content of preprocessor_config.json, frames of one clip or two) by number."""
    rng = np.random.default_rng([20261130, number])

    def pick(*options):
        return options[rng.integers(len(options))]

    def flag():
        return pick(True, True, True, False, None)

    def side():
        return int(rng.integers(4, 40))

    family = pick("vivit", "videomae")
    channels = pick(1, 2, 3, 3, 3, 4)
    values = {
        "do_resize": flag(),
        "size": pick(
            edge := side(),
            {"shortest_edge": edge},
            {"height": side(), "width": side()},
            {"shortest_edge": edge, "longest_edge": edge + side()},
        ),
        "resample": pick(0, 1, 2, 3, 4, 5),
        "do_center_crop": pick(True, True, False),
        "crop_size": pick(side(), {"height": side(), "width": side()}),
        "do_rescale": flag(),
        "rescale_factor": pick(1 / 255, 1 / 127.5, 0.5, 2),
        "do_normalize": flag(),
        "image_mean": [float(v) for v in rng.uniform(-0.2, 0.9, channels)],
        "image_std": [float(v) for v in rng.uniform(0.1, 0.9, channels)],
    }
    if family == "vivit":
        # transformers refuses an offset without rescaling; null takes its default.
        values["offset"] = bool(values["do_rescale"] and rng.random() < 0.6)
    else:
        # Large enough to leave a pixel on each side, as transformers requires.
        values["size"] = pick(values["size"], {"max_height": side() + 8, "max_width": side() + 8})
    if rng.random() < 0.3:
        for name in ("image_mean", "image_std"):
            values[name] = values[name][0]
    for name in ("do_resize", "do_center_crop", "crop_size", "resample", "rescale_factor"):
        if rng.random() < 0.1:
            del values[name]  # leaves the class default
    names = [name for name in OTHERS if rng.random() < 0.25]
    values |= {name: OTHERS[name] for name in names}
    height, width = side(), side()
    clips = [
        list(rng.integers(0, 256, (2, height, width, channels), dtype=np.uint8))
        for _ in range(pick(1, 1, 2))
    ]
    return family, values, clips if len(clips) > 1 else clips[0]


def opened_by_transformers(family, directory):
    import transformers
    from transformers.models.videomae.image_processing_pil_videomae import (
        VideoMAEImageProcessorPil,
    )

    cls = transformers.VivitImageProcessor if family == "vivit" else VideoMAEImageProcessorPil
    return cls.from_pretrained(directory)


@pytest.mark.quick_cases(30)
@pytest.mark.parametrize(
    "number",
    [n if n < ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in range(ALL)],
)
def test_both_directions(number, tmp_path):
    family, values, clips = random_processor(number)
    types = {"vivit": "VivitImageProcessor", "videomae": "VideoMAEImageProcessor"}
    written = {"image_processor_type": types[family]} | values
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    wanted = run_theirs(
        opened_by_transformers(family, tmp_path), clips, input_data_format="channels_last"
    )
    processor = VideoProcessor.from_pretrained(tmp_path)
    assert same_bits(processor(clips, input_data_format="channels_last"), wanted)
    processor.save_pretrained(tmp_path / "again")
    again = opened_by_transformers(family, tmp_path / "again")
    assert same_bits(run_theirs(again, clips, input_data_format="channels_last"), wanted)
    kept = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert all(kept[name] == values[name] for name in values.keys() & OTHERS.keys())
    assert VideoProcessor.from_pretrained(tmp_path / "again") == processor
