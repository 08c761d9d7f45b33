# SPDX-License-Identifier: Apache-2.0
"""Frames of one video: containers, seeking, decoding, folders of images."""
