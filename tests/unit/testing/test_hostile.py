# SPDX-License-Identifier: MIT OR Apache-2.0
"""The matrix: every attack of the list against the driver, over mmio, on every ring."""

from __future__ import annotations

import pytest

from svsm.testing.hostile.attacks import ABSENT, ATTACKS, NUMBERS, Attack
from svsm.testing.hostile.trial import RINGS, run

_CELLS = [(attack, ring) for attack in ATTACKS for ring in RINGS if ring in attack.expected]


@pytest.mark.parametrize(("attack", "ring"), _CELLS, ids=[f"{a.number}-{a.name}-{ring}" for a, ring in _CELLS])
def test_attack(attack: Attack, ring: str) -> None:
    assert attack.run(ring) == attack.expected[ring]


@pytest.mark.parametrize("ring", RINGS)
def test_an_honest_device_survives(ring: str) -> None:
    assert str(run(lambda device: None, ring)) == "survived"


def test_every_cell_of_the_matrix_is_there_or_says_why_not() -> None:
    for number in NUMBERS:
        for ring in RINGS:
            cases = [attack for attack in ATTACKS if attack.number == number and ring in attack.expected]
            assert bool(cases) != ((number, ring) in ABSENT), (number, ring)
