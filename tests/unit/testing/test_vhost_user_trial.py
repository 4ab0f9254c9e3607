# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue over vhost-user, on each ring: what it shares with other transports, and what is its own."""

from __future__ import annotations

import pytest

from svsm.formats.errors import ProtocolError
from svsm.storage.drivers.virtio.queue import VirtQueue
from svsm.testing.hostile.attacks import ATTACKS
from svsm.testing.hostile.matrix import Cell, cells
from svsm.testing.hostile.vhost_user_attacks import MESSAGE_ATTACKS
from svsm.testing.vhost_user_trial import CASES, DIFFERENT, IMPOSSIBLE, expected, run

CELLS = [pytest.param(cell, id=f"{cell.number}-{cell.name}-{cell.ring}") for cell in cells("vhost-user")]
_SAMPLE = 29


@pytest.mark.parametrize("cell", CELLS[::_SAMPLE])
def test_sample(cell: Cell) -> None:
    assert cell.run() == cell.expected


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS)
def test_each(cell: Cell) -> None:
    assert cell.run() == cell.expected


def test_every_case_is_there_or_says_why_not() -> None:
    names = {attack.name for attack in ATTACKS}
    assert set(IMPOSSIBLE) | set(DIFFERENT) <= names
    assert {attack.name for attack in CASES} == names - set(IMPOSSIBLE)
    own = [attack.name for attack in MESSAGE_ATTACKS]
    assert len(set(own)) == len(own)


def test_a_check_that_is_taken_out_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = next(one for one in CASES if one.name == "a request is returned in the place of another")

    def believe(queue: VirtQueue, slot: int, identifier: int, length: int) -> None:
        if slot < 0:
            raise ProtocolError("no slot", code="virtio-used-id")
        queue._flying[slot] = 0
        queue.in_flight -= 1
        queue.written[slot] = length

    monkeypatch.setattr(VirtQueue, "_take_back", believe)
    assert run(attack, "split") != expected(attack, "split")
