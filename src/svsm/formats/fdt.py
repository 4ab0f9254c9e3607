# SPDX-License-Identifier: MIT OR Apache-2.0
"""The flattened device tree: how a loader tells what devices there are (Devicetree Specification v0.4 §5).

    header, memory reservations, structure (tokens: begin node, property, end node), strings (names of properties)

Theory. A tree is read in one pass over the structure block, without recursion. Everything that the blob chooses is
bounded before it is used: the blob's size, how deep and how many nodes, the length of a name. The blocks must lie in
the blob and may not overlap; names have the specification's characters and are unique among siblings; properties come
before child nodes; the structure ends exactly where the header says.

Only versions that version 17 can read are taken. Not kept: NOP tokens, the bytes that align a value, the order of
strings. So ``parse(tree.pack()) == tree``, while a foreign blob packs to its canonical form. What a property means is
for who reads it; `Node` has the common readings (cells, strings, address and size).
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator
from typing import Final, Self

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.formats.record import U32, U64, Buffer, Record, record

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_NODES",
    "MAX_RESERVATIONS",
    "DeviceTree",
    "Header",
    "Node",
    "Reservation",
    "cells",
    "strings",
]

MAX_BYTES: Final = 1 << 20
"""QEMU's blobs have this size, most of it empty."""
MAX_DEPTH: Final = 16
"""Nodes on the way from the root to the deepest node, both counted."""
MAX_NODES: Final = 1024
MAX_RESERVATIONS: Final = 64

_MAGIC: Final = 0xD00D_FEED
_VERSION: Final = 17
_LAST_COMPATIBLE: Final = 16
_CELL_BYTES: Final = 4
_MAX_NAME: Final = 31
_NODE_NAME: Final = re.compile(rb"[0-9a-zA-Z,._+-]{1,31}(?:@[0-9a-zA-Z,._+-]{1,31})?", re.ASCII)
_PROPERTY_NAME: Final = re.compile(rb"[0-9a-zA-Z,._+?#-]{1,31}", re.ASCII)
_MAX_CELLS: Final = 4
"""In one address or size."""


class _Token(enum.IntEnum):
    BEGIN_NODE = 1
    END_NODE = 2
    PROP = 3
    NOP = 4
    END = 9


@record(size=40, byte_order="big")
class Header(Record):
    """§5.2."""

    magic: U32
    total_bytes: U32
    structure_offset: U32  # from the start of the blob, as the other two
    strings_offset: U32
    reservations_offset: U32
    version: U32
    last_compatible_version: U32
    boot_cpu: U32
    strings_bytes: U32
    structure_bytes: U32


@record(size=16, byte_order="big")
class Reservation(Record):
    """Memory that must be left alone (§5.3)."""

    address: U64
    size_bytes: U64


@record(size=8, byte_order="big")
class _Property(Record):
    length: U32
    name_offset: U32


def cells(*values: int) -> bytes:
    """A property value of 32-bit cells.

    Raises:
        FormatError: ``fdt-value`` for what does not fit a cell.
    """
    for value in values:
        if not 0 <= value < 1 << 8 * _CELL_BYTES:
            raise FormatError("a cell has 32 bits", code="fdt-value", got=value)
    return b"".join(value.to_bytes(_CELL_BYTES, "big") for value in values)


def strings(*values: str) -> bytes:
    """A property value of strings, each with its NUL.

    Raises:
        FormatError: ``fdt-value`` for what is not printable ASCII.
    """
    for value in values:
        if not (value.isascii() and value.isprintable()):
            raise FormatError("a property's string is printable ASCII", code="fdt-value", got=value)
    return b"".join(value.encode("ascii") + b"\0" for value in values)


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node. Properties and children keep their order."""

    name: str
    """With its unit address ("serial@3e8"); "" for the root."""
    properties: tuple[tuple[str, bytes], ...] = ()
    children: tuple[Node, ...] = ()

    def get(self, name: str) -> bytes | None:
        """A property's value, or None."""
        return next((value for known, value in self.properties if known == name), None)

    def cell(self, name: str, default: int) -> int:
        """A property of one cell; `default` where there is none.

        Raises:
            FormatError: ``fdt-value``.
        """
        value = self.get(name)
        if value is None:
            return default
        if len(value) != _CELL_BYTES:
            raise FormatError("a property is no single cell", code="fdt-value", field=name, got=len(value))
        return int.from_bytes(value, "big")

    def strings(self, name: str) -> tuple[str, ...]:
        """A property of strings; () where there is none.

        Raises:
            FormatError: ``fdt-value``.
        """
        value = self.get(name)
        if not value:
            return ()
        parts = value.split(b"\0")
        if parts.pop() or not all(part.isascii() and part.decode("ascii").isprintable() for part in parts):
            raise FormatError("a property is no list of strings", code="fdt-value", field=name)
        return tuple(part.decode("ascii") for part in parts)

    def tuples(self, name: str, *widths: int) -> tuple[tuple[int, ...], ...]:
        """A property that repeats numbers of so many cells each ("reg": address cells, size cells).

        Raises:
            FormatError: ``fdt-value`` for a length that is no multiple, or widths that no bus has.
        """
        if not widths or any(not 0 <= width <= _MAX_CELLS for width in widths) or not any(widths):
            raise FormatError("an address or size has at most 4 cells", code="fdt-value", field=name)
        cursor = Cursor(self.get(name) or b"", what="property")
        if cursor.remaining % (sum(widths) * _CELL_BYTES):
            raise FormatError("a property is cut short", code="fdt-value", field=name, got=cursor.remaining)
        found = []
        while cursor.remaining:
            found.append(tuple(cursor.unsigned(width * _CELL_BYTES, "big") for width in widths))
        return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceTree:
    """A whole tree."""

    root: Node
    reservations: tuple[Reservation, ...] = ()
    boot_cpu: int = 0

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Read a blob; `data` may be longer, what follows the blob is not looked at.

        Raises:
            FormatError: ``fdt-header``, ``fdt-blocks``, ``fdt-structure``, ``fdt-name``, ``fdt-limit``; ``record-…``
                and ``cursor-…`` for what is cut short.
        """
        header = Header.parse_at(data, 0)
        if header.magic != _MAGIC:
            raise FormatError("there is no device tree", code="fdt-header", field="magic", got=header.magic)
        if header.version < _VERSION or header.last_compatible_version not in (_LAST_COMPATIBLE, _VERSION):
            raise FormatError(
                "the device tree has another version", code="fdt-header", field="version", got=header.version
            )
        if not Header.SIZE <= header.total_bytes <= min(MAX_BYTES, len(data)):
            raise FormatError(
                "the device tree has an impossible size", code="fdt-header", field="totalsize", got=header.total_bytes
            )
        blob = bytes(memoryview(data).cast("B")[: header.total_bytes])
        reservations = tuple(_reservations(blob, header.reservations_offset))
        _check_blocks(header, reservations_bytes=(len(reservations) + 1) * Reservation.SIZE)
        names = _Names(_block(blob, header.strings_offset, header.strings_bytes))
        structure = _block(blob, header.structure_offset, header.structure_bytes)
        return cls(_Reader(structure, names).read(), reservations, header.boot_cpu)

    def pack(self) -> bytes:
        """The canonical blob: version 17, blocks in the specification's order, each string once.

        Raises:
            FormatError: ``fdt-name``, ``fdt-limit``, ``fdt-structure``; ``record-width``.
        """
        if len(self.reservations) > MAX_RESERVATIONS or any(not entry.size_bytes for entry in self.reservations):
            raise FormatError("memory reservations cannot be written", code="fdt-limit", field="reservations")
        writer = _Writer()
        writer.node(self.root, depth=1)
        structure = bytes(writer.structure) + _Token.END.to_bytes(_CELL_BYTES, "big")
        reserved = b"".join(entry.pack() for entry in self.reservations) + bytes(Reservation.SIZE)
        names = bytes(writer.names)
        structure_offset = Header.SIZE + len(reserved)
        strings_offset = structure_offset + len(structure)
        total = strings_offset + len(names)
        if total > MAX_BYTES:
            raise FormatError("the device tree is too large", code="fdt-limit", field="totalsize", got=total)
        header = Header(
            _MAGIC,
            total,
            structure_offset,
            strings_offset,
            Header.SIZE,
            _VERSION,
            _LAST_COMPATIBLE,
            self.boot_cpu,
            len(names),
            len(structure),
        )
        return header.pack() + reserved + structure + names

    def walk(self) -> Iterator[tuple[str, Node, Node | None]]:
        """Every node with its path and its parent, parents first; the root's path is "/"."""
        waiting: list[tuple[str, Node, Node | None]] = [("/", self.root, None)]
        while waiting:
            path, node, parent = waiting.pop()
            yield path, node, parent
            prefix = path.rstrip("/")
            waiting.extend((f"{prefix}/{child.name}", child, node) for child in reversed(node.children))


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _reservations(blob: bytes, offset: int) -> Iterator[Reservation]:
    for index in range(MAX_RESERVATIONS + 1):
        entry = Reservation.parse_at(blob, offset + index * Reservation.SIZE)
        if not entry.size_bytes and not entry.address:
            return
        if not entry.size_bytes:
            raise FormatError("a memory reservation is empty", code="fdt-blocks", field="reservations")
        yield entry
    raise FormatError("a device tree has too many memory reservations", code="fdt-limit", field="reservations")


def _check_blocks(header: Header, *, reservations_bytes: int) -> None:
    """Each block is aligned, in the blob, and alone where it is (§5.1, §5.6)."""
    blocks = sorted(
        (
            (0, Header.SIZE, 1),
            (header.reservations_offset, reservations_bytes, 8),
            (header.structure_offset, header.structure_bytes, _CELL_BYTES),
            (header.strings_offset, header.strings_bytes, 1),
        )
    )
    end = 0
    for offset, length, alignment in blocks:
        if offset < end or offset % alignment or offset + length > header.total_bytes:
            raise FormatError("a block of the device tree is where it cannot be", code="fdt-blocks", offset=offset)
        end = offset + length


def _block(blob: bytes, offset: int, length: int) -> bytes:
    cursor = Cursor(blob, what="device tree")
    cursor.take(offset)
    return cursor.take(length)


class _Names:
    """The strings block: names of properties by their offset. They may share tails."""

    def __init__(self, block: bytes) -> None:
        self._block = block
        self._known: dict[int, str] = {}

    def at(self, offset: int) -> str:
        if offset not in self._known:
            self._known[offset] = _name(self._block, offset, _PROPERTY_NAME, longest=_MAX_NAME)[0]
        return self._known[offset]


def _name(block: bytes, offset: int, allowed: re.Pattern[bytes], *, longest: int) -> tuple[str, int]:
    """A name that ends with a NUL, and the offset behind that."""
    end = block.find(b"\0", offset, offset + longest + 1)
    raw = block[offset:end]
    if end < 0 or not allowed.fullmatch(raw):
        raise FormatError("a name in the device tree is none", code="fdt-name", offset=offset)
    return raw.decode("ascii"), end + 1


# ---- structure ------------------------------------------------------------------------------------------------------


class _Open:
    """A node whose end has not come yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.properties: dict[str, bytes] = {}
        self.children: dict[str, Node] = {}

    def close(self) -> Node:
        return Node(self.name, tuple(self.properties.items()), tuple(self.children.values()))


class _Reader:
    """Turns the structure block's tokens into nodes (§5.4)."""

    def __init__(self, structure: bytes, names: _Names) -> None:
        self._structure = structure
        self._cursor = Cursor(structure, what="device tree")
        self._names = names
        self._open: list[_Open] = []
        self._nodes = 0

    def read(self) -> Node:
        root: Node | None = None
        while True:
            token = self._cursor.unsigned(_CELL_BYTES, "big")
            if token == _Token.NOP:
                continue
            if token == _Token.END and root is not None:
                self._cursor.finish()
                return root
            if token == _Token.BEGIN_NODE and root is None:
                self._begin()
            elif token == _Token.PROP and self._open:
                self._property(self._open[-1])
            elif token == _Token.END_NODE and self._open:
                root = self._end()
            else:
                raise self._wrong("a token is out of place")

    def _begin(self) -> None:
        if len(self._open) >= MAX_DEPTH or self._nodes >= MAX_NODES:
            raise FormatError("the device tree is too deep or too large", code="fdt-limit", field="nodes")
        self._nodes += 1
        if not self._open:
            if self._cursor.unsigned(_CELL_BYTES, "big"):
                raise self._wrong("the root has a name")
            self._open.append(_Open(""))
            return
        start = self._cursor.offset
        name, end = _name(self._structure, start, _NODE_NAME, longest=2 * _MAX_NAME + 1)
        self._cursor.take(_aligned(end) - start)
        if name in self._open[-1].children:
            raise self._wrong("a node is there twice")
        self._open.append(_Open(name))

    def _property(self, node: _Open) -> None:
        header = self._cursor.record(_Property)
        value = self._cursor.take(header.length)
        self._cursor.take(_aligned(header.length) - header.length)
        name = self._names.at(header.name_offset)
        if name in node.properties or node.children:
            raise self._wrong("a property is there twice, or after a child node")
        node.properties[name] = value

    def _end(self) -> Node | None:
        """The root, once it is whole."""
        node = self._open.pop().close()
        if not self._open:
            return node
        self._open[-1].children[node.name] = node
        return None

    def _wrong(self, what: str) -> FormatError:
        return FormatError(f"device tree: {what}", code="fdt-structure", offset=self._cursor.offset)


class _Writer:
    def __init__(self) -> None:
        self.structure = bytearray()
        self.names = bytearray()
        self._offsets: dict[str, int] = {}
        self._nodes = 0

    def node(self, node: Node, *, depth: int) -> None:
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            raise FormatError("the device tree is too deep or too large", code="fdt-limit", field="nodes")
        if (depth == 1) != (not node.name) or (node.name and not _allowed(node.name, _NODE_NAME)):
            raise FormatError("a node has no such name", code="fdt-name", got=node.name)
        for siblings in ([name for name, _ in node.properties], [child.name for child in node.children]):
            if len(set(siblings)) != len(siblings):
                raise FormatError("two siblings have one name", code="fdt-structure", got=node.name)
        self._token(_Token.BEGIN_NODE, node.name.encode("ascii") + b"\0")
        for name, value in node.properties:
            self._token(_Token.PROP, _Property(len(value), self._offset(name)).pack() + value)
        for child in node.children:
            self.node(child, depth=depth + 1)
        self._token(_Token.END_NODE, b"")

    def _token(self, token: _Token, data: bytes) -> None:
        self.structure += token.to_bytes(_CELL_BYTES, "big") + data.ljust(_aligned(len(data)), b"\0")

    def _offset(self, name: str) -> int:
        if name not in self._offsets:
            if not _allowed(name, _PROPERTY_NAME):
                raise FormatError("a property has no such name", code="fdt-name", got=name)
            self._offsets[name] = len(self.names)
            self.names += name.encode("ascii") + b"\0"
        return self._offsets[name]


def _allowed(name: str, pattern: re.Pattern[bytes]) -> bool:
    return name.isascii() and pattern.fullmatch(name.encode("ascii")) is not None


def _aligned(length: int) -> int:
    return -(-length // _CELL_BYTES) * _CELL_BYTES
