# SPDX-License-Identifier: MIT OR Apache-2.0
"""A volume behaves like a dictionary, whatever is done to it in whatever order."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svsm.formats.errors import StateError
from svsm.storage.cocoonfs import Decision, ImageLayout, Volume
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
STEP = st.tuples(st.sampled_from(["commit", "commit", "commit", "abandon", "cancel", "crash", "take back"]), CHANGES)


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


def _run(layout: ImageLayout, steps: list[Any], size: int) -> None:
    device = MemoryDevice(size, block_size_bytes=128)
    volume = Volume.create(device, KEY, salt=b"", layout=layout)
    files: Files = {}
    for turn, (how, changes) in enumerate(steps):
        wanted = dict(files)
        counter = volume.counter
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
        else:
            forward = how == "crash"
            answer = Decision.YES if forward else Decision.NO
            volume = Volume.open(device, KEY, decide=lambda _found, answer=answer: answer)  # type: ignore[misc]
            files = wanted if forward else files
        assert _found(volume) == files
        assert volume.counter == counter + (files is wanted)
    check(volume)
    again = Volume.open(device, KEY)
    assert _found(again) == files
    assert again.root_digest == volume.root_digest
    check(again)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=12))
def test_default_configuration(steps: list[Any]) -> None:
    _run(DEFAULT_LAYOUT, steps, 96 << 10)


@pytest.mark.long
@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, max_size=40))
def test_default_configuration_at_length(steps: list[Any]) -> None:
    _run(DEFAULT_LAYOUT, steps, 96 << 10)


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
