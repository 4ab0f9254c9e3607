# SPDX-License-Identifier: MIT OR Apache-2.0
"""Several transactions in one commit, and what a transaction sees."""

from __future__ import annotations

import pytest

from svsm.formats.errors import StateError, SvsmError
from svsm.storage.cocoonfs import Decision, Transaction, Volume
from svsm.storage.cocoonfs.decision import FoundJournal
from svsm.storage.cocoonfs.group import CommitGroup
from svsm.storage.drivers.memory import MemoryDevice
from svsm.testing.powercut import PowerCutDisk
from tests.unit.storage.cocoonfs.fsck import check

KEY = b"group"


def _disk(size: int = 64 << 10) -> PowerCutDisk:
    device = MemoryDevice(size)
    volume = Volume.create(device, KEY, salt=b"")
    with volume.transaction() as transaction:
        transaction.write(16, b"sixteen")
        transaction.write(17, b"seventeen")
    return PowerCutDisk(bytes(device.data))


def _writing(group: CommitGroup, files: dict[int, bytes]) -> Transaction:
    transaction = group.transaction()
    for inode, data in files.items():
        transaction.write(inode, data)
    return transaction


def _codes(results: list[SvsmError | None]) -> list[str | None]:
    return [None if error is None else error.code for error in results]


def test_flushes_are_shared() -> None:
    disk = _disk()
    volume = Volume.open(disk, KEY)
    counter, flushes = volume.counter, disk.flushes
    group = CommitGroup(volume)
    for number in range(20):
        assert group.add(_writing(group, {100 + number: b"%d" % number})) == number
    assert _codes(group.commit()) == [None] * 20
    assert disk.flushes - flushes == 4
    assert volume.counter == counter + 1
    flushes = disk.flushes
    for number in range(20):
        with volume.transaction() as transaction:
            transaction.write(100 + number, b"again")
    assert disk.flushes - flushes == 80
    assert group.commit() == []
    check(volume)


def test_as_if_one_after_the_other() -> None:
    volume = Volume.open(_disk(), KEY)
    group = CommitGroup(volume)
    first = _writing(group, {16: b"first", 20: b"first"})
    second = _writing(group, {16: b"second"})  # looks at nothing: the last one wins
    reader = group.transaction()
    reader.write(21, reader.read(16) + b" copied")
    remover = group.transaction()
    remover.unlink(17)
    lister = group.transaction()
    lister.write(22, b"%d" % len(lister.inodes()))
    own = group.transaction()
    own.write(23, b"a")
    own.write(24, own.read(23))
    empty = group.transaction()
    ended = group.transaction()
    ended.abandon()
    for transaction in (first, second, reader, remover, lister, own, empty, ended):
        group.add(transaction)
    conflict, over = "cocoonfs-conflict", "cocoonfs-transaction-ended"
    assert _codes(group.commit()) == [None, None, conflict, None, conflict, None, None, over]
    files = {info.inode: volume.read(info.inode) for info in volume.list()}
    assert files == {16: b"second", 20: b"first", 23: b"a", 24: b"a"}


def test_one_too_large() -> None:
    volume = Volume.open(_disk(), KEY)
    group = CommitGroup(volume)
    group.add(_writing(group, {20: b"small"}))
    group.add(_writing(group, {21: bytes(60 << 10)}))
    group.add(_writing(group, {22: b"small too"}))
    assert _codes(group.commit()) == [None, "cocoonfs-full", None]
    assert (volume.read(20), volume.exists(21), volume.read(22)) == (b"small", False, b"small too")
    check(volume)


@pytest.mark.parametrize("answer", list(Decision))
def test_decisions(answer: Decision) -> None:
    asked: list[FoundJournal] = []

    def decide(found: FoundJournal) -> Decision:
        asked.append(found)
        return answer

    volume = Volume.open(_disk(), KEY, decide=decide)
    group = CommitGroup(volume)
    group.add(_writing(group, {20: b"a"}))
    group.add(_writing(group, {21: b"b"}))
    code = {Decision.YES: None, Decision.NO: "cocoonfs-refused", Decision.UNKNOWN: "cocoonfs-undecided"}[answer]
    assert _codes(group.commit()) == [code, code]
    assert len(asked) == 1
    assert volume.exists(20) == volume.exists(21) == (answer is Decision.YES)
    if answer is Decision.UNKNOWN:
        group.add(_writing(group, {22: b"c"}))
        assert _codes(group.commit()) == ["cocoonfs-commit-pending"]


def test_failing_disk() -> None:
    disk = _disk()
    volume = Volume.open(disk, KEY)
    group = CommitGroup(volume)
    group.add(_writing(group, {20: b"a"}))
    group.add(_writing(group, {21: b"b"}))
    disk.fail_flushes = [0]
    assert _codes(group.commit()) == ["block-io", "block-io"]
    assert volume.failed


def test_a_transaction_sees_itself() -> None:
    volume = Volume.open(_disk(), KEY)
    transaction = volume.transaction()
    assert transaction.inodes() == [16, 17]
    transaction.unlink(16)
    transaction.write(5000, b"new")
    assert transaction.inodes() == [17, 5000]
    assert [transaction.exists(inode) for inode in (16, 17, 18, 5000)] == [False, True, False, True]
    assert volume.inodes() == {16, 17}
    transaction.commit()
    assert volume.inodes() == {17, 5000}
    with pytest.raises(StateError):
        transaction.exists(17)
