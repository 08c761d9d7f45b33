# SPDX-License-Identifier: Apache-2.0
"""The code of a model card: how this library and transformers open the model beside it.

Every block runs as it stands in the directory of the card, with a video.mp4 in it where the block
reads one; tests/convert/test_card.py runs them.
"""

import dataclasses
from string import Template

from vivit_jax.config import Config, architecture
from vivit_jax.data.transforms.processor import VideoProcessor

_OURS_CLASSIFIES = """\
import vivit_jax

classifier = vivit_jax.VideoClassifier.from_pretrained(".")
for best in classifier("video.mp4", top_k=3):
    print(f"{best['score']:.4f}  {best['label']}")
"""
_OURS = Template("""\
import numpy as np
import vivit_jax

model, params = vivit_jax.from_pretrained(".")
$pixels
${mask}out = model.apply({"params": params}, pixel_values$masked)
print(out.$result)
""")
_OURS_READS = Template("""\
processor = vivit_jax.VideoProcessor.from_pretrained(".")
clip = vivit_jax.read_video("video.mp4", num_frames=$frames, stride=$every)
pixel_values = processor(clip)  # float32 [1, t, h, w, c]""")
_OURS_GIVEN = Template("""\
shape = (1, $frames, $height, $width, $channels)  # b t h w c
pixel_values = np.zeros(shape, np.float32)  # in place of prepared frames""")
_OURS_MASK = (
    "mask = vivit_jax.tube_mask(np.random.default_rng(0), 1, model.config.grid, ratio=0.9)\n"
)
_THEIRS_CLASSIFIES = Template("""\
import av
import numpy as np
import torch
from transformers import AutoImageProcessor, $architecture

with av.open("video.mp4") as video:
    decoded = [(f.to_ndarray(format="rgb24"), f.rotation) for f in video.decode(video=0)]
frames = [np.rot90(image, degrees // 90).copy() for image, degrees in decoded]  # upright
$sampled
processor = AutoImageProcessor.from_pretrained(".")
model = $architecture.from_pretrained(".")
with torch.no_grad():
    logits = model(**processor(frames, return_tensors="pt")).logits[0]
scores = $scores
for index in scores.argsort(descending=True)[:3].tolist():
    print(f"{scores[index]:.4f}  {model.config.id2label[index]}")
""")
_THEIRS_APART = Template("""\
stride = max(1, min($every, (len(frames) - 1) // $gaps))  # less in a short video
span = $gaps * stride + 1
start = max(len(frames) - span, 0) // 2  # the middle of the video, as vivit_jax takes it
frames = frames[start : start + span : stride]
""")
_THEIRS_SEGMENTS = Template("""\
length, total = $frames, len(frames)  # the middle of each of as many parts, as vivit_jax takes it
frames = [frames[(2 * i + 1) * total // (2 * length)] for i in range(length)]
""")
_THEIRS = Template("""\
import torch
from transformers import $architecture

model = $architecture.from_pretrained(".")
shape = (1, $frames, $channels, $height, $width)  # b t c h w
pixel_values = torch.zeros(shape)  # in place of prepared frames
${mask}with torch.no_grad():
    out = model(pixel_values$masked)
print(out.$result)
""")
_THEIRS_MASK = Template("bool_masked_pos = torch.arange($tokens)[None] < $hidden  # True: masked\n")
# From logits to the scores that `VideoClassifier` gives, by problem_type.
_SCORES = {"multi_label_classification": "logits.sigmoid()", "regression": "logits"}
_RESULTS = {
    "classification": "logits.shape",
    "pretraining": "loss",
    "none": "last_hidden_state.shape",
}


_OWN = """\
import vivit_jax
from vivit_jax.train import read_params

params = read_params(".")
processor = vivit_jax.VideoProcessor.from_pretrained(".")
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What lies beside a card; `own_class` is the class of a model that is of no family here."""

    config: Config
    head: str
    parameters: int
    dtype: str
    processor: VideoProcessor | None = None
    pooler: bool = False
    own_class: str | None = None

    @property
    def architecture(self) -> str:
        """The class of the model, as transformers and this library name it."""
        if self.own_class is not None:
            return self.own_class
        return architecture(self.config.model_type, self.head)

    @property
    def reads_videos(self) -> bool:
        """Whether a video file alone says what the model takes."""
        return self.processor is not None and self.config.num_channels == 3

    @property
    def names_classes(self) -> bool:
        """Whether each output is the score of one class."""
        one_head = self.config.class_splits is None and self.config.num_labels > 0
        return self.head == "classification" and one_head


def our_code(model: SavedModel) -> str:
    """Python that opens and runs the model with this library, or what it can of it."""
    if model.own_class is not None:
        return _OWN
    if model.head == "classification" and model.reads_videos and model.config.num_labels:
        return _OURS_CLASSIFIES
    sizes = _sizes(model)
    pixels = (_OURS_READS if model.reads_videos else _OURS_GIVEN).substitute(sizes)
    masks = model.head == "pretraining"
    code = _OURS.substitute(
        pixels=pixels,
        mask=_OURS_MASK if masks else "",
        masked=", mask" if masks else "",
        result=_RESULTS[model.head],
    )
    return code if "np." in code else code.removeprefix("import numpy as np\n")


def their_code(model: SavedModel) -> str:
    """Python that opens and runs the model with transformers, which must have such a model."""
    sizes = _sizes(model)
    if model.names_classes and model.reads_videos:
        scores = _SCORES.get(model.config.problem_type or "", "logits.softmax(-1)")
        segments = model.config.view_sampler == "segments"
        sampled = (_THEIRS_SEGMENTS if segments else _THEIRS_APART).substitute(sizes)
        return _THEIRS_CLASSIFIES.substitute(sizes, scores=scores, sampled=sampled)
    mask = masked = ""
    if model.head == "pretraining":
        t, h, w = model.config.grid
        mask = _THEIRS_MASK.substitute(tokens=t * h * w, hidden=int(0.9 * t * h * w))
        masked = ", bool_masked_pos=bool_masked_pos"
    return _THEIRS.substitute(sizes, mask=mask, masked=masked, result=_RESULTS[model.head])


def _sizes(model: SavedModel) -> dict[str, object]:
    config = model.config
    height, width = config.frame_size
    return {
        "architecture": model.architecture,
        "frames": config.num_frames,
        "gaps": max(config.num_frames - 1, 1),
        "every": config.frame_stride,
        "height": height,
        "width": width,
        "channels": config.num_channels,
    }
