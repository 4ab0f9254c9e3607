# SPDX-License-Identifier: MIT OR Apache-2.0
"""The volume as services see it: changes that wait share a commit, and none takes the others with it."""

from __future__ import annotations

from collections.abc import Callable

from svsm.abi.errors import SvsmError
from svsm.kernel.files import VolumeFiles
from svsm.storage.drivers.memory import MemoryDevice
from svsm.storage.volume import PreparedCommit, Volume
from svsm.testing.powercut import PowerCutDisk

KEY = b"files"


class Ledger:
    """Decides when the test says so."""

    def __init__(self) -> None:
        self.answers: list[Callable[[bool], None]] = []

    def __call__(self, prepared: PreparedCommit, answer: Callable[[bool], None]) -> None:
        assert prepared.counter
        self.answers.append(answer)


class Outcomes:
    """What became of each change, in the order it became known."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str | None]] = []

    def of(self, name: str) -> Callable[[SvsmError | None], None]:
        return lambda error: self.seen.append((name, None if error is None else error.code))


def _disk() -> PowerCutDisk:
    device = MemoryDevice(64 << 10)
    Volume.create(device, KEY, salt=b"")
    return PowerCutDisk(bytes(device.data))


def test_waiting_changes_share_the_flushes() -> None:
    disk, ledger, outcomes = _disk(), Ledger(), Outcomes()
    files = VolumeFiles(Volume.open(disk, KEY), decide=ledger)
    for number in range(11):
        files.replace_many({100 + number: b"%d" % number}, outcomes.of(str(number)))
    assert (len(ledger.answers), outcomes.seen) == (1, [])
    ledger.answers.pop()(True)
    assert outcomes.seen == [("0", None)]
    ledger.answers.pop()(True)
    assert outcomes.seen == [(str(number), None) for number in range(11)]
    assert disk.flushes == 8  # two commits
    assert [files.read(100 + number) for number in range(11)] == [b"%d" % number for number in range(11)]


def test_a_refused_change() -> None:
    ledger, outcomes = Ledger(), Outcomes()
    failures: list[str] = []
    files = VolumeFiles(Volume.open(_disk(), KEY), decide=ledger, on_failure=lambda error: failures.append(error.code))
    files.replace_many({16: b"a"}, outcomes.of("a"))
    files.replace_many({17: b"b"}, outcomes.of("b"))
    ledger.answers.pop()(False)
    ledger.answers.pop()(True)
    assert outcomes.seen == [("a", "files-refused"), ("b", None)]
    assert failures == ["files-refused"]
    assert (files.read(16), files.read(17)) == (None, b"b")


def test_one_that_does_not_fit() -> None:
    """Three changes wait, one of them larger than the volume: the others are stored."""
    ledger, outcomes = Ledger(), Outcomes()
    files = VolumeFiles(Volume.open(_disk(), KEY), decide=ledger)
    files.replace_many({16: b"first"}, outcomes.of("first"))
    for name, size in (("a", 100), ("large", 60 << 10), ("b", 200)):
        files.replace_many({size: bytes(size)}, outcomes.of(name))
    while ledger.answers:
        ledger.answers.pop()(True)
    assert sorted(outcomes.seen) == [("a", None), ("b", None), ("first", None), ("large", "cocoonfs-full")]
    assert [files.read(inode) is not None for inode in (16, 100, 200, 60 << 10)] == [True, True, True, False]


def test_many_that_wait_and_do_not_fit() -> None:
    """Their number is not the depth of a stack; while they wait for their turn, more may be asked for."""
    ledger, outcomes = Ledger(), Outcomes()
    files = VolumeFiles(Volume.open(_disk(), KEY), decide=ledger)

    def asks_for_more(error: SvsmError | None) -> None:
        assert error is None
        files.replace_many({17: b"more"}, outcomes.of("more"))

    files.replace_many({16: b"first"}, asks_for_more)
    for number in range(200):
        files.replace_many({100: bytes(60 << 10)}, outcomes.of(str(number)))
    while ledger.answers:
        ledger.answers.pop()(True)
    expected: list[tuple[str, str | None]] = [(str(number), "cocoonfs-full") for number in range(200)]
    assert outcomes.seen == [*expected, ("more", None)]
    assert (files.read(16), files.read(17)) == (b"first", b"more")
