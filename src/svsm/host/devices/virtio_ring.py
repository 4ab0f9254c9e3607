# SPDX-License-Identifier: MIT OR Apache-2.0
"""Virtio rings from the device's side: take chains, return them, ask for kicks and interrupts.

This is the host: what the driver wrote is its guest's business, but a guest must not crash its host either, so every
address is checked against the window, every chain counted, and the first thing that cannot be raises `FormatError`
(``virtio-device-ring``), upon which the device asks for a reset.

The rings work on any window of memory, so they also serve as the other half of the driver's tests.
"""

from __future__ import annotations

import abc
import dataclasses
import threading

from svsm.formats.errors import FormatError
from svsm.formats.virtio import (
    DescriptorFlag,
    EventFlag,
    PackedDescriptor,
    PackedEvent,
    QueueAddresses,
    SplitDescriptor,
    UsedElement,
)

__all__ = ["Chain", "DevicePackedRing", "DeviceRing", "DeviceSplitRing", "Part", "Window"]

# Plain numbers: the operators of enumerations cost more than the rest of a ring.
_NEXT, _WRITE, _INDIRECT = int(DescriptorFlag.NEXT), int(DescriptorFlag.WRITE), int(DescriptorFlag.INDIRECT)
_AVAIL, _USED = int(DescriptorFlag.AVAIL), int(DescriptorFlag.USED)
_MASK_16 = 0xFFFF
_WRAP_BIT = 1 << 15
_FENCE = threading.Lock()


def _bad(what: str, got: int = 0) -> FormatError:
    return FormatError(f"the driver's ring is wrong: {what}", code="virtio-device-ring", got=got)


class Window:
    """Guest memory that the device can reach.

    Args:
        memory: The bytes.
        address: Guest-physical address of the first one.
    """

    def __init__(self, memory: memoryview, *, address: int) -> None:
        self.bytes = memory.cast("B")
        self.address = address

    def offset(self, address: int, length: int) -> int:
        """Where `length` bytes at an address are.

        Raises:
            FormatError: ``virtio-device-ring`` when they are not all in the window.
        """
        offset = address - self.address
        if offset < 0 or length < 0 or offset + length > self.bytes.nbytes:
            raise _bad("an address outside the shared memory", address)
        return offset

    def take(self, address: int, length: int) -> bytes:
        """A copy of guest bytes."""
        offset = self.offset(address, length)
        return bytes(self.bytes[offset : offset + length])

    def put(self, address: int, data: bytes) -> None:
        """Store guest bytes."""
        offset = self.offset(address, len(data))
        self.bytes[offset : offset + len(data)] = data

    def u16(self, address: int, count: int) -> memoryview:
        """`count` words as a view whose stores are single machine stores."""
        offset = self.offset(address, 2 * count)
        if offset % 2:
            raise _bad("a ring is not aligned", address)
        return self.bytes[offset : offset + 2 * count].cast("H")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A buffer of a chain."""

    address: int
    length: int
    device_writes: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """A request as the driver put it into the ring."""

    identifier: int
    entries: int
    """Ring entries that it takes (packed: how far the ring moves on)."""
    parts: tuple[Part, ...]


class DeviceRing(abc.ABC):
    """One queue, device side."""

    def __init__(self, window: Window, size: int, addresses: QueueAddresses, *, event_idx: bool) -> None:
        self.window = window
        self.size = size
        self.addresses = addresses
        self.event_idx = event_idx

    @abc.abstractmethod
    def pop(self) -> Chain | None:
        """The next chain, or None. Raises `FormatError` (``virtio-device-ring``)."""

    @abc.abstractmethod
    def push(self, chain: Chain, written: int) -> None:
        """Return a chain."""

    @abc.abstractmethod
    def wants_interrupt(self) -> bool:
        """Whether the driver asked for an interrupt for what was pushed since the last call."""

    @abc.abstractmethod
    def enable_kicks(self) -> bool:
        """Ask to be kicked from now on; returns whether there is something already."""

    @abc.abstractmethod
    def disable_kicks(self) -> None:
        """Say that kicks are not needed now."""

    def _indirect(self, address: int, length: int) -> bytes:
        if not length or length % SplitDescriptor.SIZE or length // SplitDescriptor.SIZE > self.size:
            raise _bad("an indirect table of this length", length)
        return self.window.take(address, length)


class DeviceSplitRing(DeviceRing):
    """A split ring."""

    def __init__(self, window: Window, size: int, addresses: QueueAddresses, *, event_idx: bool) -> None:
        super().__init__(window, size, addresses, event_idx=event_idx)
        if not size or size & (size - 1):
            raise _bad("a size that is no power of two", size)
        window.offset(addresses.descriptors, SplitDescriptor.SIZE * size)
        self._available = window.u16(addresses.driver, 3 + size)
        self._used = window.u16(addresses.device, 3 + 4 * size)
        self.next_available = 0
        self.next_used = 0
        self._signalled = 0

    def pop(self) -> Chain | None:
        """The next chain of the available ring."""
        index = self._available[1]
        waiting = (index - self.next_available) & _MASK_16
        if not waiting:
            return None
        if waiting > self.size:
            raise _bad("the available index jumps", index)
        head = self._available[2 + self.next_available % self.size]
        parts = self._chain(head)
        self.next_available = (self.next_available + 1) & _MASK_16
        return Chain(head, 1, tuple(parts))

    def _chain(self, head: int) -> list[Part]:
        table = b""
        position, indirect = head, False
        parts: list[Part] = []
        limit = self.size
        for _ in range(self.size + 1):  # one more than a ring has entries: the entry of an indirect table
            if position >= limit:
                raise _bad("a descriptor beyond the table", position)
            if indirect:
                entry = SplitDescriptor.parse_at(table, position * SplitDescriptor.SIZE)
            else:
                at = self.addresses.descriptors + position * SplitDescriptor.SIZE
                entry = SplitDescriptor.parse(self.window.take(at, SplitDescriptor.SIZE))
            if entry.flags & _INDIRECT:
                if indirect or entry.flags & _NEXT:
                    raise _bad("an indirect table in the wrong place", position)
                table = self._indirect(entry.address, entry.length)
                position, indirect, limit = 0, True, len(table) // SplitDescriptor.SIZE
                continue
            parts.append(_part(self.window, parts, entry.address, entry.length, entry.flags))
            if not entry.flags & _NEXT:
                return parts
            position = entry.next
        raise _bad("a chain without end", head)

    def push(self, chain: Chain, written: int) -> None:
        """Into the used ring, then the index."""
        self.put_used(chain.identifier, written)
        self.set_used_index(self.next_used + 1)

    def put_used(self, identifier: int, length: int) -> None:
        """Write the element at the next position without publishing it."""
        at = self.addresses.device + 4 + UsedElement.SIZE * (self.next_used % self.size)
        self.window.put(at, UsedElement(identifier, length).pack())

    def set_used_index(self, index: int) -> None:
        """Publish."""
        self.next_used = index & _MASK_16
        self._used[1] = self.next_used

    def wants_interrupt(self) -> bool:
        """By used_event, or the driver's flag."""
        old, self._signalled = self._signalled, self.next_used
        with _FENCE:
            pass
        if self.event_idx:
            event = self._available[2 + self.size]
            return (self.next_used - event - 1) & _MASK_16 < (self.next_used - old) & _MASK_16
        return not self._available[0] & 1

    def enable_kicks(self) -> bool:
        """avail_event, or the flag."""
        if self.event_idx:
            self._used[2 + 4 * self.size] = self.next_available
        else:
            self._used[0] = 0
        with _FENCE:
            pass
        return self._available[1] != self.next_available

    def disable_kicks(self) -> None:
        """The flag; avail_event simply stays behind."""
        if not self.event_idx:
            self._used[0] = 1


class DevicePackedRing(DeviceRing):
    """A packed ring."""

    def __init__(self, window: Window, size: int, addresses: QueueAddresses, *, event_idx: bool) -> None:
        super().__init__(window, size, addresses, event_idx=event_idx)
        window.offset(addresses.descriptors, PackedDescriptor.SIZE * size)
        self._flags = window.u16(addresses.descriptors, 8 * size)
        self._driver = window.u16(addresses.driver, 2)
        self._device = window.u16(addresses.device, 2)
        self.next_available = 0
        self.available_wrap = True
        self.next_used = 0
        self.used_wrap = True
        self._added = 0

    def _available_at(self, position: int, wrap: bool) -> bool:
        flags = self._flags[8 * position + 7]
        return bool(flags & _AVAIL) == wrap and bool(flags & _USED) != wrap

    def _entry(self, position: int) -> PackedDescriptor:
        at = self.addresses.descriptors + position * PackedDescriptor.SIZE
        return PackedDescriptor.parse(self.window.take(at, PackedDescriptor.SIZE))

    def pop(self) -> Chain | None:
        """The chain at the expected position."""
        if not self._available_at(self.next_available, self.available_wrap):
            return None
        parts: list[Part] = []
        position, wrap = self.next_available, self.available_wrap
        for entries in range(1, self.size + 1):
            entry = self._entry(position)
            position += 1
            if position == self.size:
                position, wrap = 0, not wrap
            if entry.flags & _INDIRECT:
                for inner in PackedDescriptor.iter_parse(self._indirect(entry.address, entry.length)):
                    parts.append(_part(self.window, parts, inner.address, inner.length, inner.flags))
            else:
                parts.append(_part(self.window, parts, entry.address, entry.length, entry.flags))
            if not entry.flags & _NEXT:
                self.next_available, self.available_wrap = position, wrap
                return Chain(entry.id, entries, tuple(parts))
        raise _bad("a chain without end", self.next_available)

    def push(self, chain: Chain, written: int) -> None:
        """One used descriptor at the next position; its flags last."""
        self.put_used(chain.identifier, written, wrap=self.used_wrap)
        self.skip(chain.entries)

    def put_used(self, identifier: int, length: int, *, wrap: bool) -> None:
        """Write a used descriptor at the next position, and do not move on."""
        at = self.next_used
        descriptor = PackedDescriptor(0, length, identifier & _MASK_16, 0).pack()
        self.window.put(self.addresses.descriptors + at * PackedDescriptor.SIZE + 8, descriptor[8:14])
        self._flags[8 * at + 7] = _AVAIL | _USED if wrap else 0

    def skip(self, entries: int) -> None:
        """Move on by the length of a chain."""
        self.next_used += entries
        self._added += entries
        if self.next_used >= self.size:
            self.next_used -= self.size
            self.used_wrap = not self.used_wrap

    def wants_interrupt(self) -> bool:
        """By the driver's event structure."""
        added, self._added = self._added, 0
        with _FENCE:
            pass
        event = PackedEvent(self._driver[0], self._driver[1])
        flags = event.flags & 3
        if flags != EventFlag.DESCRIPTOR or not self.event_idx:
            return flags != EventFlag.DISABLE
        position = event.offset_wrap & (_WRAP_BIT - 1)
        if bool(event.offset_wrap & _WRAP_BIT) != self.used_wrap:
            position -= self.size
        return (self.next_used - position - 1) & _MASK_16 < added

    def enable_kicks(self) -> bool:
        """The device's event structure."""
        if self.event_idx:
            self._device[0] = self.next_available | (_WRAP_BIT if self.available_wrap else 0)
            self._device[1] = EventFlag.DESCRIPTOR
        else:
            self._device[1] = EventFlag.ENABLE
        with _FENCE:
            pass
        return self._available_at(self.next_available, self.available_wrap)

    def disable_kicks(self) -> None:
        """The device's event structure."""
        self._device[1] = EventFlag.DISABLE


def _part(window: Window, before: list[Part], address: int, length: int, flags: int) -> Part:
    device_writes = bool(flags & _WRITE)
    window.offset(address, length)
    if not length:
        raise _bad("an empty buffer")
    if before and before[-1].device_writes and not device_writes:
        raise _bad("a readable buffer behind a writable one")
    return Part(address, length, device_writes)
