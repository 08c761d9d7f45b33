# SPDX-License-Identifier: Apache-2.0
"""Loads, saves, converts and verifies weights: tables, layouts, and `vivit-convert`."""
