# SPDX-License-Identifier: MIT OR Apache-2.0
"""Hostile rings over vhost-user: each case of the catalogue that needs no registers, on each ring."""

from __future__ import annotations

import pytest

from svsm.formats.errors import ProtocolError
from svsm.storage.drivers.virtio.queue import VirtQueue
from svsm.testing.hostile.catalogue import Attack
from svsm.testing.hostile.trial import RINGS
from svsm.testing.vhost_user_trial import RING_CASES, expected, run

CELLS = [
    pytest.param(attack, ring, id=f"{attack.number}-{attack.name}-{ring}")
    for attack in RING_CASES
    for ring in RINGS
    if ring in attack.expected
]
_SAMPLE = 7


@pytest.mark.parametrize(("attack", "ring"), CELLS[::_SAMPLE])
def test_sample(attack: Attack, ring: str) -> None:
    assert run(attack, ring) == expected(attack, ring)


@pytest.mark.long
@pytest.mark.parametrize(("attack", "ring"), CELLS)
def test_each(attack: Attack, ring: str) -> None:
    assert run(attack, ring) == expected(attack, ring)


def test_there_are_cases() -> None:
    assert len(CELLS) > 100
    assert {attack.number for attack in RING_CASES} >= {1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 27, 29, 31, 35}


def test_a_check_that_is_taken_out_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = next(one for one in RING_CASES if one.name == "a request is returned in the place of another")

    def believe(queue: VirtQueue, slot: int, identifier: int, length: int) -> None:
        if slot < 0:
            raise ProtocolError("no slot", code="virtio-used-id")
        queue._flying[slot] = 0
        queue.in_flight -= 1
        queue.written[slot] = length

    monkeypatch.setattr(VirtQueue, "_take_back", believe)
    assert run(attack, "split") != expected(attack, "split")
