# SPDX-License-Identifier: Apache-2.0
"""What a training step costs on hardware that is not here: memory, time, collectives."""
