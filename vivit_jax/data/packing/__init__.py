# SPDX-License-Identifier: Apache-2.0
"""Writes packs: many clips in a few large shards."""
