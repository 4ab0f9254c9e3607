# SPDX-License-Identifier: MIT OR Apache-2.0
"""The volume as services see it: changes that wait share a commit, and none takes the others with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from svsm.abi.errors import StateError, SvsmError
from svsm.kernel.decision import AlwaysYes, DecisionSource
from svsm.kernel.disk import VolumeDisk
from svsm.kernel.files import ASK_AGAIN_SECONDS, VolumeFiles
from svsm.storage.drivers.memory import MemoryDevice
from svsm.storage.volume import Decision, PreparedCommit, Volume
from svsm.testing.powercut import PowerCutDisk

KEY = b"files"
ID = "00112233-4455-6677-8899-aabbccddeeff"


class Ledger:
    """A source that answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bytes]] = []
        self.answers: list[Callable[[Decision], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def decide(self, counter: int, root: bytes, answer: Callable[[Decision], None]) -> None:
        self.asked.append((counter, root))
        self.answers.append(answer)

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.timers.append((seconds, callback))

    def answer(self, decision: Decision = Decision.YES) -> None:
        self.answers.pop()(decision)


class Says:
    """A source that answers at once."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.asked: list[tuple[int, bytes]] = []

    def decide(self, counter: int, root: bytes, answer: Callable[[Decision], None]) -> None:
        self.asked.append((counter, root))
        answer(self.decision)


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


def _files(
    disk: PowerCutDisk, ledger: Ledger, *, on_failure: Callable[[SvsmError], None] = lambda _error: None
) -> VolumeFiles:
    return VolumeFiles(Volume.open(disk, KEY), source=ledger, later=ledger.later, on_failure=on_failure)


def test_waiting_changes_share_the_flushes() -> None:
    disk, ledger, outcomes = _disk(), Ledger(), Outcomes()
    files = _files(disk, ledger)
    for number in range(11):
        files.replace_many({100 + number: b"%d" % number}, outcomes.of(str(number)))
    assert (len(ledger.answers), outcomes.seen) == (1, [])
    ledger.answer()
    assert outcomes.seen == [("0", None)]
    ledger.answer()
    assert outcomes.seen == [(str(number), None) for number in range(11)]
    assert disk.flushes == 8  # two commits
    assert [files.read(100 + number) for number in range(11)] == [b"%d" % number for number in range(11)]


def test_a_refused_change() -> None:
    ledger, outcomes = Ledger(), Outcomes()
    failures: list[str] = []
    files = _files(_disk(), ledger, on_failure=lambda error: failures.append(error.code))
    files.replace_many({16: b"a"}, outcomes.of("a"))
    files.replace_many({17: b"b"}, outcomes.of("b"))
    ledger.answer(Decision.NO)
    ledger.answer()
    assert outcomes.seen == [("a", "files-refused"), ("b", None)]
    assert failures == ["files-refused"]
    assert (files.read(16), files.read(17)) == (None, b"b")


def test_an_unknown_answer_is_asked_for_again_and_nothing_else_begins() -> None:
    disk, ledger, outcomes = _disk(), Ledger(), Outcomes()
    failures: list[SvsmError] = []
    files = _files(disk, ledger, on_failure=failures.append)
    files.replace_many({16: b"a"}, outcomes.of("a"))
    before = list(disk.events)
    for number in range(1, 4):
        ledger.answer(Decision.UNKNOWN)
        files.replace_many({16 + number: b"waits"}, outcomes.of(f"b{number}"))
        assert (outcomes.seen, len(ledger.asked), ledger.answers) == ([], number, [])
        assert (files.read(16), disk.events) == (None, before)  # the journal stays, and no other commit starts
        seconds, ask = ledger.timers.pop()
        assert (seconds, ledger.timers) == (ASK_AGAIN_SECONDS, [])
        ask()
    assert len(set(ledger.asked)) == 1  # the same question each time
    ledger.answer()
    assert (outcomes.seen, files.read(16)) == ([("a", None)], b"a")
    ledger.answer(Decision.UNKNOWN)
    ledger.timers.pop()[1]()
    ledger.answer(Decision.NO)
    assert outcomes.seen[1:] == [(f"b{number}", "files-refused") for number in range(1, 4)]
    assert [files.read(16 + number) for number in range(4)] == [b"a", None, None, None]
    assert [error.code for error in failures] == ["files-refused"]


def _cut_after_prepare() -> tuple[PowerCutDisk, PreparedCommit]:
    """A disk whose power went while the answer about a commit was awaited, and that commit."""
    disk = _disk()
    transaction = Volume.open(disk, KEY).transaction()
    transaction.write(16, b"new")
    prepared = transaction.prepare()
    return PowerCutDisk(disk.content), prepared


@pytest.mark.parametrize(("decision", "found"), [(Decision.YES, b"new"), (Decision.NO, None)])
def test_the_same_source_is_asked_when_the_volume_is_opened(decision: Decision, found: bytes | None) -> None:
    disk, prepared = _cut_after_prepare()
    source = Says(decision)
    opened = VolumeDisk(disk, key=KEY, volume_id=ID, source=source)
    assert opened.try_open() is None
    assert source.asked == [(prepared.counter, prepared.root_digest)]
    assert opened.volume is not None
    outcomes = Outcomes()
    files = VolumeFiles(opened.volume, source=source, later=Ledger().later)
    assert files.read(16) == found
    files.replace_many({17: b"next"}, outcomes.of("next"))
    assert outcomes.seen == [("next", None if decision is Decision.YES else "files-refused")]
    assert len(source.asked) == 2


@pytest.mark.parametrize("source", [Says(Decision.UNKNOWN), Ledger()])
def test_nothing_is_read_while_nobody_knows_what_the_volume_holds(source: DecisionSource) -> None:
    disk, _ = _cut_after_prepare()
    opened = VolumeDisk(disk, key=KEY, volume_id=ID, source=source)
    with pytest.raises(StateError) as caught:
        opened.try_open()
    assert (caught.value.code, opened.volume, disk.events) == ("cocoonfs-undecided", None, [])
    again = VolumeDisk(disk, key=KEY, volume_id=ID, source=AlwaysYes())
    assert again.try_open() is None
    assert again.volume is not None
    assert again.volume.read(16) == b"new"


def test_one_that_does_not_fit() -> None:
    """Three changes wait, one of them larger than the volume: the others are stored."""
    ledger, outcomes = Ledger(), Outcomes()
    files = _files(_disk(), ledger)
    files.replace_many({16: b"first"}, outcomes.of("first"))
    for name, size in (("a", 100), ("large", 60 << 10), ("b", 200)):
        files.replace_many({size: bytes(size)}, outcomes.of(name))
    while ledger.answers:
        ledger.answer()
    assert sorted(outcomes.seen) == [("a", None), ("b", None), ("first", None), ("large", "cocoonfs-full")]
    assert [files.read(inode) is not None for inode in (16, 100, 200, 60 << 10)] == [True, True, True, False]


def test_many_that_wait_and_do_not_fit() -> None:
    """Their number is not the depth of a stack; while they wait for their turn, more may be asked for."""
    ledger, outcomes = Ledger(), Outcomes()
    files = _files(_disk(), ledger)

    def asks_for_more(error: SvsmError | None) -> None:
        assert error is None
        files.replace_many({17: b"more"}, outcomes.of("more"))

    files.replace_many({16: b"first"}, asks_for_more)
    for number in range(200):
        files.replace_many({100: bytes(60 << 10)}, outcomes.of(str(number)))
    while ledger.answers:
        ledger.answer()
    expected: list[tuple[str, str | None]] = [(str(number), "cocoonfs-full") for number in range(200)]
    assert outcomes.seen == [*expected, ("more", None)]
    assert (files.read(16), files.read(17)) == (b"first", b"more")
