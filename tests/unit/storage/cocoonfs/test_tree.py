# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tree keeps few leaves in memory: what went away comes back authenticated, or not at all."""

from __future__ import annotations

import hashlib

import pytest

from svsm.formats.errors import IntegrityError
from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs import tree as tree_module
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import check

KEY = b"tree"


def _content(seed: int, length: int) -> bytes:
    return hashlib.shake_128(b"tree %d" % seed).digest(length)


def test_few_leaves_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for four leaves (of 64), files, commits and a whole check are as ever."""
    monkeypatch.setattr(tree_module, "_KEPT_LEAVES", 4)
    device = MemoryDevice(1 << 20)
    volume = Volume.create(device, KEY, salt=b"")
    files = {16 + n: _content(n, 9000 + n) for n in range(60)}
    for first in range(16, 76, 10):
        with volume.transaction() as transaction:
            for inode in range(first, first + 10):
                transaction.write(inode, files[inode])
    with volume.transaction() as transaction:
        for inode in list(files)[::7]:
            transaction.unlink(inode)
            del files[inode]
        transaction.write(17, b"replaced")
    files[17] = b"replaced"
    for opened in (volume, Volume.open(device, KEY)):
        assert {info.inode: opened.read(info.inode) for info in opened.list()} == files
        assert len(opened.image.tree._leaves) <= 4
    check(volume)


def test_a_leaf_that_comes_back_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older leaf with its older data, put back after the newer one left memory, is refused."""
    monkeypatch.setattr(tree_module, "_KEPT_LEAVES", 4)
    device = MemoryDevice(1 << 20)
    volume = Volume.create(device, KEY, salt=b"")
    files = {16 + n: _content(n, 30000) for n in range(20)}
    with volume.transaction() as transaction:
        for inode, data in files.items():
            transaction.write(inode, data)
    older = bytes(device.data)
    with volume.transaction() as transaction:
        transaction.write(16, _content(99, 30000))
    for inode in range(17, 36):
        assert volume.read(inode) == files[inode]
    device.data[:] = older
    with pytest.raises(IntegrityError):
        volume.read(16)
