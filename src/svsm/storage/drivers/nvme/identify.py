# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an NVMe controller and its namespace say about themselves, and what of it is believed.

Pure: two Identify pages in, `Geometry` out. What cannot be true, or would put data where the driver does not look for
it (metadata, end-to-end protection), refuses the disk; what can only make the driver slow is clamped:

* queue entry sizes: 64 and 16 bytes must be allowed.
* MDTS: clamped to the driver's own limit; 0 is no limit; less than a block refuses.
* MAXCMD: limits the depth; 0 says nothing.
* NN: the namespace's number must be among them.
* FLBAS, LBADS, MS, DPS: a format that exists, blocks of 512 bytes to 64 KiB, no metadata, no protection.
* NSZE: any, up to `_MOST_BYTES`; NCAP, if it is smaller, is thin provisioning and only costs a status later.
"""

from __future__ import annotations

import dataclasses

from svsm.formats.errors import ProtocolError
from svsm.formats.nvme import PAGE_BYTES, IdentifyController, IdentifyNamespace, OptionalCommand
from svsm.storage.drivers.lifecycle import DiskShape

__all__ = ["Geometry", "parse_geometry", "parse_size"]

_MOST_BYTES = 1 << 56
_LARGEST_TRANSFER = 1 << 30
_MOST_BLOCKS = 1 << 16
_SMALLEST_SHIFT, _LARGEST_SHIFT = 9, 16
_SUBMISSION_SHIFT, _COMPLETION_SHIFT = 6, 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry(DiskShape):
    """What the driver works with."""

    depth: int
    """Most commands in flight that the controller wants; at least 1."""
    volatile_cache: bool
    discard: bool
    write_zeroes: bool


def _impossible(what: str, field: str, got: int) -> ProtocolError:
    return ProtocolError(f"the disk {what}", code="nvme-identify", field=field, got=got)


def _allows(sizes: int, shift: int) -> bool:
    return sizes & 0xF <= shift <= sizes >> 4


def parse_size(namespace: IdentifyNamespace) -> tuple[int, int]:
    """Bytes of the namespace and of a block.

    Raises:
        ProtocolError: ``nvme-identify`` with the field.
    """
    index = namespace.format & 0xF
    if index > namespace.format_count:
        raise _impossible("uses a format that it does not have", "FLBAS", namespace.format)
    shift, metadata = namespace.format_at(index)
    if not _SMALLEST_SHIFT <= shift <= _LARGEST_SHIFT:
        raise _impossible("has blocks of an impossible size", "LBADS", shift)
    if metadata:
        raise _impossible("keeps metadata with its blocks, which is not supported", "MS", metadata)
    if namespace.protection & 7:
        raise _impossible("uses end-to-end protection, which is not supported", "DPS", namespace.protection)
    if not namespace.size_blocks or namespace.size_blocks << shift > _MOST_BYTES:
        raise _impossible("has no such namespace, or an impossible size", "NSZE", namespace.size_blocks)
    return namespace.size_blocks << shift, 1 << shift


def parse_geometry(controller: bytes, namespace: bytes, *, number: int) -> Geometry:
    """Judge both Identify pages.

    Args:
        controller: 4096 bytes, a private copy.
        namespace: 4096 bytes, a private copy.
        number: Of the namespace, from 1 on.

    Raises:
        ProtocolError: ``nvme-identify`` with the field.
    """
    host = IdentifyController.parse(controller)
    disk = IdentifyNamespace.parse(namespace)
    if not _allows(host.submission_sizes, _SUBMISSION_SHIFT):
        raise _impossible("takes no commands of 64 bytes", "SQES", host.submission_sizes)
    if not _allows(host.completion_sizes, _COMPLETION_SHIFT):
        raise _impossible("gives no completions of 16 bytes", "CQES", host.completion_sizes)
    if host.controller_type not in (0, 1):
        raise _impossible("is no I/O controller", "CNTRLTYPE", host.controller_type)
    if number > host.namespaces:
        raise _impossible("has no such namespace", "NN", host.namespaces)
    size, block = parse_size(disk)
    transfer = _LARGEST_TRANSFER
    if host.transfer_shift:
        transfer = min(transfer, PAGE_BYTES << min(host.transfer_shift, 30))
    transfer = min(transfer // block, _MOST_BLOCKS) * block
    if not transfer:
        raise _impossible("takes less than a block at a time", "MDTS", host.transfer_shift)
    return Geometry(
        size_bytes=size,
        block_size_bytes=block,
        transfer_bytes=transfer,
        depth=host.most_commands or _MOST_BLOCKS,
        read_only=bool(disk.attributes & 1),
        volatile_cache=bool(host.volatile_cache & 1),
        discard=bool(host.optional_commands & OptionalCommand.DATASET_MANAGEMENT),
        write_zeroes=bool(host.optional_commands & OptionalCommand.WRITE_ZEROES),
    )
