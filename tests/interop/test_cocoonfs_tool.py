# SPDX-License-Identifier: MIT OR Apache-2.0
"""The reference program reads, changes and replays volumes of ours, and we go on with what it wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from svsm.storage.cocoonfs import Volume
from svsm.storage.cocoonfs.check import check
from svsm.storage.drivers.memory import MemoryDevice
from tests.interop.cocoonfs_tool import Tool

pytestmark = pytest.mark.interop
KEY = hashlib.sha256(b"interop").digest()


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    return Tool(tmp_path, KEY)


def _content(seed: int, length: int) -> bytes:
    return hashlib.shake_128(b"interop %d" % seed).digest(length)


def _created(size: int = 256 << 10) -> tuple[MemoryDevice, Volume]:
    device = MemoryDevice(size, block_size_bytes=128)
    return device, Volume.create(device, KEY, salt=b"\xdd\xee\xff")


def _tool_agrees(tool: Tool, device: MemoryDevice, files: dict[int, tuple[int, bytes]], sample: int = 8) -> None:
    tool.give(device)
    assert tool.files() == {inode: flags for inode, (flags, _) in files.items()}
    for inode in sorted(files)[:: max(1, len(files) // sample)]:
        assert tool.read(inode) == files[inode][1]


def _write(volume: Volume, files: dict[int, tuple[int, bytes]], changes: dict[int, bytes | None]) -> None:
    with volume.transaction() as transaction:
        for inode, data in changes.items():
            if data is None:
                transaction.unlink(inode)
                del files[inode]
            else:
                transaction.write(inode, data, inode % 256)
                files[inode] = (inode % 256, data)


@pytest.mark.parametrize("size", [16 << 10, 64 << 10, 559616, 1 << 20, 8 << 20])
def test_mkfs(tool: Tool, size: int) -> None:
    device, volume = _created(size)
    files: dict[int, tuple[int, bytes]] = {}
    _tool_agrees(tool, device, files)
    _write(volume, files, {16: b"", 17: _content(17, 111), 18: _content(18, 4000)})
    _tool_agrees(tool, device, files)


def test_replace_and_unlink(tool: Tool) -> None:
    device, volume = _created()
    files: dict[int, tuple[int, bytes]] = {}
    _write(volume, files, {16: _content(1, 5000), 20: _content(2, 30000), 1 << 40: _content(3, 1)})
    _write(volume, files, {16: _content(4, 100), 20: _content(5, 40000)})
    _write(volume, files, {1 << 40: None, 21: _content(6, 9000)})
    _write(volume, files, {16: b"", 20: None})
    _tool_agrees(tool, device, files)


def test_fragmentation(tool: Tool) -> None:
    """Files in many extents: indirect lists, lists longer than a block, lists in a chain."""
    device, volume = _created(1 << 20)
    files: dict[int, tuple[int, bytes]] = {}
    _write(volume, files, {100 + n: _content(n, 900) for n in range(700)})
    _write(volume, files, {100 + n: None for n in range(0, 700, 2)})
    # Fill the rest, so that only the holes are left.
    free = volume.free_bytes
    _write(volume, files, {16: _content(1, free - 360_000 - 40_000)})
    _write(volume, files, {17: _content(2, 250_000)})
    _tool_agrees(tool, device, files)
    assert tool.read(17) == files[17][1]
    assert tool.read(16) == files[16][1]
    _write(volume, files, {17: None})
    _tool_agrees(tool, device, files)


def test_many_inodes(tool: Tool) -> None:
    device, volume = _created(1 << 20)
    files: dict[int, tuple[int, bytes]] = {}
    for start in range(0, 600, 100):
        _write(volume, files, {16 + (n * 7919) % 6000: _content(n, n % 50) for n in range(start, start + 100)})
    _tool_agrees(tool, device, files)
    for inode in sorted(files)[100:400]:
        files.pop(inode)
    with volume.transaction() as transaction:
        for info in volume.list():
            if info.inode not in files:
                transaction.unlink(info.inode)
    _tool_agrees(tool, device, files)


@pytest.mark.long
def test_thousands_of_inodes(tool: Tool) -> None:
    """Both sides list the same after 6,000 files were created, and after half of them went."""
    device, volume = _created(8 << 20)
    files: dict[int, tuple[int, bytes]] = {}
    numbers = [16 + n * 7919 % (1 << 24) for n in range(6000)]
    for start in range(0, len(numbers), 500):
        _write(volume, files, {inode: _content(inode, inode % 300) for inode in numbers[start : start + 500]})
    assert len(files) == len(numbers)
    for gone in ([], numbers[::2]):
        for start in range(0, len(gone), 500):
            _write(volume, files, dict.fromkeys(gone[start : start + 500]))
        report = check(device, KEY)
        assert (report.opened, report.findings) == (True, [])
        again = Volume.open(device, KEY)
        assert [(info.inode, info.flags) for info in again.list()] == [(n, files[n][0]) for n in sorted(files)]
        assert {inode: again.read(inode) for inode in sorted(files)[::37]} == {
            n: files[n][1] for n in sorted(files)[::37]
        }
        _tool_agrees(tool, device, files)
    assert not any(inode in volume.inodes() for inode in numbers[::2])


@pytest.mark.parametrize("trim", [False, True])
def test_pending_journal(tool: Tool, trim: bool) -> None:
    """The tool replays journals of ours: small ones, ones with tails over distant regions, ones that ask for trims."""
    device, _ = _created(1 << 20)
    volume = Volume.open(device, KEY, trim=trim)
    files: dict[int, tuple[int, bytes]] = {}
    _write(volume, files, {16 + n: _content(n, 3000) for n in range(60)})
    transaction = volume.transaction()
    for inode in (16, 40, 75):
        transaction.write(inode, _content(inode, 2500), inode % 256)
        files[inode] = (inode % 256, _content(inode, 2500))
    transaction.unlink(60)
    del files[60]
    transaction.write(900, _content(9, 100_000), 900 % 256)
    files[900] = (900 % 256, _content(9, 100_000))
    prepared = transaction.prepare()
    pending = MemoryDevice(device.data, block_size_bytes=128)
    _tool_agrees(tool, pending, files, sample=12)
    # Tool and replay of ours leave the same bytes, where anything is in use: the tool discards nothing in a file.
    ours = MemoryDevice(pending.data, block_size_bytes=128)
    replayed = Volume.open(ours, KEY)
    assert replayed.root_digest == prepared.root_digest
    theirs = bytes(tool.take().data)
    differing = [at for at in range(0, len(theirs), 128) if theirs[at : at + 128] != ours.data[at : at + 128]]
    assert bool(differing) == trim
    assert not any(replayed.image.used.any_used(at // 128, at // 128 + 1) for at in differing)
    prepared.apply()
    assert Volume.open(device, KEY).root_digest == prepared.root_digest
