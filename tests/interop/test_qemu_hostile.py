# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue on QEMU's own virtio disk, with somebody between it and the driver: registers and completions lie."""

from __future__ import annotations

import random

import pytest

from svsm.storage.drivers.virtio.split import SplitQueue
from svsm.testing.hostile.attacks import ATTACKS
from svsm.testing.hostile.matrix import Cell, cells
from svsm.testing.hostile.qemu_attacks import mixed
from svsm.testing.hostile.qemu_trial import DIFFERENT, IMPOSSIBLE, run
from svsm.testing.hostile.trial import RINGS, TrialError
from tests.support import peer
from tests.unit.testing.test_vhost_user_trial import believe

pytestmark = pytest.mark.interop

_NAMES = [(cell.number, cell.name, cell.ring) for cell in cells("qemu")]
_PLACES = [
    pytest.param(place, id="-".join(map(str, name)), marks=() if place % 43 == 7 else pytest.mark.long)
    for place, name in enumerate(_NAMES)
]


def _cells() -> list[Cell]:
    return cells("qemu", program=peer("qemu-system-x86_64"))


@pytest.mark.parametrize("place", _PLACES)
def test_attack(place: int) -> None:
    cell = _cells()[place]
    assert cell.run() == cell.expected


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ring", RINGS)
def test_mixtures(ring: str) -> None:
    source, program = random.Random(ring), peer("qemu-system-x86_64")
    for _ in range(40):
        run(mixed(source.randbytes(source.randrange(200))), ring, program=program)


@pytest.mark.long
def test_a_driver_that_believes_everything_fails_every_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitQueue, "collect", believe)
    tried = [cell for cell in _cells() if cell.number <= 6 and cell.ring == "split"]
    assert len(tried) > 8
    for cell in tried:
        try:
            assert cell.run() != cell.expected, cell.name
        except (TrialError, IndexError):  # a broken promise is noticed as well
            continue


def test_names() -> None:
    assert set(IMPOSSIBLE) | set(DIFFERENT) <= {attack.name for attack in ATTACKS}
    assert len(set(_NAMES)) == len(_NAMES)
