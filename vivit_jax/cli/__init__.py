# SPDX-License-Identifier: Apache-2.0
"""The `vivit-jax` commands, one file each."""
