# SPDX-License-Identifier: Apache-2.0
"""From video files to model input: decoding, frame sampling, preprocessing."""
