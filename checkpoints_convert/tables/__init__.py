# SPDX-License-Identifier: Apache-2.0
"""One weight table for each layout and family, read in both directions."""
