# SPDX-License-Identifier: MIT OR Apache-2.0
"""A second reading of the CocoonFS format: just enough to read a clean image, and to check every digest in it.

Written from the format's text (coconut-svsm/cocoon-tpm at 1064bc3, `cocoonfs-format.md`), apart from the library
and importing nothing of it, so that an error of reading there does not come back here. Slow and plain on purpose:
whole image in memory, no journal, no writing.

Where the text and the reference program's images disagree the images win. The differences met:

* NIL pointers are all ones, not all zeros;
* the subdomains of an inode's keys are 1 for its extents list and 2 for its data, not the other way round;
* the root key's context has the identifier of the mode (CBC, 0x0042) before the cipher's, and as many bits are asked
  for as the KDF's hash has, not 512;
* in chained extents the tag stands before the IV, and the context has the length of the associated data and the
  cipher's identifier as well.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cryptography.hazmat.decrepit.ciphers.algorithms import Camellia
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm, Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES, SM4
from cryptography.hazmat.primitives.ciphers.modes import CBC
from cryptography.hazmat.primitives.hmac import HMAC

__all__ = ["Mismatch", "SecondReading"]

_HASHES: dict[int, type[hashes.HashAlgorithm]] = {
    0x0B: hashes.SHA256,
    0x0C: hashes.SHA384,
    0x0D: hashes.SHA512,
    0x12: hashes.SM3,
    0x27: hashes.SHA3_256,
    0x28: hashes.SHA3_384,
    0x29: hashes.SHA3_512,
}
_CIPHERS: dict[int, Callable[[bytes], BlockCipherAlgorithm]] = {0x06: AES, 0x13: SM4, 0x26: Camellia}
_NIL = (1 << 64) - 1
_IV = 16
_LIST, _DATA = 1, 2  # subdomains
_DERIVE, _ROOT, _BLOCKS, _INLINE, _ENCRYPT = range(1, 6)  # purposes of keys

Extent = tuple[int, int]


class Mismatch(Exception):
    """The image is not what the format says."""


def _same(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise Mismatch(what)


def _mac(algorithm: int, key: bytes, *parts: bytes) -> bytes:
    state = HMAC(key, _HASHES[algorithm]())
    for part in parts:
        state.update(part)
    return state.finalize()


def _hash(algorithm: int, *parts: bytes) -> bytes:
    state = hashes.Hash(_HASHES[algorithm]())
    for part in parts:
        state.update(part)
    return state.finalize()


def _length(algorithm: int) -> int:
    return _HASHES[algorithm]().digest_size


def _kdf(algorithm: int, key: bytes, purpose: int, context: bytes, bits: int) -> bytes:
    out, turn = b"", 0
    while 8 * len(out) < bits:
        turn += 1
        out += _mac(algorithm, key, turn.to_bytes(4, "big"), bytes([purpose, 0]), context, bits.to_bytes(4, "big"))
    return out[: bits // 8]


def _le(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _checksum(data: bytes) -> bytes:
    swapped = bytes((byte & 0x55) << 1 | (byte & 0xAA) >> 1 for byte in data)
    return zlib.crc32(data).to_bytes(4, "little") + zlib.crc32(swapped).to_bytes(4, "little")


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _leb(data: bytes, at: int, *, signed: bool) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return (value - (1 << shift) if signed and byte & 0x40 else value), at


def _pack_leb(value: int, *, signed: bool) -> bytes:
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        if (value == 0 and not (signed and byte & 0x40)) or (signed and value == -1 and byte & 0x40):
            return bytes([*out, byte])
        out.append(byte | 0x80)


def _extents_list(data: bytes) -> list[Extent]:
    extents: list[Extent] = []
    at = end = 0
    while data[at : at + 2] != b"\0\0":
        delta, at = _leb(data, at, signed=True)
        length, at = _leb(data, at, signed=False)
        extents.append((end + delta, length))
        end += delta + length
    return extents


def _pack_extents(extents: list[Extent]) -> bytes:
    out, end = b"", 0
    for begin, length in extents:
        out += _pack_leb(begin - end, signed=True) + _pack_leb(length, signed=False)
        end = begin + length
    return out + b"\0\0"


def _unpad(data: bytes) -> bytes:
    stripped = data.rstrip(b"\0")
    count = stripped[-1]
    _same(stripped[-count:], bytes([count]) * count, "PKCS#7 padding")
    return stripped[:-count]


@dataclass(frozen=True)
class _Pointer:
    begin: int
    length: int
    indirect: bool

    @staticmethod
    def of(data: bytes) -> _Pointer | None:
        value = _le(data)
        return None if value == _NIL else _Pointer(value >> 7, (value >> 1 & 63) + 1, bool(value & 1))


class SecondReading:
    """An image, read with its key; every digest in it is checked.

    Attributes:
        files: inode -> (flags, contents).
        digests: How many digests were recomputed.
    """

    def __init__(self, image: bytes, key: bytes) -> None:
        self._image = image
        self.digests = 0
        self._static_header()
        self._root_key(key)
        self._mutable_header()
        leaf = self._entry_leaf()
        self._special(leaf)
        self._bitmap()
        self._tree()
        self.files = {inode: (flags, self._file(inode, pointer)) for inode, flags, pointer in self._entries(leaf)}

    def _ab(self, begin: int, length: int = 1) -> bytes:
        return self._image[begin * self._unit : (begin + length) * self._unit]

    # -- headers and keys --------------------------------------------------------------------------------------

    def _static_header(self) -> None:
        head = self._image[:128]
        _same(head[:8], b"COCOONFS", "magic")
        if 0 in head[8:]:
            raise Mismatch("a torn static header")
        plain = self._unmask(head, section=31, skip=8)
        _same(plain[8], 1, "version")
        self._layout = plain[9:30]
        logs = self._layout[:7]
        self._unit = 128 << logs[0]
        self._io, self._node, self._block, self._bitmap_ab, self._leaf_ab, self._inner_ab = (
            1 << logs[1],
            1 << logs[1] + logs[2],
            1 << logs[3],
            1 << logs[4],
            1 << logs[5],
            1 << logs[6],
        )
        self._hashes = [int.from_bytes(self._layout[at : at + 2], "big") for at in range(7, 17, 2)]
        self._node_hash, self._data_hash, self._root_hash, self._inline_hash, self._kdf_hash = self._hashes
        self._cipher_id = self._layout[17:21]
        self._journal_unit = max(self._io, self._block)
        self._slots = logs[0] + logs[1]
        begin = 31 + 9 + 8 * self._slots
        length = _up(begin + plain[30], self._unit * self._io)
        header = self._protected(self._image[:length], section=31, skip=8)
        self._salt = header[begin : begin + plain[30]]
        self._header_at = length // self._unit

    @staticmethod
    def _unmask(head: bytes, *, section: int, skip: int) -> bytes:
        mask = head[section + 8]
        kept = range(section, section + 9)
        return bytes(byte if at < skip or at in kept else byte ^ mask for at, byte in enumerate(head[:128]))

    def _protected(self, extent: bytes, *, section: int, skip: int) -> bytes:
        """The extent without its integrity protection."""
        commit, mask = extent[section : section + 8], extent[section + 8]
        data = bytearray(self._unmask(extent, section=section, skip=skip) + extent[128:])
        for slot in range(self._slots):
            marker = (256 << slot) - 8
            _same(extent[marker : marker + 8], commit, "completion marker")
            data[marker : marker + 8] = data[section + 9 + 8 * slot : section + 17 + 8 * slot]
        data[section : section + 9 + 8 * self._slots] = bytes(9 + 8 * self._slots)
        _same(bytes(byte ^ mask for byte in _checksum(bytes(data))), commit, "checksum")
        return bytes(data)

    def _root_key(self, key: bytes) -> None:
        ordered = (self._kdf_hash, self._root_hash, self._node_hash, self._data_hash, self._inline_hash)
        context = b"COCOONFS\x01" + b"".join(one.to_bytes(2, "big") for one in ordered)
        context += b"\x00\x42" + self._cipher_id + bytes([len(self._salt)]) + self._salt
        self._key = _kdf(0x0D, key, _DERIVE, context, 8 * _length(self._kdf_hash))

    def _subkey(self, purpose: int, domain: int, subdomain: int) -> bytes:
        sizes = {_ROOT: self._root_hash, _BLOCKS: self._data_hash, _INLINE: self._inline_hash}
        bits = int.from_bytes(self._cipher_id[2:], "big") if purpose == _ENCRYPT else 8 * _length(sizes[purpose])
        context = domain.to_bytes(8, "little") + subdomain.to_bytes(4, "little")
        return _kdf(self._kdf_hash, self._key, purpose, context, bits)

    def _decrypt(self, inode: int, subdomain: int, iv: bytes, data: bytes) -> bytes:
        cipher = _CIPHERS[int.from_bytes(self._cipher_id[:2], "big")]
        algorithm = cipher(self._subkey(_ENCRYPT, inode, subdomain))
        return Cipher(algorithm, CBC(iv)).decryptor().update(data[: len(data) // 16 * 16])

    def _mutable_header(self) -> None:
        root, leaf = _length(self._root_hash), _length(self._inline_hash)
        length = 16 + root + 16 + leaf + 16
        self._header_end = self._header_at + _up(length, self._unit) // self._unit
        data = self._ab(self._header_at, self._header_end - self._header_at)
        self._aux_pointers = data[:16]
        self._root_mac, data = data[16 : 16 + root], data[16 + root :]
        self._counter, self._leaf_mac = data[:16], data[16 : 16 + leaf]
        self._leaf_pointer, size = data[16 + leaf : 24 + leaf], data[24 + leaf : 32 + leaf]
        self._size = _le(size)
        journal = _up(self._header_end, self._journal_unit)
        least = 8 + 9 + 8 * self._slots + 16 + leaf + _IV + 16  # pointer and padding fill one cipher block
        self._journal = (journal, _up(_up(least, self._unit) // self._unit, self._journal_unit))

    # -- index -------------------------------------------------------------------------------------------------

    def _entry_leaf(self) -> int:
        begin = _le(self._leaf_pointer) >> 7
        raw = self._ab(begin, self._leaf_ab)
        mac = _mac(self._inline_hash, self._subkey(_INLINE, 3, _DATA), raw, self._cipher_id, b"\0\6")
        _same(mac, self._leaf_mac, "entry leaf's digest")
        self.digests += 1
        return begin

    def _leaf(self, begin: int) -> tuple[int, list[tuple[int, int, bytes]]]:
        """Where the next leaf is (NIL at the end), and (inode, flags, pointer) of each entry."""
        raw = self._ab(begin, self._leaf_ab)
        plain = self._decrypt(3, _DATA, raw[:_IV], raw[_IV:])
        count = (len(raw) - _IV) // 16 * 16
        count = (count - 12) // 20
        _same(_le(plain[8 + 20 * count : 12 + 20 * count]), 1, "a leaf's level")
        entries = []
        for at in range(count):
            inode = _le(plain[8 + 8 * count + 8 * at :][:8])
            if inode:
                flags = _le(plain[8 + 16 * count + 4 * at :][:4])
                entries.append((inode, flags, plain[8 + 8 * at : 16 + 8 * at]))
        return _le(plain[:8]), entries

    def _entries(self, leaf: int) -> Iterator[tuple[int, int, bytes]]:
        following, last = leaf << 7, 0
        while following != _NIL:
            following, entries = self._leaf(following >> 7)
            for inode, flags, pointer in entries:
                if inode <= last:
                    raise Mismatch("the index is not in order")
                last = inode
                if inode >= 16:
                    yield inode, flags, pointer

    def _special(self, leaf: int) -> None:
        found = {inode: pointer for inode, _, pointer in self._leaf(leaf)[1]}
        self._tree_extents, self._bitmap_extents = (self._extents(inode, found[inode]) for inode in (1, 2))

    # -- files -------------------------------------------------------------------------------------------------

    def _extents(self, inode: int, packed: bytes) -> list[Extent]:
        pointer = _Pointer.of(packed)
        if pointer is None:
            raise Mismatch("an inode without an extent")
        if not pointer.indirect:
            return [(pointer.begin, pointer.length)]
        return _extents_list(self._chain(inode, pointer))

    def _chain(self, inode: int, pointer: _Pointer) -> bytes:
        """The payload of chained extents; those of inodes 1 and 2 carry tags."""
        tag_length = _length(self._inline_hash) if inode in (1, 2) else 0
        payload, previous, iv = b"", b"", b""
        following: _Pointer | None = pointer
        while following is not None:
            raw = self._ab(following.begin, following.length)
            first = not iv
            tag, rest = raw[:tag_length], raw[tag_length:]
            if first:
                iv, rest = rest[:_IV], rest[_IV:]
            pad = len(rest) % 16
            if tag_length:
                self._check_tag(inode, tag, raw[tag_length:], previous, iv)
            plain = self._decrypt(inode, _LIST, iv, rest[pad:])
            previous, iv = tag, rest[-16:]
            following = _Pointer.of(plain[:8])
            payload += (_unpad(plain) if following is None else plain)[8:]
        return payload

    def _check_tag(self, inode: int, tag: bytes, rest: bytes, previous: bytes, iv: bytes) -> None:
        aad = inode.to_bytes(8, "little") + b"\0\2"
        continued = bool(previous)
        context = (iv if continued else b"") + aad + len(aad).to_bytes(8, "little") + self._cipher_id
        key = self._subkey(_INLINE, inode, _LIST)
        before = previous if continued else bytes(len(tag))
        _same(_mac(self._inline_hash, key, before, rest, context, bytes([continued, 0, 5])), tag, "inline tag")
        self.digests += 1

    def _file(self, inode: int, pointer: bytes) -> bytes:
        data, iv = b"", b""
        for begin, length in self._extents(inode, pointer):
            raw = self._ab(begin, length)
            if not iv:
                iv, raw = raw[:_IV], raw[_IV:]
            data += raw[len(raw) % 16 :]
        return _unpad(self._decrypt(inode, _DATA, iv, data))

    # -- allocation and authentication -------------------------------------------------------------------------

    def _bitmap(self) -> None:
        bits = b""
        for begin, length in self._bitmap_extents:
            for at in range(begin, begin + length, self._bitmap_ab):
                raw = self._ab(at, self._bitmap_ab)
                plain = self._decrypt(2, _DATA, raw[:_IV], raw[_IV:])
                bits += plain[: len(plain) // 8 * 8]
        self._used = [bool(bits[at >> 3] >> (at & 7) & 1) for at in range(self._size)]
        apart = [(0, self._header_end), self._journal, *self._aux_extents()]
        for begin, length in apart:
            self._used[begin : begin + length] = [False] * length

    def _aux_extents(self) -> list[Extent]:
        heads = [_Pointer.of(self._aux_pointers[at : at + 8]) for at in (0, 8)]
        extents: list[Extent] = []
        pointer = heads[0]
        while pointer is not None and (pointer.begin, pointer.length) not in extents:
            extents.append((pointer.begin, pointer.length))
            section = 17 if pointer in heads else 16
            pointer = _Pointer.of(self._unmask(self._ab(pointer.begin), section=section, skip=0)[:8])
        return extents

    def _data_places(self) -> list[int]:
        """Allocation blocks outside of the tree, in order: the domain of the data blocks."""
        inside = {at for begin, length in self._tree_extents for at in range(begin, begin + length)}
        return [at for at in range(self._size) if at not in inside]

    def _tree(self) -> None:
        self._places = self._data_places()
        self._blocks = -(-len(self._places) // self._block)
        node_bytes = self._node * self._unit
        self._fan = (node_bytes // _length(self._node_hash)).bit_length() - 1
        self._leaf_fan = (node_bytes // _length(self._data_hash)).bit_length() - 1
        self._nodes = [
            self._ab(at, self._node)
            for begin, length in self._tree_extents
            for at in range(begin, begin + length, self._node)
        ]
        count = len(self._nodes)
        leaves = count - (count - 1 >> self._fan)
        top = -(-(leaves - 1).bit_length() // self._fan)
        self._block_key = self._subkey(_BLOCKS, 1, 0)
        self._next_node = 0
        root = self._visit(top, 0)
        key = self._subkey(_ROOT, 1, 0)
        size = self._size.to_bytes(8, "little")
        lists = _pack_extents(self._tree_extents) + _pack_extents(self._bitmap_extents)
        parts = (b"COCOONFS\x01", self._layout, self._leaf_pointer, size, lists, b"\0\1")
        context = _mac(self._root_hash, key, *parts)
        mac = _mac(self._root_hash, key, root, self._node_id(top, 0), self._counter, context, b"\0\2")
        _same(mac, self._root_mac, "root digest")
        self.digests += 2

    def _node_id(self, level: int, first: int) -> bytes:
        bits = self._leaf_fan + self._fan * level
        fan = self._fan if level else self._leaf_fan
        return ((first | ((1 << fan) - 1) << (bits - fan)) & _NIL).to_bytes(8, "little")

    def _visit(self, level: int, first: int) -> bytes:
        """The digests in a node, each of which was compared with what it is the digest of; nodes come in pre-order."""
        node, self._next_node = self._nodes[self._next_node], self._next_node + 1
        fan, size = (self._fan, _length(self._node_hash)) if level else (self._leaf_fan, _length(self._data_hash))
        step = 1 << (self._leaf_fan + self._fan * (level - 1)) if level else 1
        for entry in range(1 << fan):
            block = first + entry * step
            found = node[entry * size : (entry + 1) * size]
            if block >= self._blocks:
                _same(found, bytes(size), "an unused digest")
            elif level:
                below = self._visit(level - 1, block)
                _same(_hash(self._node_hash, below, self._node_id(level - 1, block), b"\0\3"), found, "node digest")
            else:
                _same(self._block_digest(block), found, f"digest of data block {block}")
            self.digests += 1
        return node[: size << fan]

    def _block_digest(self, block: int) -> bytes:
        places = self._places[block * self._block : (block + 1) * self._block]
        contents = b"".join(self._ab(at) for at in places if self._used[at])
        states = sum(self._used[at] << number for number, at in enumerate(places))
        tail = states.to_bytes(8, "little") + block.to_bytes(8, "little") + b"\0\4"
        return _mac(self._data_hash, self._block_key, contents, tail)
