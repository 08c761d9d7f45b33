# SPDX-License-Identifier: Apache-2.0
"""Weights between frameworks: tables, the engine that applies them, and `vivit-convert`."""
