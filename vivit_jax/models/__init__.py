# SPDX-License-Identifier: Apache-2.0
"""The models: a file for each family and their registry; `family` says how to add one."""
