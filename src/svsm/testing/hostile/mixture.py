# SPDX-License-Identifier: MIT OR Apache-2.0
"""A device whose every decision is read from bytes: for property tests and coverage-guided fuzzers.

`mixture(data)` is an attack like those of the catalogue. Each time the device could lie it takes an operation and its
arguments from `data`; when the bytes are used up it is honest. Every operation of the catalogue's kind is here, in any
order and number, so a finding is a short string of bytes. `rounds` says how honest it starts: that many decisions
are left alone first, so that the driver gets past its start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from svsm.formats.vhost_user import Request
from svsm.formats.virtio import MmioRegister
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing
from svsm.testing.hostile.device import HostileBlk
from svsm.testing.vhost_user_backend import Conversation, Script

__all__ = ["Decisions", "message_mixture", "mixture"]

_HONEST_SHARE: Final = 96
"""Of 256: how many values of the operation byte mean "be honest"."""


class Decisions:
    """Reads numbers from bytes; zeros when they are used up.

    Args:
        data: The bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        """Whether there are any."""
        return self._at < len(self._data)

    def byte(self) -> int:
        """The next byte."""
        if not self.left:
            return 0
        self._at += 1
        return self._data[self._at - 1]

    def number(self, width_bytes: int) -> int:
        """The next bytes as a number."""
        return int.from_bytes(bytes(self.byte() for _ in range(width_bytes)), "little")

    def edge(self, honest: int) -> int:
        """A 32-bit number, often one at the edge of something."""
        edges = (0, 1, honest + 1, honest - 1, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x1_0000 | honest, honest, 512, 513)
        choice = self.byte()
        return (edges[choice] if choice < len(edges) else self.number(4)) & 0xFFFF_FFFF


class _Mixture:
    def __init__(self, device: HostileBlk, decisions: Decisions, rounds: int) -> None:
        self._device = device
        self._decisions = decisions
        self._rounds = rounds
        self._held: list[tuple[Chain, int]] = []
        self._operations: tuple[Callable[[DeviceRing, Chain, int], None], ...] = (
            self._any_identifier,
            self._any_length,
            self._twice,
            self._hold,
            self._release,
            self._status,
            self._scribble,
            self._index,
            self._needs_reset,
            self._drop,
            self._events,
            self._data,
            self._resize,
            self._flags,
        )

    def _lie(self) -> bool:
        if self._rounds > 0:
            self._rounds -= 1
            return False
        return self._decisions.left and self._decisions.byte() >= _HONEST_SHARE

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, honest: int) -> int:
        """A register."""
        # Polled registers would use up all decisions: they lie less.
        polled = offset in (MmioRegister.STATUS, MmioRegister.INTERRUPT_STATUS)
        if not self._lie() or (polled and self._decisions.byte() % 8):
            return honest
        return self._decisions.edge(honest)

    def complete(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """A completion."""
        if not self._lie():
            ring.push(chain, written)
            return
        operation = self._operations[self._decisions.byte() % len(self._operations)]
        operation(ring, chain, written)

    # ---- operations -----------------------------------------------------------------------------------------------

    def _any_identifier(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        self._device.mark_used(ring, self._decisions.edge(chain.identifier), written, chain.entries)

    def _any_length(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        self._device.mark_used(ring, chain.identifier, self._decisions.edge(written), chain.entries)

    def _twice(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        ring.push(chain, written)

    def _hold(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        self._held.append((chain, written))

    def _release(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        while self._held:
            ring.push(*self._held.pop(self._decisions.byte() % len(self._held)))

    def _status(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        last = chain.parts[-1]
        self._device.window.put(last.address + last.length - 1, bytes([self._decisions.byte()]))
        ring.push(chain, written)

    def _scribble(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        pattern = bytes(self._decisions.byte() for _ in range(16))
        ring.push(chain, written)
        self._device.scribble_descriptors(ring, pattern)

    def _index(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        if isinstance(ring, DeviceSplitRing):
            ring.set_used_index(ring.next_used + self._decisions.number(2))
        elif isinstance(ring, DevicePackedRing):
            ring.skip(self._decisions.byte() % ring.size)

    def _needs_reset(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        self._device.needs_reset()

    def _drop(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        pass

    def _events(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        self._device.window.put(ring.addresses.device, self._decisions.number(2).to_bytes(2, "little"))
        if isinstance(ring, DeviceSplitRing):
            event = ring.addresses.device + 4 + 8 * ring.size
            self._device.window.put(event, self._decisions.number(2).to_bytes(2, "little"))

    def _data(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """Everything that is shared, at once. (Contents that were read then differ: only what reads is changed.)"""
        for part in chain.parts:
            if not part.device_writes:
                self._device.window.put(part.address, bytes([self._decisions.byte()]) * part.length)
        ring.push(chain, written)

    def _resize(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        """A capacity that was never true; the file keeps its size."""
        self._device.backend.capacity = self._decisions.number(self._decisions.byte() % 8 + 1)
        self._device.generation += 1
        self._device.interrupt_status |= 2
        ring.push(chain, written)

    def _flags(self, ring: DeviceRing, chain: Chain, written: int) -> None:
        ring.push(chain, written)
        if isinstance(ring, DevicePackedRing):
            at = ring.addresses.descriptors + 16 * (self._decisions.byte() % ring.size) + 14
            self._device.window.put(at, self._decisions.number(2).to_bytes(2, "little"))


def mixture(data: bytes, *, rounds: int = 0) -> Callable[[HostileBlk], None]:
    """An attack that does what the bytes say.

    Args:
        data: Decisions.
        rounds: Decisions that are honest before the first is taken.
    """

    def install(device: HostileBlk) -> None:
        mixed = _Mixture(device, Decisions(data), rounds)
        device.on_read = mixed.read
        device.on_complete = mixed.complete

    return install


def message_mixture(data: bytes, *, rounds: int = 0) -> Script:
    """A vhost-user back-end whose answers are what the bytes say: right, changed, cut, repeated, left out, the end.

    Args:
        data: Decisions.
        rounds: Answers that are honest before the first decision is taken.
    """
    decisions = Decisions(data)
    left = rounds

    def script(_: Conversation, request: Request, honest: bytes) -> bytes:
        nonlocal left
        left -= 1
        if left >= 0 or not honest or not decisions.left or decisions.byte() < _HONEST_SHARE:
            return honest
        choice = decisions.byte() % 6
        if choice == 0:
            raise EOFError
        if choice == 1:
            return honest[: decisions.byte() % len(honest)]
        if choice == 2:
            return honest * (1 + decisions.byte() % 3)
        if choice == 3:
            return honest[:12] + bytes(decisions.byte() for _ in honest[12:])
        changed = bytearray(honest)
        for _flip in range(1 + decisions.byte() % 4):
            changed[decisions.byte() % len(changed)] ^= 1 << decisions.byte() % 8
        return bytes(changed)

    return script
