# SPDX-License-Identifier: Apache-2.0
"""Checkpoint layouts, a file for each, and the registry that detects which one a checkpoint is in.

The layouts are `hf`, `image_vit`, `scenic` and `videomae_authors`; `layout` says how to add one.
They share `state_dicts` (containers and prefixes), `infer` (configs of checkpoints without one) and
`hub_v2` (VideoMAE V2's config.json on the hub).
"""
