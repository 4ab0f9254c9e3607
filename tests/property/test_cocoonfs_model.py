# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume behaves like a dictionary, whatever is done to it in whatever order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svsm.formats.errors import StateError
from svsm.storage.cocoonfs import Decision, FoundJournal, ImageLayout, Volume
from svsm.storage.cocoonfs.group import CommitGroup
from svsm.storage.cocoonfs.layout import DEFAULT_LAYOUT
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import check

KEY = b"model"
Files = dict[int, tuple[int, bytes]]

INODES = st.one_of(st.integers(16, 60), st.integers(16, (1 << 64) - 1))
LENGTHS = st.one_of(st.integers(0, 300), st.sampled_from([111, 112, 495, 496, 1000]), st.integers(0, 12000))
WRITE = st.tuples(st.just("write"), INODES, LENGTHS, st.integers(0, 255))
UNLINK = st.tuples(st.just("unlink"), st.integers(0, 1 << 16))
CHANGES = st.lists(st.one_of(WRITE, WRITE, UNLINK), min_size=1, max_size=8)
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
]
STEP = st.tuples(st.sampled_from(HOW), CHANGES)


def _content(inode: int, length: int, turn: int) -> bytes:
    return hashlib.shake_128(b"%d %d" % (inode, turn)).digest(length)


def _change(transaction: Any, files: Files, changes: list[Any], turn: int) -> None:
    for change in changes:
        if change[0] == "write":
            _, inode, length, flags = change
            data = _content(inode, length, turn)
            transaction.write(inode, data, flags)
            files[inode] = (flags, data)
        elif files:
            inode = sorted(files)[change[1] % len(files)]
            transaction.unlink(inode)
            del files[inode]
    assert all(transaction.read(inode) == data for inode, (_, data) in files.items())


def _found(volume: Volume) -> Files:
    return {info.inode: (info.flags, volume.read(info.inode)) for info in volume.list()}


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
        elif files:
            inode = sorted(files)[change[1] % len(files)]
            transaction.unlink(inode)
            outcomes.append((inode, None))
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


def _run(layout: ImageLayout, steps: list[Any], size: int, *, trim: bool = False) -> None:
    device = MemoryDevice(size, block_size_bytes=128)
    volume = Volume.create(device, KEY, salt=b"", layout=layout, trim=trim)
    files: Files = {}
    for turn, (how, changes) in enumerate(steps):
        wanted = dict(files)
        counter = volume.counter
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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
