# SPDX-License-Identifier: Apache-2.0
"""From decoded frames to pixels.

`augment` is the geometry of training clips, `randaugment` draws the colour and shape operations of
`image_ops`. `processor` is the preprocessing that belongs to a checkpoint, `processor_in_jax` the
same function compiled. A new augmentation gets a field in `vivit_jax.data.settings.AugmentSettings`
and a step in `augment.train_transform`, or, if it acts on pixel values, in
`vivit_jax.train.augment_on_device`.
"""
