# SPDX-License-Identifier: Apache-2.0
"""Pieces that every model is made of.

`embed` makes tokens of tubelets, `encoder` holds the transformer blocks, `linear` projections and
norms. `attention` calls one of its backends and says how to add one: `chunked` and `pallas`, which
`placed` splits over a mesh with the help of `query_blocks`, or those of `jax.nn`, of which `cudnn`
says where cuDNN runs.
"""
