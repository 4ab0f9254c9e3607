# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio disk in memory: rings as `svsm.host.devices.virtio_ring` has them, contents in a bytearray, no files.

`Disk` is what every transport has in common: it takes chains, performs them, looks at what the driver put into
shared memory, and asks its `lies` what to do with each completion. `MmioDisk` adds the registers. Each value that
they give is told to `heard`, so that rules can follow the conversation.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Final, Protocol

from svsm.formats.errors import FormatError
from svsm.formats.virtio import (
    MMIO_MAGIC,
    MMIO_VERSION,
    SECTOR_BYTES,
    BlkConfig,
    BlkFeature,
    BlkSegment,
    BlkType,
    DeviceStatus,
    Feature,
    MmioRegister,
    QueueAddresses,
)
from svsm.fuzz.target import Broken, expect
from svsm.host.devices.virtio_ring import Chain, DevicePackedRing, DeviceRing, DeviceSplitRing, Window

__all__ = ["GPA", "OFFERED", "Disk", "MmioDisk", "Offer", "Request"]

GPA: Final = 0x5000_0000_0000
"""Where the shared memory is for the device: not where it is for the driver, so that a mix-up fails."""
_WORD: Final = 0xFFFF_FFFF
_OK, _IO_ERROR, _UNSUPPORTED = 0, 1, 2
_HEADER = struct.Struct("<IIQ")
_ID: Final = b"a disk that lies\0\0\0\0"
_ZEROS: Final = bytes(8192)
_IN, _OUT, _FLUSH, _GET_ID = int(BlkType.IN), int(BlkType.OUT), int(BlkType.FLUSH), int(BlkType.GET_ID)
_RANGES: Final = {
    int(BlkType.DISCARD): int(BlkFeature.DISCARD),
    int(BlkType.WRITE_ZEROES): int(BlkFeature.WRITE_ZEROES),
}
_EVENT_IDX, _PACKED = int(Feature.EVENT_IDX), int(Feature.RING_PACKED)
_RO, _HAS_FLUSH = int(BlkFeature.RO), int(BlkFeature.FLUSH)
_NEEDS_RESET, _DRIVER_OK = int(DeviceStatus.NEEDS_RESET), int(DeviceStatus.DRIVER_OK)

OFFERED: Final = (
    int(Feature.VERSION_1 | Feature.ACCESS_PLATFORM | Feature.RING_PACKED | Feature.INDIRECT_DESC | Feature.EVENT_IDX)
    | int(BlkFeature.SIZE_MAX | BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.FLUSH | BlkFeature.MQ)
    | int(BlkFeature.DISCARD | BlkFeature.WRITE_ZEROES)
)
"""All that the driver knows, but RO."""


@dataclasses.dataclass(frozen=True, slots=True)
class Offer:
    """What the device honestly offers.

    Attributes:
        features: Feature bits.
        queue_size: Largest size of each queue.
        config: The configuration space.
    """

    features: int
    queue_size: int
    config: BlkConfig


@dataclasses.dataclass(slots=True)
class Request:
    """A chain on its way back.

    Attributes:
        chain: As the ring had it.
        kind: Its `BlkType`.
        written: What the device honestly wrote, status included.
        status_at: Device address of the status byte.
        before: What the writable parts held: address and bytes.
        full: Bytes that the chain's writable parts hold.
    """

    chain: Chain
    kind: int
    written: int
    status_at: int
    before: list[tuple[int, bytes]]
    full: int


class Lies(Protocol):
    """What a device asks before it returns something."""

    def complete(self, ring: DeviceRing, request: Request) -> None:
        """Return a request, or do something else with it."""

    def finished(self, ring: DeviceRing) -> None:
        """A batch is done."""


class Disk:
    """The part that all transports share.

    Args:
        window: Shared memory.
        content: Of the disk.
        lies: Decides about completions.
        offer: What the disk is.

    Attributes:
        config: The configuration space as it is now.
        features: As the driver chose them.
        rings: By queue; None where a queue is not in use.
        taken: Requests so far.
        flushes, discards: Requests of that kind that were performed.
        spoiled: A lie has touched what the driver had written, so rings may make no sense.
        broken: A ring made no sense; nothing is done until a reset.
    """

    def __init__(self, window: Window, content: bytearray, lies: Lies, offer: Offer) -> None:
        self.window = window
        self.content = content
        self.lies = lies
        self.offer = offer
        self.config = offer.config.pack()
        self.features = 0
        self.rings: list[DeviceRing | None] = [None, None]
        self.taken = self.flushes = self.discards = 0
        self.broken = self.spoiled = False

    def make_ring(self, index: int, size: int, addresses: QueueAddresses) -> bool:
        """Take a queue into use; returns whether it can be."""
        kind = DevicePackedRing if self.features & _PACKED else DeviceSplitRing
        try:
            self.rings[index] = kind(self.window, size, addresses, event_idx=bool(self.features & _EVENT_IDX))
        except FormatError:
            return False
        return True

    def service(self) -> None:
        """Work through all queues. The rings must make sense, unless they were scribbled over."""
        for ring in self.rings:
            if ring is None or self.broken:
                continue
            try:
                self._service(ring)
            except (FormatError, Broken):
                if not self.spoiled:
                    raise
                self.broken = True

    def _service(self, ring: DeviceRing) -> None:
        count = 0
        while True:
            ring.disable_kicks()
            while not self.broken and (chain := ring.pop()) is not None:
                self.lies.complete(ring, self._perform(chain))
                count += 1
            if not ring.enable_kicks() or self.broken:
                break
        if count:
            self.lies.finished(ring)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _perform(self, chain: Chain) -> Request:
        self.taken += 1
        take = self.window.take
        readable = b"".join([take(part.address, part.length) for part in chain.parts if not part.device_writes])
        writable = [part for part in chain.parts if part.device_writes]
        expect(bool(writable), "a request without room for a status")
        expect(len(readable) >= _HEADER.size, "a request without a header")
        before = [(part.address, take(part.address, part.length)) for part in writable]
        last = writable[-1]
        full = sum([part.length for part in writable])
        kind, _, sector = _HEADER.unpack_from(readable)
        for _, data in before[:-1]:
            expect(data == _ZEROS[: len(data)] if len(data) <= len(_ZEROS) else not any(data), "not zeroed before")
        status, answer = self._do(kind, sector, readable[_HEADER.size :], full - 1)
        for part in writable:
            piece, answer = answer[: part.length], answer[part.length :]
            if piece:
                self.window.put(part.address, piece)
        self.window.put(last.address + last.length - 1, bytes([status]))
        written = full if kind in (_IN, _GET_ID) else 1
        return Request(chain, kind, written, last.address + last.length - 1, before, full)

    def _do(self, kind: int, sector: int, data: bytes, space: int) -> tuple[int, bytes]:
        at = sector * SECTOR_BYTES
        if kind == _IN:
            expect(space > 0 and at + space <= DISK_LIMIT, "a read beyond every disk")
            return (_OK, bytes(self.content[at : at + space])) if at + space <= len(self.content) else (_IO_ERROR, b"")
        if kind == _OUT:
            expect(not self.features & _RO, "a write to a read-only disk")
            if at + len(data) > len(self.content):
                return _IO_ERROR, b""
            self.content[at : at + len(data)] = data
            return _OK, b""
        if kind == _FLUSH:
            expect(bool(self.features & _HAS_FLUSH), "a flush that was not negotiated")
            self.flushes += 1
            return _OK, b""
        if kind == _GET_ID:
            return _OK, _ID[:space]
        if kind in _RANGES:
            expect(bool(self.features & _RANGES[kind]), "a discard that was not negotiated")
            return self._give_up(data), b""
        expect(False, "a request of a kind that does not exist")
        return _UNSUPPORTED, b""

    def _give_up(self, data: bytes) -> int:
        expect(len(data) > 0 and not len(data) % BlkSegment.SIZE, "a discard of half a segment")
        for segment in BlkSegment.iter_parse(data):
            expect(segment.sectors > 0, "a discard of nothing")
            start, end = segment.sector * SECTOR_BYTES, (segment.sector + segment.sectors) * SECTOR_BYTES
            if end > len(self.content):
                return _IO_ERROR
            self.content[start:end] = bytes(end - start)
        self.discards += 1
        return _OK


DISK_LIMIT: Final = 1 << 57


class MmioDisk(Disk):
    """The registers, and the driver's `Registers`.

    Args:
        heard: Told every access: (is a write, offset, value).
        pause: Moves the clock.

    Attributes:
        register_lies: By offset: changes what is read, given how often it was read before and the honest value.
        spurious: Waiting takes no time.
        status, generation, interrupts: Registers.
    """

    def __init__(
        self,
        window: Window,
        content: bytearray,
        lies: Lies,
        offer: Offer,
        *,
        heard: Callable[[bool, int, int], None],
        pause: Callable[[float], None],
    ) -> None:
        super().__init__(window, content, lies, offer)
        self._heard = heard
        self._pause = pause
        self.register_lies: dict[int, Callable[[int, int], int]] = {}
        self._reads: dict[int, int] = {}
        self.spurious = False
        self.status = self.generation = self.interrupts = 0
        self._values: dict[int, int] = {}
        self._sizes = [0, 0]
        self._ready = [0, 0]
        self._addresses: list[dict[int, int]] = [{}, {}]

    def read32(self, offset: int) -> int:
        """A trapped load."""
        value = self._honest(offset)
        lie = self.register_lies.get(offset)
        if lie is not None:
            count = self._reads.get(offset, 0)
            self._reads[offset] = count + 1
            value = lie(count, value)
        self._heard(False, offset, value)
        return value

    def _honest(self, offset: int) -> int:
        if offset >= _CONFIG:
            return int.from_bytes(self.config[offset - _CONFIG : offset - _CONFIG + 4], "little")
        if offset in _FIXED:
            return _FIXED[offset]
        if offset == _STATUS:
            return self.status | (_NEEDS_RESET if self.broken else 0)
        if offset == _INTERRUPT_STATUS:
            return self.interrupts
        if offset == _GENERATION:
            return self.generation
        if offset == _FEATURES:
            select = self._values.get(_FEATURES_SELECT, 0)
            return self.offer.features >> 32 * select & _WORD if select < 2 else 0
        queue = self._values.get(_QUEUE_SELECT, 0)
        if queue < self.queues and offset == _QUEUE_SIZE_MAX:
            return self.offer.queue_size
        return self._ready[queue] if queue < self.queues and offset == _QUEUE_READY else 0

    @property
    def queues(self) -> int:
        """How many there are."""
        return max(1, min(2, self.offer.config.num_queues))

    def write32(self, offset: int, value: int) -> None:
        """A trapped store."""
        self._heard(True, offset, value)
        if offset == _NOTIFY:
            if self.status & _DRIVER_OK and not self.status & _NEEDS_RESET:
                self.service()
        elif offset == _STATUS:
            if not value:
                self.rings, self._ready, self.interrupts, self.features = [None, None], [0, 0], 0, 0
                self.broken = self.spoiled = False
            self.status = value
        elif offset == _ACK:
            self.interrupts &= ~value
        elif offset == _DRIVER_FEATURES:
            select = self._values.get(_DRIVER_FEATURES_SELECT, 0)
            self.features |= value << 32 * select
        elif offset == _QUEUE_READY:
            self._set_ready(self._values.get(_QUEUE_SELECT, 0))
        else:
            self._values[offset] = value
            if _QUEUE_DESCRIPTORS <= offset < _QUEUE_END:
                self._addresses[self._values.get(_QUEUE_SELECT, 0) & 1][offset] = value

    def _set_ready(self, queue: int) -> None:
        size = self._values.get(_QUEUE_SIZE, 0)
        where = self._addresses[queue & 1]
        low, driver, device = (where[at] | where[at + 4] << 32 for at in _ADDRESSES)
        if queue < self.queues and 0 < size <= self.offer.queue_size:
            self._ready[queue] = int(self.make_ring(queue, size, QueueAddresses(low, driver, device)))

    def notice(self) -> None:
        """The configuration has changed."""
        self.generation += 1
        self.interrupts |= 2

    def wait_interrupt(self, seconds: float) -> bool:
        """All the time passes, or none."""
        if not self.spurious:
            self._pause(seconds)
        return self.spurious

    def close(self) -> None:
        """Nothing."""


_CONFIG, _STATUS, _GENERATION = int(MmioRegister.CONFIG), int(MmioRegister.STATUS), int(MmioRegister.CONFIG_GENERATION)
_INTERRUPT_STATUS, _ACK = int(MmioRegister.INTERRUPT_STATUS), int(MmioRegister.INTERRUPT_ACK)
_FEATURES, _FEATURES_SELECT = int(MmioRegister.DEVICE_FEATURES), int(MmioRegister.DEVICE_FEATURES_SELECT)
_DRIVER_FEATURES = int(MmioRegister.DRIVER_FEATURES)
_DRIVER_FEATURES_SELECT = int(MmioRegister.DRIVER_FEATURES_SELECT)
_NOTIFY, _QUEUE_SELECT = int(MmioRegister.QUEUE_NOTIFY), int(MmioRegister.QUEUE_SELECT)
_QUEUE_SIZE, _QUEUE_SIZE_MAX = int(MmioRegister.QUEUE_SIZE), int(MmioRegister.QUEUE_SIZE_MAX)
_QUEUE_READY = int(MmioRegister.QUEUE_READY)
_QUEUE_DESCRIPTORS, _QUEUE_END = int(MmioRegister.QUEUE_DESCRIPTORS_LOW), int(MmioRegister.QUEUE_DEVICE_HIGH) + 4
_ADDRESSES = (_QUEUE_DESCRIPTORS, int(MmioRegister.QUEUE_DRIVER_LOW), int(MmioRegister.QUEUE_DEVICE_LOW))
_FIXED: Final = {
    int(MmioRegister.MAGIC): MMIO_MAGIC,
    int(MmioRegister.VERSION): MMIO_VERSION,
    int(MmioRegister.DEVICE_ID): 2,
}
