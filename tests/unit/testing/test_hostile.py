# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every attack of the list against the driver, over mmio, on every ring; and that the whole matrix is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from svsm.testing.hostile.attacks import ATTACKS, NUMBERS, Attack
from svsm.testing.hostile.matrix import TRANSPORTS, absent, cells, markdown
from svsm.testing.hostile.trial import RINGS, run

_CELLS = [(attack, ring) for attack in ATTACKS for ring in RINGS if ring in attack.expected]


@pytest.mark.parametrize(("attack", "ring"), _CELLS, ids=[f"{a.number}-{a.name}-{ring}" for a, ring in _CELLS])
def test_attack(attack: Attack, ring: str) -> None:
    assert attack.run(ring) == attack.expected[ring]


@pytest.mark.parametrize("ring", RINGS)
def test_an_honest_device_survives(ring: str) -> None:
    assert str(run(lambda device: None, ring)) == "survived"


def test_every_cell_of_the_matrix_is_there_or_says_why_not() -> None:
    there = {(cell.number, transport, cell.ring) for transport in TRANSPORTS for cell in cells(transport)}
    for number in NUMBERS:
        for transport in TRANSPORTS:
            for ring in RINGS:
                place = (number, transport, ring)
                assert (place in there) != bool(absent(*place)), place


def test_the_matrix_in_the_documentation() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "hostile.md").read_text(encoding="utf-8")
    assert markdown() in page, "the table is not that of `python -m svsm.testing.hostile table`"
