# SPDX-License-Identifier: Apache-2.0
"""The planted faults follow the code; planting them takes hours, see tests/faults.py."""

import ast

import pytest
from faults import ROOT, planted
from planted import FAULTS, Fault


def test_every_fault_has_its_place():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) == 60
    for fault in FAULTS:
        text, place = planted(fault, ROOT)
        ast.parse(text)
        assert text != (ROOT / fault.path).read_text() and place.startswith(f"{fault.path}:")


def test_code_that_has_moved():
    with pytest.raises(SystemExit, match="'gone': vivit_jax/errors.py holds 'no such' 0 times"):
        planted(Fault("gone", "vivit_jax/errors.py", "no such", "code"), ROOT)
