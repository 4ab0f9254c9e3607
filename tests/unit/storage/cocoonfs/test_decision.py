# SPDX-License-Identifier: MIT OR Apache-2.0
"""Commits that wait for a decision: in a running volume, and found at open."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import pytest

from svsm.formats.errors import IntegrityError, PolicyError, StateError, SvsmError
from svsm.storage.cocoonfs import Decision, FoundJournal, Volume
from svsm.storage.cocoonfs import pending as pending_module
from svsm.storage.cocoonfs.aux import AuxMetadata
from svsm.storage.cocoonfs.check import check
from svsm.storage.cocoonfs.image import open_image
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk, crash_images

KEY = b"decision"


def _content(seed: int, length: int) -> bytes:
    return hashlib.shake_128(b"decision %d" % seed).digest(length)


class Ledger:
    """Answers as ordered, and remembers what it was asked."""

    def __init__(self, *answers: Decision) -> None:
        self.answers: Iterator[Decision] = iter(answers)
        self.asked: list[FoundJournal] = []

    def __call__(self, found: FoundJournal) -> Decision:
        self.asked.append(found)
        return next(self.answers, Decision.YES)


def _volume() -> MemoryDevice:
    device = MemoryDevice(64 << 10)
    volume = Volume.create(device, KEY, salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, _content(1, 1500))
        transaction.write(17, _content(2, 200))
    return device


def _code(call: object, *arguments: object) -> str:
    assert callable(call)
    with pytest.raises(SvsmError) as caught:
        call(*arguments)
    return caught.value.code


def _waits(volume: Volume) -> bool:
    return volume.pending is not None


def _write(volume: Volume, data: bytes = b"new") -> None:
    with volume.transaction() as transaction:
        transaction.write(16, data)


def test_unknown_in_a_running_volume() -> None:
    device = _volume()
    ledger = Ledger(Decision.UNKNOWN, Decision.UNKNOWN, Decision.YES, Decision.UNKNOWN, Decision.NO)
    volume = Volume.open(device, KEY, decide=ledger)
    counter = volume.counter
    assert _code(_write, volume) == "cocoonfs-undecided"
    assert volume.pending is not None
    assert volume.read(16) == _content(1, 1500)
    assert _code(_write, volume) == "cocoonfs-commit-pending"
    assert volume.decide_again() is Decision.UNKNOWN
    assert volume.counter == counter
    assert volume.decide_again() is Decision.YES
    assert (volume.read(16), volume.counter) == (b"new", counter + 1)
    assert not _waits(volume)
    assert len(set(ledger.asked)) == 1
    assert ledger.asked[0] == FoundJournal(volume.counter, volume.root_digest)
    assert _code(volume.decide_again) == "cocoonfs-commit-ended"
    assert _code(_write, volume, b"newer") == "cocoonfs-undecided"
    assert volume.decide_again() is Decision.NO
    assert (volume.read(16), volume.counter) == (b"new", counter + 1)
    assert Volume.open(device, KEY).read(16) == b"new"


def test_no_in_a_running_volume() -> None:
    device = _volume()
    volume = Volume.open(device, KEY, decide=Ledger(Decision.NO, Decision.YES))
    with pytest.raises(PolicyError, match="refused"):
        _write(volume)
    assert volume.read(16) == _content(1, 1500)
    _write(volume, b"second")
    assert Volume.open(device, KEY).read(16) == b"second"


def _with_journal() -> tuple[bytes, list[bytes], FoundJournal]:
    """(disk with a journal, disks on which it was carried out in part, what it leads to)."""
    disk = PowerCutDisk(bytes(_volume().data))
    volume = Volume.open(disk, KEY)
    transaction = volume.transaction()
    transaction.write(16, _content(3, 1700))
    transaction.unlink(17)
    prepared = transaction.prepare()
    content, before = disk.content, len(disk.events)
    prepared.apply()
    applying = disk.events[before : disk.events.index(None, before)]
    parts = [image.content for image in crash_images(content, applying, samples=3)]
    return content, parts, prepared.found


@pytest.mark.parametrize("answer", [Decision.YES, Decision.NO])
def test_unknown_at_open(answer: Decision) -> None:
    content, _, found = _with_journal()
    device = MemoryDevice(content)
    ledger = Ledger(Decision.UNKNOWN, Decision.UNKNOWN, answer)
    volume = Volume.open(device, KEY, decide=ledger)
    assert volume.read(16) == _content(1, 1500)
    assert volume.exists(17)
    assert volume.pending is not None
    assert volume.pending.found == found
    assert _code(_write, volume) == "cocoonfs-commit-pending"
    assert volume.decide_again() is Decision.UNKNOWN
    assert bytes(device.data) == content
    assert volume.decide_again() is answer
    assert ledger.asked == [found] * 3
    assert volume.read(16) == (_content(3, 1700) if answer is Decision.YES else _content(1, 1500))
    assert volume.exists(17) == (answer is Decision.NO)
    _write(volume, b"afterwards")
    again = Volume.open(device, KEY)
    assert (again.counter, again.root_digest) == (volume.counter, volume.root_digest)


def test_half_applied_is_not_taken_back() -> None:
    """Where the old state is gone, neither *no* nor *unknown* destroys or shows anything, and *yes* still works."""
    content, parts, found = _with_journal()
    gone = shown = 0
    for part in parts:
        for answer in (Decision.NO, Decision.UNKNOWN):
            for read_only in (False, True):
                device = MemoryDevice(part)
                try:
                    volume = Volume.open(device, KEY, decide=Ledger(answer), read_only=read_only)
                except StateError as error:
                    gone += error.code == "cocoonfs-half-applied" and bytes(device.data) == part
                    continue
                assert volume.read(16) == _content(1, 1500)
                assert volume.read(17) == _content(2, 200)
                shown += 1
        volume = Volume.open(MemoryDevice(part), KEY, decide=Ledger(Decision.YES))
        assert FoundJournal(volume.counter, volume.root_digest) == found
    assert gone + shown == 4 * len(parts)
    assert gone > 0 < shown
    assert content in parts


@pytest.mark.parametrize("answer", list(Decision))
def test_read_only(answer: Decision) -> None:
    """Nothing is written, not even on a disk that would take it."""
    content, _, found = _with_journal()
    for refusing in (False, True):
        device = MemoryDevice(content, read_only=refusing)
        volume = Volume.open(device, KEY, decide=Ledger(answer, answer), read_only=True)
        if answer is Decision.YES:
            assert FoundJournal(volume.counter, volume.root_digest) == found
            assert volume.read(16) == _content(3, 1700)
            assert [info.inode for info in volume.list()] == [16]
        else:
            assert volume.read(16) == _content(1, 1500)
        assert _code(_write, volume) == "cocoonfs-read-only"
        assert _code(volume.decide_again) == "cocoonfs-read-only"
        assert bytes(device.data) == content
    assert _code(Volume.open, MemoryDevice(content, read_only=True), KEY) == "cocoonfs-journal-pending"


def test_another_state_than_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that shows something else after the journal was carried out: stop, and leave the journal."""
    content, _, _ = _with_journal()
    settled = MemoryDevice(content)
    Volume.open(settled, KEY)
    _write(Volume.open(settled, KEY), b"later")  # a state that authenticates, but not the one decided on
    device = MemoryDevice(content)

    def swapped(volume: object) -> object:
        device.write([(0, bytes(settled.data))])
        return open_image(volume)  # type: ignore[arg-type]

    monkeypatch.setattr(pending_module, "open_image", swapped)
    with pytest.raises(IntegrityError) as caught:
        Volume.open(device, KEY)
    assert caught.value.code == "cocoonfs-decided-other"


def test_crash_while_undecided() -> None:
    """A power cut while a commit waits, and while a later answer is carried out."""
    content, _, found = _with_journal()
    old = Volume.open(MemoryDevice(content), KEY, decide=Ledger(Decision.UNKNOWN))
    for answer in (Decision.YES, Decision.NO):
        disk = PowerCutDisk(content)
        volume = Volume.open(disk, KEY, decide=Ledger(Decision.UNKNOWN, answer))
        assert disk.events == []
        volume.decide_again()
        states = set()
        for image in crash_images(content, disk.events, samples=6):
            opened = Volume.open(MemoryDevice(image.content), KEY)
            states.add((opened.counter, opened.root_digest))
        new = (found.counter, found.root_digest)
        assert states == ({new} if answer is Decision.YES else {new, (old.counter, old.root_digest)})


def test_errors_while_deciding() -> None:
    """A question that raises leaves the commit waiting; an error of the disk on the answer fails the volume."""
    device = _volume()
    disk = PowerCutDisk(bytes(device.data))

    def broken(found: FoundJournal) -> Decision:
        raise PolicyError("no connection", code="test-no-connection", counter=found.counter)

    volume = Volume.open(disk, KEY, decide=broken)
    assert _code(_write, volume) == "test-no-connection"
    assert volume.pending is not None
    disk.fail_flushes = range(disk.flushes, disk.flushes + 9)
    with contextlib.suppress(SvsmError):
        volume.pending.apply()
    assert volume.failed
    assert _code(volume.read, 16) == "cocoonfs-failed"


@pytest.mark.parametrize("answer", [Decision.YES, Decision.NO])
def test_metadata_is_mended_after_the_decision(answer: Decision) -> None:
    """A torn copy of auxiliary metadata waits too: before the answer nothing is written."""
    device = MemoryDevice(64 << 10)
    volume = Volume.create(device, KEY, salt=b"", aux=AuxMetadata(reserve_bytes=500))
    transaction = volume.transaction()
    transaction.write(16, b"new")
    transaction.prepare()
    torn = volume.image.aux.extents[-1][0] * 128
    device.data[torn : torn + 512] = bytes(512)
    before = bytes(device.data)
    volume = Volume.open(device, KEY, decide=Ledger(Decision.UNKNOWN, answer))
    assert bytes(device.data) == before
    assert not volume.image.aux.is_settled()
    volume.decide_again()
    assert volume.image.aux.is_settled()
    assert check(device, KEY).is_good
