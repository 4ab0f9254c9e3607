# SPDX-License-Identifier: MIT OR Apache-2.0
"""Between a real device and the driver: registers pass through here, and so does every look at a ring.

The device (QEMU's) is honest and somebody else's; this changes what it has written, in the shared memory, at the one
moment that matters: after the device's store and before the driver's load. From the registers that the driver writes
it knows where the rings are, as a device would; of the driver it uses nothing but that it reads its `DmaMemory` by
items. A completion that appears is shown to `on_used` first, which may change it; `hiding` keeps it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from svsm.formats.virtio import DescriptorFlag, Feature, MmioRegister
from svsm.host.devices.virtio_mmio import QueueState
from svsm.storage.drivers.dma import DmaMemory
from svsm.testing.hostile.lies import RegisterLies

__all__ = ["InterposedMemory", "Interposer"]

_MARKS: Final = int(DescriptorFlag.AVAIL | DescriptorFlag.USED)
_PARTS: Final = {
    MmioRegister.QUEUE_DESCRIPTORS_LOW: (0, 0),
    MmioRegister.QUEUE_DESCRIPTORS_HIGH: (0, 32),
    MmioRegister.QUEUE_DEVICE_LOW: (2, 0),
    MmioRegister.QUEUE_DEVICE_HIGH: (2, 32),
}


class _Registers(Protocol):
    def read32(self, offset: int) -> int: ...
    def write32(self, offset: int, value: int) -> None: ...
    def wait_interrupt(self, seconds: float) -> bool: ...
    def close(self) -> None: ...


class Interposer(RegisterLies):
    """Registers that lie, and completions that are changed.

    Args:
        registers: The device's.

    Attributes:
        on_used: (this, ring position, how many there were before): may change the completion.
        on_batch: Split: (this, the positions that appeared at once): may change their completions.
        on_status: The next status byte that the driver looks at becomes what this returns for the one that is there.
        hiding: Completions do not appear.
        flags_of: Packed: what the flags of a completion become.
        spurious: Wake-ups without a reason.
        count: Completions so far.
        resets: How often the driver has reset the device.
    """

    def __init__(self, registers: _Registers) -> None:
        self._registers = registers
        self._feature_select = [0, 0]
        self._features = 0
        self._queue = QueueState()
        self._memory: DmaMemory | None = None
        self.reads = {}
        self.resets = 0
        self.be_honest()

    def be_honest(self) -> None:
        """Forget everything."""
        self.forget_lies()
        self.on_used: Callable[[Interposer, int, int], None] | None = None
        self.on_batch: Callable[[Interposer, list[int]], None] | None = None
        self.on_status: Callable[[int], int] | None = None
        self.hiding = False
        self.spurious = False
        self._forget_ring()

    def _forget_ring(self) -> None:
        self.count = 0
        self._seen = 0
        self._wrap = True
        self._position = 0
        self._forced = 0
        self._handled: tuple[int, bool] | None = None

    # ---- registers --------------------------------------------------------------------------------------------------

    def read32(self, offset: int) -> int:
        """The device's register, or the lie."""
        return self.lied(offset, self._registers.read32(offset))

    def write32(self, offset: int, value: int) -> None:
        """Pass it on, and remember what says where the ring is."""
        if offset == MmioRegister.QUEUE_NOTIFY and self.deaf:
            return
        if offset == MmioRegister.STATUS and not value:
            if self.stuck:
                return
            self.resets += 1
            self._features = 0
            self._forget_ring()
        elif offset in (MmioRegister.DEVICE_FEATURES_SELECT, MmioRegister.DRIVER_FEATURES_SELECT):
            self._feature_select[offset == MmioRegister.DRIVER_FEATURES_SELECT] = value
        elif offset == MmioRegister.DRIVER_FEATURES:
            self._features |= value << 32 * self._feature_select[1]
        elif offset == MmioRegister.QUEUE_SIZE:
            self._queue.size = value
        elif offset in _PARTS:
            part, shift = _PARTS[MmioRegister(offset)]
            kept = self._queue.addresses[part] & ~(0xFFFF_FFFF << shift)
            self._queue.addresses[part] = kept | value << shift
        self._registers.write32(offset, value)

    def wait_interrupt(self, seconds: float) -> bool:
        """The device's line."""
        return self.spurious or self._registers.wait_interrupt(seconds)

    def close(self) -> None:
        """The device's."""
        self._registers.close()

    # ---- memory -----------------------------------------------------------------------------------------------------

    @property
    def packed(self) -> bool:
        """Whether the ring is packed."""
        return bool(self._features & Feature.RING_PACKED)

    def watch(self, memory: memoryview, *, address: int) -> DmaMemory:
        """The memory as the driver is to see it."""
        self._memory = DmaMemory(memory, address=address)
        return InterposedMemory(memory, address=address, interposer=self)

    def _at(self, address: int) -> int:
        return address - self._whole().address

    def _whole(self) -> DmaMemory:
        if self._memory is None:
            raise RuntimeError("there is no memory yet")
        return self._memory

    def load(self, view: memoryview, item: int, address: int, width: int) -> int:
        """What the driver gets for an item: never something that has not been looked at here."""
        descriptors, _, used = self._queue.addresses
        if self.packed:
            inside = address - descriptors
            if width == 8 and 0 <= inside < 16 * self._queue.size and inside % 16 == 8:
                return self._load_tail(inside // 16)
        elif width == 2 and address == used + 2:
            return self._load_index()
        if width == 1 and self.on_status is not None:
            view[item] = self.on_status(view[item])
        return int(view[item])

    def _load_index(self) -> int:
        index = self.index  # what QEMU adds from here on is for the next look
        fresh = (index - self._seen) & 0xFFFF
        if self.hiding:
            return self._seen
        if fresh > self._queue.size:
            return index
        positions = [(self._seen + step) % self._queue.size for step in range(fresh)]
        if positions and self.on_batch is not None:
            self.on_batch(self, positions)
        self._forced = index
        for position in positions:
            self._show(position)
        self._seen = index
        return self._forced

    def _load_tail(self, position: int) -> int:
        if position < self._position:
            self._wrap = not self._wrap
        self._position = position
        tail = self._whole().u64[self._word(position)]
        if tail >> 48 & _MARKS != (_MARKS if self._wrap else 0) or self._handled == (position, self._wrap):
            return tail
        if self.hiding:
            available = DescriptorFlag.AVAIL if self._wrap else DescriptorFlag.USED
            return tail & ~(_MARKS << 48) | int(available) << 48
        self._handled = (position, self._wrap)
        self._show(position)
        return self._whole().u64[self._word(position)]

    def _show(self, position: int) -> None:
        self.count += 1
        if self.on_used is not None:
            self.on_used(self, position, self.count - 1)

    # ---- what cases change ------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Entries of the ring."""
        return self._queue.size

    @property
    def index(self) -> int:
        """Split: the used index."""
        return self._whole().u16[self._at(self._queue.addresses[2] + 2) // 2]

    def set_index(self, value: int) -> None:
        """Split: another used index."""
        self._forced = value & 0xFFFF
        self._whole().u16[self._at(self._queue.addresses[2] + 2) // 2] = value & 0xFFFF

    def _word(self, position: int) -> int:
        if self.packed:
            return self._at(self._queue.addresses[0] + 16 * position + 8) // 8
        return self._at(self._queue.addresses[2] + 4 + 8 * position) // 4

    def element(self, position: int) -> tuple[int, int]:
        """Identifier and length of a completion."""
        at = self._word(position)
        if self.packed:
            tail = self._whole().u64[at]
            return tail >> 32 & 0xFFFF, tail & 0xFFFF_FFFF
        return self._whole().u32[at], self._whole().u32[at + 1]

    def set_element(self, position: int, identifier: int, length: int) -> None:
        """Another identifier (packed: its lower 16 bits) and length."""
        at = self._word(position)
        if self.packed:
            kept = self._whole().u64[at] & 0xFFFF << 48
            self._whole().u64[at] = kept | (identifier & 0xFFFF) << 32 | length
        else:
            self._whole().u32[at] = identifier
            self._whole().u32[at + 1] = length

    def flags(self, position: int) -> int:
        """Packed: the flags of a descriptor."""
        return self._whole().u64[self._word(position)] >> 48

    def set_flags(self, position: int, flags: int) -> None:
        """Packed: other flags."""
        at = self._word(position)
        self._whole().u64[at] = self._whole().u64[at] & (1 << 48) - 1 | flags << 48

    def set_events(self, first: int, second: int) -> None:
        """What the device says about kicks: split, flags and avail_event; packed, its event structure."""
        used, words = self._queue.addresses[2], self._whole().u16
        words[self._at(used) // 2] = first
        words[self._at(used + (2 if self.packed else 4 + 8 * self.size)) // 2] = second


class _View:
    """Items of shared memory that somebody else looks at first."""

    def __init__(self, view: memoryview, address: int, interposer: Interposer) -> None:
        self._view = view
        self._address = address
        self._interposer = interposer
        self._width = view.itemsize
        self.nbytes = view.nbytes

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return self._interposer.load(self._view, key, self._address + key * self._width, self._width)
        return self._view[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._view[key] = value


class InterposedMemory(DmaMemory):
    """`DmaMemory` whose items pass through an `Interposer`."""

    def __init__(self, memory: memoryview, *, address: int, interposer: Interposer) -> None:
        super().__init__(memory, address=address)
        self._whole = self.bytes
        self._interposer = interposer
        self.bytes: Any = _View(self.bytes, address, interposer)
        self.u16: Any = _View(self.u16, address, interposer)
        self.u64: Any = _View(self.u64, address, interposer)

    def part(self, offset: int, length: int) -> DmaMemory:
        """As the base's, over the plain bytes."""
        return InterposedMemory(
            self._whole[offset : offset + length], address=self.address + offset, interposer=self._interposer
        )
