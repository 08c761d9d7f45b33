# SPDX-License-Identifier: Apache-2.0
"""Models that start from the weights of another kind of model."""
