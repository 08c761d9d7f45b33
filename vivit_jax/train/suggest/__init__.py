# SPDX-License-Identifier: Apache-2.0
"""Settings of a fine-tuning run that suit its data, its start and the machine, with reasons.

`facts` looks at the three, `rules` chooses, `memory` sees to it that a step fits.
"""
