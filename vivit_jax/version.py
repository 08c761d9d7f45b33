# SPDX-License-Identifier: Apache-2.0
"""The version, on the ground floor: files of every floor write it."""

__version__ = "0.1.0.dev0"
