# SPDX-License-Identifier: MIT OR Apache-2.0
"""The format's pieces by themselves: published vectors, round trips, and hostile bytes."""

from __future__ import annotations

import contextlib
import hashlib
import hmac as stdlib_hmac

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svsm.formats.cursor import Cursor
from svsm.formats.errors import FormatError, IntegrityError, SvsmError
from svsm.storage.cocoonfs import Volume, integrity
from svsm.storage.cocoonfs.allocation import Space
from svsm.storage.cocoonfs.blockmap import BlockMap, pack_states, parse_states
from svsm.storage.cocoonfs.encoding import (
    NIL,
    decode_block_pointer,
    decode_extent_pointer,
    decode_extents_list,
    encode_block_pointer,
    encode_extent_pointer,
    encode_extents_list,
    merge_ranges,
    read_signed,
    read_unsigned,
    signed,
    unsigned,
)
from svsm.storage.cocoonfs.entities import decrypt_extents, encrypt_extents, extents_bytes_needed
from svsm.storage.cocoonfs.geometry import FixedPlaces, TreeGeometry, plan_tree
from svsm.storage.cocoonfs.index import NodeFormat
from svsm.storage.cocoonfs.journal import Disguise, JournalLog
from svsm.storage.cocoonfs.keys import Keys
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT, ImageLayout, MutableHeader, StaticHeader
from svsm.storage.cocoonfs.primitives import checksum, cipher_algorithm, hash_algorithm, kdf_a
from svsm.storage.drivers.memory import MemoryDevice

LIMIT = 1 << 20
STATIC = StaticHeader(DEFAULT_LAYOUT, b"\xdd\xee\xff")
EXTENTS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 200)), max_size=20)


def test_default_layout_is_what_the_reference_program_chooses() -> None:
    assert DEFAULT_LAYOUT.pack().hex() == "00020102020000" + "000b" * 5 + "00060080"
    places = FixedPlaces.of(STATIC)
    assert (places.header_begin_ab, places.header_end_ab, places.journal_head) == (4, 5, (8, 4))
    for size, nodes, data_blocks, levels in [(8 << 20, 498, 15388, 3), (128 << 20, 7946, 246252, 4)]:
        assert plan_tree(DEFAULT_LAYOUT, size // 128) == (nodes, 0)
        geometry = TreeGeometry(DEFAULT_LAYOUT, [(12, nodes * 8)], size // 128)
        assert (geometry.levels, geometry.data_blocks) == (levels, data_blocks)


def test_kdf_a_by_its_definition() -> None:
    """SP 800-108 in counter mode as TPM 2.0 part 1 writes it, computed with the standard library."""
    for name, tcg_id in (("sha256", 0x000B), ("sha512", 0x000D)):
        for bits in (128, 256, 1024):
            expected = b""
            for counter in range(1, 10):
                block = counter.to_bytes(4, "big") + b"\x04" + b"\0" + b"context" + bits.to_bytes(4, "big")
                expected += stdlib_hmac.new(b"key", block, name).digest()
            made = kdf_a(hash_algorithm(tcg_id), b"key", b"\x04", b"context", bits)
            assert made == expected[: bits // 8]


def test_checksum() -> None:
    assert checksum(b"123456789")[:4] == (0xCBF43926).to_bytes(4, "little")
    assert checksum(b"\x01") != checksum(b"\x02")


@pytest.mark.parametrize("number", [0, 1, 63, 64, 127, 128, 300, 1 << 32, (1 << 63) - 1])
def test_leb128(number: int) -> None:
    for value in (number, (1 << 64) - 1 - number):
        assert read_unsigned(Cursor(unsigned(value), what="x")) == value
    for value in (number, -number, -number - 1):
        assert read_signed(Cursor(signed(value), what="x")) == value
    assert unsigned(0) == signed(0) == b"\0"
    assert read_unsigned(Cursor(b"\x80\x80\x00", what="x")) == 0  # overlong is accepted


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 10, b"\xff" * 9 + b"\x7f", b"\x80" * 11])
def test_leb128_refusals(data: bytes) -> None:
    for read in (read_unsigned, read_signed):
        if read is read_signed and data == b"\xff" * 9 + b"\x7f":
            continue  # -1, overlong
        with pytest.raises(FormatError):
            read(Cursor(data, what="x"))


@given(EXTENTS)
def test_extents_list(gaps: list[tuple[int, int]]) -> None:
    extents = []
    end = 0
    for gap, length in gaps:
        extents.append((end + gap, length))
        end += gap + length
    shuffled = extents[::2] + extents[1::2]
    assert decode_extents_list(encode_extents_list(shuffled), limit_ab=LIMIT) == tuple(shuffled)
    assert merge_ranges(shuffled) == extents


@given(st.binary(max_size=60))
def test_hostile_lists_and_pointers(data: bytes) -> None:
    try:
        extents = decode_extents_list(data, limit_ab=LIMIT)
        assert all(begin + length <= LIMIT for begin, length in extents)
    except FormatError:
        pass
    for decode in (
        lambda raw: decode_extent_pointer(raw, limit_ab=LIMIT),
        lambda raw: decode_block_pointer(raw, length_ab=4, limit_ab=LIMIT),
    ):
        with contextlib.suppress(FormatError):
            decode(data[:8].ljust(8, b"\0"))


def test_pointers() -> None:
    assert encode_extent_pointer((5, 64), indirect=True) == (5 << 7 | 63 << 1 | 1).to_bytes(8, "little")
    assert decode_extent_pointer(encode_extent_pointer((5, 64), indirect=True), limit_ab=69) == ((5, 64), True)
    assert decode_extent_pointer(NIL, limit_ab=1) is None
    assert encode_extent_pointer(None) == encode_block_pointer(None) == NIL
    with pytest.raises(FormatError):
        encode_extent_pointer((0, 65))
    with pytest.raises(FormatError):
        decode_extent_pointer(encode_extent_pointer((5, 64)), limit_ab=68)
    with pytest.raises(FormatError):
        decode_block_pointer((5 << 7 | 1).to_bytes(8, "little"), length_ab=1, limit_ab=10)


@given(st.binary(min_size=1, max_size=200))
def test_states(words: bytes) -> None:
    states = parse_states(words)
    assert pack_states(states) == words
    assert sum(states) == int.from_bytes(words, "little").bit_count()


@given(st.integers(0, 4).map(lambda log2: 128 << log2), st.binary(min_size=100, max_size=512))
def test_integrity(io_bytes: int, head: bytes) -> None:
    plain = (b"MAGICMAG" + bytes(integrity.section_bytes(io_bytes)) + head).ljust(2 * io_bytes, b"\0")
    plain = plain[: 2 * io_bytes]
    sealed = integrity.protect(plain, section=8, head_skip=8, io_block_bytes=io_bytes)
    assert integrity.unprotect(sealed, section=8, head_skip=8, io_block_bytes=io_bytes) == plain
    assert 0 not in sealed[8:128]


def test_integrity_notices_torn_writes() -> None:
    """Any proper subset of the 128-byte pieces over zeros or over an older version is noticed."""
    old, new = (
        integrity.protect(
            b"MAGICMAG" + bytes(25) + hashlib.shake_128(seed).digest(479), section=8, head_skip=8, io_block_bytes=512
        )
        for seed in (b"old", b"new")
    )
    for before in (bytes(512), old):
        for subset in range(15):
            mixed = b"".join(
                (new if subset >> piece & 1 else before)[piece * 128 : (piece + 1) * 128] for piece in range(4)
            )
            found = integrity.unprotect(mixed, section=8, head_skip=8, io_block_bytes=512)
            assert found is None or mixed == before


@given(st.binary(min_size=512, max_size=512))
def test_hostile_static_header(data: bytes) -> None:
    for head in (data, b"COCOONFS\x01" + data[9:]):
        with contextlib.suppress(FormatError):
            measured = StaticHeader.measure(head[:128])
            measured.parse_contents(head.ljust(measured.size_bytes, b"\0"))


LAYOUT_BYTES = st.tuples(*[st.one_of(st.integers(0, 8), st.integers(0, 255))] * 7).map(bytes)
ALGORITHMS = st.lists(st.sampled_from([4, 0xB, 0xC, 0xD, 0x12, 0x27, 0x28, 0x29]), min_size=5, max_size=5)
CIPHERS = st.sampled_from([(6, 128), (6, 192), (0x13, 128), (0x26, 256), (3, 128), (6, 64)])


@settings(deadline=None)
@given(LAYOUT_BYTES, ALGORITHMS, CIPHERS, st.binary(max_size=255), st.binary(min_size=64, max_size=600))
def test_any_configuration_with_a_valid_checksum(
    sizes: bytes, hashes: list[int], cipher: tuple[int, int], salt: bytes, rest: bytes
) -> None:
    """An attacker can put any configuration into the header; without the key it leads nowhere, quickly."""
    numbers = b"".join(number.to_bytes(2, "big") for number in [*hashes, *cipher])
    layout = ImageLayout.parse(sizes + numbers)
    device = MemoryDevice(1 << 20, block_size_bytes=128)
    if layout.allocation_block_size_128b_log2 + layout.io_block_allocation_blocks_log2 <= 12:
        packed = StaticHeader(layout, salt).pack()
        device.data[: len(packed)] = packed
        stretch = (rest * (4096 // len(rest) + 1))[:4096]
        device.data[len(packed) : len(packed) + 4096] = stretch
        device.data[1 << 20 :] = b""
    else:
        head = b"COCOONFS\x01" + layout.pack() + bytes([len(salt)])
        device.data[:128] = integrity.protect(head.ljust(128, b"\0"), section=31, head_skip=8, io_block_bytes=128)
    with pytest.raises(SvsmError):
        Volume.open(device, b"key")


def test_headers_round_trip() -> None:
    for salt in (b"", b"\xdd\xee\xff", bytes(range(255))):
        static = StaticHeader(DEFAULT_LAYOUT, salt)
        packed = static.pack()
        assert StaticHeader.measure(packed[:128]).parse_contents(packed) == static
    header = MutableHeader(NIL * 2, b"r" * 32, b"c" * 16, b"l" * 32, b"p" * 8, 512)
    packed = header.pack(DEFAULT_LAYOUT)
    assert len(packed) == 128
    assert MutableHeader.parse(packed, DEFAULT_LAYOUT) == header
    for length in range(112):
        with pytest.raises(FormatError):
            MutableHeader.parse(packed[:length], DEFAULT_LAYOUT)


@given(st.binary(min_size=112, max_size=112))
def test_hostile_index_nodes(data: bytes) -> None:
    nodes = NodeFormat(DEFAULT_LAYOUT)
    for parse in (nodes.parse_leaf, nodes.parse_internal):
        try:
            node = parse(data, LIMIT)
        except FormatError:
            continue
        assert nodes.pack(node)[: nodes.leaf_bytes] == data


@given(st.binary(max_size=300))
def test_hostile_journal_payload(data: bytes) -> None:
    """Only an authentic payload comes here, but a faulty writer's may still be anything."""
    keys = Keys(b"key", STATIC)
    with contextlib.suppress(FormatError, IntegrityError):
        JournalLog.parse(data, DEFAULT_LAYOUT, keys, limit_ab=LIMIT)


@pytest.mark.parametrize("cipher", [(6, 128), (6, 256), (0x13, 128), (0x26, 128)])
def test_disguise(cipher: tuple[int, int]) -> None:
    """Against a plain implementation by the definition: one CBC run for each block, IV made by the second key."""
    algorithm = cipher_algorithm(*cipher)
    disguise = Disguise(algorithm, b"k" * algorithm.key_bytes, b"i" * algorithm.key_bytes)
    places = [(12, 100), (13, 101), (40, 7), (41, 5000)]
    content = hashlib.shake_128(b"disguise").digest(128 * len(places))
    expected = b""
    for index, (target, staging) in enumerate(places):
        packed = target.to_bytes(8, "little") + staging.to_bytes(8, "little")
        iv = algorithm.encrypt_single_blocks(disguise.iv_key, packed)
        expected += algorithm.encrypt_with_iv(disguise.key, iv, content[128 * index : 128 * (index + 1)])
    assert disguise.apply(content, places) == expected
    assert disguise.remove(expected, places) == content
    assert Disguise.parse(disguise.pack()) == disguise
    assert "k" * 4 not in repr(disguise)


@given(st.binary(max_size=600))
def test_file_entity(data: bytes) -> None:
    keys = Keys(b"key", STATIC)
    needed = extents_bytes_needed(len(data), 16)
    total = -(-needed // 128) * 128
    sealed = encrypt_extents(keys.encryptor(16), data, total, lambda n: b"r" * n)
    assert len(sealed) == total
    assert decrypt_extents(keys.decryptor(16), [sealed[:128], sealed[128:]] if total > 128 else [sealed]) == data


@pytest.mark.parametrize("length", [0, 15, 16, 4095, 65535, 65536, 200_000])
@pytest.mark.parametrize("zeros", [0, 128, 4096, 150_016])
def test_large_file_entity(length: int, zeros: int) -> None:
    """In pieces cut anywhere, and with any length of zeros behind the padding; against one call of the cipher."""
    keys = Keys(b"key", STATIC)
    data = hashlib.shake_128(b"large").digest(length)
    total = -(-extents_bytes_needed(length, 16) // 128) * 128 + zeros
    sealed = encrypt_extents(keys.encryptor(16), data, total, lambda n: b"r" * n)
    assert len(sealed) == total
    count = 16 - length % 16
    assert keys.decryptor(16)(sealed) == (data + bytes([count]) * count).ljust(total - 16, b"\0")
    for step in (128, 70_016, total):
        if total // step < 100:
            pieces = [sealed[at : at + step] for at in range(0, total, step)]
            assert decrypt_extents(keys.decryptor(16), pieces) == data


@pytest.mark.parametrize("plaintext", [b"", bytes(9000), b"\1" * 4080 + b"\3\3" + bytes(8000), b"\21" * 32])
def test_padding_is_wrong(plaintext: bytes) -> None:
    sealed = Keys(b"key", STATIC).encryptor(16)(bytes(16) + plaintext.ljust(-(-len(plaintext) // 16) * 16, b"\0"))
    with pytest.raises(FormatError):
        decrypt_extents(Keys(b"key", STATIC).decryptor(16), [sealed])


def test_space_never_hands_out_twice() -> None:
    used = BlockMap(DEFAULT_LAYOUT, 64)
    used.set([(3, 6)], 1)
    space = Space(DEFAULT_LAYOUT, used)
    seen = bytearray(used.states(0, 64))
    for extent in [*space.for_file(20), *space.for_file(2), *space.pieces(16, 4), (space.block(1), 1)]:
        begin, length = extent
        assert not any(seen[begin : begin + length])
        seen[begin : begin + length] = b"\1" * length
    with pytest.raises(SvsmError) as caught:
        space.for_file(30)
    assert caught.value.code == "cocoonfs-full"
