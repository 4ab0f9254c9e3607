# SPDX-License-Identifier: MIT OR Apache-2.0
"""The packed ring (VIRTIO 1.2 §2.8), driver side.

Descriptors are written where the ring stands, so a slot keeps its chain in private memory and is copied into the
ring when it is published, its first descriptor last, each with one store of (length, id, flags) after the address.
The buffer id is the slot's number. The driver looks for completions at one expected position only, takes
(length, id, flags) with one load, and moves on by the length of *its own* record of that slot's chain. Other fields
of the ring are never read; the device's event suppression is.
"""

from __future__ import annotations

from collections.abc import Sequence

from svsm.formats.virtio import DescriptorFlag, EventFlag, PackedDescriptor, PackedLayout, QueueAddresses
from svsm.storage.drivers.dma import HAS_FENCE, DmaMemory, fence
from svsm.storage.drivers.virtio.queue import QueueShape, Segment, VirtQueue

__all__ = ["PackedQueue"]

_AVAIL = int(DescriptorFlag.AVAIL) << 48
_USED = int(DescriptorFlag.USED) << 48
_NEXT = int(DescriptorFlag.NEXT) << 48
_WRITE = int(DescriptorFlag.WRITE) << 48
_INDIRECT = int(DescriptorFlag.INDIRECT) << 48
_WRAP_BIT = 1 << 15
_MASK_16 = 0xFFFF


class PackedQueue(VirtQueue):
    """A packed ring in shared memory.

    Args:
        memory: Where the ring and the indirect tables go.
        shape: Any `size` up to 32768.

    Raises:
        StateError: ``virtio-shape``, ``dma-memory``.
    """

    def __init__(self, memory: DmaMemory, shape: QueueShape) -> None:
        super().__init__(memory, shape)
        layout = PackedLayout(shape.size)
        base = memory.allocate(layout.total_bytes)
        self.addresses = QueueAddresses(
            descriptors=memory.device_address(base),
            driver=memory.device_address(base + layout.driver_event),
            device=memory.device_address(base + layout.device_event),
        )
        self._ring = base // 8
        self._driver_event = (base + layout.driver_event) // 2
        self._device_event = (base + layout.device_event) // 4
        self._next = 0
        self._next_wrap = True
        self._seen = 0
        self._seen_mark = _AVAIL | _USED  # what a used descriptor's two bits look like in this round
        self._table_size = shape.chain * PackedDescriptor.SIZE
        self._tables = (
            [memory.allocate(self._table_size) for _ in range(shape.slots)] if shape.indirect else [0] * shape.slots
        )
        self._addresses: list[list[int]] = [[0] * shape.chain for _ in range(shape.slots)]
        self._tails: list[list[int]] = [[0] * shape.chain for _ in range(shape.slots)]
        self._entries = [1] * shape.slots
        self.disarm()

    # ---- chains -----------------------------------------------------------------------------------------------------

    def _store_chain(self, slot: int, segments: Sequence[Segment]) -> None:
        addresses = [segment.address for segment in segments]
        if not self.shape.indirect:
            self._addresses[slot] = addresses
            self._tails[slot] = [0] * len(segments)
            self._entries[slot] = len(segments)
        else:
            table = self._tables[slot]
            for position, address in enumerate(addresses):
                self._memory.u64[table // 8 + 2 * position] = address
            self._addresses[slot] = [self._memory.device_address(table)]
            self._tails[slot] = [len(segments) * PackedDescriptor.SIZE | slot << 32 | _INDIRECT]
        for position in range(len(segments)):
            self._store_tail(slot, position)

    def _store_tail(self, slot: int, position: int) -> None:
        tail = self._lengths[slot][position] | slot << 32
        if self._writes[slot][position]:
            tail |= _WRITE
        if self.shape.indirect:
            # In a table, order is position: NEXT and the id are reserved (§2.8.7).
            self._memory.u64[self._tables[slot] // 8 + 2 * position + 1] = tail & ~(_MASK_16 << 32)
        else:
            self._tails[slot][position] = tail | (_NEXT if position + 1 < self._used_chain[slot] else 0)

    # ---- publish ----------------------------------------------------------------------------------------------------

    def publish(self, slots: Sequence[int]) -> bool:
        """Hand prepared slots to the device."""
        self._check_alive()
        self._check_idle()
        u64, ring, size, count, flying = self._memory.u64, self._ring, self.shape.size, self.shape.slots, self._flying
        added = 0
        for slot in slots:
            if not 0 <= slot < count or flying[slot]:
                self._refuse_slot(slot)
            flying[slot] = 1
            self.in_flight += 1
            addresses, tails = self._addresses[slot], self._tails[slot]
            first, first_mark = self._next, _AVAIL if self._next_wrap else _USED
            position, mark = first, first_mark
            for index in range(len(tails)):
                if index:
                    at = ring + 2 * position
                    u64[at] = addresses[index]
                    u64[at + 1] = tails[index] | mark
                position += 1
                if position == size:
                    position, mark = 0, mark ^ (_AVAIL | _USED)
            u64[ring + 2 * first] = addresses[0]
            u64[ring + 2 * first + 1] = tails[0] | first_mark  # this store gives the chain away
            self._next, self._next_wrap = position, mark == _AVAIL
            added += len(tails)
        return self._wants_notification(added)

    def _wants_notification(self, added: int) -> bool:
        if not HAS_FENCE:
            return True
        fence()
        event = self._memory.u32[self._device_event]
        flags = event >> 16 & 3
        if flags == EventFlag.DISABLE:
            return False
        if flags != EventFlag.DESCRIPTOR or not self.shape.event_idx:
            return True
        position = event & (_WRAP_BIT - 1)
        if bool(event & _WRAP_BIT) != self._next_wrap:
            position -= self.shape.size
        new = self._next
        return (new - position - 1) & _MASK_16 < added

    # ---- collect ----------------------------------------------------------------------------------------------------

    def collect(self) -> list[int]:
        """The slots that the device has finished with."""
        self._check_alive()
        u64, ring, size, slots, entries = self._memory.u64, self._ring, self.shape.size, self.shape.slots, self._entries
        flying, writable, written = self._flying, self._writable, self.written
        done: list[int] = []
        seen = self._seen
        while True:  # every turn takes a slot back or leaves: at most `in_flight` turns
            tail = u64[ring + 2 * seen + 1]  # the only read
            if tail & (_AVAIL | _USED) != self._seen_mark:
                break
            identifier = tail >> 32 & _MASK_16
            slot, length = identifier if identifier < slots else -1, tail & 0xFFFF_FFFF
            if slot < 0 or not flying[slot] or length > writable[slot]:
                self._judge(slot, identifier, length)
            flying[slot] = 0
            written[slot] = length
            self.in_flight -= 1
            done.append(slot)
            seen += entries[slot]
            if seen >= size:
                seen -= size
                self._seen_mark ^= _AVAIL | _USED
            self._seen = seen
        return done

    def pending(self) -> bool:
        """Whether the descriptor at the expected position is used."""
        return self._memory.u64[self._ring + 2 * self._seen + 1] & (_AVAIL | _USED) == self._seen_mark

    def arm(self) -> bool:
        """Ask for an interrupt at the next completion."""
        if self.shape.event_idx:
            wrap = _WRAP_BIT if self._seen_mark else 0
            self._memory.u16[self._driver_event] = self._seen | wrap
            self._memory.u16[self._driver_event + 1] = EventFlag.DESCRIPTOR
        else:
            self._memory.u16[self._driver_event + 1] = EventFlag.ENABLE
        fence()
        return self.pending()

    def disarm(self) -> None:
        """Ask for no interrupts."""
        self._memory.u16[self._driver_event + 1] = EventFlag.DISABLE
