# SPDX-License-Identifier: Apache-2.0
"""Exact frames of one video: `decode` reads some by number, `frame_stream` all in order.

`opened` opens a file of one of the `formats`, `packets` numbers its frames, `clock` times them,
`decoder` and `sequence` decode them, `pictures` converts them; `images` reads pictures and WebP.
"""
