# SPDX-License-Identifier: Apache-2.0
"""The preprocessing that belongs to a checkpoint."""

import logging

from checkpoints_convert.source import FILE_LAYOUTS, Source
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.transforms.processor_files import processor_file

logger = logging.getLogger(__name__)

# How pixels are normalised in the layouts of single files, which come without a processor's file.
_NORMALISED = {
    "scenic": "to [-1, 1], as scenic does",
    "videomae": "by ImageNet's mean and std, as VideoMAE's authors do",
}


def processor_of(source: Source) -> VideoProcessor:
    """The processor of an opened checkpoint: that of the file beside its weights.

    Without one, a file of VideoMAE's authors or of scenic gets what `vivit-convert convert` writes
    beside the converted weights, with a warning that says what it is. Raises UserError where
    nothing says how frames are prepared, ConfigError for a file that is wrong.
    """
    path, layout = source.checkpoint.path, source.layout.name
    if layout in FILE_LAYOUTS and processor_file(path.parent) is None:
        processor = FILE_LAYOUTS[layout].processor(source.config)
        if processor is not None:
            crop = "{height}x{width}".format(**processor.crop_size)
            logger.warning(
                "no preprocessor_config.json is beside %s: frames are resized to a shortest edge "
                "of %d, cropped to %s and normalised %s",
                path,
                processor.size["shortest_edge"],
                crop,
                _NORMALISED[layout],
            )
            return processor
    return VideoProcessor.from_pretrained(path.parent)
