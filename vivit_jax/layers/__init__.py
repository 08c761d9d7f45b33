# SPDX-License-Identifier: Apache-2.0
"""Pieces that every model is made of."""
