# SPDX-License-Identifier: Apache-2.0
"""What became of a run and of an evaluation, as pages and pictures."""
