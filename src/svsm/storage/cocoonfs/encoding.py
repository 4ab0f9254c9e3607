# SPDX-License-Identifier: MIT OR Apache-2.0
"""CocoonFS's variable-length encodings: LEB128, pointers, extents lists.

Units: an *allocation block* (ab) is the smallest piece the file system places; an `Extent` is
``(begin_ab, length_ab)``. All pointers are u64 little-endian; "none" is all ones (the reference program's choice).
Values that the input chose are bounded here, before anyone loops over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError

__all__ = [
    "MAX_POINTER_EXTENT_AB",
    "NIL",
    "Extent",
    "decode_block_pointer",
    "decode_extent_pointer",
    "decode_extents_list",
    "encode_block_pointer",
    "encode_extent_pointer",
    "encode_extents_list",
    "merge_ranges",
    "read_signed",
    "read_unsigned",
    "signed",
    "unsigned",
]

Extent = tuple[int, int]
"""(begin_ab, length_ab), length at least 1."""

NIL = b"\xff" * 8
MAX_POINTER_EXTENT_AB = 64
_MAX_LEB128_BYTES = 10
_U64 = 1 << 64


def _malformed(what: str, **details: int) -> FormatError:
    error = FormatError(f"{what} is malformed", code="cocoonfs-format", field=what)
    error.details.update(details)
    return error


def unsigned(value: int) -> bytes:
    """Minimal unsigned LEB128."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """Minimal signed LEB128."""
    out = bytearray()
    while not -64 <= value < 64:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


def _leb128(cursor: Cursor) -> tuple[int, int, int]:
    value = shift = 0
    for _ in range(_MAX_LEB128_BYTES):
        byte = cursor.take(1)[0]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, shift, byte
    raise _malformed("a LEB128 number", offset=cursor.offset)


def read_unsigned(cursor: Cursor) -> int:
    """An unsigned LEB128 number below 2^64; overlong encodings are accepted up to ten bytes.

    Raises:
        FormatError: ``cocoonfs-format``, ``cursor-truncated``.
    """
    value, _, _ = _leb128(cursor)
    if value >= _U64:
        raise _malformed("a LEB128 number", offset=cursor.offset)
    return value


def read_signed(cursor: Cursor) -> int:
    """A signed LEB128 number in the range of i64.

    Raises:
        FormatError: ``cocoonfs-format``, ``cursor-truncated``.
    """
    value, shift, last = _leb128(cursor)
    if last & 0x40:
        value -= 1 << shift
    if not -(_U64 >> 1) <= value < _U64 >> 1:
        raise _malformed("a LEB128 number", offset=cursor.offset)
    return value


def encode_extent_pointer(extent: Extent | None, *, indirect: bool = False) -> bytes:
    """A pointer to an extent of 1 to 64 ab, or NIL."""
    if extent is None:
        return NIL
    begin, length = extent
    if not 1 <= length <= MAX_POINTER_EXTENT_AB:
        raise _malformed("an extent pointer", length=length)
    return (begin << 7 | (length - 1) << 1 | int(indirect)).to_bytes(8, "little")


def decode_extent_pointer(data: bytes, *, limit_ab: int) -> tuple[Extent, bool] | None:
    """The extent and whether the pointer is indirect; None for NIL.

    Args:
        data: 8 bytes.
        limit_ab: The extent must end at or below this.

    Raises:
        FormatError: ``cocoonfs-format``.
    """
    if data == NIL:
        return None
    value = int.from_bytes(data, "little")
    extent = (value >> 7, (value >> 1 & 0x3F) + 1)
    if extent[0] + extent[1] > limit_ab:
        raise _malformed("an extent pointer", begin=extent[0], length=extent[1], limit=limit_ab)
    return extent, bool(value & 1)


def encode_block_pointer(begin_ab: int | None) -> bytes:
    """A pointer to a block whose length the context knows, or NIL."""
    return NIL if begin_ab is None else (begin_ab << 7).to_bytes(8, "little")


def decode_block_pointer(data: bytes, *, length_ab: int, limit_ab: int) -> int | None:
    """The first ab of the block, None for NIL.

    Raises:
        FormatError: ``cocoonfs-format``.
    """
    if data == NIL:
        return None
    value = int.from_bytes(data, "little")
    begin = value >> 7
    if value & 0x7F or begin + length_ab > limit_ab:
        raise _malformed("a block pointer", begin=begin, limit=limit_ab)
    return begin


def encode_extents_list(extents: Iterable[Extent]) -> bytes:
    """An extents list with its terminator."""
    out = bytearray()
    end = 0
    for begin, length in extents:
        out += signed(begin - end) + unsigned(length)
        end = begin + length
    return bytes(out) + b"\0\0"


def decode_extents_list(data: bytes, *, limit_ab: int) -> tuple[Extent, ...]:
    """The extents of a list; none overlaps another, all end at or below `limit_ab`.

    Raises:
        FormatError: ``cocoonfs-format``, ``cursor-truncated``.
    """
    cursor = Cursor(data, what="an extents list")
    extents: list[Extent] = []
    end = 0
    while True:
        delta = read_signed(cursor)
        length = read_unsigned(cursor)
        if length == 0:
            if delta or cursor.remaining:
                raise _malformed("an extents list", offset=cursor.offset)
            break
        begin = (end + delta) % _U64
        end = begin + length
        if end > limit_ab:
            raise _malformed("an extents list", begin=begin, length=length, limit=limit_ab)
        extents.append((begin, length))
    ordered = sorted(extents)
    for (begin, length), (following, _) in pairwise(ordered):
        if begin + length > following:
            raise _malformed("an extents list", begin=following)
    return tuple(extents)


def merge_ranges(ranges: Sequence[Extent]) -> list[Extent]:
    """Ranges sorted, with touching and overlapping ones joined."""
    merged: list[Extent] = []
    for begin, length in sorted(ranges):
        if merged and begin <= merged[-1][0] + merged[-1][1]:
            last_begin, last_length = merged[-1]
            merged[-1] = (last_begin, max(last_length, begin + length - last_begin))
        else:
            merged.append((begin, length))
    return merged
