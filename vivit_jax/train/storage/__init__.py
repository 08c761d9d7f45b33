# SPDX-License-Identifier: Apache-2.0
"""What a run keeps: its directory, here or in an object store, its checkpoints and models."""
