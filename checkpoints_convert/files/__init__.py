# SPDX-License-Identifier: Apache-2.0
"""Files of weights: opened without reading their data, and written whole or not at all."""
