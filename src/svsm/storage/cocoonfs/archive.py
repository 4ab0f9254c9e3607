# SPDX-License-Identifier: MIT OR Apache-2.0
"""Files out of a volume and into one, as a tar archive that other programs can list and unpack.

A member is a plain file named ``<inode, 16 hexadecimal digits>.<flags, 2 digits>``; everything else in its header is
constant, so that the same contents always give the same archive. The archive holds plaintext.

An archive to be imported may come from anywhere, so only what an export writes is accepted: ustar headers with a right
checksum, plain files, that form of name, each inode once, an end. Nothing is looked up by name, extended headers are
refused, sizes are bounded by the volume before they are read, and all of it is one transaction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from svsm.formats.errors import FormatError, StateError
from svsm.storage.cocoonfs.check import Progress, no_progress
from svsm.storage.cocoonfs.layout import FIRST_USER_INODE
from svsm.storage.cocoonfs.volume import Volume

__all__ = ["export_files", "import_files", "members"]

_BLOCK = 512
_RECORD = 20 * _BLOCK
_NAME = re.compile(rb"([0-9a-f]{16})\.([0-9a-f]{2})")
_MAGIC = b"ustar\x0000"
_CHECKSUM = slice(148, 156)
_PIECE = 1 << 20


def _malformed(what: str, **details: int) -> FormatError:
    return FormatError(
        f"this is not an archive of inodes: {what}",
        code="cocoonfs-archive",
        hint="import only what an export wrote",
        **details,
    )


def _octal(value: int, width: int) -> bytes:
    return f"{value:0{width - 1}o}".encode() + b"\0"


def _checksum(header: bytes) -> int:
    return sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def _header(inode: int, flags: int, length: int) -> bytes:
    name = f"{inode:016x}.{flags:02x}".encode()
    fields = (
        name.ljust(100, b"\0")
        + _octal(0o600, 8)
        + _octal(0, 8)
        + _octal(0, 8)
        + _octal(length, 12)
        + _octal(0, 12)
        + b" " * 8
        + b"0"
        + bytes(100)
        + _MAGIC
    ).ljust(_BLOCK, b"\0")
    return fields[:148] + f"{_checksum(fields):06o}".encode() + b"\0 " + fields[156:]


def export_files(volume: Volume, out: BinaryIO, *, progress: Progress = no_progress) -> int:
    """Write all files of a volume to an archive; how many there are.

    Args:
        volume: The volume.
        out: Where the archive goes.
        progress: Told how far it is.

    Raises:
        SvsmError: What reading the volume raises.
        OSError: What writing raises.
    """
    files = volume.list()
    written = 0
    for number, info in enumerate(files, 1):
        data = volume.read(info.inode)
        padding = bytes(-len(data) % _BLOCK)
        out.write(_header(info.inode, info.flags, len(data)))
        out.write(data)
        out.write(padding)
        written += _BLOCK + len(data) + len(padding)
        progress("files", number, len(files))
    out.write(bytes(2 * _BLOCK + -(written + 2 * _BLOCK) % _RECORD))
    return len(files)


def _exactly(source: BinaryIO, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        part = source.read(min(length, _PIECE))
        if not part:
            raise _malformed("it ends early", missing=length)
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _number(field: bytes, what: str) -> int:
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits or digits.strip(b"01234567"):
        raise _malformed(f"its {what} is no number")
    return int(digits, 8)


def _parse(header: bytes) -> tuple[int, int, int]:
    """(inode, flags, length) of a member."""
    if header[257:262] != _MAGIC[:5] or _number(header[_CHECKSUM], "checksum") != _checksum(header):
        raise _malformed("a header is damaged")
    name = _NAME.fullmatch(header[:100].rstrip(b"\0"))
    if header[156:157] not in (b"0", b"\0") or name is None or any(header[345:500]):
        raise _malformed("a member is not a plain file named by inode and flags")
    return int(name[1], 16), int(name[2], 16), _number(header[124:136], "length")


def members(source: BinaryIO, *, limit_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """The files of an archive: (inode, flags, contents), each inode once.

    Args:
        source: The archive.
        limit_bytes: How much all contents together, a block of header for each included, may be.

    Raises:
        FormatError: ``cocoonfs-archive``.
        OSError: What reading raises.
    """
    seen: set[int] = set()
    left = limit_bytes
    while True:
        header = _exactly(source, _BLOCK)
        if not any(header):
            return
        inode, flags, length = _parse(header)
        if inode < FIRST_USER_INODE or inode in seen:
            raise _malformed("an inode number is not for files, or comes twice", inode=inode)
        seen.add(inode)
        left -= _BLOCK + length
        if left < 0:
            raise _malformed("it is larger than the volume", inode=inode, length=length)
        data = _exactly(source, length)
        _exactly(source, -length % _BLOCK)
        yield inode, flags, data


def import_files(volume: Volume, source: BinaryIO, *, replace: bool = False, progress: Progress = no_progress) -> int:
    """Write all files of an archive to a volume in one transaction; how many there are.

    Args:
        volume: The volume.
        source: The archive.
        replace: Whether files that are there already are replaced; without it such an archive is refused.
        progress: Told how far the reading is; the number of all files is not known before.

    Raises:
        FormatError: ``cocoonfs-archive``; nothing was changed.
        StateError: ``cocoonfs-exists``, ``cocoonfs-full``; nothing was changed. And what a commit raises.
    """
    known = volume.inodes()
    transaction = volume.transaction()
    count = 0
    # A file takes at least its length of the volume, so more than the volume's size cannot be right; headers are
    # counted against a bound of their own: a file of no length takes an allocation block there and 512 bytes here.
    limit = volume.size_bytes * (1 + _BLOCK // volume.layout.ab_bytes)
    for inode, flags, data in members(source, limit_bytes=limit):
        if inode in known and not replace:
            raise StateError(
                "a file of the archive is in the volume already",
                code="cocoonfs-exists",
                hint="nothing was changed; import with replacement if that is what you want",
                inode=inode,
            )
        transaction.write(inode, data, flags)
        count += 1
        progress("files", count, 0)
    transaction.commit()
    return count
