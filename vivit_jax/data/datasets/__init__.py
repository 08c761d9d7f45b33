# SPDX-License-Identifier: Apache-2.0
"""Where clips come from: lists, class folders, made-up videos."""
