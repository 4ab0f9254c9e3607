# SPDX-License-Identifier: MIT OR Apache-2.0
"""The common extent integrity protection: how a torn write of an unauthenticated extent is noticed.

Against accidents only, never against an attacker. A section inside the extent's first 128 bytes holds a commit id
(the checksum of the extent, masked), the mask, and the eight bytes that each ``(128 << i) - 8`` marker displaced.
A device block that did not reach the medium lacks the marker (or is all zero), so the extent verifies only when
every device block of at least 128 bytes carries the same commit.

`head_skip` bytes at the front (a magic) are exempt from the mask. The transformation is applied last before
writing and removed first after reading.
"""

from __future__ import annotations

from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs.primitives import checksum

__all__ = ["protect", "section_bytes", "tier0", "unprotect"]

_HEAD = 128
_COMMIT = 8
_FIXED = 9


def _slots(io_block_bytes: int) -> int:
    return io_block_bytes.bit_length() - _HEAD.bit_length()


def section_bytes(io_block_bytes: int) -> int:
    """Length of the integrity section for a file system IO block of this size."""
    return _FIXED + _COMMIT * _slots(io_block_bytes)


def _masked(head: bytes | bytearray, mask: int, section: int, head_skip: int) -> bytes:
    kept = range(section, section + _FIXED)
    return bytes(byte if index < head_skip or index in kept else byte ^ mask for index, byte in enumerate(head[:_HEAD]))


def protect(extent: bytes, *, section: int, head_skip: int, io_block_bytes: int) -> bytes:
    """The extent as it goes to the disk.

    Args:
        extent: Whole IO blocks, the integrity section at offset `section` (its contents are ignored).
        section: Offset of the integrity section.
        head_skip: Bytes at the front that stay as they are.
        io_block_bytes: The file system's IO block.
    """
    slots = _slots(io_block_bytes)
    data = bytearray(extent)
    data[section : section + section_bytes(io_block_bytes)] = bytes(section_bytes(io_block_bytes))
    digest = checksum(data)
    for index in range(slots, 0, -1):
        marker = (_HEAD << index) - _COMMIT
        slot = section + _FIXED + _COMMIT * (index - 1)
        data[slot : slot + _COMMIT] = data[marker : marker + _COMMIT]
    exempt = range(section, section + _FIXED)
    used = set(digest) | {data[index] for index in range(head_skip, _HEAD) if index not in exempt}
    mask = next((value for value in range(1, 256) if value not in used), None)
    if mask is None:
        raise FormatError("no mask fits the extent", code="cocoonfs-format", field="integrity")
    data[:_HEAD] = _masked(data, mask, section, head_skip)
    commit = bytes(byte ^ mask for byte in digest)
    data[section : section + _COMMIT] = commit
    data[section + _COMMIT] = mask
    for index in range(1, slots + 1):
        marker = (_HEAD << index) - _COMMIT
        data[marker : marker + _COMMIT] = commit
    return bytes(data)


def tier0(head: bytes, *, section: int, head_skip: int) -> bytes | None:
    """The first 128 bytes without the mask, where they are trustworthy enough to size things; else None."""
    if len(head) < _HEAD or 0 in head[head_skip:_HEAD]:
        return None
    return _masked(head, head[section + _COMMIT], section, head_skip)


def unprotect(extent: bytes, *, section: int, head_skip: int, io_block_bytes: int) -> bytes | None:
    """The extent as it was before `protect` (section all zero), or None where it does not verify."""
    head = tier0(extent, section=section, head_skip=head_skip)
    slots = _slots(io_block_bytes)
    if head is None or len(extent) < _HEAD << slots:
        return None
    commit = extent[section : section + _COMMIT]
    mask = extent[section + _COMMIT]
    data = bytearray(extent)
    markers = [(_HEAD << index) - _COMMIT for index in range(1, slots + 1)]
    if any(data[marker : marker + _COMMIT] != commit for marker in markers):
        return None
    data[:_HEAD] = head
    for index, marker in enumerate(markers):
        slot = section + _FIXED + _COMMIT * index
        data[marker : marker + _COMMIT] = data[slot : slot + _COMMIT]
    data[section : section + section_bytes(io_block_bytes)] = bytes(section_bytes(io_block_bytes))
    if checksum(data) != bytes(byte ^ mask for byte in commit):
        return None
    return bytes(data)
