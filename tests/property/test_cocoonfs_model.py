# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume behaves like a dictionary, whatever is done to it in whatever order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from svsm.formats.errors import StateError
from svsm.storage.cocoonfs import AuxMetadata, Decision, FoundJournal, ImageLayout, Volume
from svsm.storage.cocoonfs.group import CommitGroup
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT
from svsm.storage.cocoonfs.offline import read_aux, write_aux
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import check

KEY = b"model"
Files = dict[int, tuple[int, bytes]]

INODES = st.one_of(st.integers(16, 60), st.integers(16, (1 << 64) - 1))
LENGTHS = st.one_of(
    st.integers(0, 300), st.sampled_from([111, 112, 495, 496, 1000, 30_000, 70_000]), st.integers(0, 12000)
)
WRITE = st.tuples(st.just("write"), INODES, LENGTHS, st.integers(0, 255))
UNLINK = st.tuples(st.just("unlink"), st.integers(0, 1 << 16))
RECORD = st.tuples(st.just("record"), st.integers(0, 3), st.sampled_from([0, 20, 20, 700]))
CHANGES = st.lists(st.one_of(WRITE, WRITE, WRITE, UNLINK, UNLINK, RECORD), min_size=1, max_size=8)
HOW = [
    "commit",
    "commit",
    "commit",
    "group",
    "abandon",
    "cancel",
    "crash",
    "take back",
    "ask twice",
    "ask at open",
    "look",
    "without the key",
]
STEP = st.tuples(st.sampled_from(HOW), CHANGES)


def _content(inode: int, length: int, turn: int) -> bytes:
    return hashlib.shake_128(b"%d %d" % (inode, turn)).digest(length)


RECORDS = 0
"""The key under which the model keeps the auxiliary metadata; no file has this number."""


def _with_record(aux: AuxMetadata, change: Any) -> AuxMetadata:
    """One more record, or all of this kind removed, with a reserve that depends on its length."""
    _, kind, length = change
    uuid = UUID(int=kind + 1)
    return (aux.remove(uuid) if aux.of(uuid) else aux.add(uuid, bytes(length))).with_reserve(length or None)


def _some_file(files: Files, number: int) -> int | None:
    inodes = sorted(files.keys() - {RECORDS})
    return inodes[number % len(inodes)] if inodes else None


def _change(transaction: Any, files: Files, changes: list[Any], turn: int) -> None:
    for change in changes:
        if change[0] == "record":
            transaction.set_aux(_with_record(transaction.aux, change))
            files[RECORDS] = (0, transaction.aux.pack())
            continue
        if change[0] == "write":
            _, inode, length, flags = change
            data = _content(inode, length, turn)
            transaction.write(inode, data, flags)
            files[inode] = (flags, data)
        elif (inode := _some_file(files, change[1])) is not None:
            transaction.unlink(inode)
            del files[inode]
    assert all(transaction.read(inode) == data for inode, (_, data) in files.items() if inode != RECORDS)


def _found(volume: Volume) -> Files:
    files = {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()}
    return files | {RECORDS: (0, volume.aux.pack())}


def _once(answer: Decision) -> Callable[[FoundJournal], Decision]:
    """This answer first, yes from then on."""
    answers = [answer]
    return lambda _found: answers.pop() if answers else Decision.YES


def _look(device: MemoryDevice, wanted: Files, old: Files) -> None:
    """Both sides of a pending commit can be seen without writing."""
    before = bytes(device.data)
    for answer, files in ((Decision.YES, wanted), (Decision.NO, old), (Decision.UNKNOWN, old)):
        seen = Volume.open(device, KEY, decide=_once(answer), read_only=True)
        assert _found(seen) == files
        assert (seen.pending is not None) == (answer is Decision.UNKNOWN)
    assert bytes(device.data) == before


def _ask(volume: Volume, answer: Decision) -> None:
    """The commit that waits is not decided at first, and then it is."""
    assert volume.pending is not None
    assert volume.pending.decide(lambda _found: Decision.UNKNOWN) is Decision.UNKNOWN
    volume.pending.decide(lambda _found: answer)


def _group(volume: Volume, files: Files, changes: list[Any], turn: int) -> Files:
    """Each change in a transaction of its own; what those that were taken lead to."""
    group = CommitGroup(volume)
    outcomes: list[tuple[int, tuple[int, bytes] | None]] = []
    for change in changes:
        transaction = group.transaction()
        if change[0] == "write":
            _, inode, length, flags = change
            transaction.write(inode, _content(inode, length, turn), flags)
            outcomes.append((inode, (flags, _content(inode, length, turn))))
        elif change[0] == "record":
            transaction.set_aux(_with_record(transaction.aux, change))
            outcomes.append((RECORDS, (0, transaction.aux.pack())))
        elif (number := _some_file(files, change[1])) is not None:
            transaction.unlink(number)
            outcomes.append((number, None))
        else:
            continue
        group.add(transaction)
    wanted = dict(files)
    for (inode, outcome), error in zip(outcomes, group.commit(), strict=True):
        if error is not None:
            assert error.code in ("cocoonfs-full", "cocoonfs-conflict")
        elif outcome is None:
            del wanted[inode]
        else:
            wanted[inode] = outcome
    return wanted


def _without_the_key(device: MemoryDevice, files: Files, changes: list[Any]) -> Files:
    """Change the records where the reserve allows it."""
    files = dict(files)
    for change in changes:
        if change[0] != "record":
            continue
        aux = _with_record(read_aux(device), change).with_reserve(read_aux(device).reserve_bytes)
        try:
            write_aux(device, aux)
        except StateError as error:
            assert error.code == "cocoonfs-aux-full"  # noqa: PT017
        else:
            files[RECORDS] = (0, aux.pack())
    return files


def _run(layout: ImageLayout, steps: list[Any], size: int, *, trim: bool = False) -> None:
    device = MemoryDevice(size, block_size_bytes=128)
    volume = Volume.create(device, KEY, salt=b"", layout=layout, trim=trim)
    files: Files = {RECORDS: (0, AuxMetadata().pack())}
    for turn, (how, changes) in enumerate(steps):
        wanted = dict(files)
        counter = volume.counter
        if how == "without the key":
            files = _without_the_key(device, files, changes)
            volume = Volume.open(device, KEY, trim=trim)
            assert (_found(volume), volume.counter) == (files, counter)
            continue
        if how == "group":
            files = _group(volume, files, changes, turn)
            assert _found(volume) == files
            continue
        transaction = volume.transaction()
        _change(transaction, wanted, changes, turn)
        if how == "abandon":
            transaction.abandon()
            continue
        try:
            prepared = transaction.prepare()
        except StateError as error:
            if error.code != "cocoonfs-full":
                raise
            assert _found(volume) == files
            continue
        assert _found(volume) == files
        assert prepared.counter == counter + 1
        if how == "commit":
            prepared.apply()
            files = wanted
        elif how == "cancel":
            prepared.cancel()
        elif how in ("ask twice", "ask at open"):
            answer = Decision.YES if turn % 2 else Decision.NO
            if how == "ask at open":
                volume = Volume.open(device, KEY, decide=_once(Decision.UNKNOWN), trim=trim)
                assert _found(volume) == files
            _ask(volume, answer)
            files = wanted if answer is Decision.YES else files
        elif how == "look":
            _look(device, wanted, files)
            prepared.apply()
            files = wanted
        else:
            forward = how == "crash"
            answer = Decision.YES if forward else Decision.NO
            volume = Volume.open(device, KEY, decide=_once(answer), trim=trim)
            files = wanted if forward else files
        assert _found(volume) == files
        assert volume.counter == counter + (files is wanted)
    check(volume)
    again = Volume.open(device, KEY)
    assert _found(again) == files
    assert again.root_digest == volume.root_digest
    check(again)


FULL = [
    ("commit", [("write", 16, 50_000, 1)]),
    ("commit", [("write", 17, 50_000, 2)]),  # refused
    ("group", [("write", 18, 20_000, 3), ("write", 19, 60_000, 4), ("record", 1, 20)]),  # the second is
    ("commit", [("unlink", 0), ("record", 2, 700)]),
    ("without the key", [("record", 3, 20)]),
    ("commit", [("write", 17, 50_000, 5)]),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(FULL, True)
@given(st.lists(STEP, max_size=12), st.booleans())
def test_default_configuration(steps: list[Any], trim: bool) -> None:
    _run(DEFAULT_LAYOUT, steps, 96 << 10, trim=trim)


@pytest.mark.long
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=40), st.booleans())
def test_default_configuration_at_length(steps: list[Any], trim: bool) -> None:
    _run(DEFAULT_LAYOUT, steps, 96 << 10, trim=trim)


LAYOUTS = st.builds(
    lambda ab, io, node, data, bitmap, leaf, internal: DEFAULT_LAYOUT.replace(
        allocation_block_size_128b_log2=ab,
        io_block_allocation_blocks_log2=io,
        auth_tree_node_io_blocks_log2=node,
        auth_tree_data_block_allocation_blocks_log2=data,
        bitmap_file_block_allocation_blocks_log2=bitmap,
        index_leaf_node_allocation_blocks_log2=leaf,
        index_internal_node_allocation_blocks_log2=internal,
    ),
    *(st.integers(0, top) for top in (2, 4, 3, 4, 4, 2, 2)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LAYOUTS, st.lists(STEP, max_size=6))
def test_other_block_sizes(layout: ImageLayout, steps: list[Any]) -> None:
    _run(layout, steps, 512 << 10)


@pytest.mark.long
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LAYOUTS, st.lists(STEP, max_size=16))
def test_other_block_sizes_at_length(layout: ImageLayout, steps: list[Any]) -> None:
    _run(layout, steps, 512 << 10)
