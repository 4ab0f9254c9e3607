# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a check finds in volumes that were broken on purpose, and what a repair mends of it."""

from __future__ import annotations

import hashlib
import json

import pytest

from svsm.formats.errors import BackendError, StateError
from svsm.storage.cocoonfs import Decision, Volume
from svsm.storage.cocoonfs.check import CheckReport, Severity, check, check_image
from svsm.storage.cocoonfs.creation import backup_offset
from svsm.storage.cocoonfs.index import Entry
from svsm.storage.cocoonfs.layout import CREATION_MAGIC
from svsm.storage.cocoonfs.repair import repair
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk, crash_images
from tests.unit.storage.cocoonfs.faulty import commit_with_a_fault, leak

KEY = b"check"
FILES = {16: 3000, 17: 60, 18: 20000, 1 << 40: 0}


def _content(inode: int, length: int) -> bytes:
    return hashlib.shake_128(b"check %d" % inode).digest(length)


def _volume() -> tuple[MemoryDevice, Volume]:
    device = MemoryDevice(128 << 10)
    volume = Volume.create(device, KEY, salt=b"")
    with volume.transaction() as transaction:
        for inode, length in FILES.items():
            transaction.write(inode, _content(inode, length), 1)
    return device, volume


def _kinds(report: CheckReport) -> set[str]:
    return {finding.kind for finding in report.findings}


def _same_files(device: MemoryDevice) -> bool:
    volume = Volume.open(device, KEY, read_only=True)
    return all(volume.read(inode) == _content(inode, length) for inode, length in FILES.items())


def test_good() -> None:
    device, volume = _volume()
    before = bytes(device.data)
    stages: list[tuple[str, int, int]] = []
    report = check(MemoryDevice(before, read_only=True), KEY, progress=lambda *step: stages.append(step))
    assert report.is_good
    assert report.findings == []
    assert (report.files, report.counter, report.root_digest) == (4, volume.counter, volume.root_digest)
    assert report.data_blocks == volume.image.tree.geometry.data_blocks
    assert stages[-1] == ("files", 7, 7)
    assert ("data blocks", report.data_blocks, report.data_blocks) in stages
    told = json.loads(json.dumps(report.to_json()))
    assert (told["good"], told["counter"]) == (True, str(volume.counter))


def test_wrong_key_and_no_volume() -> None:
    device, _ = _volume()
    for target, key, code in ((device, b"other", "cocoonfs-authentication"), (MemoryDevice(4096), KEY, "no-magic")):
        report = check(target, key)
        assert [finding.kind for finding in report.findings] == ["does-not-open"]
        assert code in report.findings[0].sentence
        assert not report.is_good
        result = repair(target, key)
        assert (result.done, result.after, result.is_good) == ((), None, False)


def test_damage_is_named() -> None:
    """One changed byte in a file: its data block is named, that file is, and no other."""
    device, volume = _volume()
    entry = volume.image.find(18)
    assert entry is not None
    begin = volume.image.extents_of(entry)[0][0][0] + 9
    device.data[begin * 128 + 5] ^= 1
    before = bytes(device.data)
    report = check(device, KEY)
    assert report.worst is Severity.ERROR
    assert [(finding.kind, finding.place) for finding in report.findings] == [
        ("not-authentic", f"blocks {begin // 4 * 4}..{begin // 4 * 4 + 3}"),
        ("file", "inode 0x12"),
    ]
    assert report.files == 3
    result = repair(device, KEY)
    assert (result.done, result.after) == ((), None)
    assert bytes(device.data) == before


def test_many_findings_are_counted() -> None:
    device, volume = _volume()
    entry = volume.image.find(18)
    assert entry is not None
    begin, length = volume.image.extents_of(entry)[0][0]
    extents = volume.image.extents_of(entry)[0]
    for begin, length in extents:
        device.data[begin * 128 : (begin + length) * 128] = bytes(length * 128)
    report = check(device, KEY)
    listed = sum(finding.kind == "not-authentic" for finding in report.findings)
    blocks = {at // 4 for begin, length in extents for at in range(begin, begin + length)}
    assert listed + report.more["not-authentic"] == len(blocks)
    assert listed <= 50


def test_leaks_are_given_back() -> None:
    device, volume = _volume()
    commit_with_a_fault(volume, leak)
    free = volume.free_bytes
    report = check(device, KEY)
    assert _kinds(report) == {"leaked"}
    assert report.worst is Severity.WARNING
    assert sum(finding.extent[1] for finding in report.findings if finding.extent) == 12
    result = repair(device, KEY)
    assert result.is_good
    assert result.done == ("12 unused blocks were given back.",)
    assert json.loads(json.dumps(result.to_json()))["good"] is True
    again = Volume.open(device, KEY)
    assert again.free_bytes == free + 12 * 128
    assert again.counter == volume.counter + 1
    assert _same_files(device)


def test_repair_survives_power_cuts() -> None:
    device, volume = _volume()
    commit_with_a_fault(volume, leak)
    disk = PowerCutDisk(bytes(device.data))
    assert repair(disk, KEY).is_good
    kinds = set()
    for image in crash_images(bytes(device.data), disk.events, samples=3):
        again = MemoryDevice(image.content)
        report = check(again, KEY)
        assert report.opened
        assert report.worst is not Severity.ERROR
        kinds |= _kinds(report)
        assert _same_files(again)
    assert {"leaked", "journal-pending"} <= kinds


def test_two_files_with_one_block() -> None:
    device, volume = _volume()
    pointer = volume.image.find(16)
    assert pointer is not None
    commit_with_a_fault(volume, lambda layout: layout.editor.put(Entry(31, pointer.pointer, 0)))
    before = bytes(device.data)
    report = check(device, KEY)
    assert _kinds(report) == {"double-allocated", "file"}
    assert {finding.place for finding in report.findings} == {"inode 0x1f"}
    assert not repair(device, KEY).is_good
    assert bytes(device.data) == before


def test_file_in_free_space() -> None:
    device, volume = _volume()

    def forget(layout: object) -> None:
        layout.used.set([(begin, len(data) // 128) for begin, data in layout.writes], 0)  # type: ignore[attr-defined]

    commit_with_a_fault(volume, forget)
    report = check(device, KEY)
    assert _kinds(report) == {"unallocated", "file"}


def test_index() -> None:
    _, volume = _volume()
    with volume.transaction() as transaction:
        for inode in range(100, 120):
            transaction.write(inode, b"")
    image = volume.image
    assert check_image(image, CheckReport()).findings == []
    leaf = image.load(image.entry_leaf, 1)
    leaf.following = None  # type: ignore[union-attr]
    assert _kinds(check_image(image, CheckReport())) == {"index"}


def test_pending_journal() -> None:
    device, volume = _volume()
    transaction = volume.transaction()
    transaction.write(40, b"forty")
    prepared = transaction.prepare()
    before = bytes(device.data)
    report = check(device, KEY)
    assert (report.is_good, report.pending, report.counter) == (True, True, prepared.counter)
    assert _kinds(report) == {"journal-pending"}
    assert check(device, KEY, decide=lambda _found: Decision.NO).counter == volume.counter
    with pytest.raises(StateError) as caught:
        repair(device, KEY, decide=lambda _found: Decision.UNKNOWN)
    assert caught.value.code == "cocoonfs-undecided"
    assert bytes(device.data) == before
    result = repair(device, KEY)
    assert result.after is not None
    assert (result.is_good, result.after.pending, len(result.done)) == (True, False, 1)
    assert Volume.open(device, KEY).read(40) == b"forty"


def test_what_follows_a_cleared_journal_is_nothing() -> None:
    """The reference program zeroes a block of the device, as small as 128 bytes; the rest of its journal stays."""
    device, volume = _volume()
    head = volume.image.volume.places.journal_head[0] * 128
    device.data[head + 128 : head + 512] = b"j" * 384
    assert check(device, KEY).findings == []


def test_torn_journal_and_stale_backup() -> None:
    device, volume = _volume()
    head = volume.image.volume.places.journal_head[0] * 128
    device.data[head : head + 20] = b"CCFSJRNL" + bytes(12)
    place = backup_offset(len(device.data))
    assert place is not None
    assert not volume.image.used.any_used(place // 128, place // 128 + 1)
    device.data[place : place + 8] = CREATION_MAGIC
    report = check(device, KEY)
    assert _kinds(report) == {"torn-journal", "stale-backup"}
    result = repair(device, KEY)
    assert result.is_good
    assert len(result.done) == 2
    assert _same_files(device)


def test_failing_disk() -> None:
    device, _ = _volume()
    disk = PowerCutDisk(bytes(device.data), fail_reads=range(12, 500))
    with pytest.raises(BackendError):
        check(disk, KEY)
