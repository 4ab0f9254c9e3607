# SPDX-License-Identifier: MIT OR Apache-2.0
"""The file system's view of a device: extents in allocation blocks, and the one write that must be last.

Allocation blocks may be smaller than the device's blocks, so reads are widened and cut; writes are always whole IO
blocks, which the device's blocks divide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from svsm.abi.block import BlockDevice
from svsm.formats.errors import FormatError
from svsm.formats.record import Buffer
from svsm.storage.cocoonfs.encoding import Extent, merge_ranges
from svsm.storage.cocoonfs.layout import ImageLayout

__all__ = ["BlockIo"]

_SMALL_BYTES = 1 << 16  # a larger piece is not copied for the sake of one request less


class BlockIo:
    """Reads and writes in units of one configuration.

    Raises:
        FormatError: ``cocoonfs-device-blocks`` where the device's blocks are larger than the volume's IO blocks.
    """

    def __init__(self, device: BlockDevice, layout: ImageLayout) -> None:
        if device.block_size_bytes > layout.io_bytes:
            raise FormatError(
                "the device's blocks are larger than the volume's IO blocks",
                code="cocoonfs-device-blocks",
                hint="open it on a device with smaller blocks, or format with larger IO blocks",
                expected=layout.io_bytes,
                got=device.block_size_bytes,
            )
        self.device = device
        self._ab_bytes = layout.ab_bytes
        self._over: dict[int, bytes] = {}
        self.size_ab = device.size_bytes // layout.ab_bytes

    def read_many(self, extents: Sequence[Extent]) -> list[bytes]:
        """The raw contents of each extent.

        Raises:
            FormatError: ``cocoonfs-truncated`` for one beyond the device's end.
        """
        size, block = self._ab_bytes, self.device.block_size_bytes
        if any(begin + length > self.size_ab for begin, length in extents):
            raise FormatError(
                "the volume is larger than its device",
                code="cocoonfs-truncated",
                hint="the disk was cut short, or it is not the whole disk",
                got=self.device.size_bytes,
            )
        if size >= block:
            contents = self.device.read([(begin * size, length * size) for begin, length in extents])
            return self._overlaid(extents, contents) if self._over else contents
        ranges = []
        for begin, length in extents:
            first = begin * size // block * block
            ranges.append((first, -(-((begin + length) * size) // block) * block - first))
        contents = self.device.read(ranges)
        contents = [
            content[begin * size - first : (begin + length) * size - first]
            for content, (first, _), (begin, length) in zip(contents, ranges, extents, strict=True)
        ]
        return self._overlaid(extents, contents) if self._over else contents

    def lay_over(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Let later reads see (first ab, contents) pieces in place of what the device holds; nothing is written."""
        size = self._ab_bytes
        for begin, data in pieces:
            for at in range(0, len(data), size):
                self._over[begin + at // size] = data[at : at + size]

    def _overlaid(self, extents: Sequence[Extent], contents: list[bytes]) -> list[bytes]:
        size = self._ab_bytes
        return [
            b"".join(self._over.get(begin + at, content[at * size : (at + 1) * size]) for at in range(length))
            if any(begin + at in self._over for at in range(length))
            else content
            for (begin, length), content in zip(extents, contents, strict=True)
        ]

    def read(self, extent: Extent) -> bytes:
        """The raw contents of one extent."""
        return self.read_many([extent])[0]

    def write(self, pieces: Iterable[tuple[int, Buffer]]) -> None:
        """Write (first ab, contents) pieces; small neighbours are joined, no order is promised."""
        joined: list[tuple[int, list[Buffer]]] = []
        end = -1
        for begin, data in sorted(pieces, key=lambda piece: piece[0]):
            offset = begin * self._ab_bytes
            if offset == end and len(data) <= _SMALL_BYTES:
                joined[-1][1].append(data)
            else:
                joined.append((offset, [data]))
            end = offset + len(data) if len(data) <= _SMALL_BYTES else -1
        self.device.write([(offset, parts[0] if len(parts) == 1 else b"".join(parts)) for offset, parts in joined])

    @property
    def first_bytes(self) -> int:
        """Length of a device block: what the last write of a protected extent covers."""
        return self.device.block_size_bytes

    def zero_first(self, begin_ab: int) -> None:
        """Overwrite the first device block of a protected extent with zeros."""
        self.device.write([(begin_ab * self._ab_bytes, bytes(self.first_bytes))])

    def write_tail(self, begin_ab: int, data: bytes) -> tuple[int, bytes] | None:
        """What of a protected extent goes before its first device block: (offset in bytes, data), if any."""
        if len(data) == self.first_bytes:
            return None
        return begin_ab * self._ab_bytes + self.first_bytes, data[self.first_bytes :]

    def write_bytes(self, pieces: Sequence[tuple[int, bytes]]) -> None:
        """Write pieces given by byte offset."""
        self.device.write(list(pieces))

    def write_first(self, begin_ab: int, data: bytes) -> None:
        """The first device block of a protected extent."""
        self.device.write([(begin_ab * self._ab_bytes, data[: self.first_bytes])])

    def discard(self, extents: Iterable[Extent]) -> None:
        """Give up whole IO blocks; touching ones are joined."""
        size = self._ab_bytes
        ranges = [(begin * size, length * size) for begin, length in merge_ranges(list(extents))]
        if ranges:
            self.device.discard(ranges)

    def flush(self) -> None:
        """A barrier."""
        self.device.flush()
