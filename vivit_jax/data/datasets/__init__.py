# SPDX-License-Identifier: Apache-2.0
"""Data sets: `dataset` reads list files, folders and their clips; `synthetic` draws videos."""
