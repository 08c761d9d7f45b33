# SPDX-License-Identifier: Apache-2.0
"""Training: `setup` builds what a run needs, `step` is one step of it, `loop` the whole run.

`log` writes metrics.jsonl, `report` draws it; `report` says where a new metric goes.
"""
