# SPDX-License-Identifier: MIT OR Apache-2.0
"""The journal's log: its head extent, its fields, and the disguise of staging copies.

A log says where updated blocks wait (*staging*) and where they belong (*target*), which data blocks' digests
change, and gives just enough authenticated bitmap to rebuild the tree without trusting it. It lives in a chain of
extents whose head has a fixed place; the head's first device block is the switch between old and new.

Only layout here; writing a log is `transaction`, carrying one out is `replay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs import integrity
from svsm.storage.cocoonfs.encoding import (
    Extent,
    decode_extents_list,
    encode_extents_list,
    read_signed,
    read_unsigned,
    signed,
    unsigned,
)
from svsm.storage.cocoonfs.entities import Chain, Random, authentication_failure
from svsm.storage.cocoonfs.keys import BITMAP_DOMAIN, JOURNAL_DOMAIN, Keys
from svsm.storage.cocoonfs.layout import JOURNAL_MAGIC, ImageLayout, Subject
from svsm.storage.cocoonfs.primitives import CipherAlgorithm, cipher_algorithm, equal

__all__ = ["Copy", "Disguise", "JournalLog", "head_header", "is_active", "journal_chain", "protect_head"]

_SECTION = _SKIP = 8
_TREE, _BITMAP, _FRAGMENTS, _WRITES, _DIGESTS, _TRIM, _DISGUISE = range(1, 8)
_MANDATORY = (_TREE, _BITMAP, _FRAGMENTS, _WRITES, _DIGESTS)
_U64 = 1 << 64


def head_header(layout: ImageLayout, aux_pointers: bytes) -> bytes:
    """The head's plaintext header, integrity section still zero."""
    return JOURNAL_MAGIC + bytes(integrity.section_bytes(layout.io_bytes)) + aux_pointers


def journal_chain(layout: ImageLayout, keys: Keys) -> Chain:
    """How the log's extents are protected."""
    return Chain(
        layout,
        len(head_header(layout, bytes(16))),
        keys.preauth_mac(JOURNAL_DOMAIN),
        layout.pack() + b"\x00\x01",
        "journal",
    )


def protect_head(layout: ImageLayout, head: bytes) -> bytes:
    """The head as it goes to the disk."""
    return integrity.protect(head, section=_SECTION, head_skip=_SKIP, io_block_bytes=layout.io_bytes)


def is_active(layout: ImageLayout, head: bytes) -> bytes | None:
    """The head without its integrity protection where it holds a journal; None where there is none."""
    if head[: len(JOURNAL_MAGIC)] != JOURNAL_MAGIC:
        return None
    return integrity.unprotect(head, section=_SECTION, head_skip=_SKIP, io_block_bytes=layout.io_bytes)


class Copy(NamedTuple):
    """One record of the writes script, in IO blocks."""

    target: int
    staging: int
    length: int


@dataclass(frozen=True, slots=True)
class Disguise:
    """One-time encryption of staging copies, so that they cannot be matched with their targets."""

    cipher: CipherAlgorithm
    key: bytes = field(repr=False)
    iv_key: bytes = field(repr=False)

    @staticmethod
    def draw(cipher: CipherAlgorithm, random: Random) -> Disguise:
        """Fresh keys."""
        return Disguise(cipher, random(cipher.key_bytes), random(cipher.key_bytes))

    def _ivs(self, places: Sequence[tuple[int, int]]) -> bytes:
        size = self.cipher.block_bytes  # of a shorter cipher block: what is at the end, the staging place
        packed = b"".join(
            (target.to_bytes(8, "little") + staging.to_bytes(8, "little"))[-size:] for target, staging in places
        )
        return self.cipher.encrypt_single_blocks(self.iv_key, packed)

    def apply(self, content: bytes, places: Sequence[tuple[int, int]]) -> bytes:
        """Encrypt allocation blocks, each (target ab, staging ab) with its own IV."""
        if not places:
            return b""
        block = self.cipher.block_bytes
        size = len(content) // len(places)
        encrypt = self.cipher.encryptor(self.key)
        ivs = self._ivs(places)
        chained = bytes(block)
        out = []
        for index in range(len(places)):
            # One context for all: what it still chains from the block before is cancelled in the first input block.
            first = int.from_bytes(content[index * size : index * size + block], "little")
            first ^= int.from_bytes(ivs[index * block : (index + 1) * block], "little")
            first ^= int.from_bytes(chained, "little")
            sealed = encrypt(first.to_bytes(block, "little") + content[index * size + block : (index + 1) * size])
            chained = sealed[-block:]
            out.append(sealed)
        return b"".join(out)

    def remove(self, content: bytes, places: Sequence[tuple[int, int]]) -> bytes:
        """Decrypt what `apply` made."""
        if not places:
            return b""
        block = self.cipher.block_bytes
        size = len(content) // len(places)
        ivs = self._ivs(places)
        mixed = b"".join(
            ivs[index * block : (index + 1) * block] + content[index * size : (index + 1) * size]
            for index in range(len(places))
        )
        plain = self.cipher.decryptor(self.key)(mixed)
        stride = size + block
        return b"".join(plain[index * stride : index * stride + size] for index in range(len(places)))

    def pack(self) -> bytes:
        """The field's value."""
        return self.cipher.encoded + self.key + self.iv_key

    @staticmethod
    def parse(data: bytes) -> Disguise:
        """Decode the field's value.

        Raises:
            FormatError: ``cocoonfs-unsupported-cipher``, ``cursor-…``.
        """
        cursor = Cursor(data, what="the staging copies' disguise")
        cipher = cipher_algorithm(cursor.unsigned(2, "big"), cursor.unsigned(2, "big"))
        disguise = Disguise(cipher, cursor.take(cipher.key_bytes), cursor.take(cipher.key_bytes))
        cursor.finish()
        return disguise


def _malformed(what: str) -> FormatError:
    return FormatError("the journal's log is malformed", code="cocoonfs-format", field=what)


class JournalLog(NamedTuple):
    """A log's contents.

    Attributes:
        tree_extents: Of the authentication tree.
        bitmap_extents: Of the bitmap file.
        fragments: (physical ab of a data block of the bitmap file, its digest after the update), ascending.
        copies: The writes script, by target.
        digests: Physical ranges in ab of the data blocks whose digests change, ascending.
        trims: Ranges in IO blocks to discard afterwards; None where the log has no such field.
        disguise: Of the staging copies, or None.
    """

    tree_extents: tuple[Extent, ...]
    bitmap_extents: tuple[Extent, ...]
    fragments: tuple[tuple[int, bytes], ...]
    copies: tuple[Copy, ...]
    digests: tuple[Extent, ...]
    trims: tuple[Extent, ...] | None
    disguise: Disguise | None

    def pack(self, layout: ImageLayout, keys: Keys) -> bytes:
        """The log's payload."""
        bitmap_list = encode_extents_list(self.bitmap_extents)
        records = bytearray()
        end = 0
        for begin, digest in self.fragments:
            records += unsigned((begin - end) // layout.data_ab) + digest
            end = begin + layout.data_ab
        fields = [
            (_TREE, encode_extents_list(self.tree_extents)),
            (_BITMAP, bitmap_list),
            (_FRAGMENTS, bytes(records) + _fragments_mac(layout, keys, bitmap_list, bytes(records))),
            (_WRITES, _pack_copies(self.copies)),
            (_DIGESTS, _pack_ranges(self.digests, layout.data_ab)),
        ]
        if self.trims is not None:
            fields.append((_TRIM, _pack_ranges(self.trims, 1)))
        if self.disguise is not None:
            fields.append((_DISGUISE, self.disguise.pack()))
        return b"".join(unsigned(tag) + unsigned(len(value)) + value for tag, value in fields)

    @staticmethod
    def parse(payload: bytes, layout: ImageLayout, keys: Keys, *, limit_ab: int) -> JournalLog:
        """Decode an authentic payload; every place it names is below `limit_ab`.

        Raises:
            FormatError: ``cocoonfs-format``, ``cursor-truncated``.
            IntegrityError: ``cocoonfs-authentication``.
        """
        fields = _fields(payload)
        return JournalLog(
            tree_extents=decode_extents_list(fields[_TREE], limit_ab=limit_ab),
            bitmap_extents=decode_extents_list(fields[_BITMAP], limit_ab=limit_ab),
            fragments=_parse_fragments(layout, keys, fields[_BITMAP], fields[_FRAGMENTS], limit_ab),
            copies=_parse_copies(fields[_WRITES], limit_ab // layout.io_ab),
            digests=_parse_ranges(fields[_DIGESTS], layout.data_ab, limit_ab + layout.data_ab),
            trims=_parse_ranges(fields[_TRIM], 1, limit_ab // layout.io_ab) if _TRIM in fields else None,
            disguise=Disguise.parse(fields[_DISGUISE]) if _DISGUISE in fields else None,
        )


def _fields(payload: bytes) -> dict[int, bytes]:
    cursor = Cursor(payload, what="the journal's log")
    fields: dict[int, bytes] = {}
    while cursor.remaining:
        tag = read_unsigned(cursor)
        expected = _MANDATORY[len(fields)] if len(fields) < len(_MANDATORY) else None
        if tag in fields or (tag != expected if expected else tag not in (_TRIM, _DISGUISE)):
            raise _malformed("field order")
        fields[tag] = cursor.take(read_unsigned(cursor))
    if len(fields) < len(_MANDATORY):
        raise _malformed("missing field")
    return fields


def _fragments_mac(layout: ImageLayout, keys: Keys, bitmap_list: bytes, records: bytes) -> bytes:
    state = keys.preauth_mac(BITMAP_DOMAIN)
    state.update(layout.pack() + bitmap_list + records + bytes([0, _FRAGMENTS]) + Subject.JOURNAL_FIELD)
    return state.finalize()


def _parse_fragments(
    layout: ImageLayout, keys: Keys, bitmap_list: bytes, data: bytes, limit_ab: int
) -> tuple[tuple[int, bytes], ...]:
    mac_bytes = layout.preauth_hash.digest_bytes
    cursor = Cursor(data, what="the journal's bitmap digests")
    records = cursor.take(len(data) - mac_bytes)
    if not equal(cursor.rest(), _fragments_mac(layout, keys, bitmap_list, records)):
        raise authentication_failure("journal bitmap digests")
    cursor = Cursor(records, what="the journal's bitmap digests")
    fragments: list[tuple[int, bytes]] = []
    end = 0
    while cursor.remaining:
        begin = end + read_unsigned(cursor) * layout.data_ab
        end = begin + layout.data_ab
        if end > limit_ab:
            raise _malformed("bitmap digests")
        fragments.append((begin, cursor.take(layout.data_hash.digest_bytes)))
    return tuple(fragments)


def _pack_copies(copies: Sequence[Copy]) -> bytes:
    out = bytearray()
    target_end = staging_end = 0
    for copy in copies:
        out += unsigned(copy.target - target_end) + signed(copy.staging - staging_end) + unsigned(copy.length)
        target_end, staging_end = copy.target + copy.length, copy.staging + copy.length
    return bytes(out) + b"\0\0\0"


def _parse_copies(data: bytes, limit_io: int) -> tuple[Copy, ...]:
    cursor = Cursor(data, what="the journal's writes")
    copies: list[Copy] = []
    target_end = staging_end = 0
    while True:
        target, staging, length = read_unsigned(cursor), read_signed(cursor), read_unsigned(cursor)
        if length == 0:
            if target or staging:
                raise _malformed("writes")
            cursor.finish()
            break
        copy = Copy(target_end + target, (staging_end + staging) % _U64, length)
        target_end, staging_end = copy.target + length, copy.staging + length
        if target_end > limit_io or staging_end > limit_io:
            raise _malformed("writes")
        copies.append(copy)
    moved = [copy for copy in copies if copy.target != copy.staging]
    places = sorted([(copy.target, copy.length) for copy in copies] + [(copy.staging, copy.length) for copy in moved])
    if any(begin + length > following for (begin, length), (following, _) in pairwise(places)):
        raise _malformed("writes overlap")
    return tuple(copies)


def _pack_ranges(ranges: Sequence[Extent], unit: int) -> bytes:
    out = bytearray()
    end = 0
    for begin, length in ranges:
        out += unsigned((begin - end) // unit) + unsigned(length // unit)
        end = begin + length
    return bytes(out) + b"\0\0"


def _parse_ranges(data: bytes, unit: int, limit: int) -> tuple[Extent, ...]:
    cursor = Cursor(data, what="the journal's ranges")
    ranges: list[Extent] = []
    end = 0
    while True:
        gap, length = read_unsigned(cursor), read_unsigned(cursor)
        if length == 0:
            if gap:
                raise _malformed("ranges")
            cursor.finish()
            return tuple(ranges)
        begin = end + gap * unit
        end = begin + length * unit
        if end > limit:
            raise _malformed("ranges")
        ranges.append((begin, length * unit))
