# SPDX-License-Identifier: Apache-2.0
"""One file a checkpoint layout, and the registry that detects which one a checkpoint is in."""
