# SPDX-License-Identifier: MIT OR Apache-2.0
"""Every byte of a volume changed, one at a time: refused, or it lies where the format authenticates nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable

import pytest

from svsm.formats.errors import FormatError, IntegrityError
from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.check import Severity, check
from svsm.storage.cocoonfs.layout import MutableHeader
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import image_of

KEY = b"tamper"


def _content(seed: int, length: int) -> bytes:
    return hashlib.shake_128(b"tamper %d" % seed).digest(length)


def _volume() -> tuple[bytes, dict[int, bytes]]:
    device = MemoryDevice(64 << 10)
    volume = Volume.create(device, KEY, salt=b"\xdd\xee\xff")
    files = {16 + n: _content(n, 97 * n * n) for n in range(12)}
    with volume.transaction() as transaction:
        for inode, data in files.items():
            transaction.write(inode, data, inode)
    with volume.transaction() as transaction:
        transaction.unlink(20)
        transaction.write(18, _content(99, 2000), 18)
    del files[20]
    files[18] = _content(99, 2000)
    return bytes(device.data), files


def _unauthenticated(content: bytes) -> dict[str, set[int]]:
    """Bytes that the format leaves without authentication, by kind."""
    image = image_of(Volume.open(MemoryDevice(content), KEY))
    layout, places, geometry = image.volume.layout, image.volume.places, image.tree.geometry
    size = layout.ab_bytes

    def span(begin: int, length: int) -> set[int]:
        return set(range(begin * size, (begin + length) * size))

    kinds: dict[str, set[int]] = {}
    kinds["unallocated block"] = {
        byte for block, state in enumerate(image.used.states(0, image.image_ab)) if not state for byte in span(block, 1)
    }
    kinds["inactive journal head"] = span(*places.journal_head)
    used = places.header_begin_ab * size + MutableHeader.size_bytes(layout)
    kinds["mutable header padding"] = set(range(used, places.header_end_ab * size))
    kinds["behind the image"] = set(range(image.image_ab * size, len(content)))
    needed: set[int] = set()
    for level in range(geometry.levels):
        for block in range(0, geometry.data_blocks, 1 << geometry.bits(level)):
            begin, _ = geometry.node_place(level, block)
            needed |= set(range(begin * size, begin * size + image.tree.used_bytes(level)))
    tree = set().union(*(span(*extent) for extent in geometry.extents))
    kinds["unused part of the tree"] = tree - needed
    return kinds


def _sweep(content: bytes, files: dict[int, bytes], offsets: Iterable[int]) -> Counter[str]:
    kinds = _unauthenticated(content)
    counted: Counter[str] = Counter()
    device = MemoryDevice(content)
    for offset in offsets:
        device.data[offset] ^= 1 + offset % 255
        before = bytes(device.data)
        try:
            volume = Volume.open(device, KEY)
            found = {info.inode: volume.read(info.inode) for info in volume.list()}
            flags = {info.inode: info.flags for info in volume.list()}
        except (FormatError, IntegrityError):
            counted["refused"] += 1
        else:
            assert found == files
            assert flags == {inode: inode for inode in files}
            kind = next((name for name, places in kinds.items() if offset in places), None)
            assert kind is not None, f"byte {offset:#x} can be changed unnoticed"
            counted[kind] += 1
        assert bytes(device.data) == before
        device.data[offset] ^= 1 + offset % 255
    assert bytes(device.data) == content
    return counted


def test_sample_of_bytes() -> None:
    content, files = _volume()
    counted = _sweep(content, files, [*range(1536), *range(1536, len(content), 53)])
    assert counted["refused"] > 1000
    assert counted["unallocated block"] > 100
    # All of the journal's head but a changed magic (it has none) is ignored; all of the padding is.
    assert counted["mutable header padding"] == 16
    assert counted["inactive journal head"] == 512


def test_check_tells_the_same() -> None:
    """A check of a changed volume finds an error exactly where the change lies inside authentication."""
    content, _ = _volume()
    outside = set().union(*_unauthenticated(content).values())
    device = MemoryDevice(content)
    good = 0
    for offset in range(7, len(content), 331):
        device.data[offset] ^= 0x5A
        report = check(device, KEY)
        assert (report.worst is not Severity.ERROR) == (offset in outside), f"byte {offset:#x}: {report.findings}"
        good += report.is_good
        device.data[offset] ^= 0x5A
    assert 10 < good < 100


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_byte() -> None:
    content, files = _volume()
    counted = _sweep(content, files, range(len(content)))
    kinds = _unauthenticated(content)
    print(dict(counted))
    assert counted.total() == len(content)
    # And the other way round: every byte outside of these regions was refused, every byte inside ignored.
    assert {name: counted[name] for name in kinds} == {name: len(places) for name, places in kinds.items()}


def _pending() -> tuple[bytes, bytes, dict[int, bytes], dict[int, bytes], int]:
    """The image before, with a pending journal, the files before and after, where the journal's head is."""
    content, old = _volume()
    device = MemoryDevice(content)
    volume = Volume.open(device, KEY)
    transaction = volume.transaction()
    new = dict(old)
    for inode in (17, 25, 40):
        new[inode] = _content(inode + 50, 700)
        transaction.write(inode, new[inode], inode)
    transaction.unlink(19)
    del new[19]
    transaction.prepare()
    begin, _ = image_of(volume).volume.places.journal_head
    return content, bytes(device.data), old, new, begin * 128


def _sweep_pending(step: int) -> Counter[str]:
    before_it, content, old, new, head = _pending()
    changed = [at for at in range(0, len(content), 128) if content[at : at + 128] != before_it[at : at + 128]]
    spread = (at + n for at in changed for n in range(0, 128, step))
    offsets = sorted({*range(head, head + 512, max(1, step // 8)), *spread})
    counted: Counter[str] = Counter()
    for offset in offsets:
        device = MemoryDevice(content)
        device.data[offset] ^= 1 + offset % 255
        before = bytes(device.data)
        try:
            volume = Volume.open(device, KEY)
            found = {info.inode: volume.read(info.inode) for info in volume.list()}
        except (FormatError, IntegrityError):
            counted["refused"] += 1
            assert bytes(device.data) == before  # a journal that does not authenticate is not carried out by halves
        else:
            assert found in (old, new)
            # Whoever breaks the head's checksum takes a commit back that was never acknowledged.
            assert found == new or head <= offset < head + 512
            counted["new" if found == new else "old"] += 1
    return counted


def test_sample_of_a_pending_journal() -> None:
    counted = _sweep_pending(32)
    assert counted["refused"] > 50
    assert counted["old"] > 50


@pytest.mark.long
def test_pending_journal() -> None:
    counted = _sweep_pending(1)
    assert counted["old"] == 512
    assert counted["refused"] > 2000


def test_pieces_from_another_time() -> None:
    """Each IO block put back to what it was one commit earlier: refused, or contents unchanged."""
    device = MemoryDevice(64 << 10)
    volume = Volume.create(device, KEY, salt=b"")
    for turn in range(3):
        with volume.transaction() as transaction:
            transaction.write(16, _content(turn, 700), 0)
            transaction.write(17, _content(turn + 10, 600), 0)
        if turn == 1:
            older = bytes(device.data)
    newer = bytes(device.data)
    refused = 0
    for at in range(0, len(newer), 512):
        if older[at : at + 512] == newer[at : at + 512]:
            continue
        mixed = MemoryDevice(newer[:at] + older[at : at + 512] + newer[at + 512 :])
        try:
            opened = Volume.open(mixed, KEY)
            assert {info.inode: opened.read(info.inode) for info in opened.list()} == {
                16: _content(2, 700),
                17: _content(12, 600),
            }
        except IntegrityError:
            refused += 1
    assert refused >= 5


def test_two_volumes_of_one_key() -> None:
    """The salt keeps volumes apart: no block of one passes in the other."""
    contents = []
    for salt in (b"one", b"two"):
        device = MemoryDevice(64 << 10)
        volume = Volume.create(device, KEY, salt=salt)
        with volume.transaction() as transaction:
            transaction.write(16, b"same", 0)
        contents.append(bytes(device.data))
    one, two = contents
    for at in range(512, 64 << 10, 512):
        mixed = MemoryDevice(one[:at] + two[at : at + 512] + one[at + 512 :])
        try:
            assert Volume.open(mixed, KEY).read(16) == b"same"
        except IntegrityError:
            continue
    with pytest.raises(IntegrityError):
        Volume.open(MemoryDevice(one[:512] + two[512:]), KEY)
