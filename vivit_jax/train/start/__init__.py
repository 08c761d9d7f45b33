# SPDX-License-Identifier: Apache-2.0
"""What a run starts from: a model, its first parameters, and how frames are prepared."""
