# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: how they find each other, what ends them, and whether they go on."""
