# SPDX-License-Identifier: MIT OR Apache-2.0
"""Commits of the reference program, really killed at each of their writes: ours opens what it left, as old or as new.

`strace` kills the program as it enters its n-th write to the image, for every n where there are not too many. Up to the
journal's head that leaves the old state; from then on a pending journal, which is replayed here or, where none of it
was carried out yet, taken back. Writes arrive in the program's order; what a cache may reorder is enumerated for ours
(`tests/unit/storage/cocoonfs/test_cuts.py`), and some of it is in the vectors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from svsm.formats.errors import StateError
from svsm.storage.cocoonfs import Decision, FoundJournal, Volume
from svsm.storage.cocoonfs.check import check
from svsm.storage.drivers.memory import MemoryDevice
from tests.cocoonfs_support import content
from tests.interop.cocoonfs_cases import ALGORITHMS, Case, case_of
from tests.interop.cocoonfs_tool import Tool

pytestmark = pytest.mark.interop
KEY = hashlib.sha256(b"journals").digest()
KIND = uuid.UUID(int=3 << 96 | 9)
QUICK, LONG = (28, 40), range(2 * len(ALGORITHMS) + 14)
"""Seeds; in the long run each combination of algorithms comes with two or three of the five changes."""
MOST, PENDING = 48, 4
"""How many images a change gives (and some more near the head), and how many of them have a journal at least."""

State = tuple[dict[int, tuple[int, bytes]], list[tuple[uuid.UUID, bytes]]]


@dataclasses.dataclass(slots=True)
class Met:
    """What the images of one change were.

    Attributes:
        images: How many there are.
        old: Images that opened in the old state without a journal.
        pending: Images with a pending journal.
        taken_back: Of these, how many could be taken back; of the others a part had been carried out.
        new: Images that opened in the new state without a journal.
    """

    images: int = 0
    old: int = 0
    pending: int = 0
    taken_back: int = 0
    new: int = 0


CHANGES: dict[str, Callable[[Tool], None]] = {
    "create": lambda tool: tool.write(1 << 40, content("created", 1500), 7),
    "replace": lambda tool: tool.write(17, content("replaced", 1200), 1),
    "grow": lambda tool: tool.write(18, content("grown", 9000), 2),
    "unlink": lambda tool: tool.remove(17),
    "auxiliary metadata": lambda tool: tool.edit_aux("add-entry", str(KIND), data=b"added", key=True),
}


def _prepare(tool: Tool, case: Case) -> None:
    tool.run("mkfs", "-K", KEY.hex(), *case.options, "-n")
    for inode in (16, 17, 18):
        tool.write(inode, content(f"{case.seed} {inode}", 500 * (inode - 15)), inode)
    tool.edit_aux("add-entry", str(uuid.UUID(int=1 << 96 | 9)), data=b"there", key=True)


def _state(volume: Volume) -> State:
    files = {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()}
    return files, [(entry.kind, entry.data) for entry in volume.aux.entries]


def _take_back(left: MemoryDevice, old: State) -> tuple[list[FoundJournal], bool]:
    """Open with the answer no: what was asked, and whether the old state is there."""
    asked: list[FoundJournal] = []

    def no(found: FoundJournal) -> Decision:
        asked.append(found)
        return Decision.NO

    device = MemoryDevice(left.data, block_size_bytes=128)
    refusal = ""
    try:
        volume = Volume.open(device, KEY, decide=no)
    except StateError as error:
        refusal = error.code
    if refusal:
        assert (refusal, len(asked)) == ("cocoonfs-half-applied", 1)
        assert device.data == left.data
        return asked, False
    if asked:
        assert _state(volume) == old
        assert [found.counter for found in asked] == [volume.counter + 1]
        report = check(device, KEY)
        assert (report.is_good, report.findings, report.pending) == (True, [], False)
        assert _state(Volume.open(device, KEY)) == old
    return asked, bool(asked)


def judge(left: MemoryDevice, old: State, new: State, met: Met) -> None:
    """Open what a killed program left, with either answer; count it."""
    asked, taken_back = _take_back(left, old)
    volume = Volume.open(left, KEY)
    state = _state(volume)
    if asked:
        assert state == new
        assert (volume.counter, volume.root_digest) == asked[0]
        met.taken_back += taken_back
        met.pending += 1
    else:
        assert state in (old, new)
        met.old += state == old
        met.new += state == new
    report = check(left, KEY)
    assert (report.is_good, report.findings, report.pending) == (True, [], False)
    assert _state(Volume.open(left, KEY)) == state


def _numbers(writes: list[str]) -> list[int]:
    """Which writes, from 1: all, or where there are many, those round the journal's head and some of the others."""
    step = -(-len(writes) // MOST)
    if step == 1:
        return list(range(1, len(writes) + 1))
    head = max(at for at, shown in enumerate(writes, 1) if shown.startswith('"CCFSJRNL'))
    near = range(head - 3, head + 7)
    return sorted({*near, *range(1, len(writes), step), len(writes)} & set(range(1, len(writes) + 1)))


def _killed(tool: Tool, change: Callable[[Tool], None]) -> Met:
    before = tool.take()
    old = _state(Volume.open(MemoryDevice(before.data, block_size_bytes=128), KEY))
    numbers = _numbers(tool.writes(change))
    new = _state(Volume.open(tool.take(), KEY))
    assert old != new
    met = Met()
    for number in numbers:
        tool.give(before)
        assert tool.cut(number, change)
        met.images += 1
        judge(tool.take(), old, new, met)
    return met


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in LONG])
def test_killed_at_its_writes(tmp_path: Path, seed: int, record_property: Callable[[str, object], None]) -> None:
    """Old, then pending; the first journals can be taken back, of later ones a part has been carried out."""
    case, tool = case_of(seed), Tool(tmp_path, KEY)
    _prepare(tool, case)
    name = list(CHANGES)[seed % len(CHANGES)]
    met = _killed(tool, CHANGES[name])
    record_property("interrupted runs of the reference program", met.images)
    assert met.old + met.pending + met.new == met.images
    assert met.old >= 5
    assert met.pending >= PENDING
    assert met.taken_back >= 1


def test_what_is_promised() -> None:
    """At least 40 configurations with 4 pending journals each; every combination of algorithms, every change."""
    assert len(LONG) >= 40
    assert len(LONG) * PENDING >= 190
    assert {case_of(seed).algorithms for seed in LONG} == set(ALGORITHMS)
    assert len({seed % len(CHANGES) for seed in QUICK}) == len(QUICK)
