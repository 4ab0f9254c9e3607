# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue over vhost-user, on each ring: what it shares with other transports, and what is its own."""

from __future__ import annotations

import pytest

from svsm.storage.drivers.virtio.split import SplitQueue
from svsm.testing.hostile.attacks import ATTACKS
from svsm.testing.hostile.catalogue import refused
from svsm.testing.hostile.matrix import Cell, cells
from svsm.testing.hostile.trial import TrialError
from svsm.testing.hostile.vhost_user_attacks import MESSAGE_ATTACKS, MessageAttack
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


def test_what_is_found_before_the_driver_refuses_is_not_lost() -> None:
    code = "vhost-user-features"
    assert run(MessageAttack(15, "honest refusal", refused(code), protocol_features=0), "split") == refused(code)
    found = MessageAttack(
        15,
        "a finding, then a refusal",
        refused(code),
        protocol_features=0,
        prepare=lambda trial: trial.findings.append(TrialError("found")),
    )
    with pytest.raises(TrialError, match="found"):
        run(found, "split")


def believe(queue: SplitQueue) -> list[int]:
    """Take every completion for what it says."""
    fresh = (queue._memory.u16[queue._used_index] - queue._seen) & 0xFFFF
    done = []
    for position in range(queue._seen, queue._seen + fresh):
        element = queue._memory.u64[queue._used_ring + position % queue.shape.size]
        done.append(queue._slot_of[element & 0xFFFF_FFFF])
        queue._flying[done[-1]] = 0
        queue.written[done[-1]] = element >> 32
    queue.in_flight -= fresh
    queue._seen = (queue._seen + fresh) & 0xFFFF
    return done


def test_checks_that_are_taken_out_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    attack = next(one for one in CASES if one.name == "a request is returned in the place of another")
    assert run(attack, "split") == expected(attack, "split")
    monkeypatch.setattr(SplitQueue, "collect", believe)
    try:
        outcome = run(attack, "split")
    except (TrialError, IndexError):  # a broken promise is noticed as well
        return
    assert outcome != expected(attack, "split")
