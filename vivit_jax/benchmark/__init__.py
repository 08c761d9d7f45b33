# SPDX-License-Identifier: Apache-2.0
"""What `vivit-jax benchmark` measures: models, memory and the way from file to clip."""
