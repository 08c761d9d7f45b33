# SPDX-License-Identifier: Apache-2.0
"""One weight table per layout and family, read in both directions."""
