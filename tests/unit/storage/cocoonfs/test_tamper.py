# SPDX-License-Identifier: MIT OR Apache-2.0
"""Tampering that `test_sweep` does not cover: with a pending journal, between two volumes, as a check sees it."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from svsm.formats.errors import FormatError, IntegrityError
from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.check import Severity, check
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import image_of
from tests.unit.storage.cocoonfs.regions import unauthenticated

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


def test_check_tells_the_same() -> None:
    """A check of a changed volume finds an error exactly where the change lies inside authentication."""
    content, _ = _volume()
    outside = set().union(*unauthenticated(content, KEY).values())
    device = MemoryDevice(content)
    good = 0
    for offset in range(7, len(content), 331):
        device.data[offset] ^= 0x5A
        report = check(device, KEY)
        assert (report.worst is not Severity.ERROR) == (offset in outside), f"byte {offset:#x}: {report.findings}"
        good += report.is_good
        device.data[offset] ^= 0x5A
    assert 10 < good < 100


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
