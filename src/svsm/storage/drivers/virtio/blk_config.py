# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a virtio disk says about itself, and what of it is believed.

Pure: configuration bytes and negotiated features in, `Geometry` out. A field that its feature bit does not cover is
not looked at. What cannot be true refuses the device; what can only make the driver slow is clamped:

* capacity: any, up to `_MAX_SECTORS`; the driver uses whole blocks of it.
* blk_size: a power of two from 512 bytes to 1 MiB.
* size_max, seg_max: 0 means no limit (QEMU offers size_max = 0); less than a block refuses.
* discard and write-zeroes limits: 0 sectors takes the feature away; segment counts are clamped; an alignment that is
  larger than the limit is ignored.
* num_queues: 0 refuses.
"""

from __future__ import annotations

import dataclasses

from svsm.formats.errors import ProtocolError
from svsm.formats.virtio import SECTOR_BYTES, BlkConfig, BlkFeature
from svsm.storage.drivers.lifecycle import DiskShape

__all__ = ["CONFIG_BYTES", "Geometry", "RangeLimits", "parse_geometry"]

CONFIG_BYTES = 60
"""Of `BlkConfig`, what this driver reads: older devices end there."""

_MAX_SECTORS = 1 << 47
_LARGEST_BLOCK = 1 << 20
_LARGEST_TRANSFER = 1 << 30
_MOST_SEGMENTS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class RangeLimits:
    """Of one discard or write-zeroes request."""

    sectors: int
    """Of one segment."""
    segments: int
    """Of one request."""
    unmap: bool
    """Write-zeroes may give the space back."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry(DiskShape):
    """What the driver works with."""

    flush: bool
    discard: RangeLimits | None
    write_zeroes: RangeLimits | None
    queues: int


def _range_limits(sectors: int, segments: int, *, align: int, block: int, unmap: bool) -> RangeLimits | None:
    step = block // SECTOR_BYTES
    if align > step and align <= sectors and not align % step:
        step = align
    sectors = sectors // step * step
    if not sectors:
        return None
    return RangeLimits(sectors, max(1, min(segments, _MOST_SEGMENTS)), unmap)


def _block_size(config: BlkConfig, features: int) -> int:
    if not features & BlkFeature.BLK_SIZE:
        return SECTOR_BYTES
    size = config.blk_size
    if not SECTOR_BYTES <= size <= _LARGEST_BLOCK or size & (size - 1):
        raise ProtocolError(
            "the disk's block size is impossible", code="virtio-blk-geometry", field="blk_size", got=size
        )
    return size


def parse_geometry(data: bytes, features: int) -> Geometry:
    """Judge a block device's configuration space.

    Args:
        data: The first `CONFIG_BYTES` bytes.
        features: As negotiated.

    Raises:
        ProtocolError: ``virtio-blk-geometry`` with the field.
    """
    config = BlkConfig.parse(data[:CONFIG_BYTES].ljust(BlkConfig.SIZE, b"\0"))
    block = _block_size(config, features)
    if config.capacity > _MAX_SECTORS:
        raise ProtocolError(
            "the disk is larger than disks can be", code="virtio-blk-geometry", field="capacity", got=config.capacity
        )
    transfer = config.size_max if features & BlkFeature.SIZE_MAX else 0
    if transfer and transfer < block:
        raise ProtocolError(
            "the disk takes less than a block at a time", code="virtio-blk-geometry", field="size_max", got=transfer
        )
    transfer = min(transfer or _LARGEST_TRANSFER, _LARGEST_TRANSFER)
    queues = config.num_queues if features & BlkFeature.MQ else 1
    if not queues:
        raise ProtocolError("the disk has no queue", code="virtio-blk-geometry", field="num_queues", got=0)
    discard = write_zeroes = None
    if features & BlkFeature.DISCARD:
        discard = _range_limits(
            config.max_discard_sectors,
            config.max_discard_seg,
            align=config.discard_sector_alignment,
            block=block,
            unmap=False,
        )
    if features & BlkFeature.WRITE_ZEROES:
        write_zeroes = _range_limits(
            config.max_write_zeroes_sectors,
            config.max_write_zeroes_seg,
            align=0,
            block=block,
            unmap=config.write_zeroes_may_unmap == 1,
        )
    return Geometry(
        size_bytes=config.capacity * SECTOR_BYTES,
        block_size_bytes=block,
        transfer_bytes=transfer // block * block,
        read_only=bool(features & BlkFeature.RO),
        flush=bool(features & BlkFeature.FLUSH),
        discard=discard,
        write_zeroes=write_zeroes,
        queues=queues,
    )
