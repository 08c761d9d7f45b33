# SPDX-License-Identifier: Apache-2.0
"""From decoded frames to pixels.

`augment` is the geometry of training clips, `randaugment` draws the colour and shape operations of
`image_ops`. `processor` is the preprocessing that belongs to a checkpoint, `processor_in_jax` the
same function compiled.

A new augmentation of training clips gets a field in `vivit_jax.data.settings.AugmentSettings`, its
range in `vivit_jax.recipes.checks`, and a step in `augment.train_transform` (on uint8 frames, in
the reader processes) or in `vivit_jax.train.augment_on_device.training_pixels` (on pixels, on the
device).
"""
