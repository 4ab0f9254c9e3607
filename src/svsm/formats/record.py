# SPDX-License-Identifier: MIT OR Apache-2.0
"""The record codec: fixed binary structures as frozen dataclasses.

A record names its fields in the order of the bytes, one annotation each, and is compiled once to a
`struct.Struct`. The size that the specification states is asserted when the class is defined, so a mistyped
field cannot survive import. Byte order is always written. Reserved fields are ordinary fields named
`reserved_<hex offset>`; what a non-zero one means is for the format's `validate` step to say, so that `parse`
keeps every bit and ``parse(x).pack() == x`` holds for every accepted x.

Deliberately not here: variable data (see `svsm.formats.cursor`), validation beyond length and width, defaults
computed from other fields.

    @record(size=16, byte_order="little")
    class Entry(Record):
        gpa: U64
        length: U32
        tag: Annotated[bytes, Bytes(4)]
"""

from __future__ import annotations

import dataclasses
import inspect
import struct
from collections.abc import Callable, Iterator
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    dataclass_transform,
    get_args,
)

from svsm.formats.errors import FormatError

__all__ = ["U8", "U16", "U32", "U64", "Buffer", "Bytes", "Nested", "Record", "Unsigned", "record"]

Buffer = bytes | bytearray | memoryview
"""What parsers accept; `collections.abc.Buffer` exists only from Python 3.12 on."""


class Unsigned(NamedTuple):
    """Field marker: an unsigned integer of 1, 2, 4 or 8 bytes."""

    width_bytes: int


class Bytes(NamedTuple):
    """Field marker: exactly `length` bytes, kept as they are."""

    length: int


class Nested(NamedTuple):
    """Field marker: another record, in place. It keeps its own byte order."""


U8 = Annotated[int, Unsigned(1)]
U16 = Annotated[int, Unsigned(2)]
U32 = Annotated[int, Unsigned(4)]
U64 = Annotated[int, Unsigned(8)]

_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


class Record:
    """Base of every record; see the module for how to declare one. Use with the `record` decorator only."""

    __slots__ = ()  # without it, the slots of the records below would come on top of a __dict__

    SIZE: ClassVar[int]
    """Packed size in bytes."""

    _struct: ClassVar[struct.Struct]
    _fields: ClassVar[tuple[_Field, ...]]
    _nested: ClassVar[tuple[tuple[int, type[Record]], ...]]

    @classmethod
    def parse(cls, data: Buffer) -> Self:
        """Decode exactly `SIZE` bytes.

        Raises:
            FormatError: ``record-length`` when `data` has another length.
        """
        if len(data) != cls.SIZE:
            raise FormatError(
                f"{cls.__name__} has the wrong length", code="record-length", expected=cls.SIZE, got=len(data)
            )
        return cls._build(cls._struct.unpack(data))

    @classmethod
    def parse_at(cls, data: Buffer, offset: int) -> Self:
        """Decode `SIZE` bytes that start at `offset`.

        Raises:
            FormatError: ``record-truncated`` when they are not all there, or `offset` is negative.
        """
        if offset < 0 or len(data) - offset < cls.SIZE:
            raise FormatError(
                f"{cls.__name__} is cut short",
                code="record-truncated",
                offset=offset,
                expected=cls.SIZE,
                got=max(0, len(data) - offset),
            )
        return cls._build(cls._struct.unpack_from(data, offset))

    @classmethod
    def iter_parse(cls, data: Buffer) -> Iterator[Self]:
        """Decode a table: as many records as `data` has bytes for.

        Raises:
            FormatError: ``record-length`` when the length is not a multiple of `SIZE`.
        """
        if len(data) % cls.SIZE:
            raise FormatError(
                f"a table of {cls.__name__} has a partial entry",
                code="record-length",
                expected=cls.SIZE,
                got=len(data),
            )
        return (cls._build(values) for values in cls._struct.iter_unpack(data))

    @classmethod
    def _build(cls, values: tuple[Any, ...]) -> Self:
        if cls._nested:
            fields = list(values)
            for index, kind in cls._nested:
                fields[index] = kind.parse(fields[index])
            return cls(*fields)
        return cls(*values)

    def pack(self) -> bytes:
        """Encode to `SIZE` bytes.

        Raises:
            FormatError: ``record-width`` when a value does not fit its field: `struct` would raise its own error
                for integers and silently pad or cut bytes.
        """
        return self._struct.pack(*[field.encode(self) for field in self._fields])

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed (`dataclasses.replace`, typed for records)."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]  # records are dataclasses; only their decorator says so


class _Field(NamedTuple):
    owner: str
    name: str
    marker: Unsigned | Bytes | Nested
    nested: type[Record] | None

    @property
    def code(self) -> str:
        if isinstance(self.marker, Unsigned):
            return _CODES[self.marker.width_bytes]
        return f"{self.width_bytes}s"

    @property
    def width_bytes(self) -> int:
        if isinstance(self.marker, Unsigned):
            return self.marker.width_bytes
        if isinstance(self.marker, Bytes):
            return self.marker.length
        return _nested_type(self).SIZE

    def encode(self, instance: Record) -> int | bytes:
        value = getattr(instance, self.name)
        if isinstance(self.marker, Unsigned):
            if isinstance(value, int) and 0 <= value < 1 << (8 * self.marker.width_bytes):
                return value
            raise self._misfit(value)
        if isinstance(self.marker, Nested):
            if isinstance(value, _nested_type(self)):
                return value.pack()
            raise self._misfit(value)
        if isinstance(value, bytes | bytearray | memoryview) and len(value) == self.marker.length:
            return bytes(value)
        raise self._misfit(value)

    def _misfit(self, value: object) -> FormatError:
        got = value if isinstance(value, int) else type(value).__name__
        return FormatError(
            f"{self.owner}.{self.name} does not fit its field",
            code="record-width",
            field=self.name,
            expected=self.width_bytes,
            got=len(value) if isinstance(value, bytes | bytearray | memoryview) else got,
        )


def _nested_type(field: _Field) -> type[Record]:
    if field.nested is None:
        raise TypeError(f"{field.owner}.{field.name} has no record type")
    return field.nested


_R = TypeVar("_R", bound=Record)


@dataclass_transform(frozen_default=True)
def record(*, size: int, byte_order: Literal["little", "big"]) -> Callable[[type[_R]], type[_R]]:
    """Compile a subclass of `Record`.

    Args:
        size: The packed size in bytes that the specification states.
        byte_order: Of every integer in the record (nested records keep their own).

    Raises:
        TypeError: At definition time, for a field without marker or a size that does not come out.
    """

    def compile_record(cls: type[_R]) -> type[_R]:
        made = dataclasses.dataclass(frozen=True, slots=True)(cls)
        hints = inspect.get_annotations(made, eval_str=True)
        fields = tuple(_field(made, field.name, hints[field.name]) for field in dataclasses.fields(made))  # type: ignore[arg-type]  # records are dataclasses; only their decorator says so
        layout = struct.Struct(("<" if byte_order == "little" else ">") + "".join(field.code for field in fields))
        if layout.size != size:
            raise TypeError(f"{cls.__name__} has {layout.size} bytes, its specification says {size}")
        made.SIZE = size
        made._struct = layout
        made._fields = fields
        made._nested = tuple((i, field.nested) for i, field in enumerate(fields) if field.nested is not None)
        return made

    return compile_record


def _field(cls: type[Record], name: str, hint: object) -> _Field:
    base, *markers = get_args(hint) or (hint,)
    for marker in markers:
        if isinstance(marker, Unsigned | Bytes):
            return _Field(cls.__name__, name, marker, None)
        if isinstance(marker, Nested) and isinstance(base, type) and issubclass(base, Record):
            return _Field(cls.__name__, name, marker, base)
    raise TypeError(f"{cls.__name__}.{name} has no width")
