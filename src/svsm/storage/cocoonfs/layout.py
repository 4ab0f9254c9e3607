# SPDX-License-Identifier: MIT OR Apache-2.0
"""CocoonFS's fixed structures: configuration, headers, magic numbers, and the ids that keep MACs and keys apart.

The configuration (`ImageLayout`) stands in clear text in the static header and is believed only as far as the keys
and the root digest, which both cover it, agree. Reading it therefore bounds every size before it is used.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError, PolicyError
from svsm.formats.record import U8, U16, Bytes, Record, record
from svsm.storage.cocoonfs import integrity
from svsm.storage.cocoonfs.primitives import (
    AES,
    SHA256,
    CipherAlgorithm,
    HashAlgorithm,
    cipher_algorithm,
    hash_algorithm,
)

__all__ = [
    "AUTH_TREE_INODE",
    "BITMAP_INODE",
    "CREATION_MAGIC",
    "DEFAULT_LAYOUT",
    "FIRST_USER_INODE",
    "FORMAT_VERSION",
    "INDEX_INODE",
    "JOURNAL_MAGIC",
    "MAGIC",
    "ImageLayout",
    "MutableHeader",
    "StaticHeader",
    "Subject",
    "align_up",
]

MAGIC = b"COCOONFS"
CREATION_MAGIC = b"CCFSMKFS"
JOURNAL_MAGIC = b"CCFSJRNL"
FORMAT_VERSION = 1

AUTH_TREE_INODE = 1
BITMAP_INODE = 2
INDEX_INODE = 3
FIRST_USER_INODE = 16

_STATIC_SECTION, _STATIC_SKIP = 31, 8
_COUNTER_BYTES = 16
_MAX_BLOCK_LOG2 = 6
_ADDRESS_BITS = 64
_MAX_BLOCK_BYTES = 64 << 20


class Subject:
    """The last byte of everything that is digested: what it is about."""

    IMAGE_CONTEXT = b"\x00\x01"
    TREE_ROOT = b"\x00\x02"
    TREE_NODE = b"\x00\x03"
    DATA_BLOCK = b"\x00\x04"
    CHAINED_EXTENTS = b"\x00\x05"
    INDEX_NODE = b"\x00\x06"
    JOURNAL_FIELD = b"\x00\x07"


def align_up(value: int, unit: int) -> int:
    """The least multiple of `unit` not below `value`."""
    return -(-value // unit) * unit


@record(size=21, byte_order="big")
class ImageLayout(Record):
    """The configuration, exactly as headers and digests contain it (CocoonFS §Static image header)."""

    allocation_block_size_128b_log2: U8
    io_block_allocation_blocks_log2: U8
    auth_tree_node_io_blocks_log2: U8
    auth_tree_data_block_allocation_blocks_log2: U8
    bitmap_file_block_allocation_blocks_log2: U8
    index_leaf_node_allocation_blocks_log2: U8
    index_internal_node_allocation_blocks_log2: U8
    auth_tree_node_hash: U16
    auth_tree_data_hmac_hash: U16
    auth_tree_root_hmac_hash: U16
    preauth_hmac_hash: U16
    kdf_hash: U16
    cipher_algorithm: U16
    cipher_key_bits: U16

    def validate(self) -> None:
        """Refuse sizes beyond the format's limits, blocks of more than 64 MiB, and algorithms that are not known.

        The format bounds the four sizes that are counted in bits of one bitmap word (64 allocation blocks), and lets
        every other size grow until it no longer fits 64 bits of bytes. The second limit is ours: a block is handled in
        one piece of memory, and a header in clear text must not be able to ask for any amount of it.

        Raises:
            FormatError: ``cocoonfs-layout``, ``cocoonfs-unsupported-layout``, ``cocoonfs-unsupported-hash``,
                ``cocoonfs-unsupported-cipher``.
        """
        within_64 = (
            self.io_block_allocation_blocks_log2,
            self.auth_tree_data_block_allocation_blocks_log2,
            self.index_leaf_node_allocation_blocks_log2,
            self.index_internal_node_allocation_blocks_log2,
        )
        unit_log2 = self.allocation_block_size_128b_log2 + 7
        largest_log2 = unit_log2 + max(
            *within_64,
            self.io_block_allocation_blocks_log2 + self.auth_tree_node_io_blocks_log2,
            self.bitmap_file_block_allocation_blocks_log2,
        )
        if max(within_64) > _MAX_BLOCK_LOG2 or largest_log2 >= _ADDRESS_BITS:
            raise FormatError("a block size is beyond the format's limits", code="cocoonfs-layout", got=self.pack())
        if largest_log2 >= _MAX_BLOCK_BYTES.bit_length():
            raise FormatError(
                "blocks of more than 64 MiB are not supported", code="cocoonfs-unsupported-layout", got=self.pack()
            )
        for hash_id in self._hash_ids():
            hash_algorithm(hash_id)
        if min(self.node_bytes // (2 * h.digest_bytes) for h in (self.node_hash, self.data_hash)) < 1:
            raise FormatError("an authentication tree node holds no two digests", code="cocoonfs-layout")
        _ = self.cipher

    def _hash_ids(self) -> tuple[int, ...]:
        return (
            self.auth_tree_node_hash,
            self.auth_tree_data_hmac_hash,
            self.auth_tree_root_hmac_hash,
            self.preauth_hmac_hash,
            self.kdf_hash,
        )

    def refuse_weak(self) -> None:
        """Refuse SHA-1 and TDES; `validate` comes first.

        Raises:
            PolicyError: ``cocoonfs-weak``.
        """
        if self.cipher.weak or any(hash_algorithm(hash_id).weak for hash_id in self._hash_ids()):
            raise PolicyError(
                "this configuration uses SHA-1 or TDES",
                code="cocoonfs-weak",
                hint="choose SHA-2, SHA-3 or SM3 with AES, Camellia or SM4, or allow weak algorithms explicitly",
                got=self.pack(),
            )

    @property
    def ab_bytes(self) -> int:
        """Allocation block size in bytes."""
        return 128 << self.allocation_block_size_128b_log2

    @property
    def io_ab(self) -> int:
        """IO block size in ab."""
        return 1 << self.io_block_allocation_blocks_log2

    @property
    def io_bytes(self) -> int:
        """IO block size in bytes."""
        return self.ab_bytes << self.io_block_allocation_blocks_log2

    @property
    def data_ab(self) -> int:
        """Authentication tree data block size in ab."""
        return 1 << self.auth_tree_data_block_allocation_blocks_log2

    @property
    def journal_ab(self) -> int:
        """The larger of IO block and data block, in ab: what journal and metadata extents align to."""
        return max(self.io_ab, self.data_ab)

    @property
    def node_ab(self) -> int:
        """Authentication tree node size in ab."""
        return self.io_ab << self.auth_tree_node_io_blocks_log2

    @property
    def node_bytes(self) -> int:
        """Authentication tree node size in bytes."""
        return self.node_ab * self.ab_bytes

    @property
    def bitmap_ab(self) -> int:
        """Bitmap file block size in ab."""
        return 1 << self.bitmap_file_block_allocation_blocks_log2

    @property
    def leaf_ab(self) -> int:
        """Index leaf node size in ab."""
        return 1 << self.index_leaf_node_allocation_blocks_log2

    @property
    def internal_ab(self) -> int:
        """Index internal node size in ab."""
        return 1 << self.index_internal_node_allocation_blocks_log2

    @property
    def node_hash(self) -> HashAlgorithm:
        """Hash of the tree's nodes below the root."""
        return hash_algorithm(self.auth_tree_node_hash)

    @property
    def data_hash(self) -> HashAlgorithm:
        """Hash of the data blocks' MACs."""
        return hash_algorithm(self.auth_tree_data_hmac_hash)

    @property
    def root_hash(self) -> HashAlgorithm:
        """Hash of the root MAC."""
        return hash_algorithm(self.auth_tree_root_hmac_hash)

    @property
    def preauth_hash(self) -> HashAlgorithm:
        """Hash of the MACs that protect what is decrypted before the tree can be checked."""
        return hash_algorithm(self.preauth_hmac_hash)

    @property
    def cipher(self) -> CipherAlgorithm:
        """The block cipher, always in CBC mode."""
        return cipher_algorithm(self.cipher_algorithm, self.cipher_key_bits)


DEFAULT_LAYOUT = ImageLayout(0, 2, 1, 2, 2, 0, 0, SHA256, SHA256, SHA256, SHA256, SHA256, AES, 128)
"""What the reference program's ``mkfs -H sha2 -C aes -t 128`` chooses."""


@record(size=31, byte_order="little")
class _StaticPrefix(Record):
    magic: Annotated[bytes, Bytes(8)]
    version: U8
    layout: Annotated[bytes, Bytes(21)]
    salt_length: U8


class StaticHeader(NamedTuple):
    """The header at offset 0, written once: configuration and salt."""

    layout: ImageLayout
    salt: bytes

    @property
    def size_bytes(self) -> int:
        """Length on the disk: whole IO blocks."""
        io_bytes = self.layout.io_bytes
        return align_up(_StaticPrefix.SIZE + integrity.section_bytes(io_bytes) + len(self.salt), io_bytes)

    def pack(self) -> bytes:
        """The header with its integrity protection, padded to whole IO blocks."""
        io_bytes = self.layout.io_bytes
        prefix = _StaticPrefix(MAGIC, FORMAT_VERSION, self.layout.pack(), len(self.salt)).pack()
        plain = prefix + bytes(integrity.section_bytes(io_bytes)) + self.salt
        return integrity.protect(
            plain.ljust(self.size_bytes, b"\0"),
            section=_STATIC_SECTION,
            head_skip=_STATIC_SKIP,
            io_block_bytes=io_bytes,
        )

    @staticmethod
    def measure(head: bytes) -> StaticHeader:
        """A header with configuration and a salt of the right length (not its contents), from the first 128 bytes.

        Raises:
            FormatError: ``cocoonfs-no-magic``, ``cocoonfs-header``, ``cocoonfs-layout``, ``cocoonfs-unsupported-…``.
        """
        if head[: len(MAGIC)] != MAGIC:
            raise FormatError(
                "there is no CocoonFS volume here",
                code="cocoonfs-no-magic",
                hint="check that it is the right disk; `svsm volume create` makes a new volume",
                got=head[: len(MAGIC)] or "nothing",
            )
        plain = integrity.tier0(head, section=_STATIC_SECTION, head_skip=_STATIC_SKIP)
        if plain is None:
            raise _bad_header("integrity")
        prefix = _StaticPrefix.parse_at(plain, 0)
        if prefix.version != FORMAT_VERSION:
            raise FormatError(
                "this version of the format is not supported", code="cocoonfs-unsupported-version", got=prefix.version
            )
        layout = ImageLayout.parse(prefix.layout)
        layout.validate()
        return StaticHeader(layout, bytes(prefix.salt_length))

    def parse_contents(self, data: bytes) -> StaticHeader:
        """The complete header from its `size_bytes` bytes; `self` is what `measure` gave.

        Raises:
            FormatError: ``cocoonfs-header``.
        """
        io_bytes = self.layout.io_bytes
        plain = integrity.unprotect(data, section=_STATIC_SECTION, head_skip=_STATIC_SKIP, io_block_bytes=io_bytes)
        if plain is None:
            raise _bad_header("integrity")
        cursor = Cursor(plain, what="the static header")
        cursor.take(_StaticPrefix.SIZE + integrity.section_bytes(io_bytes))
        salt = cursor.take(len(self.salt))
        if any(cursor.rest()):
            raise _bad_header("padding")
        return StaticHeader(self.layout, salt)


def _bad_header(field: str) -> FormatError:
    return FormatError("the static header is damaged", code="cocoonfs-header", field=field)


class MutableHeader(NamedTuple):
    """The header that each commit rewrites through the journal; nothing in it is believed before it is checked."""

    aux_pointers: bytes
    root_hmac: bytes
    encrypted_counter: bytes
    entry_leaf_hmac: bytes
    entry_leaf_pointer: bytes
    image_ab: int

    @staticmethod
    def size_bytes(layout: ImageLayout) -> int:
        """Packed length without padding."""
        return 32 + layout.root_hash.digest_bytes + _COUNTER_BYTES + layout.preauth_hash.digest_bytes

    def pack(self, layout: ImageLayout) -> bytes:
        """The header, padded to whole allocation blocks."""
        packed = (
            self.aux_pointers
            + self.root_hmac
            + self.encrypted_counter
            + self.entry_leaf_hmac
            + self.entry_leaf_pointer
            + self.image_ab.to_bytes(8, "little")
        )
        return packed.ljust(align_up(len(packed), layout.ab_bytes), b"\0")

    @staticmethod
    def parse(data: bytes, layout: ImageLayout) -> MutableHeader:
        """Decode; `data` may have padding behind the header.

        Raises:
            FormatError: ``cocoonfs-format``, ``cursor-truncated``.
        """
        cursor = Cursor(data, what="the mutable header")
        header = MutableHeader(
            aux_pointers=cursor.take(16),
            root_hmac=cursor.take(layout.root_hash.digest_bytes),
            encrypted_counter=cursor.take(_COUNTER_BYTES),
            entry_leaf_hmac=cursor.take(layout.preauth_hash.digest_bytes),
            entry_leaf_pointer=cursor.take(8),
            image_ab=cursor.unsigned(8, "little"),
        )
        if header.image_ab % layout.io_ab or not 0 < header.image_ab < 1 << 56:
            raise FormatError(
                "the image size in the mutable header is malformed", code="cocoonfs-format", got=header.image_ab
            )
        return header
