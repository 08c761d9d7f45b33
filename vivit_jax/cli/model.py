# SPDX-License-Identifier: Apache-2.0
"""What the commands need of `--model` and of a clip before the model runs."""

import sys

# How pixels are normalised in the layouts of single files, which come without a processor's file.
_NORMALISED = {
    "scenic": "to [-1, 1], as scenic does",
    "videomae": "by ImageNet's mean and std, as VideoMAE's authors do",
}


def processor_of(source):
    """The processor of a `checkpoints_convert.source.Source`: that of the file beside its weights.

    Without one, a file of VideoMAE's authors or of scenic gets what `vivit-convert convert` writes
    beside the converted weights, told in a line on stderr. Raises UserError where nothing says how
    frames are prepared, ConfigError for a file that is wrong.
    """
    from checkpoints_convert.source import FILE_LAYOUTS
    from vivit_jax.data.processor import VideoProcessor, processor_file

    path, layout = source.checkpoint.path, source.layout.name
    if layout in FILE_LAYOUTS and processor_file(path.parent) is None:
        processor = FILE_LAYOUTS[layout].processor(source.config)
        if processor is not None:
            crop = "{height}x{width}".format(**processor.crop_size)
            print(
                f"no preprocessor_config.json is beside {path}: frames are resized to a shortest "
                f"edge of {processor.size['shortest_edge']}, cropped to {crop} and normalised "
                f"{_NORMALISED[layout]}",
                file=sys.stderr,
            )
            return processor
    return VideoProcessor.from_pretrained(path.parent)


def pixel_values_of(clip, processor):
    """A `vivit_jax.data.clip.Clip` as the model's input; told on stderr where alpha weights it."""
    if clip.mixes_channels(processor):
        print(
            f"the last of {clip.frames.shape[-1]} channels was taken for alpha, which weights the "
            'others in the resize; if it is data, set "independent_channels": true in '
            "preprocessor_config.json",
            file=sys.stderr,
        )
    return clip.pixel_values(processor)
