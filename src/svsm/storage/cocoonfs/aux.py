# SPDX-License-Identifier: MIT OR Apache-2.0
"""Auxiliary metadata: records in clear text that anybody with the disk may read, and change, without the key.

They exist for what has to be known before there is a key: a wrapped key, the address of a broker. Nothing in them is
authenticated or secret. A record has a UUID as its kind; several of one kind may exist and keep their order.

The *reserve* is how many bytes more than now the storage on the disk should have room for. With any reserve, even 0,
the storage has two copies, and records can be changed without the key; with None they cannot.

`AuxMetadata` is a value: each change gives a new one. Where it is stored is the matter of `auxarea` (in a volume) and
`creation` (beside a creation-info header).
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError, StateError
from svsm.formats.record import Buffer

if TYPE_CHECKING:
    import uuid

__all__ = ["DEFAULT_RESERVE_BYTES", "MAX_AUX_BYTES", "NO_METADATA", "AuxEntry", "AuxMetadata"]

DEFAULT_RESERVE_BYTES = 1024
"""What the reference program reserves unless told otherwise."""

MAX_AUX_BYTES = 16 << 20
"""Ours, not the format's: hostile bytes must not be able to ask for more memory than this."""

_KIND_BYTES, _LENGTH_BYTES, _RESERVE_BYTES = 16, 4, 8
_END = bytes(_KIND_BYTES)


def _kind(data: bytes) -> uuid.UUID:
    from uuid import UUID  # what comes with it costs a command on a volume without records a tenth of its time

    return UUID(bytes=data)


def _malformed(what: str) -> FormatError:
    return FormatError("the auxiliary metadata is malformed", code="cocoonfs-aux", field=what)


@dataclass(frozen=True, slots=True)
class AuxEntry:
    """One record."""

    kind: uuid.UUID
    data: bytes = field(repr=False)


class AuxMetadata(NamedTuple):
    """All records, ordered by UUID, and the reserve.

    Attributes:
        entries: The records.
        reserve_bytes: Extra room on the disk, or None for storage that only the key can change.
    """

    entries: tuple[AuxEntry, ...] = ()
    reserve_bytes: int | None = None

    @property
    def is_trivial(self) -> bool:
        """Nothing that would need storage."""
        return not self.entries and not self.reserve_bytes

    @property
    def storage_bytes(self) -> int:
        """How many bytes of payload each copy should have room for."""
        return len(self.pack()) + (self.reserve_bytes or 0)

    def of(self, kind: uuid.UUID) -> tuple[bytes, ...]:
        """The contents of all records of a kind, in order."""
        return tuple(entry.data for entry in self.entries if entry.kind == kind)

    def read(self, kind: uuid.UUID, index: int = 0) -> bytes:
        """The contents of the `index`-th record of a kind.

        Raises:
            StateError: ``cocoonfs-no-such-aux``.
        """
        return self.entries[self._position(kind, index)].data

    def add(self, kind: uuid.UUID, data: Buffer) -> AuxMetadata:
        """With one more record, behind those of the same kind.

        Raises:
            StateError: ``cocoonfs-aux-kind`` for the all-zero UUID, ``cocoonfs-aux-full`` beyond 16 MiB.
        """
        if kind.bytes == _END:
            raise StateError("the UUID of all zeros marks the end of the records", code="cocoonfs-aux-kind")
        at = bisect_right([entry.kind.bytes for entry in self.entries], kind.bytes)
        return self._checked((*self.entries[:at], AuxEntry(kind, bytes(data)), *self.entries[at:]))

    def replace(self, kind: uuid.UUID, data: Buffer, index: int = 0) -> AuxMetadata:
        """With other contents in the `index`-th record of a kind.

        Raises:
            StateError: ``cocoonfs-no-such-aux``, ``cocoonfs-aux-full``.
        """
        at = self._position(kind, index)
        return self._checked((*self.entries[:at], AuxEntry(kind, bytes(data)), *self.entries[at + 1 :]))

    def remove(self, kind: uuid.UUID, index: int = 0) -> AuxMetadata:
        """Without the `index`-th record of a kind.

        Raises:
            StateError: ``cocoonfs-no-such-aux``.
        """
        at = self._position(kind, index)
        return self._replace(entries=(*self.entries[:at], *self.entries[at + 1 :]))

    def with_reserve(self, reserve_bytes: int | None) -> AuxMetadata:
        """With another reserve.

        Raises:
            StateError: ``cocoonfs-aux-full`` beyond 16 MiB, or below 0.
        """
        if reserve_bytes is not None and not 0 <= reserve_bytes <= MAX_AUX_BYTES:
            raise StateError("a reserve is 0 to 16 MiB", code="cocoonfs-aux-full", got=reserve_bytes)
        return self._replace(reserve_bytes=reserve_bytes)

    def _position(self, kind: uuid.UUID, index: int) -> int:
        found = [at for at, entry in enumerate(self.entries) if entry.kind == kind]
        if not 0 <= index < len(found):
            raise StateError(
                "there is no such auxiliary record",
                code="cocoonfs-no-such-aux",
                kind=str(kind),
                index=index,
                count=len(found),
            )
        return found[index]

    def _checked(self, entries: tuple[AuxEntry, ...]) -> AuxMetadata:
        made = self._replace(entries=entries)
        size = sum(_KIND_BYTES + _LENGTH_BYTES + len(entry.data) for entry in entries)
        if size > MAX_AUX_BYTES - _KIND_BYTES - _LENGTH_BYTES - _RESERVE_BYTES:
            raise StateError("auxiliary metadata is limited to 16 MiB", code="cocoonfs-aux-full", got=size)
        return made

    def pack(self) -> bytes:
        """The records and the terminator (CocoonFS §Payload encoding)."""
        parts = []
        for entry in self.entries:
            parts += [entry.kind.bytes, len(entry.data).to_bytes(_LENGTH_BYTES, "little"), entry.data]
        reserve = b"" if self.reserve_bytes is None else self.reserve_bytes.to_bytes(_RESERVE_BYTES, "little")
        return b"".join([*parts, _END, len(reserve).to_bytes(_LENGTH_BYTES, "little"), reserve])

    @staticmethod
    def parse(payload: Buffer) -> AuxMetadata:
        """Decode records that anybody may have written; an empty payload is no metadata.

        Records out of order are put in order instead of refused: version 0.1.2 of the reference program writes them so
        when it adds one in front of two or more, and then cannot read them itself.

        Raises:
            FormatError: ``cocoonfs-aux``.
        """
        if not len(payload):
            return NO_METADATA
        cursor = Cursor(payload, what="the auxiliary metadata")
        entries: list[AuxEntry] = []
        while True:
            if cursor.remaining < _KIND_BYTES + _LENGTH_BYTES:
                raise _malformed("end")
            kind = cursor.take(_KIND_BYTES)
            length = cursor.unsigned(_LENGTH_BYTES, "little")
            if length > cursor.remaining:
                raise _malformed("length")
            data = cursor.take(length)
            if kind == _END:
                break
            entries.append(AuxEntry(_kind(kind), data))
        if len(data) not in (0, _RESERVE_BYTES) or any(cursor.rest()):
            raise _malformed("end")
        entries.sort(key=lambda entry: entry.kind.bytes)
        reserve = int.from_bytes(data, "little") if data else None
        if reserve is not None and reserve > MAX_AUX_BYTES:
            raise _malformed("reserve")
        return AuxMetadata(tuple(entries), reserve)


NO_METADATA = AuxMetadata()
