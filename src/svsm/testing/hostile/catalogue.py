# SPDX-License-Identifier: MIT OR Apache-2.0
"""The catalogue: what a malicious virtio block device can do, by number, and how the driver must react.

The numbers are those of the list that this project keeps of such attacks; a number has as many cases as there are
ways to do it. Each case installs hooks on a `HostileBlk` and says, by ring, what must come of it. Numbers that have no
case against this transport or ring are in `ABSENT`, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from svsm.host.devices.virtio_blk import ALL_FEATURES, BlkOptions
from svsm.host.devices.virtio_ring import Chain, DeviceRing
from svsm.storage.drivers.dma import DmaMemory
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.hostile.trial import Kind, Outcome, Trial, run

__all__ = [
    "ABSENT",
    "ATTACKS",
    "BOTH",
    "IO_ERROR",
    "NUMBERS",
    "PACKED",
    "SPLIT",
    "SURVIVED",
    "Attack",
    "Install",
    "attack",
    "dead",
    "nth",
    "options_of",
    "refused",
]

Install = Callable[[HostileBlk], None]

SPLIT: Final = ("split", "split-direct")
PACKED: Final = ("packed", "packed-direct")
BOTH: Final = SPLIT + PACKED

SURVIVED: Final = Outcome(Kind.SURVIVED)
IO_ERROR: Final = Outcome(Kind.ERROR, "block-io")
NUMBERS: Final = range(1, 36)


def dead(code: str) -> Outcome:
    """The device is given up for this violation."""
    return Outcome(Kind.DEAD, code)


def refused(code: str) -> Outcome:
    """The driver does not start."""
    return Outcome(Kind.REFUSED, code)


@dataclasses.dataclass(frozen=True, slots=True)
class Attack:
    """One case.

    Attributes:
        number: In the list.
        name: What the device does.
        install: Makes a device do it.
        expected: By ring; a ring that is not there cannot be attacked like this.
        options: What the device offers.
        after: More steps for the driver.
        memory_type: How the driver sees the memory.
        queues: How many the driver wants.
    """

    number: int
    name: str
    install: Install
    expected: dict[str, Outcome]
    options: BlkOptions | None = None
    after: Callable[[Trial], None] | None = None
    memory_type: type[DmaMemory] = DmaMemory
    queues: int = 1

    def run(self, ring: str) -> Outcome:
        """One trial of it. Raises `TrialError`, or whatever the driver lets out, when a promise is broken."""
        return run(
            self.install,
            ring,
            options=self.options,
            after=self.after,
            memory_type=self.memory_type,
            queues=self.queues,
        )


ATTACKS: Final[list[Attack]] = []

ABSENT: Final[dict[tuple[int, str], str]] = {
    (33, ring): "old, swapped or corrupted contents look like any contents: only what encrypts above can see it"
    for ring in BOTH
} | {
    (34, ring): "messages, descriptors and sockets of a vhost-user back-end: that transport's own cases"
    for ring in BOTH
}
for _ring in SPLIT:
    ABSENT[35, _ring] = "wrap bits and skipped positions exist in packed rings only"
for _ring in PACKED:
    ABSENT[1, _ring] = "a packed ring has no used index; its counterpart is 35"
    ABSENT[13, _ring] = "the order of a packed chain is its place in the ring; there is nothing to bend into a loop"
    ABSENT[3, _ring] = "a packed identifier has 16 bits, all of them checked by 2"
for _ring in ("split-direct", "packed-direct"):
    ABSENT[12, _ring] = "there are no indirect tables"


def attack(
    number: int,
    name: str,
    expected: Outcome,
    *,
    rings: tuple[str, ...] = BOTH,
    options: BlkOptions | None = None,
    after: Callable[[Trial], None] | None = None,
    memory_type: type[DmaMemory] = DmaMemory,
    queues: int = 1,
    **by_ring: Outcome,
) -> Callable[[Install], Install]:
    """Register a case; ``split=``, ``packed_direct=`` … say where the reaction is another one."""
    outcomes = {ring: by_ring.get(ring.replace("-", "_"), expected) for ring in rings}

    def register(install: Install) -> Install:
        ATTACKS.append(Attack(number, name, install, outcomes, options, after, memory_type, queues))
        return install

    return register


def nth(device: HostileBlk, number: int, act: Callable[[DeviceRing, Chain, int], None]) -> None:
    """Complete honestly, but the `number`-th request (from 0) like this."""
    count = 0

    def complete(ring: DeviceRing, chain: Chain, written: int) -> None:
        nonlocal count
        count += 1
        if count == number + 1:
            act(ring, chain, written)
        else:
            ring.push(chain, written)

    device.on_complete = complete


def options_of(remove: int = 0, add: int = 0, **changes: Any) -> BlkOptions:
    """What the device offers: all features but `remove`, and `add`."""
    return BlkOptions(features=ALL_FEATURES & ~int(remove) | int(add), queue_size=32, **changes)
