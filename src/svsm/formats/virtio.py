# SPDX-License-Identifier: MIT OR Apache-2.0
"""VIRTIO 1.2 as bytes: rings, request headers, the block device's configuration, the mmio registers, feature bits.

Everything is little-endian (a modern device is). Ring entries that a driver or device touches in its inner loop are
described twice: as a record, which is the definition, and as the positions of its two 64-bit halves, because a
descriptor, a used element and a block header are each one or two naturally aligned words that a single store
publishes and a single load takes. `tests/unit/formats/test_virtio.py` holds both to the same bytes.

Reserved fields are kept as they are; who must care says so.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, Final

from svsm.formats.record import U8, U16, U32, U64, Bytes, Record, record

__all__ = [
    "MMIO_MAGIC",
    "MMIO_VERSION",
    "MMIO_WINDOW_BYTES",
    "QUEUE_SIZE_LIMIT",
    "SECTOR_BYTES",
    "BlkConfig",
    "BlkFeature",
    "BlkHeader",
    "BlkSegment",
    "BlkStatus",
    "BlkType",
    "DescriptorFlag",
    "DeviceStatus",
    "DeviceType",
    "EventFlag",
    "Feature",
    "Interrupt",
    "MmioRegister",
    "PackedDescriptor",
    "PackedEvent",
    "PackedLayout",
    "QueueAddresses",
    "RegisterMessage",
    "RegisterOperation",
    "SplitDescriptor",
    "SplitLayout",
    "UsedElement",
]

QUEUE_SIZE_LIMIT: Final = 32768
"""VIRTIO 1.2 §2.7, §2.8: no queue is larger."""
SECTOR_BYTES: Final = 512
"""VIRTIO 1.2 §5.2: capacity and sector numbers count these, whatever blk_size says."""


class DeviceType(enum.IntEnum):
    """Device ids (VIRTIO 1.2 §5) that svsm knows; 0 is an empty slot."""

    NONE = 0
    BLOCK = 2
    CONSOLE = 3
    VSOCK = 19


class DeviceStatus(enum.IntFlag):
    """VIRTIO 1.2 §2.1."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Feature(enum.IntFlag):
    """Feature bits that do not belong to a device type (VIRTIO 1.2 §6)."""

    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class BlkFeature(enum.IntFlag):
    """Feature bits of the block device (VIRTIO 1.2 §5.2.3)."""

    SIZE_MAX = 1 << 1
    SEG_MAX = 1 << 2
    GEOMETRY = 1 << 4
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    TOPOLOGY = 1 << 10
    CONFIG_WCE = 1 << 11
    MQ = 1 << 12
    DISCARD = 1 << 13
    WRITE_ZEROES = 1 << 14
    SECURE_ERASE = 1 << 16


class DescriptorFlag(enum.IntFlag):
    """Split (§2.7.5) and packed (§2.8.3) descriptors; AVAIL and USED are the packed ring's."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4
    AVAIL = 1 << 7
    USED = 1 << 15


class EventFlag(enum.IntEnum):
    """Packed event suppression (§2.8.10): the low two bits of `PackedEvent.flags`."""

    ENABLE = 0
    DISABLE = 1
    DESCRIPTOR = 2


class BlkType(enum.IntEnum):
    """Request types (§5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class BlkStatus(enum.IntEnum):
    """The byte that ends a request (§5.2.6)."""

    OK = 0
    IO_ERROR = 1
    UNSUPPORTED = 2


class Interrupt(enum.IntFlag):
    """InterruptStatus of virtio-mmio (§4.2.2)."""

    USED_BUFFER = 1
    CONFIGURATION = 2


class MmioRegister(enum.IntEnum):
    """Register offsets of a modern virtio-mmio device (§4.2.2), bytes."""

    MAGIC = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SELECT = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SELECT = 0x024
    QUEUE_SELECT = 0x030
    QUEUE_SIZE_MAX = 0x034
    QUEUE_SIZE = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESCRIPTORS_LOW = 0x080
    QUEUE_DESCRIPTORS_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    CONFIG_GENERATION = 0x0FC
    CONFIG = 0x100


MMIO_MAGIC: Final = int.from_bytes(b"virt", "little")
MMIO_VERSION: Final = 2
MMIO_WINDOW_BYTES: Final = 0x200


@dataclasses.dataclass(frozen=True, slots=True)
class QueueAddresses:
    """Where the three parts of a queue are, as the device addresses memory."""

    descriptors: int
    driver: int
    """Split: the available ring; packed: the driver's event suppression."""
    device: int
    """Split: the used ring; packed: the device's event suppression."""


@record(size=16, byte_order="little")
class SplitDescriptor(Record):
    """One entry of a split ring's descriptor table or of an indirect table (§2.7.5)."""

    address: U64
    length: U32  # bytes
    flags: U16  # DescriptorFlag
    next: U16

    @property
    def tail(self) -> int:
        """The second 64-bit word."""
        return self.length | self.flags << 32 | self.next << 48


@record(size=8, byte_order="little")
class UsedElement(Record):
    """One entry of a used ring (§2.7.8)."""

    id: U32  # head of the chain; 16 bits matter, 32 are there
    length: U32  # bytes that the device wrote


@record(size=16, byte_order="little")
class PackedDescriptor(Record):
    """One entry of a packed ring (§2.8.13)."""

    address: U64
    length: U32  # bytes
    id: U16  # buffer id
    flags: U16  # DescriptorFlag

    @property
    def tail(self) -> int:
        """The second 64-bit word."""
        return self.length | self.id << 32 | self.flags << 48


@record(size=4, byte_order="little")
class PackedEvent(Record):
    """Event suppression of one side of a packed ring (§2.8.14)."""

    offset_wrap: U16  # ring position, and the wrap counter in bit 15
    flags: U16  # EventFlag in bits 0-1


@record(size=16, byte_order="little")
class BlkHeader(Record):
    """What starts every block request (§5.2.6)."""

    type: U32  # BlkType
    reserved_4: U32
    sector: U64  # of 512 bytes


@record(size=16, byte_order="little")
class BlkSegment(Record):
    """One range of a discard or write-zeroes request (§5.2.6)."""

    sector: U64  # of 512 bytes
    sectors: U32
    flags: U32  # bit 0: unmap


@record(size=72, byte_order="little")
class BlkConfig(Record):
    """The block device's configuration space (§5.2.4). What a feature bit does not cover means nothing."""

    capacity: U64 = 0  # sectors of 512 bytes
    size_max: U32 = 0  # bytes of one segment
    seg_max: U32 = 0  # data segments of one request
    cylinders: U16 = 0
    heads: U8 = 0
    sectors: U8 = 0
    blk_size: U32 = 0  # bytes
    physical_block_exp: U8 = 0
    alignment_offset: U8 = 0
    min_io_size: U16 = 0
    opt_io_size: U32 = 0
    writeback: U8 = 0
    reserved_21: U8 = 0
    num_queues: U16 = 0
    max_discard_sectors: U32 = 0
    max_discard_seg: U32 = 0
    discard_sector_alignment: U32 = 0  # sectors of 512 bytes
    max_write_zeroes_sectors: U32 = 0
    max_write_zeroes_seg: U32 = 0
    write_zeroes_may_unmap: U8 = 0
    reserved_39: Annotated[bytes, Bytes(3)] = bytes(3)
    max_secure_erase_sectors: U32 = 0
    max_secure_erase_seg: U32 = 0
    secure_erase_sector_alignment: U32 = 0


class RegisterOperation(enum.IntEnum):
    """What a `RegisterMessage` does."""

    READ = 1
    """To the device: answered with the same message, `value` filled in."""
    WRITE = 2
    """To the device: not answered; messages stay in order."""
    INTERRUPT = 3
    """From the device, at any time."""
    READ_PORT = 4
    """As READ; `offset` is an I/O port, and a byte is read."""
    WRITE_PORT = 5
    """As WRITE; `offset` is an I/O port, and a byte is written."""


@record(size=16, byte_order="little")
class RegisterMessage(Record):
    """One access to a register window that lives in another process, as a datagram (ours, no part of VIRTIO)."""

    operation: U32  # RegisterOperation
    sequence: U32  # of the READ that this answers
    offset: U32  # bytes into the window, or an I/O port
    value: U32


def _up(value: int, align: int) -> int:
    return (value + align - 1) // align * align


@dataclasses.dataclass(frozen=True, slots=True)
class SplitLayout:
    """Offsets of a split ring's parts from its start, which is 16-aligned (§2.7). Bytes."""

    size: int
    """Entries; a power of two."""

    @property
    def available(self) -> int:
        """flags u16, idx u16, ring u16[size], used_event u16."""
        return SplitDescriptor.SIZE * self.size

    @property
    def available_ring(self) -> int:
        """First entry of the available ring."""
        return self.available + 4

    @property
    def used_event(self) -> int:
        """Behind the available ring: written by the driver."""
        return self.available_ring + 2 * self.size

    @property
    def used(self) -> int:
        """flags u16, idx u16, ring of 8-byte elements, avail_event u16. Placed so that elements are 8-aligned."""
        return _up(self.used_event + 2, 64) + 4

    @property
    def used_ring(self) -> int:
        """First element of the used ring."""
        return self.used + 4

    @property
    def available_event(self) -> int:
        """Behind the used ring: written by the device."""
        return self.used_ring + UsedElement.SIZE * self.size

    @property
    def total_bytes(self) -> int:
        """Of the whole ring."""
        return _up(self.available_event + 2, 64)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedLayout:
    """Offsets of a packed ring's parts from its start, which is 16-aligned (§2.8). Bytes."""

    size: int
    """Entries; any number up to 32768."""

    @property
    def driver_event(self) -> int:
        """`PackedEvent` written by the driver."""
        return _up(PackedDescriptor.SIZE * self.size, 64)

    @property
    def device_event(self) -> int:
        """`PackedEvent` written by the device."""
        return self.driver_event + 64

    @property
    def total_bytes(self) -> int:
        """Of the whole ring."""
        return self.device_event + 64
