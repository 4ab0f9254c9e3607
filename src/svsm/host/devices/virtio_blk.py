# SPDX-License-Identifier: MIT OR Apache-2.0
"""A virtio disk of our own: a file served as a block device, with every feature that our driver knows.

`BlkOptions` is what the device offers, so that a test can have one without flush, with another block size, with
eight queues. `BlkBackend` performs one request: header, data, status (VIRTIO 1.2 §5.2.6). The register front is in
`virtio_mmio`. The device is part of the untrusted host; it is honest, and its other face is `svsm.testing.hostile`.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Final

from svsm.formats.errors import FormatError
from svsm.formats.virtio import (
    SECTOR_BYTES,
    BlkConfig,
    BlkFeature,
    BlkHeader,
    BlkSegment,
    BlkStatus,
    BlkType,
    DeviceType,
    Feature,
)
from svsm.host.devices.virtio_ring import Chain, Part, Window

__all__ = ["ALL_FEATURES", "BlkBackend", "BlkOptions"]

ALL_FEATURES: Final = int(
    Feature.VERSION_1 | Feature.ACCESS_PLATFORM | Feature.RING_PACKED | Feature.INDIRECT_DESC | Feature.EVENT_IDX
) | int(
    BlkFeature.SIZE_MAX
    | BlkFeature.SEG_MAX
    | BlkFeature.BLK_SIZE
    | BlkFeature.FLUSH
    | BlkFeature.TOPOLOGY
    | BlkFeature.MQ
    | BlkFeature.DISCARD
    | BlkFeature.WRITE_ZEROES
)

_ID_BYTES = 20
_ZERO_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class BlkOptions:
    """What the device offers.

    Attributes:
        features: Feature bits; RO also refuses writes.
        queue_size: Largest size of each queue.
        queues: How many.
        block_bytes: Logical block size.
        size_max, seg_max: Limits of the configuration space.
        discard_sectors, discard_segments, discard_alignment: Of one discard request.
        zeroes_sectors, zeroes_segments: Of one write-zeroes request.
        serial: Up to 20 bytes, for GET_ID.
    """

    features: int = ALL_FEATURES
    queue_size: int = 256
    queues: int = 1
    block_bytes: int = 512
    size_max: int = 0
    seg_max: int = 126
    discard_sectors: int = 32768
    discard_segments: int = 1
    discard_alignment: int = 1
    zeroes_sectors: int = 32768
    zeroes_segments: int = 1
    serial: bytes = b"svsm-disk"


class BlkBackend:
    """The file behind the device.

    Args:
        descriptor: Open file, for writing unless RO is offered; stays the caller's.
        options: What is offered.
    """

    device_type = DeviceType.BLOCK

    def __init__(self, descriptor: int, options: BlkOptions) -> None:
        self._descriptor = descriptor
        self.options = options
        self.measure()
        self.features = 0
        self.flushes = 0

    def measure(self) -> None:
        """Take the capacity from the file or block device."""
        self.capacity = os.lseek(self._descriptor, 0, os.SEEK_END) // SECTOR_BYTES

    def configuration(self) -> bytes:
        """The configuration space."""
        options = self.options
        return BlkConfig(
            capacity=self.capacity,
            size_max=options.size_max,
            seg_max=options.seg_max,
            blk_size=options.block_bytes,
            num_queues=options.queues,
            max_discard_sectors=options.discard_sectors,
            max_discard_seg=options.discard_segments,
            discard_sector_alignment=options.discard_alignment,
            max_write_zeroes_sectors=options.zeroes_sectors,
            max_write_zeroes_seg=options.zeroes_segments,
            write_zeroes_may_unmap=1,
        ).pack()

    def load(self, offset: int, length: int) -> bytes:
        """Bytes of the disk."""
        return os.pread(self._descriptor, length, offset)

    def store(self, offset: int, data: bytes) -> None:
        """Write all of it."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def sync(self) -> None:
        """Make everything durable that was stored."""
        os.fdatasync(self._descriptor)

    def resize(self, sectors: int) -> None:
        """Another capacity; the file follows."""
        os.ftruncate(self._descriptor, sectors * SECTOR_BYTES)
        self.capacity = sectors

    def handle(self, window: Window, chain: Chain) -> int:
        """Perform one request and write its status.

        Returns:
            How many bytes of the chain were written, for the used ring.

        Raises:
            FormatError: ``virtio-device-ring`` for a chain that is no block request.
        """
        readable = [part for part in chain.parts if not part.device_writes]
        writable = [part for part in chain.parts if part.device_writes]
        if not readable or not writable:
            raise FormatError("a block request has a header and a status", code="virtio-device-ring", got=len(readable))
        raw = b"".join(window.take(part.address, part.length) for part in readable)
        if len(raw) < BlkHeader.SIZE:
            raise FormatError("a block request's header is short", code="virtio-device-ring", got=len(raw))
        header = BlkHeader.parse(raw[: BlkHeader.SIZE])
        last = writable[-1]
        status_at = last.address + last.length - 1
        space = sum(part.length for part in writable) - 1
        try:
            status, answer = self._perform(header, raw[BlkHeader.SIZE :], space)
        except OSError:
            status, answer = BlkStatus.IO_ERROR, b""
        _scatter(window, writable, answer[:space])
        window.put(status_at, bytes([status]))
        # A failed read counts as written too, as QEMU's devices do.
        return (space if header.type in (BlkType.IN, BlkType.GET_ID) else 0) + 1

    def _perform(self, header: BlkHeader, data: bytes, space: int) -> tuple[BlkStatus, bytes]:
        kind = header.type
        if kind == BlkType.IN:
            if not self._inside(header.sector, space):
                return BlkStatus.IO_ERROR, b""
            return BlkStatus.OK, self.load(header.sector * SECTOR_BYTES, space)
        if kind == BlkType.GET_ID:
            return BlkStatus.OK, self.options.serial[:_ID_BYTES].ljust(min(_ID_BYTES, space), b"\0")
        if kind == BlkType.FLUSH and self.features & BlkFeature.FLUSH:
            self.sync()
            self.flushes += 1
            return BlkStatus.OK, b""
        if kind == BlkType.OUT:
            return self._write(header.sector, data), b""
        if kind == BlkType.DISCARD and self.features & BlkFeature.DISCARD:
            return self._ranges(data, self.options.discard_sectors, self.options.discard_segments), b""
        if kind == BlkType.WRITE_ZEROES and self.features & BlkFeature.WRITE_ZEROES:
            return self._ranges(data, self.options.zeroes_sectors, self.options.zeroes_segments), b""
        return BlkStatus.UNSUPPORTED, b""

    def _inside(self, sector: int, length: int) -> bool:
        return length % self.options.block_bytes == 0 and sector + length // SECTOR_BYTES <= self.capacity

    def _write(self, sector: int, data: bytes) -> BlkStatus:
        if self.options.features & BlkFeature.RO or not self._inside(sector, len(data)):
            return BlkStatus.IO_ERROR
        self.store(sector * SECTOR_BYTES, data)
        return BlkStatus.OK

    def _ranges(self, data: bytes, most_sectors: int, most_segments: int) -> BlkStatus:
        if len(data) % BlkSegment.SIZE or not 0 < len(data) <= BlkSegment.SIZE * most_segments:
            return BlkStatus.IO_ERROR
        segments = list(BlkSegment.iter_parse(data))
        for segment in segments:
            if segment.sectors > most_sectors or not self._inside(segment.sector, segment.sectors * SECTOR_BYTES):
                return BlkStatus.IO_ERROR
        for segment in segments:
            # A discarded range reads as zeros, so that tests see that the request came.
            for at in range(0, segment.sectors * SECTOR_BYTES, _ZERO_CHUNK):
                size = min(_ZERO_CHUNK, segment.sectors * SECTOR_BYTES - at)
                if self._write(segment.sector + at // SECTOR_BYTES, bytes(size)) is not BlkStatus.OK:
                    return BlkStatus.IO_ERROR
        return BlkStatus.OK


def _scatter(window: Window, parts: list[Part], data: bytes) -> None:
    for part in parts:
        window.put(part.address, data[: part.length])
        data = data[part.length :]
