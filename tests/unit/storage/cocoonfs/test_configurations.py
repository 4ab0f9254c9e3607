# SPDX-License-Identifier: MIT OR Apache-2.0
"""Block sizes over their legal range, the smallest images, and a large one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from svsm.abi.block import Extent
from svsm.formats.errors import FormatError
from svsm.storage.cocoonfs import DEFAULT_LAYOUT, AuxMetadata, Volume
from svsm.storage.cocoonfs.presets import layout_of
from svsm.storage.drivers.memory import MemoryDevice
from tests.unit.storage.cocoonfs.fsck import check

KEY = b"configurations"


def _data(seed: int, length: int) -> bytes:
    return hashlib.shake_128(b"configuration %d" % seed).digest(length)


def _work(size: int, sizes: dict[str, int], salt: bytes = b"salt") -> None:
    """Create, write, replace, leave a journal, replay it, check everything."""
    layout = layout_of(**sizes)  # type: ignore[arg-type]
    device = MemoryDevice(size, block_size_bytes=128)
    volume = Volume.create(device, KEY, salt=salt, layout=layout, aux=AuxMetadata(reserve_bytes=64))
    files = {16 + n: _data(n, 700 * n) for n in range(6)}
    with volume.transaction() as transaction:
        for inode, data in files.items():
            transaction.write(inode, data)
    transaction = volume.transaction()
    files[17] = _data(50, 900)
    transaction.write(17, files[17])
    transaction.unlink(20)
    del files[20]
    transaction.prepare()
    again = Volume.open(device, KEY)
    assert (again.layout, again.salt) == (layout, salt)
    assert {info.inode: again.read(info.inode) for info in again.list()} == files
    check(again)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (64 << 10, {"io_block_bytes": 128}),
        (1 << 20, {"io_block_bytes": 8192}),
        (64 << 10, {"data_block_bytes": 128}),
        (1 << 20, {"data_block_bytes": 8192}),
        (64 << 10, {"io_block_bytes": 128, "tree_node_bytes": 128}),
        (1 << 20, {"tree_node_bytes": 65536}),
        (64 << 10, {"bitmap_block_bytes": 128}),
        (1 << 20, {"bitmap_block_bytes": 65536}),
        (128 << 10, {"leaf_node_bytes": 8192}),
        (128 << 10, {"internal_node_bytes": 8192}),
        (2 << 20, {"allocation_block_bytes": 16384}),
        (1 << 20, {"io_block_bytes": 8192, "data_block_bytes": 128}),
        (1 << 20, {"io_block_bytes": 128, "data_block_bytes": 8192}),
    ],
)
def test_each_end_of_each_range(size: int, sizes: dict[str, int]) -> None:
    _work(size, sizes)


@pytest.mark.long
def test_salts() -> None:
    """Of every length that there is."""
    for salt_bytes in range(256):
        _work(64 << 10, {}, bytes(range(salt_bytes)))
        _work(64 << 10, {"io_block_bytes": 128}, bytes(range(salt_bytes)))


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (64 << 20, {"allocation_block_bytes": 1 << 20}),
        (64 << 20, {"io_block_bytes": 1 << 20, "allocation_block_bytes": 1 << 14}),
        (256 << 20, {"tree_node_bytes": 64 << 20}),
        (256 << 20, {"allocation_block_bytes": 8 << 20}),
    ],
)
def test_large_blocks(size: int, sizes: dict[str, int]) -> None:
    """The largest tree node, and large allocation blocks; the largest, 64 MiB, need more than 1 GiB."""
    _work(size, sizes)


def test_limits_of_the_format() -> None:
    """What the format bounds to 64 blocks, what it bounds to 64 bits, and what only we bound."""
    for field in (
        "io_block_allocation_blocks_log2",
        "auth_tree_data_block_allocation_blocks_log2",
        "index_leaf_node_allocation_blocks_log2",
        "index_internal_node_allocation_blocks_log2",
    ):
        DEFAULT_LAYOUT.replace(**{field: 6}).validate()
        with pytest.raises(FormatError) as caught:
            DEFAULT_LAYOUT.replace(**{field: 7}).validate()
        assert caught.value.code == "cocoonfs-layout"
    for field, ours, legal in [
        ("allocation_block_size_128b_log2", 16, 53),
        ("auth_tree_node_io_blocks_log2", 17, 54),
        ("bitmap_file_block_allocation_blocks_log2", 19, 56),
    ]:
        DEFAULT_LAYOUT.replace(**{field: ours}).validate()
        for value, code in [(ours + 1, "cocoonfs-unsupported-layout"), (legal, "cocoonfs-unsupported-layout")]:
            with pytest.raises(FormatError) as caught:
                DEFAULT_LAYOUT.replace(**{field: value}).validate()
            assert caught.value.code == code
        for value in (legal + 1, 255):
            with pytest.raises(FormatError) as caught:
                DEFAULT_LAYOUT.replace(**{field: value}).validate()
            assert caught.value.code == "cocoonfs-layout"


def test_smallest_images() -> None:
    """As small as the reference program makes them: 6 KiB by default, 1 KiB with small blocks."""
    small = layout_of(io_block_bytes=128, data_block_bytes=128, tree_node_bytes=128, bitmap_block_bytes=128)
    for size, layout, reserve in [(6144, DEFAULT_LAYOUT, 1024), (1024, small, None)]:
        aux = AuxMetadata(reserve_bytes=reserve)
        device = MemoryDevice(size, block_size_bytes=128)
        volume = Volume.create(device, KEY, salt=b"", layout=layout, aux=aux)
        assert volume.size_bytes == size
        check(volume)
        with pytest.raises(FormatError) as caught:
            Volume.create(MemoryDevice(size - 128, block_size_bytes=128), KEY, salt=b"", layout=layout, aux=aux)
        assert caught.value.code == "cocoonfs-too-small"


class _Huge(MemoryDevice):
    """Says that it is larger than any volume that can be laid out, and is written to by nobody."""

    @property
    def size_bytes(self) -> int:
        return 1 << 70

    def write(self, extents: Sequence[Extent]) -> None:
        raise AssertionError


def test_a_disk_without_end_is_refused_before_memory_is_taken() -> None:
    for size in (None, (1 << 34) + 128):
        with pytest.raises(FormatError) as caught:
            Volume.create(_Huge(4096), KEY, salt=b"", size_bytes=size)
        assert caught.value.code == "cocoonfs-too-large"


_LARGE = """
    import os, re, sys
    from svsm.storage.cocoonfs import Volume
    from svsm.storage.drivers.file import FileDevice
    def most():
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
    before = most()
    descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, 1 << 30)
    volume = Volume.create(FileDevice(descriptor), b"key", salt=b"large")
    with volume.transaction() as transaction:
        transaction.write(16, b"x" * 100_000)
    assert volume.read(16) == b"x" * 100_000
    print(volume.size_bytes, most() - before)
"""


@pytest.mark.long
@pytest.mark.timeout(600)
def test_one_gibibyte(tmp_path: Path) -> None:
    image = tmp_path / "image"
    program = [sys.executable, "-c", textwrap.dedent(_LARGE), str(image)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=600)
    size, kibibytes = done.stdout.split()
    image.unlink()
    assert int(kibibytes) < 150 << 10, "more memory than a process may have, beyond Python's own"
    assert int(size) == 1 << 30
    assert int(kibibytes) < 150 << 10
