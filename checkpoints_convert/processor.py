# SPDX-License-Identifier: Apache-2.0
"""The processor that belongs to a checkpoint."""

import logging

from checkpoints_convert.source import Source
from vivit_jax.data.transforms.processor import VideoProcessor
from vivit_jax.data.transforms.processor_files import processor_file

logger = logging.getLogger(__name__)


def processor_of(source: Source) -> VideoProcessor:
    """The processor of an opened checkpoint: that of the file beside its weights.

    Without one, a file of VideoMAE's authors or of scenic gets what `vivit-convert convert` writes
    beside the converted weights, with a warning that describes it. Raises UserError where nothing
    says how frames are prepared, ConfigError for a file that is wrong.
    """
    path, layout = source.checkpoint.path, source.layout
    if layout.processor is not None and processor_file(path.parent) is None:
        processor = layout.processor(source.config)
        if processor is not None:
            crop = "{height}x{width}".format(**processor.crop_size)
            logger.warning(
                "no preprocessor_config.json is beside %s: frames are resized to a shortest edge "
                "of %d, cropped to %s and normalised %s",
                path,
                processor.size["shortest_edge"],
                crop,
                layout.normalised,
            )
            return processor
    return VideoProcessor.from_pretrained(path.parent)
