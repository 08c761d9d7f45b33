# SPDX-License-Identifier: Apache-2.0
"""Weight tables, one for each layout and family, read in both directions.

`table` is the record of one; `hf_block` and `timm_block` hold the rules that several share.
"""
