# SPDX-License-Identifier: Apache-2.0
"""From files to model input.

`datasets` lists clips, `video` decodes them, `sampling` chooses frames, `transforms` turns frames
into pixels. `pipeline` puts these together for training, `read_clip` and `sliding_window` for
evaluation. Reader processes import these modules, so none imports jax (except
`transforms.processor_in_jax`), and av is imported in functions.
"""
